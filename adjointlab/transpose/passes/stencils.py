"""Stencils: sums of moved images, as operations of which a compiler makes one loop without cases at the border.

A sum of pieces writes each into a part of its result. A piece that is the whole of a source, but for what is moved out
of the result, is written as that source *moved*, with zeros where it has no entries; the sum is then one of whole
images. Where memory has a margin of zeros around the source, a moved source is a view of it (``in_row``). Pieces of
another kind, as sources of a wave and strips that wrap around, are added afterwards: a loop would have to ask for them
at every entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import call, clean, copied, dependents, known
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import packet_of
from adjointlab.transpose.passes.fuse_slices import accumulate

aten = torch.ops.aten

_PRODUCTS = {aten.mul, aten.div, aten.neg}


def moved(x: Tensor, pads: list[int]) -> Tensor:
    """Return x padded by zeros, and cut off where pads are negative."""
    return torch.constant_pad_nd(x, pads)


def stencils(graph: Graph) -> Graph | None:
    """Return an equal graph in which sums of moved sources are of whole images, None where nothing is moved."""
    graph = copied(graph)
    varying = dependents(graph.inputs)
    for node in [n for n in graph.body.nodes if n.target is accumulate and n.meta["val"].dtype.is_floating_point]:
        with graph.body.inserting_before(node):
            written = _written(graph.body, node, varying)
        if written is not None:
            node.replace_all_uses_with(written)
    clean(graph.body)
    return graph if any(node.target is moved for node in graph.body.nodes) else None


def _written(nodes: fx.Graph, node: fx.Node, varying: set[fx.Node]) -> fx.Node | None:
    """Return the sum of the pieces of a node that are moved sources, to which others are added; None where all are."""
    total: Any = None
    arguments: Any = node.args
    sources, layout, shape, _ = arguments
    rest, value = list[Any](), node.meta["val"]
    for number, factor, read, write, _ in layout:
        source = sources[number]
        pads = _pads(source.meta["val"], read, write, value)
        if pads is None:
            rest.append((*_opened(source, read, write), factor))
            continue
        term = _moved(nodes, source, pads, varying)
        if total is None:
            total = term if factor == 1 else call(nodes, aten.mul.Tensor, term, factor)
        else:
            total = call(nodes, aten.add.Tensor, total, term, **({} if factor == 1 else {"alpha": factor}))
    if total is None or not rest:
        return total  # type: ignore[no-any-return]
    left = list(dict.fromkeys(source for source, *_ in rest))
    whole = tuple([slice(0, n) for n in shape])
    pieces = [(1 + left.index(source), factor, read, write, False) for source, read, write, factor in rest]
    given = ([total, *left], ((0, 1, whole, whole, True), *pieces), shape, True)
    return known(nodes.call_function(accumulate, given), value)


def _pads(source: Tensor, read: Any, write: Any, value: Tensor) -> list[int] | None:
    """Return how to pad a source, last dimension first, to have a piece as a whole; None for other pieces."""
    if source.ndim != value.ndim or source.dtype != value.dtype or any(isinstance(at, int) for at in (*read, *write)):
        return None
    pads, volume = list[int](), 1
    for n, m, r, w in reversed(list(zip(source.shape, value.shape, read, write, strict=True))):
        by = w.start - r.start
        if (w.start, w.stop) != (max(0, by), min(m, n + by)):
            return None
        pads += [by, m - n - by]
        volume *= w.stop - w.start
    return pads if 2 * volume > math.prod(value.shape) else None


def _opened(source: fx.Node, read: Any, write: Any) -> tuple[fx.Node, Any, Any]:
    """Return a piece that writes every other entry of a result, say, instead of one that has zeros between them."""
    places = [dim for dim, at in enumerate(write) if isinstance(at, slice)]
    whole = tuple([slice(0, n) for n in source.meta["val"].shape])
    if source.target is not aten.slice_backward.default or tuple(read) != whole or len(places) != len(whole):
        return source, read, write
    of, shape, dim, *window = source.args
    step, at = slice(*window).indices(shape[dim]), write[places[dim]]  # type: ignore[index, arg-type]
    taken = slice(at.start + step[0], at.start + step[1], step[2])
    inside = tuple([slice(0, n) for n in of.meta["val"].shape])  # type: ignore[union-attr]
    return of, inside, (*write[: places[dim]], taken, *write[places[dim] + 1 :])  # type: ignore[index, return-value]


def _moved(nodes: fx.Graph, node: fx.Node, pads: Sequence[int], varying: set[fx.Node]) -> fx.Node:
    """Return a node padded: of a product, that of padded factors, which may be views of memory with a margin."""
    if not any(pads):
        return node
    value, args = node.meta["val"], [a for a in node.args if isinstance(a, fx.Node)]
    is_alike = all(a.meta["val"].shape == value.shape and a.meta["val"].dtype == value.dtype for a in args)
    is_product = packet_of(node) in _PRODUCTS and node.args[0] in args and not node.kwargs
    is_quotient = packet_of(node) is aten.div and len(args) > 1  # of zeros there is none
    if node in varying and is_product and is_alike and not is_quotient:
        factors = [_moved(nodes, a, pads, varying) if isinstance(a, fx.Node) else a for a in node.args]
        return call(nodes, node.target, *factors)
    return call(nodes, moved, node, list(pads))
