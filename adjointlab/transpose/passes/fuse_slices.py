"""Slices, paddings and sums of them as one pass: what is left of code that writes slices into buffers.

The transpose of taking a slice is to embed it in zeros, the transpose of writing one is to cut it out. Chains of these
are rewritten as *sums of pieces*: rectangles of a source, each with a factor, placed in a result that is zero
elsewhere. Slices of a sum are sums of slices, pieces outside are dropped, and what comes out is written once, piece by
piece, as a person would write it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.compat import plain
from adjointlab.transpose.graph.edit import clean, copied, zeros
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import VIEWS, packet_of
from adjointlab.transpose.kernels.select import SumChooser
from adjointlab.transpose.passes.quicker_sums import Rule, worth_writing
from adjointlab.transpose.passes.sums import Piece, Place, Sum, merged, moved, uncovered, whole

aten = torch.ops.aten

_MOST = 256  # pieces of one sum; more are not worth following
_VIEW = 4  # pieces that are windows of one source, from which on a view of it is faster than copies


def fuse_slices(graph: Graph, choose: SumChooser | None = None) -> Graph:
    """Return an equal graph in which sums of slices are written in one pass, where that is faster.

    ``choose`` is the rule for that; without one, all are written.
    """
    fused = copied(graph)
    sums, wanted = _sums(fused.body)
    written: dict[fx.Node, fx.Node] = {}
    is_worth = worth_writing(fused, {node for node in sums if sums[node] == whole(node)}, written, choose)
    made: dict[fx.Node, Sum] = {}  # of the calls that write
    for node in [node for node in fused.body.nodes if node in wanted]:
        found = tuple([replace(p, source=written.get(p.source, p.source)) for p in wanted[node]])
        written[node] = _write(fused.body, node, found, made, is_worth)
        if written[node] is not node:
            node.replace_all_uses_with(written[node])
    clean(fused.body)
    for node in [node for node in fused.body.nodes if node in made]:
        _absorb(fused.body, node, made)
    return fused


def _sums(nodes: fx.Graph) -> tuple[dict[fx.Node, Sum], dict[fx.Node, Sum]]:
    """Return each node as a sum, and the sums that are wanted as tensors.

    A node is the whole of itself where it is no sum, and where others are to read what is written for it.
    """
    sums: dict[fx.Node, Sum] = {}
    wanted: dict[fx.Node, Sum] = {}
    worth: dict[fx.Node, Sum] = {}  # sums that are more than views of one source: written for whatever reads them whole
    for node in nodes.nodes:
        rule = _RULES.get(node.target)
        is_plain = not node.kwargs or rule is _zeros
        found = rule(node, sums, *node.args) if rule is not None and is_plain else None
        if found is None or len(found) > _MOST:
            wanted |= {operand: worth[operand] for operand in node.all_input_nodes if operand in worth}
            if isinstance(node.meta.get("val"), Tensor):
                sums[node] = whole(node)
            continue
        sums[node] = found = merged(found)
        is_large = len(node.users) > 1 and sum(p.volume for p in found) > 2 * node.meta["val"].numel()
        if is_large or rule not in _READS or any(operand in worth for operand in node.all_input_nodes):
            worth[node] = found
        if is_large:
            wanted[node] = found
            sums[node] = whole(node)
    return sums, wanted


def _absorb(nodes: fx.Graph, node: fx.Node, made: dict[fx.Node, Sum]) -> None:
    """Write what is added whole to a sum, and read by nothing else, with the other pieces of that."""
    found: list[Piece] = []
    for piece in made[node]:
        source, times = piece.source, sum(piece.source is other.source for other in made[node])
        is_alone = source in made and len(source.users) == times == 1 and (piece,) == whole(source, piece.factor)
        is_part = is_alone and source.meta["val"].dtype == node.meta["val"].dtype
        found += [replace(p, factor=p.factor * piece.factor) for p in made[source]] if is_part else [piece]
    if made[node] and len(found) <= _MOST and tuple(found) != made[node]:
        made[node] = tuple(found)
        node.args = _arguments(node.meta["val"], made[node])[0]
        clean(nodes)


def _write(nodes: fx.Graph, node: fx.Node, found: Sum, made: dict[fx.Node, Sum], is_worth: Rule) -> fx.Node:
    """Add the call that writes a sum; the node itself where that is not quicker."""
    value = node.meta["val"]
    is_kept = any(user.op == "output" or packet_of(user) in VIEWS for user in node.users)
    if len(found) == 1 and not is_kept:  # a result has memory of its own
        of = found[0].source.meta["val"]
        if found == whole(found[0].source) and of.shape == value.shape and of.dtype == value.dtype:
            return found[0].source
    arguments, is_disjoint = _arguments(value, found)
    places = _windows(found, value.shape) if is_disjoint and not is_kept else None
    if found and places is None and not is_worth(node, accumulate, arguments):
        return node
    with nodes.inserting_after(node):
        if places is not None:
            written = nodes.call_function(windows, (*arguments, *places))
        else:
            written = nodes.call_function(accumulate, arguments) if found else zeros(nodes, value)
            made[written] = found
    written.meta = dict(node.meta)
    return written


def _arguments(value: Tensor, found: Sum) -> tuple[tuple[Any, ...], bool]:
    """Return how to write a sum, and whether its pieces cover the result without meeting each other.

    The largest come first, those without a factor before others: pieces that meet none before them are copied.
    """
    pieces = sorted(found, key=lambda piece: (-piece.volume, piece.factor != 1))
    sources = list(dict.fromkeys(piece.source for piece in pieces))
    alone = [not any(piece.meets(other) for other in pieces[:i]) for i, piece in enumerate(pieces)]
    layout = tuple(
        (sources.index(p.source), p.factor, *p.places, first) for p, first in zip(pieces, alone, strict=True)
    )
    bare = uncovered(tuple(itertools.compress(pieces, alone)), value.shape)
    return (sources, layout, tuple(value.shape), bare), not bare and all(alone)


def _windows(found: Sum, shape: Sequence[int]) -> tuple[Any, ...] | None:
    """Return where equal pieces of one source begin, and how far each dimension of the result moves in the source.

    That is None unless each piece is at one index of the same dimension, and as far from the one before as all are.
    """
    for dim in range(len(shape)) if len(found) >= _VIEW else ():
        pieces = sorted(found, key=lambda piece: piece.spans[dim].write)
        origin = pieces[0].starts
        step = {d: at - origin.get(d, at) for d, at in pieces[1].starts.items()}
        alike = (1, pieces[0].source, 1, math.prod(shape) // shape[dim])
        if len(pieces) != shape[dim] or min(step.values(), default=0) < 0:
            continue
        if any((p.factor, p.source, p.spans[dim].length, p.volume) != alike for p in pieces):
            continue
        if all(p.starts == {d: at + i * step.get(d, 0) for d, at in origin.items()} for i, p in enumerate(pieces)):
            moves = [{} if span.dim is None else {span.dim: 1} for span in pieces[0].spans]
            return origin, [*moves[:dim], step, *moves[dim + 1 :]]
    return None


def windows(
    sources: list[Tensor], layout: tuple[Any, ...], shape: tuple[int, ...], bare: tuple[Place, ...],
    origin: dict[int, int], moves: list[dict[int, int]],
) -> Tensor:  # fmt: skip
    """Return the sum of pieces that are windows of one source as a view of that."""
    if not plain():
        return accumulate(sources, layout, shape, bare)
    strides, at = sources[0].stride(), sources[0].storage_offset()
    along = [sum(strides[d] * by for d, by in move.items()) for move in moves]
    return sources[0].as_strided(shape, along, at + sum(strides[d] * start for d, start in origin.items()))


def accumulate(
    sources: list[Tensor], layout: tuple[Any, ...], shape: tuple[int, ...], bare: tuple[Place, ...]
) -> Tensor:
    """Return the sum of pieces, each written once: copied where nothing was before it, added elsewhere."""
    if torch.compiler.is_compiling():
        return _as_sum(sources, layout, shape)
    result = sources[0].new_empty(shape)
    for place in bare:
        result[place].zero_()
    for number, factor, read, write, exclusive in layout:
        part, target = sources[number][read], result[write]
        if not exclusive:
            target.add_(part, alpha=factor)
        elif factor == 1:
            target.copy_(part)
        else:
            torch.mul(part, factor, out=target)
    return result


def _as_sum(sources: list[Tensor], layout: tuple[Any, ...], shape: tuple[int, ...]) -> Tensor:
    """Return the sum of pieces as one expression: compilers make one loop of it, and many of writes in place."""
    total: Any = None
    for number, factor, read, write, _ in sorted(layout, key=lambda piece: piece[1] != 1):  # a product less
        part = sources[number][read][tuple([slice(None) if isinstance(w, slice) else None for w in write])]
        places = [(w.start, w.stop) if isinstance(w, slice) else (w, w + 1) for w in write]
        pads = [side for (a, b), n in zip(places, shape, strict=True) for side in (n - b, a)]
        term = torch.constant_pad_nd(part, pads[::-1])
        if total is not None and factor == -1:
            total = total - term
        else:
            term = term if factor == 1 else factor * term
            total = term if total is None else total + term
    return total  # type: ignore[no-any-return]


def circular(node: fx.Node, *, inverse: bool) -> tuple[int, ...] | None:
    """Return the shifts a for which a node pads one image circularly, ``padded[i] = x[(i − a) mod n]``, or None.

    With ``inverse``, the node is the transpose of that.
    """
    arguments: Any = node.args
    if node.target is not accumulate or len(arguments[0]) > 1:
        return None
    ((source,), layout, *_) = arguments
    if any(factor != 1 or any(isinstance(i, int) for i in (*r, *w)) for _, factor, r, w, _ in layout):
        return None
    image, padded = (n.meta["val"].shape for n in ((node, source) if inverse else (source, node)))
    pairs = [zip(w, r, strict=True) if inverse else zip(r, w, strict=True) for _, _, r, w, _ in layout]
    pieces = [tuple((of.start, to.start, to.stop) for of, to in pair) for pair in pairs]
    spans = [set(along) for along in zip(*pieces, strict=True)]
    if not math.prod(map(len, spans)) == len(set(pieces)) == len(pieces):
        return None  # pieces that are not all combinations of spans, one of each dimension
    shifts = []
    for found, n, length in zip(spans, image, padded, strict=True):
        starts, stops = zip(*sorted((start, stop) for _, start, stop in found), strict=True)
        offsets = {(start - read) % n for read, start, _ in found}
        if (*starts, length) != (0, *stops) or len(offsets) != 1:
            return None
        shifts.append(offsets.pop())
    return tuple(shifts)


# -- rules: the sum of a node from those of its operands, or None where it is not one. They are given its arguments.

Sums = dict[fx.Node, Sum]


def _shape(node: fx.Node) -> list[int]:
    return list(node.meta["val"].shape)


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
    pieces = moved(sums[x], dim, -start, stop - start)
    return tuple(p.dropped(dim) for p in pieces) if node.target in _AT_INDEX else pieces


def _put(node: fx.Node, sums: Sums, first: fx.Node, second: Any, *where: Any) -> Sum | None:
    """Write a source to zeros of a shape (the derivative of a slice), or over what a base has there (a scatter)."""
    shape = _shape(node)
    window = _window(node, shape, *where)
    if window is None:
        return None
    dim, start, stop = window
    n = shape[dim]
    source, base = (second, sums[first]) if isinstance(second, fx.Node) else (first, ())
    is_index = node.target in _AT_INDEX
    placed = tuple(p.inserted(dim, start) for p in sums[source]) if is_index else moved(sums[source], dim, start, n)
    after = moved(moved(base, dim, -stop, n - stop), dim, stop, n)
    return (*moved(base, dim, 0, start), *after, *placed)


def _pad(node: fx.Node, sums: Sums, x: fx.Node, pads: list[int], value: complex = 0) -> Sum | None:
    pieces, shape = sums[x], _shape(node)
    for i, before in enumerate(pads[::2]):
        dim = len(shape) - 1 - i
        pieces = moved(pieces, dim, before, shape[dim])
    return pieces if value == 0 else None


def _cat(node: fx.Node, sums: Sums, parts: list[fx.Node], dim: int = 0) -> Sum | None:
    value = node.meta["val"]
    if any(p.meta["val"].ndim != value.ndim or p.meta["val"].dtype != value.dtype for p in parts):
        return None
    offsets = itertools.accumulate((_shape(part)[dim] for part in parts), initial=0)
    placed = zip(parts, offsets, strict=False)
    return tuple(p for part, by in placed for p in moved(sums[part], dim % value.ndim, by, value.shape[dim]))


def _roll(node: fx.Node, sums: Sums, x: fx.Node, shifts: list[int], dims: Sequence[int] = ()) -> Sum | None:
    pieces, shape = sums[x], _shape(x)
    for shift, axis in zip(shifts, dims, strict=bool(dims)):
        dim, n = axis % len(shape), shape[axis]
        by = shift % n
        pieces = (*moved(pieces, dim, by, n), *moved(pieces, dim, by - n, n))
    return pieces if dims else None


def _add(node: fx.Node, sums: Sums, a: Any, b: Any) -> Sum | None:
    value = node.meta["val"]
    for x in (a, b):
        if not isinstance(x, fx.Node) or x.meta["val"].shape != value.shape or x.meta["val"].dtype != value.dtype:
            return None
    return (*sums[a], *(sums[b] if node.target is aten.add.Tensor else _neg(node, sums, b)))


def _neg(node: fx.Node, sums: Sums, x: fx.Node) -> Sum:
    return tuple(replace(p, factor=-p.factor) for p in sums[x])


def _scaled(node: fx.Node, sums: Sums, x: Any, factor: Any) -> Sum | None:
    """Scale pieces, unless they are a view together; PyTorch rounds a product of half precision before it is added."""
    is_number = isinstance(factor, (int, float)) and isinstance(x, fx.Node) and x.meta["val"].dtype.itemsize >= 4
    if not is_number or _windows(sums[x], _shape(x)) is not None:
        return None
    return tuple(replace(p, factor=p.factor * factor) for p in sums[x])


def _reduced(node: fx.Node, sums: Sums, x: fx.Node, dims: Sequence[int] = (), keepdim: bool = False) -> Sum | None:
    """Add up pieces that each have one index along the dimensions of a sum; PyTorch adds half precision in single."""
    pieces, n, dtype = sums[x], len(_shape(x)), x.meta["val"].dtype
    for dim in sorted((d % n for d in dims), reverse=True):
        if any(p.spans[dim].length > 1 for p in pieces):
            return None
        pieces = tuple(p.dropped(dim).inserted(dim, 0) if keepdim else p.dropped(dim) for p in pieces)
    return pieces if dims and node.meta["val"].dtype == dtype and dtype.itemsize >= 4 else None


def _unsqueeze(node: fx.Node, sums: Sums, x: fx.Node, dim: int) -> Sum:
    return tuple(p.inserted(dim % node.meta["val"].ndim, 0) for p in sums[x])


def _squeeze(node: fx.Node, sums: Sums, x: fx.Node, dim: int) -> Sum:
    shape = _shape(x)
    return tuple(p.dropped(dim % len(shape)) for p in sums[x]) if shape[dim] == 1 else sums[x]


def _zeros(node: fx.Node, sums: Sums, *_: Any) -> Sum:
    return ()


_AT_INDEX = {aten.select.int, aten.select_backward.default, aten.select_scatter.default}
_OPS: dict[Callable[..., Sum | None], tuple[Any, ...]] = {
    _taken: (aten.slice.Tensor, aten.select.int),
    _unsqueeze: (aten.unsqueeze.default,),
    _squeeze: (aten.squeeze.dim,),
    _neg: (aten.neg.default,),
    _scaled: (aten.mul.Tensor,),
    _add: (aten.add.Tensor, aten.sub.Tensor),
    _put: (
        aten.slice_backward.default, aten.select_backward.default, aten.slice_scatter.default,
        aten.select_scatter.default,
    ),
    _pad: (aten.constant_pad_nd.default,),
    _cat: (aten.cat.default,),
    _roll: (aten.roll.default,),
    _reduced: (aten.sum.dim_IntList,),
    _zeros: (
        aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.new_empty.default,
        aten.empty.memory_format,
    ),
}  # fmt: skip
_RULES = {op: rule for rule, ops in _OPS.items() for op in ops}
_READS = {_taken, _unsqueeze, _squeeze, _neg, _scaled, _add}  # a sum of these alone is left as it is
