"""Graphs made of graphs: the gradient of a least-squares objective, and a map without its offset."""

from __future__ import annotations

import torch
from torch import fx

from adjointlab.transpose.graph.ir import Graph, clean

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
    return Graph(graph, forward.state, forward.baked)


def without_offset(forward: Graph) -> Graph:
    """Return the graph of ``x ↦ f(x) − f(0)``; ``f(0)`` depends on the state alone, and is kept while that is."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    zeros: dict[fx.Node, fx.Node] = {}
    inputs = set(forward.inputs)
    for node in forward.placeholders:
        copies[node] = zeros[node] = graph.node_copy(node)
    for node in forward.inputs:
        value = node.meta["val"]
        zeros[node] = graph.call_function(
            aten.zeros.default, (list(value.shape),), {"dtype": value.dtype, "device": value.device}
        )
        zeros[node].meta["val"] = value
    dependent = set(inputs)
    for node in forward.body.nodes:
        if node.op != "call_function":
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        zeros[node] = copies[node]
        if any(operand in dependent for operand in node.all_input_nodes):
            dependent.add(node)
            zeros[node] = graph.node_copy(node, zeros.__getitem__)
    outputs = []
    for node in forward.outputs:
        difference = graph.call_function(aten.sub.Tensor, (copies[node], zeros[node]))
        difference.meta["val"] = node.meta["val"]
        outputs.append(difference)
    graph.output(tuple(outputs))
    clean(graph)
    return Graph(graph, forward.state, forward.baked)
