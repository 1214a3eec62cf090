"""Solvers with preconditioners: the same solutions, in few steps by a good one, and a reason where it is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import norm
from solver_problems import close, dense, every_solver, minimiser, of_matrix, positive
from torch import Tensor, nn

import adjointlab as al

Function = Callable[[Tensor], Tensor]


def spread(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return a self-adjoint positive matrix that has nothing to do with any other."""
    return positive(n, dtype)[1]


def inverse(matrix: Tensor, damp: float = 0.0, weight: Tensor | None = None) -> Tensor:
    """Return `(AᴴWA + damp²)⁻¹`, self-adjoint to the last bit."""
    w = torch.ones(len(matrix), dtype=torch.float64) if weight is None else weight
    normal = matrix.mH @ (w[:, None] * matrix) + damp**2 * torch.eye(matrix.shape[1], dtype=torch.float64)
    found = torch.linalg.inv(normal)
    return (found + found.mH) / 2


@every_solver
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("damp", [0.0, 0.7])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_solution_is_that_without(solve: Any, dtype: torch.dtype, damp: float, weighted: bool) -> None:
    A, matrix = dense(14, 9, dtype)
    y, x0, M = torch.randn(14, dtype=dtype), torch.randn(9, dtype=dtype), spread(9, dtype)
    w = torch.rand(14, dtype=torch.float64) + 0.1 if weighted else torch.ones(14, dtype=torch.float64)
    expected = minimiser(matrix, y, damp, w)
    for start in (None, x0):
        found = solve(A, y, damp=damp, weight=w if weighted else None, x0=start, precondition=of_matrix(M))
        assert found.converged
        assert close(found.x, expected, w.sqrt()[:, None] * matrix)


@every_solver
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("damp", [0.0, 0.7])
def test_the_inverse_takes_two_steps_at_most(solve: Any, dtype: torch.dtype, damp: float) -> None:
    A, matrix = dense(30, 20, dtype)
    y, w = torch.randn(30, dtype=dtype), torch.rand(30, dtype=torch.float64) + 0.1
    M = inverse(matrix, damp, w)
    found = solve(A, y, damp=damp, weight=w, precondition=lambda s: M @ s)
    assert found.converged
    assert found.iterations <= 2
    assert close(found.x, minimiser(matrix, y, damp, w), w.sqrt()[:, None] * matrix)


def test_cg_with_a_preconditioner() -> None:
    A, matrix = positive(20, torch.complex128)
    b, M = torch.randn(20, dtype=torch.complex128), spread(20, torch.complex128)
    for P, most in ((M, 200), (inverse(torch.linalg.cholesky(matrix).mH), 2)):
        found = al.solvers.cg(A, b, tol=1e-12, precondition=lambda s, P=P: P @ s)
        assert found.converged
        assert found.iterations <= most
        assert close(found.x, torch.linalg.solve(matrix, b), matrix, power=1)


@every_solver
def test_of_many_solutions_it_is_the_smallest_in_the_norm_of_the_preconditioner(solve: Any) -> None:
    A, matrix = dense(5, 9)
    y, M = torch.randn(5, dtype=torch.float64), spread(9)
    root = torch.linalg.cholesky(M)
    expected = root @ (torch.linalg.pinv(matrix @ root) @ y)
    assert close(solve(A, y, precondition=lambda s: M @ s).x, expected, matrix @ root)


@every_solver
def test_every_problem_of_a_batch_has_its_own(solve: Any) -> None:
    matrices = torch.stack([torch.eye(6) + s * torch.randn(6, 6) for s in (0, 1e-3, 0.1, 0.4)]).double()
    A = al.linear_operator(
        lambda x: (matrices @ x[..., None])[..., 0],
        torch.zeros(4, 6, dtype=torch.float64),
        batch_dims=1,
        engine="eager",
    )
    M = torch.stack([spread(6), spread(6), inverse(matrices[2], 0.3), -spread(6)])
    y, damp = torch.randn(4, 6, dtype=torch.float64), torch.full((4,), 0.3, dtype=torch.float64)
    found = solve(A, y, damp=damp, precondition=lambda s: (M @ s[..., None])[..., 0])
    assert found.converged.tolist() == [True, True, True, False]
    assert found.iterations[2] <= 2
    assert "1 of 4 problems: the preconditioner M is not positive" in found.reason
    for i in range(3):
        assert close(found.x[i], minimiser(matrices[i], y[i], 0.3), matrices[i])


@every_solver
def test_pytrees_and_affine_operators(solve: Any) -> None:
    w = torch.randn(6, 3, dtype=torch.complex128)
    f = al.affine_operator(
        lambda d: (w @ d["z"] + d["t"].sum() + 1, 2 * d["t"]),
        {"z": torch.zeros(3, dtype=torch.complex128), "t": torch.zeros(2, dtype=torch.float64)},
    )
    x = f.domain.randn(torch.Generator().manual_seed(1))
    for M in (al.precondition.diagonal(f), al.precondition.nystrom(f, 4), lambda d: {"z": d["z"] / 9, "t": d["t"] / 4}):
        found = solve(f, f(x), precondition=M)
        assert found.converged
        assert close(f.domain.vector(found.x), f.domain.vector(x), al.to_dense(f.linear, real=True))


@pytest.mark.parametrize("scale", [1e-150, 1e-12, 1e12, 1e60])
@every_solver
def test_extreme_sizes(solve: Any, scale: float) -> None:
    A, matrix = dense(14, 9)
    y, M = torch.randn(14, dtype=torch.float64), inverse(matrix)
    found = solve(scale * A, y, precondition=lambda s: M @ (s / scale) / scale)
    assert found.converged
    assert found.iterations <= 2
    assert close(scale * found.x, minimiser(matrix, y), matrix)


def test_in_the_fourier_basis_and_out_of_it() -> None:
    c, m = (nn.Conv2d(1, 1, 25, padding=12, padding_mode="circular", bias=False).requires_grad_(False) for _ in "cm")
    bump = torch.exp(-0.05 * (torch.arange(25.0) - 12).square())
    c.weight.copy_((bump[:, None] * bump)[None, None])
    m.weight.copy_(torch.zeros(1, 1, 25, 25)).view(-1)[312] = 0.5
    A, M = (al.linear_operator(module, (1, 1, 48, 48)) for module in (c, m))
    assert A.multiplier is not None
    assert M.multiplier is not None
    y = torch.randn(1, 1, 48, 48)
    for P in (M, lambda s: s / 2, al.precondition.circulant(A, damp=1.0)):
        found = al.solvers.cgls(A, y, damp=1.0, precondition=P)
        plain = al.solvers.cgls(A, y, damp=1.0)
        assert found.converged
        # Both gradients are within 1e-6 of the first one, and AᴴA + 1 is 1 at least.
        assert norm(found.x - plain.x) <= 4e-6 * norm(A.H(y))


# -------------------------------------------------------------------------------------------------- what is no good one


SKEW = torch.triu(torch.ones(20, 20, dtype=torch.float64), 1)
WRONG: dict[str, tuple[Function, str]] = {
    "negative": (lambda s: -s, "not positive"),
    "zero": (lambda s: 0 * s, "not positive"),
    "indefinite": (lambda s: torch.cat([s[:19], -9 * s[19:]]), "not positive"),
    "NaN": (lambda s: math.nan * s, "NaN or infinity in what the preconditioner"),
    "infinite": (lambda s: math.inf * s, "NaN or infinity in what the preconditioner"),
    "not self-adjoint": (lambda s: 9 * s + (SKEW - SKEW.T) @ s, "not self-adjoint"),
    "not linear": (lambda s: s + s.abs(), "not self-adjoint, or not linear"),
}


@pytest.mark.parametrize("name", ["cg", "cgls", "lsmr"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_preconditioner_is_told(name: str, wrong: str) -> None:
    M, reason = WRONG[wrong]
    A, _ = positive(20)
    found = getattr(al.solvers, name)(A, torch.randn(20, dtype=torch.float64), precondition=M)
    assert not found.converged
    assert reason in found.reason
    assert found.iterations < 100
    assert torch.isfinite(found.x).all()


def test_a_preconditioner_that_is_no_map_of_the_domain_is_refused() -> None:
    A, _ = dense(14, 9)
    y = torch.randn(14, dtype=torch.float64)
    for M, match in (
        (3.0, "a preconditioner that is an operator or a function"),
        ("automatic", "'auto', got 'automatic'"),
        (A, "a preconditioner that maps the domain of A"),
        (lambda s: s.float(), "what the preconditioner returns to be an element"),
        (lambda s: s[:-1], "what the preconditioner returns to be an element"),
    ):
        with pytest.raises(al.SpaceMismatchError, match=match):
            al.solvers.cgls(A, y, precondition=M)
    with pytest.raises(al.SpaceMismatchError, match="cgls and lsmr take"):
        al.solvers.cg(positive(3)[0], torch.ones(3, dtype=torch.float64), precondition="auto")


def test_one_for_another_batch_is_refused() -> None:
    A = al.linear_operator(lambda x: 2 * x, torch.zeros(1, 5), batch_dims=1)
    M = al.diagonal(torch.ones(3, 5), A.domain)
    with pytest.raises(al.SpaceMismatchError, match="a preconditioner for the batch sizes"):
        al.solvers.cgls(A, torch.ones(1, 5), precondition=M)


def test_mixed_precision_is_right_enough() -> None:
    A, matrix = dense(30, 20)
    M, y = inverse(matrix).float(), torch.randn(30, dtype=torch.float64)
    found = al.solvers.cgls(A, y, tol=1e-12, precondition=lambda s: (M @ s.float()).double())
    assert found.converged
    assert close(found.x, minimiser(matrix, y), matrix)


# ------------------------------------------------------------------------------------------------------ its derivatives


class Kernel(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * self.w) @ x


@every_solver
@pytest.mark.parametrize(("shape", "damp"), [((6, 4), 0.0), ((4, 6), 0.0), ((4, 6), 0.5)], ids=str)
def test_gradients(solve: Any, shape: tuple[int, int], damp: float) -> None:
    dtype = torch.complex128
    w, y = torch.randn(shape, dtype=dtype), torch.randn(shape[0], dtype=dtype)
    x0, weight = torch.randn(shape[1], dtype=dtype), torch.rand(shape[0], dtype=torch.float64) + 0.3
    A, M = al.linear_operator(Kernel(w), torch.zeros(shape[1], dtype=dtype)), spread(shape[1], dtype)

    def solution(y: Tensor, w: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
        A.module.w = w
        options = {"x0": x0, "weight": weight, "damp": damp, "precondition": lambda s: M @ s}
        return solve(A, y, tol=1e-13, maxiter=200, **options).x

    assert torch.autograd.gradcheck(solution, [t.requires_grad_() for t in (y, w, x0, weight)], fast_mode=True)


def test_the_backward_pass_is_preconditioned() -> None:
    A = al.diagonal(torch.logspace(0, 4, 200, dtype=torch.float64))
    y, steps = torch.ones(200, dtype=torch.float64, requires_grad=True), []

    def M(s: Tensor) -> Tensor:
        steps.append(1)
        return s / torch.logspace(0, 8, 200, dtype=torch.float64)

    x = al.solvers.cgls(A, y, tol=1e-10, precondition=M).x
    steps.clear()
    (found,) = torch.autograd.grad(x.sum(), y)
    assert len(steps) < 10
    assert norm(found - 1 / torch.logspace(0, 4, 200, dtype=torch.float64)) <= 1e-9 * norm(found)
