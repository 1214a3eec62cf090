"""Results of their own: outputs that look at the memory of inputs, or of each other, are copied."""

from __future__ import annotations

import torch
from torch import fx

from adjointlab.transpose.graph.edit import call, copied
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import VIEWS

aten = torch.ops.aten


def own_outputs(graph: Graph) -> Graph:
    """Return an equal graph that copies outputs which share memory or depend on no input: results may be written to."""
    graph = copied(graph)
    free: set[fx.Node] = set()  # what depends on an input
    shared: set[fx.Node] = set(graph.placeholders)
    owner: dict[fx.Node, fx.Node] = {}  # whose memory views look at
    for node in graph.body.nodes:
        if node in graph.inputs or any(operand in free for operand in node.all_input_nodes):
            free.add(node)
        if getattr(node.target, "overloadpacket", None) in VIEWS:
            owner[node] = owner.get(node.args[0], node.args[0])
            if node.args[0] in shared:
                shared.add(node)
    end = next(iter(reversed(graph.body.nodes)))
    outputs, taken = [], set[fx.Node]()
    for node in graph.outputs:
        memory = owner.get(node, node)
        if node is not None and (node in shared or node not in free or memory in taken):
            with graph.body.inserting_before(end):
                outputs.append(call(graph.body, aten.clone.default, node))
        else:
            outputs.append(node)
            taken.add(memory)
    end.args = (tuple(outputs),)
    return graph
