"""Which kernel is chosen, given what they would take."""

import math
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from sites import square

from adjointlab.transpose.kernels import registry as kernels
from adjointlab.transpose.kernels import select as choice
from adjointlab.transpose.kernels.convolution import flipped_site, sized
from adjointlab.transpose.kernels.select import choose


def test_large_kernels_go_to_the_transform_without_measuring() -> None:
    assert choose(square(512, 31, 2, transposed=True), measure=False) == "fft"


def test_many_channels_stay_native_without_measuring() -> None:
    site = sized(square(64, 3, 2, transposed=False)._replace(input_shape=(64, 64, 64), output_shape=(64, 64, 64)))
    assert choose(site, measure=False) == "native"


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget the choices made before the test, and those made in it."""
    choice._fastest.cache_clear()
    yield
    choice._fastest.cache_clear()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, fresh: None) -> Callable[..., list[str]]:
    """Give kernels made-up times; returns the list of those that were run."""

    def install(**seconds: float) -> list[str]:
        seen: list[str] = []

        def run(name: str) -> float:
            seen.append(name)
            return seconds.get(name, 1.0)

        monkeypatch.setattr(choice, "_runner", lambda site, clock: run)
        return seen

    return install


def test_thorough_choice_is_the_measured_one(timed: Callable[..., list[str]]) -> None:
    seen = timed(tapped=0.5)
    assert choose(square(64, 7, 2, transposed=True), measure=True, thorough=True) == "tapped"
    assert "native" in seen


def test_a_tie_stays_native(timed: Callable[..., list[str]]) -> None:
    timed()
    assert choose(square(64, 7, 2, transposed=True), measure=True, thorough=True) == "native"


def test_what_is_far_behind_is_not_run(timed: Callable[..., list[str]]) -> None:
    seen = timed(fft=1e-4, tapped=2e-4, flipped=3e-3, native=1e-1)
    assert choose(square(512, 11, 2, transposed=True), measure=True) == "fft"
    assert seen.count("native") == 3  # on a part of the image, to know the rate of the plain one


def test_a_transposed_convolution_is_computed_as_the_plain_one_that_it_is(timed: Callable[..., list[str]]) -> None:
    seen = timed(fft=1e-4)
    plain, transposed = (square(512, 11, 2, transposed=transposed) for transposed in (False, True))
    assert flipped_site(transposed) == plain
    assert choose(plain, measure=True) == "fft"
    seen.clear()
    assert choose(transposed, measure=True) == "fft"
    assert not {"flipped", "tapped", "polyphase"} & set(seen)


def test_the_part_that_is_run_is_a_convolution_of_the_same_kind() -> None:
    for transposed in (False, True):
        site = square(512, 11, 2, transposed=transposed)
        part = choice._part(site, 0.01)
        assert 0.005 < part.macs / site.macs < 0.02
        x = torch.randn(part.batch, *part.input_shape)
        weight = torch.randn(1, 1, 11, 11)
        assert kernels.native(part)(x, weight, None).shape == (part.batch, *part.output_shape)


def test_the_part_that_is_run_has_outputs_whatever_the_padding() -> None:
    site = square(512, 3, 2, transposed=True)
    wide = site._replace(padding=(20, 20), output_shape=(site.output_shape[0], *[512 - 1 + 3 - 40] * 2))
    part = choice._part(wide, 1e-4)
    assert min(part.output_shape) >= 1
    assert part.macs < site.macs


def test_the_part_that_is_run_has_the_kernel_of_the_whole() -> None:
    site = square(512, 3, 2, transposed=False)  # PyTorch has another one for images of up to 20480 entries
    assert math.prod(choice._part(site, 1e-4).input_shape) > 20480
    small = square(64, 3, 2, transposed=False)
    assert choice._part(small, 1e-4) == small


def test_native_stays_where_its_best_run_is_close_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1e-4, 3e-4])  # the machine is slow from the second run on

    def run(name: str) -> float:
        return next(times, 3e-4) if name == "native" else 2e-4 if name == "polyphase" else 1.0

    monkeypatch.setattr(choice, "_runner", lambda site, clock: run)
    site = square(64, 7, 2, transposed=False)
    assert choice._fastest.__wrapped__(site, ("native", "polyphase"), True) == "native"


@pytest.mark.parametrize(("loops", "busy"), [((2e-3, 8e-3, 8e-3), True), ((2e-3, 1e-5), False), ((1e-5,), False)])
def test_a_run_counts_unless_threads_are_kept_waiting(
    monkeypatch: pytest.MonkeyPatch, loops: tuple[float, ...], *, busy: bool
) -> None:
    times = iter([0.5, *loops])
    monkeypatch.setattr(choice, "_timed", lambda way, device: (way(), next(times))[1])
    if busy:
        with pytest.raises(choice._BusyError, match="kept waiting"):
            choice._clocked(lambda: None, torch.device("cpu"))
    else:
        assert choice._clocked(lambda: None, torch.device("cpu")) == 0.5
    assert not list(times)


@pytest.mark.cpu
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("transposed", [False, True])
def test_on_a_busy_machine_the_model_decides_for_now(monkeypatch: pytest.MonkeyPatch, *, transposed: bool) -> None:
    site = square(64, 7, 2, transposed=transposed)
    by_model = choose(site, measure=False)
    assert by_model != "native"

    def busy(way: Callable[[], object], device: torch.device) -> float:
        raise choice._BusyError

    with monkeypatch.context() as patched:
        patched.setattr(choice, "_clocked", busy)
        assert choose(site, measure=True) == by_model
        assert choice.quickest({"first": lambda: None, "second": lambda: None}, site.device) == "first"
    assert choice._fastest.cache_info().currsize == 0
    monkeypatch.setattr(choice, "_timed", lambda way, device: 1.0)  # all take the same
    assert choose(site, measure=True, thorough=True) == "native"
    assert choice._fastest.cache_info().currsize > 0


def test_the_quickest_way_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_clocked", choice._timed)  # whatever else the machine does
    ways = {"slow": lambda: time.sleep(2e-3), "quick": lambda: None, "slower": lambda: time.sleep(4e-3)}
    assert choice.quickest(ways, torch.device("cpu")) == "quick"
    assert choice.quickest({"only": lambda: pytest.fail("there is no need to run it")}, torch.device("cpu")) == "only"
    assert choice.quickest({}, torch.device("cpu")) is None


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("channels", "n", "k", "expected"), [((1, 1), 512, 31, True), ((1, 1), 512, 3, False), ((64, 64), 64, 3, False)]
)
def test_large_gradients_in_kernels_are_products_of_transforms(
    channels: tuple[int, int], n: int, k: int, expected: bool
) -> None:
    site = square(n, k, 2, transposed=False)._replace(
        batch=channels[0], kernel=(n, n), output_shape=(channels[1], k, k)
    )
    assert choice.by_transforms(sized(site)) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [((1.0, 1.04, 1.2), "b"), ((1.0, 1.06, 1.2), "a"), ((1.0, 1.2, 1.04), "c")]
)
def test_of_ways_about_as_quick_it_is_the_last(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], expected: str
) -> None:
    monkeypatch.setattr(choice, "_clocked", lambda way, device: way())
    ways = {name: lambda taken=taken: taken for name, taken in zip("abc", seconds, strict=True)}
    assert choice.quickest(ways, torch.device("cpu")) == expected


@pytest.mark.parametrize(("taken", "runs"), [(1e-4, 2), (1.0, 1)])
def test_short_programs_are_measured_right_after_another_run(
    monkeypatch: pytest.MonkeyPatch, taken: float, runs: int
) -> None:
    calls: list[str] = []

    def clocked(way: Callable[[], object], device: torch.device) -> float:
        way()
        return taken

    monkeypatch.setattr(choice, "_clocked", clocked)
    choice.quickest({name: lambda name=name: calls.append(name) for name in "ab"}, torch.device("cpu"))
    assert calls[-2 * runs :] == ["a"] * runs + ["b"] * runs


@pytest.mark.parametrize(
    ("device", "first", "expected"), [("cpu", 4e-4, 4e-4), ("cuda", 4e-4, 2e-4), ("cuda", 1.0, 1.0)]
)
def test_on_accelerators_a_short_kernel_is_measured_right_after_another_run(
    monkeypatch: pytest.MonkeyPatch, device: str, first: float, expected: float
) -> None:
    times = iter([first, 2e-4])
    monkeypatch.setattr(choice, "_waited", lambda way, device: next(times))
    assert choice._timed(lambda: None, torch.device(device)) == expected


@pytest.mark.cpu
@pytest.mark.parametrize(("device", "expected"), [("cpu", "native"), ("cuda", "fft")])
def test_many_ops_lose_time_between_other_work_on_the_cpu_alone(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: str
) -> None:
    times = {"native": 2.4e-4, "fft": 1.8e-4}
    monkeypatch.setattr(choice, "_runner", lambda site, clock: times.__getitem__)
    site = square(24, 7, 2, transposed=False)._replace(device=torch.device(device))
    assert choice._fastest.__wrapped__(site, ("native", "fft"), True) == expected
