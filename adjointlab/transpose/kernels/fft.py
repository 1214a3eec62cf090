"""Convolutions as products of Fourier transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjointlab.transpose.kernels.convolution import ConvSpec, Run
from adjointlab.transpose.kernels.direct import by_groups


def spectrum(weight: Tensor, spec: ConvSpec) -> Tensor:
    """Return the kernel's transform, of shape ``(groups, C_out / groups, C_in / groups, *frequencies)``.

    Where each channel has a kernel of its own, it is of shape ``(C, *frequencies)``.
    """
    weight, size = by_groups(weight, spec), spec.fft_size
    placed = weight.new_zeros(*weight.shape[:3], *size)
    where: Any = (..., *[slice(0, e, d) for e, d in zip(spec.extent, spec.dilation, strict=True)])
    placed[where] = weight
    axes = tuple(range(3, 3 + len(size)))
    # Moved by the padding, so that the first wanted output is the first entry of the result.
    transform = torch.fft.rfftn(placed.roll([-p for p in spec.padding], axes), dim=axes)
    result: Tensor = transform if spec.transposed else transform.conj().resolve_conj()
    return result[:, 0, 0] if result.shape[1] == result.shape[2] == 1 else result


def fft(spec: ConvSpec) -> Run:
    """Return the convolution as a product of transforms."""

    def run(x: Tensor, transform: Tensor, bias: Tensor | None) -> Tensor:
        return _synthesis(_product(_analysis(x, spec), transform), bias, spec)

    return run


def gradient(specs: tuple[ConvSpec, ConvSpec]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return ``(x, y, a, b) ↦ B(Ax − y)`` for two products with transforms, of one length: subtracted are spectra.

    That needs three transforms, where one product after the other needs four.
    """
    first, second = specs

    def run(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        spectrum = _product(_analysis(x, first), a).sub_(_analysis(y, second))
        return _synthesis(_product(spectrum, b), None, second)

    return run


def _analysis(x: Tensor, spec: ConvSpec) -> Tensor:
    """Return the transform of what a spec reads."""
    spread = x
    if spec.transposed and any(s > 1 for s in spec.stride):
        spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], spec.stride, strict=True)))
        where: Any = (..., *[slice(None, None, s) for s in spec.stride])
        spread[where] = x
    return torch.fft.rfftn(spread, s=spec.fft_size, dim=spec.dims)  # type: ignore[no-any-return]


def _product(source: Tensor, transform: Tensor) -> Tensor:
    """Return the spectrum of the result; the source's memory may be used for it."""
    if transform.ndim < source.ndim:
        return source.mul_(transform)  # no one else has it
    (batch, _, *frequencies), g = source.shape, transform.shape[0]
    if transform.shape[2] == 1:
        product = source.reshape(batch, g, 1, *frequencies) * transform[:, :, 0]
    else:
        product = (source.reshape(batch, g, 1, -1, *frequencies) * transform).sum(3)
    return product.reshape(batch, -1, *frequencies)


def _synthesis(product: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    """Return the result with a spectrum."""
    dims = spec.dims
    y: Tensor = torch.fft.irfftn(product, s=spec.fft_size, dim=dims)
    steps = [1] * len(dims) if spec.transposed else spec.stride
    wanted: Any = (..., *[slice(0, (n - 1) * s + 1, s) for n, s in zip(spec.output_shape[1:], steps, strict=True)])
    y = y[wanted]
    return y.contiguous() if bias is None else y + bias.reshape(-1, *[1] * len(dims))
