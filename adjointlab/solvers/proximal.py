r"""FISTA: ``F(x) + g(x)`` by the gradient of a quadratic F, the proximal map of a convex g, and momentum.

A step from z is ``x = prox(z − τ ∇F(z), τ)``. Its rule of optimality makes

``s = ∇F(x) − ∇F(z) + (z − x) / τ``

a subgradient of ``F + g`` at x. Where s is zero, x is a minimiser; so the solver stops by the norm of s, in units of
that of ``∇F(0)``. The gradient of a quadratic F is affine: those between known ones take no application of F, and the
curvature along ``d = x − z`` is that of two gradients, ``⟨d, ∇F(x) − ∇F(z)⟩``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adjointlab.prox import Prox
from adjointlab.solvers.arithmetic import Vector, Vectors
from adjointlab.solvers.composite import Composite, Smooth, largest, solve
from adjointlab.solvers.fixed_point import of_minimiser
from adjointlab.solvers.problem import nonnegative
from adjointlab.solvers.solution import Callback, Monitor, Solution, Status
from adjointlab.typed import X

_SAFE = 0.95  # of the longest step that a curvature allows


def fista(
    F: Smooth[X],
    prox: Prox,
    *,
    x0: X | None = None,
    step: float | None = None,
    restart: bool = True,
    maxiter: int = 1000,
    tol: float = 1e-6,
    callback: Callback[X] | None = None,
    progress: bool | None = None,
) -> Solution[X]:
    r"""Minimise ``F(x) + g(x)`` by accelerated proximal gradient steps with adaptive restart.

    The solver stops where a subgradient of ``F + g`` at x is at most ``tol · ‖∇F(0)‖`` long, or only rounding. With
    ``batch_dims``, every entry of the batch is a separate problem, of its own momentum, but the steps have one length.

    Parameters
    ----------
    F : LeastSquares
        The smooth part, with weights and penalties as it likes.
    prox : callable
        The proximal map of g, ``prox(x, step)``: one of :mod:`adjointlab.prox`, or any function of an element and a
        number.
    x0 : pytree of tensors, optional
        The first iterate; zero if not given.
    step : float, optional
        The first length of the steps, which are shortened where the curvature of F demands it: ``1 / ‖H‖`` is always
        short enough. If not given, some products with the Hessian H estimate ``1 / ‖H‖`` from above.
    restart : bool
        Whether the momentum is dropped where it points uphill.
    maxiter : int
        Largest number of steps.
    tol : float
        Relative tolerance of the subgradient.
    callback : callable, optional
        Function of x and :class:`Info`, called after each step. If it returns True, the solver stops.
    progress : bool, optional
        Whether to show a line on standard error; None shows it on a terminal, after two seconds.

    Returns
    -------
    Solution
        With the norms of the subgradients as the residual norms; the first one is that of ``(x₀ − x₁) / step``. NaN,
        negative curvature and running out of steps are reported there; what ``prox`` raises is not caught.

    Raises
    ------
    SpaceMismatchError
        If F is no least-squares objective, or ``x0`` or what ``prox`` returns is not in its domain.
    ValueError
        If ``step`` is not positive, or ``tol`` or ``maxiter`` is negative.

    Notes
    -----
    A step takes one gradient of F and one proximal map; one that is too long is repeated. Where F is a cyclic
    convolution (``A.multiplier`` is not None) without weights and penalties, the gradient takes two Fourier transforms.
    Besides the memory of these, the solver needs eight elements of the domain, and two more for such a gradient.

    x is differentiable, once, in y, the weights, strengths and parameters of F, and in what ``prox`` depends on, by the
    implicit function theorem at the fixed point: a backward pass solves a linear problem with the Hessian of F and the
    derivative of ``prox``, which autograd has to know. That is the derivative of the exact minimiser, where it has one:
    not where an entry is about to leave a bound, or zero. A minimum that is not isolated has none: it is NaN, with a
    warning.

    References
    ----------
    A. Beck, M. Teboulle, *A fast iterative shrinkage-thresholding algorithm for linear inverse problems*, SIAM J.
    Imaging Sci. 2 (2009) 183–202. B. O'Donoghue, E. Candès, *Adaptive restart for accelerated gradient schemes*, Found.
    Comput. Math. 15 (2015) 715–732.

    Examples
    --------
    >>> import torch, adjointlab as al
    >>> F = al.LeastSquares(al.diagonal(torch.tensor([1.0, 2.0])), torch.tensor([3.0, 0.2]))
    >>> fista(F, al.prox.l1(0.5)).x
    tensor([2.5000, 0.0000])
    """
    if step is not None and not 0 < step < math.inf:
        raise ValueError(f"expected step to be a positive number, got {step!r}: leave it out")
    run = partial(_fista, first=step, restart=restart, tol=nonnegative("tol", tol))
    found = solve(run, F, prox, x0, name="fista", maxiter=maxiter, callback=callback, progress=progress)
    return of_minimiser(F, prox, found, Vectors(F.domain, F.batch_shape), tol)


@dataclass
class _Steps:
    """Proximal steps ``x = prox(p)`` from z with ``p = z − τ ∇F(z)``, of a length τ that curvature shortens."""

    composite: Composite
    monitor: Monitor
    tau: float

    def __call__(self, z: Vector, p: Vector) -> tuple[Vector, Vector, Tensor, Tensor]:
        """Return x, its gradient, the norms of that and of a subgradient; z becomes ``z − x``, p the subgradient."""
        composite, domain, one = self.composite, self.composite.domain, self.composite.domain.scalar(1)
        while True:
            x = composite.proximal(p, self.tau)
            gradient = composite.gradient(x)
            domain.add(z, -one, x)
            domain.add(p, -one, x)
            domain.update(p, gradient, one / self.tau)  # now it is the subgradient
            square, slope = domain.dot(z, z), domain.dot(z, p)
            # With d = x − z, ⟨d, Hd⟩ / ‖d‖² = 1/τ + ⟨d, s⟩ / ‖d‖² is to be at most 1/τ.
            curvature = square / self.tau - slope
            length = domain.norm(gradient)
            noise = composite.noise(length) * square.sqrt() + composite.rounding(square / self.tau + slope.abs())
            bent = self.monitor.running & (square > 0)
            self.monitor.stop(bent & (curvature < -noise), Status.NO_CURVATURE)
            steepest = largest((curvature - noise) / square, bent)
            if steepest * self.tau <= 1:
                return x, gradient, length, domain.norm(p)
            domain.add(p, -one, gradient)  # back to the start, for a shorter step
            domain.update(p, x, domain.scalar(self.tau))
            domain.add(z, one, x)
            shorter = _SAFE / steepest
            domain.approach(p, domain.scalar(1 - shorter / self.tau), z)
            self.tau = shorter


def _fista(
    composite: Composite, x: Vector, monitor: Monitor, *, first: float | None, restart: bool, tol: float
) -> Vector:
    """Run FISTA from x, and return the last iterate."""
    domain, one = composite.domain, composite.domain.scalar(1)
    gradient = composite.start(x)
    # There is no curvature at a stationary point of F, nor where the gradient is not finite.
    steps = _Steps(composite, monitor, first or 1 / (composite.curvature(gradient) or 1.0))
    z, p, t = domain.copy(x), domain.plus(x, -one * steps.tau, gradient), one
    q = domain.copy(p)  # of x what p is of z
    before, tau = domain.norm(gradient), steps.tau
    new, gradient, length, subgradient = steps(z, p)
    start = domain.norm(z) / steps.tau
    composite.rules(monitor, start, x, before, norm=1 / steps.tau, tol=tol)
    going, _ = monitor.start(start, start)
    while going:
        if steps.tau != tau:
            domain.approach(q, domain.scalar(1 - steps.tau / tau), x)
            tau = steps.tau
        monitor.stop(~(subgradient < math.inf), Status.NOT_FINITE)
        moved = monitor.running
        if not bool(moved.all()):
            composite.replace(new, x, ~moved)
        composite.rules(monitor, subgradient, new, length, norm=1 / tau, tol=tol)
        going, _ = monitor.step(new, subgradient, subgradient, moved)
        if not going:
            return new
        for a, b, c in zip(p, new, x, strict=True):
            torch.sub(b, c, out=a)
        if restart:  # x − z and the last move point apart: the momentum overshoots
            t = torch.where(domain.dot(z, p) > 0, 1, t)
        last, t = t, (1 + (1 + 4 * t.square()).sqrt()) / 2
        ahead = 1 + (last - 1) / t
        z, x = x, new
        domain.approach(z, ahead, x)
        p, q = q, domain.plus(x, -one * tau, gradient)
        domain.approach(p, ahead, q)
        new, gradient, length, subgradient = steps(z, p)
    return x
