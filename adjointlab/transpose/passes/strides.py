"""Fourier transforms along one dimension, run along the last: there, what is transformed lies side by side in memory.

PyTorch copies what lies apart, on the CPU. A *region* of products, sums and transforms is computed with that dimension
and the last in each other's place where less enters and leaves the region than is transformed in it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from adjointlab.transpose.graph.edit import call, clean, reached
from adjointlab.transpose.graph.ir import Graph

aten = torch.ops.aten

Fixed = Callable[[Any], bool]
_ENTRYWISE = {aten.mul.Tensor, aten.mul.Scalar, aten.add.Tensor, aten.neg.default}


def strided(graph: Graph) -> list[fx.Node]:
    """Return the transforms of several images, on the CPU, of which the last dimension is not transformed."""
    return [
        node for node in graph.body.nodes
        if node.target is aten._fft_c2c.default and node.meta["val"].device.type == "cpu"
        and -1 not in _dims(node) and node.meta["val"].shape[: min(_dims(node))].numel() > 1
    ]  # fmt: skip


def swapped(graph: Graph, fixed: Fixed) -> Graph:
    """Swap dimensions in the regions of a graph around strided transforms, in place, where that pays; return it."""
    pending = strided(graph)
    while pending:
        seed, k = pending[0], _dims(pending[0])
        region = reached([seed], functools.partial(_neighbours, k=k[0], fixed=fixed)) if len(k) == 1 else {seed}
        pending = [node for node in pending if node not in region]
        entries = {n for node in region for n in node.all_input_nodes if n not in region and not fixed(n)}
        exits = {node for node in region if any(user not in region for user in node.users)}
        moved = sum(node.meta["val"].numel() for node in (*entries, *exits))
        gained = sum(n.meta["val"].numel() for n in region if n.target is aten._fft_c2c.default and _dims(n) == k)
        if len(k) == 1 and 2 * moved <= gained:
            _swap(graph, region, k[0], fixed)
    clean(graph.body)
    return graph


def _dims(node: Any, position: int = 1) -> list[int]:
    """Return the dimensions of a transform or a sum, counted from the last."""
    first = node.args[0].meta["val"].ndim
    return [d % first - first for d in node.args[position]]


def _neighbours(node: Any, k: int, fixed: Fixed) -> list[fx.Node]:
    near = [*node.all_input_nodes, *node.users]
    return [n for n in near if not fixed(n) and _is_allowed(n, k)]


def _is_allowed(node: Any, k: int) -> bool:
    """Return whether a node computes the same with two dimensions swapped, once its own are."""
    if node.target in _ENTRYWISE or node.target is aten._fft_c2c.default:
        return bool(node.meta["val"].ndim >= -k)
    if node.target is aten.sum.dim_IntList and node.args[1]:
        return all(d < k for d in _dims(node))
    return False


def _swap(graph: Graph, region: set[fx.Node], k: int, fixed: Fixed) -> None:
    """Compute a region with dimension ``k`` and the last in each other's place."""
    swapped: dict[Any, Any] = {}
    place = {k: -1, -1: k}

    def operand(body: fx.Graph, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if node not in swapped:
            value = node
            for _ in range(-k - node.meta["val"].ndim if node.meta["val"].ndim else 0):
                value = call(body, aten.unsqueeze.default, value, 0)
            if node.meta["val"].ndim:
                value = call(body, aten.transpose.int, value, k, -1)
                value = call(body, aten.clone.default, value, memory_format=torch.contiguous_format)
                value.meta.update({"factor": True} if fixed(node) else {})
            swapped[node] = value
        return swapped[node]

    for node in [n for n in graph.body.nodes if n in region]:
        with graph.body.inserting_before(node):
            args: list[Any] = [operand(graph.body, a) if isinstance(a, fx.Node) else a for a in node.args]
            if node.target not in _ENTRYWISE:
                args[1] = [place.get(d, d) + args[0].meta["val"].ndim for d in _dims(node)]
            swapped[node] = call(graph.body, node.target, *args, **node.kwargs)
            outside = [user for user in node.users if user not in region]
            if outside:
                back = call(graph.body, aten.transpose.int, swapped[node], k, -1)
                back = call(graph.body, aten.clone.default, back, memory_format=torch.contiguous_format)
                for user in outside:
                    user.replace_input_with(node, back)
    for node in [n for n in reversed(graph.body.nodes) if n in region]:
        if not node.users:
            graph.body.erase_node(node)
