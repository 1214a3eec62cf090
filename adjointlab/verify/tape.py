"""A program on tensors that is run operation by operation, so that operations can be replaced or exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.runtime.program import canonical
from adjointlab.verify.checked_map import Tensors

Function = Callable[[Tensors], Tensors]


class Tape:
    """A graph that is run node by node, so that operations on y can be replaced or exchanged."""

    def __init__(self, graph: Graph, state: Tensors) -> None:
        self.graph = graph
        self.known: dict[fx.Node, Any] = dict(zip(graph.placeholders, state, strict=False))
        self.steps: list[fx.Node] = []  # what depends on y, in order
        inputs = set(graph.inputs)
        for node in graph.body.nodes:
            if node.op != "call_function":
                continue
            if any(operand in inputs for operand in node.all_input_nodes):
                self.steps.append(node)
                inputs.add(node)
            else:
                self.known[node] = self.call(node, self.known)

    def operand(self, node: fx.Node) -> fx.Node | None:
        """Return the operand that depends on y, if there is one only."""
        some = [n for n in node.all_input_nodes if n in self.graph.inputs or n in self.steps]
        return some[0] if len(some) == 1 else None

    @staticmethod
    def call(node: fx.Node, values: dict[fx.Node, Any], **changes: Any) -> Any:
        """Return the result of an operation, with some arguments replaced."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        for place, value in changes.get("args", {}).items():
            args = (*args[:place], value, *args[place + 1 :])
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        return value.resolve_conj() if isinstance(value, Tensor) else value

    def changed(self, changes: dict[fx.Node, dict[int, Any] | None]) -> Function:
        """Return the function with some arguments of some operations replaced; None leaves an operation out."""

        def run(y: Tensors) -> Tensors:
            values = {**self.known, **dict(zip(self.graph.inputs, map(canonical, y), strict=True))}
            for node in self.steps:
                change = changes.get(node, {})
                operand = self.operand(node)
                if change is None and operand is not None:
                    values[node] = values[operand]
                else:
                    values[node] = self.call(node, values, args=change or {})
            return tuple(values[node] for node in self.graph.outputs)

        return run

    def reordered(self, order: list[fx.Node]) -> Function:
        """Return the function of a chain whose operations are run in another order."""

        def run(y: Tensors) -> Tensors:
            value: Any = canonical(y[0])
            for node in order:
                value = self.call(node, {**self.known, self.operand(node): value})  # type: ignore[dict-item]
            return (value,)

        return run


def packet_of(node: fx.Node) -> Any:
    """Return the operation of a node, whatever its overload."""
    return getattr(node.target, "overloadpacket", None)


__all__ = ["Function", "Tape", "packet_of"]
