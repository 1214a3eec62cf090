"""The problem ``Ax ≈ y`` in a uniform form: checked, without offset, with weights as a map and explicit batch sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from adjointlab.affine import AffineOperator, require_operator
from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.solvers.arithmetic import Vector, Vectors, times
from adjointlab.solvers.fourier import FourierBasis
from adjointlab.terms import weight_entries, weight_operator

_MOST_STEPS = 10_000


def detached(vectors: Vectors, element: Any) -> Vector:
    """Return an element as a vector that is detached from autograd."""
    return [v.detach() for v in vectors.vector(element)]


@dataclass(frozen=True)
class Problem:
    """The problem ``Ax ≈ y`` with optional weights; its maps never overwrite their arguments or earlier results."""

    A: LinearOperator
    y: Any
    weight: Callable[[Any], Any] | None
    domain: Vectors
    codomain: Vectors
    damp: Tensor  # of every problem
    basis: FourierBasis | None = None  # in which vectors are coordinates; None: vectors are elements
    gain: float = 1.0  # the operator of the problem is gain · A
    unit: float = 1.0  # its data are unit · y

    @staticmethod
    def of(A: LinearOperator | AffineOperator, y: Any, weight: Any = None, damp: float | Tensor = 0.0) -> Problem:
        """Return the problem; the offset of an affine operator is subtracted from the data."""
        require_operator(A)
        leaves = A.codomain.leaves(y, "y")
        batch = tuple(leaves[0].shape[: A.codomain.batch_dims])
        weigh = None if weight is None else _weighting(A, y, weight)
        domain, codomain = Vectors(A.domain, batch), Vectors(A.codomain, batch)
        if isinstance(A, AffineOperator):
            offset = A.codomain.leaves(A(domain.space.zeros()))
            y = A.codomain.unflatten([a - b for a, b in zip(leaves, offset, strict=True)])
            A = A.linear
        return Problem(A, y, weigh, domain, codomain, _damping(domain, damp))

    def diagonalized(self) -> Problem:
        """Return the problem in the Fourier basis if A is diagonal there and has no weights, else this problem."""
        # The change of basis is an isometry: a solver takes the same steps, with products instead of transforms. But
        # weights are not diagonal in the Fourier basis.
        basis = FourierBasis.of(self.A) if self.weight is None else None
        if basis is None:
            return self
        spectra = Vectors(basis.operator.domain, self.domain.batch)
        return replace(self, A=basis.operator, domain=spectra, codomain=spectra, basis=basis)

    def scaled(self, *, operator: bool = True) -> Problem:
        """Return the problem with data and, if asked for, an operator of about size one, should theirs be extreme."""
        unit = self.codomain.scale_to_one(self.data())
        problem = replace(self, unit=unit)
        if not operator:
            return problem
        gain = self.domain.scale_to_one(problem.pull_back(problem.data())[0])
        return replace(problem, gain=gain, damp=gain * self.damp)

    @property
    def factor(self) -> float:
        """The factor that turns a vector of the scaled problem into x."""
        return self.gain / self.unit

    @property
    def square(self) -> Tensor:
        """``damp²`` of every problem."""
        return self.damp.detach().square()

    @cached_property
    def is_damped(self) -> bool:
        """Whether any problem is damped."""
        return bool((self.damp > 0).any())

    def vector(self, x: Any) -> Vector:
        """Return an element of the domain as a detached vector, which may share the element's memory."""
        found = detached(self.domain, x if self.basis is None else self.basis.spectrum(x))
        return found if self.factor == 1 else [v / self.factor for v in found]

    def element(self, x: Vector) -> Any:
        """Return the element that a vector of the domain represents; both may share memory."""
        x = times(x, self.factor)
        return self.domain.element(x) if self.basis is None else self.basis.element(x)

    def copy(self, x: Vector) -> Any:
        """Return the element that a vector of the domain represents, in separate memory."""
        return self.element(self.domain.copy(x) if self.basis is None else x)

    @property
    def eps(self) -> float:
        """The larger unit roundoff of the two spaces."""
        return max(self.domain.space.eps, self.codomain.space.eps)

    def start(self, x0: Any) -> Vector:
        """Return the first iterate, which the solver may overwrite."""
        if x0 is None:
            return self.domain.zeros()
        space = self.domain.space if self.basis is None else self.basis.space
        found = tuple(space.leaves(x0, "x0")[0].shape[: len(self.domain.batch)])
        if found != self.domain.batch:
            raise SpaceMismatchError(
                f"expected x0 of the batch sizes of the data, {self.domain.batch}, got {found}: nothing is broadcast"
            )
        return self.domain.copy(self.vector(x0))

    def steps(self, maxiter: int | None) -> int:
        """Return the largest number of steps; ten per unknown if not given, which suffices even with rounding."""
        if maxiter is None:
            each = 10 * min(self.domain.space.size, self.codomain.space.size) // max(1, math.prod(self.domain.batch))
            return min(_MOST_STEPS, max(10, 2 * each if self.domain.space.is_complex else each))
        return count("maxiter", maxiter)

    def data(self) -> Vector:
        """Return the data, which the solver must not overwrite."""
        found = detached(self.codomain, self.y if self.basis is None else self.basis.spectrum(self.y))
        return times(found, self.unit)

    def apply(self, x: Vector) -> Vector:
        """Return ``Ax``."""
        return times(self.codomain.vector(self.A(self.domain.element(x))), self.gain)

    def pull_back(self, r: Vector) -> tuple[Vector, Tensor]:
        """Return ``AᴴWr`` and ``‖r‖²_W``."""
        weighted, square = self.weighted(r)
        return times(self.domain.vector(self.A.H(self.codomain.element(weighted))), self.gain), square

    def weighted(self, r: Vector) -> tuple[Vector, Tensor]:
        """Return ``Wr`` and ``‖r‖²_W``."""
        wr = r if self.weight is None else self.codomain.vector(self.weight(self.codomain.element(r)))
        return wr, self.codomain.dot(r, wr)

    def penalised(self, s: Vector, x: Vector) -> Vector:
        """Return ``s − damp² x``; without damping, s itself."""
        return self.domain.plus(s, -self.square, x) if self.is_damped else s

    def system(self, x: Vector) -> tuple[Vector, Tensor]:
        """Return ``Ax`` and ``⟨x, Ax⟩``."""
        image = self.apply(x)
        return image, self.domain.dot(x, image)

    def normal(self, x: Vector) -> tuple[Vector, Tensor]:
        """Return ``Mx`` and ``⟨x, Mx⟩ = ‖Ax‖²_W + damp² ‖x‖²`` for ``M = AᴴWA + damp²``."""
        image, energy = self.pull_back(self.apply(x))
        if self.is_damped:
            image, energy = self.domain.plus(image, self.square, x), energy + self.square * self.domain.dot(x, x)
        return image, energy


def _weighting(A: LinearOperator | AffineOperator, y: Any, weight: Any) -> Callable[[Any], Any]:
    """Return ``r ↦ Wr``; real entries of a diagonal stay real, even if r is complex."""
    if isinstance(weight, LinearOperator):
        return weight_operator(A, weight)
    weight_entries(A, weight)  # raises
    entries = A.codomain.structure.leaves(weight) or []
    if [w.shape for w in entries] != [leaf.shape for leaf in A.codomain.leaves(y)]:
        raise SpaceMismatchError(
            f"expected weights of the batch sizes of the data, got shapes {[tuple(w.shape) for w in entries]}: nothing "
            "is broadcast"
        )

    def weigh(r: Any) -> Any:
        return A.codomain.unflatten([_product(w, leaf) for w, leaf in zip(entries, A.codomain.leaves(r), strict=True)])

    return weigh


def _product(w: Tensor, r: Tensor) -> Tensor:
    if w.is_complex() or not r.is_complex():
        return w * r
    return torch.view_as_complex(w[..., None] * torch.view_as_real(r.resolve_conj()))


def count(name: str, value: int, least: int = 0) -> int:
    """Return a number of steps; raise if it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"expected {name} to be an integer of {least} or more, got {value!r}")
    return value


def nonnegative(name: str, value: float) -> float:
    """Return a tolerance or a damping as a float; raise if it is negative or not finite."""
    if isinstance(value, (bool, complex, str)) or not 0 <= float(value) < math.inf:
        raise ValueError(f"expected {name} to be a finite number of 0 or more, got {value!r}")
    return float(value)


def _damping(domain: Vectors, damp: float | Tensor) -> Tensor:
    """Return the damping of every problem, with the gradient of a tensor; raise if it is none."""
    if not isinstance(damp, Tensor):
        return domain.scalar(nonnegative("damp", damp))
    shape = tuple(damp.shape)
    if damp.is_complex() or damp.dtype == torch.bool or shape not in {(), domain.batch}:
        raise ValueError(
            f"expected damp to be a real number, or a real tensor of the shape () or, one for each problem of the "
            f"batch, {domain.batch}, got {damp.dtype} of the shape {shape}: reshape it, or build A with batch_dims"
        )
    if not bool(((damp >= 0) & (damp < math.inf)).all()):
        raise ValueError(f"expected damp to be finite numbers of 0 or more, got {damp.detach()}: take their absolutes")
    return damp.to(domain.device, torch.float64).expand(domain.batch)
