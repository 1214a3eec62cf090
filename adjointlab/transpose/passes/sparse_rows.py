"""Tensors that know themselves as a sparse linear function of one tensor, composed operation by operation.

A program that is run on such a tensor returns its own matrix. Operations that only move numbers are run on the numbers
of the places instead, which says where each entry comes from; what adds up is the transpose of what moves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._pytree import tree_leaves, tree_map

from adjointlab.transpose.kernels import separable
from adjointlab.transpose.passes.rows import NotByIndexError, Rows

aten = torch.ops.aten


class Sparse(Tensor):
    """A tensor that is a sparse function of one, the same for each place of ``prefix`` leading dimensions."""

    rows: Rows
    prefix: int

    @staticmethod
    def __new__(cls, rows: Rows, shape: Sequence[int], prefix: int) -> Sparse:
        """Return a tensor without values."""
        found = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=rows.value.dtype, device=rows.value.device)
        found.rows, found.prefix = rows, prefix
        return found

    def __init__(self, *_: Any) -> None:
        pass

    @classmethod
    def identity(cls, like: Tensor, prefix: int = 0, most: int = (1 << 31) - 1) -> Sparse:
        """Return a tensor of a shape as a function of itself, of which no function may have more entries."""
        n = math.prod(like.shape[prefix:])
        at = torch.arange(n + 1, device=like.device)
        column = at[:-1].to(torch.int32 if max(n, most) < 1 << 31 else torch.int64)
        ones = torch.ones(n, dtype=like.dtype, device=like.device)
        return cls(Rows(at, column, ones, most, is_single=True), like.shape, prefix)

    @property
    def core(self) -> int:
        """Number of entries behind the prefix."""
        return math.prod(self.shape[self.prefix :])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Sparse({tuple(self.shape)}, {len(self.rows.value)} entries)"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        rule = RULES.get(func.overloadpacket)
        if rule is not None:
            return rule(func, *args, **kwargs)
        if func in decomposition_table:
            return decomposition_table[func](*args, **kwargs)
        if func._can_decompose():
            return func.decompose(*args, **kwargs)
        raise NotByIndexError(f"{func} is no operation by index")


def _moved(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation that only moves numbers, and zeros, on the numbers of the places."""
    schema = func._schema.arguments
    given_by_name = {**dict(zip([a.name for a in schema], args, strict=False)), **kwargs}
    if any(str(a.type) == "number" and given_by_name.get(a.name, 0) != 0 for a in schema):
        raise NotByIndexError(f"{func} puts numbers beside those of the input")
    given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Sparse)]
    prefix, offsets, total = given[0].prefix, {}, 0
    sizes = given[0].shape[:prefix]
    for each in given:
        if each.prefix != prefix or each.shape[:prefix] != sizes:
            raise NotByIndexError("parts have other leading dimensions")
        offsets[id(each)] = total
        total += each.core

    def numbered(a: Any) -> Any:
        if isinstance(a, Sparse):
            core = torch.arange(1 + offsets[id(a)], 1 + offsets[id(a)] + a.core, device=a.device)
            at = torch.arange(math.prod(sizes), device=a.device).mul_(total)
            at = (at[:, None] + core).reshape(a.shape)
            return at.double() if func.overloadpacket in _OF_FLOATS else at  # exact up to 2⁵³
        if isinstance(a, Tensor) and a.is_floating_point():
            if a.count_nonzero():
                raise NotByIndexError(f"{func} puts numbers beside those of the input")
            return a.long()
        return a

    found = func(*tree_map(numbered, args), **tree_map(numbered, kwargs))
    found = tree_map(Tensor.long, found) if func.overloadpacket in _OF_FLOATS else found
    rows = given[0].rows
    for each in given[1:]:
        rows = rows.of(
            torch.cat([rows.start, rows.start[-1] + each.rows.start[1:]]), torch.cat([rows.column, each.rows.column]),
            torch.cat([rows.value, each.rows.value]),
        )  # fmt: skip
    return tree_map(lambda places: Sparse(rows.take(_first(places, sizes, total) - 1), places.shape, prefix), found)


_OF_FLOATS = {aten.im2col}  # which have no integer kernels


def _first(places: Tensor, sizes: Sequence[int], total: int) -> Tensor:
    """Return the numbers of the first place of the leading dimensions, if they are the same, but for that, at each."""
    if places.shape[: len(sizes)] != tuple(sizes):
        raise NotByIndexError("an operation changes the leading dimensions")
    whole = places.reshape(math.prod(sizes), -1)
    first = whole[0]
    if len(whole) > 1:
        at = torch.arange(len(whole), device=whole.device)[:, None] * total
        if not torch.equal(whole, torch.where(first > 0, first + at, 0)):
            raise NotByIndexError("an operation does otherwise at another place of the leading dimensions")
    return first


def _put(into: Any, source: Sparse, target: Tensor, shape: Sequence[int]) -> Sparse:
    """Return a tensor of a shape to which each entry of a source is added at its target; ``into`` was there before."""
    prefix, sizes = source.prefix, source.shape[: source.prefix]
    n = math.prod(shape[prefix:])
    first = _first(target.reshape(source.shape) + 1, sizes, n) - 1 if prefix else target.reshape(-1)
    if tuple(shape[:prefix]) != tuple(sizes):
        raise NotByIndexError("an operation changes the leading dimensions")
    found = Sparse(source.rows.put(first, n), shape, prefix)
    if isinstance(into, Sparse):
        return _added(into, found)
    if isinstance(into, Tensor) and into.count_nonzero():
        raise NotByIndexError("numbers are added to others")
    return found


def _numbers(shape: Sequence[int], device: Any) -> Tensor:
    return torch.arange(math.prod(shape), device=device).reshape(tuple(shape))


def _added(a: Sparse, b: Sparse) -> Sparse:
    both = _moved(aten.stack.default, [a, b], a.prefix)  # next to one another
    n = a.core
    rows = both.rows.put(torch.arange(n, device=a.device).repeat(2), n)
    return Sparse(rows, a.shape, a.prefix)


def _expanded(a: Sparse, shape: Sequence[int]) -> Sparse:
    return a if a.shape == tuple(shape) else _moved(aten.expand.default, a, list(shape))


def _sum(func: Any, a: Any, b: Any, alpha: float = 1) -> Any:
    sign = -alpha if func.overloadpacket is aten.sub else alpha
    if not (isinstance(a, Sparse) and isinstance(b, Sparse)):
        raise NotByIndexError("a number is added to those of the input")
    shape = torch.broadcast_shapes(a.shape, b.shape)
    a, b = _expanded(a, shape), _expanded(b, shape)
    return _added(a, b if sign == 1 else _scaled(b, torch.tensor(float(sign))))


def _scaled(a: Sparse, factor: Tensor) -> Sparse:
    shape = torch.broadcast_shapes(a.shape, factor.shape)
    a, k = _expanded(a, shape), a.prefix
    whole = factor.expand(shape).reshape(math.prod(shape[:k]), -1)
    core = whole[0]
    if len(whole) > 1 and not torch.equal(whole, core.expand_as(whole)):
        raise NotByIndexError("factors differ along the leading dimensions")
    return Sparse(a.rows.scaled(core.to(a.dtype)), shape, k)


def _product(func: Any, a: Any, b: Any, **options: Any) -> Any:
    if isinstance(b, Sparse):
        if isinstance(a, Sparse) or func.overloadpacket is aten.div:
            raise NotByIndexError("a product of two values of the input")
        a, b = b, a
    if options:
        raise NotByIndexError("division that rounds")
    factor = b if isinstance(b, Tensor) else torch.tensor(b, dtype=a.dtype, device=a.device)
    return _scaled(a, 1 / factor if func.overloadpacket is aten.div else factor)


def _reduced(func: Any, a: Sparse, dim: Any = None, keepdim: bool = False, **_: Any) -> Sparse:
    places = _numbers(a.shape, a.device)
    dims = [d % a.ndim for d in (dim if dim else range(a.ndim))]
    if any(d < a.prefix for d in dims):
        raise NotByIndexError("a sum over leading dimensions")
    kept = [1 if d in dims else n for d, n in enumerate(a.shape)]
    target = _numbers(kept, a.device).expand(a.shape)
    found = _put(None, a, target, kept)
    if func.overloadpacket is aten.mean:
        found = _scaled(found, torch.tensor(math.prod(kept) / places.numel(), dtype=torch.float64))
    return found if keepdim else _moved(aten.view.default, found, [n for d, n in enumerate(a.shape) if d not in dims])


def _index_put(func: Any, into: Any, indices: Any, source: Any, accumulate: bool = False, *_: Any) -> Any:
    if not accumulate:
        return _moved(func, into, indices, source)
    target = aten.index(_numbers(into.shape, into.device), indices)
    return _put(into, _expanded(source, target.shape), target, into.shape)


def _scatter_add(func: Any, into: Any, dim: int, index: Tensor, source: Sparse) -> Sparse:
    for d, n in enumerate(index.shape):
        source = _moved(aten.slice.Tensor, source, d, 0, n)
    return _put(into, source, torch.gather(_numbers(into.shape, into.device), dim, index), into.shape)


def _index_add(func: Any, into: Any, dim: int, index: Tensor, source: Sparse, alpha: float = 1) -> Sparse:
    target = torch.index_select(_numbers(into.shape, into.device), dim, index)
    return _put(into, source if alpha == 1 else _scaled(source, torch.tensor(float(alpha))), target, into.shape)


def _separable(func: Any, x: Sparse, *args: Any) -> Sparse:
    """Return an interpolation, a mean pool or the transpose of one: a gather, factors and a sum for each dimension."""
    shape = x.shape
    parts = separable.factors(func.overloadpacket, torch.empty(shape, dtype=x.dtype, device=x.device), args)
    if parts is None:
        raise NotByIndexError(f"one dimension of {func} is large")
    for dim, matrix in parts:
        row, column = matrix.nonzero(as_tuple=True)
        factor = matrix[row, column].reshape(-1, *[1] * (x.ndim - 1 - dim))
        terms = x.index_select(dim, column) * factor
        zeros = torch.zeros([*x.shape[:dim], len(matrix), *x.shape[dim + 1 :]], dtype=x.dtype, device=x.device)
        x = torch.index_add(zeros, dim, row, terms)  # type: ignore[assignment]
    return x


def _grid_sampler_3d(x: Any, grid: Tensor, mode: int, padding: int, corners: bool) -> Any:
    """Return a volume at the places of a grid, by index: the eight entries around each, or the nearest."""
    sizes = x.shape[4:1:-1]
    places = []
    for u, n in zip(grid.unbind(-1), sizes, strict=True):
        at = (u + 1) / 2 * (n - 1) if corners else ((u + 1) * n - 1) / 2
        if padding == 1:
            at = at.clamp(0, n - 1)
        elif padding == 2:
            low, span = (0.0, 2.0 * (n - 1)) if corners else (-0.5, 2.0 * n)
            at = (at - low).abs() % max(span, 1.0)
            at = (torch.minimum(at, span - at) + low).clamp(0, n - 1)
        places.append(at)
    first = torch.arange(x.shape[0], device=grid.device).reshape(-1, 1, 1, 1, 1)
    second = torch.arange(x.shape[1], device=grid.device).reshape(1, -1, 1, 1, 1)
    total = None
    for corner in itertools.product((0, 1), repeat=3) if mode == 0 else [(0, 0, 0)]:
        index, weight, inside = [], 1.0, True
        for at, n, up in zip(places, sizes, corner, strict=True):
            near = at.floor() + up if mode == 0 else at.round()
            weight = weight * (1 - (at - near).abs()) if mode == 0 else weight
            inside = inside & (near >= 0) & (near < n)
            index.append(near.clamp(0, n - 1).long().unsqueeze(1))
        found = x[first, second, index[2], index[1], index[0]]
        term = found * torch.as_tensor(weight * inside, dtype=grid.dtype).unsqueeze(1)
        total = term if total is None else total + term
    return total


# -- transposes: of a map that is given by what it does to the identity ------------------------------------------------


def _transposed(forward: Callable[..., tuple[Any, Callable[[Any], Any]]]) -> Callable[..., Any]:
    """Return the rule of a transpose; ``forward(op, source, *args)`` returns a shape that is taken, and the map."""

    def rule(func: Any, source: Sparse, *args: Any) -> Any:
        shape, run = forward(func, source, *args)
        k = source.prefix
        like = torch.empty(tuple(shape), dtype=source.dtype, device=source.device)
        one = Sparse.identity(like, k, source.rows.most)
        local = run(one)
        if local.shape != source.shape:
            raise NotByIndexError("the transpose of a map to another shape")
        return Sparse(local.rows.transposed(one.core).applied(source.rows), shape, k)

    return rule


def _sampled(func: Any, _: Sparse, x: Any, grid: Tensor, *settings: Any) -> Any:
    forward = getattr(aten, func.overloadpacket.__name__.removesuffix("_backward")).default
    return x.shape, lambda z: forward(z, grid, *settings[:3])


def _folded(func: Any, source: Sparse, output_size: Any, kernel: Any, *settings: Any) -> Any:
    channels = source.shape[-2] // math.prod(kernel)
    return (*source.shape[:-2], channels, *output_size), lambda z: aten.im2col(z, kernel, *settings)


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
SAMPLED = (aten.grid_sampler_2d_backward, aten.grid_sampler_3d_backward)
RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(MOVES, _moved),
    **dict.fromkeys((aten.add, aten.sub), _sum),
    **dict.fromkeys((aten.mul, aten.div), _product),
    **dict.fromkeys((aten.sum, aten.mean), _reduced),
    aten.neg: lambda func, a: _scaled(a, torch.tensor(-1.0)),
    **dict.fromkeys((aten.to, aten._to_copy), _converted),
    aten.index_put: _index_put,
    aten.scatter_add: _scatter_add,
    aten.index_add: _index_add,
    **dict.fromkeys(SAMPLED, lambda *args: (_transposed(_sampled)(*args), None)),
    **dict.fromkeys(separable.SEPARABLE, _separable),
    aten.col2im: _transposed(_folded),
    aten.grid_sampler_3d: lambda func, *args: _grid_sampler_3d(*args),
}
