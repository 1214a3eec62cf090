r"""Conjugate gradients: for ``Ax = b`` with A self-adjoint and positive, and for ``min ‖Ax − y‖²_W + damp² ‖x‖²``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adjointlab.affine import AffineOperator
from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.solvers import implicit
from adjointlab.solvers.arithmetic import Vector
from adjointlab.solvers.problem import Problem, plus, require
from adjointlab.solvers.solution import (
    BREAKDOWN,
    LEAST_SQUARES,
    NO_CURVATURE,
    NOT_FINITE,
    PRECISION,
    SOLVED,
    Callback,
    Monitor,
    Solution,
)

# Roundings that the gradient Aᴴr carries, each of a unit of ‖A‖ ‖r‖ at most: of Ap, of the step that r takes, of Aᴴr,
# and of A itself, whose derived adjoint is its own up to rounding. Below that, the gradient says nothing.
_ROUNDING = 4


def cg(
    A: LinearOperator | AffineOperator,
    b: Any,
    *,
    x0: Any = None,
    maxiter: int | None = None,
    tol: float = 1e-6,
    callback: Callback | None = None,
    progress: bool = False,
) -> Solution:
    r"""Solve ``Ax = b``, A being self-adjoint and positive definite, by conjugate gradients.

    It stops at ``‖b − Ax‖ ≤ tol · ‖b‖`` (``tol · ‖Ax₀‖`` for ``b = 0``), which is verified for x itself, at the cost of
    one application: if rounding keeps it larger, ``reason`` says so. With ``batch_dims``, every entry of the batch is a
    system of its own.

    Parameters
    ----------
    A : LinearOperator or AffineOperator
        From a space to itself, ``⟨Ax, z⟩ = ⟨x, Az⟩``, ``⟨x, Ax⟩ > 0``; of an affine map, the linear part is.
    b : pytree of tensors
        The right-hand side.
    x0 : pytree of tensors, optional
        Where to start; zero if not given.
    maxiter : int, optional
        Most steps; ten for each unknown, at most 10000, if not given.
    tol : float
        Relative tolerance of the residual.
    callback : callable, optional
        Called with a copy of x after each step; it stops the solver by returning True.
    progress : bool
        Whether to show a progress bar (needs tqdm).

    Returns
    -------
    Solution
        Breakdown, NaN and running out of steps are reported there; nothing is raised.

    Raises
    ------
    SpaceMismatchError
        If A does not map a space to itself, or b or ``x0`` is not in it.
    ValueError
        If ``tol`` or ``maxiter`` is negative.

    Notes
    -----
    x is differentiable with respect to b and to what A depends on, by implicit differentiation: a backward pass solves
    one more system with A. The derivative is that of the exact solution, once; ``x0`` has none.

    Beside x and b, memory for three vectors is used; for four where A is a cyclic convolution (it has a
    ``multiplier``), with which the steps are taken in Fourier space.

    References
    ----------
    M. R. Hestenes and E. Stiefel, *Methods of conjugate gradients for solving linear systems*, J. Res. Nat. Bur.
    Standards 49 (1952) 409–436.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import diagonal
    >>> cg(diagonal(torch.tensor([1.0, 4.0])), torch.tensor([1.0, 2.0])).x
    tensor([1.0000, 0.5000])
    """
    tol = require("tol", tol)
    problem = Problem.of(A, b)
    if problem.A.domain != problem.A.codomain:
        raise SpaceMismatchError(
            f"expected an operator from a space to itself, got one from {A.domain} to {A.codomain}: use cgls or lsmr"
        )
    with torch.no_grad(), problem.domain.space.without_autocast():
        inner = problem.diagonalized()
        monitor = Monitor(inner, problem.steps(maxiter), callback, progress, "cg")
        x = inner.start(x0)
        _cg(inner, x, x0 is not None, tol, monitor)
        solution = monitor.solution(x)
    return implicit.of_system(problem, solution, tol, monitor.maxiter)


def _cg(problem: Problem, x: Vector, started: bool, tol: float, monitor: Monitor) -> None:
    """Run conjugate gradients on x in place, and verify what they claim."""
    space = problem.domain
    b = problem.data()
    size = space.norm(b)
    space.choose_precision(size)
    most = space.scalar(math.inf)
    while True:
        r = space.copy(b)
        if started:
            space.add(r, space.scalar(-1), problem.apply(x))
        norm = space.norm(r)
        size = torch.where(size == 0, norm, size)
        judge = partial(_judge_residual, monitor, size, tol, space.space.eps)
        judge(norm)
        monitor.stop(norm > most, PRECISION)
        if not _cg_steps(problem, x, r, norm, judge=judge, monitor=monitor):
            return
        most, started = norm / 2 if started else space.scalar(0), True


def _cg_steps(
    problem: Problem, x: Vector, r: Vector, norm: Tensor, *, judge: Callable[[Tensor], None], monitor: Monitor
) -> bool:
    """Run conjugate gradients from x with the residual r; return whether that ended with claims to verify."""
    space = problem.domain
    p, rho = space.copy(r), norm.square()
    going, some = monitor.start(norm)
    if not going:
        return False
    while going:
        if some:
            space.clear(p, ~monitor.running)
        q = problem.apply(p)
        curvature = space.dot(p, q)
        step = rho / curvature
        monitor.stop(~(curvature.abs() < math.inf), NOT_FINITE)
        monitor.stop(curvature <= 0, NO_CURVATURE)
        monitor.stop(~space.holds(step), BREAKDOWN)
        moved = monitor.running
        step = torch.where(moved, step, 0)
        space.add(x, step, p)
        space.add(r, -step, q)
        del q
        previous, rho = rho, space.dot(r, r)
        judge(rho.sqrt())
        going, some = monitor.step(x, rho.sqrt(), moved)
        space.update(p, r, rho / previous)
    return monitor.reopen()


def _judge_residual(monitor: Monitor, size: Tensor, tol: float, eps: float, norm: Tensor) -> None:
    monitor.stop(~(norm < math.inf), NOT_FINITE)
    monitor.stop(norm <= tol * size, SOLVED)
    monitor.stop(norm <= eps * size, PRECISION)


def cgls(
    A: LinearOperator | AffineOperator,
    y: Any,
    *,
    x0: Any = None,
    damp: float = 0.0,
    weight: Any = None,
    maxiter: int | None = None,
    tol: float = 1e-6,
    callback: Callback | None = None,
    progress: bool = False,
) -> Solution:
    r"""Minimise ``‖Ax − y‖²_W + damp² ‖x‖²`` by conjugate gradients on the normal equations.

    It stops once the gradient is small against that at zero, ``‖AᴴW(y − Ax) − damp² x‖ ≤ tol · ‖AᴴWy‖`` (that at
    ``x0`` for ``y = 0``), or as small as rounding lets it become; either is verified for x itself. Without damping and
    from zero, it goes to the solution of least norm where there are many. With ``batch_dims``, every entry of the batch
    is a problem of its own.

    Parameters
    ----------
    A : LinearOperator or AffineOperator
        Any operator; the offset of an affine one is taken off y.
    y : pytree of tensors
        The data, an element of ``A.codomain``.
    damp : float
        Weight of the penalty on x.
    weight : LinearOperator, or pytree of real tensors, optional
        ``W``, as in :class:`adjointlab.LeastSquares`: self-adjoint and positive, or the entries of a diagonal.
    tol : float
        Relative tolerance of the gradient.
    x0, maxiter, callback, progress
        As in :func:`cg`.

    Returns
    -------
    Solution
        Breakdown, NaN and running out of steps are reported there; nothing is raised.

    Raises
    ------
    SpaceMismatchError
        If A is no operator, or y, ``x0`` or the weight does not live on its spaces.
    ValueError
        If ``tol``, ``damp`` or ``maxiter`` is negative.

    Notes
    -----
    x is differentiable with respect to y, to the weight and to what A depends on, by implicit differentiation: a
    backward pass solves one more problem of the same kind. The derivative is that of the exact minimiser, once. With
    respect to A it needs the minimiser to be unique, or A to have full rank.

    Beside x and y, memory for two elements of the domain and two of the codomain is used (one more of the codomain with
    weights, one more of the domain with damping). Where A is a cyclic convolution (it has a ``multiplier``) and there
    are no weights, the steps are taken in Fourier space: they are the same, without a transform in them, for one more
    element of the domain.

    References
    ----------
    M. R. Hestenes and E. Stiefel, *Methods of conjugate gradients for solving linear systems*, J. Res. Nat. Bur.
    Standards 49 (1952) 409–436, section 10. Å. Björck, *Numerical Methods for Least Squares Problems*, SIAM 1996,
    algorithm 7.4.1. C. C. Paige and M. A. Saunders, *LSQR*, ACM Trans. Math. Softw. 8 (1982) 43–71.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import linear_operator
    >>> A = linear_operator(lambda x: torch.cat([x, 2 * x]), (1,))
    >>> cgls(A, torch.tensor([1.0, 2.0])).x
    tensor([1.])
    """
    tol, damp = require("tol", tol), require("damp", damp)
    problem = Problem.of(A, y, weight)
    with torch.no_grad(), problem.domain.space.without_autocast():
        inner = problem.diagonalized()
        monitor = Monitor(inner, problem.steps(maxiter), callback, progress, "cgls")
        x = inner.start(x0)
        _cgls(inner, x, damp, tol, monitor=monitor, started=x0 is not None)
        solution = monitor.solution(x)
    return implicit.of_least_squares(problem, solution, damp, tol, monitor.maxiter, started=x0 is not None)


def _cgls(problem: Problem, x: Vector, damp: float, tol: float, *, monitor: Monitor, started: bool) -> None:
    """Run CGLS on x in place, and verify what it claims."""
    domain, codomain = problem.domain, problem.codomain
    square = damp**2
    r = codomain.copy(problem.data())
    codomain.choose_precision(codomain.norm(r))
    s, rr = problem.pull_back(r)
    domain.choose_precision(domain.norm(s))
    gradient = domain.norm(s)
    judge = _Judge(monitor, tol * gradient, rr.sqrt(), problem.eps)
    most = domain.scalar(math.inf)
    while True:
        if started:
            codomain.add(r, codomain.scalar(-1), problem.apply(x))
            s, rr = problem.pull_back(r)
            s = plus(s, -square, x)
            gradient = domain.norm(s)
        p = domain.copy(s)
        del s
        norm = _damped_norm(problem, rr, square, x)
        judge.start(gradient, rr.sqrt(), norm, tol)
        monitor.stop(gradient > most, PRECISION)
        if not _cgls_steps(problem, x, r, p, square=square, judge=judge):
            return
        most, started = gradient / 2 if started else domain.scalar(0), True
        del p
        r = codomain.copy(problem.data())


def _cgls_steps(problem: Problem, x: Vector, r: Vector, p: Vector, *, square: float, judge: _Judge) -> bool:
    """Run CGLS from x with the residual r and its gradient p; return whether that ended with claims to verify."""
    domain, codomain, monitor = problem.domain, problem.codomain, judge.monitor
    gamma = length = judge.gradient.square()
    going, some = monitor.start(judge.damped)
    if not going:
        return False
    while going:
        if some:
            domain.clear(p, ~monitor.running)
        q = problem.apply(p)
        curvature = problem.weighted(q)[1]
        if square:
            curvature = curvature + square * domain.dot(p, p)
        step = gamma / curvature
        monitor.stop(~(curvature.abs() < math.inf), NOT_FINITE)  # before it is taken for a norm
        judge.see((curvature / length).sqrt())
        monitor.stop(~domain.holds(step), BREAKDOWN)
        moved = monitor.running
        step = torch.where(moved, step, 0)
        domain.add(x, step, p)
        codomain.add(r, -step, q)
        del q
        s, rr = problem.pull_back(r)
        s = plus(s, -square, x)
        previous, gamma = gamma, domain.dot(s, s)
        judge(gamma.sqrt(), rr.sqrt(), _damped_norm(problem, rr, square, x))
        going, some = monitor.step(x, judge.damped, moved)
        ratio = gamma / previous
        domain.update(p, s, ratio)
        length = gamma + ratio.square() * length  # ‖p‖², since s is orthogonal to the last p
        del s
    return monitor.reopen()


def _damped_norm(problem: Problem, rr: Tensor, square: float, x: Vector) -> Tensor:
    return (rr + square * problem.domain.dot(x, x)).sqrt() if square else rr.sqrt()


class _Judge:
    """Stops a least-squares problem by its gradient ``‖s‖``, or once that is only rounding.

    Rounding makes ``‖s‖`` as large as a few ``eps ‖A‖ ‖r‖``; the largest ``‖s‖ / ‖r‖`` and ``‖Ap‖ / ‖p‖`` seen stand
    for ``‖A‖``.
    """

    def __init__(self, monitor: Monitor, target: Tensor, size: Tensor, eps: float) -> None:
        self.monitor, self.target, self.size, self.eps = monitor, target, size, eps
        self.norm = torch.zeros_like(target)

    def start(self, gradient: Tensor, residual: Tensor, damped: Tensor, tol: float) -> None:
        """Judge a start; where the data are zero, what follows is measured by it."""
        self.target = torch.where(self.size == 0, tol * gradient, self.target)
        self.size = torch.where(self.size == 0, damped, self.size)
        self(gradient, residual, damped)

    def __call__(self, gradient: Tensor, residual: Tensor, damped: Tensor) -> None:
        self.gradient, self.residual, self.damped = gradient, residual, damped
        self.monitor.stop(~(torch.maximum(gradient, damped) < math.inf), NOT_FINITE)
        self.monitor.stop(gradient <= self.target, LEAST_SQUARES)
        self.see(torch.where(residual > 0, gradient / residual, 0))
        self.monitor.stop(damped <= self.eps * self.size, PRECISION)

    def see(self, norm: Tensor) -> None:
        """Take note that ``‖A‖`` is at least that."""
        self.norm = torch.fmax(self.norm, norm)
        self.monitor.stop(self.gradient <= _ROUNDING * self.eps * self.norm * self.residual, PRECISION)
