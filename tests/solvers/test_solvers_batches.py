"""Solvers on batches: every entry is a problem of its own, and operators that mix them are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from laws import norm
from solver_problems import close, every_solver, minimiser
from torch import Tensor

import adjointlab as al


def batch(n: int = 6) -> tuple[al.LinearOperator, Tensor]:
    """Return an operator of four problems of very different condition."""
    matrices = torch.stack([torch.eye(n) + s * torch.randn(n, n) for s in (0, 1e-3, 0.1, 0.4)]).double()
    domain = torch.zeros(4, n, dtype=torch.float64)
    return al.linear_operator(
        lambda x: (matrices @ x[..., None])[..., 0], domain, batch_dims=1, engine="eager"
    ), matrices


@every_solver
def test_every_problem_of_a_batch_stops_by_itself(solve: Any) -> None:
    A, matrices = batch()
    y = torch.randn(4, 6, dtype=torch.float64)
    together = solve(A, y, tol=1e-8)
    assert together.converged.tolist() == [True] * 4
    for i, matrix in enumerate(matrices):
        alone = solve(
            al.linear_operator(lambda x, m=matrix: m @ x, torch.zeros(6, dtype=torch.float64)), y[i], tol=1e-8
        )
        assert int(together.iterations[i]) == alone.iterations
        assert norm(together.x[i] - alone.x) <= 1e4 * A.domain.eps * norm(alone.x)
        own = together.residual_norms[:, i]
        assert torch.equal(own[alone.iterations :], own[alone.iterations].expand(len(own) - alone.iterations))
    assert together.residual_norms.shape == (int(together.iterations.max()) + 1, 4)
    assert together.iterations[0] < together.iterations[3]


@every_solver
@pytest.mark.parametrize("weighted", [False, True])
def test_warm_damped_batches(solve: Any, weighted: bool) -> None:
    A, matrices = batch()
    y, x0 = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    weight = torch.rand(4, 6, dtype=torch.float64) if weighted else None
    x0[0] = minimiser(matrices[0], y[0], 0.3, None if weight is None else weight[0])  # one of them has nothing to do
    found = solve(A, y, x0=x0, damp=0.3, weight=weight)
    for i, matrix in enumerate(matrices):
        w = torch.ones(6, dtype=torch.float64) if weight is None else weight[i]
        assert close(found.x[i], minimiser(matrix, y[i], 0.3, w), w.sqrt()[:, None] * matrix)
        last = ((w * (y[i] - matrix @ found.x[i]) ** 2).sum() + 0.09 * (found.x[i] ** 2).sum()).sqrt()
        assert abs(float(found.residual_norms[-1, i] - last)) <= 1e3 * A.domain.eps * norm(y[i])
    assert found.iterations[0] <= 1 < found.iterations[3]


def test_cg_over_a_batch_of_another_size() -> None:
    A = al.linear_operator(lambda x: 2 * x, torch.zeros(1, 5), batch_dims=1)
    solution = al.solvers.cg(A, torch.ones(3, 5))
    assert torch.equal(solution.x, torch.full((3, 5), 0.5))
    assert solution.converged.shape == (3,)


@every_solver
def test_one_bad_problem_leaves_the_others_alone(solve: Any) -> None:
    A, matrices = batch()
    y = torch.randn(4, 6, dtype=torch.float64)
    y[1, 2] = math.nan
    y[2] = 0
    solution = solve(A, y, tol=1e-10)
    assert solution.converged.tolist() == [True, False, True, True]
    assert torch.isfinite(solution.x).all()
    assert norm(solution.x[2]) == 0
    assert close(solution.x[3], torch.linalg.solve(matrices[3], y[3]), matrices[3], 1e-10)
    assert "1 of 4 problems: NaN" in solution.reason


MIXED = {
    "up": lambda x: x.cumsum(0),
    "down": lambda x: x.flip(0).cumsum(0).flip(0),
    "mean": lambda x: x - 0.5 * x.mean(0, keepdim=True),
}


@pytest.mark.parametrize("mixed", MIXED)
def test_entries_of_a_batch_that_are_mixed_are_refused(mixed: str) -> None:
    A, y = al.linear_operator(MIXED[mixed], (1, 4), batch_dims=1), torch.ones(3, 4)
    F = al.LeastSquares(A, y)
    for attempt in (lambda: al.solvers.cgls(A, y), lambda: al.solvers.fista(F, al.prox.l1(1.0))):
        with pytest.raises(al.SpaceMismatchError, match="treats the entries of a batch apart"):
            attempt()
    assert al.solvers.cgls(A, y[:1]).converged.all()  # there is nothing to mix
    F = al.LeastSquares(al.linear_operator(torch.nn.Identity(), (1, 4), batch_dims=1), y)
    with pytest.raises(al.SpaceMismatchError, match="treats the entries of a batch apart"):
        al.solvers.pdhg(F, A, al.prox.l1(1.0))


class Switched(torch.nn.Module):
    """Mixes the entries of a batch by a share that can be changed."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.share == 0 else x + self.share * x.roll(1, 0)


def test_whether_entries_are_mixed_is_asked_of_the_operator_as_it_is() -> None:
    model, y = Switched(0.0), torch.ones(3, 4)
    A = al.linear_operator(model, (1, 4), batch_dims=1)
    assert al.solvers.cgls(A, y).converged.all()
    model.share = 1e-8  # of what rounding would make
    assert al.solvers.cgls(A, y).converged.all()
    model.share = 0.5
    with pytest.raises(al.SpaceMismatchError, match="treats the entries of a batch apart"):
        al.solvers.cgls(A, y)
    model.share = 0.0
    assert al.solvers.cgls(A, y).converged.all()


def test_batches_of_another_size_are_refused() -> None:
    B, _ = batch()
    with pytest.raises(al.SpaceMismatchError, match="x0 of the batch sizes"):
        al.solvers.cgls(B, torch.ones(4, 6).double(), x0=torch.ones(3, 6).double())
    with pytest.raises(al.SpaceMismatchError, match="weights of the batch sizes"):
        al.solvers.cgls(B, torch.ones(4, 6).double(), weight=torch.ones(3, 6).double())
