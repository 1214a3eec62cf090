"""A program on tensors that is run operation by operation, so that operations can be replaced or exchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, fx

from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.runtime.program import canonical
from adjointlab.verify.checked_map import Tensors

Function = Callable[[Tensors], Tensors]
Changes = Mapping[fx.Node, dict[int, Any] | None]  # arguments of operations by place; None leaves an operation out
_NONE: dict[int, Any] = {}


class Tape:
    """A graph that is run node by node, so that operations on y can be replaced or exchanged."""

    def __init__(self, graph: Graph, state: Tensors) -> None:
        self.graph = graph
        self.known: dict[fx.Node, Any] = dict(zip(graph.placeholders, state, strict=False))
        # The nodes that depend on y, in order, each with its operand that does, if there is one only.
        self.operands: dict[fx.Node, fx.Node | None] = {}
        for node in graph.body.nodes:
            some = [n for n in node.all_input_nodes if n in graph.inputs or n in self.operands]
            if node.op == "call_function" and some:
                self.operands[node] = some[0] if len(some) == 1 else None
            elif node.op == "call_function":
                self.known[node] = _call(node, self.known)

    def values(self, y: Tensors, steps: Iterable[fx.Node], changes: Changes) -> dict[fx.Node, Any]:
        """Return the results of some operations on y, some of them changed."""
        values = {**self.known, **dict(zip(self.graph.inputs, map(canonical, y), strict=True))}
        for node in steps:
            change, operand = changes.get(node, _NONE), self.operands[node]
            left_out = change is None and operand is not None
            values[node] = values[operand] if left_out else _call(node, values, change or _NONE)  # type: ignore[index]
        return values

    def changed(self, changes: Changes) -> Function:
        """Return the function with some operations changed."""

        def run(y: Tensors) -> Tensors:
            values = self.values(y, self.operands, changes)
            return tuple(values[node] for node in self.graph.outputs)

        return run

    def reordered(self, order: list[fx.Node]) -> Function:
        """Return the function of a chain whose operations are run in another order."""

        def run(y: Tensors) -> Tensors:
            value: Any = canonical(y[0])
            for node in order:
                value = _call(node, {**self.known, self.operands[node]: value})  # type: ignore[dict-item]
            return (value,)

        return run


def _call(node: fx.Node, values: dict[fx.Node, Any], changes: dict[int, Any] = _NONE) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    result = node.target(*(changes.get(place, arg) for place, arg in enumerate(args)), **kwargs)  # type: ignore[operator]
    return result.resolve_conj() if isinstance(result, Tensor) else result
