"""Convolutions as PyTorch computes them; a transposed one of stride 1 also as a plain one with the flipped kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from adjointlab.transpose.kernels.convolution import ConvSpec, Run, flipped_spec


def native(spec: ConvSpec) -> Run:
    """Return the convolution as PyTorch computes it."""
    settings = spec.stride, spec.padding, spec.dilation, spec.transposed, spec.output_padding, spec.groups

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *settings)

    return run


def flip(weight: Tensor, spec: ConvSpec) -> Tensor:
    """Return the kernel whose plain convolution is the transposed one: reversed, channels swapped within groups."""
    c_in, per_group = weight.shape[:2]
    if c_in * per_group > 1:
        weight = weight.reshape(spec.groups, c_in // spec.groups, per_group, *spec.kernel).transpose(1, 2)
        weight = weight.reshape(spec.groups * per_group, c_in // spec.groups, *spec.kernel)
    return weight.flip(spec.dims).contiguous()


def flipped(spec: ConvSpec) -> Run:
    """Return a transposed convolution of stride 1 as a plain one with the flipped kernel."""
    return native(flipped_spec(spec))
