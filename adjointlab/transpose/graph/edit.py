"""How graphs are edited: new calls, copies, parts, and what is left when dead code is dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from adjointlab.transpose.graph.ir import Graph


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a call to a graph, with the fake value that it returns."""
    node = graph.call_function(target, args, kwargs)
    values, options = fx.map_arg((args, kwargs), lambda arg: arg.meta["val"])
    with next(v for v in tree_leaves(values) if isinstance(v, Tensor)).fake_mode:  # type: ignore[attr-defined]
        node.meta["val"] = target(*values, **options)
    return node


def part(graph: Graph, outputs: Sequence[fx.Node | None]) -> Graph:
    """Return a copy of what computes some values of a graph, those that are to be its outputs."""
    copied, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    copied.graph_copy(graph.body, copies)
    copied.output(tuple(None if node is None else copies[node] for node in outputs))
    clean(copied)
    for node in copied.nodes:  # ops that compute several gradients, and are told which
        names = [argument.name for argument in getattr(getattr(node.target, "_schema", None), "arguments", ())]
        if "output_mask" in names:
            position, used = names.index("output_mask"), {user.args[1] for user in node.users}
            node.update_arg(position, [i in used and wanted for i, wanted in enumerate(node.args[position])])
    return Graph(copied, graph.state, graph.specialized)


def copied(graph: Graph) -> Graph:
    """Return a copy of a graph, without dead code, to be edited in place."""
    return part(graph, graph.outputs)


def zeros(graph: fx.Graph, like: Tensor) -> fx.Node:
    """Add zeros of the shape, dtype and device of a value."""
    node = graph.call_function(
        torch.ops.aten.zeros.default, (list(like.shape),), {"dtype": like.dtype, "device": like.device}
    )
    node.meta["val"] = like
    return node


def reached(roots: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Return the nodes that are reached from some, these included."""
    found, pending = set[fx.Node](), list(roots)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(following(node))
    return found


def clean(graph: fx.Graph) -> None:
    """Drop dead code from a functional graph, in place."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)
