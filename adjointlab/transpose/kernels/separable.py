"""Interpolation and pooling by means, one dimension after another: each is a small sparse matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adjointlab.compat import plain
from adjointlab.transpose.kernels.convolution import each_of
from adjointlab.transpose.kernels.sparse_map import csr_of

aten = torch.ops.aten

_UPSAMPLED = (
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
)  # fmt: skip
_POOLED = ("avg_pool2d", "avg_pool3d")
_ADAPTED = ("_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
_SPARSE = 128  # times as many entries a dense matrix may have, that multiplies as fast
_SMALL = 1 << 20  # entries of an identity that may be more than those of the image

# Operations that interpolate or pool, with the name of the forward one; and their transposes.
FORWARDS = {getattr(aten, name): name for name in (*_UPSAMPLED, *_POOLED, *_ADAPTED)}
BACKWARDS = {getattr(aten, f"{name}_backward"): name for name in (*_UPSAMPLED, *_POOLED, *_ADAPTED)}
SEPARABLE = {*FORWARDS, *BACKWARDS}


def factors(packet: Any, x: Any, args: Sequence[Any]) -> list[tuple[int, Tensor]] | None:
    """Return the dimensions that an operation ``packet(x, *args)`` changes, each with its matrix; None if one is large.

    The matrix of a dimension is what the operation makes of an identity, the other dimensions being of size two: it
    leaves these alone. PyTorch's antialiased interpolation of what is one column wide is wrong.
    """
    name = FORWARDS.get(packet) or BACKWARDS[packet]
    is_backward = packet in BACKWARDS
    forward = getattr(aten, name).default
    inner, outer, along = _settings(name, x, args, is_backward)
    k, found = len(inner), []
    for d in range(k):
        n, m = inner[d], outer[d]
        if n * m << (k - 1) > max(_SMALL, math.prod(inner), math.prod(outer)):
            return None
        one = torch.eye(n, dtype=x.dtype, device=x.device).reshape(1, n, *[n if i == d else 1 for i in range(k)])
        spread = one.expand(1, n, *[n if i == d else 2 for i in range(k)]).contiguous()
        matrix = forward(spread, *along(d)).movedim(2 + d, 2).reshape(n, m, -1)[..., 0]
        matrix = matrix if is_backward else matrix.mT
        if n != m or not torch.equal(matrix, torch.eye(n, dtype=x.dtype, device=x.device)):
            found.append((x.ndim - k + d, matrix.contiguous()))
    return found


def _settings(
    name: str, x: Any, args: Sequence[Any], is_backward: bool
) -> tuple[list[int], list[int], Callable[[int], tuple[Any, ...]]]:
    """Return the sizes that the forward takes and returns, and its arguments for one dimension alone."""
    if name in _UPSAMPLED:
        outer, rest = list(args[0]), list(args[2 if is_backward else 1 :])
        k = len(outer)
        inner = list(args[1][-k:]) if is_backward else list(x.shape[-k:])
        corners = [rest.pop(0)] if rest and isinstance(rest[0], bool) else []

        def along(d: int) -> tuple[Any, ...]:
            scales = [scale if i == d or scale is None else 1.0 for i, scale in enumerate(rest)]
            return [outer[i] if i == d else 2 for i in range(k)], *corners, *scales

        return inner, outer, along
    k = int(name[-2])
    if is_backward:
        inner, outer, settings = list(args[0].shape[-k:]), list(x.shape[-k:]), list(args[1:])
    elif name in _ADAPTED:
        inner, outer, settings = list(x.shape[-k:]), list(args[0]), []
    else:
        inner, settings = list(x.shape[-k:]), list(args)
        outer = list(getattr(aten, name).default(torch.empty(1, *inner, device="meta"), *args).shape[-k:])
    if name in _ADAPTED:
        return inner, outer, lambda d: ([outer[i] if i == d else 2 for i in range(k)],)
    every: list[Any] = [*settings, *[[], [0], False, True, None][len(settings) - 1 :]]
    kernel, stride, padding, *others = every
    kernel, padding, stride = each_of(kernel, k), each_of(padding, k), each_of(stride or kernel, k)
    override = others[2]

    def pooled(d: int) -> tuple[Any, ...]:
        def alone(sizes: list[int], unit: int) -> list[int]:
            return [size if i == d else unit for i, size in enumerate(sizes)]

        divisor = None if override is None else override if d == 0 else 1
        return alone(kernel, 1), alone(stride, 1), alone(padding, 0), *others[:2], divisor

    return inner, outer, pooled


def ways(
    parts: Sequence[tuple[int, Tensor]], shape: Sequence[int], result: Sequence[int]
) -> list[Callable[[Tensor], Tensor]]:
    """Return functions that multiply a tensor of a shape by a matrix along each of some dimensions."""
    regular = [_repeats(matrix) for _, matrix in parts]
    grows = math.prod(result) > math.prod(shape)
    # The dimension that is last in memory comes first or last, whichever has less to be copied in another order.
    order = sorted(parts, key=lambda part: part[0], reverse=grows)
    matrices = [(dim, csr_of(matrix)) for dim, matrix in order]

    def product(x: Tensor, first: int = 0) -> Tensor:
        for dim, matrix in matrices:
            columns = x.movedim(dim - first, 0)
            found = matrix @ columns.reshape(len(columns), -1)
            x = found.reshape(len(found), *columns.shape[1:]).movedim(0, dim - first)
        return x

    def sparse_products(x: Tensor) -> Tensor:
        return product(x).contiguous()

    images = min(dim for dim, _ in parts)

    def sparse_products_each(x: Tensor) -> Tensor:
        found = x.new_empty(tuple(result))
        flat, into = x.reshape(-1, *shape[images:]), found.view(-1, *result[images:])
        for image, place in zip(flat, into, strict=True):
            place.copy_(product(image, images))
        return found

    corner = tuple([0 if any(dim == d for d, _ in parts) else slice(None) for dim in range(len(shape))])

    def small_products(x: Tensor) -> Tensor:
        if not plain():  # a trace, as for an export, has no values to look at
            return sparse_products(x)
        found = x
        for dim, matrix in order:
            lead, trail = found.shape[:dim], found.shape[dim + 1 :]
            if trail:
                found = (matrix @ found.reshape(math.prod(lead), -1, math.prod(trail))).reshape(*lead, -1, *trail)
            else:
                found = found @ matrix.mT
        # Where an entry of x is not finite, nothing is in its line of a product with a dense matrix.
        return found if math.isfinite(abs(found[corner].sum().item())) else sparse_products(x)

    def repeats(x: Tensor) -> Tensor:
        for (dim, _), (times, factor) in zip(parts, regular, strict=True):  # type: ignore[misc]
            x = (x * factor).repeat_interleave(times, dim) if times > 1 else x
        return x

    kept = [matrix for _, matrix in matrices]  # for the account of memory
    for way in (sparse_products, sparse_products_each, small_products):
        way.kept = [*kept, *([m for _, m in order] if way is small_products else [])]  # type: ignore[attr-defined]
    found: list[Callable[[Tensor], Tensor]] = [repeats] if all(regular) else []
    several = math.prod(shape[:images]) > 1
    small = all(m.is_cpu and m.numel() <= _SPARSE * int(m.count_nonzero()) for _, m in parts)
    return [*found, sparse_products, *([sparse_products_each] * several), *([small_products] * small)]


def _repeats(matrix: Tensor) -> tuple[int, float] | None:
    """Return how often a matrix repeats each entry of a vector, and the factor, if that is all it does."""
    m, n = matrix.shape
    factor, times = float(matrix[0, 0]), m // n
    if m % n or times == 1:
        return None
    one = torch.eye(n, dtype=matrix.dtype, device=matrix.device).repeat_interleave(times, 0)
    return (times, factor) if torch.equal(matrix, one * factor) else None
