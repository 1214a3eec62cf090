"""How graphs are edited: new calls, copies, parts, and what is left when dead code is dropped."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.compat import pytree
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import arguments


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a call to a graph, with the fake value that it returns."""
    values, options = fx.map_arg((args, kwargs), lambda arg: arg.meta["val"])
    with next(v for v in pytree.tree_leaves(values) if isinstance(v, Tensor)).fake_mode:  # type: ignore[attr-defined]
        value = target(*values, **options)
    return known(graph.call_function(target, args, kwargs), value)


def known(node: fx.Node, value: Any) -> fx.Node:
    """Return a new node, of which the fake value is known."""
    node.meta["val"] = value
    return node


def inputs_like(graph: fx.Graph, name: str, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Add inputs like some nodes, which may be of another graph."""
    return [known(graph.placeholder(f"{name}_{i}"), node.meta["val"]) for i, node in enumerate(nodes)]


def zeros(graph: fx.Graph, like: Tensor) -> fx.Node:
    """Add zeros of the shape, dtype and device of a value."""
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    return known(graph.call_function(torch.ops.aten.zeros.default, (list(like.shape),), options), like)


def part(graph: Graph, outputs: Sequence[fx.Node | None]) -> Graph:
    """Return a copy of what computes some values of a graph, those that are to be its outputs."""
    copied, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    copied.graph_copy(graph.body, copies)
    copied.output(tuple(None if node is None else copies[node] for node in outputs))
    clean(copied)
    for node in copied.nodes:  # ops that compute several gradients, and are told which
        given = arguments(node)
        if "output_mask" in given:
            position, used = list(given).index("output_mask"), {user.args[1] for user in node.users}
            node.update_arg(position, [i in used and wanted for i, wanted in enumerate(node.args[position])])
    return Graph(copied, graph.state, graph.specialized)


def copied(graph: Graph) -> Graph:
    """Return a copy of a graph, without dead code, to be edited in place."""
    return part(graph, graph.outputs)


def rewritten(graph: Graph, rule: Callable[[fx.Graph, fx.Node], fx.Node | None]) -> Graph:
    """Return a graph that has what a rule adds in place of each node for which it does not return None."""
    graph = copied(graph)
    for node in list(graph.body.nodes):
        with graph.body.inserting_before(node):
            value = rule(graph.body, node)
        if value is not None:
            node.replace_all_uses_with(value)
    clean(graph.body)
    return graph


def merge(
    body: fx.Graph, graph: Graph, copies: dict[fx.Node, fx.Node], seen: dict[Hashable, fx.Node],
    wanted: Iterable[fx.Node | None],
) -> None:  # fmt: skip
    """Add to a graph what computes some nodes of another, from what has a copy already, and each equal call once."""
    needed = reached(
        [node for node in wanted if node is not None], lambda node: [] if node in copies else node.all_input_nodes
    )
    for node in graph.body.nodes:
        if node in needed and node not in copies:
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            key = node.target, _hashable(args), _hashable(kwargs)
            if key not in seen:
                seen[key] = body.node_copy(node, copies.__getitem__)
            copies[node] = seen[key]


def _hashable(value: Any) -> Hashable:
    """Return arguments of a call as a key: equal calls have equal keys."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple((name, _hashable(item)) for name, item in value.items())
    return type(value), str(value) if isinstance(value, slice) else value  # 1, 1.0 and True are equal, and differ here


def reached(roots: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Return the nodes that are reached from some, these included."""
    found, pending = set[fx.Node](), list(roots)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(following(node))
    return found


def dependents(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes that depend on some, these included."""
    return reached(nodes, lambda node: node.users)


def clean(graph: fx.Graph) -> None:
    """Drop dead code from a functional graph, in place."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)
