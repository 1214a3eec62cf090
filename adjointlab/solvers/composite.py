"""The objective ``F(x) + g(x)`` of proximal methods: a quadratic F by its gradient, g by its proximal map."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.progress import progress_of
from adjointlab.solvers.arithmetic import Vector, Vectors, as_vector
from adjointlab.solvers.fourier import multiplier
from adjointlab.solvers.problem import Problem, count, require_apart
from adjointlab.solvers.solution import Callback, Limits, Monitor, Solution, Status, qualified
from adjointlab.space import Space
from adjointlab.typed import X

_POWER = 2  # products with the Hessian for an estimate of its norm
_ROUNDING = 4  # units of eps of the terms that a gradient is the difference of


@runtime_checkable
class Smooth(Protocol[X]):
    """A quadratic objective, as :class:`adjointlab.LeastSquares` is one."""

    @property
    def domain(self) -> Space[X]:
        """The space of x."""

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The sizes of the batch."""

    @property
    def hessian(self) -> LinearOperator[X, X]:
        """The Hessian."""

    def gradient(self, x: X) -> X:
        """Return the gradient at x."""

    def frozen(self) -> AbstractContextManager[None]:
        """Take all operators as they are, within a block."""


class Composite:
    """``F + g`` on vectors; ``size`` is the norm of the gradient of F at zero, of every problem.

    Where the Hessian is a cyclic convolution, ``∇F(x) = Hx + ∇F(0)`` takes two transforms.
    """

    def __init__(self, F: Smooth[Any], prox: Callable[[Any, float], Any] | None) -> None:
        if not isinstance(F, Smooth):
            raise SpaceMismatchError(
                f"expected F to be a least-squares objective, got {type(F).__name__}: make it with "
                "al.LeastSquares(A, y)"
            )
        self.F, self.prox = F, prox
        self.domain = Vectors(F.domain, F.batch_shape)
        self.hessian = F.hessian
        self.size = self.domain.scalar(0)
        self._spectrum = multiplier(self.hessian)
        self._at_zero: Tensor | None = None

    def gradient(self, x: Vector) -> Vector:
        """Return ``∇F(x)``."""
        if self._spectrum is not None and self._at_zero is not None:
            dims = tuple(range(1 - self._spectrum.ndim, 0))
            spectrum = torch.fft.rfftn(x[0], dim=dims).mul_(self._spectrum.real)
            return [torch.fft.irfftn(spectrum, x[0].shape[dims[0] :], dims).add_(self._at_zero)]
        return [leaf.detach() for leaf in self.domain.vector(self.F.gradient(self.domain.element(x)))]

    def start(self, x: Vector) -> Vector:
        """Return ``∇F(x)`` at the first iterate, and measure sizes."""
        domain, zero = self.domain, self.domain.zeros()
        gradient = self.gradient(x)
        at_zero = gradient if all(torch.equal(a, b) for a, b in zip(x, zero, strict=True)) else self.gradient(zero)
        del zero
        if self._spectrum is not None:
            self._at_zero = at_zero[0].clone()
        self.size = domain.norm(at_zero)
        domain.choose_precision(self.size)
        return gradient

    def curvature(self, direction: Vector) -> float:
        """Return an estimate of the norm of the Hessian from below, from powers along a direction."""
        domain, found, v = self.domain, 0.0, direction
        for _ in range(_POWER):
            length = domain.norm(v)
            scale = torch.where(length > 0, 1 / length, 0)
            v = domain.vector(self.hessian(domain.element(domain.plus(domain.zeros(), scale, v))))
            found = largest(domain.norm(v))
        return found

    def moved(self, z: Vector, gradient: Vector, tau: Tensor, step: float) -> Vector:
        """Return ``prox(z − τ ∇F(z), step)``."""
        return self.proximal(self.domain.plus(z, -tau, gradient), step)

    def proximal(self, z: Vector, step: float) -> Vector:
        """Return ``prox(z, step)`` in separate memory; a copy of z if there is no g."""
        return self.domain.copy(z) if self.prox is None else proximal(self.prox, self.domain, z, step, "prox(x, step)")

    def noise(self, gradient: Vector | Tensor) -> Tensor:
        """Return how far rounding moves a gradient, or one of some norm: the difference of ``Hx`` and ``−∇F(0)``."""
        norm = gradient if isinstance(gradient, Tensor) else self.domain.norm(gradient)
        return self.rounding(norm + 2 * self.size)

    def rounding(self, size: Tensor) -> Tensor:
        """Return how far rounding moves what is computed from terms of some size."""
        return _ROUNDING * self.domain.space.eps * size

    def rules(
        self, monitor: Monitor, subgradient: Tensor, x: Vector, gradient: Tensor, *, norm: float, tol: float
    ) -> None:
        """Stop the problems whose subgradient is short enough, or rounding, by norms; ``norm`` is the Hessian's."""
        self.size = torch.where(self.size > 0, self.size, subgradient)  # where the data are zero, by the start
        monitor.stop(~(subgradient < torch.inf), Status.NOT_FINITE)
        monitor.stop(subgradient <= tol * self.size, Status.OPTIMAL)
        rounding = self.noise(gradient) + self.rounding(norm * self.domain.norm(x))
        monitor.stop(subgradient <= rounding, Status.PRECISION)

    def replace(self, x: Vector, new: Vector, where: Tensor) -> None:
        """Set ``x ← new`` in the problems ``where``."""
        if bool(where.all()):
            for leaf, found in zip(x, new, strict=True):
                leaf.copy_(found)
        else:
            for leaf, found in zip(x, new, strict=True):
                mask = where.to(leaf.device).reshape(where.shape + (1,) * (leaf.ndim - where.ndim))
                leaf.copy_(torch.where(mask, found, leaf))


def largest(values: Tensor, where: Tensor | None = None) -> float:
    """Return the largest of the values that are finite, of those of some problems; 0 if there is none."""
    counted = values.isfinite() if where is None else values.isfinite() & where
    return float(torch.where(counted, values, 0).amax())


def proximal(prox: Callable[[Any, float], Any], vectors: Vectors, z: Vector, step: float, name: str) -> Vector:
    """Return ``prox(z, step)`` as a vector of the same space and batch sizes in separate memory, or raise."""
    given = vectors.copy(z) if z[0].is_inference() else z  # which has no versions
    versions = _versions(given)
    leaves = vectors.space.leaves(prox(vectors.element(given), step), name)
    found = [leaf.detach() for leaf in as_vector(leaves)]
    if versions != _versions(given):
        raise ValueError(f"expected {name} to leave its argument as it is, got another one: write to a copy of it")
    if any(a.shape != b.shape for a, b in zip(found, z, strict=True)):
        raise SpaceMismatchError(
            f"expected {name} of the batch sizes of x, got leaves of shapes {[tuple(leaf.shape) for leaf in leaves]}"
        )
    return vectors.copy(found)  # it may be a tensor of the user


def _versions(vector: Vector) -> list[int]:
    return [-1 if leaf.is_inference() else leaf._version for leaf in vector]


def solve(
    run: Callable[[Composite, Vector, Monitor], Vector],
    F: Smooth[X],
    prox: Callable[[Any, float], Any] | None,
    x0: X | None,
    *,
    name: str,
    maxiter: int,
    callback: Callback[X] | None,
    progress: bool | None,
    beside: LinearOperator | None = None,
    measure: str = "norm of a subgradient",
) -> Solution[X]:
    """Return the solution by ``run(composite, x, monitor)``, which returns the last iterate; it may use ``beside``."""
    composite, most = Composite(F, prox), count("maxiter", maxiter)
    domain = composite.domain
    problem = Problem(composite.hessian, None, None, domain, domain, domain.scalar(0))
    shown = progress_of(name, progress, most, most=True)
    frozen = contextlib.nullcontext() if beside is None else beside.frozen()
    operators = [composite.hessian, *([] if beside is None else [beside])]
    with torch.no_grad(), domain.space.without_autocast(), F.frozen(), frozen, shown as line:
        for A in operators:
            require_apart(A, domain.batch)
        monitor, x = Monitor(problem, Limits(most, callback), line), problem.start(x0)
        solution = replace(monitor.solution(run(composite, x, monitor)), measure=measure)
        return qualified(solution, *operators)
