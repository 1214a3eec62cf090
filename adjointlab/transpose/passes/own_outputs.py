"""Results of their own: outputs that look at the memory of inputs, or of each other, are copied."""

from __future__ import annotations

import torch
from torch import fx

from adjointlab.transpose.graph.edit import call, copied, dependents
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import VIEWS, packet_of

aten = torch.ops.aten


def own_outputs(graph: Graph) -> Graph:
    """Return an equal graph that copies outputs which share memory or depend on no input: results may be written to."""
    graph = copied(graph)
    free, taken, outputs = dependents(graph.inputs), set[fx.Node](), list[fx.Node | None]()
    end = graph.body.output_node()
    for node in graph.outputs:
        outputs.append(node)
        if node is None:
            continue
        memory = _viewed(node)
        if memory.op == "placeholder" or node not in free or memory in taken:
            with graph.body.inserting_before(end):
                outputs[-1] = call(graph.body, aten.clone.default, node)
        taken.add(memory)
    end.update_arg(0, tuple(outputs))
    return graph


def _viewed(node: fx.Node) -> fx.Node:
    """Return whose memory a node looks at."""
    while packet_of(node) in VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return node
