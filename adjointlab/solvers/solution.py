"""What a solver returns, and how it keeps account: one status for each problem of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adjointlab.solvers.arithmetic import Vector
from adjointlab.solvers.problem import Problem

Callback = Callable[[Any], Any]

RUNNING, SOLVED, LEAST_SQUARES, PRECISION, NO_CURVATURE, BREAKDOWN, NOT_FINITE, ILL_CONDITIONED, STOPPED, EXHAUSTED = (
    range(10)
)
_CONVERGED = (SOLVED, LEAST_SQUARES, PRECISION)
REASONS = {
    SOLVED: "converged: the residual is within the tolerance",
    LEAST_SQUARES: "converged: the gradient of the least-squares problem is within the tolerance",
    PRECISION: "converged: as far as the precision of the dtype allows",
    NO_CURVATURE: "breakdown: a direction p with ⟨p, Ap⟩ ≤ 0, so that A is not positive definite (or not self-adjoint)",
    BREAKDOWN: "breakdown: a step of no or of infinite length",
    NOT_FINITE: "NaN or infinity in the data, or in what the operator returned; x is the last finite iterate",
    ILL_CONDITIONED: "the condition number exceeds conlim: use damp > 0, or a larger conlim",
    STOPPED: "stopped by the callback",
    EXHAUSTED: "maxiter was reached before the tolerance",
}


@dataclass(frozen=True, eq=False)
class Solution:
    """The outcome of a solve.

    Attributes
    ----------
    x : pytree of tensors
        The last iterate, an element of the domain.
    converged : bool, or Tensor of bool
        Whether a stopping rule was met; with ``batch_dims``, for each problem of the batch.
    iterations : int, or Tensor of int
        Number of steps taken; with ``batch_dims``, of each problem.
    residual_norms : Tensor
        ``float64``, of shape ``(steps + 1, *batch)``, the first being that of the start: ``‖b − Ax‖`` by ``cg``,
        ``√(‖y − Ax‖²_W + damp² ‖x‖²)`` by ``cgls`` and ``lsmr``, as their recurrences have it; the last one is that of
        x, where ``converged``. A problem that has stopped keeps its last value.
    reason : str
        Why it stopped, in words.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import identity
    >>> from adjointlab.solvers import cg
    >>> solution = cg(identity((2,)), torch.ones(2))
    >>> solution.converged, solution.iterations
    (True, 1)
    """

    x: Any = field(repr=False)
    converged: bool | Tensor
    iterations: int | Tensor
    residual_norms: Tensor = field(repr=False)
    reason: str


class Monitor:
    """Which problems still run, why the others stopped, and how the residuals fell.

    A step costs one exchange with the host: how many problems are running. Callback and progress bar add theirs.

    The recurrences of the solvers drift away from what they stand for, by rounding. So a claim to have converged is
    verified: the problem is reopened, and started again from the residual of its x. If that is not as claimed, the
    solver goes on as long as each start from a given ``x0`` halves it (a far ``x0`` leaves large rounding errors, which
    the next start repairs); from zero there is nothing to gain, and it has gone as far as the precision allows.
    """

    def __init__(self, problem: Problem, maxiter: int, callback: Callback | None, progress: bool, name: str) -> None:
        self.problem = problem
        vectors = self.vectors = problem.domain
        self.maxiter = maxiter
        self.status = torch.zeros(vectors.batch, dtype=torch.int64, device=vectors.device)
        self._codes = torch.arange(EXHAUSTED + 1, device=vectors.device).unbind()
        self.steps = torch.zeros_like(self.status)
        self.norms: list[Tensor] = []
        self._claimed = self.running
        self.total = self.status.numel()
        self._callback = callback
        self._bar = _bar(maxiter, name) if progress else None

    @property
    def running(self) -> Tensor:
        """Where the problems are that have not stopped."""
        return self.status == RUNNING

    def stop(self, where: Tensor, why: int) -> None:
        """Stop the running problems ``where``, for the reason ``why``."""
        self.status = torch.where(where & (self.status == RUNNING), self._codes[why], self.status)

    def start(self, norm: Tensor) -> tuple[bool, bool]:
        """Record the residuals of a start; return whether there is anything to do, and whether only for some."""
        self.norms.append(torch.where(self._claimed, norm, self.norms.pop()) if self.norms else norm)
        return self._onward()

    def step(self, x: Vector, norm: Tensor, moved: Tensor) -> tuple[bool, bool]:
        """Record a step that moved the problems ``moved``; return whether to go on, and whether only with some."""
        self.norms.append(torch.where(moved, norm, self.norms[-1]))
        self.steps = self.steps + moved
        if self._callback is not None:
            onward = self._callback(self.problem.copy(x)) is not True
            if not self.vectors.space.every(onward):  # on any process, where there are several
                self.stop(torch.ones_like(moved), STOPPED)
        if self._bar is not None:
            self._bar.set_postfix_str(f"residual {float(self.norms[-1].max()):.3e}", refresh=False)
            self._bar.update()
        return self._onward()

    def reopen(self) -> bool:
        """Let the problems run on that claim to have converged; return whether there are any."""
        self._claimed = self._converged()
        self.status = torch.where(self._claimed, self._codes[RUNNING], self.status)
        return bool(self._claimed.any())

    def solution(self, x: Vector) -> Solution:
        """Return the outcome."""
        if self._bar is not None:
            self._bar.close()
        self.stop(self.running, EXHAUSTED)
        converged = self._converged()
        single = not self.vectors.batch
        norms = torch.stack(self.norms)
        rows = torch.arange(len(norms), device=norms.device).reshape(-1, *[1] * self.steps.ndim)
        return Solution(
            self.problem.element(x),
            bool(converged) if single else converged,
            int(self.steps) if single else self.steps,
            torch.where(rows < self.steps, norms, norms[-1]),
            self._reason(),
        )

    def _converged(self) -> Tensor:
        return torch.isin(self.status, torch.tensor(_CONVERGED, device=self.status.device))

    def _onward(self) -> tuple[bool, bool]:
        count = int(self.running.sum())
        return count > 0 and len(self.norms) <= self.maxiter, count < self.total

    def _reason(self) -> str:
        codes, counts = (found.tolist() for found in self.status.unique(return_counts=True))
        if len(codes) == 1:
            return REASONS[codes[0]]
        return "; ".join(
            f"{count} of {self.total} problems: {REASONS[code]}" for code, count in zip(codes, counts, strict=True)
        )


def _bar(maxiter: int, name: str) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=maxiter, desc=name)
