"""What stops a solver apart from its tolerances: the noise, a step that is short, and the time."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from laws import norm
from solver_problems import dense, every_solver, positive

import adjointlab as al
from adjointlab.solvers.conjugate_gradients import _cg
from adjointlab.solvers.problem import Problem
from adjointlab.solvers.solution import Limits, solve


@every_solver
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("damp", [0.0, 0.1])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_first_residual_within_the_noise_stops(
    solve: Any, weighted: bool, damp: float, started: bool, preconditioned: bool
) -> None:
    A, matrix = dense(60, 40)
    y, w = torch.randn(60, dtype=torch.float64), torch.rand(60, dtype=torch.float64) + 0.5
    options: dict[str, Any] = {"damp": damp, "weight": w if weighted else None}
    options["x0"] = torch.randn(40, dtype=torch.float64) if started else None
    options["precondition"] = al.precondition.diagonal(A) if preconditioned else None
    w = w if weighted else torch.ones_like(w)
    iterates: list[Any] = []
    solve(A, y, callback=lambda x, info: iterates.append(x), **options)
    residuals = [float((w * (y - matrix @ x).square()).sum().sqrt()) for x in iterates]
    noise = math.sqrt(residuals[4] * residuals[5])
    found = solve(A, y, noise=noise, **options)
    assert found.converged
    assert found.reason == "converged: the residual is within the noise"
    assert found.iterations == 1 + next(i for i, size in enumerate(residuals) if size <= noise)
    assert float((w * (y - matrix @ found.x).square()).sum().sqrt()) <= noise * (1 + 1e-12)


@every_solver
def test_noise_of_each_problem_of_a_batch(solve: Any) -> None:
    A = al.linear_operator(lambda x: x * torch.linspace(1, 9, 30).double(), torch.zeros(1, 30).double(), batch_dims=1)
    y = torch.randn(3, 30, dtype=torch.float64)
    noise = torch.tensor([1e3, 1.0, 0.0], dtype=torch.float64)
    found = solve(A, y, noise=noise)
    assert found.converged.all()
    assert found.iterations[0] == 0 < found.iterations[1] < found.iterations[2]
    assert (A(found.x) - y)[1].norm() <= 1 + 1e-12


@every_solver
def test_noise_of_extreme_sizes(solve: Any) -> None:
    A, matrix = dense(60, 40)
    y = 1e-140 * torch.randn(60, dtype=torch.float64)
    found = solve(1e-120 * A, y, noise=0.7 * norm(y))
    assert found.converged
    assert norm(1e-120 * matrix @ found.x - y) <= 0.7 * norm(y) * (1 + 1e-12)


@pytest.mark.parametrize("name", ["cg", "cgls", "lsmr"])
def test_a_short_step_stops(name: str) -> None:
    A, _ = positive(40)
    b = torch.randn(40, dtype=torch.float64)
    iterates = [torch.zeros(40, dtype=torch.float64)]
    found = getattr(al.solvers, name)(A, b, xtol=1e-3, callback=lambda x, info: iterates.append(x))
    assert found.converged
    assert found.reason == "converged: the last step is within the tolerance"
    changes = [norm(b - a) / norm(b) for a, b in itertools.pairwise(iterates)]
    assert changes[-1] <= 1e-3 * (1 + 1e-12)
    assert all(change > 1e-3 for change in changes[:-1])


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 0), (1.5, 1), (3.5, 3)])
def test_the_time_stops(seconds: float, steps: int) -> None:
    A, _ = positive(40)
    problem = Problem.of(A, torch.randn(40, dtype=torch.float64))
    ticks = itertools.count()  # one at the beginning, one before each step
    limits = Limits(100, max_seconds=seconds, clock=lambda: float(next(ticks)))
    found = solve(partial(_cg, tol=1e-12), problem, None, name="cg", limits=limits, progress=False)
    assert (found.converged, found.iterations) == (False, steps)
    assert found.reason == "max_seconds have passed before the tolerance was reached"


@pytest.mark.parametrize("name", ["cg", "cgls", "lsmr"])
def test_time_enough_changes_nothing(name: str) -> None:
    A, _ = positive(40)
    b = torch.randn(40, dtype=torch.float64)
    plain, limited = (getattr(al.solvers, name)(A, b, max_seconds=s) for s in (None, 1e6))
    assert torch.equal(plain.x, limited.x)
    assert plain.reason == limited.reason


@pytest.mark.parametrize("option", ["noise", "xtol", "max_seconds"])
@pytest.mark.parametrize("value", [-1.0, math.nan, True])
def test_limits_that_are_no_numbers_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"expected {option} to be a finite number of 0 or more"):
        al.solvers.cgls(al.identity((3,)), torch.ones(3), **{option: value})
