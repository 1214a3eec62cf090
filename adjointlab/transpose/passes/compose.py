"""Graphs made of graphs: the gradient of a least-squares objective, a gram, and a map without its offset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from adjointlab.transpose.graph.edit import call, clean, copied, dependents, inputs_like, zeros
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import arguments, uncopied

aten = torch.ops.aten


def residual_and_gradient(forward: Graph, adjoint: Graph, *, weighted: bool, residual: bool) -> Graph:
    """Return the graph ``(*state, *x, *y[, *w]) → ([*residual,] *gradient)`` from those of ``f`` and ``f'ᴴ``."""
    graph, n = fx.Graph(), len(forward.state)
    given = [graph.node_copy(node) for node in forward.placeholders]
    data = inputs_like(graph, "y", forward.outputs)
    weights = inputs_like(graph, "w", forward.outputs) if weighted else []
    apart = _entrywise(graph, aten.sub.Tensor, _inlined(graph, forward, given), data)
    cotangents = _entrywise(graph, aten.mul.Tensor, weights, apart) if weighted else apart
    gradient = _inlined(graph, adjoint, [*given[:n], *cotangents])
    graph.output((*(apart if residual else ()), *gradient))
    return Graph(graph, forward.state, forward.specialized)


def gram(forward: Graph, adjoint: Graph, *, weighted: bool) -> Graph:
    """Return the graph ``(*state, *x[, *w]) → Aᴴ w ⊙ A x`` from those of ``A`` and ``Aᴴ``."""
    graph, n = fx.Graph(), len(forward.state)
    given = [graph.node_copy(node) for node in forward.placeholders]
    weights = inputs_like(graph, "w", forward.outputs) if weighted else []
    images = [uncopied(node) for node in _inlined(graph, forward, given)]  # they stay inside
    images = _entrywise(graph, aten.mul.Tensor, images, weights) if weighted else images
    graph.output(tuple(_inlined(graph, adjoint, [*given[:n], *images])))
    clean(graph)
    return Graph(graph, forward.state, forward.specialized)


def _inlined(graph: fx.Graph, part: Graph, given: Sequence[fx.Node]) -> list[Any]:
    """Add what another graph computes from given nodes; return its outputs."""
    return list(graph.graph_copy(part.body, dict(zip(part.placeholders, given, strict=True))))  # type: ignore[arg-type]


def _entrywise(graph: fx.Graph, op: Any, a: Sequence[fx.Node], b: Sequence[fx.Node]) -> list[fx.Node]:
    return [call(graph, op, *pair) for pair in zip(a, b, strict=True)]


def linear_part(forward: Graph) -> Graph:
    """Return the graph of ``x ↦ f(x) − f(0)``: the same program without its biases, where each is only added."""
    graph = copied(forward)
    dependent = dependents(graph.inputs)
    if not dependent.issuperset(graph.outputs):
        return _difference(forward)
    for node in list(graph.body.nodes):
        if node.op == "call_function" and node in dependent:
            with graph.body.inserting_before(node):
                value = _without_bias(graph.body, node, dependent)
            if value is None:
                return _difference(forward)
            if value is not node:
                node.replace_all_uses_with(value)
                dependent.add(value)
    clean(graph.body)
    return graph


def adds_state(forward: Graph) -> bool:
    """Return whether a graph may add something to what depends on the input that other values of the state change."""
    dependent = dependents(forward.inputs)
    state = dependents(forward.placeholders[: len(forward.state)]) - dependent
    nodes = [node for node in forward.body.nodes if node.op == "call_function" and node in dependent]
    return not all(_is_linear(node, state) for node in nodes) or not state.isdisjoint(forward.outputs)


# Operations that add nothing to what depends on the input: they are linear in each operand; in the first; in all but
# those that are indices.
_PRODUCTS = {
    aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.index.Tensor,
    aten.index_select.default, aten.gather.default,
}  # fmt: skip
_OF_FIRST = {aten.div.Tensor, aten.convolution.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default}
_BY_INDEX = {
    aten.index_add.default, aten.scatter_add.default, aten.index_put.default, aten.take.default, aten.embedding.default,
}  # fmt: skip


def _is_linear(node: fx.Node, fixed: set[fx.Node]) -> bool:
    """Return whether operands that are fixed add nothing to the others: of most operations nothing is known."""
    operands = [operand for operand in node.all_input_nodes if operand in fixed]
    if node.target in _BY_INDEX:
        return all(not torch.is_floating_point(n.meta["val"]) and not n.meta["val"].is_complex() for n in operands)
    return not operands or node.target in _PRODUCTS or (node.target in _OF_FIRST and operands == [node.args[1]])


def _without_bias(graph: fx.Graph, node: fx.Node, dependent: set[fx.Node]) -> fx.Node | None:
    """Return the value of a node without what is added to it; None where that cannot be read off."""
    target, fixed = node.target, set(node.all_input_nodes) - dependent
    if target in {aten.rsub.Scalar, aten.rsub.Tensor, aten.add.Scalar, aten.sub.Scalar} or _fills(node):
        return None
    if target is aten.addmm.default and node.args[0] in fixed and not node.kwargs:
        return call(graph, aten.mm.default, *node.args[1:])
    if target in {aten.add.Tensor, aten.sub.Tensor} and not dependent.issuperset(node.args[:2]):
        (kept,) = dependent.intersection(node.args[:2])
        if node.kwargs or kept.meta["val"].dtype != node.meta["val"].dtype:
            return None
        if target is aten.sub.Tensor and kept is node.args[1]:
            kept = call(graph, aten.neg.default, kept)
        shape = node.meta["val"].shape
        return kept if kept.meta["val"].shape == shape else call(graph, aten.expand.default, kept, list(shape))
    if target is aten.convolution.default and node.args[2] in fixed:
        node.update_arg(2, None)
    return node if _is_linear(node, fixed) else None


def _fills(node: fx.Node) -> bool:
    """Return whether a node puts a number of its own beside what depends on the input: a padding with ones, say."""
    given = arguments(node)
    return any(given.get(name) not in {None, 0} for name in ("value", "fill_value"))


def _difference(forward: Graph) -> Graph:
    """Return the graph of ``x ↦ f(x) − f(0)`` as it stands: ``f(0)`` depends on the state alone."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    values: Any = graph.graph_copy(forward.body, copies)
    dependent = dependents(forward.inputs)
    shared = {node: copy for node, copy in copies.items() if node not in dependent}
    at_zero = {node: zeros(graph, node.meta["val"]) for node in forward.inputs}
    zero: Any = graph.graph_copy(forward.body, shared | at_zero)
    graph.output(tuple(_entrywise(graph, aten.sub.Tensor, values, zero)))
    clean(graph)
    return Graph(graph, forward.state, forward.specialized)
