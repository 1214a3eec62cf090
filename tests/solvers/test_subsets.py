"""Ordered subsets: the minimum, whatever the parts; the account of it; and what goes wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import seeded
from solver_problems import close, minimiser
from torch import Tensor

import adjointlab as al
from adjointlab.solvers import saga, sgd, svrg

exact = pytest.mark.parametrize("solve", [saga, svrg])
every = pytest.mark.parametrize("solve", [sgd, saga, svrg])


def parts_of(M: Tensor, n: int) -> list[al.LinearOperator]:
    """Return interleaved rows of a matrix as operators that nothing is derived for."""
    return [pair(M[i::n]) for i in range(n)]


def pair(M: Tensor) -> al.LinearOperator:
    return al.LinearOperator(M.mv, M.mH.mv, al.Space.of(M[0]), al.Space.of(M[:, 0]))


def problem(
    m: int = 20, n: int = 6, parts: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Any, Any]:
    M, y = torch.randn(m, n, dtype=dtype, generator=seeded(0)), torch.randn(m, dtype=dtype, generator=seeded(1))
    return M, y, parts_of(M, parts), [y[i::parts] for i in range(parts)]


@exact
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("damp", [0.0, 0.7])
def test_variance_reduction_leads_to_the_minimum(solve: Any, dtype: torch.dtype, damp: float) -> None:
    M, y, A, data = problem(dtype=dtype)
    solution = solve(A, data, damp=damp, maxiter=1000, tol=2e-15 if solve is saga else 1e-13)
    assert solution.converged
    assert close(solution.x, minimiser(M, y, damp), M)


def test_ordered_subsets_solve_what_has_a_solution() -> None:
    M, _, A, _ = problem()
    x = torch.randn(6, dtype=torch.float64, generator=seeded(2))
    solution = sgd(A, [P(x) for P in A], maxiter=2000, tol=1e-13)
    assert solution.converged
    assert close(solution.x, x, M)


def test_steps_that_shrink_come_closer_to_the_minimum() -> None:
    M, y, A, data = problem()
    best = minimiser(M, y, 0.0)
    constant, shrinking = (float((sgd(A, data, decay=d, maxiter=200, tol=0).x - best).norm()) for d in (0.0, 1.0))
    assert shrinking < constant / 3


def test_momentum_gains_where_parts_agree() -> None:
    M = torch.randn(400, 20, dtype=torch.float64, generator=seeded(0)) * torch.logspace(0, -2, 20, dtype=torch.float64)
    A, x = parts_of(M, 4), torch.randn(20, dtype=torch.float64, generator=seeded(2))
    plain, ahead = (sgd(A, [P(x) for P in A], momentum=b, maxiter=20, tol=0).residual_norms[-1] for b in (0.0, 0.9))
    assert ahead < plain / 2
    with pytest.raises(ValueError, match="expected momentum to be a number from 0 to below 1, got 1"):
        sgd(A, [P(x) for P in A], momentum=1)


def test_momentum_that_diverges_is_taken_back() -> None:
    _, y, A, data = problem(m=40, n=30, parts=8)
    solution = sgd(A, data, momentum=0.9, maxiter=60, tol=0)
    assert bool((solution.residual_norms <= 2 * y.norm()).all())


@every
def test_the_account(solve: Any) -> None:
    M, y, A, data = problem()
    seen: list[tuple[Tensor, Any]] = []
    solution = solve(A, data, damp=0.5, maxiter=5, tol=0, callback=lambda x, info: seen.append((x, info)))
    assert not solution.converged
    assert solution.iterations == 5
    assert solution.reason == "maxiter was reached before the tolerance"
    assert [info.iteration for _, info in seen] == [1, 2, 3, 4, 5]
    expected = [
        float(((M @ x - y).square().sum() + 0.25 * x.square().sum()).sqrt()) for x in (0 * M[0], *[x for x, _ in seen])
    ]
    torch.testing.assert_close(solution.residual_norms, torch.tensor(expected, dtype=torch.float64))
    assert [info.residual for _, info in seen] == solution.residual_norms[1:].tolist()
    assert torch.equal(seen[-1][0], solution.x)
    assert seen[-1][0] is not solution.x


@every
def test_the_callback_stops(solve: Any) -> None:
    _, _, A, data = problem()
    solution = solve(A, data, callback=lambda x, info: info.iteration == 2)
    assert (solution.iterations, solution.reason) == (2, "stopped by the callback")


@every
def test_orders_are_drawn_by_the_generator(solve: Any) -> None:
    _, _, A, data = problem()
    runs = [solve(A, data, maxiter=3, tol=0, generator=g).x for g in (None, None, seeded(7), seeded(7))]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[2], runs[3])
    assert not torch.equal(runs[0], runs[2])


@exact
def test_a_proximal_map_is_that_of_the_whole_problem(solve: Any) -> None:
    M, y, A, data = problem()
    weight = 3.0

    def shrink(x: Tensor, step: float) -> Tensor:
        return x.sign() * (x.abs() - weight * step).clamp(min=0)

    x = solve(A, data, prox=shrink, maxiter=3000, tol=1e-13).x
    assert 0 < int((x == 0).sum()) < 6
    slope = M.T @ (M @ x - y)  # −slope is a subgradient of weight ‖x‖₁
    assert bool((slope.abs() <= weight + 1e-9).all())
    torch.testing.assert_close(slope[x != 0], -weight * x[x != 0].sign())


@every
def test_one_operator_is_taken_in_parts_that_are_interleaved(solve: Any) -> None:
    M, y, A, data = problem(m=9, n=4, parts=3)
    whole = al.matrix(M, codomain=(9,))
    first, second = solve(whole, y, subsets=3, maxiter=3, tol=0), solve(A, data, maxiter=3, tol=0)
    assert close(first.x, second.x, M)


def test_affine_operators_and_pytrees() -> None:
    M, y, *_ = problem()
    layer = torch.nn.Linear(6, 20, dtype=torch.float64)
    f = al.affine_operator(layer, (6,))
    x = svrg(f.split(2), [y[:10], y[10:]], tol=1e-12, maxiter=500).x
    assert close(x, minimiser(layer.weight.detach(), y - layer.bias.detach(), 0.0), layer.weight.detach())
    B = al.hstack([pair(M), pair(2 * M)])
    z = svrg([B, B], [y, y], tol=1e-14, maxiter=500).x
    assert close(z[0] + 2 * z[1], minimiser(M, y, 0.0), M)


def test_steps_that_are_too_long_are_halved() -> None:
    M, y, A, data = problem()
    solution = svrg(A, data, step=10.0, maxiter=500, tol=1e-12)
    assert bool((solution.residual_norms.diff() <= 1e-12).all())
    assert close(solution.x, minimiser(M, y, 0.0), M)


@every
@pytest.mark.parametrize("step", [100.0, 1e300])
def test_steps_that_diverge_are_halved_or_end_with_a_reason(solve: Any, step: float) -> None:
    _, y, A, data = problem()
    solution = solve(A, data, step=step, maxiter=100, tol=1e-9)
    assert bool(solution.x.isfinite().all())
    assert bool((solution.residual_norms <= 2 * y.norm()).all())
    if step > 1e6:
        assert not solution.converged
        assert solution.reason == "breakdown: a step of no or of infinite length"


@every
def test_data_that_are_not_finite_end_with_a_reason(solve: Any) -> None:
    _, _, A, data = problem()
    data[1][0] = torch.nan
    solution = solve(A, data)
    assert (solution.iterations, solution.converged) == (0, False)
    assert "NaN or infinity" in solution.reason


@every
def test_zero_operators_and_zero_data_are_solved(solve: Any) -> None:
    M, _, A, data = problem()
    for operators, given in ((parts_of(0 * M, 4), data), (A, [0 * part for part in data])):
        solution = solve(operators, given)
        assert solution.converged
        assert not solution.x.any()


@every
def test_a_warm_start_is_left_alone(solve: Any) -> None:
    M, y, A, data = problem()
    x0, kept = (minimiser(M, y, 0.0) for _ in range(2))
    x = solve(A, data, x0=x0, maxiter=2).x
    assert torch.equal(x0, kept)
    assert x.data_ptr() != x0.data_ptr()


def test_a_batch_is_one_problem() -> None:
    M, y, *_ = problem()
    A = al.matrix(M, batch_dims=1)
    data = torch.stack([y, 2 * y])
    x = svrg(A, data, subsets=2, dim=1, tol=1e-12, maxiter=500).x
    assert close(x[1], minimiser(M, 2 * y, 0.0), M)


@every
def test_refusals_say_what_was_expected(solve: Any) -> None:
    M, y, A, data = problem()
    for arguments, options, error, said in (
        ((pair(M), y), {}, ValueError, "expected subsets to be an integer of 1 or more, got None"),
        ((pair(M), y), {"subsets": 21}, IndexError, "at least one of the 20 rows"),
        ((A, data), {"subsets": 4}, ValueError, "no number of subsets beside a list"),
        ((A, data[:2]), {}, al.SpaceMismatchError, "a list of data for 4 operators, one for each, got 2 of them"),
        ((A, y), {}, al.SpaceMismatchError, "got a Tensor"),
        (([], []), {}, al.SpaceMismatchError, "at least one operator"),
        (([A[0], pair(M.mT)], data[:2]), {}, al.SpaceMismatchError, "one domain"),
        (([torch.relu], data[:1]), {}, al.SpaceMismatchError, "expected a LinearOperator"),
        ((A, data), {"step": 0.0}, ValueError, "expected step to be positive"),
        ((A, data), {"damp": -1.0}, ValueError, "expected damp"),
        ((A, data), {"maxiter": -1}, ValueError, "expected maxiter"),
        ((A, data), {"tol": -1.0}, ValueError, "expected tol"),
        ((A, data), {"x0": torch.ones(5)}, al.SpaceMismatchError, "expected x0"),
    ):
        with pytest.raises(error, match=said):
            solve(*arguments, **options)


@pytest.mark.parametrize("solver", [al.solvers.sgd, al.solvers.saga, al.solvers.svrg])
def test_an_argument_that_nobody_knows(solver: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        solver(al.identity((4,)), torch.ones(4), subsets=2, steps=3)
