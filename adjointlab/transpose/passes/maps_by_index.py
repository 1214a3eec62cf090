"""Regions of a graph that read and add by index, each as one sparse matrix that is made from its state."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import clean, copied, reached, zeros
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.passes.partition import extract, value_of_state
from adjointlab.transpose.passes.sparse_rows import MOVES, RULES, UPSAMPLED, NotByIndexError, Sparse

aten = torch.ops.aten

_INTERPOLATIONS = {
    aten.grid_sampler_2d, aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d,
    aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten.upsample_trilinear3d,
    aten.im2col, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa,
}  # fmt: skip
# Operations for whose sake a region is made a matrix: the others cost a pass over memory by themselves.
_BY_INDEX = {
    *_INTERPOLATIONS, *UPSAMPLED, aten.grid_sampler_2d_backward, aten.index, aten.gather, aten.index_put, aten.scatter_add,
    aten.index_add, aten.index_select, aten.take,
}  # fmt: skip
_DTYPES = {torch.float32, torch.float64, torch.complex64, torch.complex128}
_MOST = 1 << 26  # entries of a matrix: half a gigabyte


@dataclass(frozen=True)
class Region:
    """Nodes that compute one value from one that depends on the input and others that do not."""

    source: fx.Node
    coefficients: list[fx.Node]
    result: fx.Node

    def function(self, graph: Graph) -> Callable[..., Any]:
        """Return the region as a function ``(source, *coefficients) → (result,)``."""
        return extract(graph, [self.source, *self.coefficients], [self.result])


def regions(graph: Graph) -> list[Region]:
    """Return the largest regions of a graph that may be maps by index."""
    dependent = reached(graph.inputs, lambda node: node.users)
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.body.nodes:
        if node in dependent and _is_allowed(node):
            group = [node]
            for operand in node.all_input_nodes:
                if operand in groups and groups[operand] is not group:
                    group = [*groups[operand], *group]
                    for each in group:
                        groups[each] = group
            for each in group:
                groups[each] = group
    found = []
    for group in {id(group): group for group in groups.values()}.values():
        inside = set(group)
        operands = dict.fromkeys(n for node in group for n in node.all_input_nodes if n not in inside)
        sources = [n for n in operands if n in dependent]
        exits = [node for node in group if any(user not in inside for user in node.users)]
        if len(sources) == len(exits) == 1 and not _by_index(inside).isdisjoint(_BY_INDEX):
            found.append(Region(sources[0], [n for n in operands if n not in dependent], exits[0]))
    return found


def _by_index(nodes: set[fx.Node]) -> set[Any]:
    return {getattr(node.target, "overloadpacket", None) for node in nodes}


def _is_allowed(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return node.args[1] == 0 and getattr(node.args[0].target, "overloadpacket", None) is aten.grid_sampler_2d_backward
    packet = getattr(node.target, "overloadpacket", None)
    if packet is aten.grid_sampler_2d_backward:
        return len(node.users) == 1
    value = node.meta.get("val")
    return (packet in RULES or packet in _INTERPOLATIONS) and isinstance(value, Tensor) and value.dtype in _DTYPES


def maps_by_index(graph: Graph, choose: Callable[..., bool]) -> Graph:
    """Return an equal graph in which regions by index are products with sparse matrices, where that is chosen."""
    mapped = copied(graph)
    for node in list(mapped.body.nodes):
        if getattr(node.target, "overloadpacket", None) in {aten.new_zeros, aten.zeros_like}:
            with mapped.body.inserting_before(node):
                node.replace_all_uses_with(zeros(mapped.body, node.meta["val"]))
    clean(mapped.body)
    for region in regions(mapped):
        function = region.function(mapped)
        state = [source.read() for source in mapped.state]
        with torch.no_grad():
            values = [value_of_state(mapped, node)(*state)[0] for node in region.coefficients]
            made = _made(function, region, values)
        if made is None:
            continue
        prefix, matrix = made
        run, shape = _product(region, prefix), region.source.meta["val"]
        x = torch.randn(shape.shape, dtype=shape.dtype, device=shape.device)
        if not choose(lambda: function(x, *values), lambda: run(x, matrix), x.device):
            continue

        def prepack(*values: Tensor, function: Any = function, region: Region = region, prefix: int = prefix) -> Tensor:
            return _matrix(function, region, values, prefix)

        prepack.is_dear = True  # type: ignore[attr-defined]
        prepack.__name__ = "prepack_sparse_map"
        with mapped.body.inserting_before(region.result):
            kept = mapped.body.call_function(prepack, tuple(region.coefficients))
            product = mapped.body.call_function(run, (region.source, kept))
        kept.meta["val"] = product.meta["val"] = region.result.meta["val"]
        region.result.replace_all_uses_with(product)
    clean(mapped.body)
    return mapped


def _made(function: Any, region: Region, values: list[Tensor]) -> tuple[int, Tensor] | None:
    """Return how many leading dimensions a region leaves alone, and its matrix; None where it has none."""
    source, result = region.source.meta["val"].shape, region.result.meta["val"].shape
    same = 0
    while same < min(len(source), len(result)) - 1 and source[same] == result[same]:
        same += 1
    for prefix in range(same, -1, -1):
        if prefix and source[prefix - 1] == 1 and prefix < same:
            continue  # another dimension of size one changes nothing
        try:
            return prefix, _matrix(function, region, values, prefix)
        except NotByIndexError:
            continue
    return None


def _matrix(function: Any, region: Region, values: Any, prefix: int) -> Tensor:
    x = region.source.meta["val"]
    with torch.no_grad():
        like = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        (found,) = function(Sparse.identity(like, prefix), *values)
        if not isinstance(found, Sparse):
            raise NotByIndexError("the result does not depend on the input")
        columns = math.prod(x.shape[prefix:])
        rows = found.rows.compact(columns)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        index = torch.int32 if max(columns, len(rows.value)) < 1 << 31 else torch.int64
        return torch.sparse_csr_tensor(
            rows.start.to(index), rows.column.to(index), rows.value, (len(rows.start) - 1, columns)
        )


def _product(region: Region, prefix: int) -> Callable[[Tensor, Tensor], Tensor]:
    shape = tuple(region.result.meta["val"].shape)
    count = math.prod(shape[:prefix])

    def sparse_map(x: Tensor, matrix: Tensor) -> Tensor:
        if count == 1:
            return (matrix @ x.reshape(-1)).reshape(shape)
        return (matrix @ x.reshape(count, -1).T).T.reshape(shape).contiguous()

    return sparse_map


__all__ = ["MOVES", "maps_by_index"]
