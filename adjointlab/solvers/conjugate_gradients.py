r"""Conjugate gradients for positive definite systems ``Ax = b``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adjointlab.affine import Operator
from adjointlab.errors import SpaceMismatchError
from adjointlab.numerics import UNITS, allowance
from adjointlab.solvers import implicit
from adjointlab.solvers.arithmetic import Vector
from adjointlab.solvers.problem import Preconditioner, Problem, nonnegative
from adjointlab.solvers.solution import Callback, Limits, Monitor, Solution, Status, solve
from adjointlab.typed import X


def cg(
    A: Operator[X, X],
    b: X,
    *,
    x0: X | None = None,
    precondition: Preconditioner[X] | None = None,
    maxiter: int | None = None,
    tol: float = 1e-6,
    xtol: float = 0.0,
    max_seconds: float | None = None,
    callback: Callback[X] | None = None,
    progress: bool | None = None,
) -> Solution[X]:
    r"""Solve ``Ax = b`` for a self-adjoint positive definite A by conjugate gradients.

    The solver stops at ``‖b − Ax‖ ≤ tol · ‖b‖`` (``tol · ‖Ax₀‖`` if ``b = 0``), or at a few units of rounding of
    ``‖b‖``, and verifies it by computing ``b − Ax``. If rounding keeps the residual larger, or the system has no
    solution, x has not converged. With ``batch_dims``, every entry of the batch is a separate system.

    Parameters
    ----------
    A : LinearOperator or AffineOperator
        From a space to itself, with a linear part of ``⟨Ax, z⟩ = ⟨x, Az⟩``, and ``⟨x, Ax⟩ > 0`` for ``x ≠ 0``.
    b : pytree of tensors
        The right-hand side.
    x0 : pytree of tensors, optional
        The first iterate; zero if not given.
    precondition : LinearOperator or callable, optional
        The preconditioner ``M ≈ A⁻¹``, self-adjoint and positive definite, an operator on the domain or a function. It
        changes the steps, and not what ``tol`` is about. One that turns out to be neither is a ``reason``.
    maxiter : int, optional
        Largest number of steps; if not given, ten per unknown, but at most 10000.
    tol : float
        Relative tolerance of the residual.
    xtol : float
        Stop as well once a step changes x by no more than ``xtol · ‖x‖``; 0 for never. That says nothing about the
        residual, and is not verified.
    max_seconds : float, optional
        Stop, without convergence, after this time.
    callback : callable, optional
        Function that is called with a copy of x and an :class:`Info` after each step. If it returns True, the solver
        stops.
    progress : bool, optional
        Whether to show a line on standard error with the progress and an estimate of the time; by default on a
        terminal, after two seconds.

    Returns
    -------
    Solution
        Breakdown, NaN and running out of steps are reported there; nothing is raised.

    Raises
    ------
    SpaceMismatchError
        If A does not map a space to itself, b or ``x0`` is not in that space, or M does not map it to itself.
    ValueError
        If ``tol``, ``xtol``, ``maxiter`` or ``max_seconds`` is negative.

    Notes
    -----
    x is differentiable with respect to b and to the parameters of A, once: a backward pass solves one more system with
    A, and yields the derivative of the exact solution. If A is singular, that in its parameters is refused.

    Besides x and b, the solver needs memory for three vectors; for four if A is a cyclic convolution (``A.multiplier``
    is not None), for which it works in Fourier space; for one more, and what M needs, with a preconditioner. This is
    applied once at each step, and three times before the first one, to random vectors, to see whether it may be one.

    References
    ----------
    M. R. Hestenes and E. Stiefel, *Methods of conjugate gradients for solving linear systems*, J. Res. Nat. Bur.
    Standards 49 (1952) 409–436. Preconditioned: G. H. Golub and C. F. Van Loan, *Matrix Computations*, 4th ed., Johns
    Hopkins University Press 2013, section 11.5.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import diagonal
    >>> cg(diagonal(torch.tensor([1.0, 4.0])), torch.tensor([1.0, 2.0])).x
    tensor([1.0000, 0.5000])
    """
    tol = nonnegative("tol", tol)
    if isinstance(precondition, str):  # "auto" is about AᴴWA
        raise SpaceMismatchError(
            f"expected an operator or a function as the preconditioner of cg, got {precondition!r}: cgls and lsmr take "
            "that"
        )
    problem = Problem.of(A, b, M=precondition)
    if problem.A.domain != problem.A.codomain:
        raise SpaceMismatchError(
            f"expected an operator from a space to itself, got one from {A.domain} to {A.codomain}: use cgls or lsmr"
        )
    limits = Limits(problem.steps(maxiter), callback, xtol=xtol, max_seconds=max_seconds)
    run = partial(_cg, tol=tol)
    solution = solve(run, problem, x0, name="cg", limits=limits, progress=progress, scale_operator=False)
    return implicit.of_system(problem, solution, tol, limits.maxiter, x0)


def _cg(problem: Problem, x: Vector, monitor: Monitor, started: bool, *, tol: float) -> None:
    """Run conjugate gradients on x in place, and restart them to verify convergence."""
    space, eps = problem.domain, problem.domain.space.eps
    b = problem.data()
    size = space.norm(b)
    space.choose_precision(size)

    def rules(norm: Tensor) -> None:
        monitor.stop(~(norm < math.inf), Status.NOT_FINITE)
        monitor.stop(norm <= tol * size, Status.SOLVED)
        monitor.stop(norm <= eps * size, Status.PRECISION)

    while True:
        r = space.copy(b)
        if started:
            space.add(r, space.scalar(-1), problem.apply(x))
        norm = space.norm(r)
        size = torch.where(size == 0, norm, size)
        rules(norm)
        monitor.stop(norm <= allowance(UNITS, eps) * size, Status.PRECISION)
        _cg_steps(problem, x, r, norm, rules=rules, monitor=monitor)
        if not monitor.reopen():
            return
        started = True


def _cg_steps(
    problem: Problem, x: Vector, r: Vector, norm: Tensor, *, rules: Callable[[Tensor], None], monitor: Monitor
) -> None:
    """Run conjugate gradients from x with the residual r."""
    space = problem.domain
    z, rho = problem.preconditioned(r)
    if problem.precondition is not None:
        space.choose_precision(norm, space.norm(z))
    p = space.copy(z)
    del z
    monitor.judge(rho)
    going, some_stopped = monitor.start(norm, norm)
    while going:
        if some_stopped:
            space.fill(p, ~monitor.running)
        q = problem.apply(p)
        curvature = space.dot(p, q)
        step = rho / curvature
        monitor.stop(~(curvature.abs() < math.inf), Status.NOT_FINITE)
        monitor.stop(curvature <= 0, Status.NO_CURVATURE)
        monitor.stop(~space.holds(step), Status.BREAKDOWN)
        moved = monitor.running
        step = torch.where(moved, step, 0)
        space.add(x, step, p)
        space.add(r, -step, q)
        del q
        previous, (z, rho) = rho, problem.preconditioned(r)
        norm = problem.norm(r, rho)
        rules(norm)
        monitor.judge(rho)
        going, some_stopped = monitor.step(x, norm, norm, moved, (step, p))
        space.update(p, z, rho / previous)
        del z
