"""Tensors that know themselves as a sparse linear function of one tensor, composed operation by operation.

A program that is run on such a tensor returns its own matrix. Operations that only move numbers are run on the numbers
of the places instead, which says where each entry comes from; what adds up is the transpose of what moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adjointlab import compat
from adjointlab.compat import pytree
from adjointlab.transpose.kernels import separable
from adjointlab.transpose.passes import grids
from adjointlab.transpose.passes.rows import NotByIndexError, Rows, diagonal, starts

aten = torch.ops.aten


class Sparse(Tensor):
    """A tensor that is a sparse function of one, the same for each place of ``batch`` dimensions.

    These lead in the tensor's shape or, where it ``trails``, come last.
    """

    rows: Rows
    batch: tuple[int, ...]
    trails: bool

    @staticmethod
    def __new__(cls, rows: Rows, shape: Sequence[int], batch: Sequence[int], *, trails: bool = False) -> Sparse:
        """Return a tensor without values."""
        found = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=rows.value.dtype, device=rows.value.device)
        found.rows, found.batch, found.trails = rows, tuple(batch), trails
        return found

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @classmethod
    def identity(cls, like: Tensor, free: int = 0, most: int = (1 << 31) - 1, *, trails: bool = False) -> Sparse:
        """Return a tensor as a function of itself, the first or last ``free`` dimensions being the batch.

        No function of it may have more entries than ``most``.
        """
        batch = like.shape[like.ndim - free :] if trails else like.shape[:free]
        n = like.numel() // math.prod(batch)
        at = torch.arange(n + 1, device=like.device)
        column = at[:-1].to(torch.int32 if max(n, most) < 1 << 31 else torch.int64)
        ones = torch.ones(n, dtype=like.dtype, device=like.device)
        return cls(Rows(at, column, ones, most, is_single=True, is_one=True), like.shape, batch, trails=trails)

    @property
    def core(self) -> int:
        """Number of entries at each place of the batch."""
        return self.numel() // math.prod(self.batch)

    @property
    def free(self) -> range:
        """The dimensions of the batch."""
        k = len(self.batch)
        return range(self.ndim - k, self.ndim) if self.trails else range(k)

    def like(self, rows: Rows, shape: Sequence[int]) -> Sparse:
        """Return another function, with the batch where it is here."""
        return Sparse(rows, shape, self.batch, trails=self.trails)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Sparse({tuple(self.shape)}, {len(self.rows.value)} entries)"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        rule = RULES.get(func.overloadpacket)
        if rule is not None:
            return rule(func, *args, **kwargs)
        decomposition = compat.decomposition(func)
        if decomposition is not None:
            return decomposition(*args, **kwargs)
        raise NotByIndexError(f"{func} is no operation by index")


def _apart(tensor: Tensor, batch: Sequence[int], *, trails: bool) -> Tensor:
    """Return a tensor with one row for each place of the batch."""
    count = math.prod(batch)
    return tensor.reshape(-1, count).mT if trails else tensor.reshape(count, -1)


def _fits(shape: Sequence[int], batch: tuple[int, ...], *, trails: bool) -> bool:
    return tuple(shape[len(shape) - len(batch) :] if trails else shape[: len(batch)]) == batch


def numbers(shape: Sequence[int], batch: tuple[int, ...], total: int, device: Any, *, trails: bool) -> Tensor:
    """Return numbers of places, from one: those of the next place of the batch are larger by ``total``."""
    count = math.prod(batch)
    core = math.prod(shape) // count
    dtype = torch.int32 if total * count < (1 << 31) - 1 else torch.int64
    at = torch.arange(count, device=device, dtype=dtype).mul_(total)[:, None]
    at = at + torch.arange(1, 1 + core, device=device, dtype=dtype)
    return (at.mT if trails else at).reshape(tuple(shape))


def common(places: Tensor, like: Sparse, total: int) -> tuple[Tensor, bool]:
    """Return the numbers at the first place of the batch, the same, but for that, at each; and whether it trails."""
    for trails in (like.trails, not like.trails):
        if _fits(places.shape, like.batch, trails=trails):
            whole = _apart(places, like.batch, trails=trails)
            first = whole[0]
            at = torch.arange(len(whole), device=whole.device, dtype=whole.dtype)[:, None] * total
            if len(whole) == 1 or torch.equal(whole, torch.where(first > 0, first + at, 0)):
                return first, trails
    raise NotByIndexError("an operation does otherwise at another place of the batch")


_PLACES = {"index", "indices", "mask", "condition"}  # arguments that say where, and are no numbers that are moved


def _moved(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation that only moves numbers, and zeros, on the numbers of the places."""
    schema = func._schema.arguments
    by_name = {**dict(zip([a.name for a in schema], args, strict=False)), **kwargs}
    if any(str(a.type) == "number" and by_name.get(a.name, 0) != 0 for a in schema):
        raise NotByIndexError(f"{func} puts numbers beside those of the input")
    given = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Sparse)]
    like, offsets, total = given[0], dict[int, int](), 0
    for each in given:
        if (each.batch, each.trails) != (like.batch, like.trails):
            raise NotByIndexError("parts have their batch at other places")
        offsets.setdefault(id(each), total)
        total += each.core
    is_wide = func.overloadpacket in _OF_FLOATS or total * math.prod(like.batch) >= (1 << 31) - 1

    def numbered(a: Any) -> Any:
        if isinstance(a, Sparse):
            at = numbers(a.shape, a.batch, total, a.device, trails=a.trails) + offsets[id(a)]
            return at.double() if func.overloadpacket in _OF_FLOATS else at  # exact up to 2⁵³
        if isinstance(a, Tensor):
            if a.count_nonzero():
                raise NotByIndexError(f"{func} puts numbers beside those of the input")
            return torch.zeros(a.shape, dtype=torch.int64 if is_wide else torch.int32, device=a.device)
        return a

    def moved(places: Tensor) -> Sparse:
        first, trails = common(places.long() if func.overloadpacket in _OF_FLOATS else places, like, total)
        return Sparse(rows.take(first - 1), places.shape, like.batch, trails=trails)

    rows = like.rows
    for each in given[1:]:
        rows = rows.of(
            torch.cat([rows.start, rows.start[-1] + each.rows.start[1:]]), torch.cat([rows.column, each.rows.column]),
            torch.cat([rows.value, each.rows.value]),
        )  # fmt: skip
    names = {name: a if name in _PLACES else pytree.tree_map(numbered, a) for name, a in by_name.items()}
    positional = [names.pop(a.name) for a in schema[: len(args)]]
    return pytree.tree_map(moved, func(*positional, **names))


_OF_FLOATS = {aten.im2col}  # which have no integer kernels


def _put(into: Any, source: Any, shape: Sequence[int], place: Callable[[Tensor], Tensor]) -> Sparse:
    """Return a tensor of a shape to which each entry of a source is added, where ``place`` finds it among numbers."""
    if not isinstance(source, Sparse):
        raise NotByIndexError("other numbers than those of the input are added by index")
    n = math.prod(shape) // math.prod(source.batch)
    for trails in (source.trails, not source.trails):
        if _fits(shape, source.batch, trails=trails):
            target = place(numbers(shape, source.batch, n, source.device, trails=trails))
            first, where = common(target.expand(source.shape), source, n)
            if where is source.trails:
                break
    else:
        raise NotByIndexError("an operation changes the batch")
    found = Sparse(source.rows.put(first - 1, n), shape, source.batch, trails=trails)
    if isinstance(into, Sparse):
        return _added(into, found)
    if isinstance(into, Tensor) and into.count_nonzero():
        raise NotByIndexError("numbers are added to others")
    return found


def _summed(a: Sparse, dims: Sequence[int], *, keepdim: bool) -> Sparse:
    """Return sums along dimensions: these are moved next to the batch, so that what is added is next to one another."""
    if not set(dims).isdisjoint(a.free):
        raise NotByIndexError("a sum over the batch")
    kept = [d for d in range(a.ndim) if d not in dims and d not in a.free]
    order = [*kept, *dims, *a.free] if a.trails else [*a.free, *kept, *dims]
    moved = a if order == [*range(a.ndim)] else _moved(aten.permute.default, a, order)
    count = math.prod(a.shape[d] for d in dims)
    shape = [1 if d in dims else n for d, n in enumerate(a.shape)]
    return a.like(moved.rows.merged(count), shape if keepdim else [n for d, n in enumerate(a.shape) if d not in dims])


def _reduced(func: Any, a: Sparse, dim: Any = None, keepdim: bool = False, **_: Any) -> Sparse:
    dims = sorted({d % a.ndim for d in (dim if dim else range(a.ndim))})
    found = _summed(a, dims, keepdim=keepdim)
    return _times(found, found.numel() / a.numel()) if func.overloadpacket is aten.mean else found


def _added(a: Sparse, b: Sparse) -> Sparse:
    beside = a.free[0] if a.trails and a.batch else a.ndim
    return _summed(_moved(aten.stack.default, [a, b], beside), [beside], keepdim=False)


def _expanded(a: Sparse, shape: Sequence[int]) -> Sparse:
    return a if a.shape == tuple(shape) else _moved(aten.expand.default, a, list(shape))


def _sum(func: Any, a: Any, b: Any, alpha: float = 1) -> Any:
    if not (isinstance(a, Sparse) and isinstance(b, Sparse)):
        raise NotByIndexError("a number is added to those of the input")
    shape = torch.broadcast_shapes(a.shape, b.shape)
    sign = -alpha if func.overloadpacket is aten.sub else alpha
    return _added(_expanded(a, shape), _times(_expanded(b, shape), sign))


def _times(a: Sparse, factor: Any) -> Sparse:
    return a if factor == 1 else _scaled(a, torch.tensor(factor, dtype=a.dtype, device=a.device))


def _scaled(a: Sparse, factor: Tensor) -> Sparse:
    a = _expanded(a, torch.broadcast_shapes(a.shape, factor.shape))
    factor = factor.reshape((1,) * (a.ndim - factor.ndim) + factor.shape)
    if any(factor.shape[d] > 1 for d in a.free):
        whole = _apart(factor.expand(a.shape), a.batch, trails=a.trails)
        if not torch.equal(whole, whole[:1].expand_as(whole)):
            raise NotByIndexError("factors differ along the batch")
        core = whole[0]
    else:
        core = factor.expand([1 if d in a.free else n for d, n in enumerate(a.shape)]).reshape(-1)
    return a.like(a.rows.scaled(core.contiguous()), a.shape)


def _product(func: Any, a: Any, b: Any, **options: Any) -> Any:
    if isinstance(b, Sparse):
        if isinstance(a, Sparse) or func.overloadpacket is aten.div:
            raise NotByIndexError("a product of two values of the input")
        a, b = b, a
    if options:
        raise NotByIndexError("division that rounds")
    factor = torch.as_tensor(b, device=a.device).to(a.dtype)
    return _scaled(a, 1 / factor if func.overloadpacket is aten.div else factor)


def _index_put(func: Any, into: Any, indices: Any, source: Any, accumulate: bool = False, *_: Any) -> Any:
    if not accumulate:
        return _moved(func, into, indices, source)
    if not isinstance(source, Sparse):
        raise NotByIndexError("other numbers than those of the input are added by index")
    shape = aten.index(torch.zeros((), dtype=torch.bool, device=source.device).expand(into.shape), indices).shape
    return _put(into, _expanded(source, shape), into.shape, lambda at: aten.index(at, indices))


def _scatter_add(func: Any, into: Any, dim: int, index: Tensor, source: Any) -> Sparse:
    for d, n in enumerate(index.shape if isinstance(source, Sparse) else ()):
        source = _moved(aten.slice.Tensor, source, d, 0, n)
    return _put(into, source, into.shape, lambda at: torch.gather(at, dim, index))


def _index_add(func: Any, into: Any, dim: int, index: Tensor, source: Any, alpha: float = 1) -> Sparse:
    if isinstance(source, Sparse):
        source = _times(source, alpha)
    return _put(into, source, into.shape, lambda at: torch.index_select(at, dim, index))


def _separable(func: Any, x: Sparse, *args: Any) -> Sparse:
    """Return an interpolation, a mean pool or the transpose of one: a gather, factors and a sum for each dimension."""
    parts = separable.factors(func.overloadpacket, torch.empty(x.shape, dtype=x.dtype, device=x.device), args)
    if parts is None:
        raise NotByIndexError(f"one dimension of {func} is large")
    for dim, matrix in parts:
        row, column = matrix.nonzero(as_tuple=True)
        factor = matrix[row, column].reshape(-1, *[1] * (x.ndim - 1 - dim))
        terms = x.index_select(dim, column) * factor
        zeros = torch.zeros([*x.shape[:dim], len(matrix), *x.shape[dim + 1 :]], dtype=x.dtype, device=x.device)
        x = torch.index_add(zeros, dim, row, terms)  # type: ignore[assignment]
    return x


# -- samples on grids, and windows -------------------------------------------------------------------------------------


def _samples(x: Any, batch: tuple[int, ...], grid: Tensor, settings: Sequence[Any], like: Rows) -> list[Rows]:
    """Return the matrices of samples of images, one for each grid; images of a batch have one in common."""
    index, weight = grids.samples(grid, x.shape[2:], *settings)
    if batch and not all(torch.equal(t, t[:1].expand_as(t)) for t in (index, weight)):
        raise NotByIndexError("grids differ along the batch")
    found = []
    for places, weights in list(zip(index, weight, strict=True))[: 1 if batch else None]:
        inside = places >= 0
        start = starts(inside.sum(1))
        like.check(len(index) * int(start[-1]))
        found.append(like.of(start, places[inside].to(like.column.dtype), weights[inside]))
    return found


def _sampled(func: Any, x: Sparse, grid: Tensor, *settings: Any) -> Sparse:
    parts = _samples(x, _images(x), grid, settings, x.rows)
    shape = (*x.shape[:2], *grid.shape[1:-1])
    return x.like(diagonal(parts, x.shape[1] if len(x.batch) < 2 else 1, math.prod(x.shape[2:])).applied(x.rows), shape)


def _sampled_back(func: Any, v: Sparse, x: Any, grid: Tensor, *settings: Any) -> tuple[Sparse, None]:
    parts = _samples(x, _images(v), grid, settings[:3], v.rows)
    n = math.prod(x.shape[2:])
    parts = [part.transposed(n) for part in parts]
    whole = diagonal(parts, v.shape[1] if len(v.batch) < 2 else 1, math.prod(grid.shape[1:-1]))
    return v.like(whole.applied(v.rows), x.shape), None


def _images(x: Sparse) -> tuple[int, ...]:
    if x.trails or len(x.batch) > 2:
        raise NotByIndexError("samples of parts of an image")
    return x.batch


def _folded(func: Any, source: Sparse, output_size: Any, kernel: Any, *settings: Any) -> Any:
    """Return sums of windows: the transpose of what takes them apart."""
    channels = source.shape[-2] // math.prod(kernel)
    shape = (*source.shape[:-2], channels, *output_size)
    if source.trails:
        raise NotByIndexError("windows of parts of an image")
    one = Sparse.identity(
        torch.empty(shape, dtype=source.dtype, device=source.device), len(source.batch), source.rows.most
    )
    local = aten.im2col(one, kernel, *settings)
    return source.like(local.rows.transposed(one.core).applied(source.rows), shape)


def _converted(func: Any, a: Sparse, *args: Any, **kwargs: Any) -> Sparse:
    dtype = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.dtype)), a.dtype)
    if dtype is not a.dtype:
        raise NotByIndexError("numbers are rounded to another dtype")
    return a


MOVES = (
    aten.view, aten._unsafe_view, aten.reshape, aten.expand, aten.permute, aten.transpose, aten.t, aten.squeeze,
    aten.unsqueeze, aten.slice, aten.select, aten.index, aten.index_select, aten.gather, aten.flip, aten.roll,
    aten.constant_pad_nd, aten.cat, aten.stack, aten.clone, aten.alias, aten.detach, aten.unfold, aten.im2col,
    aten.repeat, aten.diagonal, aten.slice_backward, aten.select_backward, aten.slice_scatter, aten.select_scatter,
    aten.diagonal_backward, aten.diagonal_scatter, aten.take, aten.split, aten.unbind, aten.as_strided, aten.where,
    aten.masked_fill, aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d, aten.replication_pad1d,
    aten.replication_pad2d, aten.replication_pad3d, aten.pixel_shuffle, aten.pixel_unshuffle, aten.lift_fresh_copy,
)  # fmt: skip
RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(MOVES, _moved),
    **dict.fromkeys((aten.add, aten.sub), _sum),
    **dict.fromkeys((aten.mul, aten.div), _product),
    **dict.fromkeys((aten.sum, aten.mean), _reduced),
    aten.neg: lambda func, a: _times(a, -1),
    **dict.fromkeys((aten.to, aten._to_copy), _converted),
    aten.index_put: _index_put,
    aten.scatter_add: _scatter_add,
    aten.index_add: _index_add,
    **dict.fromkeys((aten.grid_sampler_2d, aten.grid_sampler_3d), _sampled),
    **dict.fromkeys((aten.grid_sampler_2d_backward, aten.grid_sampler_3d_backward), _sampled_back),
    **dict.fromkeys(separable.SEPARABLE, _separable),
    aten.col2im: _folded,
}
