"""Solvers at the limits of precision: what they claim is verified, and noise is not amplified."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import norm
from solver_problems import LEAST_SQUARES, dense, every_solver, minimiser, positive

import adjointlab as al

SOLVERS = {"cg": al.solvers.cg, **LEAST_SQUARES}


@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
@pytest.mark.parametrize("rank", [3, 6])
def test_data_that_no_x_explains_give_zero(solve: Any, dtype: torch.dtype, rank: int) -> None:
    matrix = torch.randn(9, rank, dtype=torch.float64) @ torch.randn(rank, 6, dtype=torch.float64)
    y = torch.randn(9, dtype=torch.float64)
    y = (y - matrix @ (torch.linalg.pinv(matrix) @ y)).to(dtype)
    A = al.linear_operator(lambda x: matrix.to(dtype) @ x, torch.zeros(6, dtype=dtype))
    solution = solve(A, y, tol=1e-6)
    assert solution.converged
    smallest = float(torch.linalg.svdvals(matrix)[rank - 1])
    scale = norm(matrix) / smallest**2 * norm(y)
    assert norm(solution.x) <= 64 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("name", SOLVERS)
def test_a_far_start_is_left_behind(name: str) -> None:
    A, matrix = positive(8, torch.float32)
    b = torch.randn(8)
    solution = SOLVERS[name](A, b, x0=1e8 * torch.randn(8), tol=1e-5, maxiter=200)
    assert solution.converged
    residual = norm(b.double() - matrix.double() @ solution.x.double())
    assert residual <= 1e-4 * norm(b)
    assert abs(float(solution.residual_norms[-1]) - residual) <= 1e-5 * norm(b)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
def test_data_zero_lead_any_start_to_zero(name: str, dtype: torch.dtype) -> None:
    A, _ = positive(8, dtype)
    x0 = torch.randn(8, dtype=dtype)
    solution = SOLVERS[name](A, torch.zeros(8, dtype=dtype), x0=x0, tol=1e-5)
    assert solution.converged
    assert 0 < solution.iterations <= 12
    assert norm(solution.x) <= 1e-3 * norm(x0)


def test_cg_tells_the_residual_of_x_itself() -> None:
    q = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64))[0]
    matrix = (q * torch.logspace(0, -4, 50, dtype=torch.float64) @ q.T).float()
    b = torch.randn(50)
    solution = al.solvers.cg(al.linear_operator(lambda x: matrix @ x, torch.zeros(50)), b)
    residual = norm(b.double() - matrix.double() @ solution.x.double())
    assert residual > 1e-5 * norm(b)  # which rounding explains: x is as large as 1e4 b
    assert "precision" in solution.reason
    assert abs(float(solution.residual_norms[-1]) - residual) <= 0.5 * residual


@every_solver
def test_problems_of_a_batch_are_verified_each(solve: Any) -> None:
    matrix = dense(9, 6, torch.float32)[1]
    A = al.linear_operator(lambda x: x @ matrix.T, torch.zeros(1, 6), batch_dims=1)
    y, x0 = torch.randn(3, 9), torch.randn(3, 6)
    y[1], x0[2] = 0, 1e7 * x0[2]
    solution = solve(A, y, x0=x0, tol=1e-5)
    assert solution.converged.all()
    for i in range(3):
        expected = minimiser(matrix, y[i])
        scale = norm(expected) or norm(x0[i])
        assert norm(solution.x[i].double() - expected) <= 1e-3 * float(torch.linalg.cond(matrix)) ** 2 * scale
        steps = int(solution.iterations[i])
        assert (solution.residual_norms[steps:, i] == solution.residual_norms[-1, i]).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-15])
@every_solver
def test_x_stays_finite(solve: Any, scale: float) -> None:
    A, _ = dense(8, 6, torch.float32)
    solution = solve(scale * A, torch.randn(8), tol=1e-5)
    assert torch.isfinite(solution.x).all()
