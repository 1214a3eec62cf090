"""Solvers of wide, singular and extreme problems: what converged promises, and derivatives of the pseudo-inverse."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from laws import norm
from solver_problems import LEAST_SQUARES, every_solver
from torch import Tensor, nn

import adjointlab as al

COUNT = 60  # random systems


def from_matrix(matrix: Tensor) -> al.LinearOperator:
    spaces = (al.Space.of((n,), dtype=matrix.dtype) for n in (matrix.shape[1], matrix.shape[0]))
    return al.LinearOperator(lambda x: matrix @ x, lambda y: matrix.mH @ y, *spaces)


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, device="cpu").to(torch.get_default_device())


def matrix_of_rank(seed: int, m: int, n: int, rank: int) -> Tensor:
    """Return a random matrix whose singular values are 1 to 3, so that errors say something about the solver."""
    u, v = torch.linalg.qr(draw(seed, m, rank))[0], torch.linalg.qr(draw(seed + 1000, n, rank))[0]
    return u * (1 + 2 * torch.rand(rank, dtype=torch.float64)) @ v.T


@every_solver
def test_gradient_of_one_equation_for_three_unknowns(solve: Any) -> None:
    A = from_matrix(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64))
    y = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(solve(A, y, tol=1e-6).x[0], y)
    assert norm(found - 1 / 14) <= 1e-12


@every_solver
def test_gradients_of_random_wide_and_singular_systems(solve: Any) -> None:
    for seed in range(COUNT):
        m, n = 1 + seed % 4, 1 + seed // 4 % 5
        matrix = matrix_of_rank(seed, m, n, 1 + seed % min(m, n))
        y, v = draw(seed + 1, m).requires_grad_(), draw(seed + 2, n)
        x = solve(from_matrix(matrix), y, tol=1e-12).x
        (found,) = torch.autograd.grad(x @ v, y)
        assert norm(found - torch.linalg.pinv(matrix).T @ v) <= 1e-9 * norm(v), seed


class OfRank(nn.Module):
    """`x ↦ B C x`: of constant rank, whatever its parameters are."""

    def __init__(self, B: Tensor, C: Tensor) -> None:
        super().__init__()
        self.B, self.C = B, C

    def forward(self, x: Tensor) -> Tensor:
        return self.B @ (self.C @ x)


@pytest.mark.parametrize("shape", [(5, 4), (3, 5), (4, 4)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("started", [False, True])
@every_solver
def test_gradients_of_a_pseudo_inverse_of_constant_rank(solve: Any, shape: tuple[int, int], started: bool) -> None:
    B, C, y, x0 = draw(0, shape[0], 2), draw(1, 2, shape[1]), draw(2, shape[0]), draw(3, shape[1])
    A = al.linear_operator(OfRank(B, C), torch.zeros(shape[1], dtype=torch.float64), engine="eager")
    w = draw(4, shape[0]).abs() + 0.5

    def solution(B: Tensor, C: Tensor, y: Tensor, w: Tensor, x0: Tensor) -> Tensor:
        A.module.B, A.module.C = B, C
        return solve(A, y, tol=1e-14, weight=w, x0=x0 if started else None, maxiter=60).x

    def reference(B: Tensor, C: Tensor, y: Tensor, w: Tensor, x0: Tensor) -> Tensor:
        root = w.sqrt()
        start = x0 if started else 0 * x0
        # The pseudo-inverse of a product of full rank, whose derivative is that of ordinary inverses.
        left, right = root[:, None] * B, C
        inverse = right.T @ torch.linalg.solve(right @ right.T, torch.linalg.solve(left.T @ left, left.T))
        return start + inverse @ (root * (y - B @ (C @ start)))

    inputs = [t.clone().requires_grad_() for t in (B, C, y, w, x0)]
    v = draw(5, shape[1])
    x, is_wide = solution(*inputs), shape[0] < shape[1]
    with contextlib.nullcontext() if is_wide else pytest.warns(RuntimeWarning, match="many solutions"):
        found = torch.autograd.grad(x @ v, inputs, allow_unused=True, retain_graph=True)
    expected = torch.autograd.grad(reference(*inputs) @ v, inputs)
    refused = () if is_wide else (0, 1)  # no number, rather than a wrong one
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        if number in refused:
            assert a.isnan().any()
            continue
        assert norm((torch.zeros_like(b) if a is None else a) - b) <= 1e-7 * max(1.0, norm(b))
    if not started:  # a loss that does not depend on the part in the kernel has all its gradients
        found = torch.autograd.grad((B @ (C @ x)) @ draw(6, shape[0]), inputs[:4])
        expected = torch.autograd.grad((B @ (C @ reference(*inputs))) @ draw(6, shape[0]), inputs[:4])
        for a, b in zip(found, expected, strict=True):
            assert norm(a - b) <= 1e-7 * max(1.0, norm(b))


def test_cg_converges_on_what_has_a_solution_only() -> None:
    b = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    u = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    problems = [(torch.outer(u, u), b)]
    for seed in range(COUNT):
        root = draw(seed, 3, 2)
        problems.append((root @ root.T, draw(seed + 1000, 3)))
    for matrix, b in problems:
        found = al.solvers.cg(from_matrix(matrix), b)
        assert not found.converged
        consistent = al.solvers.cg(from_matrix(matrix), matrix @ b)
        residual = norm(matrix @ (b - consistent.x))
        assert residual <= 1e-6 * norm(matrix @ b) * (1 + 1e-6) or not consistent.converged


@pytest.mark.parametrize("name", ["cg", *LEAST_SQUARES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
@pytest.mark.parametrize("power", [2, 5, 9])
@pytest.mark.slow
def test_converged_is_about_the_true_residual(name: str, dtype: torch.dtype, power: int) -> None:
    converged = 0
    for seed in range(4):
        q, p = torch.linalg.qr(draw(seed, 20, 20))[0], torch.linalg.qr(draw(seed + 1, 20, 20))[0]
        matrix = (q * torch.logspace(0, -power, 20, dtype=torch.float64) @ (q if name == "cg" else p).T).to(dtype)
        b = draw(seed + 2, 20).to(dtype)
        A, exact = from_matrix(matrix), matrix.double()
        solve = al.solvers.cg if name == "cg" else LEAST_SQUARES[name]
        found = solve(A, b, tol=1e-6)
        x, converged = found.x.double(), converged + found.converged
        residual = b.double() - exact @ x
        units = 64 * torch.finfo(dtype).eps  # of the residual that the solver computes, and of the rule
        if name == "cg":
            assert not found.converged or norm(residual) <= (2e-6 + units) * norm(b)
        else:
            gradient, reach = norm(exact.T @ residual), norm(b) + norm(x)
            rules = [1e-6 * norm(exact.T @ b.double()), 1e-6 * reach, units * norm(residual)]
            assert not found.converged or gradient <= 2 * max(rules) + units * norm(residual)
    assert converged or power > 2


@pytest.mark.parametrize(("size", "dtype"), [(1e-25, torch.float32), (1e20, torch.float32), (1e-200, torch.float64)])
@every_solver
def test_operators_of_extreme_size(solve: Any, size: float, dtype: torch.dtype) -> None:
    A = size * al.identity(al.Space.of((5,), dtype=dtype))
    y = draw(0, 5).to(dtype).requires_grad_()
    solution = solve(A, y, tol=1e-6)
    assert solution.converged
    assert norm(solution.x.detach().double() * size - y.detach().double()) <= 1e-5 * norm(y.detach())
    assert float(solution.residual_norms[0]) == pytest.approx(norm(y.detach()), rel=1e-6)
    (found,) = torch.autograd.grad((solution.x * size).sum(), y)  # through cotangents of extreme size
    assert norm(found - 1) <= 1e-5
    warm = solve(A, y, tol=1e-6, x0=0.5 * solution.x.detach(), damp=1e-6 * size)
    assert norm(warm.x.detach().double() * size - y.detach().double()) <= 1e-5 * norm(y.detach())


@pytest.mark.parametrize("size", [1e-200, 1e200])
@pytest.mark.parametrize("name", ["cg", *LEAST_SQUARES])
def test_data_of_extreme_size(name: str, size: float) -> None:
    matrix = matrix_of_rank(0, 5, 5, 5)
    matrix = matrix @ matrix.T
    y = size * draw(0, 5)
    solve = al.solvers.cg if name == "cg" else LEAST_SQUARES[name]
    found = solve(from_matrix(matrix), y, tol=1e-10)
    assert found.converged
    assert norm((matrix @ found.x - y) / size) <= 1e-8


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("started", [False, True])
@every_solver
@pytest.mark.slow
def test_damping_is_differentiable_and_one_for_each_problem(solve: Any, batched: bool, started: bool) -> None:
    matrix, y, x0 = draw(0, 4, 6), draw(1, 3, 4), draw(2, 3, 6)
    A = al.linear_operator(lambda x: x @ matrix.T, torch.zeros(1, 6, dtype=torch.float64), batch_dims=1)
    damp = torch.tensor([0.3, 1.0, 2.0] if batched else 0.7, dtype=torch.float64, requires_grad=True)

    def solution(damp: Tensor) -> Tensor:
        return solve(A, y, damp=damp, tol=1e-13, x0=x0 if started else None).x

    def reference(damp: Tensor) -> Tensor:
        normal = matrix.T @ matrix + damp.expand(3)[:, None, None] ** 2 * torch.eye(6, dtype=torch.float64)
        return torch.linalg.solve(normal, (y @ matrix)[..., None])[..., 0]

    v = draw(3, 3, 6)
    assert norm(solution(damp).detach() - reference(damp).detach()) <= 1e-9
    found, expected = (torch.autograd.grad((f(damp) * v).sum(), damp)[0] for f in (solution, reference))
    assert norm(found - expected) <= 1e-8 * norm(expected)
    assert torch.autograd.gradcheck(solution, damp)


def test_dampings_that_fit_no_batch_are_refused() -> None:
    A = al.identity(al.Space.of((2, 3), dtype=torch.float64, batch_dims=1))
    for damp in (torch.ones(3), torch.ones(2, 1), torch.ones((), dtype=torch.complex64)):
        with pytest.raises(ValueError, match=r"one for each problem.*reshape it"):
            al.solvers.cgls(A, torch.ones(2, 3).double(), damp=damp)
    with pytest.raises(ValueError, match="0 or more"):
        al.solvers.lsmr(A, torch.ones(2, 3).double(), damp=torch.tensor([0.1, -0.1]))


def test_a_mixture_of_damped_and_undamped_problems() -> None:
    matrix, y = draw(0, 2, 4), draw(1, 2, 2)
    A = al.linear_operator(lambda x: x @ matrix.T, torch.zeros(2, 4, dtype=torch.float64), batch_dims=1)
    damp = torch.tensor([0.0, 0.5], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, solve in LEAST_SQUARES.items():
            x = solve(A, y, damp=damp).x
            assert norm(x[0] - torch.linalg.pinv(matrix) @ y[0]) <= 1e-9, name
            normal = matrix.T @ matrix + 0.25 * torch.eye(4, dtype=torch.float64)
            assert norm(x[1] - torch.linalg.solve(normal, matrix.T @ y[1])) <= 1e-9, name
