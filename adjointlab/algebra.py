"""The algebra of operators as pairs of closures: ``(AB)ᴴ = BᴴAᴴ``, ``(A + B)ᴴ = Aᴴ + Bᴴ``, ``(cA)ᴴ = c̄Aᴴ``.

The closures look up their operators at each call, so that these may move.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adjointlab.errors import ConvergenceWarning, SpaceMismatchError
from adjointlab.notation import POWER, PRODUCT, SUM, Notation, multiple, number
from adjointlab.space import Space
from adjointlab.space.algebra import ViewedAsReal, added, common, conjugated, require_scalar, scaled, viewed_as_real
from adjointlab.space.selection import Selection

Operator = Any  # a LinearOperator, which is made of what is here
Map = Callable[[Any], Any]
RowsOf = Callable[[Selection], Operator]  # from rows of the result to the operator of them


@dataclass(frozen=True)
class Made:
    """The parts of an operator that is made of others; ``rows`` are None where they are selected from whole results."""

    function: Map
    adjoint: Map
    domain: Space
    codomain: Space
    operators: tuple[Operator, ...]
    notation: Notation
    rows: tuple[RowsOf | None, RowsOf | None] = (None, None)


def product(a: Operator, b: Operator) -> Made:
    """Return ``x ↦ ABx``."""
    common(a.domain, b.codomain, "the domain of A to be the codomain of B in A @ B", "swap them, or reshape between")
    free = min(a.domain.batch_dims, b.domain.batch_dims)
    return Made(
        lambda x: a(b(x)), lambda y: b.H(a.H(y)), b.domain.with_batch_dims(free), a.codomain.with_batch_dims(free),
        (a, b), Notation("{} {}", PRODUCT, PRODUCT),
        (lambda s: a.selected(s) @ b, lambda s: b.H.selected(s) @ a.H),
    )  # fmt: skip


def total(a: Operator, b: Operator) -> Made:
    """Return ``x ↦ Ax + Bx``."""
    domain = common(a.domain, b.domain, "A and B of A + B to have one domain", "bring them to the same space")
    codomain = common(a.codomain, b.codomain, "A and B of A + B to have one codomain", "bring them to the same space")
    return Made(
        lambda x: added(a(x), b(x)), lambda y: added(a.H(y), b.H(y)), domain, codomain, (a, b),
        Notation("{} + {}", SUM),
        (lambda s: a.selected(s) + b.selected(s), lambda s: a.H.selected(s) + b.H.selected(s)),
    )  # fmt: skip


def _conjugate(scalar: Any) -> Any:
    return scalar.conj() if isinstance(scalar, Tensor) else scalar.conjugate()


def multiple_of(scalar: Any, a: Operator, inverse: bool = False) -> Made:
    """Return ``x ↦ cAx`` or, if ``inverse``, ``x ↦ Ax / c``, with c as it is at each call."""
    require_scalar(scalar, a.codomain)

    def times(c: Any, y: Any) -> Any:
        return scaled(1 / c if inverse else c, y)

    return Made(
        lambda x: times(scalar, a(x)), lambda y: a.H(times(_conjugate(scalar), y)), a.domain, a.codomain, (a,),
        Notation("{} / c", PRODUCT, PRODUCT) if inverse else multiple(scalar),
        (lambda s: a.selected(s) / scalar if inverse else a.selected(s).__rmul__(scalar), None),
    )  # fmt: skip


def of_multiple(a: Operator, scalar: Any) -> Made:
    """Return ``x ↦ A(cx)``."""
    require_scalar(scalar, a.domain)
    return Made(
        lambda x: a(scaled(scalar, x)), lambda y: scaled(_conjugate(scalar), a.H(y)), a.domain, a.codomain, (a,),
        Notation(f"{{}} · {number(scalar)}", PRODUCT, PRODUCT), (lambda s: a.selected(s) * scalar, None),
    )  # fmt: skip


def transpose(a: Operator) -> Made:
    """Return ``y ↦ conj(Aᴴ conj(y))``."""
    for space in (a.domain, a.codomain):
        if space.is_complex and space.weight is not None and not space.weight.is_diagonal:
            raise SpaceMismatchError(
                f"expected complex spaces with numbers as weights for a transpose, got {space}: use A.H"
            )
    return Made(
        lambda y: conjugated(a.H(conjugated(y))), lambda x: conjugated(a(conjugated(x))), a.codomain, a.domain, (a,),
        Notation("{}ᵀ", POWER, POWER + 1), (lambda s: a.H.selected(s).H.T, None),
    )  # fmt: skip


def real_view(a: Operator) -> Made:
    """Return A on pairs of real numbers in place of complex ones."""
    spaces = viewed_as_real(a.domain), viewed_as_real(a.codomain)
    return Made(ViewedAsReal(a), ViewedAsReal(a.H), *spaces, (a,), Notation("real_view({})"))


def inverse(a: Operator, solver: Callable[..., Any], options: dict[str, Any]) -> Made:
    """Return ``y ↦ A⁻¹y`` by a solver."""

    def solved(operator: Operator, b: Any) -> Any:
        solution = solver(operator, b, **options)
        if not bool(torch.as_tensor(solution.converged).all()):
            warnings.warn(f"A.inverse: {solution.reason}", ConvergenceWarning, stacklevel=2)
        return solution.x

    return Made(
        lambda y: solved(a, y), lambda x: solved(a.H, x), a.codomain, a.domain, (a,), Notation("{}⁻¹", POWER, POWER + 1)
    )
