"""A functional program on tensors, and what can be read off it: what cuts it off, what shares memory, what is dead."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from adjointlab.transpose.frontend.capture import Source

aten = torch.ops.aten


@dataclass(frozen=True)
class Graph:
    """A functional program on tensors: ``function(*state, *inputs) → tuple of outputs``.

    ``baked`` are the tensors whose values became Python numbers while tracing, with those values: the graph is out of
    date once one differs.
    """

    body: fx.Graph
    state: tuple[Source, ...]
    baked: tuple[tuple[Source, Tensor], ...] = ()

    @property
    def placeholders(self) -> list[fx.Node]:
        """Return the input nodes: those of the state first."""
        return [node for node in self.body.nodes if node.op == "placeholder"]

    @property
    def inputs(self) -> list[fx.Node]:
        """Return the input nodes that are not state."""
        return self.placeholders[len(self.state) :]

    @property
    def outputs(self) -> list[fx.Node]:
        """Return the output values, as nodes; None for what is not computed."""
        return list(next(iter(reversed(self.body.nodes))).args[0])

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The graph as a plain function, once it is no more changed."""
        return compiled(self.body)


def compiled(body: fx.Graph) -> Callable[..., Any]:
    """Return a plain function: a graph without attributes needs no module, and torch.compile likes it so."""
    function = type(fx.GraphModule({}, body)).forward

    def run(*tensors: Tensor) -> Any:
        return function(None, *tensors)

    # A code object of its own: torch.compile counts recompilations by code, over all programs of the process.
    run.__code__ = run.__code__.replace(co_name="program")
    return run


def op_name(target: Any) -> str:
    """Return the short name of an op, such as ``convolution_backward``."""
    packet = getattr(target, "overloadpacket", None)
    return str(packet).removeprefix("aten.") if packet is not None else getattr(target, "__name__", str(target))


def is_mutable(target: Any) -> bool:
    """Return whether an op writes to one of its arguments."""
    return bool(getattr(getattr(target, "_schema", None), "is_mutable", False))


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add a call to a graph, with the fake value that it returns."""
    node = graph.call_function(target, args, kwargs)
    values, options = fx.map_arg((args, kwargs), lambda arg: arg.meta["val"])
    with next(v for v in tree_leaves(values) if isinstance(v, Tensor)).fake_mode:  # type: ignore[attr-defined]
        node.meta["val"] = target(*values, **options)
    return node


VIEWS = {
    aten.view, aten.transpose, aten.permute, aten.t, aten.expand, aten.squeeze, aten.unsqueeze, aten.slice, aten.select,
    aten._conj, aten.alias, aten.detach, aten.as_strided, aten.view_as_real, aten.view_as_complex, aten.unfold,
    aten.diagonal, aten._unsafe_view, aten.reshape, aten._neg_view,
}  # fmt: skip


def own_outputs(graph: Graph) -> None:
    """Copy outputs that share memory with an input or each other, or depend on no input: results may be written to."""
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


def cut_off(graph: Graph) -> str:
    """Return the name of an op that cuts a value of the input off from autograd, if there is one.

    That is one whose result is no floating-point number, or whose derivative is that of a part of it, at every input.
    """
    seen = set(graph.inputs)
    for node in graph.body.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if packet in LIKE or not any(operand in seen for operand in node.all_input_nodes):
            continue
        value = node.meta.get("val")
        discrete = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
        if discrete or packet in _STEPS or node.kwargs.get("rounding_mode"):
            return op_name(node.target)
        seen.add(node)
    return ""


# Ops that read the metadata of their first operand only.
LIKE = {
    aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like,
    aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full, aten.new_empty_strided, aten.fill, aten.zero,
}  # fmt: skip
_STEPS = {
    aten.detach, aten.floor, aten.ceil, aten.round, aten.trunc, aten.frac, aten.fmod, aten.remainder,
    aten.floor_divide, aten.sign, aten.sgn, aten.nextafter,
}  # fmt: skip


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
    return Graph(copied, graph.state, graph.baked)


def clean(graph: fx.Graph) -> None:
    """Drop dead code from a functional graph, in place."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


__all__ = [
    "LIKE", "VIEWS", "Graph", "call", "clean", "compiled", "cut_off", "is_mutable", "op_name", "own_outputs", "part",
]  # fmt: skip
