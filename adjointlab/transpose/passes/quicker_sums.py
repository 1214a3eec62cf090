"""Which sums of pieces are written: those that are faster so than by PyTorch's own operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import dependents, reached
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import VIEWS, op_name, packet_of
from adjointlab.transpose.kernels.select import SumChooser, Timed
from adjointlab.transpose.passes.partition import extract
from adjointlab.transpose.passes.sums import Place

aten = torch.ops.aten

Write = Callable[..., object]
Rule = Callable[[fx.Node, Write, tuple[Any, ...]], bool]

_CALL = 1.5e-6  # seconds of a call that reads nothing
_SHARED = {"_c10d_functional", "adjointlab"}  # operations of several processes, of which all run the same


def worth_writing(
    graph: Graph, ends: set[fx.Node], written: Mapping[fx.Node, fx.Node], choose: SumChooser | None
) -> Rule:
    """Return whether a sum is to be written by a call, instead of computed by the operations of a graph.

    ``ends`` are the nodes that are no sums, ``written`` what those that were decided before became. Without a rule, all
    are written, and in graphs that several processes run, which may decide otherwise. So are those for which times do
    not tell: what depends on the state alone, which is computed once; beside convolutions, of which a sum may become
    part; and where the operations read more than the sum does, which need then not be computed at all.
    """
    dependent = dependents(graph.inputs)
    is_shared = any(getattr(node.target, "namespace", "") in _SHARED for node in graph.body.nodes)
    known: dict[str, bool] = {}  # by layout: blocks of a loop are alike

    def is_worth(node: fx.Node, write: Write, arguments: tuple[Any, ...]) -> bool:
        sources, *layout = arguments
        device = node.meta["val"].device
        if choose is None or is_shared or node not in dependent or device.type == "meta":
            return True
        there = {*ends, *written.values()} - {node}
        region = reached([node], lambda n: [] if n in there else n.all_input_nodes)
        inside = [n for n in graph.body.nodes if n in region and n not in there]
        outside = list(dict.fromkeys([*sources, *(n for n in graph.body.nodes if n in region and n in there)]))
        if not {*sources, *written.values()}.issuperset(outside) or _meets_convolution(node, sources):
            return True
        key = repr(([(n.target, n.meta["val"].shape, n.meta["val"].dtype) for n in inside], layout))
        if key not in known:

            def ways() -> tuple[Timed, Timed]:
                values = [_like(n.meta["val"]) for n in outside]
                run, given = extract(graph, outside, [node]), values[: len(sources)]
                return lambda: run(*values), lambda: write(given, *layout)

            with torch.no_grad():
                known[key] = choose((_of_nodes(inside), _of_sum(node, *layout)), ways, device)
        return known[key]

    return is_worth


def _meets_convolution(node: fx.Node, sources: list[fx.Node]) -> bool:
    beside = [*node.users, *sources, *(operand for source in sources for operand in source.all_input_nodes)]
    return any("convolution" in op_name(n.target) for n in beside)


def _like(value: Tensor) -> Tensor:
    """Return a tensor with the strides of a value: to read every other entry takes its time."""
    extent = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    return torch.ones(max(0, extent), dtype=value.dtype, device=value.device).as_strided(value.shape, value.stride())


def _of_nodes(nodes: list[fx.Node]) -> float:
    """Return the seconds that nodes take by a model: calls, and what they read and write."""
    busy = [node for node in nodes if packet_of(node) not in VIEWS]
    moved = sum(_passes(node) * n.meta["val"].numel() for node in busy for n in {node, *node.all_input_nodes})
    return _seconds(nodes[-1], len(nodes), moved)


def _passes(node: fx.Node) -> int:
    """Return how often a node reads and writes: PyTorch rolls along one dimension after the other."""
    return len(node.args[2]) if node.target is aten.roll.default and len(node.args) > 2 else 1  # type: ignore[arg-type]


def _of_sum(node: fx.Node, layout: tuple[Any, ...], _: tuple[int, ...], bare: tuple[Place, ...]) -> float:
    """Return the same for a sum of pieces, each of which takes two views and a copy or an addition."""
    moved = sum(math.prod(s.stop - s.start for s in place) for place in bare)
    for *_, write, first in layout:
        moved += (2 if first else 3) * math.prod(w.stop - w.start for w in write if isinstance(w, slice))
    return _seconds(node, 1 + 2 * len(bare) + 3 * len(layout), moved)


def _seconds(node: fx.Node, calls: int, entries: int) -> float:
    value: Tensor = node.meta["val"]
    return calls * _CALL + entries * value.dtype.itemsize / (2e10 if value.device.type == "cpu" else 2e12)
