"""Solvers: derivatives of what they return, by implicit differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import norm
from solver_problems import dense, every_solver
from torch import Tensor, nn

import adjointlab as al


def gradcheck(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    assert torch.autograd.gradcheck(function, tuple(t.detach().requires_grad_() for t in inputs), fast_mode=True)


class Kernel(nn.Module):
    """`x ↦ (w ⊙ w) x`: nonlinear in its parameter, so that a derivative at the wrong place would show."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * self.w) @ x


@pytest.mark.slow
@every_solver
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize(("shape", "damp"), [((6, 4), 0.0), ((4, 6), 0.0), ((4, 6), 0.5), ((5, 5), 0.5)], ids=str)
def test_gradients_of_least_squares(solve: Any, dtype: torch.dtype, shape: tuple[int, int], damp: float) -> None:
    w, y = torch.randn(shape, dtype=dtype), torch.randn(shape[0], dtype=dtype)
    A = al.linear_operator(Kernel(w), torch.zeros(shape[1], dtype=dtype))

    def solution(y: Tensor, w: Tensor) -> Tensor:
        A.module.w = w
        return solve(A, y, tol=1e-13, damp=damp, maxiter=200).x

    gradcheck(solution, y, w)


@every_solver
def test_gradients_of_weights_and_offsets(solve: Any) -> None:
    kernel = Kernel(torch.randn(6, 3, dtype=torch.float64))
    kernel.bias = torch.randn(6, dtype=torch.float64)
    f = al.affine_operator(lambda x: kernel(x) + kernel.bias, torch.zeros(3, dtype=torch.float64))
    y, w = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.5
    bias = torch.randn(6, dtype=torch.float64)

    def solution(y: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        kernel.bias = bias
        return solve(f, y, weight=w, maxiter=100).x

    gradcheck(solution, y, w, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_gradients_of_cg(dtype: torch.dtype) -> None:
    w, b = torch.randn(5, 5, dtype=dtype), torch.randn(5, dtype=dtype)
    A = al.linear_operator(Kernel(w), torch.zeros(5, dtype=dtype))
    shifted = A.gram + al.identity(A.domain)

    def solution(b: Tensor, w: Tensor) -> Tensor:
        A.module.w = w
        return al.solvers.cg(shifted, b, tol=1e-13, maxiter=100).x

    gradcheck(solution, b, w)


def test_gradients_over_a_batch() -> None:
    w, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    A = al.linear_operator(lambda x: x @ w.T, torch.zeros(2, 4, dtype=torch.float64), batch_dims=1)
    gradcheck(lambda y: al.solvers.cgls(A, y, tol=1e-13).x, y)


def test_a_backward_pass_solves_once() -> None:
    calls = {"forward": 0, "adjoint": 0}
    matrix = torch.randn(8, 5, dtype=torch.float64)

    def counted(name: str, m: Tensor) -> Callable[[Tensor], Tensor]:
        def apply(x: Tensor) -> Tensor:
            calls[name] += 1
            return m @ x

        return apply

    A = al.LinearOperator(
        counted("forward", matrix),
        counted("adjoint", matrix.T),
        *(al.Space.of(torch.zeros(n).double()) for n in (5, 8)),
    )
    y = torch.randn(8, dtype=torch.float64, requires_grad=True)
    x = al.solvers.cgls(A, y).x
    before = dict(calls)
    x.sum().backward()
    assert calls["forward"] - before["forward"] <= 8
    assert y.grad is not None


def test_gradients_of_a_singular_problem() -> None:
    w = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    A = al.linear_operator(lambda x: w @ x, torch.zeros(3, dtype=torch.float64))
    y = torch.randn(4, dtype=torch.float64, requires_grad=True)
    x = al.solvers.cgls(A, y).x
    v = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="many solutions"):
        found, of_operator = torch.autograd.grad(x @ v, (y, w))
    assert norm(found - torch.linalg.pinv(w.detach()).T @ v) <= 1e-6
    assert of_operator.isnan().all()


def test_cg_has_no_gradient_in_the_parameters_of_a_singular_operator() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    A = al.linear_operator(lambda x: w * (w @ x), torch.zeros(2, dtype=torch.float64))
    b = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    x = al.solvers.cg(A, b).x
    with pytest.raises(RuntimeError, match="positive definite"):
        torch.autograd.grad(x[0], b)


@pytest.mark.parametrize("loss", [torch.sum, lambda x: x.square().sum()], ids=["linear", "quadratic"])
@pytest.mark.parametrize("name", ["cg", "cgls", "lsmr"])
def test_second_derivatives_are_refused(name: str, loss: Callable[[Tensor], Tensor]) -> None:
    entries = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    y = torch.tensor([3.0, 1.0], dtype=torch.float64, requires_grad=True)
    x = getattr(al.solvers, name)(al.diagonal(entries), y).x
    for first in torch.autograd.grad(loss(x), (y, entries), create_graph=True):
        for leaf in (y, entries):  # a part that looks unused would pass for one that is zero
            with pytest.raises(RuntimeError, match="differentiated once"):
                torch.autograd.grad(first.sum(), leaf, allow_unused=True, retain_graph=True)


def test_nothing_is_differentiated_without_need() -> None:
    A, _ = dense(5, 4)
    y = torch.randn(5, dtype=torch.float64)
    assert not al.solvers.cgls(A, y).x.requires_grad
    with torch.no_grad():
        assert not al.solvers.cgls(A, y.requires_grad_()).x.requires_grad


@every_solver
def test_gradients_of_few_real_equations_for_complex_unknowns(solve: Any) -> None:
    w, y = torch.randn(7, 5, dtype=torch.complex128), torch.randn(7, dtype=torch.float64)
    kernel = Kernel(w)  # 7 equations for 10 real unknowns
    A = al.linear_operator(lambda x: kernel(x).real, torch.zeros(5, dtype=torch.complex128))

    def solution(y: Tensor, w: Tensor) -> Tensor:
        kernel.w = w
        return solve(A, y, tol=1e-13, maxiter=200).x

    gradcheck(solution, y, w)
