"""The objective of non-linear least squares at a point: its value, its gradient, and the linear model of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from adjointlab.blocks import block_diag, identity, vstack, weighted_gram
from adjointlab.jacobians import Jacobian
from adjointlab.operators import LinearOperator
from adjointlab.precondition.spectra import auto
from adjointlab.solvers.conjugate_gradients import cg
from adjointlab.solvers.normal_equations import cgls
from adjointlab.solvers.problem import Preconditioner
from adjointlab.solvers.solution import REASONS, Solution, Status
from adjointlab.space.algebra import added, scaled
from adjointlab.terms import Penalty

_ROUNDING = 8  # units
_FAULTS = (Status.M_NOT_FINITE, Status.M_NOT_ADJOINT, Status.M_NOT_POSITIVE)


def _is_rounding(solution: Solution) -> bool:
    return any(REASONS[status] in solution.reason for status in (Status.PRECISION, Status.BREAKDOWN))


@dataclass(frozen=True)
class Inner:
    """How the linear problem of a step is solved: in at most so many steps, with the gram or not, and with which M.

    If ``normal`` is None, with the gram until its rounding shows, and then without.
    """

    most: int
    normal: bool | None = None
    precondition: Preconditioner[Any] | None = None


@dataclass(frozen=True)
class Objective:
    """``½‖f(x) − y‖²_W + ½ Σ λ ‖Lx − b‖²``, apart from f."""

    y: Any
    weight: LinearOperator | None
    penalties: tuple[Penalty, ...]

    def weighted(self, r: Any) -> Any:
        """Return ``Wr``."""
        return r if self.weight is None else self.weight(r)

    @cached_property
    def roots(self) -> list[LinearOperator]:
        """The products with ``√λ``."""
        return [Penalty(each.strength**0.5, each.L).weight(each.L.codomain) for each in self.penalties]


@dataclass(frozen=True)
class Iterate:
    """The objective at a point, with its gradient and its linear model."""

    objective: Objective
    J: Jacobian
    x: Any

    @cached_property
    def residual(self) -> Any:
        """The residual ``y − f(x)``."""
        return added(self.objective.y, scaled(-1, self.J.value))

    @cached_property
    def _apart(self) -> list[Any]:
        return [penalty.residual(self.x) for penalty in self.objective.penalties]

    @cached_property
    def value(self) -> float:
        """The objective."""
        return self._square(self.residual, self._apart) / 2

    def _square(self, r: Any, apart: list[Any]) -> float:
        """Return ``‖r‖²_W + Σ λ ‖l‖²``."""
        total = float(self.J.codomain.inner(r, self.objective.weighted(r)).real)
        for penalty, each in zip(self.objective.penalties, apart, strict=True):
            total += float(penalty.L.codomain.inner(each, penalty.times(each)).real)
        return total

    @cached_property
    def noise(self) -> float:
        """How far rounding moves the objective: the residual is a difference, and as uncertain as ``f(x)``."""
        value = self.J.value
        size = math.sqrt(max(float(self.J.codomain.inner(value, self.objective.weighted(value)).real), 0.0))
        apart, eps = math.sqrt(2 * max(self.value, 0.0)), self.J.codomain.eps
        return _ROUNDING * eps * (self.value + size * (apart + eps * size))

    @cached_property
    def descent(self) -> Any:
        """The negative gradient ``JᴴW(y − f(x)) − Σ λ Lᴴ(Lx − b)``."""
        found = self.J.H(self.objective.weighted(self.residual))
        for penalty, each in zip(self.objective.penalties, self._apart, strict=True):
            found = added(found, scaled(-1, penalty.L.H(penalty.times(each))))
        return found

    @cached_property
    def slope(self) -> float:
        """The norm of the gradient."""
        return float(self.J.domain.norm(self.descent))

    def step(self, forcing: float, inner: Inner, damp: float = 0.0) -> Any:
        """Return the step that minimises the damped model, up to a part of the gradient, or why M permits none."""
        M, (S, W, r) = inner.precondition, self._stack
        found: Solution | None = None
        if inner.normal is not False:
            M = auto(S, weight=W, damp=damp) if isinstance(M, str) and M == "auto" else M
            H = self.hessian if not damp else self.hessian + damp**2 * identity(S.domain)
            found = cg(H, self.descent, precondition=M, tol=forcing, maxiter=inner.most)
        if found is None or (inner.normal is None and _is_rounding(found)):
            x0 = None if found is None else found.x
            found = cgls(S, r, x0=x0, weight=W, damp=damp, precondition=M, tol=forcing, maxiter=inner.most)
        faults = [status for status in _FAULTS if REASONS[status] in found.reason]
        return faults[0] if faults and not bool(torch.as_tensor(found.iterations).any()) else found.x

    @cached_property
    def _stack(self) -> tuple[LinearOperator, LinearOperator | None, Any]:
        """The operator, the weight and the data of the linear problem."""
        S: LinearOperator = self.J
        roots, W, r = self.objective.roots, self.objective.weight, self.residual
        if roots:  # the penalties as data: unlike weights, numbers in S cost no copy of the rest
            S = vstack([S, *[root @ each.L for root, each in zip(roots, self.objective.penalties, strict=True)]])
            W = None if W is None else block_diag([W, *[identity(root.domain) for root in roots]])
            r = (r, *[scaled(-1, root(apart)) for root, apart in zip(roots, self._apart, strict=True)])
        return S, W, r

    @cached_property
    def hessian(self) -> LinearOperator:
        """The Hessian of the model, ``JᴴWJ + Σ λ LᴴL``."""
        W = self.objective.weight
        found = self.J.gram if W is None else weighted_gram(self.J, W)
        for penalty in self.objective.penalties:
            found = found + penalty.hessian
        return found

    def promise(self, d: Any) -> float:
        """Return how far the model falls along a step, ``⟨−g, d⟩ − ½‖S d‖²_W``."""
        return float(self.J.domain.inner(self.descent, d).real) - self.energy(d) / 2

    def energy(self, d: Any) -> float:
        """Return ``‖Jd‖²_W + Σ λ ‖Ld‖²``."""
        return self._square(self.J(d), [penalty.L(d) for penalty in self.objective.penalties])

    def moved(self, d: Any, length: float = 1.0) -> Iterate:
        """Return the iterate after a step."""
        x = added(self.x, d if length == 1 else scaled(length, d))
        return replace(self, J=self.J.at(x), x=x)
