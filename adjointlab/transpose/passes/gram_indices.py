"""Rules for what a gram reads by index, cuts out or sees in another shape: put back, it is a mask, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import call, known
from adjointlab.transpose.graph.ops import window
from adjointlab.transpose.passes.gram_terms import Fixed, Found, Rule, dims_of, made, times, value, weighed

aten = torch.ops.aten


def samples(body: fx.Graph, node: Any, fixed: Fixed) -> Found:
    """To read by index and add by the same index is to multiply each entry by how often it was read."""
    if node.target is aten.index_put.default and node.args[3:] == (True,):
        (zero, *given, values), reads = node.args[:3], aten.index.Tensor
        indexed = [i for i, index in enumerate(given[0]) if index is not None]
    elif node.target is aten.index_add.default and not node.kwargs and len(node.args) == 4:
        (zero, *given, values), reads = node.args, aten.index_select.default
        indexed = dims_of([given[0]], node)
    elif node.target is aten.scatter_add.default:
        (zero, *given, values), reads = node.args, aten.gather.default
        indexed = list(range(value(node).ndim))
    else:
        return None
    read, weight = weighed(values, fixed)
    if zero.target is not aten.zeros.default or read.target is not reads or list(read.args[1:]) != given:
        return None
    x = read.args[0]
    alone = len(values.users) == len(read.users) == 1 and all(map(fixed, read.all_input_nodes[1:]))
    if not alone or fixed(x) or value(x).shape != value(node).shape or value(x).dtype != value(node).dtype:
        return None
    whole = [1 if weight is None and i not in indexed else n for i, n in enumerate(value(x).shape)]
    start = _constant(body, aten.zeros, whole, _like(x, weight))
    ones = _constant(body, aten.ones, value(call(body, reads, start, *given)).shape, _like(x, weight))
    ones = ones if weight is None else times(body, ones, weight, value(x))
    if value(ones).dtype != value(start).dtype:
        return None
    count = call(body, node.target, start, *given, ones, *([True] if reads is aten.index.Tensor else []))
    return call(body, aten.mul.Tensor, x, made(count)), "reading and adding by index to a mask"


def pads(body: fx.Graph, node: Any, fixed: Fixed) -> Found:
    """To pad with zeros and cut them off again is to do nothing."""
    outer = _padding(node)
    source: Any = node.args[0] if outer is not None else node
    inner = _padding(source) if source is not node and len(source.users) == 1 else None
    if outer is None or inner is None or any(p < 0 for p in inner):
        return None
    undone = any(inner) and outer == [-p for p in inner]
    return (source.args[0], "pad · crop cancelled") if undone else None


def _padding(node: Any) -> list[int] | None:
    """Return how many zeros are put before and after, last dimension first, negative ones cut; None for other nodes."""
    if node.target is aten.constant_pad_nd.default and node.args[2:] in {(), (0,), (0.0,)}:
        given = list(node.args[1])
        return given + [0] * (2 * value(node).ndim - len(given))
    if node.target is aten.slice.Tensor:
        dim, first, last, step = window(value(node.args[0]).shape, *node.args[1:])
        sides = -first, last - value(node.args[0]).shape[dim]
    elif node.target is aten.slice_backward.default:
        dim, first, last, step = window(*node.args[1:])
        sides = first, node.args[1][dim] - last
    else:
        return None
    if step != 1 or last < first:
        return None
    found, ndim = [0] * (2 * value(node).ndim), value(node).ndim
    k = 2 * (ndim - 1 - dim)
    found[k : k + 2] = sides
    return found


def _like(x: Any, weight: Any) -> Tensor:
    """Return a value of the dtype that a factor with a weight has."""
    like, is_complex = value(x), isinstance(weight, fx.Node) and value(weight).is_complex()
    return like.real if like.is_complex() and not is_complex else like


def _constant(body: fx.Graph, op: Any, shape: Sequence[int], like: Tensor) -> Any:
    """Add zeros or ones."""
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    return known(body.call_function(op.default, (list(shape),), options), like.new_empty(list(shape)))


def views(body: fx.Graph, node: Any, fixed: Fixed) -> Found:
    """A product with an image seen in another shape is one with the factor in the shape of the image."""
    if node.target is not aten.view.default or fixed(node) or len(node.args[0].users) > 1:
        return None
    seen, factor = weighed(node.args[0], fixed)
    x = seen.args[0] if seen.target is aten.view.default and len(seen.users) == 1 else None
    if x is None or value(x).shape != value(node).shape:
        return None
    if factor is None or not isinstance(factor, fx.Node):
        return (x if factor is None else call(body, aten.mul.Tensor, x, factor)), ""
    same = 0
    for m, n in zip(value(x).shape, value(seen).shape, strict=False):
        if m != n:
            break
        same += 1
    rest = len(value(seen).shape) - same
    if list(value(factor).shape[-rest:] if rest else ()) != list(value(seen).shape[same:]):
        return None
    shape = [*value(factor).shape[: value(factor).ndim - rest], *value(x).shape[same:]]
    return call(body, aten.mul.Tensor, x, made(call(body, aten.view.default, factor, shape))), ""


RULES: tuple[Rule, ...] = (samples, pads, views)
