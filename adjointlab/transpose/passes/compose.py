"""Graphs made of graphs: the gradient of a least-squares objective, and a map without its offset."""

from __future__ import annotations

import torch
from torch import fx

from adjointlab.transpose.graph.edit import call, clean, copied, zeros
from adjointlab.transpose.graph.ir import Graph

aten = torch.ops.aten


def residual_and_gradient(forward: Graph, adjoint: Graph, *, weighted: bool, residual: bool) -> Graph:
    """Return the graph ``(*state, *x, *y[, *w]) → ([*residual,] *gradient)`` from those of ``f`` and ``f'ᴴ``."""
    graph = fx.Graph()
    copies = {node: graph.node_copy(node) for node in forward.placeholders}
    twins = dict(zip(adjoint.placeholders, forward.placeholders[: len(forward.state)], strict=False))
    outputs = forward.outputs

    def inputs(name: str) -> list[fx.Node]:
        nodes = []
        for index, out in enumerate(outputs):
            node = graph.placeholder(f"{name}_{index}")
            node.meta["val"] = out.meta["val"]
            nodes.append(node)
        return nodes

    data = inputs("y")
    weights = inputs("w") if weighted else None
    for node in forward.body.nodes:
        if node.op == "call_function":
            copies[node] = graph.node_copy(node, copies.__getitem__)

    def combine(op: object, a: fx.Node, b: fx.Node) -> fx.Node:
        node = graph.call_function(op, (a, b))  # type: ignore[arg-type]
        node.meta["val"] = a.meta["val"]
        return node

    apart = [combine(aten.sub.Tensor, copies[out], y) for out, y in zip(outputs, data, strict=True)]
    cotangents = apart
    if weights is not None:
        cotangents = [combine(aten.mul.Tensor, w, r) for w, r in zip(weights, apart, strict=True)]
    back: dict[fx.Node, fx.Node] = {node: copies[twin] for node, twin in twins.items()}
    back.update(zip(adjoint.inputs, cotangents, strict=True))
    for node in adjoint.body.nodes:
        if node.op == "call_function":
            back[node] = graph.node_copy(node, back.__getitem__)
    graph.output((*(apart if residual else ()), *[back[out] for out in adjoint.outputs]))
    return Graph(graph, forward.state, forward.specialized)


def linear_part(forward: Graph) -> Graph:
    """Return the graph of ``x ↦ f(x) − f(0)``: the same program without its biases, where each is only added."""
    graph = copied(forward)
    dependent = set(graph.inputs)
    for node in list(graph.body.nodes):
        if node.op != "call_function":
            continue
        constant = [operand for operand in node.all_input_nodes if operand not in dependent]
        if len(constant) == len(node.all_input_nodes):
            continue
        dependent.add(node)
        value = _without_bias(graph.body, node, dependent)
        if value is None:
            return _difference(forward)
        if value is not node:
            node.replace_all_uses_with(value)
            dependent.add(value)
    clean(graph.body)
    return graph if dependent.issuperset(graph.outputs) else _difference(forward)


# Operations that are linear in each operand, so that they add nothing to what depends on the input.
_PRODUCTS = {
    aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.index.Tensor,
    aten.index_select.default, aten.gather.default,
}  # fmt: skip


_OF_FIRST = {aten.div.Tensor, aten.convolution.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default}


def adds_state(forward: Graph) -> bool:
    """Return whether a graph may add something to what depends on the input that other values of the state change."""
    state, dependent = set(forward.placeholders[: len(forward.state)]), set(forward.inputs)
    for node in forward.body.nodes:
        if node.op != "call_function":
            continue
        operands = node.all_input_nodes
        if not any(operand in dependent for operand in operands):
            state |= {node} if any(operand in state for operand in operands) else set()
            continue
        dependent.add(node)
        of_state = [operand for operand in operands if operand in state]
        scales = node.target in _PRODUCTS or (node.target in _OF_FIRST and of_state == [node.args[1]])
        if of_state and not scales:
            return True
    return any(out in state for out in forward.outputs)


def _without_bias(graph: fx.Graph, node: fx.Node, dependent: set[fx.Node]) -> fx.Node | None:
    """Return the value of a node without what is added to it; None where that cannot be read off."""
    target, operands = node.target, node.all_input_nodes
    if target in {aten.rsub.Scalar, aten.rsub.Tensor, aten.add.Scalar, aten.sub.Scalar} or _fills(node):
        return None
    if target is aten.convolution.default:
        if node.args[1] in dependent or node.args[2] in dependent:
            return None
        node.update_arg(2, None)
        return node
    if target in {aten.add.Tensor, aten.sub.Tensor}:
        first, second = (part in dependent for part in node.args[:2])
        if first and second:
            return node
        if node.kwargs:
            return None
        kept = node.args[0] if first else node.args[1]
        with graph.inserting_before(node):
            if not first and target is aten.sub.Tensor:
                kept = call(graph, aten.neg.default, kept)
            if kept.meta["val"].dtype != node.meta["val"].dtype:  # type: ignore[union-attr]
                return None
            if kept.meta["val"].shape != node.meta["val"].shape:  # type: ignore[union-attr]
                kept = call(graph, aten.expand.default, kept, list(node.meta["val"].shape))
        return kept  # type: ignore[return-value]
    if target is aten.addmm.default and not node.kwargs and node.args[0] not in dependent:
        with graph.inserting_before(node):
            return call(graph, aten.mm.default, *node.args[1:3])
    # Of any other operation that reads a constant beside the input, nothing is known.
    return node if target in _PRODUCTS or all(operand in dependent for operand in operands) else None


def _fills(node: fx.Node) -> bool:
    """Return whether a node puts a number of its own beside what depends on the input: a padding with ones, say."""
    names = [argument.name for argument in getattr(getattr(node.target, "_schema", None), "arguments", ())]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return any(given.get(name) not in {None, 0} for name in ("value", "fill_value") if name in given)


def _difference(forward: Graph) -> Graph:
    """Return the graph of ``x ↦ f(x) − f(0)`` as it stands: ``f(0)`` depends on the state alone."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    at_zero: dict[fx.Node, fx.Node] = {}
    inputs = set(forward.inputs)
    for node in forward.placeholders:
        copies[node] = at_zero[node] = graph.node_copy(node)
    for node in forward.inputs:
        at_zero[node] = zeros(graph, node.meta["val"])
    dependent = set(inputs)
    for node in forward.body.nodes:
        if node.op != "call_function":
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        at_zero[node] = copies[node]
        if any(operand in dependent for operand in node.all_input_nodes):
            dependent.add(node)
            at_zero[node] = graph.node_copy(node, at_zero.__getitem__)
    outputs = []
    for node in forward.outputs:
        difference = graph.call_function(aten.sub.Tensor, (copies[node], at_zero[node]))
        difference.meta["val"] = node.meta["val"]
        outputs.append(difference)
    graph.output(tuple(outputs))
    clean(graph)
    return Graph(graph, forward.state, forward.specialized)
