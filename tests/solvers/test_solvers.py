"""Solvers: against SciPy and dense algebra, over batches and pytrees, at breakdown, differentiated, and in memory."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import scipy.sparse.linalg as sp
import torch
from laws import norm, seeded
from solver_problems import close, dense, every_dtype, every_solver, minimiser, positive
from torch import Tensor, nn

import adjointlab as al
from adjointlab.adapters.scipy import to_scipy

# ----------------------------------------------------------------------------------------------------- right solutions


@every_dtype
def test_cg_solves_a_positive_system(dtype: torch.dtype) -> None:
    A, matrix = positive(12, dtype)
    b = torch.randn(12, dtype=dtype)
    solution = al.solvers.cg(A, b, tol=1e-12)
    assert solution.converged
    assert close(solution.x, torch.linalg.solve(matrix, b), matrix, power=1)


@every_dtype
@every_solver
@pytest.mark.parametrize("damp", [0.0, 0.7])
def test_least_squares_solution(solve: Any, dtype: torch.dtype, damp: float) -> None:
    A, matrix = dense(14, 9, dtype)
    y = torch.randn(14, dtype=dtype)
    solution = solve(A, y, damp=damp)
    assert solution.converged
    assert close(solution.x, minimiser(matrix, y, damp), matrix)


@every_solver
@pytest.mark.parametrize("damp", [0.0, 0.7])
def test_warm_start_leads_to_the_same_minimiser(solve: Any, damp: float) -> None:
    A, matrix = dense(14, 9, torch.complex128)
    y, x0 = torch.randn(14, dtype=torch.complex128), torch.randn(9, dtype=torch.complex128)
    kept = x0.clone()
    solution = solve(A, y, damp=damp, x0=x0)
    assert close(solution.x, minimiser(matrix, y, damp), matrix)
    assert torch.equal(x0, kept)


def test_warm_start_at_the_solution_takes_no_step() -> None:
    A, matrix = positive(6)
    x = torch.randn(6, dtype=torch.float64)
    assert al.solvers.cg(A, matrix @ x, x0=x).iterations == 0
    assert al.solvers.cgls(A, matrix @ x, x0=x).iterations == 0


@every_solver
@pytest.mark.parametrize("damp", [0.0, 0.7])
def test_weights(solve: Any, damp: float) -> None:
    A, matrix = dense(14, 9, torch.complex128)
    y, w = torch.randn(14, dtype=torch.complex128), torch.rand(14, dtype=torch.float64)
    w[3] = 0
    expected = minimiser(matrix, y, damp, w)
    x0 = torch.randn(9, dtype=torch.complex128)
    for weight, start in ((w, None), (al.diagonal(w.to(torch.complex128)), None), (w, x0)):
        assert close(solve(A, y, damp=damp, weight=weight, x0=start).x, expected, w.sqrt()[:, None] * matrix)


@every_solver
def test_least_norm_solution_of_an_underdetermined_system(solve: Any) -> None:
    A, matrix = dense(5, 9)
    y = torch.randn(5, dtype=torch.float64)
    assert close(solve(A, y).x, torch.linalg.pinv(matrix) @ y, matrix)


@every_solver
def test_affine_operators_lose_their_offset(solve: Any) -> None:
    layer = nn.Linear(4, 7, dtype=torch.float64).requires_grad_(False)
    f = al.affine_operator(layer, torch.zeros(4, dtype=torch.float64))
    x = torch.randn(4, dtype=torch.float64)
    assert close(solve(f, layer(x)).x, x, layer.weight)


@every_solver
def test_pytrees_of_real_and_complex_leaves(solve: Any) -> None:
    w = torch.randn(6, 3, dtype=torch.complex128)
    A = al.linear_operator(
        lambda d: (w @ d["z"] + d["t"].sum(), 2 * d["t"]),
        {"z": torch.zeros(3, dtype=torch.complex128), "t": torch.zeros(2, dtype=torch.float64)},
    )
    x = A.domain.randn(torch.Generator().manual_seed(1))
    found = solve(A, A(x)).x
    assert close(A.domain.vector(found), A.domain.vector(x), al.to_dense(A, real=True))


@every_solver
def test_real_linear_operators(solve: Any) -> None:
    A = al.linear_operator(torch.fft.rfft, torch.zeros(8, dtype=torch.float64))
    x = torch.randn(8, dtype=torch.float64)
    assert close(solve(A, A(x)).x, x, al.to_dense(A, real=True))


@pytest.mark.parametrize("damp", [0.0, 0.5])
def test_lsmr_is_the_one_of_scipy(damp: float) -> None:
    A, _ = dense(30, 20, torch.complex128)
    y = torch.randn(30, dtype=torch.complex128)
    for steps in (1, 3, 7):
        theirs = sp.lsmr(to_scipy(A), y.cpu().numpy(), damp=damp, maxiter=steps, atol=0, btol=0, conlim=0)
        ours = al.solvers.lsmr(A, y, damp=damp, maxiter=steps, atol=0, btol=0, conlim=0)
        assert norm(ours.x - torch.as_tensor(theirs[0])) <= 1e3 * A.domain.eps * norm(ours.x)
        assert math.isclose(ours.residual_norms[-1], theirs[3], rel_tol=1e3 * A.domain.eps)
        assert (ours.converged, ours.iterations) == (False, steps)


def test_cg_is_the_one_of_scipy() -> None:
    A, _ = positive(20)
    b = torch.randn(20, dtype=torch.float64)
    for steps in (1, 3, 7):
        theirs, _ = sp.cg(to_scipy(A), b.cpu().numpy(), maxiter=steps, rtol=0)
        ours = al.solvers.cg(A, b, maxiter=steps, tol=0)
        assert norm(ours.x - torch.as_tensor(theirs)) <= 1e3 * A.domain.eps * norm(b)


@every_solver
def test_lsmr_and_cgls_stop_where_scipy_does(solve: Any) -> None:
    A, _ = dense(60, 30)
    y = torch.randn(60, dtype=torch.float64)
    theirs = sp.lsmr(to_scipy(A), y.cpu().numpy(), atol=1e-6, btol=1e-6)
    assert abs(solve(A, y, tol=1e-6).iterations - theirs[2]) <= 8


@every_solver
@pytest.mark.parametrize("damp", [0.0, 0.5])
def test_residual_norms_are_those_of_the_iterates(solve: Any, damp: float) -> None:
    A, matrix = dense(14, 9)
    y = torch.randn(14, dtype=torch.float64)
    iterates: list[Tensor] = [torch.zeros(9, dtype=torch.float64)]
    solution = solve(A, y, damp=damp, callback=lambda x, info: iterates.append(x))
    assert solution.residual_norms.shape == (solution.iterations + 1,)
    for x, found in zip(iterates, solution.residual_norms, strict=True):
        expected = math.hypot(norm(y - matrix @ x), damp * norm(x))
        assert abs(expected - float(found)) <= 1e3 * A.domain.eps * norm(y)


# -------------------------------------------------------------------------------------------------------------- batches


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_cg_reports_an_indefinite_operator() -> None:
    A = al.diagonal(torch.tensor([1.0, -1.0]))
    solution = al.solvers.cg(A, torch.ones(2))
    assert not solution.converged
    assert "not positive definite" in solution.reason
    assert torch.isfinite(solution.x).all()


@every_solver
def test_nan_in_the_data_is_reported(solve: Any) -> None:
    solution = solve(al.identity((3,)), torch.tensor([1.0, math.nan, 0.0]))
    assert (solution.converged, solution.iterations) == (False, 0)
    assert solution.reason.startswith("NaN")
    assert torch.equal(solution.x, torch.zeros(3))


@pytest.mark.parametrize("name", ["cg", "cgls", "lsmr"])
@pytest.mark.parametrize("when", [1, 4])
def test_nan_from_the_operator_is_reported(name: str, when: int) -> None:
    calls = []
    matrix = torch.diag(torch.arange(1.0, 9.0))

    def forward(x: Tensor) -> Tensor:
        calls.append(1)
        return matrix @ x * (math.nan if len(calls) >= when else 1)

    A = al.LinearOperator(forward, lambda y: matrix @ y, al.Space.of((8,)), al.Space.of((8,)))
    with torch.no_grad():
        solution = getattr(al.solvers, name)(A, torch.ones(8))
    assert not solution.converged
    assert solution.reason.startswith("NaN")
    assert torch.isfinite(solution.x).all()


@every_solver
def test_a_wrong_adjoint_does_not_loop_forever(solve: Any) -> None:
    A, matrix = dense(9, 9)
    wrong = al.LinearOperator(A, lambda y: -(matrix @ y), A.domain, A.codomain)
    solution = solve(wrong, torch.randn(9, dtype=torch.float64))
    assert torch.isfinite(solution.x).all()


@pytest.mark.parametrize("name", ["cg", "cgls", "lsmr"])
def test_zero_operator_and_zero_data(name: str) -> None:
    solve = getattr(al.solvers, name)
    identity = al.identity((3,))
    nothing = solve(identity, torch.zeros(3))
    assert (nothing.converged, nothing.iterations) == (True, 0)
    assert torch.isfinite(solve(0 * identity, torch.ones(3)).x).all()


@pytest.mark.parametrize("name", ["cg", "cgls", "lsmr"])
def test_running_out_of_steps_is_reported(name: str) -> None:
    A, _ = positive(20)
    solution = getattr(al.solvers, name)(A, torch.randn(20, dtype=torch.float64), maxiter=2)
    assert (solution.converged, solution.iterations) == (False, 2)
    assert "maxiter" in solution.reason
    assert getattr(al.solvers, name)(A, torch.ones(20, dtype=torch.float64), maxiter=0).iterations == 0


def test_lsmr_reports_ill_conditioning() -> None:
    d = torch.logspace(0, -12, 12, dtype=torch.float64)
    solution = al.solvers.lsmr(al.diagonal(d), torch.ones(12, dtype=torch.float64), atol=1e-14, btol=1e-14, conlim=1e4)
    assert not solution.converged
    assert "conlim" in solution.reason


@pytest.mark.parametrize("name", ["cg", "cgls", "lsmr"])
def test_unreachable_tolerances_stop_at_the_precision(name: str) -> None:
    A, _ = positive(20, torch.float32)
    tolerance = {"atol": 0, "btol": 0, "conlim": 0} if name == "lsmr" else {"tol": 0}
    solution = getattr(al.solvers, name)(A, torch.randn(20), **tolerance)
    assert solution.converged
    assert "precision" in solution.reason
    assert solution.iterations < 200


@pytest.mark.parametrize("scale", [1e-25, 1e-16, 1e15])
@pytest.mark.parametrize("name", ["cg", "cgls", "lsmr"])
def test_solutions_of_large_vectors_scale_with_the_data(name: str, scale: float) -> None:
    A, b = al.diagonal(torch.linspace(1, 2, 9000)), torch.randn(9000)  # sums over blocks
    solution = getattr(al.solvers, name)(A, scale * b)
    assert solution.converged
    assert norm(A(solution.x / scale) - b) <= 1e-5 * norm(b)


@pytest.mark.parametrize("scale", [1e-25, 1e-16, 1e15])
@pytest.mark.parametrize("name", ["cg", "cgls", "lsmr"])
def test_solutions_scale_with_the_data(name: str, scale: float) -> None:
    A, matrix = positive(5000 // 500, torch.float32)
    b = torch.randn(10)
    solution = getattr(al.solvers, name)(A, scale * b)
    assert solution.converged
    assert close(solution.x / scale, torch.linalg.solve(matrix, b), matrix, 1e-6)


def test_callback_sees_copies_and_may_stop() -> None:
    A, _ = positive(20)
    seen: list[Tensor] = []

    def callback(x: Tensor, info: al.solvers.Info) -> bool:
        seen.append(x)
        return info.iteration == 3

    solution = al.solvers.cg(A, torch.randn(20, dtype=torch.float64), callback=callback)
    assert (solution.iterations, solution.reason) == (3, "stopped by the callback")
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], solution.x)


@pytest.mark.parametrize("scale", [1.0, 1e-20], ids=["scale 1", "scale 1e-20"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["single", "batch"])
@pytest.mark.parametrize("name", ["cg", "cgls", "lsmr"])
def test_info_has_the_norms_of_residual_and_gradient(
    name: str, batch: tuple[int, ...], dtype: torch.dtype, scale: float
) -> None:
    w = torch.randn(6, 6, dtype=dtype)
    w = w.mH @ w + 6 * torch.eye(6, dtype=dtype)
    space = al.Space.of((*batch, 6), dtype=dtype, batch_dims=len(batch))
    A = al.LinearOperator(lambda x: scale * (x @ w.mT), lambda y: scale * (y @ w.conj()), space, space)
    y = scale * space.randn()
    seen: list[al.solvers.Info] = []

    def callback(x: Tensor, info: al.solvers.Info) -> None:
        seen.append(info)
        r = (y - A(x)) / scale
        s = r if name == "cg" else A.H(r) / scale
        residual = scale * torch.linalg.vector_norm(r, dim=-1).double()
        gradient = scale * (1 if name == "cg" else scale) * torch.linalg.vector_norm(s, dim=-1).double()
        # Rounding of Ax, of a few units of its size, is in both, and passes through A in the gradient.
        size = 64 * torch.finfo(dtype).eps * torch.linalg.vector_norm(y, dim=-1).double()
        gain = 1.0 if name == "cg" else scale * float(torch.linalg.matrix_norm(w, 2))
        assert ((torch.as_tensor(info.residual, dtype=torch.float64) - residual).abs() <= size).all()
        assert ((torch.as_tensor(info.gradient, dtype=torch.float64) - gradient).abs() <= gain * size).all()

    options = {"atol": 0.0, "btol": 0.0} if name == "lsmr" else {"tol": 0.0}
    solution = getattr(al.solvers, name)(A, y, maxiter=4, callback=callback, **options)
    assert [info.iteration for info in seen] == [1, 2, 3, 4]
    for info, expected in zip(seen, solution.residual_norms[1:], strict=True):
        assert torch.equal(torch.as_tensor(info.residual, dtype=torch.float64), expected)


@pytest.mark.parametrize("name", ["cg", "cgls", "lsmr"])
def test_progress_line_that_is_asked_for(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    A, _ = positive(6)
    solver, b = getattr(al.solvers, name), torch.ones(6, dtype=torch.float64)
    steps = solver(A, b, progress=True).iterations
    assert capsys.readouterr().err == f"{name}: {steps} steps took 0 s\n"
    for asked in (None, False):
        solver(A, b, progress=asked)
        assert not capsys.readouterr().err


def test_a_solution_prints_as_a_table() -> None:
    A, _ = positive(6)
    solution = al.solvers.cg(A, torch.ones(6, dtype=torch.float64), tol=0.5)
    lines = str(solution).splitlines()
    assert lines[0] == "Solution: converged"
    assert lines[1].split() == ["iterations", str(solution.iterations)]
    assert "2.449 at the start" in lines[2]
    assert "the residual is within the tolerance" in lines[3]
    assert "<table>" in solution._repr_html_()
    few = al.solvers.cg(A, torch.ones(6, dtype=torch.float64), maxiter=1, tol=0.0)
    assert str(few).startswith("Solution: not converged")


def test_a_solution_of_a_batch_prints_as_a_table() -> None:
    A = al.linear_operator(nn.Linear(4, 4, bias=False, dtype=torch.float64), (2, 4), batch_dims=1)
    y = torch.stack([torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)])
    lines = str(al.solvers.cgls(A, y, maxiter=1, tol=0.0)).splitlines()
    assert lines[0] == "Solution: 1 of 2 problems converged"
    assert lines[1].split() == ["iterations", "0", "to", "1"]


def test_a_solution_draws_its_residuals() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    A, _ = positive(6)
    solution = al.solvers.cg(A, torch.ones(6, dtype=torch.float64))
    ax = solution.plot(figure.subplots())
    (curve,) = ax.get_lines()
    assert ax.get_yscale() == "log"
    assert torch.equal(torch.from_numpy(curve.get_ydata()), solution.residual_norms)


def test_solution_is_frozen() -> None:
    solution = al.solvers.cg(al.identity((2,)), torch.ones(2))
    with pytest.raises(dataclasses.FrozenInstanceError, match="converged"):
        solution.converged = False  # type: ignore[misc]


def test_what_is_refused() -> None:
    A, _ = dense(5, 4)
    y = torch.ones(5, dtype=torch.float64)
    with pytest.raises(al.SpaceMismatchError, match="cgls or lsmr"):
        al.solvers.cg(A, y)
    with pytest.raises(al.SpaceMismatchError, match="y to be an element"):
        al.solvers.cgls(A, torch.ones(4, dtype=torch.float64))
    with pytest.raises(al.SpaceMismatchError, match="x0 to be an element"):
        al.solvers.cgls(A, y, x0=y)
    with pytest.raises(al.SpaceMismatchError, match="linear_operator"):
        al.solvers.lsmr(nn.Linear(4, 5), y)  # type: ignore[arg-type]
    with pytest.raises(al.SpaceMismatchError, match="weight"):
        al.solvers.lsmr(A, y, weight=-y)
    for option in ({"tol": -1.0}, {"damp": math.nan}, {"maxiter": -1}, {"maxiter": 1.5}):
        with pytest.raises(ValueError, match=f"expected {next(iter(option))}"):
            al.solvers.cgls(A, y, **option)  # type: ignore[arg-type]


@every_solver
@pytest.mark.parametrize("size", [1e34, 1e36, 3e37])
def test_overflow_is_no_convergence(solve, size: float) -> None:
    factors = torch.linspace(1, 30, 500)
    A = al.diagonal(factors)
    y = size * torch.randn(500, generator=seeded(0))
    found = solve(A, y, tol=1e-6, maxiter=200)
    assert found.x.isfinite().all()
    if found.converged:
        exact, scaled, data = factors.double(), found.x.double() / size, y.double() / size
        # What either rule lets through: a small gradient, or ‖Aᴴr‖ ≤ ‖A‖ ‖r‖ for a residual that is small.
        reach = 30 * (norm(data) + 30 * norm(scaled))
        assert norm(exact * (exact * scaled - data)) <= 1e-6 * (norm(exact * data) + reach)
    else:
        assert "NaN or infinity" in found.reason or "maxiter" in found.reason


def test_proximal_and_subset_solvers_say_what_an_unchecked_adjoint_costs() -> None:
    matrix = torch.randn(8, 5, generator=seeded(0))
    A = al.from_pair(lambda x: matrix @ x, lambda y: 2 * (matrix.T @ y), (5,), (8,), check=False)
    y = torch.ones(8)
    F = al.LeastSquares(A, y)
    for found in (
        al.solvers.fista(F, al.prox.l1(1.0)),
        al.solvers.projected_gradient(F, (0, None)),
        al.solvers.svrg(A, y, subsets=2, maxiter=1, step=1e-3),
        al.solvers.pdhg(al.LeastSquares(al.identity((5,)), torch.ones(5)), A, al.prox.l1(1.0)),
    ):
        assert "what was given as the adjoint, with check=False, is none" in found.reason
