r"""FISTA: ``F(x) + g(x)`` by the gradient of a quadratic F, the proximal map of a convex g, and momentum.

A step from z is ``x = prox(z − τ ∇F(z), τ)``. Its rule of optimality makes

``s = ∇F(x) − ∇F(z) + (z − x) / τ``

a subgradient of ``F + g`` at x. Where s is zero, x is a minimiser; so the solver stops by the norm of s, in units of
that of ``∇F(0)``. The gradient of a quadratic F is affine: those between known ones take no application of F, and the
curvature along ``d = x − z`` is that of two gradients, ``⟨d, ∇F(x) − ∇F(z)⟩``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from adjointlab.prox import Prox
from adjointlab.solvers.arithmetic import Vector
from adjointlab.solvers.composite import Composite, Smooth, largest, solve
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
    A step takes one gradient of F and one proximal map; a step that is too long takes another. Besides the memory of
    these, the solver needs ten elements of the domain. x is not differentiable: unroll the steps to train through them.

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
    return solve(run, F, prox, x0, name="fista", maxiter=maxiter, callback=callback, progress=progress)


class _Step(NamedTuple):
    """A proximal step from z to x."""

    x: Vector
    gradient: Vector  # at x
    d: Vector  # x − z
    length: Tensor  # of d
    subgradient: Tensor  # its norm at x


class _Steps:
    """Proximal steps of a length that curvature shortens."""

    def __init__(self, composite: Composite, tau: float, monitor: Monitor) -> None:
        self.composite, self.tau, self.monitor = composite, tau, monitor
        self.uphill = torch.zeros_like(monitor.running)  # problems whose curvature was negative

    def __call__(self, z: Vector, gradient: Vector) -> _Step:
        composite, domain = self.composite, self.composite.domain
        while True:
            x = composite.moved(z, gradient, domain.scalar(self.tau), self.tau)
            d = domain.plus(x, domain.scalar(-1), z)
            new = composite.gradient(x)
            apart = domain.plus(new, domain.scalar(-1), gradient)
            square, energy = domain.dot(d, d), domain.dot(d, apart)
            noise = composite.noise(new) * square.sqrt()
            bent = self.monitor.running & (square > 0)
            self.uphill = bent & (energy < -noise)
            steepest = largest((energy - noise) / square, bent)
            if steepest * self.tau <= 1:
                break
            self.tau = _SAFE / steepest
        domain.add(apart, domain.scalar(-1 / self.tau), d)
        return _Step(x, new, d, square.sqrt(), domain.norm(apart))


def _fista(
    composite: Composite, x: Vector, monitor: Monitor, *, first: float | None, restart: bool, tol: float
) -> None:
    """Run FISTA on x in place."""
    domain = composite.domain
    at_x = composite.start(x)
    tau = 1 / composite.curvature(at_x) if first is None else first
    if not 0 < tau < math.inf:  # at a stationary point of F; or its gradient is not finite
        tau = 1.0
    steps = _Steps(composite, tau, monitor)
    z, at_z, t = x, at_x, domain.scalar(1)
    found = steps(z, at_z)
    composite.rules(monitor, found.length / steps.tau, x, at_x, norm=1 / steps.tau, tol=tol)
    going, _ = monitor.start(found.length / steps.tau, found.length / steps.tau)
    while going:
        monitor.stop(~(found.subgradient < math.inf), Status.NOT_FINITE)
        monitor.stop(steps.uphill, Status.NO_CURVATURE)
        moved = monitor.running
        ahead = domain.plus(found.x, domain.scalar(-1), x)
        composite.replace(x, found.x, moved)
        composite.rules(monitor, found.subgradient, x, found.gradient, norm=1 / steps.tau, tol=tol)
        going, _ = monitor.step(x, found.subgradient, found.subgradient, moved)
        if not going:
            return
        if restart:  # z − x and the last move point the same way: the momentum overshoots
            t = torch.where(domain.dot(found.d, ahead) < 0, 1, t)
        last, t = t, (1 + (1 + 4 * t.square()).sqrt()) / 2
        beta = torch.where(monitor.running, (last - 1) / t, 0)
        z = domain.plus(x, beta, ahead)
        change = domain.plus(found.gradient, domain.scalar(-1), at_x)
        at_x = found.gradient
        at_z = domain.plus(at_x, beta, change)
        del ahead, change
        found = steps(z, at_z)
