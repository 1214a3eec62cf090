"""One convolution as numbers: its sizes and settings, and what follows from them for the ways to compute it.

A *spec* describes a call of ``aten.convolution``: with ``transposed=False`` the correlation
``y[m] = Σ_j w[j] x[m s + d j − p]``, with ``transposed=True`` its transpose ``y[t] = Σ x[m] w[j]`` over all m, j with
``t = m s + d j − p``. Channels are summed over within each group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

VECTOR = 16  # channels that the CPU's direct kernels compute at once
Ints = tuple[int, ...]
Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # of the input, what is prepacked from the weight, and the bias


class ConvSpec(NamedTuple):
    """One convolution: the sizes of all that it reads, and its settings."""

    batch: int
    input_shape: Ints  # (C_in, *spatial)
    output_shape: Ints  # (C_out, *spatial)
    kernel: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    transposed: bool
    output_padding: Ints
    groups: int
    dtype: torch.dtype
    device: torch.device
    # Set by `sized`, since torch.compile looks into everything that is computed later:
    fft_size: Ints = ()
    around: Ints = ()  # padding of the plain convolution that a transposed one of stride 1 is with the flipped kernel
    phases: Ints = ()  # neighbouring outputs that are computed as so many channels

    @property
    def dims(self) -> Ints:
        """Positions of the spatial dimensions in a tensor."""
        return tuple(range(2, 2 + len(self.kernel)))

    @property
    def extent(self) -> Ints:
        """How far a kernel reaches, dilation included."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def sides(self) -> tuple[Ints, Ints]:
        """Sizes of the image that the kernel moves over, and of the one whose entries are a stride apart in it."""
        sizes = self.input_shape[1:], self.output_shape[1:]
        return sizes[::-1] if self.transposed else sizes

    @property
    def macs(self) -> int:
        """Number of multiplications of the direct sum."""
        channels = self.input_shape[0] * self.output_shape[0] // self.groups
        return self.batch * channels * math.prod(self.sides[1]) * math.prod(self.kernel)


def each_of(value: Sequence[int], dims: int) -> list[int]:
    """Return a setting of each of some dimensions, of which one number stands for all."""
    return list(value) * (dims // len(value))


def sized(spec: ConvSpec) -> ConvSpec:
    """Return the spec with the lengths at which a cyclic convolution has the wanted outputs, fast for an FFT.

    And with the padding of its plain convolution, and the number of its phases.
    """
    # The image has p more entries at its beginning, which wrap around to behind its end.
    needs = [
        max(n + p, (m - 1) * s + 1, e)
        for n, m, p, s, e in zip(*spec.sides, spec.padding, spec.stride, spec.extent, strict=True)
    ]
    around = spec.padding
    if spec.transposed:
        around = tuple(e - 1 - p for e, p in zip(spec.extent, spec.padding, strict=True))
    spec = spec._replace(fft_size=tuple(map(fast_length, needs)), around=around)
    return spec._replace(phases=_phases(spec))


def _phases(spec: ConvSpec) -> Ints:
    """Return how many neighbouring outputs along each dimension are channels: they fill a vector, at least cost."""
    # The outputs between inputs of a transposed convolution with a stride always are.
    least = spec.stride if spec.transposed else (1,) * len(spec.stride)
    options = [
        [s << i for i in range(VECTOR.bit_length()) if i == 0 or 2 * (s << i) <= n]
        for s, n in zip(least, spec.output_shape[1:], strict=True)
    ]
    fitting = [block for block in itertools.product(*options) if math.prod(block) * spec.output_shape[0] <= VECTOR]
    fullest = max(map(math.prod, fitting), default=0)
    blocks = [block for block in fitting if math.prod(block) == fullest]
    # Of equal ones, that along outer dimensions: its outputs are moved in longer pieces. The same for all batch sizes,
    # for which a kernel is chosen once.
    one = spec._replace(batch=1)
    return min(reversed(blocks), key=lambda block: phases_cost(one._replace(phases=block)), default=least)


def phases_cost(spec: ConvSpec) -> float:
    """Return the expected seconds of a convolution in phases, on a current CPU.

    A block reads a window of inputs: the closer to a cube, the fewer multiplications by zero. Its outputs are put back
    in their places: the more of them are neighbours in memory, the faster.
    """
    work, size = spec.input_shape[0] * math.prod(window(spec)), spec.batch * math.prod(spec.output_shape)
    *others, last = spec.phases
    move = 1.5 if last == 1 else 1 + 2.5 * math.log2(max(1, VECTOR / last))  # tenths of a nanosecond for each output
    several = 1e-5 if last > 1 and any(c > 1 for c in others) else 0.0
    return size * (work / 7e10 + move * 1e-10) + several


def window(spec: ConvSpec) -> list[int]:
    """Return how many inputs along each dimension the phases of an output read, one that stands alone without gaps."""
    sizes = []
    for c, k, s, e, p in zip(spec.phases, spec.kernel, spec.stride, spec.extent, spec.around, strict=True):
        together = (c + e - 2 - p) // s + p // s + 1 if spec.transposed else s * (c - 1) + e
        sizes.append(k if c == 1 else together)
    return sizes


def fast_length(n: int) -> int:
    """Return the smallest even length of at least n that suits a transform of real numbers."""
    return next(length for length in itertools.count(n + n % 2, 2) if smooth(length))


def smooth(n: int) -> bool:
    """Return whether a length has no prime factor above 11: those that libraries have code of their own for."""
    for prime in (2, 3, 5, 7, 11):
        while n % prime == 0:
            n //= prime
    return n == 1


def spectra_meet(first: ConvSpec, second: ConvSpec) -> bool:
    """Return whether the second product of transforms would take apart all that the first has put together."""
    whole = first.output_shape[1:] == first.fft_size == second.fft_size == second.input_shape[1:]
    return whole and all(s == 1 for s in (*first.stride, *second.stride))
