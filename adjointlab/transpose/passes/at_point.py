"""Graphs that are linear in their inputs, at a point of the state: what depends on the state alone is computed once.

A pull-back ``v ↦ J(x₀)ᴴ v`` and its adjoint read numbers that the forward computes at ``x₀``, the *residuals*. One
graph computes these for both, beside the value ``f(x₀)``. They take no more memory than what autograd would keep, as
far as the cheapest of them can be computed again at each call.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.modules import Source
from adjointlab.transpose.graph.edit import clean, dependents, inputs_like, known, merge, rewritten
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import LIKE, VIEWS, has_tag, packet_of, uncopied
from adjointlab.transpose.passes.factored import factor

aten = torch.ops.aten
_CALLS = 8  # of both maps that a point serves, as a solver takes
_MOST = 4  # operations that a residual may cost at each call, if memory is to be saved


@dataclass(frozen=True)
class AtPoint:
    """Some graphs in two parts: what is computed once for a state, and the rest of each."""

    once: Graph  # (*state) → (*value, *residuals)
    rest: tuple[Graph, Graph]  # each (*state, *residuals, *inputs) → outputs


def at_point(value: Graph, pull_back: Graph, push_forward: Graph) -> AtPoint:
    """Return two graphs of one state in parts; ``value`` is the graph ``(*state) → f(x₀)``, with what it shares."""
    graphs = tuple(rewritten(graph, _plain) for graph in (pull_back, push_forward))
    most = _kept_by_autograd(graphs[0])
    plain, copies = _parts(value, graphs, most)
    place = {node: i for i, node in enumerate(plain.once.body.nodes)}
    for graph, made in zip(graphs, copies, strict=True):
        factor(graph, {node: place[copy] for node, copy in made.items() if copy in place})
    return min(plain, _parts(value, graphs, most)[0], key=_cost)


def _parts(value: Graph, graphs: tuple[Graph, ...], most: int) -> tuple[AtPoint, list[dict[fx.Node, fx.Node]]]:
    """Return graphs in parts, with residuals of no more than so many bytes, and which nodes are which of one graph."""
    once, seen = fx.Graph(), dict[Hashable, fx.Node]()
    state = inputs_like(once, "state", value.placeholders)
    copies = [dict(zip(graph.placeholders, state, strict=False)) for graph in (value, *graphs)]
    merge(once, value, copies[0], seen, value.outputs)
    for graph, made in zip(graphs, copies[1:], strict=True):
        merge(once, graph, made, seen, _read_by_rest(graph))
    read = {copies[i][n] for i, graph in enumerate(graphs, 1) for n in _read_by_rest(graph)}
    residuals = _affordable({memory(node) for node in read} - set(state), most)
    once.output((*[copies[0][node] for node in value.outputs], *residuals))
    first, second = (_rest(graph, found, state, residuals) for graph, found in zip(graphs, copies[1:], strict=True))
    clean(once)
    return AtPoint(Graph(once, value.state, value.specialized), (first, second)), copies[1:]


def _cost(parts: AtPoint) -> int:
    """Return how many bytes are written at a point."""
    once, *rest = (
        size(node for node in graph.body.nodes if node.op == "call_function" and packet_of(node) not in VIEWS | LIKE)
        for graph in (parts.once, *parts.rest)
    )
    return once + _CALLS * sum(rest)


def _plain(_: fx.Graph, node: Any) -> fx.Node | None:
    """Drop copies for operations that take any memory, and conjugates of conjugates."""
    source: fx.Node = uncopied(node)
    if source is not node and all(map(_is_pointwise, node.users)):
        return source
    if node.target is not aten._conj.default or not isinstance(node.args[0], fx.Node):
        return None
    inner: Any = node.args[0]
    while inner.target is aten.clone.default:
        inner = inner.args[0]
    return inner.args[0] if inner.target is aten._conj.default else None


def _is_pointwise(node: fx.Node) -> bool:
    return has_tag(node.target, torch.Tag.pointwise)


def _read_by_rest(graph: Graph) -> list[fx.Node]:
    """Return the nodes of the state that are read by what depends on the inputs, and by outputs."""
    free, end = dependents(graph.inputs), graph.body.output_node()
    return [node for node in graph.body.nodes if node not in free and any(u in free or u is end for u in node.users)]


def memory(node: fx.Node) -> fx.Node:
    """Return the node whose memory a node looks at; what costs nothing to make is made anew, from its first operand."""
    while node.all_input_nodes and packet_of(node) in VIEWS | LIKE:
        node = node.all_input_nodes[0]
    return node


def size(nodes: Iterable[fx.Node]) -> int:
    """Return how many bytes the values of nodes take."""
    values = [node.meta["val"] for node in nodes]
    return sum(v.numel() * v.dtype.itemsize for v in values if isinstance(v, Tensor))


def _kept_by_autograd(pull_back: Graph) -> int:
    """Return how many bytes autograd keeps: of what the forward computes, all that the pull-back reads."""
    free, before = dependents(pull_back.inputs), set[fx.Node]()
    for node in pull_back.body.nodes:
        if node in free and node.op == "call_function":
            break
        before.add(node)
    read = {memory(n) for n in before for user in n.users if n not in free and user not in before}
    return size(node for node in read if node.op != "placeholder")


def _affordable(residuals: set[fx.Node], most: int) -> list[fx.Node]:
    """Return the nodes to keep, in no more than so many bytes: all others that are read can be computed from them."""
    chosen = {node for node in residuals if node.all_input_nodes}  # constants are made where they are used
    while (now := size(chosen)) > most:
        tries = [(cost, node, found) for node in chosen for cost, found in [_without(node, chosen)] if cost]
        better = [(cost, size(found), node.name, found) for cost, node, found in tries if size(found) < now]
        if not better:
            break
        chosen = min(better)[-1]
    order = {node: i for i, node in enumerate(next(iter(residuals)).graph.nodes)} if residuals else {}
    return sorted(chosen, key=order.__getitem__)


def _without(node: fx.Node, chosen: set[fx.Node]) -> tuple[int, set[fx.Node]]:
    """Return how many operations make a residual from others, and what is then to be kept; 0 where that is too many."""
    kept, pending, cost = chosen - {node}, [node], 0
    while pending:
        made = pending.pop()
        cost += 1
        if cost > _MOST or not _is_pointwise(made):
            return 0, chosen
        found = [memory(operand) for operand in made.all_input_nodes]
        pending.extend(n for n in found if n not in kept and n.op != "placeholder" and n.all_input_nodes)
    return cost, kept


def _rest(graph: Graph, copies: dict[fx.Node, fx.Node], state: list[fx.Node], residuals: list[fx.Node]) -> Graph:
    """Return a graph that takes residuals as state after its own; what is not kept of the state is computed in it."""
    body, free = fx.Graph(), dependents(graph.inputs)
    made = dict(zip(state, inputs_like(body, "state", state), strict=True))
    made |= zip(residuals, inputs_like(body, "residual", residuals), strict=True)
    inputs = {node: body.node_copy(node) for node in graph.inputs}

    def of_state(node: fx.Node) -> fx.Node:
        if node not in made:
            for operand in node.all_input_nodes:
                of_state(operand)
            made[node] = body.node_copy(node, made.__getitem__)
        return made[node]

    for node in graph.body.nodes:
        if node.op == "call_function" and node in free:
            inputs[node] = body.node_copy(node, lambda n: inputs[n] if n in free else of_state(copies[n]))
    body.output(tuple(inputs[n] if n in free else of_state(copies[n]) for n in graph.outputs))
    clean(body)
    sources = tuple(Source(_no_value, f"residual {i}", is_private=True) for i in range(len(residuals)))
    return rewritten(Graph(body, (*graph.state, *sources), graph.specialized), _added_at_once)


def _added_at_once(body: fx.Graph, node: Any) -> fx.Node | None:
    """Add a product at once."""
    terms = node.args if node.target is aten.add.Tensor and not node.kwargs else ()
    if not all(isinstance(a, fx.Node) and a.meta["val"].shape == node.meta["val"].shape for a in terms):
        return None
    for term, total in (terms, terms[::-1]) if terms else ():
        if len(term.users) == 1 and total is not term and is_product(term, total.meta["val"].dtype):
            return known(body.call_function(aten.addcmul.default, (total, *term.args)), node.meta["val"])
    return None


def is_product(term: Any, dtype: torch.dtype) -> bool:
    """Return whether a node is a product of two nodes of a dtype."""
    factors = term.args if term.target is aten.mul.Tensor else ()
    return bool(factors) and all(isinstance(a, fx.Node) and a.meta["val"].dtype == dtype for a in factors)


def _no_value() -> Tensor:
    raise LookupError("a residual is computed, not read")
