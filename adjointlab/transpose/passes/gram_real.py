"""Rules for the transforms of real images in a gram: half of a spectrum is enough, there and back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import call, known
from adjointlab.transpose.passes.gram_terms import (
    Fixed,
    Found,
    Rule,
    cast,
    made,
    rescaled,
    suffix,
    value,
    weighed,
    whose_real_part,
)

aten = torch.ops.aten


def real_part_of_inverse(body: fx.Graph, node: Any, fixed: Fixed) -> Found:
    """``Re F⁻¹`` of half a spectrum beside zeros is the inverse transform of half of all but its ends."""
    full = whose_real_part(node)
    if full is None or full.target is not aten._fft_c2c.default:
        return None
    joined, dims, norm, forward = full.args
    if forward or joined.target is not aten.cat.default or len(full.users) > 1 or not _on_cpu(node):
        return None
    dim = (joined.args[1] if len(joined.args) > 1 else 0) % value(full).ndim
    dims, n = [d % value(full).ndim for d in dims], value(full).shape[dim]
    if len(joined.args[0]) != 2 or dim not in dims or not _is_zero(joined.args[0][1]):
        return None
    half = joined.args[0][0]
    if len(joined.users) > 1 or fixed(half) or value(half).shape[dim] != n // 2 + 1:
        return None
    weights = made(_vector(body, [(1 + end) / 2 for end in _ends(n)], dim, value(half)))
    order = [*(d for d in dims if d != dim), dim]
    found = call(body, aten._fft_c2r.default, call(body, aten.mul.Tensor, half, weights), order, norm, n)
    return found, "real part of ifft to irfft"


def real_images(body: fx.Graph, node: Any, fixed: Fixed) -> Found:
    """``Re F⁻¹(K ⊙ F x) = F⁻¹(K' ⊙ F x)`` for a real image, where K' is what of K is the transform of a real kernel."""
    back = whose_real_part(node)
    if back is None or back.target is not aten._fft_c2c.default:
        return None
    spectrum, kernel = weighed(back.args[0], fixed)
    alone = len(back.users) == len(back.args[0].users) == len(spectrum.users) == 1
    if not alone or spectrum.target is not aten._fft_c2c.default or back.args[3] is spectrum.args[3]:
        return None
    image, ndim = spectrum.args[0], value(node).ndim
    dims, others = (sorted(d % ndim for d in each.args[1]) for each in (back, spectrum))
    if dims != others or back.args[3] or len(image.users) > 1 or not _on_cpu(node):
        return None
    if image.target is not aten._to_copy.default or value(image.args[0]).dtype != value(node).dtype:
        return None
    half = call(body, aten._fft_r2c.default, image.args[0], dims, spectrum.args[2], True)
    if isinstance(kernel, fx.Node):
        kernel = _half(body, kernel, dims, value(node), value(half).shape[dims[-1]])
    elif kernel is not None:
        kernel = kernel.real
    half = half if kernel is None else call(body, aten.mul.Tensor, half, kernel)
    found = call(body, aten._fft_c2r.default, half, dims, back.args[2], value(node).shape[dims[-1]])
    return found, "real part of ifft · fft to irfft · rfft"


def _half(body: fx.Graph, kernel: Any, dims: list[int], like: Tensor, count: int) -> Any:
    """Return half of the Hermitian part of a kernel, ``(K(ω) + conj K(−ω)) / 2``."""
    kernel, offset = cast(body, kernel, like), like.ndim - value(kernel).ndim
    there = [d - offset for d in dims if d >= offset and value(kernel).shape[d - offset] > 1]
    parts = [call(body, aten.mul.Tensor, each, 0.5) for each in (kernel, _mirrored(body, kernel, there))]
    found = call(body, aten.add.Tensor, *parts)
    if dims[-1] - offset in there:
        found = call(body, aten.slice.Tensor, found, dims[-1] - offset, 0, count)
    return made(found)


def _mirrored(body: fx.Graph, kernel: Any, dims: list[int]) -> Any:
    """Return ``conj K(−ω)``."""
    if dims:
        kernel = call(body, aten.roll.default, call(body, aten.flip.default, kernel, dims), [1] * len(dims), dims)
    return call(body, aten.conj_physical.default, kernel) if value(kernel).is_complex() else kernel


def doubled(body: fx.Graph, node: Any, fixed: Fixed) -> Found:
    """Half a spectrum of which all entries but the ends are doubled, piece by piece, is a product."""
    if node.target is not aten.cat.default or len(node.args[0]) not in {2, 3}:
        return None
    dim, at = (node.args[1] if len(node.args) > 1 else 0) % value(node).ndim, 0
    source, numbers = None, []
    for piece in node.args[0]:
        part, number = (piece.args[0], piece.args[1]) if piece.target is aten.mul.Scalar else (piece, 1)
        if part.target is not aten.slice.Tensor or isinstance(number, fx.Node) or fixed(part):
            return None
        _, along, start, stop, *step = part.args
        size = value(part).shape[dim]
        if along % value(node).ndim != dim or start != at or stop < at + size or step not in ([], [1]):
            return None
        if source not in {None, part.args[0]}:
            return None
        source, at = part.args[0], at + size
        numbers += [number] * size
    if source is None or value(source).shape != value(node).shape or len(set(source.users)) != len(node.args[0]):
        return None
    factor = made(_vector(body, numbers, dim, value(node)))
    return call(body, aten.mul.Tensor, source, factor), ""


def there_and_back(body: fx.Graph, node: Any, fixed: Fixed) -> Found:
    """``F F⁻¹ (K ⊙ F x) = K' ⊙ F x`` for real images, where K' is what of K is the transform of a real kernel."""
    back = node.args[0] if node.target is aten._fft_r2c.default and node.args[3] else None
    if back is None or back.target is not aten._fft_c2r.default or len(back.users) > 1 or not _on_cpu(node):
        return None
    spectrum, kernel = weighed(back.args[0], fixed)
    alone = len(back.args[0].users) == len(spectrum.users) == 1
    if not alone or spectrum.target is not aten._fft_r2c.default or not spectrum.args[3]:
        return None
    ndim, shape = value(node).ndim, value(back).shape
    all_dims = [[d % ndim for d in each.args[1]] for each in (node, back, spectrum)]
    dims = all_dims[0]
    whole = value(spectrum.args[0]).shape == shape and all(d[-1] == dims[-1] and set(d) == set(dims) for d in all_dims)
    if not whole:
        return None
    found = spectrum
    if isinstance(kernel, fx.Node):
        kernel = _hermitian(body, kernel, dims, ndim, value(spectrum), shape[dims[-1]])
    if kernel is not None:
        found = call(body, aten.mul.Tensor, found, kernel)
    found = rescaled(body, found, [node.args[2], back.args[2]], math.prod(shape[d] for d in dims))
    return found, f"rfft{suffix(dims)} · irfft{suffix(dims)} cancelled"


def _hermitian(body: fx.Graph, kernel: Any, dims: list[int], ndim: int, like: Tensor, n: int) -> Any:
    """Return a kernel with, where a frequency of the halved dimension is its own mirror image, its Hermitian part."""
    kernel, offset = cast(body, kernel, like), ndim - value(kernel).ndim
    others = [d - offset for d in dims[:-1] if d >= offset and value(kernel).shape[d - offset] > 1]
    mirrored = _mirrored(body, kernel, others)
    weights = _vector(body, [end / 2 for end in _ends(n)], dims[-1], like)
    rest = _vector(body, [1 - end / 2 for end in _ends(n)], dims[-1], like)
    parts = [call(body, aten.mul.Tensor, kernel, rest), call(body, aten.mul.Tensor, mirrored, weights)]
    return made(call(body, aten.add.Tensor, *parts))


def _ends(n: int) -> list[float]:
    """Return one for each frequency of half a spectrum that is its own mirror image, zero for the others."""
    return [1.0 if k == 0 or 2 * k == n else 0.0 for k in range(n // 2 + 1)]


def _vector(body: fx.Graph, numbers: list[float], dim: int, like: Tensor) -> Any:
    """Add numbers along a dimension, as a constant."""
    dtype = like.dtype.to_real() if like.is_complex() else like.dtype
    shape, device = [1] * like.ndim, like.device
    shape[dim] = len(numbers)

    def constant() -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=device).reshape(shape)

    return known(body.call_function(constant, ()), like.new_empty(shape, dtype=dtype))


def _is_zero(node: Any) -> bool:
    if node.target in {aten.slice.Tensor, aten.expand.default}:
        return _is_zero(node.args[0])
    return node.target is aten.zeros.default


def _on_cpu(node: Any) -> bool:
    """Return whether what inverse transforms do with spectra of no real image is known: it is, on the CPU."""
    return value(node).device.type == "cpu"


def embedded(body: fx.Graph, node: Any, fixed: Fixed) -> Found:
    """A real image beside zeros, seen as complex numbers, is the image as complex numbers."""
    pair = node.args[0] if node.target is aten.view_as_complex.default else None
    if pair is None or pair.target is not aten.select_backward.default or len(pair.users) > 1:
        return None
    image, shape, dim, index = pair.args
    if dim % len(shape) != len(shape) - 1 or index != 0:
        return None
    return call(body, aten._to_copy.default, image, dtype=value(node).dtype), ""


RULES: tuple[Rule, ...] = (embedded, real_images, real_part_of_inverse, doubled, there_and_back)
