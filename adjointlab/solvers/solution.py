"""The result of a solver, and the monitor that records the status of each problem of a batch."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Generic

import torch
from torch import Tensor

from adjointlab.operators import LinearOperator
from adjointlab.progress import Line, progress_of
from adjointlab.reporting import aligned, html_table
from adjointlab.solvers.arithmetic import Vector
from adjointlab.solvers.problem import Problem, nonnegative, of_each, require_apart
from adjointlab.typed import X
from adjointlab.verify.mismatch import cost_of_mismatch

Status = IntEnum(
    "Status",
    "RUNNING SOLVED LEAST_SQUARES OPTIMAL NOISE PRECISION SHORT STAGNATED NO_CURVATURE BREAKDOWN NO_DESCENT UPHILL "
    "NOT_FINITE M_NOT_FINITE M_NOT_ADJOINT M_NOT_POSITIVE ILL_CONDITIONED STOPPED LATE EXHAUSTED",
    start=0,
)
VERIFIED = (Status.SOLVED, Status.LEAST_SQUARES, Status.NOISE, Status.PRECISION)  # by a residual that is computed anew
CONVERGED = (*VERIFIED, Status.OPTIMAL, Status.SHORT)
REASONS = {
    Status.SOLVED: "converged: the residual is within the tolerance",
    Status.LEAST_SQUARES: "converged: the gradient of the least-squares problem is within the tolerance",
    Status.OPTIMAL: "converged: a subgradient of the objective is within the tolerance",
    Status.NOISE: "converged: the residual is within the noise",
    Status.PRECISION: "converged: as far as the precision of the dtype allows",
    Status.SHORT: "converged: the last step is within the tolerance",
    Status.STAGNATED: "the precision of the dtype keeps the residual of x above the tolerance, for A is singular or "
    "ill-conditioned: use a larger tolerance, a wider dtype or, for least squares, damp > 0",
    Status.NO_CURVATURE: "breakdown: a direction p with ⟨p, Ap⟩ ≤ 0, so that A is not positive definite (or not "
    "self-adjoint)",
    Status.BREAKDOWN: "breakdown: a step of no or of infinite length",
    Status.NO_DESCENT: "no step along the direction of the model reduces the objective: check f by "
    "al.check_derivative, or start elsewhere",
    Status.UPHILL: "a step goes uphill: the gradient, or what is called a projection onto a convex set, is none",
    Status.NOT_FINITE: "NaN or infinity in the data, or in what the operator returned; x is the last finite iterate",
    Status.M_NOT_FINITE: "NaN or infinity in what the preconditioner M returned; x is the last finite iterate",
    Status.M_NOT_ADJOINT: "the preconditioner M is not self-adjoint, or not linear: ⟨g, Mh⟩ ≠ ⟨Mg, h⟩ for two random "
    "vectors",
    Status.M_NOT_POSITIVE: "the preconditioner M is not positive definite, or not to rounding: a vector s with "
    "⟨s, Ms⟩ ≤ 0",
    Status.ILL_CONDITIONED: "the condition number exceeds conlim: use damp > 0, or a larger conlim",
    Status.STOPPED: "stopped by the callback",
    Status.LATE: "max_seconds have passed before the tolerance was reached",
    Status.EXHAUSTED: "maxiter was reached before the tolerance",
}


@dataclass(frozen=True, eq=False)
class Info:
    """The state of a solver after a step, for its callback.

    Attributes
    ----------
    iteration : int
        Number of steps so far, 1 after the first.
    residual : float or Tensor
        The residual norm that ``Solution.residual_norms`` has for this step; with ``batch_dims``, for each problem.
    gradient : float or Tensor
        The norm of the gradient: ``‖AᴴW(y − Ax) − damp² x‖``; for ``cg``, which solves ``Ax = b``, the residual norm.
    """

    iteration: int
    residual: float | Tensor
    gradient: float | Tensor


Callback = Callable[[X, Info], Any]


@dataclass(frozen=True)
class Limits:
    """When a solver stops apart from its tolerances."""

    maxiter: int
    callback: Callback | None = None
    noise: float | Tensor | None = None  # the residual ‖Ax − y‖_W that is small enough
    xtol: float = 0.0
    max_seconds: float | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        nonnegative("xtol", self.xtol)
        if self.max_seconds is not None:
            nonnegative("max_seconds", self.max_seconds)


@dataclass(frozen=True, eq=False)
class Solution(Generic[X]):
    """The approximate solution x of ``Ax = b`` or ``min ‖Ax − y‖²`` that a solver found, and how it converged.

    Attributes
    ----------
    x : pytree of tensors
        The last iterate, an element of the domain.
    converged : bool, or Tensor of bool
        Whether x meets a stopping rule of the solver by its residual, computed anew, or the last step is within
        ``xtol``; with ``batch_dims``, for each problem of the batch.
    iterations : int, or Tensor of int
        Number of steps; with ``batch_dims``, for each problem.
    residual_norms : Tensor
        The norms that the solver watches, of the start and after each step, ``float64``, of shape ``(steps + 1,
        *batch)``; ``measure`` names them, and those of two solvers can be compared if it is the same. They are

        - ``‖b − Ax‖`` for ``cg``;
        - ``√(‖y − Ax‖²_W + damp² ‖x‖²)``, the root of twice the objective, for ``cgls``, ``lsmr``, ``sgd``, ``saga``,
          ``svrg`` and the closed form of ``F.solve()``, with penalties as well; for ``gauss_newton`` and
          ``levenberg_marquardt``, with ``f(x)`` in place of ``Ax``;
        - that of a subgradient of the objective, which tells the distance to a minimum and not from the data, for
          ``fista`` and ``projected_gradient``;
        - the larger one of two such, each in units of its first size, for ``pdhg``.

        The recurrences of ``cg``, ``cgls`` and ``lsmr`` compute them; but if ``converged``, the last one is computed
        from x. A problem that has stopped keeps its last value.
    reason : str
        Why the solver stopped, in words.
    measure : str
        The name of these norms, in words.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import identity
    >>> from adjointlab.solvers import cg
    >>> solution = cg(identity((2,)), torch.ones(2))
    >>> solution.converged, solution.iterations
    (True, 1)
    """

    x: X = field(repr=False)
    converged: bool | Tensor
    iterations: int | Tensor
    residual_norms: Tensor = field(repr=False)
    reason: str
    measure: str = field(default="residual norm", repr=False)

    def __str__(self) -> str:
        return aligned(*self._table())

    def _repr_html_(self) -> str:
        title, rows = self._table()
        return html_table(title, bool(torch.as_tensor(self.converged).all()), rows)

    def _table(self) -> tuple[str, list[tuple[str, str]]]:
        converged, steps = torch.as_tensor(self.converged), torch.as_tensor(self.iterations)
        first, last = self.residual_norms[0], self.residual_norms[-1]
        if converged.ndim:
            title = f"{int(converged.sum())} of {converged.numel()} problems converged"
        else:
            title = "converged" if self.converged else "not converged"
        low, high = int(steps.min()), int(steps.max())
        rows = [
            ("iterations", str(low) if low == high else f"{low} to {high}"),
            (
                self.measure,
                f"{float(first.max()):.4g} at the start, {float(last.max()):.4g} at the end"
                + " (the largest of all)" * bool(converged.ndim),
            ),
            ("reason", self.reason.removeprefix("converged: ")),
        ]
        return f"Solution: {title}", rows

    def plot(self, ax: Any = None) -> Any:
        """Draw ``residual_norms`` over the iterations, on a logarithmic scale; needs matplotlib.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw; new axes of ``matplotlib.pyplot`` if not given.

        Returns
        -------
        matplotlib.axes.Axes
            The axes, with one curve for each problem of a batch.
        """
        if ax is None:
            from matplotlib import pyplot

            _, ax = pyplot.subplots(layout="constrained")
        ax.semilogy(self.residual_norms.detach().cpu().reshape(len(self.residual_norms), -1).numpy())
        ax.set_xlabel("iteration")
        ax.set_ylabel(self.measure)
        return ax


class Monitor:
    """Records which problems still run, why the others stopped, and their residual norms.

    A step copies one number to the host: how many problems are running. Callback and progress line copy more.

    Rounding makes the recurrences of a solver drift away from the true residuals. So the solver reopens the problems
    that have converged, and restarts them from the residual of their x, as long as each restart halves that. A problem
    in which it does not is not converged: it has reached the precision of the dtype.
    """

    def __init__(self, problem: Problem, limits: Limits, line: Line, begin: float = 0.0) -> None:
        self.problem, self.limits = problem, limits
        vectors = self.vectors = problem.domain
        self._begin = begin
        noise = limits.noise
        self._noise = None if noise is None else problem.unit * of_each(vectors, "noise", noise).detach()
        self.status = torch.zeros(vectors.batch, dtype=torch.int64, device=vectors.device)
        self._codes = torch.arange(Status.EXHAUSTED + 1, device=vectors.device).unbind()
        self.steps = torch.zeros_like(self.status)
        self.norms: list[Tensor] = []
        self._to_verify = self.running
        self._moved = False  # since the last start
        self._bound = vectors.scalar(math.inf)  # largest error of a restart that is worth going on from: half the last
        self.total = self.status.numel()
        self._line = line
        self._gradient = vectors.scalar(math.nan)

    @property
    def running(self) -> Tensor:
        """The problems that have not stopped, as a mask."""
        return self.status == Status.RUNNING

    def stop(self, where: Tensor, why: int) -> None:
        """Stop the running problems ``where``, for the reason ``why``."""
        self.status = torch.where(where & (self.status == Status.RUNNING), self._codes[why], self.status)

    def judge(self, size: Tensor) -> None:
        """Stop the problems in which ``⟨s, Ms⟩`` is no positive number, for which a preconditioner is to blame."""
        if self.problem.precondition is not None:
            self.stop(~(size.abs() < math.inf), Status.M_NOT_FINITE)
            self.stop(size <= 0, Status.M_NOT_POSITIVE)

    def compare(self, residual: Tensor, rounding: Tensor | float = 0.0) -> None:
        """Stop the problems in which the residual ``‖Ax − y‖_W`` is within the noise."""
        if self._noise is not None:
            self.stop(residual <= self._noise + rounding, Status.NOISE)

    def start(self, norm: Tensor, error: Tensor) -> tuple[bool, bool]:
        """Record the residuals of a start; return whether any problem runs, and whether some have stopped."""
        self.stop(error > self._bound, Status.STAGNATED)
        self._bound, self._moved = error / 2, False
        self._gradient = torch.where(self._to_verify, error, self._gradient)
        self.norms.append(torch.where(self._to_verify, norm, self.norms.pop()) if self.norms else norm)
        return self._whether_running()

    def step(
        self, x: Vector, norm: Tensor, gradient: Tensor, moved: Tensor, change: tuple[Tensor, Vector] | None = None
    ) -> tuple[bool, bool]:
        """Record a step (αp, if told) of those ``moved``; return whether any problem runs, and whether some stopped."""
        if change is not None and self.limits.xtol:
            length = change[0].abs() * self.vectors.norm(change[1])
            self.stop(moved & (length <= self.limits.xtol * self.vectors.norm(x)), Status.SHORT)
        self.norms.append(torch.where(moved, norm, self.norms[-1]))
        self.steps = self.steps + moved
        self._moved = True
        if self.limits.callback is not None:
            self._gradient = torch.where(moved, gradient, self._gradient)
            unstopped = self.limits.callback(self.problem.copy(x), self._info()) is not True
            if not self.vectors.space.every(unstopped):  # one process stops all
                self.stop(torch.ones_like(moved), Status.STOPPED)
        self._line.step(note=lambda: f"residual {float(self.norms[-1].max()) / self.problem.unit:.2e}")
        return self._whether_running()

    def _info(self) -> Info:
        residual, gradient = self.norms[-1] / self.problem.unit, self._gradient / self.problem.unit / self.problem.gain
        if self.vectors.batch:
            return Info(len(self.norms) - 1, residual, gradient)
        return Info(len(self.norms) - 1, float(residual), float(gradient))

    def reopen(self) -> bool:
        """Set the problems that converged by steps back to running; return whether there are any."""
        if not self._moved:
            return False
        self._to_verify = self._is_any_of(VERIFIED)
        self.status = torch.where(self._to_verify, self._codes[Status.RUNNING], self.status)
        return bool(self._to_verify.any())

    def solution(self, x: Vector) -> Solution:
        """Return the solution, once the solver has ended."""
        self.stop(self.running, Status.EXHAUSTED)
        if self.problem.factor > 1:
            overflow = self.vectors.largest_entry(x) * self.problem.factor > self.vectors.largest
            self.status = torch.where(overflow, self._codes[Status.NOT_FINITE], self.status)
            self.vectors.fill(x, overflow)
        converged = self._is_any_of(CONVERGED)
        single = not self.vectors.batch
        norms = torch.stack(self.norms) / self.problem.unit
        rows = torch.arange(len(norms), device=norms.device).reshape(-1, *[1] * self.steps.ndim)
        return Solution(
            self.problem.element(x),
            bool(converged) if single else converged,
            int(self.steps) if single else self.steps,
            torch.where(rows < self.steps, norms, norms[-1]),
            self._reason(),
        )

    def _is_any_of(self, statuses: tuple[Status, ...]) -> Tensor:
        return torch.isin(self.status, torch.tensor(statuses, device=self.status.device))

    def _whether_running(self) -> tuple[bool, bool]:
        if self.limits.max_seconds is not None:
            in_time = self.limits.clock() - self._begin < self.limits.max_seconds
            if not self.vectors.space.every(in_time):  # for all processes
                self.stop(self.running, Status.LATE)
        count = int(self.running.sum())
        return count > 0 and len(self.norms) <= self.limits.maxiter, count < self.total

    def _reason(self) -> str:
        codes, counts = (found.tolist() for found in self.status.unique(return_counts=True))
        if len(codes) == 1:
            return REASONS[codes[0]]
        return "; ".join(
            f"{count} of {self.total} problems: {REASONS[code]}" for code, count in zip(codes, counts, strict=True)
        )


def solve(
    run: Callable[[Problem, Vector, Monitor, bool], None],
    problem: Problem,
    x0: Any,
    *,
    name: str,
    limits: Limits,
    progress: bool | None,
    scale_operator: bool = True,
) -> Solution:
    """Return the solution by ``run(problem, x, monitor, started)``, which iterates on x in place."""
    space, shown = problem.domain.space, progress_of(name, progress, limits.maxiter, most=True)
    M, begin = problem.precondition, limits.clock()
    with contextlib.ExitStack() as stack:
        for block in (torch.no_grad(), space.without_autocast(), problem.A.frozen()):
            stack.enter_context(block)
        if isinstance(M, LinearOperator):
            stack.enter_context(M.frozen())
        line = stack.enter_context(shown)
        require_apart(problem.A, problem.domain.batch)
        inner = problem.diagonalized().scaled(operator=scale_operator).leveled()
        monitor = Monitor(inner, limits, line, begin)
        _judge(inner, monitor)
        x = inner.start(x0)
        run(inner, x, monitor, x0 is not None)
        return qualified(monitor.solution(x), problem.A)


def qualified(solution: Solution[X], *operators: LinearOperator) -> Solution[X]:
    """Return a solution whose reason says what an unchecked adjoint in one of the operators costs, if any."""
    cost = next((said for A in operators if (said := cost_of_mismatch(A))), "")
    return replace(solution, reason=f"{solution.reason}; but {cost}") if cost else solution


def _judge(problem: Problem, monitor: Monitor) -> None:
    """Stop the problems whose preconditioner is wrong for random vectors g and h: ``⟨g, Mh⟩ = ⟨Mg, h⟩``."""
    if problem.precondition is None:
        return
    # The difference is about the Frobenius norm of M − Mᴴ, and ‖Mg‖ that of M. One in single precision is right enough.
    domain, (g, h) = problem.domain, (problem.probe(1), problem.probe(2))
    mg, size = problem.preconditioned(g)
    monitor.judge(size)
    product, scale = domain.dot(mg, h), domain.norm(mg)
    mh, _ = problem.preconditioned(h)
    gap, scale = (domain.dot(g, mh) - product).abs(), scale + domain.norm(mh)
    eps = max(domain.space.eps, torch.finfo(torch.float32).eps)
    monitor.stop(gap > eps**0.5 * scale, Status.M_NOT_ADJOINT)
