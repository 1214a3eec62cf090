"""Slices, paddings and sums of them as one pass: what is left of code that writes slices into buffers.

The transpose of taking a slice is to embed it in zeros, the transpose of writing one is to cut it out. Chains of these
are rewritten as *sums of pieces*: rectangles of a source, each with a factor, placed in a result that is zero
elsewhere. Slices of a sum are sums of slices, pieces outside are dropped, and what comes out is written once, piece by
piece, as a person would write it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import clean
from adjointlab.transpose.graph.ir import Graph

aten = torch.ops.aten

_MOST = 32  # pieces of one sum; more are not worth following


@dataclass(frozen=True)
class Piece:
    """``factor · source[window]``, placed in a result.

    ``window`` has an entry for each dimension of the source: ``(start, length)``, or an index that drops it. ``frame``
    has one for each dimension of the result: ``(start, length, inserted)``, where inserted dimensions are not in the
    source, and the others are its kept ones in order.
    """

    source: fx.Node
    factor: complex
    window: tuple[Any, ...]
    frame: tuple[tuple[int, int, bool], ...]

    @property
    def volume(self) -> int:
        """Number of entries."""
        return math.prod(length for _, length, _ in self.frame)

    def _kept(self, dim: int) -> int:
        """Return the dimension of the source behind a dimension of the result that is not inserted."""
        position = sum(not inserted for _, _, inserted in self.frame[:dim])
        return [i for i, w in enumerate(self.window) if isinstance(w, tuple)][position]

    def restrict(self, dim: int, start: int, stop: int) -> Piece | None:
        """Return the part within ``start:stop`` of a dimension of the result, where it is."""
        place, length, inserted = self.frame[dim]
        first, last = max(place, start), min(place + length, stop)
        if first >= last:
            return None
        window = list(self.window)
        if not inserted:
            behind = self._kept(dim)
            window[behind] = (window[behind][0] + first - place, last - first)
        frame = (*self.frame[:dim], (first, last - first, inserted), *self.frame[dim + 1 :])
        return replace(self, window=tuple(window), frame=frame)

    def move(self, dim: int, by: int) -> Piece:
        """Return the piece at another place."""
        place, length, inserted = self.frame[dim]
        return replace(self, frame=(*self.frame[:dim], (place + by, length, inserted), *self.frame[dim + 1 :]))

    def select(self, dim: int, index: int) -> Piece | None:
        """Return the part at one index of a dimension, which is dropped."""
        part = self.restrict(dim, index, index + 1)
        if part is None:
            return None
        window = list(part.window)
        if not part.frame[dim][2]:
            behind = part._kept(dim)
            window[behind] = window[behind][0]
        return replace(part, window=tuple(window), frame=(*part.frame[:dim], *part.frame[dim + 1 :]))

    def insert(self, dim: int, index: int) -> Piece:
        """Return the piece at one index of a new dimension."""
        return replace(self, frame=(*self.frame[:dim], (index, 1, True), *self.frame[dim:]))


Sum = tuple[Piece, ...]


def fuse_slices(graph: Graph) -> Graph:
    """Return an equal graph in which sums of slices are written in one pass."""
    nodes = fx.Graph()
    nodes.output(nodes.graph_copy(graph.body, {}))
    sums: dict[fx.Node, Sum] = {}
    worth: set[fx.Node] = set()
    written: dict[fx.Node, fx.Node] = {}
    for node in list(nodes.nodes):
        if node.op == "output" or not isinstance(node.meta.get("val"), Tensor):
            if node.op in {"output", "call_function"}:
                _write_operands(nodes, node, sums, worth, written)
            continue
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        found = rule(node, sums) if rule else None
        if found is None or len(found) > _MOST:
            if node.op == "call_function":
                _write_operands(nodes, node, sums, worth, written)
            sums[node] = _whole(node)
            continue
        sums[node] = found
        if node.target not in _READS or any(operand in worth for operand in node.all_input_nodes):
            worth.add(node)
        if len(node.users) > 1 and sum(p.volume for p in found) > 2 * node.meta["val"].numel():
            _write(nodes, node, sums, written)
            sums[node] = _whole(written[node])
            worth.discard(node)
    clean(nodes)
    return Graph(nodes, graph.state, graph.baked)


def _whole(node: fx.Node) -> Sum:
    shape = node.meta["val"].shape
    return (Piece(node, 1, tuple((0, n) for n in shape), tuple((0, n, False) for n in shape)),)


def _write_operands(
    nodes: fx.Graph, node: fx.Node, sums: dict[fx.Node, Sum], worth: set[fx.Node], written: dict[fx.Node, fx.Node]
) -> None:
    for operand in node.all_input_nodes:
        if operand in worth:
            node.replace_input_with(operand, written.get(operand) or _write(nodes, operand, sums, written))


def _write(nodes: fx.Graph, node: fx.Node, sums: dict[fx.Node, Sum], written: dict[fx.Node, fx.Node]) -> fx.Node:
    value = node.meta["val"]
    pieces = sorted(sums[node], key=lambda piece: -piece.volume)
    sources = list(dict.fromkeys(piece.source for piece in pieces))
    layout = tuple(
        (sources.index(p.source), p.factor, *_slices(p), _exclusive(i, pieces)) for i, p in enumerate(pieces)
    )
    covered = sum(p.volume for i, p in enumerate(pieces) if _exclusive(i, pieces)) == value.numel()
    with nodes.inserting_after(node):
        if pieces:
            call = nodes.call_function(accumulate, (sources, layout, tuple(value.shape), covered))
        else:
            options = {"dtype": value.dtype, "device": value.device}
            call = nodes.call_function(aten.zeros.default, (list(value.shape),), options)
    call.meta = dict(node.meta)
    written[node] = call
    return call


def _slices(piece: Piece) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return how to read the source, as (start, stop) or an index for each dimension, and where to write."""
    read = tuple((w[0], w[0] + w[1]) if isinstance(w, tuple) else w for w in piece.window)
    write = tuple(place if inserted else (place, place + length) for place, length, inserted in piece.frame)
    return read, write


def _exclusive(index: int, pieces: list[Piece]) -> bool:
    """Return whether a piece meets none of those before it."""
    return not any(
        all(a < b + m and b < a + n for (a, n, _), (b, m, _) in zip(pieces[index].frame, other.frame, strict=True))
        for other in pieces[:index]
    )


def accumulate(sources: list[Tensor], layout: tuple[Any, ...], shape: tuple[int, ...], covered: bool) -> Tensor:
    """Return the sum of pieces, each written once: copied where nothing was before it, added elsewhere."""
    if torch.compiler.is_compiling():
        return _as_sum(sources, layout, shape)
    result = sources[0].new_empty(shape) if covered else sources[0].new_zeros(shape)
    for number, factor, read, write, exclusive in layout:
        part = sources[number][tuple([slice(*r) if isinstance(r, tuple) else r for r in read])]
        target = result[tuple([slice(*w) if isinstance(w, tuple) else w for w in write])]
        if not exclusive:
            target.add_(part, alpha=factor)
        elif factor == 1:
            target.copy_(part)
        else:
            torch.mul(part, factor, out=target)
    return result


def circular(node: fx.Node, *, inverse: bool) -> tuple[int, ...] | None:
    """Return the shifts a for which a node pads one image circularly, ``padded[i] = x[(i − a) mod n]``, or None.

    With ``inverse``, the node is the transpose of that.
    """
    if node.target is not accumulate:
        return None
    arguments: Any = node.args
    sources, layout, *_ = arguments
    if len(sources) > 1:
        return None
    shapes: Any = sources[0].meta["val"].shape, node.meta["val"].shape
    image, padded = reversed(shapes) if inverse else shapes
    pieces = {(w, r) if inverse else (r, w) for _, _, r, w, _ in layout}
    if any(factor != 1 for _, factor, *_ in layout):
        return None
    if len(image) != len(padded) or any(isinstance(entry, int) for piece in pieces for part in piece for entry in part):
        return None
    spans = [{(r[dim], w[dim]) for r, w in pieces} for dim in range(len(image))]
    if not math.prod(map(len, spans)) == len(pieces) == len(layout):
        return None  # pieces that are not all combinations of spans, one of each dimension
    shifts = []
    for found, n, length in zip(spans, image, padded, strict=True):
        ordered = sorted(w for _, w in found)
        starts, stops = [a for a, _ in ordered], [b for _, b in ordered]
        offsets = {(w[0] - r[0]) % n for r, w in found}
        if starts != [0, *stops[:-1]] or stops[-1] != length or len(offsets) != 1:
            return None
        shifts.append(offsets.pop())
    return tuple(shifts)


def _as_sum(sources: list[Tensor], layout: tuple[Any, ...], shape: tuple[int, ...]) -> Tensor:
    """Return the sum of pieces as one expression: compilers make one loop of it, and many of writes in place."""
    total: Tensor | None = None
    for number, factor, read, write, _ in sorted(layout, key=lambda piece: piece[1] != 1):  # a product less
        part = sources[number][tuple([slice(*r) if isinstance(r, tuple) else r for r in read])]
        part = part[tuple([slice(None) if isinstance(w, tuple) else None for w in write])]
        places = [w if isinstance(w, tuple) else (w, w + 1) for w in write]
        pads = [side for (a, b), n in zip(places, shape, strict=True) for side in (n - b, a)]
        term = torch.constant_pad_nd(part, pads[::-1])
        if total is None:
            total = term if factor == 1 else factor * term
        else:
            total = total - term if factor == -1 else total + (term if factor == 1 else factor * term)
    assert total is not None
    return total


# -- rules: the sum of a node from those of its operands, or None where it is not one ---------------------------------


def _map(pieces: Sum, change: Callable[[Piece], Piece | None]) -> Sum:
    return tuple(p for p in map(change, pieces) if p is not None)


def _bounds(start: Any, stop: Any, step: Any, size: int) -> tuple[int, int] | None:
    if step != 1:
        return None
    first, last, _ = slice(start, stop).indices(size)
    return (first, last) if last > first else None


def _arguments(node: fx.Node, *defaults: Any) -> list[Any]:
    given: list[Any] = list(node.args)
    return [*given, *defaults[len(given) :]]


def _dimension(dim: int, rank: int) -> int:
    return dim % rank


def _slice(node: fx.Node, sums: dict[fx.Node, Sum]) -> Sum | None:
    x, dim, start, stop, step = _arguments(node, None, 0, None, None, 1)
    shape = x.meta["val"].shape
    dim = _dimension(dim, len(shape))
    bounds = _bounds(start, stop, step, shape[dim])
    if bounds is None:
        return None
    return tuple(p.move(dim, -bounds[0]) for p in _within(sums[x], dim, *bounds))


def _select(node: fx.Node, sums: dict[fx.Node, Sum]) -> Sum | None:
    x, dim, index = _arguments(node)
    shape = x.meta["val"].shape
    dim = _dimension(dim, len(shape))
    return _map(sums[x], lambda p: p.select(dim, index % shape[dim]))


def _slice_backward(node: fx.Node, sums: dict[fx.Node, Sum]) -> Sum | None:
    v, shape, dim, start, stop, step = _arguments(node)
    dim = _dimension(dim, len(shape))
    bounds = _bounds(start, stop, step, shape[dim])
    return None if bounds is None else tuple(p.move(dim, bounds[0]) for p in sums[v])


def _select_backward(node: fx.Node, sums: dict[fx.Node, Sum]) -> Sum | None:
    v, shape, dim, index = _arguments(node)
    dim = _dimension(dim, len(shape))
    return tuple(p.insert(dim, index % shape[dim]) for p in sums[v])


def _within(pieces: Sum, dim: int, start: int, stop: int) -> Sum:
    """Return what is left of pieces inside ``start:stop``."""
    return _map(pieces, lambda p: p.restrict(dim, start, stop))


def _cut(pieces: Sum, dim: int, start: int, stop: int) -> Sum:
    """Return what is left of pieces outside ``start:stop``."""
    far = 1 << 62
    return tuple(
        part
        for piece, (a, b) in itertools.product(pieces, ((0, start), (stop, far)))
        if (part := piece.restrict(dim, a, b)) is not None
    )


def _slice_scatter(node: fx.Node, sums: dict[fx.Node, Sum]) -> Sum | None:
    base, source, dim, start, stop, step = _arguments(node, None, None, 0, None, None, 1)
    shape = base.meta["val"].shape
    dim = _dimension(dim, len(shape))
    bounds = _bounds(start, stop, step, shape[dim])
    if bounds is None:
        return None
    return (*_cut(sums[base], dim, *bounds), *(p.move(dim, bounds[0]) for p in sums[source]))


def _select_scatter(node: fx.Node, sums: dict[fx.Node, Sum]) -> Sum | None:
    base, source, dim, index = _arguments(node)
    shape = base.meta["val"].shape
    dim = _dimension(dim, len(shape))
    index = index % shape[dim]
    return (*_cut(sums[base], dim, index, index + 1), *(p.insert(dim, index) for p in sums[source]))


def _pad(node: fx.Node, sums: dict[fx.Node, Sum]) -> Sum | None:
    x, pads, *value = _arguments(node)
    if value and value[0] != 0:
        return None
    pieces = sums[x]
    rank = x.meta["val"].ndim
    for i in range(len(pads) // 2):
        dim, before = rank - 1 - i, pads[2 * i]
        size = node.meta["val"].shape[dim]
        moved = tuple(p.move(dim, before) for p in pieces)
        pieces = _within(moved, dim, 0, size)
    return pieces


def _cat(node: fx.Node, sums: dict[fx.Node, Sum]) -> Sum | None:
    parts, *rest = _arguments(node)
    dim = _dimension(rest[0] if rest else 0, node.meta["val"].ndim)
    if any(p.meta["val"].ndim != node.meta["val"].ndim or p.meta["val"].dtype != node.meta["val"].dtype for p in parts):
        return None
    pieces: list[Piece] = []
    offset = 0
    for part in parts:
        pieces.extend(p.move(dim, offset) for p in sums[part])
        offset += part.meta["val"].shape[dim]
    return tuple(pieces)


def _roll(node: fx.Node, sums: dict[fx.Node, Sum]) -> Sum | None:
    x, shifts, *rest = _arguments(node)
    if not rest or not rest[0]:
        return None
    pieces = sums[x]
    for shift, axis in zip(shifts, rest[0], strict=True):
        dim = _dimension(axis, x.meta["val"].ndim)
        n = x.meta["val"].shape[dim]
        by = shift % n
        low = tuple(p.move(dim, by) for p in _within(pieces, dim, 0, n - by))
        high = tuple(p.move(dim, by - n) for p in _within(pieces, dim, n - by, n))
        pieces = (*low, *high)
    return pieces


def _alike(node: fx.Node, *operands: Any) -> bool:
    value = node.meta["val"]
    return all(
        isinstance(x, fx.Node) and x.meta["val"].shape == value.shape and x.meta["val"].dtype == value.dtype
        for x in operands
    )


def _add(node: fx.Node, sums: dict[fx.Node, Sum]) -> Sum | None:
    a, b, *_ = _arguments(node)
    if node.kwargs or not _alike(node, a, b):
        return None
    factor = -1 if node.target is aten.sub.Tensor else 1
    return (*sums[a], *(replace(p, factor=factor * p.factor) for p in sums[b]))


def _neg(node: fx.Node, sums: dict[fx.Node, Sum]) -> Sum | None:
    return tuple(replace(p, factor=-p.factor) for p in sums[_arguments(node)[0]])


def _unsqueeze(node: fx.Node, sums: dict[fx.Node, Sum]) -> Sum | None:
    x, dim = _arguments(node)
    dim = _dimension(dim, node.meta["val"].ndim)
    return tuple(p.insert(dim, 0) for p in sums[x])


def _squeeze(node: fx.Node, sums: dict[fx.Node, Sum]) -> Sum | None:
    x, dim = _arguments(node)
    shape = x.meta["val"].shape
    dim = _dimension(dim, len(shape))
    return _map(sums[x], lambda p: p.select(dim, 0)) if shape[dim] == 1 else sums[x]


def _zeros(node: fx.Node, sums: dict[fx.Node, Sum]) -> Sum | None:
    return ()


_READS = {
    aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim, aten.neg.default, aten.add.Tensor,
    aten.sub.Tensor,
}  # fmt: skip
_RULES: dict[Any, Callable[[fx.Node, dict[fx.Node, Sum]], Sum | None]] = {
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.slice_backward.default: _slice_backward,
    aten.select_backward.default: _select_backward,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.constant_pad_nd.default: _pad,
    aten.cat.default: _cat,
    aten.roll.default: _roll,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.neg.default: _neg,
    aten.zeros.default: _zeros,
    aten.zeros_like.default: _zeros,
    aten.new_zeros.default: _zeros,
    aten.new_empty.default: _zeros,
    aten.empty.memory_format: _zeros,
}
