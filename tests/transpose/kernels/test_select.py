"""The rule for kernels: by a model, then by runs; native unless another is clearly faster."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from built import BY_NAME, square

from adjointlab.transpose.kernels import select
from adjointlab.transpose.kernels.registry import NATIVE, available
from adjointlab.transpose.kernels.select import (
    by_model,
    choose,
    fastest,
    is_quicker,
    quickest,
    suits_transform,
    undisturbed,
)

CPU = torch.device("cpu")
pytestmark = pytest.mark.cpu


def clocked(seconds: dict[str, float]) -> Callable[..., float]:
    """Return a clock by which kernels take given times: infinite for those that are not named."""

    def clock(way: Callable[[], object], device: torch.device) -> float:
        return seconds.get(_kernel_of(way), math.inf)

    return clock


def _kernel_of(way: Callable[[], object]) -> str:
    (run,) = [cell.cell_contents for cell in way.__closure__ if hasattr(cell.cell_contents, "kernel")][:1]
    return run.kernel.name


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "k"), [(64, 3), (128, 11), (256, 15)])
@pytest.mark.parametrize("winner", ["native", "flipped", "polyphase", "fft", "tapped"])
def test_the_fastest_wins_where_it_is_clearly_faster(winner: str, n: int, k: int, transposed: bool) -> None:
    spec = square(n, k, 2, transposed=transposed)
    names = [kernel.name for kernel in available(spec)]
    if winner in names:
        times = dict.fromkeys(names, 1e-3) | {winner: 1e-4}
        assert fastest(spec, clocked(times), math.inf).name == winner
        slightly = dict.fromkeys(names, 1e-3) | {winner: 0.9e-3}
        assert fastest(spec, clocked(slightly), math.inf) is NATIVE


def test_kernels_far_from_the_best_by_the_model_are_not_run() -> None:
    spec, ran = square(512, 31, 2, transposed=False), []

    def clock(way: Callable[[], object], device: torch.device) -> float:
        ran.append(_kernel_of(way))
        return 1e-3

    fastest(spec, clock)
    costs = {kernel.name: kernel.cost(spec) for kernel in available(spec)}
    near = {name for name, cost in costs.items() if cost <= 8 * min(costs[n] for n in costs if n != "native")}
    assert set(ran) <= {*near, "native"}
    assert "tapped" not in ran


def test_native_is_run_on_a_part_where_the_whole_takes_long() -> None:
    spec = square(512, 31, 2, transposed=True)
    part = select._part(spec, 0.01)
    assert 0.001 < part.macs / spec.macs < 0.1
    x = torch.zeros(part.batch, *part.input_shape)
    weight = torch.zeros(1, 1, *part.kernel)
    assert NATIVE.bind(part)(x, weight, None).shape[1:] == part.output_shape
    sizes = []

    def clock(way: Callable[[], object], device: torch.device) -> float:
        (run,) = [cell.cell_contents for cell in way.__closure__ if hasattr(cell.cell_contents, "kernel")][:1]
        if run.kernel is NATIVE:
            sizes.append(run.spec.macs)
            return run.spec.macs / 1e8  # a slow one
        return 1e-3 if run.kernel.name == "fft" else 1.0

    assert fastest(spec, clock).name == "fft"
    assert max(sizes) < spec.macs / 10


@pytest.fixture
def forgetful() -> Iterator[None]:
    select._measured.cache_clear()
    yield
    select._measured.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_where_every_run_is_disturbed_the_model_decides_for_now() -> None:
    spec = square(64, 7, 2, transposed=False)
    with pytest.raises(select._DisturbedError, match="other work"):
        fastest(spec, lambda way, device: None)
    near = square(64, 3, 2, transposed=False)
    assert by_model(near) is NATIVE
    far = square(512, 63, 2, transposed=True)
    assert by_model(far).name == "fft"
    images = {"input_shape": (32, 128, 128), "output_shape": (32, 128, 128), "groups": 32}
    depthwise = square(128, 5, 2, transposed=True)._replace(**images)  # whose vectors hold several channels
    assert by_model(depthwise) is NATIVE
    assert "tapped" in [kernel.name for kernel in available(depthwise)]


def test_disturbed_runs_do_not_count() -> None:
    spec, turn = square(64, 7, 2, transposed=False), [0]

    def clock(way: Callable[[], object], device: torch.device) -> float | None:
        turn[0] += 1
        if turn[0] % 3 == 0:
            return None
        return 1e-3 if _kernel_of(way) == "native" else 1e-4

    assert fastest(spec, clock) is not NATIVE


@pytest.mark.usefixtures("forgetful")
def test_a_choice_is_kept() -> None:
    spec = square(24, 5, 2, transposed=True)
    first = choose(spec)
    assert choose(spec) is first
    assert select._measured.cache_info().currsize <= 1


def test_one_kernel_alone_is_not_run() -> None:
    spec = square(64, 11, 2, transposed=False, dtype=torch.bfloat16)
    assert choose(spec) is NATIVE


def test_a_run_is_timed() -> None:
    seconds = [undisturbed(lambda: sum(range(20_000)), CPU) for _ in range(50)]
    assert all(taken is None or 0 < taken < 10 for taken in seconds)
    assert any(taken is not None for taken in seconds)


@pytest.mark.parametrize(("n", "k", "dims", "expected"), [(512, 31, 2, True), (128, 5, 2, True), (8, 3, 2, False)])
def test_gradients_in_a_kernel_are_transforms_where_that_is_clearly_faster(
    n: int, k: int, dims: int, expected: bool
) -> None:
    image = square(n, n - k + 1, dims, transposed=False)
    assert suits_transform(image) == expected


@pytest.mark.parametrize("name", ["native", "fft"])
def test_costs_grow_with_the_work(name: str) -> None:
    costs = [BY_NAME[name].cost(square(n, 9, 2, transposed=False)) for n in (32, 64, 128, 256)]
    assert costs == sorted(costs)


# -------------------------------------------------------------------------------------------------- ways beside native


def lasting(seconds: float) -> Callable[[], object]:
    return lambda: time.sleep(seconds)


@pytest.mark.parametrize(
    ("native", "others", "beside", "best"),
    [
        (0.0, {"at once": 0.0}, 0.0, None),  # none is made
        (0.004, {}, 0.0, None),
        (0.004, {"slower": 0.008}, 0.0, None),
        (0.004, {"slower": 0.008, "faster": 0.001}, 0.0, "faster"),
        (0.02, {"faster": 0.001}, 0.008, "faster"),  # where native is left by a loop, and a call is no slower
        (0.02, {"faster": 0.001}, 0.04, None),
        (0.05, {"far": 0.001}, 0.0, "far"),
        (0.05, {"far": 0.001}, 0.1, None),
    ],
)
def test_ways_are_taken_where_they_are_clearly_faster(
    native: float, others: dict[str, float], beside: float, best: str | None
) -> None:
    named = {name: lambda x: x for name in others}
    made: list[int] = []

    def ways() -> dict[Callable[..., Any], Callable[[], object]]:
        made.append(1)
        return {named[name]: lasting(seconds) for name, seconds in others.items()}

    found = quickest(lasting(native) if native else lambda: None, ways, CPU, lasting(beside))
    assert found is (None if best is None else named[best])
    assert bool(made) is bool(native)


@pytest.mark.parametrize(("expected", "found"), [(0.01, True), (0.4, True), (2.5, False), (100.0, False)])
def test_short_ways_that_are_far_apart_are_not_run(expected: float, found: bool) -> None:
    def ways() -> tuple[Any, Any]:
        raise AssertionError("they are made")

    assert is_quicker((1e-4, expected * 1e-4), ways, CPU) is found


@pytest.mark.parametrize("expected", [0.6, 1.5])
def test_long_ways_are_not_run(expected: float) -> None:
    assert is_quicker((1.0, expected), lambda: pytest.fail("they are made"), CPU) is (expected < 1)


@pytest.mark.parametrize("expected", [0.6, 1.5])
def test_short_ways_for_which_there_is_no_memory_are_chosen_by_the_model(expected: float) -> None:
    def ways() -> tuple[Any, Any]:
        raise torch.OutOfMemoryError("no memory")

    assert is_quicker((1e-4, expected * 1e-4), ways, CPU) is (expected < 1)


@pytest.mark.parametrize("expected", [0.6, 1.5])
def test_runs_decide_between_short_ways_that_are_near(expected: float) -> None:
    slow, fast = lasting(0.02), lasting(0.0)
    assert is_quicker((1e-4, expected * 1e-4), lambda: (slow, fast), CPU)
    assert not is_quicker((1e-4, expected * 1e-4), lambda: (fast, slow), CPU)


@pytest.mark.parametrize("expected", [0.6, 1.5])
def test_short_ways_that_cannot_be_timed_are_chosen_by_the_model(
    expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "_switches", iter(range(10_000)).__next__)
    assert is_quicker((1e-4, expected * 1e-4), lambda: (lasting(0.0), lasting(0.0)), CPU) is (expected < 1)
