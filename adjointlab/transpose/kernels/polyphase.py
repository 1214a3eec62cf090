"""Convolutions in phases: neighbouring outputs are computed as the channels of one plain convolution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjointlab.transpose.kernels.convolution import ConvSpec, Run, window
from adjointlab.transpose.kernels.direct import flip

aten = torch.ops.aten


def phase_kernels(weight: Tensor, spec: ConvSpec) -> Tensor:
    """Return the kernels of all phases: for each of neighbouring outputs, its taps where it reads the common window."""
    dims, sizes = len(spec.kernel), window(spec)
    spread = torch.constant_pad_nd(flip(weight, spec), [0, 1] * dims)  # a zero, for where a phase has no tap
    for dim in range(dims):
        spread = spread.index_select(2 + dim, torch.tensor(_taps(dim, spec), device=weight.device))
    outputs, inputs = spread.shape[:2]
    spread = spread.reshape(outputs, inputs, *itertools.chain(*zip(spec.phases, sizes, strict=True)))
    spread = spread.permute(0, *range(2, 2 + 2 * dims, 2), 1, *range(3, 3 + 2 * dims, 2))
    spread = spread.clone(memory_format=torch.contiguous_format).reshape(-1, inputs, *sizes)
    if dims == 1:
        spread = spread.unsqueeze(2)
    return spread if dims == 3 else channels_last(spread)  # for volumes, blocked channels are faster


def _taps(dim: int, spec: ConvSpec) -> list[int]:
    """Return which tap is at each place of the window of each phase along a dimension, the number of all for none."""
    count, k, s, p, d = (t[dim] for t in (spec.phases, spec.kernel, spec.stride, spec.around, spec.dilation))
    if count == 1:
        return list(range(k))
    up, down = (1, s) if spec.transposed else (s, 1)  # the output at t reads inputs at (up t + d j − p) / down
    reads = {(phase, up * phase + d * j - p): j for phase in range(count) for j in range(k)}
    places = [down * (place - p // down) for place in range(window(spec)[dim])]
    return [reads.get((phase, place), k) for phase in range(count) for place in places]


def polyphase(spec: ConvSpec) -> Run:
    """Return a convolution, transposed or not, as a plain one of which neighbouring outputs are the channels.

    Direct kernels have channels for their vectors. An image of one channel leaves these empty; here, neighbouring
    outputs fill them, for a few multiplications by zero. Outputs of a transposed convolution with a stride read
    different taps in turn: with the stride's outputs as channels, nothing is multiplied by the zeros between inputs.
    The kernels of oneDNN are called by name since PyTorch takes slower ones for small images, and for volumes with a
    3×3×3 kernel.
    """
    padding = [p // s if spec.transposed else p for p, s in zip(spec.around, spec.stride, strict=True)]
    stride = [c // s if spec.transposed else c * s for c, s in zip(spec.phases, spec.stride, strict=True)]
    # oneDNN reads past the end where a kernel of one entry is dilated.
    dilation = [d if c == 1 < k else 1 for c, d, k in zip(spec.phases, spec.dilation, spec.kernel, strict=True)]
    blocks = [-(-n // c) for n, c in zip(spec.output_shape[1:], spec.phases, strict=True)]
    reached = [d * (k - 1) + 1 for d, k in zip(dilation, window(spec), strict=True)]
    room = [n + 2 * p - e for n, p, e in zip(spec.input_shape[1:], padding, reached, strict=True)]
    missing = [max(0, (q - 1) * s - r) for q, s, r in zip(blocks, stride, room, strict=True)]
    border = [n for m in reversed(missing) for n in (0, m)] if any(missing) else None
    fits = all((r + m) // s + 1 == q for r, m, s, q in zip(room, missing, stride, blocks, strict=True))
    flat = len(blocks) == 1
    if flat:
        padding, stride, dilation = [0, *padding], [1, *stride], [1, *dilation]
    inside: Any = (..., *[slice(0, q) for q in blocks])
    count, none = math.prod(spec.phases), [0] * len(stride)
    interleaved = _interleaved(spec, blocks)

    def run(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        if flat:
            x = x.unsqueeze(2)
        if border:
            x = aten.constant_pad_nd.default(x, border)
        bias = None if bias is None else bias.repeat_interleave(count)
        if torch.compiler.is_compiling():  # which knows no shape of the other
            y = torch.convolution(x, kernel, bias, stride, padding, dilation, False, none, spec.groups)
        else:
            y = torch.mkldnn_convolution(x, kernel, bias, padding, stride, dilation, spec.groups)
        return interleaved(y if fits else y[inside])

    return run


def _interleaved(spec: ConvSpec, blocks: list[int]) -> Callable[[Tensor], Tensor]:
    """Return a function that puts outputs which were computed as channels in their places in the image."""
    count = len(blocks)
    order = [0, 1, *[n for i in range(count) for n in (2 + count + i, 2 + i)]]
    phases = [spec.output_shape[0], *spec.phases, *blocks]
    shape = [spec.output_shape[0], *[c * q for c, q in zip(spec.phases, blocks, strict=True)]]
    inside: Any = (..., *[slice(0, n) for n in spec.output_shape[1:]])
    whole = tuple(shape) == spec.output_shape

    def run(y: Tensor) -> Tensor:
        y = y.reshape(-1, *phases).permute(order).reshape(-1, *shape)
        return y if whole else y[inside].contiguous()

    return run


def channels_last(image: Tensor) -> Tensor:
    """Return an image of one channel in the order that has the channels last, if it is contiguous: it is both then.

    Strides of dimensions of size one are free, but the CPU's convolutions read the order from them: an input gradient
    at an image in this order is many times as fast.
    """
    if image.ndim not in (4, 5) or image.shape[1] != 1 or not image.is_contiguous():
        return image
    return image.as_strided(image.shape, (image.stride(0), 1, *image.stride()[2:]))
