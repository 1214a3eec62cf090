"""A graph in three parts: what is computed once, what is computed again when the state changes, and the rest.

*Constants* (sampling grids, windows) depend on nothing. *Prepacked state* (flipped kernels, a kernel's transform)
depends on the state alone, each piece on some tensors of it. The *main* part is all else. Prepacked state is kept while
the tensors that it depends on have the same values. These are compared at every call, which only a small state is
worth; on accelerators, only what :attr:`Kernel.kept_everywhere` says is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import dependents, known, reached
from adjointlab.transpose.graph.ir import Graph, compiled
from adjointlab.transpose.graph.ops import LIKE, VIEWS, has_tag, op_name, packet_of, uncopied
from adjointlab.transpose.kernels.registry import Kernel, bound

aten = torch.ops.aten

_SMALL = 1 << 16  # entries of state that are compared at each call, some ten microseconds' worth

# Ops that cost as much to keep as to make: they stay where they are used, as views do.
_FACTORIES = {*LIKE, aten.zeros, aten.ones, aten.full, aten.empty, aten.empty_strided, aten.scalar_tensor}


def _as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.contiguous())


# Views that copy where they must: real results need not have the strides that fake ones had.
_VIEWS_OR_COPIES: dict[Any, Callable[..., Any]] = {
    aten.view_as_complex.default: _as_complex,
    aten.view.default: torch.reshape,
    aten._unsafe_view.default: torch.reshape,
}
_FRESH = {"convolution", "_fft_c2c"}  # whose results nothing else looks at
_IN_PLACE = {torch.add: torch.Tensor.add_, torch.sub: torch.Tensor.sub_, torch.mul: torch.Tensor.mul_}


class HasNoPiecesError(Exception):
    """Prepacked state cannot be made of the state as it is now: PyTorch's own operations have to serve."""


@dataclass(frozen=True)
class Prepack:
    """Pieces that are made of a part of the state: ``function(*that part, *constants) → pieces``."""

    watched: tuple[int, ...]  # the positions of that state
    function: Callable[..., Any]
    is_dear: bool


@dataclass(frozen=True)
class Parts:
    """A graph as functions."""

    constants: Callable[..., Any] | None  # () → constants
    prepacks: tuple[Prepack, ...]
    main: Callable[..., Any]  # (*state, *inputs, *constants, *pieces) → outputs


def partition(graph: Graph) -> Parts:
    """Return the parts of a graph."""
    roots, kept = roots_of(graph), kept_nodes(graph)
    apart: dict[frozenset[fx.Node], list[fx.Node]] = {}  # by what they depend on: each is recomputed for that only
    for node in graph.body.nodes:
        # Outputs of a part are what the main part uses, and constants that a prepack uses; of tuples, their items.
        is_used = any(user not in kept or (roots[user] and not roots[node]) for user in node.users)
        if node in kept and is_used and isinstance(node.meta.get("val"), Tensor):
            apart.setdefault(roots[node], []).append(node)
    constants = apart.pop(frozenset(), [])
    placeholders, pieces = graph.placeholders, [n for nodes in apart.values() for n in nodes]
    prepacks = []
    for watched, nodes in apart.items():
        positions = tuple(i for i, placeholder in enumerate(placeholders) if placeholder in watched)
        function = extract(graph, [*[placeholders[i] for i in positions], *constants], nodes)
        prepacks.append(Prepack(positions, function, any(map(is_dear, nodes))))
    main = extract(graph, [*placeholders, *constants, *pieces], graph.outputs)
    return Parts(extract(graph, [], constants) if constants else None, tuple(prepacks), main)


def hoisted(graph: Graph, moving: frozenset[int]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return ``state → pieces``, all that calls in a row share, and ``(*state, *inputs, *pieces) → outputs``.

    ``moving`` are positions of what is another tensor at each call. Outputs may share memory with inputs.
    """
    state = graph.placeholders[: len(graph.state)]
    pieces = shared(graph, dependents([*graph.inputs, *(state[i] for i in moving)]))
    outputs = [None if node is None else uncopied(node) for node in graph.outputs]
    return extract(graph, state, pieces), extract(graph, [*graph.placeholders, *pieces], outputs)


def shared(graph: Graph, varying: set[fx.Node]) -> list[fx.Node]:
    """Return the nodes that do not vary, of which those that do are computed."""
    return [
        node for node in graph.body.nodes
        if node.op == "call_function" and node not in varying and isinstance(node.meta.get("val"), Tensor)
        and any(user in varying for user in node.users)
    ]  # fmt: skip


def kept_nodes(graph: Graph) -> set[fx.Node]:
    """Return the nodes of a graph whose values are kept between calls."""
    inputs, results = set(graph.inputs), set(graph.outputs)  # never kept: the caller may write to results
    roots = roots_of(graph)
    return {
        node for node in graph.body.nodes
        if node.op == "call_function" and inputs.isdisjoint(roots[node]) and node not in results and not _stays(node)
        and (is_dear(node) or sum(root.meta["val"].numel() for root in roots[node]) <= _SMALL)
        and all(_is_kept(node, root.meta["val"].device) for root in roots[node])
    }  # fmt: skip


def is_dear(node: fx.Node) -> bool:
    """Return whether to compute a node costs far more than to compare its state, however large that is."""
    return bool(getattr(node.target, "is_dear", False))


def _is_kept(node: fx.Node, device: torch.device) -> bool:
    kernel = getattr(node.target, "kernel", None)
    return device.type == "cpu" or is_dear(node) or (isinstance(kernel, Kernel) and kernel.kept_everywhere)


def roots_of(graph: Graph) -> dict[fx.Node, frozenset[fx.Node]]:
    """Return the placeholders that each node depends on."""
    roots: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.body.nodes:
        above = {node} if node.op == "placeholder" else set[fx.Node]()
        roots[node] = frozenset(above.union(*[roots[operand] for operand in node.all_input_nodes]))
    return roots


def _stays(node: fx.Node) -> bool:
    """Return whether to compute a node costs no more than to compare its state: a factory, a view, a pointwise op."""
    packet = packet_of(node)
    if packet in _FACTORIES:
        return bool(node.meta["val"].numel() > 1)
    cheap = packet in VIEWS or has_tag(node.target, torch.Tag.pointwise) or packet is aten.clone
    inputs = node.all_input_nodes
    return cheap and bool(inputs) and all(n.op == "placeholder" or _stays(n) for n in inputs)


def extract(graph: Graph, inputs: list[fx.Node], outputs: list[Any]) -> Callable[..., Any]:
    """Return the part of the graph that computes ``outputs`` from ``inputs`` as a function."""
    part = fx.Graph()
    copies = {node: known(part.placeholder(node.name), node.meta["val"]) for node in inputs}
    needed = reached([n for n in outputs if n is not None], lambda n: [] if n in copies else n.all_input_nodes)
    for node in graph.body.nodes:
        if node in needed and node not in copies:
            copies[node] = builtin(part.node_copy(node, copies.__getitem__))
    part.output(tuple(copies.get(node) for node in outputs))
    _in_place(part)
    part.lint()
    return compiled(part)


def builtin(node: fx.Node) -> fx.Node:
    """Return a node that calls the same function by the cheaper door, if there is one.

    Calls through ``torch.ops`` parse their arguments in Python. The functions of ``torch`` that C++ makes have the same
    names and arguments, but take no number for a first tensor, and no None in a list.
    """
    target, first = node.target, node.args[0] if node.args else None
    parts = [*first] if isinstance(first, (list, tuple)) else [first]
    has_none = any(isinstance(given, (list, tuple)) and None in given for given in node.args)
    is_tensor = any(isinstance(part, fx.Node) for part in parts)
    if is_tensor and not has_none and getattr(target, "namespace", "") == "aten":
        function = getattr(torch, op_name(target), None)
        node.target = _VIEWS_OR_COPIES.get(target) or (function if inspect.isbuiltin(function) else target)
    return node


def _in_place(part: fx.Graph) -> None:
    """Have sums and products written to the result of a convolution that nothing else reads: fresh memory is slow."""
    own: set[Any] = set()  # results in memory that nothing else looks at
    for node in part.nodes:
        if op_name(node.target) in _FRESH or bound(node.target):
            own.add(node)
        elif node.target in _IN_PLACE and not node.kwargs and isinstance(node.args[1], fx.Node):
            first, result = (n.meta["val"] for n in (node.args[0], node))
            alike = first.shape == result.shape and first.dtype == result.dtype
            if node.args[0] in own and len(node.args[0].users) == 1 and alike:
                node.target = _IN_PLACE[node.target]
                own.add(node)


def value_of_state(graph: Graph, node: fx.Node) -> Callable[..., Any]:
    """Return the value of a node that depends on nothing but the state, as a function of that."""
    return extract(graph, graph.placeholders[: len(graph.state)], [node])
