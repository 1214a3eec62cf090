"""A gram ``AᴴA`` after its kernels were chosen: a product of transforms undoes another, sparse maps are multiplied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import known
from adjointlab.transpose.kernels.convolution import ConvSpec, spectra_meet
from adjointlab.transpose.kernels.registry import FFT
from adjointlab.transpose.passes.convolutions import transform_product
from adjointlab.transpose.passes.gram_terms import Fixed, Found, Rule


def spectra(body: fx.Graph, node: Any, fixed: Fixed) -> Found:
    """``F⁻¹(L ⊙ F F⁻¹(K ⊙ F x)) = F⁻¹(L K ⊙ F x)``, where the first image is whole."""
    second = transform_product(node)
    inner: Any = node.args[0] if second is not None else node
    first = transform_product(inner) if inner is not node and len(inner.users) == 1 else None
    if first is None or second is None or not spectra_meet(first, second) or first.groups != second.groups:
        return None
    sources, images, results = (n // first.groups for n in (first.input_shape[0], *_channels(first, second)))
    alone = _is_alone(first), _is_alone(second)
    if alone[0] is not alone[1] or sources * results > 2 * images * max(sources, results):
        return None  # products with more entries take longer than the transforms in between
    product = body.call_function(_both if alone[0] else _channelwise, (inner.args[1], node.args[1]))
    factor = known(product, node.meta["val"])
    found = body.call_function(FFT.bind(second), (inner.args[0], factor, None))
    return known(found, node.meta["val"]), "ifft · fft between convolutions cancelled"


def _channels(first: ConvSpec, second: ConvSpec) -> tuple[int, int]:
    return first.output_shape[0], second.output_shape[0]


def _is_alone(spec: ConvSpec) -> bool:
    """Return whether each channel has a kernel of its own, which the shape of its transform shows."""
    return spec.input_shape[0] == spec.output_shape[0] == spec.groups


def _both(first: Tensor, second: Tensor) -> Tensor:
    return first * second


def _channelwise(first: Tensor, second: Tensor) -> Tensor:
    """Return ``Σₘ second[o, m] first[m, i]`` for each group and frequency."""
    return torch.einsum("gom...,gmi...->goi...", second, first)


RULES: tuple[Rule, ...] = (spectra,)
