"""The rule that chooses a kernel: a model of the costs, then the median of a few runs; native unless clearly faster."""

from __future__ import annotations

import functools
import math
import operator
import statistics
import time
from collections.abc import Callable

import torch

from adjointlab.transpose.kernels.convolution import ConvSpec
from adjointlab.transpose.kernels.registry import FFT, NATIVE, Kernel, available

try:
    import resource
except ImportError:  # Windows: no run is known to have been disturbed
    resource = None  # type: ignore[assignment]

Chooser = Callable[[ConvSpec], Kernel]
Run = Callable[..., torch.Tensor]
Timed = Callable[[], object]
MapChooser = Callable[[Timed, Callable[[], "dict[Run, Timed]"], torch.device, Timed], "Run | None"]
Ways = Callable[[], "tuple[Timed, Timed]"]  # PyTorch's own, and another, on data that are made for them
SumChooser = Callable[[tuple[float, float], Ways, torch.device], bool]  # the first are seconds by a model
Clock = Callable[[Callable[[], object], torch.device], "float | None"]  # None for a run that was disturbed

_GAIN = 0.8  # of native's time: two medians of one kernel differ by less than a fifth, 99 times in 100
_MODEL = 8.0  # kernels whose costs differ by more are not run: the model was seen to be off by a factor of 5 at most
_RUNS = 5  # of each kernel, in turns, after one that pays for code and plans
_NO_SLOWER = 1.1  # times native's time, for all that a call does
_MANY, _FEW = 31, 3  # runs of short ways: at most, and where each of one is clearly faster than all of the other
_LEAD = 0.9  # of native's time: two medians of so many runs differ by less than a tenth, beside other work too
_NEAR = 2.0  # ways of a few operations whose costs differ by more are not run: that is how far off their model was seen
_FAR = 4.0  # times as fast as native another way must seem beside other work
_BUDGET = 0.03  # seconds for all runs of a kernel; of one that takes longer, there are fewer
_SHORT = 5e-5  # where PyTorch's own way takes no longer, others are not tried: one call of theirs takes half of it
_PROBE = 2e6  # multiplications of the part of an image that shows the rate of a kernel which is slow on the whole


def choose(spec: ConvSpec, *, thorough: bool = False) -> Kernel:
    """Return the kernel for a spec: never one that is slower than PyTorch's own, as far as runs can tell.

    ``thorough`` runs every kernel that can compute the spec, however far apart the model sees them.
    """
    if len(available(spec)) == 1:
        return NATIVE
    try:
        return by_model(spec) if spec.device.type == "meta" else _measured(spec, thorough)
    except _DisturbedError:
        return by_model(spec)


def by_model(spec: ConvSpec) -> Kernel:
    """Return the kernel that the model alone would choose: native, unless another is faster beyond its errors."""
    best = min(available(spec), key=lambda kernel: kernel.cost(spec))
    return best if _MODEL * best.cost(spec) < NATIVE.cost(spec) else NATIVE


def suits_transform(spec: ConvSpec) -> bool:
    """Return whether a gradient in a kernel is clearly faster as a product of transforms than as PyTorch computes it.

    ``spec`` is the convolution that it is, whose kernel is the cotangent. The model decides alone: to run the other
    takes as long as all else of a build.
    """
    channels = spec.batch * spec.output_shape[0]
    rate = 5e9 * (math.sqrt(channels) if len(spec.kernel) < 3 else 1) if spec.device.type == "cpu" else 1e12
    return FFT.supports(spec) and 2 * FFT.cost(spec) < spec.macs / rate


class _DisturbedError(Exception):
    """Runs say nothing: other work holds the processors, or the memory."""


@functools.cache  # the machine does not change; a run that was disturbed raises, and is not kept
def _measured(spec: ConvSpec, thorough: bool) -> Kernel:
    return fastest(spec, undisturbed, factor=math.inf if thorough else _MODEL)


def fastest(spec: ConvSpec, clock: Clock, factor: float = _MODEL) -> Kernel:
    """Return the kernel that is fastest by a clock, native where none is clearly faster.

    Native is run on a part of the image where the whole takes long: its rate tells enough if it is far behind.
    """
    _, *others = available(spec)
    least = min(kernel.cost(spec) for kernel in others)
    # On an accelerator, each size of the image would need a plan of its own.
    is_long = spec.macs >= 4 * _PROBE and spec.device.type == "cpu"
    estimate = 0.0
    if is_long:
        part = _part(spec, _PROBE / spec.macs)
        estimate = _timed(part, clock)(NATIVE)[0] * spec.macs / part.macs
        if estimate < least / factor:
            return NATIVE
    seconds = _timed(spec, clock)
    times = {kernel: seconds(kernel)[0] for kernel in others if kernel.cost(spec) <= factor * least}
    best = min(times, key=times.__getitem__)
    if estimate > max(_BUDGET, 4 * times[best]):
        return best
    native, again = seconds(NATIVE, best)
    return best if again <= _GAIN * native else NATIVE


def quickest(native: Timed, others: Callable[[], dict[Run, Timed]], device: torch.device, beside: Timed) -> Run | None:
    """Return the fastest of other ways to compute what PyTorch's own way does, None where none is clearly faster.

    ``others`` are not made where native takes no longer than a call of them. A call by itself runs ``beside`` as well,
    which loops and solvers do once only: with that, a way may be no slower than native.
    """
    (first,) = _least([native], device)
    if first < _SHORT:
        return None
    ways = others()
    if not ways:
        return None
    times, gain = _least([*ways.values()], device), 1 / _FAR
    if first < _BUDGET or min(times) > gain * first:  # a longer run tells, if others are far from it
        try:
            (first, *times), gain = _median([native, *ways.values()], device, undisturbed), _GAIN
        except _DisturbedError:
            first, *times = _least([native, *ways.values()], device)
    seconds, best = min(zip(times, ways, strict=True), key=operator.itemgetter(0))
    if seconds > gain * first:
        return None
    (rest,) = _least([beside], device)
    return best if seconds + rest <= _NO_SLOWER * first else None


def is_quicker(expected: tuple[float, float], ways: Ways, device: torch.device) -> bool:
    """Return whether another way than PyTorch's own is faster, where both are a few operations.

    ``expected`` are the seconds of native and of the other by a model. Runs decide where these are near, and short
    enough for a build.
    """
    share = expected[1] / expected[0]
    if not 1 / _NEAR < share < _NEAR or max(expected) > _BUDGET:
        return share < 1

    def is_clear(seen: list[list[float]]) -> bool:
        native, other = seen
        return max(other) <= _GAIN * min(native) or max(native) <= _GAIN * min(other)

    try:
        native, other = _median([*ways()], device, undisturbed, _MANY, is_clear)
    except (_DisturbedError, torch.OutOfMemoryError):
        return share < 1
    return other <= _LEAD * native


def _least(ways: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Return the least seconds of a few runs of several ways: other work makes a run longer, never shorter."""
    seen = [[_seconds(way, device)] for way in ways]
    while len(seen[0]) < _RUNS and sum(map(sum, seen)) < len(ways) * _BUDGET:
        for way, taken in zip(ways, seen, strict=True):
            taken.append(_seconds(way, device))
    return [min(taken) for taken in seen]


def _timed(spec: ConvSpec, clock: Clock) -> Callable[..., list[float]]:
    """Return a function to the median seconds that kernels take on random data."""
    data = _random(spec)
    return lambda *kernels: _median([_runner(kernel, spec, data) for kernel in kernels], spec.device, clock)


def _median(
    ways: list[Timed], device: torch.device, clock: Clock, runs: int = _RUNS,
    is_clear: Callable[[list[list[float]]], bool] = lambda _: False,
) -> list[float]:  # fmt: skip
    """Return the median seconds of several ways, run in turns: what slows the machine for a while slows all of them.

    ``is_clear`` says of the seconds of at least three runs of each whether they tell enough.
    """
    for way in ways:
        way()  # pays for code, plans and memory
    seen: list[list[float]] = [[] for _ in ways]
    disturbed, began = 0, time.perf_counter()
    while (least := min(map(len, seen))) < runs and (least < 2 or sum(map(sum, seen)) < len(ways) * _BUDGET):
        for way, taken in zip(ways, seen, strict=True):
            seconds = clock(way, device)
            if seconds is None:
                disturbed += 1
            else:
                taken.append(seconds)
        waited = time.perf_counter() - began > 10 * len(ways) * _BUDGET and least < 1
        if disturbed > 4 * runs * len(ways) or waited:
            raise _DisturbedError("other work takes processors away in nearly every run")
        if disturbed == 0 and max(map(max, seen)) > 10 * _BUDGET:
            break  # one run of that length tells
        if min(map(len, seen)) >= _FEW and is_clear(seen):
            break
    return [statistics.median(taken) for taken in seen]


def _part(spec: ConvSpec, share: float) -> ConvSpec:
    """Return the spec on a part of the batch and image, as close to ``share`` of the work as sizes allow."""
    batch = max(1, int(spec.batch * share))
    scale = (share * spec.batch / batch) ** (1 / len(spec.kernel))
    source, target = [spec.input_shape[0]], [spec.output_shape[0]]
    for n, e, s, p, o in zip(
        spec.input_shape[1:], spec.extent, spec.stride, spec.padding, spec.output_padding, strict=True
    ):
        size = min(n, max(int(n * scale), e, 8 + 2 * p))  # some outputs are left, whatever the padding takes off
        source.append(size)
        target.append((size - 1) * s + e - 2 * p + o if spec.transposed else (size + 2 * p - e) // s + 1)
    return spec._replace(batch=batch, input_shape=tuple(source), output_shape=tuple(target))


def _random(spec: ConvSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a random input and weight."""
    generator = torch.Generator().manual_seed(0)
    c_in, c_out = spec.input_shape[0], spec.output_shape[0]
    channels = (c_in, c_out // spec.groups) if spec.transposed else (c_out, c_in // spec.groups)
    shapes = (spec.batch, *spec.input_shape), (*channels, *spec.kernel)
    try:
        x, weight = (torch.randn(shape, generator=generator, dtype=spec.dtype, device="cpu") for shape in shapes)
    except RuntimeError as error:  # an operator may be larger than memory
        raise _DisturbedError("there is no memory for a run") from error
    return x.to(spec.device), weight.to(spec.device)


def _runner(kernel: Kernel, spec: ConvSpec, data: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], object]:
    """Return a function that runs a kernel on data, with the weight prepacked where a program keeps that."""
    x, weight = data
    run = kernel.bind(spec)
    if kernel.prepack is not None:
        prepack = kernel.bind_prepack(spec)
        if spec.device.type != "cpu" and not kernel.kept_everywhere:
            return lambda: run(x, prepack(weight), None)
        weight = prepack(weight)
    return lambda: run(x, weight, None)


def undisturbed(way: Callable[[], object], device: torch.device) -> float | None:
    """Return the seconds of a run; None where the system took a processor from it meanwhile.

    A kernel that all threads work at waits for the last of them. Beside other work it then takes up to a hundred times
    as long as by itself, and is no worse for that.
    """
    taken_away = _switches()
    seconds = _seconds(way, device)
    return seconds if _switches() == taken_away or device.type != "cpu" else None


def _seconds(way: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a run, from when what was begun before is done."""
    on_cpu = device.type == "cpu"

    def finish() -> None:
        if not on_cpu:
            torch.accelerator.synchronize(device)

    finish()
    start = time.perf_counter()
    way()
    finish()
    return time.perf_counter() - start


def _switches() -> int:
    """Return how often the system has taken a processor from a thread of this process."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def remembered(choose: Chooser) -> Chooser:
    """Return a rule for kernels that decides once for all batch sizes."""
    known: dict[ConvSpec, Kernel] = {}

    def chooser(spec: ConvSpec) -> Kernel:
        key = spec._replace(batch=0)
        if key not in known or not known[key].supports(spec):
            known[key] = choose(spec)
        return known[key]

    return chooser
