"""A gram ``AᴴA`` as one graph, by equalities: what A does and Aᴴ undoes goes, products with fixed factors meet.

A *factor* is a value that does not depend on the input: products with it are taken entry by entry. A *rule* is an
equality: from a node to one that is equal in exact arithmetic, with its name, or to None where it does not hold. Rules
see nodes that nothing else uses; they are applied until none does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import call, clean, dependents, known, rewritten, zeros
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.passes import strides
from adjointlab.transpose.passes.gram_terms import (
    Fixed,
    Found,
    Rule,
    cast,
    dims_of,
    extent,
    factor_of,
    is_constant,
    made,
    rescaled,
    suffix,
    times,
    value,
    whose_real_part,
)
from adjointlab.transpose.passes.partition import HasNoPiecesError, extract, roots_of

aten = torch.ops.aten


def simplified(graph: Graph, rules: Sequence[Rule], count: int) -> tuple[Graph, tuple[str, ...]]:
    """Return an equal graph, and the names of the rules that made it: none where it is no simpler.

    The first ``count`` inputs are x, the others are fixed.
    """
    given = graph
    graph, names = _simplified(graph, rules, count)
    if names and strides.strided(graph):
        graph = strides.swapped(graph, Fixed(graph, count))
        if strides.strided(graph):  # to transform two dimensions is faster than one whose entries lie apart
            rest = [rule if rule is not transforms else whole_transforms for rule in rules]
            graph, names = _simplified(given, rest, count)
    return (_kept(graph, count) if names else graph), tuple(names)


def _simplified(graph: Graph, rules: Sequence[Rule], count: int) -> tuple[Graph, dict[str, None]]:
    graph, names = rewritten(graph, _plain), dict[str, None]()
    while (name := _applied(graph, rules, count)) is not None:
        names |= {name: None} if name else {}
    return graph, names


def _plain(body: fx.Graph, node: Any) -> fx.Node | None:
    """Write zeros of another node's shape, which is all that is read of it, as zeros; and drop idle expansions."""
    if node.target in {aten.new_zeros.default, aten.zeros_like.default}:
        return zeros(body, value(node))
    is_idle = node.target is aten.expand.default and value(node).shape == value(node.args[0]).shape
    return node.args[0] if is_idle else None


def _applied(graph: Graph, rules: Sequence[Rule], count: int) -> str | None:
    """Apply the first rule that holds, in place; return its name, None where none does."""
    fixed = Fixed(graph, count)
    for node in list(graph.body.nodes):
        is_one = node.op == "call_function" and not fixed(node) and isinstance(node.meta.get("val"), Tensor)
        for rule in rules if is_one else ():
            with graph.body.inserting_before(node):
                found = rule(graph.body, node, fixed)
            if found is not None:
                node.replace_all_uses_with(found[0])
                clean(graph.body)
                return found[1]
    return None


def _kept(graph: Graph, count: int) -> Graph:
    """Return the graph with factors that rules made of the state alone as one call each, kept while the state is."""
    dependent, roots = dependents(graph.inputs[:count]), roots_of(graph)
    inputs = set(graph.inputs)
    for node in list(graph.body.nodes):
        users = [user for user in node.users if user in dependent]
        made = node.op == "call_function" and node not in dependent and bool(users) and "factor" in node.meta
        if made and inputs.isdisjoint(roots[node]) and roots[node]:
            above = sorted(roots[node], key=graph.placeholders.index)
            if sum(value(n).numel() for n in above) <= max(value(user).numel() for user in users):
                with graph.body.inserting_before(node):
                    factor = known(graph.body.call_function(_once(graph, above, node), tuple(above)), node.meta["val"])
                node.replace_all_uses_with(factor)
    clean(graph.body)
    return graph


def _once(graph: Graph, above: list[fx.Node], node: fx.Node) -> Callable[..., Tensor]:
    run = extract(graph, above, [node])

    def factor(*state: Tensor) -> Tensor:
        return run(*state)[0]  # type: ignore[no-any-return]

    factor.is_dear = True  # type: ignore[attr-defined]
    return factor


# -- what rules read off nodes ----------------------------------------------------------------------------------------


def _shifts(node: Any) -> dict[int, int] | None:
    """Return the shift along each dimension of a roll; None for any other node."""
    if node.target is not aten.roll.default or len(node.args) < 3 or not node.args[2]:
        return None
    found: dict[int, int] = {}
    for dim, shift in zip(dims_of(node.args[2], node), node.args[1], strict=True):
        found[dim] = (found.get(dim, 0) + shift) % max(1, value(node).shape[dim])
    return found


def _rolled(body: fx.Graph, source: Any, shifts: dict[int, int]) -> Any:
    shifts = {dim: shift for dim, shift in shifts.items() if shift}
    return call(body, aten.roll.default, source, list(shifts.values()), list(shifts)) if shifts else source


def _transform(node: Any) -> tuple[list[int], int, bool] | None:
    """Return the dimensions, norm and direction of a complex Fourier transform; None for any other node."""
    if node.target is not aten._fft_c2c.default:
        return None
    return dims_of(node.args[1], node), node.args[2], node.args[3]


def _above(node: Any, fixed: Fixed) -> Iterator[tuple[Any, Any]]:
    """Yield the nodes above one that keep its shape and that nothing else uses, with the factor of each product."""
    node = node.args[0]
    while node.op == "call_function" and len(node.users) == 1:
        found = factor_of(node, fixed)
        if found is not None and value(found[0]).shape == value(node).shape:
            yield node, found[1]
            node = found[0]
        elif _transform(node) or _shifts(node):
            yield node, None
            node = node.args[0]
        else:
            return


# -- the rules --------------------------------------------------------------------------------------------------------


def factors(body: fx.Graph, node: Any, fixed: Fixed) -> Found:
    """``f ⊙ (g ⊙ x) = (f g) ⊙ x``."""
    outer = factor_of(node, fixed)
    inner = factor_of(outer[0], fixed) if outer and not fixed(outer[0]) and len(outer[0].users) == 1 else None
    if outer is None or inner is None:
        return None
    product = call(body, aten.mul.Tensor, inner[0], times(body, inner[1], outer[1], value(node)))
    alike = value(product).dtype == value(node).dtype and value(product).shape == value(node).shape
    number = not isinstance(outer[1], fx.Node) or not isinstance(inner[1], fx.Node)
    return (product, "scalar merged" if number else "diagonal · diagonal merged") if alike else None


_LINEAR = {
    aten._fft_c2c.default, aten._fft_r2c.default, aten._fft_c2r.default, aten.roll.default, aten._to_copy.default,
    aten.select.int, aten.view_as_real.default, aten.sum.dim_IntList, aten.slice.Tensor, aten.view.default,
}  # fmt: skip


def numbers(body: fx.Graph, node: Any, fixed: Fixed) -> Found:
    """``F(c x) = c F(x)``: numbers move on, until they meet a factor. That in itself saves nothing, and has no name."""
    found = factor_of(node.args[0], fixed) if node.target in _LINEAR and len(node.args[0].users) == 1 else None
    if found is None or isinstance(found[1], (fx.Node, complex)) or value(found[0]).dtype != value(node.args[0]).dtype:
        return None
    moved = call(body, node.target, found[0], *node.args[1:], **node.kwargs)
    return (moved if found[1] == 1 else call(body, aten.mul.Tensor, moved, found[1])), ""


def shifts_around(body: fx.Graph, node: Any, fixed: Fixed) -> Found:
    """``roll(f ⊙ roll(x, −s), s) = roll(f, s) ⊙ x``, and a shift goes past a diagonal between transforms."""
    for dim, shift in (_shifts(node) or {}).items():
        met = _opposite(node, dim, shift, fixed)
        if met is None:
            continue
        inner, products = met
        for product, factor in products:
            with body.inserting_before(product):
                k = dim - value(product).ndim
                product.replace_input_with(factor, made(call(body, aten.roll.default, factor, [shift], [k])))
        for each in (inner, node):
            with body.inserting_before(each):
                found = _rolled(body, each.args[0], {d: s for d, s in (_shifts(each) or {}).items() if d != dim})
            if each is inner:
                each.replace_all_uses_with(found)
        return found, "roll · roll cancelled"
    return None


def _opposite(node: Any, dim: int, shift: int, fixed: Fixed) -> tuple[Any, list[tuple[Any, Any]]] | None:
    """Return the roll above one that undoes it along a dimension, and the products in between whose factors vary."""
    products: list[tuple[Any, Any]] = []
    between = None  # what is between two transforms commutes with shifts
    for each, factor in _above(node, fixed):
        transform, shifts = _transform(each), _shifts(each)
        if transform is not None and dim in transform[0]:
            if between is not None and between is transform[2]:
                return None
            between = transform[2] if between is None else None
        elif shifts is not None and dim in shifts:
            undone = between is None and (shifts[dim] + shift) % value(node).shape[dim] == 0
            return (each, products) if undone else None
        elif between is None and factor is not None and extent(factor, each, dim) > 1:
            products.append((each, factor))
    return None


def transforms(body: fx.Graph, node: Any, fixed: Fixed, *, some: bool = True) -> Found:
    """``F⁻¹ F = 1`` up to the norms, along each dimension in which all that is between them is the same."""
    outer, blocked, varying = _transform(node), set[int](), list[tuple[Any, Any, int]]()
    for each, factor in _above(node, fixed) if outer is not None else ():
        assert outer is not None
        inner = _transform(each)
        if inner is None:
            for d in outer[0]:
                if extent(factor, each, d) > 1:
                    is_same = fixed.is_constant(factor, d - value(each).ndim)
                    varying, blocked = [*varying, (each, factor, d)], blocked | (set() if is_same else {d})
            blocked |= set(_shifts(each) or ())
            continue
        shared = [d for d in outer[0] if d in inner[0] and d not in blocked]
        if inner[2] is not outer[2] and shared and (some or set(shared) == {*outer[0], *inner[0]}):
            for product, fact in dict.fromkeys((product, fact) for product, fact, _ in varying):
                _narrow(body, product, fact, [d for p, _, d in varying if p is product and d in shared])
            return _cancelled(body, node, each, shared)
        blocked |= set(inner[0])
    return None


def _narrow(body: fx.Graph, product: Any, factor: Any, dims: list[int]) -> None:
    """Have a product read the first entries of a factor that is the same along dimensions, as long as it is."""
    along = [d - value(product).ndim for d in dims]

    def first(tensor: Tensor) -> Tensor:
        for k in along:
            tensor = tensor.narrow(k, 0, 1)
        return tensor

    def first_along(tensor: Tensor) -> Tensor:
        if not all(is_constant(tensor, k) for k in along):
            raise HasNoPiecesError("a factor is not the same along a dimension any more")
        return first(tensor)

    first_along.is_dear = True  # type: ignore[attr-defined]
    with body.inserting_before(product):
        narrow = made(known(body.call_function(first_along, (factor,)), first(value(factor))))
    product.replace_input_with(factor, narrow)


def whole_transforms(body: fx.Graph, node: Any, fixed: Fixed) -> Found:
    """``F⁻¹ F = 1`` in all dimensions at once."""
    return transforms(body, node, fixed, some=False)


def _cancelled(body: fx.Graph, node: Any, inner: Any, shared: list[int]) -> Found:
    """Take dimensions out of two transforms."""
    size, norms = math.prod(value(node).shape[d] for d in shared), list[int]()
    whole = all(set(shared) >= set((_transform(each) or ([],))[0]) for each in (inner, node))
    some = "" if whole else f" along dimension{'s' * (len(shared) > 1)} {', '.join(map(str, shared))}"
    for each in (inner, node):
        dims, norm, forward = _transform(each) or ([], 0, True)
        rest = [d for d in dims if d not in shared]
        norms.append(norm)
        with body.inserting_before(each):
            found: Any = call(body, aten._fft_c2c.default, each.args[0], rest, norm, forward) if rest else each.args[0]
        if each is inner:
            each.replace_all_uses_with(found)
            name = " · ".join(f"{'fft' if way else 'ifft'}{suffix(shared)}" for way in (not forward, forward))
    return rescaled(body, found, norms, size), f"{name} cancelled{some}"


def real_parts(body: fx.Graph, node: Any, fixed: Fixed) -> Found:
    """``Re(f ⊙ x) = Re f ⊙ x`` where x is real."""
    z = whose_real_part(node)
    if z is None or len(z.users) > 1:
        return None
    source, factor = factor_of(z, fixed) or (z, None)
    if source.target is not aten._to_copy.default or len(source.users) > 1:
        return None
    (x,) = source.args
    if value(x).is_complex() or value(x).dtype != value(node).dtype:
        return None
    if isinstance(factor, fx.Node):
        factor = made(call(body, aten.real.default, factor)) if value(factor).is_complex() else factor
    elif isinstance(factor, complex):
        factor = factor.real
    return x if factor is None else call(body, aten.mul.Tensor, x, factor), "real part of a real image dropped"


def conjugates(body: fx.Graph, node: Any, fixed: Fixed) -> Found:
    """The conjugate of the conjugate is the number itself."""
    if node.target is not aten._conj.default:
        return None
    source = node.args[0]
    if source.target is aten.clone.default and len(source.users) == 1:
        source = source.args[0]
    twice = source.target is aten._conj.default and len(source.users) == 1
    return (source.args[0], "") if twice else None


def sums(body: fx.Graph, node: Any, fixed: Fixed) -> Found:
    """``Σᵢ fᵢ ⊙ x = (Σᵢ fᵢ) ⊙ x``."""
    product = node.args[0] if node.target is aten.sum.dim_IntList and not node.kwargs else None
    found = factor_of(product, fixed) if product is not None and len(product.users) == 1 else None
    if found is None or not isinstance(found[1], fx.Node) or not node.args[1]:
        return None
    (x, factor), dims = found, dims_of(node.args[1], product)
    if any(extent(x, product, d) > 1 or extent(factor, product, d) != value(product).shape[d] for d in dims):
        return None
    k = [d - value(product).ndim for d in dims]
    factor = made(call(body, aten.sum.dim_IntList, cast(body, factor, value(node)), k, True))
    total = call(body, aten.mul.Tensor, x, factor)
    shape = list(value(node).shape)
    same = value(total).dtype == value(node).dtype and value(total).numel() == value(node).numel()
    if not same:
        return None
    total = total if list(value(total).shape) == shape else call(body, aten.view.default, total, shape)
    return total, "sum of diagonals merged"


RULES: tuple[Rule, ...] = (numbers, shifts_around, transforms, conjugates, real_parts, factors, sums)
