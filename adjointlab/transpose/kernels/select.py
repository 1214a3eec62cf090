"""Which of the equal kernels is the fastest for a convolution: by a cost model, and by a short measurement."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from adjointlab.transpose.frontend.capture import same
from adjointlab.transpose.kernels.convolution import Site, flipped_site, phases_cost
from adjointlab.transpose.kernels.registry import KERNELS, PREPARE, available, is_kept

# Rates of the cost model, in multiplications or FFT steps a second: measured on two cores of a current server for the
# CPU (see docs/benchmarks.md), and on an H200 for CUDA. They need to be right to a factor of a few only: what is closer
# than that is settled by a short measurement, or left native.
_FFT_RATE = {"cpu": 8e9, "cuda": 9e11}
_FFT_OVERHEAD = {"cpu": 2e-4, "cuda": 1.6e-4}
_PRODUCT_RATE = {"cpu": 6e8, "cuda": 1e11}
_TAP_OVERHEAD = 1e-5
_PHASES_OVERHEAD = 6e-5
_OVERHEAD = 2e-5


def predicted(name: str, site: Site) -> float:
    """Return the expected time of a kernel, in seconds."""
    kind = site.device.type if site.device.type in _FFT_RATE else "cuda"
    c_in, c_out = site.input_shape[0], site.output_shape[0]
    if name == "fft":
        points = site.batch * math.prod(site.fft_size)
        steps = (c_in + c_out) * points * math.log2(max(2, math.prod(site.fft_size)))
        products = c_in * c_out // site.groups * points / 2
        return _FFT_OVERHEAD[kind] + steps / _FFT_RATE[kind] + products / _PRODUCT_RATE[kind]
    if name == "tapped":
        size = site.batch * math.prod(site.output_shape)
        count = math.prod(site.kernel)
        cached = size * site.dtype.itemsize < 1 << 23
        rate = {"cpu": 1.6e10 if cached else 5e9, "cuda": 1e11}[kind]
        return count * (_TAP_OVERHEAD + size * site.dtype.itemsize / 4 / rate)
    if name == "polyphase":
        return _PHASES_OVERHEAD + phases_cost(site)
    if kind != "cpu":
        return _OVERHEAD + site.macs / min(1e13, (1e11 if site.transposed else 3e11) * c_in * c_out / site.groups**2)
    return _OVERHEAD + site.macs / _direct_rate(site)


def by_transforms(site: Site) -> bool:
    """Return whether a gradient in a kernel is clearly faster as a product of transforms than as PyTorch computes it.

    ``site`` is the convolution that it is, whose kernel is the cotangent. By the model alone: to run the other takes as
    long as all else of a build.
    """
    channels = site.batch * site.output_shape[0]
    rate = 5e9 * (math.sqrt(channels) if len(site.kernel) < 3 else 1) if site.device.type == "cpu" else 1e12
    return "fft" in available(site) and 2 * predicted("fft", site) < site.macs / rate


def _direct_rate(site: Site) -> float:
    """Return multiplications a second of the CPU's direct kernels, which live on channels to vectorise over."""
    c_in, c_out = site.input_shape[0] // site.groups, site.output_shape[0] // site.groups
    narrow = min(c_in, c_out) < 4
    if len(site.kernel) == 3:
        rate = 3e9 if c_out >= 4 and not site.transposed else 4e8 if c_in >= 4 else 1e9
        if site.transposed:
            rate = 3e9 if c_in >= 4 else 3e8
    elif site.transposed:
        rate = min(8e9 if narrow else 3e10, 4e8 * (c_in * c_out) ** 0.85)
    else:
        rate = min(6e10, 1e9 * (c_in * c_out) ** 0.75)
    return rate


_NEAR = 6.0  # expectations closer than this factor do not decide
_CLEAR = 20.0  # ... and where they are that far apart, not even a rate is measured
_BUDGET = 0.03  # seconds that a measurement at build may take, unless the fastest kernel alone takes longer
_LARGE = 31 << 20  # bytes, just below what is always mapped afresh
_RUNS = 4  # of a cheap kernel before it is judged: threads have to wake up
_CHEAP = 1e-3  # what is expected to take less is run: the model is at its worst there
_COLD = {"fft": 8e-5, "tapped": 2e-5}  # what many ops lose on the CPU between other work, and not in a row of runs
_PROBE = 1e6  # multiplications that show a direct kernel's rate: a few milliseconds of the slowest
_OVERHEADS = 3e-4  # seconds of a part's run in which calls and threads do not count
_SAME = 1 << 15  # entries of an image from which on PyTorch runs one kernel for narrow weights (20480, in 2.14)
_TURNS = 6  # of whole programs, the first of which pays for plans
_ABOUT = 1.05  # that much of a difference says nothing
_STALL = 1e-3  # seconds, between what a loop for all threads takes and a time slice of another process
_GRAIN = 1 << 15  # entries that PyTorch has one thread take
T = TypeVar("T")
Clock = Callable[[Callable[[], object], torch.device], float]


class _BusyError(Exception):
    """Other work holds the processors: what a run takes says nothing of the kernel."""


def choose(site: Site, *, measure: bool, thorough: bool = False) -> str:
    """Return the kernel for a site: by the model where it is clear, else by a short measurement if allowed.

    Where other work holds the processors, the model decides as well: a kernel that all threads work at waits for time
    slices then, up to a hundred times as long as it takes. ``thorough`` measures every kernel that could be near,
    whatever it costs and whatever else runs.
    """
    names = available(site)
    if len(names) > 1 and measure and site.device.type != "meta":
        try:
            return _measured(site, names, thorough=thorough)
        except _BusyError:
            pass
    times = {name: predicted(name, site) for name in names}
    best = min(times, key=times.__getitem__)
    return best if 2 * times[best] < times["native"] else "native"


def _measured(site: Site, names: list[str], *, thorough: bool) -> str:
    if "flipped" in names:  # all others compute the plain convolution with the flipped kernel: often known by now
        plain = choose(flipped_site(site), measure=True, thorough=thorough)
        best = "flipped" if plain == "native" else plain
        if predicted("native", site) > _CLEAR * predicted(best, site) and not thorough:
            return best
        names = ["native", best]
    return _fastest(site, tuple(names), thorough)


@functools.cache
def _fastest(site: Site, names: tuple[str, ...], thorough: bool) -> str:
    """Return the kernel that is fastest as measured; cached, as the machine does not change, unless it is busy.

    Kernels run in the order of their expected times, so that one that is far behind what was seen need not run.
    """
    # glibc maps blocks as large as an image afresh each time, until one as large has been freed: without this, kernels
    # with many intermediate results would be measured as they are in a young process, at half of their speed.
    torch.empty(_LARGE, dtype=torch.uint8, device="cpu")
    near, budget, rounds = (10 * _NEAR, math.inf, 7) if thorough else (_NEAR, _BUDGET, 1)
    clock = _timed if thorough else _clocked
    expected = {name: _expected(name, site, clock) for name in names}
    least = min(expected.values())
    order = [n for n in sorted(names, key=expected.__getitem__) if expected[n] <= max(near * least, _CHEAP)]
    if len(order) == 1:
        return order[0]
    run = _runner(site, clock)
    seen: dict[str, list[float]] = {}
    times: dict[str, float] = {}  # the typical one of each
    spent = 0.0

    def once_more(name: str) -> None:
        nonlocal spent
        seen.setdefault(name, []).append(run(name))
        times[name] = statistics.median_low(seen[name][1:] or seen[name])  # the first pays for code and plans
        spent += seen[name][-1]

    for name in order:
        best = min(times.values(), default=math.inf)
        costly = name != "native" and spent + 2 * expected[name] > budget / 3 and expected[name] > 2 * best
        unsure = name == "native" and not _is_probed(name, site)  # no rate was measured for it
        if costly or expected[name] > max((near if unsure else near / 2) * best, _CHEAP):
            continue
        once_more(name)
        # In less than that, threads wake up and memory is mapped; and what promised more may have been compiled in it.
        if times[name] > max(2 * best, _RUNS * _CHEAP) and expected[name] > 2 * best:
            continue
        while len(seen[name]) < 2 or (len(seen[name]) < _RUNS and sum(seen[name]) < 2 * _CHEAP):
            once_more(name)
    close = list(times)
    worth = (6 if "native" in times else 2) * _CHEAP  # to leave native for what is no faster is the worse error
    rounds = max(rounds, min(12, int(worth / max(min(times.values()), 1e-9))))
    for turn in range(rounds):
        best = min(times.values())
        close = [name for name in close if times[name] <= (2 if turn < 3 else 1.5) * best]
        if len(close) == 1 or spent > budget:
            break
        for name in close:
            once_more(name)
    if site.device.type == "cpu":
        times = {name: t + _COLD.get(name, 0.0) for name, t in times.items()}
    fastest = min(times, key=times.__getitem__)
    native = times["native"] / 1.2 if "native" in times else expected["native"] / 1.5  # it is the more accurate
    # Kernels take turns for some milliseconds, which may be slow ones of the machine: then the first runs tell.
    near_best = "native" in times and min(seen["native"]) <= 1.1 * min(seen[fastest])
    return "native" if near_best or native <= times[fastest] else fastest


def quickest(ways: Mapping[T, Callable[[], object]], device: torch.device) -> T | None:
    """Return the key of the way that is quickest as measured, in turns, the first if that fails; None without any.

    What is short is measured right after another run, as in a loop, which finds caches as it has left them. Of ways
    that are about as quick it is the last one: those that join more suffer less from what else goes on.
    """
    first = next(iter(ways), None)
    if len(ways) < 2:
        return first
    seen: dict[T, list[float]] = {key: [] for key in ways}
    try:
        for _ in range(_TURNS):
            for key, way in ways.items():
                if not seen[key] or seen[key][-1] < 10 * _CHEAP:
                    way()
                seen[key].append(_clocked(way, device))
    except _BusyError:
        return first
    times = {key: statistics.median_low(taken[1:]) for key, taken in seen.items()}
    return [key for key, taken in times.items() if taken <= _ABOUT * min(times.values())][-1]


def _expected(name: str, site: Site, clock: Clock) -> float:
    """Return the expected time of a kernel, that of a direct one from its rate on a part of the image.

    The rates of direct kernels differ a hundredfold with channels, size and processor, which no model knows.
    """
    if not _is_probed(name, site):
        return predicted(name, site)
    work, taken, part = _PROBE, 0.0, site
    while taken < _OVERHEADS and 4 * work <= site.macs:  # what takes less says more of calls and threads than of rates
        part = _part(site, work / site.macs)
        run = _runner(part, clock)
        taken, work = min(run(name) for _ in range(3)), 4 * work
    return taken * site.macs / part.macs


def _is_probed(name: str, site: Site) -> bool:
    """Return whether a part of the image is run: on an accelerator, each size of it would need a plan of its own."""
    return name in {"native", "flipped"} and site.macs > 4 * _PROBE and site.device.type == "cpu"


def _part(site: Site, share: float) -> Site:
    """Return the site on a part of the batch and image, as close to ``share`` of the work as sizes allow.

    The native kernel of the part is that of the whole, where that is no great work: small images have slower ones.
    """
    whole = min(1.0, _SAME / (site.batch * math.prod(site.input_shape)))
    if (min(site.kernel) <= 3 or len(site.kernel) == 1) and whole * site.macs <= 16 * _PROBE:
        share = max(share, whole)
    batch = max(1, int(site.batch * share))
    scale = (share * site.batch / batch) ** (1 / len(site.kernel))
    source, target = [], []
    for n, e, s, p, o in zip(
        site.input_shape[1:], site.extent, site.stride, site.padding, site.output_padding, strict=True
    ):
        size = min(n, max(int(n * scale), e, 8 + 2 * p))  # some outputs are left, whatever the padding takes off
        source.append(size)
        target.append((size - 1) * s + e - 2 * p + o if site.transposed else (size + 2 * p - e) // s + 1)
    return site._replace(
        batch=batch, input_shape=(site.input_shape[0], *source), output_shape=(site.output_shape[0], *target)
    )


def _runner(site: Site, clock: Clock) -> Callable[[str], float]:
    """Return a function that runs the kernel of a name on random data, and returns the seconds that it took."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, dtype=site.dtype, device="cpu")
    c_in, c_out = site.input_shape[0], site.output_shape[0]
    first, second = (c_in, c_out // site.groups) if site.transposed else (c_out, c_in // site.groups)
    x = draw(site.batch, *site.input_shape).to(site.device)
    weight = draw(first, second, *site.kernel).to(site.device)
    ways: dict[str, Callable[[], object]] = {}

    def way(name: str) -> Callable[[], object]:
        kernel = KERNELS[name](site)
        if name not in PREPARE:
            return lambda: kernel(x, weight, None)
        prepare = PREPARE[name]
        if not is_kept(prepare, site.device):
            return lambda: kernel(x, prepare(weight, site), None)
        prepared, before = prepare(weight, site), weight.to("cpu", copy=True)
        return lambda: same(weight, before) and kernel(x, prepared, None)

    def run(name: str) -> float:
        if name not in ways:
            ways[name] = way(name)
            if site.device.type != "cpu":  # the first run of a kind there loads a library: up to a second
                ways[name]()
        return clock(ways[name], site.device)

    return run


def _clocked(way: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a run; raise where threads are kept waiting after it."""
    taken = _timed(way, device)
    if device.type == "cpu":
        loop = torch.zeros(_GRAIN * torch.get_num_threads(), dtype=torch.uint8, device=device).add_
        if all(_timed(lambda: loop(1), device) > _STALL for _ in range(3)):  # one alone can be an accident
            raise _BusyError("threads are kept waiting")
    return taken


def _timed(way: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a run; on an accelerator, of one right after another, as in a loop.

    There, what a short run takes is what the processor takes to start it, which is twice as long between other work.
    """
    taken = _waited(way, device)
    return taken if device.type == "cpu" or taken > _CHEAP else _waited(way, device)


def _waited(way: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    way()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
