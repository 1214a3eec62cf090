r"""Conjugate gradients on the normal equations of ``min ‖Ax − y‖²_W + damp² ‖x‖²``, with A and Aᴴ or with AᴴWA."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from adjointlab.affine import Operator
from adjointlab.numerics import UNITS, allowance
from adjointlab.operators import LinearOperator
from adjointlab.solvers import implicit
from adjointlab.solvers.arithmetic import Vector
from adjointlab.solvers.problem import Preconditioner, Problem, nonnegative
from adjointlab.solvers.solution import Callback, Limits, Monitor, Solution, Status, solve
from adjointlab.typed import X, Y

# The gradient Aᴴr contains rounding errors of at most eps ‖A‖ ‖r‖ from each of four sources: Ap, the update of r, Aᴴr,
# and the difference between A and the adjoint of its derived adjoint. A smaller gradient is only rounding.
_ROUNDING = 4


def cgls(
    A: Operator[X, Y],
    y: Y,
    *,
    x0: X | None = None,
    damp: float | Tensor = 0.0,
    weight: LinearOperator[Y, Y] | Y | float | None = None,
    normal: bool = False,
    precondition: Preconditioner[X] | None = None,
    maxiter: int | None = None,
    tol: float = 1e-6,
    noise: float | Tensor | None = None,
    xtol: float = 0.0,
    max_seconds: float | None = None,
    callback: Callback[X] | None = None,
    progress: bool | None = None,
) -> Solution[X]:
    r"""Minimise ``‖Ax − y‖²_W + damp² ‖x‖²`` by conjugate gradients on the normal equations.

    The solver stops once the gradient at x is small relative to that at zero (that at ``x0`` if ``y = 0``),
    ``‖AᴴW(y − Ax) − damp² x‖ ≤ tol · ‖AᴴWy‖``, or is only rounding, and verifies it by computing the gradient at x
    again. Of many solutions, it finds that of least norm, if ``damp = 0`` and ``x0`` is not given. With a
    preconditioner M, that is the norm ``√⟨x, M⁻¹x⟩``, but the gradient that is compared with ``tol`` is the same. With
    ``batch_dims``, every entry of the batch is a separate problem.

    Parameters
    ----------
    A : LinearOperator or AffineOperator
        Any operator. If it is affine, its offset is subtracted from y.
    y : pytree of tensors
        The data, an element of ``A.codomain``.
    damp : float or Tensor
        ``damp²`` is the weight of the penalty ``‖x‖²``; a tensor has no dimensions, or one entry for each problem.
    weight : LinearOperator, float, or pytree of real tensors, optional
        The weight ``W``, a self-adjoint positive operator or the entries of a diagonal one; a number is for all.
    normal : bool
        Whether to take one product with ``AᴴWA``, as ``A.gram`` computes it, for each step in place of one with A and
        one with Aᴴ: faster where the gram is simplified, and less accurate.
    precondition : LinearOperator, callable or "auto", optional
        The preconditioner ``M ≈ (AᴴWA + damp²)⁻¹``, self-adjoint and positive definite, an operator on the domain or a
        function; ``adjointlab.precondition`` makes some, and ``"auto"`` takes its :func:`~adjointlab.precondition.auto`
        for this problem. One that turns out to be neither is a ``reason``.
    tol : float
        Relative tolerance of the gradient.
    noise : float or Tensor, optional
        Stop as well once ``‖Ax − y‖_W ≤ noise``, the discrepancy principle; a tensor has one entry for each problem.
    x0, maxiter, xtol, max_seconds, callback, progress
        As in :func:`cg`.

    Returns
    -------
    Solution
        Breakdown, NaN and running out of steps are reported there; nothing is raised.

    Raises
    ------
    SpaceMismatchError
        If A is not an operator, or y, ``x0``, the weight or M does not match its spaces.
    ValueError
        If ``tol``, ``damp``, ``noise``, ``xtol``, ``maxiter`` or ``max_seconds`` is negative.

    Notes
    -----
    x is differentiable, once, with respect to y, to the weight, to ``damp``, to ``x0`` (on which it depends if there
    are many solutions) and to the parameters of A: a backward pass solves one more problem of the same kind, and yields
    the derivative of the exact minimiser, also if ``noise`` or a limit stopped the solver before. In parameters of A,
    that is the derivative of the pseudo-inverse, if they leave the rank of A as it is; for others there is none. If A
    has more unknowns than equations and there is no damping, this takes another solve in the forward pass. If A has no
    fewer equations than unknowns, but many solutions, the derivative in its parameters is NaN, with a warning: use
    ``damp > 0``. M serves the backward pass as well; there is no derivative with respect to M, on which x depends if
    there are many solutions.

    Besides x and y, the solver needs memory for two elements of the domain and two of the codomain, for one more
    element of the codomain if there are weights, and for one more of the domain if there is damping, or if A is a
    cyclic convolution (``A.multiplier`` is not None) without weights, for which it works in Fourier space; for one more
    of the domain, and what M needs, with a preconditioner.

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
    tol = nonnegative("tol", tol)
    problem = Problem.of(A, y, weight, damp, precondition)
    limits = Limits(problem.steps(maxiter), callback, noise, xtol, max_seconds)
    solution = solve(partial(_cgls, tol=tol, normal=normal), problem, x0, name="cgls", limits=limits, progress=progress)
    return implicit.of_least_squares(problem, solution, tol, limits.maxiter, x0)


def _cgls(problem: Problem, x: Vector, monitor: Monitor, started: bool, *, tol: float, normal: bool) -> None:
    """Run CGLS on x in place, and restart it to verify convergence."""
    domain, codomain = problem.domain, problem.codomain
    r = codomain.copy(problem.data())
    codomain.choose_precision(codomain.norm(r))
    s, rr = problem.pull_back(r)
    domain.choose_precision(domain.norm(s))
    gradient = domain.norm(s)
    rules = _StoppingRules(monitor, tol * gradient, rr.sqrt(), problem.eps)
    while True:
        if started:
            codomain.add(r, codomain.scalar(-1), problem.apply(x))
            s, rr = problem.pull_back(r)
            s = problem.penalised(s, x)
            gradient = domain.norm(s)
        z, gamma = problem.preconditioned(s)
        if problem.precondition is not None:
            domain.choose_precision(gradient, domain.norm(z))
        p, left = domain.copy(z), domain.copy(s) if normal else []
        del s, z
        norm = _damped_norm(problem, rr, x)
        rules.start(gradient, rr.sqrt(), norm, tol)
        monitor.judge(gamma)
        if normal:
            with problem.gram.frozen():
                _normal_steps(x, left, p, gamma, rules)
        else:
            _cgls_steps(x, r, p, gamma, rules)
        if not monitor.reopen():
            return
        started = True
        del p
        r = codomain.copy(problem.data())


def _cgls_steps(x: Vector, r: Vector, p: Vector, gamma: Tensor, rules: _StoppingRules) -> None:
    """Run CGLS from x with the residual r and the preconditioned gradient p, ``γ = ⟨s, Ms⟩``."""
    monitor, problem = rules.monitor, rules.monitor.problem
    domain, codomain, length = problem.domain, problem.codomain, gamma
    going, some_stopped = monitor.start(rules.damped, rules.gradient)
    while going:
        if some_stopped:
            domain.fill(p, ~monitor.running)
        q = problem.apply(p)
        curvature = problem.weighted(q)[1]
        if problem.precondition is not None:
            length = domain.dot(p, p)
        if problem.is_damped:
            curvature = curvature + problem.square * domain.dot(p, p)
        step = gamma / curvature
        monitor.stop(~(curvature.abs() < math.inf), Status.NOT_FINITE)  # before it is used as a norm
        rules.raise_norm((curvature / length).sqrt())
        monitor.stop(~domain.holds(step), Status.BREAKDOWN)
        moved = monitor.running
        step = torch.where(moved, step, 0)
        domain.add(x, step, p)
        codomain.add(r, -step, q)
        del q
        s, rr = problem.pull_back(r)
        s = problem.penalised(s, x)
        previous, (z, gamma) = gamma, problem.preconditioned(s)
        rules(problem.norm(s, gamma), rr.sqrt(), _damped_norm(problem, rr, x))
        monitor.judge(gamma)
        del s
        going, some_stopped = monitor.step(x, rules.damped, rules.gradient, moved, (step, p))
        ratio = gamma / previous
        domain.update(p, z, ratio)
        length = gamma + ratio.square() * length  # ‖p‖² without M, since s is orthogonal to the last p
        del z


def _normal_steps(x: Vector, s: Vector, p: Vector, gamma: Tensor, rules: _StoppingRules) -> None:
    """Run conjugate gradients on ``(AᴴWA + damp²) x = AᴴWy`` from x with the gradient s, p and γ as in CGLS."""
    monitor, problem = rules.monitor, rules.monitor.problem
    domain, length, square = problem.domain, gamma, rules.damped.square()
    least = problem.eps * square  # what is left of the objective is a difference: less of it is only rounding

    def is_rounding() -> Tensor:  # of products with the gram
        return rules.gradient <= _ROUNDING * problem.eps * rules.norm.square() * domain.norm(x)

    monitor.stop(is_rounding(), Status.PRECISION)
    going, some_stopped = monitor.start(rules.damped, rules.gradient)
    while going:
        if some_stopped:
            domain.fill(p, ~monitor.running)
        q = problem.by_gram(p)
        curvature = domain.dot(p, q)
        if problem.precondition is not None:
            length = domain.dot(p, p)
        step = gamma / curvature
        monitor.stop(~(curvature.abs() < math.inf), Status.NOT_FINITE)
        monitor.stop((curvature <= 0) | ~domain.holds(step), Status.BREAKDOWN)
        rules.raise_norm((curvature.clamp(min=0) / length).sqrt())
        moved = monitor.running
        step = torch.where(moved, step, 0)
        domain.add(x, step, p)
        domain.add(s, -step, q)
        del q
        square = torch.maximum(square - step * gamma, least)
        previous, (z, gamma) = gamma, problem.preconditioned(s)
        residual = square - problem.square * domain.dot(x, x) if problem.is_damped else square
        rules(problem.norm(s, gamma), torch.maximum(residual, least).sqrt(), square.sqrt())
        monitor.judge(gamma)
        monitor.stop(is_rounding(), Status.PRECISION)
        going, some_stopped = monitor.step(x, rules.damped, rules.gradient, moved, (step, p))
        ratio = gamma / previous
        domain.update(p, z, ratio)
        length = gamma + ratio.square() * length
        del z


def _damped_norm(problem: Problem, rr: Tensor, x: Vector) -> Tensor:
    return (rr + problem.square * problem.domain.dot(x, x)).sqrt() if problem.is_damped else rr.sqrt()


class _StoppingRules:
    """Stopping rules of CGLS: the gradient norm ``‖s‖`` reaches its target, or is only rounding.

    Rounding errors in s are as large as a few ``eps ‖A‖ ‖r‖``. The largest ``‖s‖ / ‖r‖`` and ``‖Ap‖ / ‖p‖`` so far
    estimate ``‖A‖``.
    """

    def __init__(self, monitor: Monitor, target: Tensor, size: Tensor, eps: float) -> None:
        self.monitor, self.target, self.size, self.eps = monitor, target, size, eps
        self.norm = torch.zeros_like(target)

    def start(self, gradient: Tensor, residual: Tensor, damped: Tensor, tol: float) -> None:
        """Apply the rules to a start; if the data are zero, use its gradient and residual as the reference sizes."""
        self.target = torch.where(self.size == 0, tol * gradient, self.target)
        self.size = torch.where(self.size == 0, damped, self.size)
        self.monitor.compare(residual, allowance(UNITS, self.eps) * self.size)
        self(gradient, residual, damped)
        self.monitor.stop(damped <= allowance(UNITS, self.eps) * self.size, Status.PRECISION)
        self.monitor.stop(gradient <= allowance(UNITS, self.eps) * self.norm * residual, Status.PRECISION)

    def __call__(self, gradient: Tensor, residual: Tensor, damped: Tensor) -> None:
        self.gradient, self.residual, self.damped = gradient, residual, damped
        self.monitor.stop(~(torch.maximum(gradient, damped) < math.inf), Status.NOT_FINITE)
        self.monitor.stop(gradient <= self.target, Status.LEAST_SQUARES)
        self.monitor.compare(residual)
        self.raise_norm(torch.where(residual > 0, gradient / residual, 0))
        self.monitor.stop(damped <= self.eps * self.size, Status.PRECISION)

    def raise_norm(self, norm: Tensor) -> None:
        """Raise the estimate of ``‖A‖`` to at least ``norm``."""
        self.norm = torch.fmax(self.norm, norm)
        self.monitor.stop(self.gradient <= _ROUNDING * self.eps * self.norm * self.residual, Status.PRECISION)
