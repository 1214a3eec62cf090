"""Slices, paddings and sums of them as one pass: what is left of code that writes slices into buffers.

The transpose of taking a slice is to embed it in zeros, the transpose of writing one is to cut it out. Chains of these
are rewritten as *sums of pieces*: rectangles of a source, each with a factor, placed in a result that is zero
elsewhere. Slices of a sum are sums of slices, pieces outside are dropped, and what comes out is written once, piece by
piece, as a person would write it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import clean, copied, zeros
from adjointlab.transpose.graph.ir import Graph

aten = torch.ops.aten

_MOST = 32  # pieces of one sum; more are not worth following


class Span(NamedTuple):
    """A range of one dimension: where it is in the source and in the result, None where that has no such dimension."""

    read: int | None
    write: int | None
    length: int


@dataclass(frozen=True)
class Piece:
    """``factor`` times a rectangle of a source, placed in a result; dimensions of both are in the order of spans."""

    source: fx.Node
    factor: complex
    spans: tuple[Span, ...]

    @property
    def volume(self) -> int:
        """Number of entries."""
        return math.prod(span.length for span in self.spans)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Where it is in the result."""
        return [(span.write, span.write + span.length) for span in self.spans if span.write is not None]

    @property
    def places(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """How to read the source, and how to write: (start, stop), or an index where the other has no dimension."""
        read = [_place(span.read, span.length, span.write) for span in self.spans if span.read is not None]
        write = [_place(span.write, span.length, span.read) for span in self.spans if span.write is not None]
        return tuple(read), tuple(write)

    def _span(self, dim: int) -> int:
        """Return the position of the span of a dimension of the result."""
        return [*(i for i, span in enumerate(self.spans) if span.write is not None), len(self.spans)][dim]

    def _with(self, dim: int, **changes: Any) -> Piece:
        i = self._span(dim)
        return replace(self, spans=(*self.spans[:i], self.spans[i]._replace(**changes), *self.spans[i + 1 :]))

    def within(self, dim: int, start: int, stop: int) -> Piece | None:
        """Return the part within ``start:stop`` of a dimension of the result, where it is."""
        read, _, _ = self.spans[self._span(dim)]
        place, end = self.ranges[dim]
        first, last = max(place, start), min(end, stop)
        if first >= last:
            return None
        return self._with(dim, read=None if read is None else read + first - place, write=first, length=last - first)

    def move(self, dim: int, by: int) -> Piece:
        """Return the piece at another place."""
        return self._with(dim, write=self.ranges[dim][0] + by)

    def drop(self, dim: int) -> Piece:
        """Return the piece in a result without a dimension, where it is at one index."""
        return self._with(dim, write=None)

    def insert(self, dim: int, index: int) -> Piece:
        """Return the piece at one index of a new dimension."""
        i = self._span(dim)
        return replace(self, spans=(*self.spans[:i], Span(None, index, 1), *self.spans[i:]))


def _place(start: int, length: int, other: int | None) -> Any:
    return start if other is None else (start, start + length)


Sum = tuple[Piece, ...]


def fuse_slices(graph: Graph) -> Graph:
    """Return an equal graph in which sums of slices are written in one pass."""
    fused = copied(graph)
    sums: dict[fx.Node, Sum] = {}
    worth: set[fx.Node] = set()  # sums that are more than views of one source: written for whatever reads them whole
    written = functools.cache(lambda node: _write(fused.body, node, sums[node]))
    for node in list(fused.body.nodes):
        rule = _RULES.get(node.target)
        is_plain = not node.kwargs or rule is _zeros
        found = rule(node, sums, *node.args) if rule is not None and is_plain else None
        if found is None or len(found) > _MOST:
            for operand in node.all_input_nodes:
                if operand in worth:
                    node.replace_input_with(operand, written(operand))
            if isinstance(node.meta.get("val"), Tensor):
                sums[node] = _whole(node)
            continue
        sums[node] = found
        if len(node.users) > 1 and sum(p.volume for p in found) > 2 * node.meta["val"].numel():
            sums[node] = _whole(written(node))
        elif node.target not in _READS or any(operand in worth for operand in node.all_input_nodes):
            worth.add(node)
    clean(fused.body)
    return fused


def _whole(node: fx.Node) -> Sum:
    return (Piece(node, 1, tuple(Span(0, 0, n) for n in node.meta["val"].shape)),)


def _write(nodes: fx.Graph, node: fx.Node, found: Sum) -> fx.Node:
    """Add the call that writes a sum, its largest pieces first: those that meet none before them are copied."""
    value = node.meta["val"]
    pieces = sorted(found, key=lambda piece: -piece.volume)
    sources = list(dict.fromkeys(piece.source for piece in pieces))
    alone = [not any(_meet(piece, other) for other in pieces[:i]) for i, piece in enumerate(pieces)]
    layout = tuple(
        (sources.index(p.source), p.factor, *p.places, first) for p, first in zip(pieces, alone, strict=True)
    )
    covered = sum(p.volume for p, first in zip(pieces, alone, strict=True) if first) == value.numel()
    with nodes.inserting_after(node):
        if pieces:
            call = nodes.call_function(accumulate, (sources, layout, tuple(value.shape), covered))
        else:
            call = zeros(nodes, value)
    call.meta = dict(node.meta)
    return call


def _meet(piece: Piece, other: Piece) -> bool:
    return all(a < d and c < b for (a, b), (c, d) in zip(piece.ranges, other.ranges, strict=True))


def _index(place: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([slice(*p) if isinstance(p, tuple) else p for p in place])


def accumulate(sources: list[Tensor], layout: tuple[Any, ...], shape: tuple[int, ...], covered: bool) -> Tensor:
    """Return the sum of pieces, each written once: copied where nothing was before it, added elsewhere."""
    if torch.compiler.is_compiling():
        return _as_sum(sources, layout, shape)
    result = sources[0].new_empty(shape) if covered else sources[0].new_zeros(shape)
    for number, factor, read, write, exclusive in layout:
        part, target = sources[number][_index(read)], result[_index(write)]
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
        part = sources[number][_index(read)][tuple([slice(None) if isinstance(w, tuple) else None for w in write])]
        places = [w if isinstance(w, tuple) else (w, w + 1) for w in write]
        pads = [side for (a, b), n in zip(places, shape, strict=True) for side in (n - b, a)]
        term = torch.constant_pad_nd(part, pads[::-1])
        if total is None:
            total = term if factor == 1 else factor * term
        else:
            total = total - term if factor == -1 else total + (term if factor == 1 else factor * term)
    assert total is not None
    return total


# -- rules: the sum of a node from those of its operands, or None where it is not one. They are given its arguments.

Sums = dict[fx.Node, Sum]


def _shape(node: fx.Node) -> list[int]:
    return list(node.meta["val"].shape)


def _within(pieces: Sum, dim: int, *ranges: tuple[int, int]) -> Sum:
    """Return the parts of pieces inside of ranges of a dimension."""
    parts = (piece.within(dim, *each) for piece, each in itertools.product(pieces, ranges))
    return tuple(part for part in parts if part is not None)


def _window(node: fx.Node, shape: list[int], dim: int = 0, start: Any = None, stop: Any = None, step: Any = 1) -> Any:
    """Return the dimension, start and stop that a node takes or writes; None where it has a step, or nothing."""
    n = shape[dim]
    if node.target in _AT_INDEX:
        start, stop = start % n, start % n + 1
    first, last, _ = slice(start, stop).indices(n)
    return (dim % len(shape), first, last) if step == 1 and first < last else None


def _taken(node: fx.Node, sums: Sums, x: fx.Node, *where: Any) -> Sum | None:
    window = _window(node, _shape(x), *where)
    if window is None:
        return None
    dim, start, stop = window
    moved = [p.move(dim, -start) for p in _within(sums[x], dim, (start, stop))]
    return tuple(p.drop(dim) if node.target in _AT_INDEX else p for p in moved)


def _put(node: fx.Node, sums: Sums, first: fx.Node, second: Any, *where: Any) -> Sum | None:
    """Write a source to zeros of a shape (the derivative of a slice), or over what a base has there (a scatter)."""
    window = _window(node, _shape(node), *where)
    if window is None:
        return None
    dim, start, stop = window
    source, base = (second, sums[first]) if isinstance(second, fx.Node) else (first, ())
    placed = [p.insert(dim, start) if node.target in _AT_INDEX else p.move(dim, start) for p in sums[source]]
    return (*_within(base, dim, (0, start), (stop, _shape(node)[dim])), *placed)


def _pad(node: fx.Node, sums: Sums, x: fx.Node, pads: list[int], value: complex = 0) -> Sum | None:
    if value != 0:
        return None
    pieces, shape = sums[x], _shape(node)
    for i, before in enumerate(pads[::2]):
        dim = len(shape) - 1 - i
        pieces = _within(tuple(p.move(dim, before) for p in pieces), dim, (0, shape[dim]))
    return pieces


def _cat(node: fx.Node, sums: Sums, parts: list[fx.Node], dim: int = 0) -> Sum | None:
    value = node.meta["val"]
    if any(p.meta["val"].ndim != value.ndim or p.meta["val"].dtype != value.dtype for p in parts):
        return None
    offsets = itertools.accumulate((_shape(part)[dim] for part in parts), initial=0)
    return tuple(
        p.move(dim % value.ndim, offset) for part, offset in zip(parts, offsets, strict=False) for p in sums[part]
    )


def _roll(node: fx.Node, sums: Sums, x: fx.Node, shifts: list[int], dims: Sequence[int] = ()) -> Sum | None:
    if not dims:
        return None
    pieces, shape = sums[x], _shape(x)
    for shift, axis in zip(shifts, dims, strict=True):
        dim, n = axis % len(shape), shape[axis]
        by = shift % n
        low, high = _within(pieces, dim, (0, n - by)), _within(pieces, dim, (n - by, n))
        pieces = (*[p.move(dim, by) for p in low], *[p.move(dim, by - n) for p in high])
    return pieces


def _add(node: fx.Node, sums: Sums, a: Any, b: Any) -> Sum | None:
    value = node.meta["val"]
    for x in (a, b):
        if not isinstance(x, fx.Node) or x.meta["val"].shape != value.shape or x.meta["val"].dtype != value.dtype:
            return None
    return (*sums[a], *(sums[b] if node.target is aten.add.Tensor else _neg(node, sums, b)))


def _neg(node: fx.Node, sums: Sums, x: fx.Node) -> Sum:
    return tuple(replace(p, factor=-p.factor) for p in sums[x])


def _unsqueeze(node: fx.Node, sums: Sums, x: fx.Node, dim: int) -> Sum:
    return tuple(p.insert(dim % node.meta["val"].ndim, 0) for p in sums[x])


def _squeeze(node: fx.Node, sums: Sums, x: fx.Node, dim: int) -> Sum:
    shape = _shape(x)
    return tuple(p.drop(dim % len(shape)) for p in sums[x]) if shape[dim] == 1 else sums[x]


def _zeros(node: fx.Node, sums: Sums, *_: Any) -> Sum:
    return ()


_AT_INDEX = {aten.select.int, aten.select_backward.default, aten.select_scatter.default}
_READS = {
    aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim, aten.neg.default, aten.add.Tensor,
    aten.sub.Tensor,
}  # fmt: skip
_PUTS = (
    aten.slice_backward.default, aten.select_backward.default, aten.slice_scatter.default, aten.select_scatter.default,
)  # fmt: skip
_ZEROS = (
    aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.new_empty.default,
    aten.empty.memory_format,
)  # fmt: skip
_RULES: dict[Any, Callable[..., Sum | None]] = {
    aten.slice.Tensor: _taken,
    aten.select.int: _taken,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    **dict.fromkeys(_PUTS, _put),
    aten.constant_pad_nd.default: _pad,
    aten.cat.default: _cat,
    aten.roll.default: _roll,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.neg.default: _neg,
    **dict.fromkeys(_ZEROS, _zeros),
}
