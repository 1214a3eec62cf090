"""How the rules of a gram read nodes: which are factors, which is a product with one, what is known of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.modules import read_all
from adjointlab.transpose.graph.edit import call, dependents
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.passes.partition import roots_of, value_of_state

aten = torch.ops.aten
_SEVERAL = torch.empty(0, dtype=torch.uint8, device="meta")


class Fixed:
    """Knowledge of a node's value: whether it does not depend on the input, and what it is now."""

    def __init__(self, graph: Graph, count: int) -> None:
        self._graph, self._dependent = graph, dependents(graph.inputs[:count])
        self._constant: dict[tuple[Any, int], bool] = {}

    def __call__(self, node: Any) -> bool:
        """Return whether a node does not depend on the input."""
        return node not in self._dependent

    def is_constant(self, node: Any, k: int) -> bool:
        """Return whether a factor of the state alone is the same along a dimension, counted from the last, now."""
        if (node, k) not in self._constant:
            inputs, roots = set(self._graph.inputs), roots_of(self._graph)[node]
            known_now = inputs.isdisjoint(roots) and value(node).device.type != "meta"
            self._constant[node, k] = known_now and is_constant(self._value(node), k)
        return self._constant[node, k]

    def _value(self, node: Any) -> Tensor:
        with torch.no_grad():
            return value_of_state(self._graph, node)(*read_all(self._graph.state))[0]  # type: ignore[no-any-return]


Found = tuple[Any, str] | None
Rule = Callable[[fx.Graph, Any, Fixed], Found]


def is_constant(tensor: Tensor, k: int) -> bool:
    """Return whether a tensor is the same along a dimension."""
    return torch.equal(tensor, tensor.narrow(k, 0, 1).expand_as(tensor))


def value(node: Any) -> Tensor:
    """Return the fake value of a node; of one with several, an empty tensor, which is like no other."""
    found = node.meta.get("val")
    return found if isinstance(found, Tensor) else _SEVERAL


def factor_of(node: Any, fixed: Callable[[Any], bool]) -> tuple[Any, Any] | None:
    """Return the operand and the factor, a node or a number, of a product entry by entry; None for any other node."""
    if node.op != "call_function" or node.kwargs:
        return None
    if node.target in {aten.mul.Tensor, aten.mul.Scalar}:
        a, b = node.args
        if not isinstance(b, fx.Node) or (fixed(b) and not fixed(a)):
            return a, b
        return (b, a) if fixed(a) else None
    return (node.args[0], -1) if node.target is aten.neg.default else None


def weighed(node: Any, fixed: Fixed) -> tuple[Any, Any]:
    """Return the operand and the factor of a product of one shape; else a node itself, and None."""
    found = factor_of(node, fixed)
    return found if found is not None and value(found[0]).shape == value(node).shape else (node, None)


def extent(factor: Any, node: Any, dim: int) -> int:
    """Return the size of a factor along a dimension of the product with it."""
    if not isinstance(factor, fx.Node):
        return 1
    shape, k = value(factor).shape, dim - value(node).ndim
    return int(shape[k]) if -k <= len(shape) else 1


def made(node: Any) -> Any:
    """Mark a factor as made by a rule."""
    node.meta["factor"] = True
    return node


def cast(body: fx.Graph, factor: Any, like: Tensor) -> Any:
    """Return a factor in the precision of a value: there, products and sums of factors round as those with it do."""
    dtype = like.real.dtype if like.is_complex() else like.dtype
    dtype = dtype.to_complex() if value(factor).is_complex() else dtype
    return factor if value(factor).dtype == dtype else made(call(body, aten._to_copy.default, factor, dtype=dtype))


def whose_real_part(node: Any) -> Any:
    """Return the complex node of which a node is the real part, and of whose parts nothing else is used; or None."""
    pair = node.args[0] if node.target is aten.select.int else None
    if pair is None or pair.target is not aten.view_as_real.default or len(pair.users) > 1:
        return None
    _, dim, index = node.args
    return pair.args[0] if dim % value(pair).ndim == value(pair).ndim - 1 and index == 0 else None


def times(body: fx.Graph, a: Any, b: Any, like: Tensor) -> Any:
    """Return the product of two factors, in the precision of a value."""
    if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
        return a * b
    a, b = (cast(body, each, like) if isinstance(each, fx.Node) else each for each in (a, b))
    return made(call(body, aten.mul.Tensor, *((a, b) if isinstance(a, fx.Node) else (b, a))))


def rescaled(body: fx.Graph, found: Any, norms: Sequence[int], size: int) -> Any:
    """Return a value times what two transforms of so many points, there and back, make of it with their norms."""
    scale = size * math.prod({0: 1.0, 1: size**-0.5, 2: 1 / size}[norm] for norm in norms)
    return found if math.isclose(scale, 1.0, rel_tol=1e-9) else call(body, aten.mul.Tensor, found, scale)


def suffix(dims: Sequence[int]) -> str:
    """Return the end of the name of a transform along some dimensions."""
    return {1: "", 2: "2"}.get(len(dims), "n")


def dims_of(dims: Sequence[int], node: Any) -> list[int]:
    """Return dimensions of a node, counted from the first."""
    return [d % value(node).ndim for d in dims]
