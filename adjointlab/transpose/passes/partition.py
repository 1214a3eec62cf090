"""A graph in three parts: what is computed once, what is computed again when the state changes, and the rest.

*Constants* (sampling grids, windows) depend on nothing. *Prepacked state* (flipped kernels, a kernel's transform)
depends on the state alone, each piece on some tensors of it. The *main* part is all else. Prepacked state is kept while
the tensors that it depends on have the same values. These are compared at every call, which only a small state is
worth; on accelerators, only what :attr:`Kernel.kept_everywhere` says is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import reached
from adjointlab.transpose.graph.ir import Graph, compiled
from adjointlab.transpose.graph.ops import VIEWS, op_name
from adjointlab.transpose.kernels.registry import Kernel, bound

aten = torch.ops.aten

_SMALL = 1 << 16  # entries of state that are compared at each call, some ten microseconds' worth

# Ops that cost as much to keep as to make: they stay where they are used, as views do.
_FACTORIES = {
    aten.zeros, aten.ones, aten.full, aten.empty, aten.empty_strided, aten.new_zeros, aten.new_ones, aten.new_empty,
    aten.new_full, aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.scalar_tensor,
}  # fmt: skip


def _as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.contiguous())


# The same functions by a door that costs half as much: calls through torch.ops parse their arguments in Python. And
# views that copy where they must: real results need not have the strides that fake ones had.
_BUILTIN: dict[Any, Callable[..., Any]] = {
    **{op: getattr(torch, op_name(op)) for op in (
        aten.convolution.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.neg.default,
        aten.transpose.int, aten.permute.default, aten.select.int, aten.unsqueeze.default, aten.cat.default,
        aten.view_as_real.default, aten.slice_scatter.default, aten.constant_pad_nd.default, aten.mm.default,
        aten.bmm.default,
    )},
    aten._conj.default: torch.conj,
    aten.view_as_complex.default: _as_complex,
    aten.view.default: torch.reshape,
    aten._unsafe_view.default: torch.reshape,
}  # fmt: skip
_IN_PLACE = {torch.add: torch.Tensor.add_, torch.sub: torch.Tensor.sub_, torch.mul: torch.Tensor.mul_}


@dataclass(frozen=True)
class Parts:
    """A graph as functions."""

    constants: Callable[..., Any] | None  # () → constants
    # The positions of the state that a piece depends on, and (*those, *constants) → pieces:
    prepacks: tuple[tuple[tuple[int, ...], Callable[..., Any]], ...]
    main: Callable[..., Any]  # (*state, *inputs, *constants, *pieces) → outputs


def partition(graph: Graph) -> Parts:
    """Return the parts of a graph."""
    placeholders = graph.placeholders
    level = _levels(graph)
    results = set(graph.outputs)  # never kept: the caller may write to them
    keep = [
        n for n in graph.body.nodes
        if n.op == "call_function" and level[n] < 2 and n not in results and not _stays(n)
    ]  # fmt: skip
    roots = {n: _roots(n, placeholders) for n in keep}
    small = {
        n for n in keep
        if level[n] == 0 or getattr(n.target, "is_dear", False) or (sum(placeholders[i].meta["val"].numel() for i in roots[n]) <= _SMALL
        and all(_is_kept(n, placeholders[i].meta["val"].device) for i in roots[n]))
    }  # fmt: skip
    # Only what the rest uses is kept; tuples of tensors (of convolution_backward, say) through their items.
    frontier = [
        n for n in keep if n in small and isinstance(n.meta.get("val"), Tensor) and not small.issuperset(n.users)
    ]
    constants = [n for n in frontier if level[n] == 0]
    apart: dict[frozenset[int], list[fx.Node]] = {}  # by what they depend on: each is recomputed for that only
    for n in frontier:
        if level[n] == 1:
            apart.setdefault(roots[n], []).append(n)
    # A constant that only a prepack uses is an input of that as well.
    inner = [n for n in keep if level[n] == 0 and n not in constants and isinstance(n.meta.get("val"), Tensor)]
    known = constants + [n for n in inner if any(level[user] == 1 for user in n.users)]
    prepacks = []
    for watched, nodes in apart.items():
        inputs = tuple(sorted(watched))
        prepacks.append((inputs, extract(graph, [*[placeholders[i] for i in inputs], *known], nodes)))
    ready = [*known, *[n for nodes in apart.values() for n in nodes]]
    main = extract(graph, [*placeholders, *ready], graph.outputs)
    return Parts(extract(graph, [], known) if known else None, tuple(prepacks), main)


def _is_kept(node: fx.Node, device: torch.device) -> bool:
    kernel = getattr(node.target, "kernel", None)
    return device.type == "cpu" or (isinstance(kernel, Kernel) and kernel.kept_everywhere)


def _levels(graph: Graph) -> dict[fx.Node, int]:
    """Return 0 for nodes that depend on nothing, 1 for those that depend on state only, 2 for the rest."""
    inputs = set(graph.inputs)
    level: dict[fx.Node, int] = {}
    for node in graph.body.nodes:
        if node.op == "placeholder":
            level[node] = 2 if node in inputs else 1
        else:
            level[node] = max((level[operand] for operand in node.all_input_nodes), default=0)
    return level


def _stays(node: fx.Node) -> bool:
    """Return whether a node is not worth keeping: a factory, or a view or pointwise op of what is not kept.

    A pointwise op of the state costs about what it costs to see that the state is the same.
    """
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _FACTORIES:
        return bool(node.meta["val"].numel() > 1)
    cheap = packet in VIEWS or torch.Tag.pointwise in getattr(node.target, "tags", ()) or packet is aten.clone
    inputs = node.all_input_nodes
    return cheap and bool(inputs) and all(n.op == "placeholder" or _stays(n) for n in inputs)


def _roots(node: fx.Node, placeholders: list[fx.Node]) -> frozenset[int]:
    seen = reached([node], lambda node: node.all_input_nodes)
    return frozenset(i for i, placeholder in enumerate(placeholders) if placeholder in seen)


def extract(graph: Graph, inputs: list[fx.Node], outputs: list[Any]) -> Callable[..., Any]:
    """Return the part of the graph that computes ``outputs`` from ``inputs`` as a function."""
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = part.placeholder(node.name)
        copies[node].meta = node.meta
    wanted = [n for n in outputs if isinstance(n, fx.Node)]
    needed = reached(wanted, lambda node: [] if node in copies else node.all_input_nodes)
    for node in graph.body.nodes:
        if node in needed and node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
            if node.args and isinstance(node.args[0], (fx.Node, list)):  # they take no number for a tensor
                copies[node].target = _BUILTIN.get(node.target, node.target)
    part.output(tuple(copies[n] if isinstance(n, fx.Node) else n for n in outputs))
    _in_place(part)
    part.lint()
    return compiled(part)


def _in_place(part: fx.Graph) -> None:
    """Have sums and products written to the result of a convolution that nothing else reads.

    Fresh memory costs more than the arithmetic: the system has to map and to clear it.
    """
    own: set[fx.Node] = set()  # results in memory that nothing else looks at
    for node in part.nodes:
        if node.target is torch.convolution or bound(node.target):
            own.add(node)
        elif node.target in _IN_PLACE and len(node.args) == 2 and not node.kwargs:
            first, second = (operand.meta.get("val") if isinstance(operand, fx.Node) else None for operand in node.args)
            if first is not None and second is not None and node.args[0] in own and len(node.args[0].users) == 1:
                result = node.meta["val"]
                if first.shape == result.shape and first.dtype == second.dtype == result.dtype:
                    node.target = _IN_PLACE[node.target]
                    own.add(node)


def value_of_state(graph: Graph, node: fx.Node) -> Callable[..., Any]:
    """Return the value of a node that depends on nothing but the state, as a function of that."""
    return extract(graph, graph.placeholders[: len(graph.state)], [node])
