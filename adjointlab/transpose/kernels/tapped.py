"""Depthwise convolutions tap by tap: a sum of shifted images."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from adjointlab.transpose.kernels.convolution import ConvSpec, Run
from adjointlab.transpose.kernels.direct import flip

aten = torch.ops.aten


def taps(weight: Tensor, spec: ConvSpec) -> Tensor:
    """Return the weights of each tap of a depthwise plain convolution, of shape ``(taps, C, 1, …)``."""
    kernel = flip(weight, spec)
    return kernel.reshape(kernel.shape[0], -1).T.reshape(-1, kernel.shape[0], *[1] * len(spec.kernel)).contiguous()


def tapped(spec: ConvSpec) -> Run:
    """Return a depthwise convolution as a sum of shifted images, one pass over memory for each tap."""
    border = [p for p in reversed(spec.around) for _ in range(2)]
    reach = [(n - 1) * s + 1 for n, s in zip(spec.output_shape[1:], spec.stride, strict=True)]
    settings = zip(spec.kernel, spec.dilation, reach, spec.stride, strict=True)
    along = [[slice(i * d, i * d + r, s) for i in range(k)] for k, d, r, s in settings]
    windows: list[Any] = [(..., *window) for window in itertools.product(*along)]

    def run(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        x = aten.constant_pad_nd.default(x, border)
        total: Tensor | None = None
        for weight, where in zip(weights, windows, strict=True):
            shifted = x[where]
            total = shifted * weight if total is None else total.addcmul_(shifted, weight)
        assert total is not None
        return total if bias is None else total.add_(bias.reshape(-1, *[1] * len(spec.kernel)))

    return run
