r"""LSMR: ``min ‖Ax − y‖²_W + damp² ‖x‖²`` by Golub–Kahan bidiagonalisation, with monotone gradient norms."""

from __future__ import annotations

from dataclasses import dataclass, field
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


def lsmr(
    A: Operator[X, Y],
    y: Y,
    *,
    x0: X | None = None,
    damp: float | Tensor = 0.0,
    weight: LinearOperator[Y, Y] | Y | float | None = None,
    precondition: Preconditioner[X] | None = None,
    maxiter: int | None = None,
    atol: float = 1e-6,
    btol: float = 1e-6,
    conlim: float = 1e8,
    noise: float | Tensor | None = None,
    xtol: float = 0.0,
    max_seconds: float | None = None,
    callback: Callback[X] | None = None,
    progress: bool | None = None,
) -> Solution[X]:
    r"""Minimise ``‖Ax − y‖²_W + damp² ‖x‖²`` by LSMR, which is equivalent to MINRES on the normal equations.

    Both ``‖r‖`` and ``‖Aᴴr‖`` decrease at every step, so LSMR can be stopped earlier than CGLS. With the residual r of
    the damped system and estimates of ``‖A‖`` and ``cond(A)``, it stops by these rules of Fong and Saunders:

    - ``‖r‖ ≤ btol ‖y‖ + atol ‖A‖ ‖x‖``: x solves the equations;
    - ``‖Aᴴr‖ ≤ atol ‖A‖ ‖r‖``: x is a least-squares solution;
    - ``cond(A) ≥ conlim``: the problem is too ill-conditioned to continue.

    It verifies the first two by computing r and ``Aᴴr`` from x again. With a preconditioner M, ``√⟨Aᴴr, MAᴴr⟩``
    decreases at every step, and the norm in the rules is still that of ``Aᴴr``; ``cond(A)`` is that of the
    preconditioned operator. With ``batch_dims``, every entry of the batch is a separate problem.

    Parameters
    ----------
    A, y, x0, damp, weight, precondition, maxiter, noise, xtol, max_seconds, callback, progress
        As in :func:`cgls`.
    atol, btol : float
        Relative errors of A and of y; the solution is as accurate as these errors allow.
    conlim : float
        Largest condition number that is accepted; 0 for no limit.

    Returns
    -------
    Solution
        Ill-conditioning, NaN and running out of steps are reported there; nothing is raised.

    Raises
    ------
    SpaceMismatchError
        If A is not an operator, or y, ``x0``, the weight or M does not match its spaces.
    ValueError
        If a tolerance, ``damp``, ``noise``, ``maxiter`` or ``max_seconds`` is negative.

    Notes
    -----
    x is differentiable as in :func:`cgls`. Besides x, y and the memory of A, the solver needs memory for four elements
    of the domain and two of the codomain, for one more element of the codomain if there are weights, and for one more
    of the domain if both ``x0`` and damping are given. A preconditioner takes three more, and one for damping.

    References
    ----------
    D. C.-L. Fong and M. A. Saunders, *LSMR: an iterative algorithm for sparse least-squares problems*, SIAM J. Sci.
    Comput. 33 (2011) 2950–2971. Weights: M. Arioli, *Generalized Golub–Kahan bidiagonalization and stopping criteria*,
    SIAM J. Matrix Anal. Appl. 34 (2013) 571–592; a preconditioner is the same for the other space.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import linear_operator
    >>> A = linear_operator(lambda x: x.sum(-1, keepdim=True), (2,))  # many solutions; x has the least norm
    >>> lsmr(A, torch.tensor([2.0])).x
    tensor([1.0000, 1.0000])
    """
    atol, btol = nonnegative("atol", atol), nonnegative("btol", btol)
    conlim = nonnegative("conlim", conlim)
    problem = Problem.of(A, y, weight, damp, precondition)
    limits = Limits(problem.steps(maxiter), callback, noise, xtol, max_seconds)
    run = partial(_lsmr, atol=atol, btol=btol, conlim=conlim)
    solution = solve(run, problem, x0, name="lsmr", limits=limits, progress=progress)
    return implicit.of_least_squares(problem, solution, min(atol, btol), limits.maxiter, x0)


def _lsmr(
    problem: Problem, x: Vector, monitor: Monitor, started: bool, *, atol: float, btol: float, conlim: float
) -> None:
    """Run LSMR on x in place, and restart it to verify convergence."""
    domain, codomain = problem.domain, problem.codomain
    u = codomain.copy(problem.data())
    codomain.choose_precision(codomain.norm(u))
    rules = _StoppingRules(monitor, problem.weighted(u)[1].sqrt(), problem.eps, atol=atol, btol=btol, conlim=conlim)
    while True:
        left = _LeftVector(problem, u)
        left.start(x, started=started)
        q = domain.zeros()
        beta = left.pull_back(q)
        length = domain.norm(q)
        domain.choose_precision(length * beta)
        rules.start(length * beta, beta, domain.norm(x))
        v, alpha = _right_vector(problem, q, monitor, at_end=length == 0)
        state = _Recurrence(alpha, beta, domain.scalar(0) if left.damping_rows else problem.square.sqrt())
        state.gradient = length * beta
        _steps(left, x, (q, v), state, rules)
        if not monitor.reopen():
            return
        started = True
        del left, q, v, u
        u = codomain.copy(problem.data())


def _right_vector(problem: Problem, q: Vector, monitor: Monitor, *, at_end: Tensor) -> tuple[Vector, Tensor]:
    """Set ``q ← q / α``, and return ``v = Mq`` and ``α = √⟨q, Mq⟩``; it is not M that makes it zero ``at_end``."""
    domain = problem.domain
    z, square = problem.preconditioned(q)
    monitor.judge(torch.where(at_end & (square == 0), 1, square))
    alpha = square.clamp_min(0).sqrt()
    v = q if problem.precondition is None else domain.scaled(z, _inverse(alpha))
    domain.scale(q, _inverse(alpha))
    return v, alpha


def _steps(
    left: _LeftVector, x: Vector, right: tuple[Vector, Vector], state: _Recurrence, rules: _StoppingRules
) -> None:
    """Run LSMR from x and the first vectors, of which the right one is ``(q, v = Mq)``."""
    problem, domain, monitor, (q, v) = left.problem, left.problem.domain, rules.monitor, right
    going, some_stopped = monitor.start(state.residual, state.gradient)
    alpha, beta = state.alphabar, state.residual
    h, hbar = domain.copy(v), domain.zeros()
    f = [] if problem.precondition is None else domain.copy(q)  # the direction of Aᴴr
    while going:
        if some_stopped:
            left.problem.codomain.fill(left.u, ~monitor.running)
            for vector in (hbar, h, q, v, f, left.damping_rows):
                domain.fill(vector, ~monitor.running)
        left.push_forward(v, -alpha * _inverse(beta))
        beta = left.pull_back(q)
        monitor.stop(~torch.isfinite(beta + left.reach), Status.NOT_FINITE)  # for which M is not to blame
        v, alpha = _right_vector(problem, q, monitor, at_end=beta >= 0)  # a restart finds out whether it is the end
        to_hbar, to_x, to_h = state.advance(alpha, beta)
        monitor.stop(~(torch.isfinite(alpha) & torch.isfinite(beta) & domain.holds(to_x)), Status.NOT_FINITE)
        moved = monitor.running
        domain.update(hbar, h, torch.where(moved, to_hbar, 0))
        domain.add(x, torch.where(moved, to_x, 0), hbar)
        domain.update(h, v, torch.where(moved, to_h, 0))
        gradient = state.gradient
        if f:
            domain.scale(f, -state.sbar)
            domain.add(f, state.cbar, q)
            gradient = gradient * domain.norm(f)
        rules(state, gradient, state.norm if problem.precondition is None else left.reach, domain.norm(x))
        going, some_stopped = monitor.step(x, state.residual, gradient, moved, (to_x, hbar))


@dataclass
class _LeftVector:
    """The left vector ``βu`` of the bidiagonalisation; not normalising it saves a pass over memory.

    The recurrences of LSMR damp the correction to the start, in the norm of the preconditioner. To damp x itself from a
    nonzero start or in its own norm, A is extended by the rows ``damp · x = 0``. In these rows, the left vector is
    ``damp · damping_rows``.
    """

    problem: Problem
    u: Vector
    damping_rows: Vector = field(default_factory=list)
    reach: Tensor = field(init=False)  # the norm of all Aᴴu / ‖u‖ so far, with a preconditioner

    def __post_init__(self) -> None:
        self.reach = self.problem.domain.scalar(0)

    def start(self, x: Vector, *, started: bool) -> None:
        """Subtract ``Ax`` from the data and, with damping, ``damp · x`` from the rows of zeros."""
        codomain, domain = self.problem.codomain, self.problem.domain
        if started:
            codomain.add(self.u, codomain.scalar(-1), self.problem.apply(x))
        if self.problem.is_damped and (started or self.problem.precondition is not None):
            self.damping_rows = domain.copy(x)
            domain.scale(self.damping_rows, domain.scalar(-1))

    def push_forward(self, v: Vector, back: Tensor) -> None:
        """Set ``u ← Av + back · u``."""
        self.problem.codomain.update(self.u, self.problem.apply(v), back)
        if self.damping_rows:
            self.problem.domain.update(self.damping_rows, v, back)

    def pull_back(self, q: Vector) -> Tensor:
        """Set ``q ← Aᴴu / β − βq``, and return ``β = ‖u‖``."""
        domain = self.problem.domain
        s, square = self.problem.pull_back(self.u)
        if self.damping_rows:
            square = square + self.problem.square * domain.dot(self.damping_rows, self.damping_rows)
        beta = square.sqrt()
        if self.problem.precondition is not None:
            self.reach = torch.hypot(self.reach, domain.norm(s) * _inverse(beta))
        domain.scale(q, -beta)
        domain.add(q, _inverse(beta), s)
        if self.damping_rows:
            domain.add(q, self.problem.square * _inverse(beta), self.damping_rows)
        return beta


def _inverse(value: Tensor) -> Tensor:
    return torch.where(value > 0, 1 / value, 0)


def _rotation(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return c, s and ``r = √(a² + b²)`` with ``c a + s b = r`` and ``s a = c b``."""
    r = torch.hypot(a, b)
    inverse = _inverse(r)
    return a * inverse, b * inverse, r


class _Recurrence:
    """The scalars of LSMR, in the paper's notation, with estimates of ``‖r‖``, ``‖Aᴴr‖``, ``‖A‖`` and ``cond(A)``."""

    def __init__(self, alpha: Tensor, beta: Tensor, damp: Tensor) -> None:
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        self.alphabar, self.damp = alpha, damp
        self.rho = self.rhobar = self.cbar = self.rhodold = one
        self.sbar = self.betad = self.tautildeold = self.thetatilde = self.zeta = self.outside = zero
        self.betadd = self.residual = beta
        self.zetabar = self.gradient = alpha * beta
        self.norm, self.square, self.condition = alpha, alpha.square(), one
        self.largest, self.smallest = zero, torch.full_like(alpha, torch.inf)

    def advance(self, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step; return the factors in ``h̄ ← h + a h̄``, ``x ← x + b h̄``, ``h ← v + c h``."""
        chat, shat, alphahat = _rotation(self.alphabar, self.damp)
        rhoold, rhobarold, zetaold = self.rho, self.rhobar, self.zeta
        c, s, self.rho = _rotation(alphahat, beta)
        thetanew = s * alpha
        self.alphabar = c * alpha
        thetabar = self.sbar * self.rho
        rhotemp = self.cbar * self.rho
        self.cbar, self.sbar, self.rhobar = _rotation(rhotemp, thetanew)
        self.zeta = self.cbar * self.zetabar
        self.zetabar = -self.sbar * self.zetabar
        self._estimate_residual(chat * self.betadd, -shat * self.betadd, (c, s), thetabar, zetaold)
        self.square = self.square + beta.square()
        self.norm = self.square.sqrt()
        self.square = self.square + alpha.square()
        self.condition = torch.fmax(self.largest, rhotemp) / torch.fmin(self.smallest, rhotemp)
        self.largest = torch.fmax(self.largest, self.rhobar)
        self.smallest = torch.fmin(self.smallest, self.rhobar)
        self.gradient = self.zetabar.abs()
        return (
            -(thetabar * self.rho) * _inverse(rhoold * rhobarold),
            self.zeta * _inverse(self.rho * self.rhobar),
            -thetanew * _inverse(self.rho),
        )

    def _estimate_residual(
        self, acute: Tensor, check: Tensor, rotation: tuple[Tensor, Tensor], thetabar: Tensor, zetaold: Tensor
    ) -> None:
        c, s = rotation
        hat = c * acute
        self.betadd = -s * acute
        thetatildeold = self.thetatilde
        ctilde, stilde, rhotilde = _rotation(self.rhodold, thetabar)
        self.thetatilde = stilde * self.rhobar
        self.rhodold = ctilde * self.rhobar
        self.betad = -stilde * self.betad + ctilde * hat
        self.tautildeold = (zetaold - thetatildeold * self.tautildeold) * _inverse(rhotilde)
        taud = (self.zeta - self.thetatilde * self.tautildeold) * _inverse(self.rhodold)
        self.outside = self.outside + check.square()
        self.residual = (self.outside + (self.betad - taud).square() + self.betadd.square()).sqrt()


class _StoppingRules:
    """The stopping rules of section 3.2 of the paper, and rules against tolerances below the unit roundoff."""

    def __init__(self, monitor: Monitor, size: Tensor, eps: float, *, atol: float, btol: float, conlim: float) -> None:
        self.monitor, self.size, self.eps, self.atol, self.btol, self.conlim = monitor, size, eps, atol, btol, conlim
        self.norm = torch.zeros_like(monitor.status, dtype=torch.float64)  # the largest estimate of ‖A‖

    def start(self, gradient: Tensor, residual: Tensor, length: Tensor) -> None:
        """Apply the rules to a start: the first one, or a restart that verifies x."""
        self.monitor.stop(~torch.isfinite(gradient), Status.NOT_FINITE)
        self.size = torch.where(self.size == 0, residual, self.size)  # zero data: measure by the start
        self.monitor.stop(residual == 0, Status.SOLVED)
        self.monitor.stop(gradient == 0, Status.LEAST_SQUARES)
        eps = allowance(UNITS, self.eps)
        self._compare(residual, length, eps * self.size)
        self._apply(gradient, residual, self.norm * length, eps)

    def __call__(self, state: _Recurrence, gradient: Tensor, norm: Tensor, length: Tensor) -> None:
        self.norm = torch.fmax(self.norm, norm)
        self._apply(gradient, state.residual, self.norm * length, self.eps)
        self._compare(state.residual, length)
        if self.conlim:
            self.monitor.stop(state.condition >= self.conlim, Status.ILL_CONDITIONED)
        self.monitor.stop(state.condition >= 1 / torch.finfo(torch.float64).eps, Status.ILL_CONDITIONED)

    def _compare(self, residual: Tensor, length: Tensor, rounding: Tensor | float = 0.0) -> None:
        penalty = self.monitor.problem.square * length.square()
        self.monitor.compare((residual.square() - penalty).clamp_min(0).sqrt(), rounding)

    def _apply(self, gradient: Tensor, residual: Tensor, reach: Tensor, eps: float) -> None:
        self.monitor.stop(residual <= self.btol * self.size + self.atol * reach, Status.SOLVED)
        self.monitor.stop(gradient <= self.atol * self.norm * residual, Status.LEAST_SQUARES)
        self.monitor.stop(residual <= eps * (self.size + reach), Status.PRECISION)
        self.monitor.stop(gradient <= eps * self.norm * residual, Status.PRECISION)
