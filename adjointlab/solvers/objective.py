"""The objective of non-linear least squares at a point: its value, its gradient, and the linear model of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from adjointlab.blocks import identity, weighted_gram
from adjointlab.jacobians import Jacobian
from adjointlab.operators import LinearOperator
from adjointlab.precondition.spectra import auto
from adjointlab.solvers.conjugate_gradients import cg
from adjointlab.solvers.normal_equations import cgls
from adjointlab.solvers.problem import Preconditioner
from adjointlab.solvers.solution import REASONS, Status
from adjointlab.space.algebra import added, scaled
from adjointlab.terms import Penalty, stacked, stacked_weight

_ROUNDING = 8  # units
_FAULTS = (Status.M_NOT_FINITE, Status.M_NOT_ADJOINT, Status.M_NOT_POSITIVE)


@dataclass(frozen=True)
class Inner:
    """How the linear problem of a step is solved: in at most so many steps, with the gram or not, and with which M."""

    most: int
    normal: bool = False
    precondition: Preconditioner[Any] | None = None


@dataclass(frozen=True)
class Objective:
    """``½‖f(x) − y‖²_W + ½ Σ λ ‖Lx − b‖²``, apart from f: as ``½‖r − S d‖²`` in the norm of a weight."""

    y: Any
    weight: LinearOperator | None
    penalties: tuple[Penalty, ...]

    def residual(self, value: Any, x: Any) -> Any:
        """Return the residuals ``(y − f(x), b − Lx, …)``; without penalties, the first one alone."""
        apart = added(self.y, scaled(-1, value))
        rest = [scaled(-1, penalty.residual(x)) for penalty in self.penalties]
        return (apart, *rest) if rest else apart


@dataclass(frozen=True)
class Iterate:
    """The objective at a point, with its gradient and its linear model."""

    objective: Objective
    J: Jacobian
    x: Any

    @cached_property
    def S(self) -> LinearOperator:
        """From steps to changes of the residuals."""
        return stacked(self.J, self.objective.penalties)

    @cached_property
    def weight(self) -> LinearOperator | None:
        """Of the residuals."""
        found: LinearOperator | None = stacked_weight(self.J, self.objective.weight, self.objective.penalties)
        return found

    @cached_property
    def residual(self) -> Any:
        """The residuals."""
        return self.objective.residual(self.J.value, self.x)

    @cached_property
    def _weighted(self) -> Any:
        return self.residual if self.weight is None else self.weight(self.residual)

    @cached_property
    def value(self) -> float:
        """The objective."""
        return float(self.S.codomain.inner(self.residual, self._weighted).real) / 2

    @cached_property
    def noise(self) -> float:
        """How far rounding moves the objective: the residual is a difference, and as uncertain as ``f(x)``."""
        value, W = self.J.value, self.objective.weight
        size = math.sqrt(max(float(self.J.codomain.inner(value, value if W is None else W(value)).real), 0.0))
        apart, eps = math.sqrt(2 * max(self.value, 0.0)), self.J.codomain.eps
        return _ROUNDING * eps * (self.value + size * (apart + eps * size))

    @cached_property
    def descent(self) -> Any:
        """The negative gradient ``SᴴWr``."""
        return self.S.H(self._weighted)

    @cached_property
    def slope(self) -> float:
        """The norm of the gradient."""
        return float(self.J.domain.norm(self.descent))

    def step(self, forcing: float, inner: Inner, damp: float = 0.0) -> Any:
        """Return the step that minimises the damped model, up to a part of the gradient, or why M permits none."""
        M, S, W = inner.precondition, self.S, self.weight
        if inner.normal:
            M = auto(S, weight=W, damp=damp) if isinstance(M, str) and M == "auto" else M
            H = self.hessian if not damp else self.hessian + damp**2 * identity(S.domain)
            found = cg(H, self.descent, precondition=M, tol=forcing, maxiter=inner.most)
        else:
            found = cgls(S, self.residual, weight=W, damp=damp, precondition=M, tol=forcing, maxiter=inner.most)
        faults = [status for status in _FAULTS if REASONS[status] in found.reason]
        return faults[0] if faults and not bool(torch.as_tensor(found.iterations).any()) else found.x

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
        """Return ``‖S d‖²_W``."""
        image = self.S(d)
        return float(self.S.codomain.inner(image, image if self.weight is None else self.weight(image)).real)

    def moved(self, d: Any, length: float = 1.0) -> Iterate:
        """Return the iterate after a step."""
        x = added(self.x, d if length == 1 else scaled(length, d))
        return replace(self, J=self.J.at(x), x=x)
