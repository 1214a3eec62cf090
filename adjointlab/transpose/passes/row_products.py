"""The rules of :mod:`~adjointlab.transpose.passes.row_rules` for products, sums, convolutions, samples and indices."""

from __future__ import annotations

from typing import Any

import torch

from adjointlab.space.selection import Rows
from adjointlab.transpose.graph.ops import arguments
from adjointlab.transpose.passes.row_rules import (
    Call,
    Numbers,
    Plan,
    Values,
    broadcast,
    chosen,
    replaced,
    rule,
    same,
    shape,
    want,
)

aten = torch.ops.aten


@rule(aten.mm, aten.bmm, aten.mv, aten.addmm, aten.baddbmm, aten.addmv)
def _product(node: Any, dim: int, rows: Rows) -> Plan:
    *added, a, b = node.args
    n = len(shape(a))  # the last two dimensions are those of matrices
    left = want(a, dim, rows) if dim < n - 1 else a
    right = want(b, dim, rows) if dim < n - 2 or dim == n - 1 else b
    return Call(node.target, (*[broadcast(t, shape(node), dim, rows) for t in added], left, right), node.kwargs)


@rule(aten.sum, aten.mean)
def _sum(node: Any, dim: int, rows: Rows) -> Plan | None:
    given = arguments(node)
    n = len(shape(node.args[0]))
    gone = {d % n for d in given.get("dim") or range(n)}
    if given.get("keepdim", False):
        return None if dim in gone else same(node, dim, rows)
    return same(node, dim, rows, at=[d for d in range(n) if d not in gone][dim])


@rule(aten.cumsum, aten._fft_c2c, aten._fft_r2c, aten._fft_c2r)
def _along_others(node: Any, dim: int, rows: Rows) -> Plan | None:
    along, n = node.args[1], len(shape(node))
    taken = {d % n for d in ([along] if isinstance(along, int) else along)}
    return None if dim in taken else same(node, dim, rows)


# Operations on the last dimensions of images, by how many these are.
_ON_IMAGES = {
    1: ("reflection_pad1d", "replication_pad1d", "upsample_linear1d", "upsample_nearest1d",
        "_upsample_nearest_exact1d"),
    2: ("reflection_pad2d", "replication_pad2d", "upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d",
        "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "avg_pool2d",
        "_adaptive_avg_pool2d", "triu", "tril"),
    3: ("reflection_pad3d", "replication_pad3d", "upsample_trilinear3d", "upsample_nearest3d",
        "_upsample_nearest_exact3d", "avg_pool3d", "_adaptive_avg_pool3d", "pixel_shuffle", "pixel_unshuffle"),
}  # fmt: skip


def _of_images(spatial: int) -> Any:
    return lambda node, dim, rows: same(node, dim, rows) if dim < len(shape(node)) - spatial else None


for _dims, _names in _ON_IMAGES.items():
    rule(*[getattr(aten, name) for name in _names])(_of_images(_dims))


@rule(aten.constant_pad_nd)
def _pad(node: Any, dim: int, rows: Rows) -> Plan | None:
    x, pad, *value = node.args
    at = 2 * (len(shape(node)) - 1 - dim)
    if at >= len(pad):
        return same(node, dim, rows)
    inside = [row - pad[at] for row in rows]
    if not all(0 <= row < shape(x)[dim] for row in inside):
        return None
    return Call(node.target, (want(x, dim, inside), [*pad[:at], 0, 0, *pad[at + 2 :]], *value))


@rule(aten.flip)
def _flip(node: Any, dim: int, rows: Rows) -> Plan:
    x, n = node.args[0], len(shape(node))
    dims = [d % n for d in node.args[1]]
    if dim not in dims:
        return same(node, dim, rows)
    found = want(x, dim, [shape(x)[dim] - 1 - row for row in rows])
    rest = [d for d in dims if d != dim]
    return Call(node.target, (found, rest)) if rest else found


@rule(aten.roll)
def _roll(node: Any, dim: int, rows: Rows) -> Plan | None:
    x, shifts, dims = [*node.args, []][:3]
    n, size = len(shape(node)), shape(node)[dim]
    if not dims and n > 1:
        return None
    moved = [(shift, d % n) for shift, d in zip(shifts, dims or [0], strict=True)]
    by = sum(shift for shift, d in moved if d == dim)
    rest = [pair for pair in moved if pair[1] != dim]
    found = want(x, dim, [(row - by) % size for row in rows])
    return Call(node.target, (found, *map(list, zip(*rest, strict=True)))) if rest else found


@rule(aten.convolution)
def _convolution(node: Any, dim: int, rows: Rows) -> Plan | None:
    x, weight, bias, *settings, groups = node.args
    if dim > 1:
        return None
    if dim == 0:
        return same(node, dim, rows)
    transposed, channels = settings[3], shape(node)[1]
    if groups == 1:
        out = want(weight, 1 if transposed else 0, rows)
        return Call(node.target, (x, out, bias and want(bias, 0, rows), *settings, 1))
    each, read = channels // groups, shape(x)[1] // groups  # channels of a group: of the result, and of x
    used = sorted({row // each for row in rows})
    inputs = [group * read + i for group in used for i in range(read)]
    outputs = [group * each + i for group in used for i in range(each)]
    kernels = want(weight, 0, inputs if transposed else outputs)
    found = Call(
        node.target, (want(x, 1, inputs), kernels, bias and want(bias, 0, outputs), *settings, len(used))
    )  # fmt: skip
    return chosen(found, dim, [outputs.index(row) for row in rows], len(outputs))  # type: ignore[no-any-return]


@rule(aten.grid_sampler_2d, aten.grid_sampler_3d)
def _grid_sampler(node: Any, dim: int, rows: Rows) -> Plan:
    x, grid, *settings = node.args
    if dim == 1:
        return same(node, dim, rows)
    image = want(x, 0, rows) if dim == 0 else x
    return Call(node.target, (image, want(grid, max(dim - 1, 0), rows), *settings))


@rule(aten.affine_grid_generator)
def _affine_grid(node: Any, dim: int, rows: Rows) -> Plan | None:
    theta, size, *corners = node.args
    return Call(node.target, (want(theta, 0, rows), replaced(size, 0, len(rows)), *corners)) if dim == 0 else None


@rule(aten.im2col)
def _im2col(node: Any, dim: int, rows: Rows) -> Plan | None:
    return same(node, dim, rows) if dim == 0 and len(shape(node)) == 3 else None


@rule(aten.col2im)
def _col2im(node: Any, dim: int, rows: Rows) -> Plan | None:
    x, n = node.args[0], len(shape(node))
    if dim == n - 3:  # channels, each from a patch of entries
        each = shape(x)[-2] // shape(node)[-3]
        return same(node, dim, tuple(row * each + i for row in rows for i in range(each)))
    return same(node, dim, rows) if dim < n - 3 else None


# ------------------------------------------------------------------------------------------ indices


@rule(aten.index)
def _index(node: Any, dim: int, rows: Rows) -> Plan | None:
    x, indices = node.args
    first, last, common = _indexed(indices)
    if common is None:
        return None
    if dim < first:
        return Call(node.target, (want(x, dim, rows), indices))
    if dim >= first + len(common):
        return Call(node.target, (want(x, dim - len(common) + last - first, rows), indices))
    taken = [None if i is None else broadcast(i, common, dim - first, rows) for i in indices]
    return Call(node.target, (x, taken))


def _indexed(indices: Any) -> tuple[int, int, tuple[int, ...] | None]:
    """Return the first dimension with an index, the one after the last, and the shape of the indices.

    That is None where there are dimensions without an index in between.
    """
    given = [d for d, index in enumerate(indices) if index is not None]
    first, last = given[0], given[-1] + 1
    is_whole = len(given) == last - first
    return first, last, tuple(torch.broadcast_shapes(*[shape(indices[d]) for d in given])) if is_whole else None


@rule(aten.index_select)
def _index_select(node: Any, dim: int, rows: Rows) -> Plan:
    x, along, index = node.args
    if along % len(shape(node)) == dim:
        return Call(node.target, (x, along, want(index, 0, rows)))
    return same(node, dim, rows)


@rule(aten.gather)
def _gather(node: Any, dim: int, rows: Rows) -> Plan:
    x, along, index, *rest = node.args
    source = x if along % len(shape(node)) == dim else want(x, dim, rows)
    return Call(node.target, (source, along, want(index, dim, rows), *rest), node.kwargs)


@rule(aten.scatter_add)
def _scatter_add(node: Any, dim: int, rows: Rows) -> Plan | None:
    base, along, index, source = node.args
    if along % len(shape(node)) == dim or shape(index)[dim] != shape(base)[dim]:
        return None
    return Call(node.target, (want(base, dim, rows), along, want(index, dim, rows), want(source, dim, rows)))


@rule(aten.index_put)
def _index_put(node: Any, dim: int, rows: Rows) -> Plan | None:
    base, indices, values, *rest = node.args
    first, last, common = _indexed(indices)
    if common is None or first <= dim < last:
        return None
    size = (*shape(base)[:first], *common, *shape(base)[last:])  # of values, once broadcast
    at = dim if dim < first else dim - (last - first) + len(common)
    return Call(node.target, (want(base, dim, rows), indices, broadcast(values, size, at, rows), *rest))


@rule(aten.index_add)
def _index_add(node: Any, dim: int, rows: Rows) -> Plan | None:
    base, along, index, source = node.args
    if along % len(shape(node)) == dim:
        return None
    return Call(node.target, (want(base, dim, rows), along, index, want(source, dim, rows)), node.kwargs)


def added_by_index(node: Any, dim: int, rows: Rows, values: Values) -> Plan | None:
    """Return the plan of a sum by an index of the state, as that of a sparse matrix is: terms of other rows are left.

    It holds for the index as it is now.
    """
    base, along, index, source = node.args
    found = values(index)
    if along % len(shape(node)) != dim or found is None:
        return _index_add(node, dim, rows)
    read = found[1] if found[0].is_private else found[1].clone()
    unique = sorted(set(rows))
    place = torch.full((shape(node)[dim],), -1)
    place[unique] = torch.arange(len(unique))
    to = place[read.cpu()]
    terms = (to >= 0).nonzero()[:, 0]
    result = want(base, dim, unique)
    if len(terms):
        at = Numbers(tuple(to[terms].tolist()), found[0], read)
        result = Call(node.target, (result, along, at, want(source, dim, terms.tolist())), node.kwargs)
    return chosen(result, dim, [unique.index(row) for row in rows], len(unique))  # type: ignore[no-any-return]
