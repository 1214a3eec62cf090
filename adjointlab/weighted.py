"""Operators between spaces with weights, ``W_X⁻¹ Aᴴ W_Y``, and the same maps between the spaces without them."""

from __future__ import annotations

from adjointlab import algebra
from adjointlab.notation import POWER, Notation
from adjointlab.operators import LinearOperator, adjoint_of, derived, made, product
from adjointlab.space import Space
from adjointlab.space.algebra import Weighing
from adjointlab.typed import X, Y


def in_spaces(plain: LinearOperator[X, Y], domain: Space[X], codomain: Space[Y]) -> LinearOperator[X, Y]:
    """Return an operator between spaces without weights as one between equal spaces with weights: ``W_X⁻¹ Aᴴ W_Y``."""
    if domain.weight is codomain.weight is None:
        return plain
    operator: LinearOperator[X, Y] = derived(
        plain, lambda y: operator.domain.unweigh(plain.H(operator.codomain.weigh(y))), domain, codomain,
        lambda: (in_spaces, (plain, operator.domain, operator.codomain)), plain, notation=Notation("{}", POWER + 1),
        rows=(
            lambda s: in_spaces(plain.selected(s), operator.domain, s.of(operator.codomain)),
            lambda s: in_spaces(plain.H.selected(s), operator.codomain, s.of(operator.domain)),
        ),
    )  # fmt: skip
    return operator


def without_weights(a: LinearOperator[X, Y]) -> LinearOperator[X, Y]:
    """Return the same map between the spaces without weights, the adjoint being the plain one: ``W_X Aᴴ W_Y⁻¹``."""
    if a.domain.weight is a.codomain.weight is None:
        return a
    function, arguments = a.recipe
    if function is adjoint_of:
        return without_weights(arguments[0]).H
    if function is in_spaces:
        return arguments[0]  # type: ignore[no-any-return]
    if function is product:
        return product(without_weights(arguments[0]), without_weights(arguments[1]))
    if function is algebra.multiple_of:
        scalar, part, *inverse = arguments
        return made(algebra.multiple_of, scalar, without_weights(part), *inverse)
    return derived(
        a, lambda y: a.domain.weigh(a.H(a.codomain.unweigh(y))), a.domain.plain, a.codomain.plain,
        (without_weights, (a,)), a, notation=Notation("{}", POWER + 1),
    )  # fmt: skip


def weighing(space: Space[X], *, inverse: bool = False) -> LinearOperator[X, X]:
    """Return ``x ↦ Wx``, or ``x ↦ W⁻¹x``, on the space without its weight."""
    return operator_of(Weighing(space, inverse=inverse))


def operator_of(weighing: Weighing) -> LinearOperator:
    """Return the operator of a weight, or of its inverse, which moves with it."""
    return derived(
        weighing, weighing, weighing.domain, weighing.domain, lambda: (operator_of, (weighing,)), weighing,
        notation=Notation(meaning=f"the weight of {weighing.space}"),
    )  # fmt: skip
