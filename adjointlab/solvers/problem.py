"""The problems to solve, checked and made uniform: offset taken off, weights made operators, batches made explicit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adjointlab.affine import AffineOperator
from adjointlab.blocks import block_diag, identity, vstack
from adjointlab.errors import SpaceMismatchError
from adjointlab.least_squares import LeastSquares
from adjointlab.operators import LinearOperator
from adjointlab.solvers.arithmetic import Vector, Vectors

_MOST_STEPS = 10_000


def detached(vectors: Vectors, element: Any) -> Vector:
    """Return an element as a vector outside every autograd graph."""
    return [v.detach() for v in vectors.vector(element)]


@dataclass(frozen=True)
class Problem:
    """``A x ≈ y`` with optional weights: maps between vectors, none of which writes to what it is given or returns."""

    A: LinearOperator
    y: Any
    weight: LinearOperator | None
    domain: Vectors
    codomain: Vectors

    @staticmethod
    def of(A: LinearOperator | AffineOperator, y: Any, weight: Any = None) -> Problem:
        """Return the problem, with the offset of an affine operator taken off the data."""
        if not isinstance(A, (LinearOperator, AffineOperator)):
            raise SpaceMismatchError(
                f"expected a LinearOperator or AffineOperator, got {type(A).__name__}: wrap it with al.linear_operator"
            )
        leaves = A.codomain.leaves(y, "y")
        batch = tuple(leaves[0].shape[: A.codomain.batch_dims])
        operator = None if weight is None else LeastSquares(A, y, weight).weight
        domain, codomain = Vectors(A.domain, batch), Vectors(A.codomain, batch)
        if isinstance(A, AffineOperator):
            offset = A.codomain.leaves(A(domain.space.zeros()))
            y = A.codomain.unflatten([a - b for a, b in zip(leaves, offset, strict=True)])
            A = A.linear
        return Problem(A, y, operator, domain, codomain)

    def start(self, x0: Any) -> Vector:
        """Return the first iterate, ours to write to."""
        if x0 is None:
            return self.domain.zeros()
        found = tuple(self.domain.space.leaves(x0, "x0")[0].shape[: len(self.domain.batch)])
        if found != self.domain.batch:
            raise SpaceMismatchError(
                f"expected x0 of the batch sizes of the data, {self.domain.batch}, got {found}: nothing is broadcast"
            )
        return self.domain.copy(detached(self.domain, x0))

    def steps(self, maxiter: int | None) -> int:
        """Return the most steps to take: ten for each unknown if none is given, which rounding never needs."""
        if maxiter is None:
            each = 10 * min(self.domain.space.size, self.codomain.space.size) // max(1, math.prod(self.domain.batch))
            return min(_MOST_STEPS, max(10, 2 * each if self.domain.space.is_complex else each))
        if isinstance(maxiter, bool) or not isinstance(maxiter, int) or maxiter < 0:
            raise ValueError(f"expected maxiter to be an integer of 0 or more, got {maxiter!r}")
        return maxiter

    def data(self) -> Vector:
        """Return the data, not ours to write to."""
        return detached(self.codomain, self.y)

    def apply(self, x: Vector) -> Vector:
        """Return ``Ax``."""
        return self.codomain.vector(self.A(self.domain.element(x)))

    def pull_back(self, r: Vector) -> tuple[Vector, Tensor]:
        """Return ``AᴴWr`` and ``‖r‖²_W``."""
        weighted, square = self.weighted(r)
        return self.domain.vector(self.A.H(self.codomain.element(weighted))), square

    def weighted(self, r: Vector) -> tuple[Vector, Tensor]:
        """Return ``Wr`` and ``‖r‖²_W``."""
        wr = r if self.weight is None else self.codomain.vector(self.weight(self.codomain.element(r)))
        return wr, self.codomain.dot(r, wr)

    def normal(self, damp: float) -> Any:
        """Return the map ``x ↦ AᴴWAx + damp² x`` of vectors."""

        def apply(x: Vector) -> Vector:
            s, _ = self.pull_back(self.apply(x))
            return plus(s, damp**2, x)

        return apply

    def damped(self, damp: float) -> Problem:
        """Return the same problem with the damping written as further equations, ``damp · x = 0``."""
        below = damp * identity(self.A.domain)
        A = vstack([self.A, below])
        zero = self.domain.space.zeros()
        weight = None
        if self.weight is not None:
            weight = block_diag([self.weight, identity(self.A.domain)])
        return Problem(A, (self.y, zero), weight, self.domain, Vectors(A.codomain, self.codomain.batch))


def plus(s: Vector, factor: float, x: Vector) -> Vector:
    """Return ``s + factor · x``: s itself if the factor is 0, which may be another's memory."""
    return [torch.add(a, b, alpha=factor) for a, b in zip(s, x, strict=True)] if factor else s


def require(name: str, value: float) -> float:
    """Return a tolerance or a damping as a float."""
    if isinstance(value, (bool, complex, str)) or not 0 <= float(value) < math.inf:
        raise ValueError(f"expected {name} to be a finite number of 0 or more, got {value!r}")
    return float(value)
