"""Convolutions as PyTorch computes them; a transposed one of stride 1 also as a plain one with the flipped kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from adjointlab.transpose.kernels.convolution import ConvSpec, Run, sized


def native(spec: ConvSpec) -> Run:
    """Return the convolution as PyTorch computes it."""
    settings = spec.stride, spec.padding, spec.dilation, spec.transposed, spec.output_padding, spec.groups

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *settings)

    return run


def by_groups(weight: Tensor, spec: ConvSpec) -> Tensor:
    """Return a weight in the shape ``(groups, C_out / groups, C_in / groups, *kernel)``."""
    weight = weight.reshape(spec.groups, weight.shape[0] // spec.groups, weight.shape[1], *spec.kernel)
    return weight.transpose(1, 2) if spec.transposed else weight


def flip(weight: Tensor, spec: ConvSpec) -> Tensor:
    """Return the kernel whose plain convolution is the one of the spec, a transposed one of stride 1, say."""
    return by_groups(weight, spec).flatten(0, 1).flip(spec.dims).contiguous() if spec.transposed else weight


def flipped(spec: ConvSpec) -> Run:
    """Return a transposed convolution of stride 1 as a plain one with the flipped kernel."""
    return native(sized(spec._replace(padding=spec.around, transposed=False)))
