"""Factors that do not depend on the input meet before it, where it is smallest: ``f ⊙ (g ⊙ x) = (f g) ⊙ x``.

The chain rule multiplies by one derivative after the other. At a point each is known, and so is their product. A factor
that is the same along a dimension goes out of sums along it, ``Σᵢ f ⊙ xᵢ = f ⊙ Σᵢ xᵢ``, and before x is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from adjointlab.transpose.graph.edit import call, clean, dependents
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.passes.gram_terms import dims_of, extent, factor_of, value, whose_real_part

aten = torch.ops.aten
Factors = tuple[Any, ...]  # nodes and numbers
_RESHAPES = {aten.view.default, aten.reshape.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default}


def factor(graph: Graph, order: dict[fx.Node, float]) -> None:
    """Have factors that do not depend on the inputs be multiplied by each other first, in an order, in place."""
    products = _Products(graph.body, dependents(graph.inputs), order)
    for node in list(graph.body.nodes):
        with graph.body.inserting_before(node):
            found = products.rewritten(node) if node in products.free and node.op == "call_function" else None
        if found is not None and (value(found).shape, value(found).dtype) == (value(node).shape, value(node).dtype):
            node.replace_all_uses_with(found)
            graph.body.erase_node(node)
    clean(graph.body)


@dataclass(frozen=True)
class _Products:
    """The products among the nodes of a graph that depend on its inputs, and the calls that are made for them."""

    body: fx.Graph
    free: set[fx.Node]
    order: dict[fx.Node, float]  # of factors
    known: dict[fx.Node, tuple[fx.Node, Factors]] = field(default_factory=dict)  # products, by x and the factors
    made: dict[Any, fx.Node] = field(default_factory=dict)  # calls, by what they are of

    def rewritten(self, node: Any) -> fx.Node | None:
        """Return the node that replaces another; None to leave it."""
        found = factor_of(node, lambda n: n not in self.free)
        operands = None if found is None else (found[0], _number(found[1]))
        if operands is not None and _is_of_one_precision(node, operands):
            return self.times(*operands)
        if node.kwargs or not isinstance(node.args[0], fx.Node) or node.args[0] not in self.known:
            return None
        x, factors = self.known[node.args[0]]
        if node.target is aten.sum.dim_IntList and node.args[1]:
            dims, keeps = dims_of(node.args[1], node.args[0]), len(node.args) > 2 and bool(node.args[2])
            inner = [f for f in factors if not _passes(f, node.args[0], dims, keeps=keeps)]
            rest = self.product(x, inner) if len(inner) < len(factors) else node.args[0]
            if rest is not node.args[0] and value(rest).ndim == value(node.args[0]).ndim:
                outer = [f for f in factors if f not in inner]
                return self.product(self.call(node.target, rest, *node.args[1:]), outer)
        is_same = node.target in _RESHAPES and _core(value(node).shape) == _core(value(x).shape)
        if is_same and all(_core(_shape(f)) == _shape(f) and len(_shape(f)) <= value(node).ndim for f in factors):
            return self.product(self.call(aten.view.default, x, list(value(node).shape)), factors)
        return None

    def call(self, target: Any, *args: Any) -> fx.Node:
        """Add a call that depends on the inputs, once."""
        key = target, *((type(a), tuple(a) if isinstance(a, list) else a) for a in args)  # 1 and 1 + 0j are equal
        if key not in self.made:
            self.made[key] = call(self.body, target, *args)
            self.free.add(self.made[key])
        return self.made[key]

    def takes(self, node: Any, factor: Any) -> bool:
        """Return whether a factor meets another one in a node."""
        if node in self.known:
            return True
        if len(node.users) > 1:
            return False
        if node.target in {aten.add.Tensor, aten.sub.Tensor} and not node.kwargs:
            alike = all(isinstance(a, fx.Node) and value(a).dtype == value(node).dtype for a in node.args)
            return alike and _fits(factor, value(node).shape) and all(self.takes(a, factor) for a in node.args)
        whole = whose_real_part(node)
        return whole is not None and len(whole.users) == 1 and not _is_complex(factor) and self.takes(whole, factor)

    def times(self, node: Any, factor: Any) -> fx.Node:
        """Return the product of a node and a factor."""
        if node in self.known or not self.takes(node, factor):
            x, factors = self.known.get(node, (node, ()))
            return self.product(x, (*factors, *self.primes(factor)))
        if node.target is aten.select.int:
            pair = self.call(aten.view_as_real.default, self.times(whose_real_part(node), factor))
            return self.call(aten.select.int, pair, *node.args[1:])
        return self.call(node.target, *[self.times(a, factor) for a in node.args])

    def primes(self, factor: Any) -> Factors:
        """Return a factor as several, if some of them are smaller."""
        found = self.parts(factor)
        return found if any(isinstance(f, fx.Node) and _numel(f) < _numel(factor) for f in found) else (factor,)

    def parts(self, factor: Any) -> Factors:
        """Return a factor that does not depend on the inputs as a product."""
        if not isinstance(factor, fx.Node) or not _is_of_one_precision(factor, factor.all_input_nodes):
            return (factor,)
        if factor.target in {aten.mul.Tensor, aten.mul.Scalar}:
            return tuple(part for operand in factor.args for part in self.parts(operand))
        if factor.target is aten.neg.default:
            return (-1, *self.parts(factor.args[0]))
        if factor.target is aten.pow.Tensor_Scalar and factor.args[1] == 1:
            return self.parts(factor.args[0])
        if factor.target is not aten.div.Tensor or factor.kwargs:
            return (factor,)
        above: Any = factor.args[0]
        below: Any = factor.args[1]
        if not isinstance(below, fx.Node):
            return (*self.parts(above), 1 / below)
        inverse = self.fixed(aten.reciprocal.default, below)
        self.order[inverse] = self.order.get(below, -1) + 0.5
        return (*self.parts(above), inverse)

    def whole(self, factors: Sequence[Any]) -> list[Any]:
        """Return factors with ``|z| sgn z = z``."""
        for sign in factors:
            inner: Any = sign.args[0] if isinstance(sign, fx.Node) and sign.target is aten._conj.default else sign
            z: Any = inner.args[0] if isinstance(inner, fx.Node) and inner.target is aten.sgn.default else None
            for other in factors if z is not None else ():
                parts = self.parts(other)
                modulus = [p for p in parts if _is_modulus(p, z)]
                if len(modulus) == 1:
                    found = z if inner is sign else self.fixed(aten._conj.default, z)
                    self.order.setdefault(found, self.order.get(inner, -1))
                    rest = [f for f in factors if f is not sign and f is not other]
                    return [*rest, *(p for p in parts if p is not modulus[0]), found]
        return list(factors)

    def product(self, x: fx.Node, factors: Sequence[Any]) -> fx.Node:
        """Return the product of a node and factors: first with those that are no larger than it, then with others."""
        factors = self.whole(factors)
        shape = torch.broadcast_shapes(value(x).shape, *map(_shape, factors))
        source: Any = x.args[0] if x.target is aten.expand.default else x
        is_whole = math.prod(shape) == _numel(source)
        small = [f for f in factors if is_whole or _fits(f, value(source).shape)]
        rest = [f for f in factors if f not in small]
        if rest and not any(isinstance(f, fx.Node) for f in small):
            small, rest = [], list(factors)
        found, before = self.known.get(source, (source, ())) if source is not x else (source, ())
        if small or before:
            found = self.call(aten.mul.Tensor, found, self.multiplied([*before, *small]))
        if torch.broadcast_shapes(value(found).shape, *map(_shape, rest)) != shape:
            found = self.call(aten.expand.default, found, list(value(x).shape))
        if rest:
            found = self.call(aten.mul.Tensor, found, self.multiplied(rest))
        if factors:
            self.known[found] = x, tuple(factors)
        return found  # type: ignore[no-any-return]

    def multiplied(self, factors: Sequence[Any]) -> Any:
        """Return the product of some factors; conjugates come last, so that Aᴴ and A have the same ones."""
        nodes: list[Any] = [f for f in factors if isinstance(f, fx.Node)]
        number: Any = math.prod(f for f in factors if not isinstance(f, fx.Node))
        nodes.sort(key=lambda n: (_numel(n), _is_complex(n), self.order.get(n, -1)))
        conjugates = [node for node in nodes if _is_complex(node)]
        if conjugates and all(node.target is aten._conj.default for node in conjugates):
            plain = [node.args[0] if node in conjugates else node for node in nodes]
            self.order.update({node.args[0]: self.order.get(node, -1) for node in conjugates})
            return self.fixed(aten._conj.default, self.multiplied([*plain, number.conjugate()]))
        if not nodes:
            return number
        found, *others = nodes
        is_idle = number == 1 and (not _is_complex(number) or bool(conjugates))  # else it makes real ones complex
        for each in (*([] if is_idle else [number]), *others):
            found = self.fixed(aten.mul.Tensor, found, each)
        return found

    def fixed(self, target: Any, *args: Any) -> fx.Node:
        """Add a call that does not depend on the inputs."""
        found = self.call(target, *args)
        self.free.discard(found)
        return found


def _is_modulus(factor: Any, z: Any) -> bool:
    return isinstance(factor, fx.Node) and factor.target is aten.abs.default and factor.args[0] is z


def _number(factor: Any) -> Any:
    """Return a factor that is the conjugate of a number as a number."""
    is_one = isinstance(factor, fx.Node) and factor.target is aten._conj.default and isinstance(factor.args[0], complex)
    return factor.args[0].conjugate() if is_one else factor


def _is_complex(factor: Any) -> bool:
    return value(factor).is_complex() if isinstance(factor, fx.Node) else isinstance(factor, complex)


def _shape(factor: Any) -> torch.Size:
    return value(factor).shape if isinstance(factor, fx.Node) else torch.Size()


def _numel(factor: Any) -> int:
    return _shape(factor).numel()


def _core(shape: Sequence[int]) -> torch.Size:
    """Return a shape without the ones at its beginning."""
    first = next((i for i, n in enumerate(shape) if n != 1), len(shape))
    return torch.Size(shape[first:])


def _fits(factor: Any, shape: Sequence[int]) -> bool:
    """Return whether the product with something of a shape has that shape."""
    return bool(torch.broadcast_shapes(_shape(factor), shape) == tuple(shape))


def _passes(factor: Any, node: fx.Node, dims: Sequence[int], *, keeps: bool) -> bool:
    """Return whether a factor of a node is the same along dimensions, and fits what is left when they are summed."""
    alone = keeps or len(_shape(factor)) < value(node).ndim - max(dims)
    return alone and all(extent(factor, node, d) == 1 for d in dims)


def _is_of_one_precision(node: fx.Node, operands: Iterable[Any]) -> bool:
    """Return whether a product rounds as its operands do."""
    dtypes = [value(each).dtype for each in (node, *operands) if isinstance(each, fx.Node)]
    return all(dtype.is_floating_point or dtype.is_complex for dtype in dtypes) and (
        len({dtype.to_real() for dtype in dtypes}) == 1
    )
