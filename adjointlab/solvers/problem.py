"""The problem ``Ax ≈ y`` in a uniform form: checked, without offset, with weights as a map and explicit batch sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from adjointlab.affine import AffineOperator, require_operator
from adjointlab.blocks import is_scalar, weighted_gram
from adjointlab.errors import SpaceMismatchError
from adjointlab.numerics import UNITS, allowance, eps_of, norm
from adjointlab.operators import LinearOperator
from adjointlab.precondition.equations import Equations
from adjointlab.precondition.spectra import of_equations
from adjointlab.solvers.arithmetic import Vector, Vectors, as_vector, times
from adjointlab.solvers.fourier import FourierBasis
from adjointlab.terms import weight_entries, weight_operator
from adjointlab.typed import X

Preconditioner: TypeAlias = "LinearOperator[X, X] | Callable[[X], X] | Literal['auto']"  # M
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
    given: Any = None  # the weight, as an operator or entries
    precondition: Callable[[Any], Any] | None = None  # M, about the inverse of the operator of the equations
    lift: float = 1.0  # the preconditioner of the problem is lift · M

    @staticmethod
    def of(
        A: LinearOperator | AffineOperator, y: Any, weight: Any = None, damp: float | Tensor = 0.0, M: Any = None
    ) -> Problem:
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
        problem = Problem(A, y, weigh, domain, codomain, of_each(domain, "damp", damp), given=weight)
        if isinstance(M, str) and M == "auto":
            M = problem._automatic(weight)
        _require_preconditioner(A, M)
        return replace(problem, precondition=M)

    def _automatic(self, weight: Any) -> LinearOperator:
        """Return a preconditioner for a multiple of these equations that is not of extreme size."""
        with torch.no_grad(), self.domain.space.without_autocast():
            gain = self.scaled().gain
        A = self.A if gain == 1 else gain * self.A
        return of_equations(Equations(A, weight, gain * self.damp.detach(), self.domain.batch))

    def diagonalized(self) -> Problem:
        """Return the problem in the Fourier basis if all of its maps are diagonal there, else this problem."""
        # The change of basis is an isometry: a solver takes the same steps, with products instead of transforms. But
        # weights are not diagonal in the Fourier basis, and few preconditioners are.
        basis, M = FourierBasis.of(self.A) if self.weight is None else None, self.precondition
        if basis is None:
            return self
        if M is not None:
            other = FourierBasis.of(M) if isinstance(M, LinearOperator) else None
            if other is None:
                return self
            M = other.operator
        spectra = Vectors(basis.operator.domain, self.domain.batch)
        return replace(self, A=basis.operator, domain=spectra, codomain=spectra, basis=basis, precondition=M)

    def scaled(self, *, operator: bool = True) -> Problem:
        """Return the problem with data and, if asked for, an operator of about size one, should theirs be extreme."""
        unit = self.codomain.scale_to_one(self.data())
        problem = replace(self, unit=unit)
        if not operator:
            return problem
        gain = self.domain.scale_to_one(problem.pull_back(problem.data())[0])
        return replace(problem, gain=gain, damp=gain * self.damp)

    def leveled(self) -> Problem:
        """Return the problem with a preconditioner that keeps the size of vectors about, should its own be extreme."""
        if self.precondition is None:
            return self
        found = self.preconditioned(self.probe(0))[0]
        return replace(self, lift=self.lift * self.domain.scale_to_one(found))

    def probe(self, seed: int) -> Vector:
        """Return a random vector of the domain."""
        return self.domain.vector(self.domain.space.randn(torch.Generator().manual_seed(seed)))

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

    def preconditioned(self, s: Vector) -> tuple[Vector, Tensor]:
        """Return ``Ms``, which may share memory with s, and ``⟨s, Ms⟩``; s itself without a preconditioner."""
        if self.precondition is None:
            return s, self.domain.dot(s, s)
        found = self.precondition(self.domain.element(s))
        z = as_vector(self.domain.space.leaves(found, "what the preconditioner returns"))
        if any(a.shape != b.shape for a, b in zip(s, z, strict=True)):
            raise SpaceMismatchError(
                f"expected a preconditioner for the batch sizes of the data, {self.domain.batch}, got shapes "
                f"{[tuple(t.shape) for t in z]}: build it with these sizes"
            )
        z = times(z, self.lift)
        return z, self.domain.dot(s, z)

    def norm(self, s: Vector, square: Tensor) -> Tensor:
        """Return ``‖s‖``, which ``⟨s, Ms⟩`` tells without a preconditioner."""
        return square.sqrt() if self.precondition is None else self.domain.norm(s)

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

    @cached_property
    def gram(self) -> LinearOperator:
        """``AᴴWA`` without damping and factors, as one operator."""
        if self.given is None:
            return self.A.gram
        return weighted_gram(self.A, weight_operator(self.A, self.given, self.codomain.batch))

    def by_gram(self, x: Vector) -> Vector:
        """Return ``(AᴴWA + damp²) x`` by one product with ``AᴴWA``."""
        if self.gain == 1:
            image = self.domain.vector(self.gram(self.domain.element(x)))
        else:  # so large or small that its square may be no number
            image = self.pull_back(self.apply(x))[0]
        return self.domain.plus(image, self.square, x) if self.is_damped else image


def require_apart(A: LinearOperator, batch: tuple[int, ...]) -> None:
    """Raise if what A or Aᴴ makes of the first entry of a batch reaches another: solvers take each for itself."""

    def check() -> None:
        for side in (A, A.H):
            _require_apart(side, batch)

    if math.prod(batch) > 1:
        A.require_apart(batch, check)


def _require_apart(A: LinearOperator, batch: tuple[int, ...]) -> None:
    space, draw = A.domain.with_batch(batch), torch.Generator().manual_seed(0)
    x, first = space.leaves(space.randn(draw)), (0,) * len(batch)
    for leaf in x:
        kept = leaf[first].clone()
        leaf.zero_()[first] = kept
    image = A.codomain.leaves(A(space.unflatten(x)))
    beside = tuple(leaf.detach().clone() for leaf in image)
    for leaf in beside:
        leaf[first] = 0
    if norm(beside, A.codomain) > allowance(UNITS, eps_of(image)) * norm(image, A.codomain):
        raise SpaceMismatchError(
            "expected an operator that treats the entries of a batch apart, as solvers do, got one that mixes them: "
            "build it with batch_dims=0"
        )


def _weighting(A: LinearOperator | AffineOperator, y: Any, weight: Any) -> Callable[[Any], Any]:
    """Return ``r ↦ Wr``; real entries of a diagonal stay real, even if r is complex."""
    if isinstance(weight, LinearOperator):
        return weight_operator(A, weight)
    found = A.codomain.structure.leaves(weight_entries(A, weight)) or []
    # Real entries of a complex leaf were cast: those given are as good, and half as large.
    given = [weight] * len(found) if is_scalar(weight) else A.codomain.structure.leaves(weight) or []
    entries = [given_w if w.ndim else w for w, given_w in zip(found, given, strict=True)]
    if any(w.ndim and w.shape != leaf.shape for w, leaf in zip(entries, A.codomain.leaves(y), strict=True)):
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


def _require_preconditioner(A: LinearOperator, M: Any) -> None:
    if M is not None and not callable(M):
        came = repr(M) if isinstance(M, str) else type(M).__name__
        raise SpaceMismatchError(
            f"expected a preconditioner that is an operator or a function on the domain of A, or, for least squares, "
            f"'auto', got {came}: al.diagonal makes an operator of the entries of a diagonal one"
        )
    if isinstance(M, LinearOperator) and not M.domain == M.codomain == A.domain:
        raise SpaceMismatchError(
            f"expected a preconditioner that maps the domain of A, {A.domain}, to itself, got one from {M.domain} to "
            f"{M.codomain}: build it on A.domain"
        )


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


def of_each(domain: Vectors, name: str, value: float | Tensor) -> Tensor:
    """Return a number of every problem, such as its damping, with the gradient of a tensor; raise if it is none."""
    if not isinstance(value, Tensor):
        return domain.scalar(nonnegative(name, value))
    shape = tuple(value.shape)
    if value.is_complex() or value.dtype == torch.bool or shape not in {(), domain.batch}:
        raise ValueError(
            f"expected {name} to be a real number, or a real tensor of the shape () or, one for each problem of the "
            f"batch, {domain.batch}, got {value.dtype} of the shape {shape}: reshape it, or build A with batch_dims"
        )
    if not bool(((value >= 0) & (value < math.inf)).all()):
        raise ValueError(
            f"expected {name} to be finite numbers of 0 or more, got {value.detach()}: take their absolutes"
        )
    return value.to(domain.device, torch.float64).expand(domain.batch)
