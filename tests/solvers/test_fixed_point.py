"""Derivatives of minimisers with bounds and priors: against differences, and refused where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import seeded
from torch import Tensor

import adjointlab as al
from adjointlab.errors import NotDifferentiableError
from adjointlab.solvers import fista, pdhg, projected_gradient, saga, sgd, svrg

D, C = torch.float64, torch.complex128
EXACT: dict[str, Any] = {"tol": 1e-12, "maxiter": 5000}
Make = Callable[[Tensor], al.prox.Prox]

PRIORS: dict[str, tuple[Make, float]] = {
    "sparse": (al.prox.l1, 2.0),
    "a group": (lambda w: al.prox.l1(w, dim=0), 2.0),
    "squares": (al.prox.l2, 2.0),
    "bounds": (lambda w: al.prox.box(-0.1, w), 0.1),
}


def random(*shape: int, dtype: torch.dtype = D, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=seeded(seed))


def leaf(t: Tensor) -> Tensor:
    return t.clone().requires_grad_()


def gradcheck(f: Any, *tensors: Tensor) -> bool:
    return torch.autograd.gradcheck(f, tuple(map(leaf, tensors)), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name in PRIORS for dtype in (D, C) if (name, dtype) != ("bounds", C)]
)
def test_in_the_operator_the_data_and_the_prior(name: str, dtype: torch.dtype) -> None:
    prox, weight = PRIORS[name]

    def x(M: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return fista(al.LeastSquares(al.matrix(M), y), prox(w), **EXACT).x

    assert gradcheck(x, random(5, 3, dtype=dtype), random(5, dtype=dtype, seed=1), torch.tensor(weight, dtype=D))


def test_in_kernel_weights_and_penalties_of_a_batch() -> None:
    like, L = torch.zeros(2, 1, 6, dtype=D), al.finite_differences(al.Space.of((2, 1, 6), dtype=D, batch_dims=1))

    def x(kernel: Tensor, y: Tensor, w: Tensor, strength: Tensor) -> Tensor:
        A = al.linear_operator(lambda x: torch.nn.functional.conv1d(x, kernel, padding=1), like, batch_dims=1)
        return projected_gradient(al.LeastSquares(A, y, w, [(strength, L)]), (0, None), **EXACT).x

    kernel, w = torch.tensor([[[0.3, 1.0, 0.2]]], dtype=D), random(2, 1, 6, seed=2).square() + 0.5
    assert gradcheck(x, kernel, random(2, 1, 6, seed=1), w, torch.tensor([0.1, 0.3], dtype=D))


def test_in_a_weighted_space() -> None:
    space = al.Space.of((5,), dtype=D, weight=torch.linspace(0.5, 2, 5, dtype=D))
    M = random(8, 5)

    def x(y: Tensor, w: Tensor) -> Tensor:
        return fista(al.LeastSquares(al.matrix(M, space), y), al.prox.l1(w), **EXACT).x

    assert gradcheck(x, random(8, seed=1), torch.tensor(1.0, dtype=D))


def test_what_cannot_move_has_no_derivative_in_the_data() -> None:
    y = leaf(torch.tensor([-1.0, 2.0, -3.0], dtype=D))
    x = projected_gradient(al.LeastSquares(al.identity(al.Space.of(y.detach())), y), (0, 1)).x
    (found,) = torch.autograd.grad(x.sum(), y)
    assert torch.equal(found, torch.zeros(3, dtype=D))


@pytest.mark.parametrize("size", [1e-160, 1e160])
def test_cotangents_of_any_size(size: float) -> None:
    y = leaf(random(8, seed=1))
    x = fista(al.LeastSquares(al.matrix(random(8, 5)), y), al.prox.l1(1.0), **EXACT).x
    plain, scaled = (torch.autograd.grad(x, y, v, retain_graph=True)[0] for v in (torch.ones(5, dtype=D),
                     torch.full((5,), size, dtype=D)))  # fmt: skip
    assert torch.allclose(scaled / size, plain, rtol=1e-10)


def test_a_minimum_that_is_not_isolated() -> None:
    y = leaf(torch.tensor([1.0], dtype=D))
    x = projected_gradient(al.LeastSquares(al.matrix(torch.ones(1, 2, dtype=D)), y), (0, None)).x
    with pytest.warns(RuntimeWarning, match="not isolated"):
        (found,) = torch.autograd.grad(x[0], y)
    assert found.isnan().all()


def test_a_second_derivative_is_refused() -> None:
    y = leaf(random(8, seed=1))
    x = fista(al.LeastSquares(al.matrix(random(8, 5)), y), al.prox.l1(1.0)).x
    (once,) = torch.autograd.grad(x.sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        once.sum().backward()


@pytest.mark.parametrize(
    ("prox", "message"),
    [
        (lambda x, step: x.detach().clamp(min=0), "differentiable by autograd"),
        (lambda x, step: (x + 0.1 * x.roll(1)) / 2, "not self-adjoint"),
    ],
)
def test_what_is_no_proximal_map(prox: Any, message: str) -> None:
    y = leaf(random(8, seed=1))
    x = fista(al.LeastSquares(al.matrix(random(8, 5)), y), prox, maxiter=5).x
    with pytest.raises(NotDifferentiableError, match=message):
        x.sum().backward()


def test_nothing_is_recorded_where_nothing_is_asked_for() -> None:
    F, y = al.LeastSquares(al.matrix(random(8, 5)), random(8, seed=1)), leaf(random(8, seed=1))
    assert not fista(F, al.prox.l1(1.0)).x.requires_grad
    with torch.no_grad():
        assert not fista(al.LeastSquares(al.matrix(random(8, 5)), y), al.prox.l1(1.0)).x.requires_grad


REFUSED: dict[str, Callable[..., Any]] = {
    "pdhg": lambda A, y: pdhg(al.LeastSquares(A, y), al.identity(A.domain), al.prox.l1(0.1), maxiter=5),
    "sgd": lambda A, y: sgd(A, y, subsets=2, maxiter=2),
    "saga": lambda A, y: saga(A, y, subsets=2, maxiter=2),
    "svrg": lambda A, y: svrg(A, y, subsets=2, maxiter=2),
}


@pytest.mark.parametrize("learned", ["the data", "the operator", "nothing"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_derivative_that_nobody_knows_is_refused(name: str, learned: str) -> None:
    layer = torch.nn.Linear(4, 8, bias=False, dtype=D).requires_grad_(learned == "the operator")
    A, y = al.linear_operator(layer, (4,)), random(8, seed=1).requires_grad_(learned == "the data")
    x = REFUSED[name](A, y).x
    if learned == "nothing":
        assert not x.requires_grad
    else:
        with pytest.raises(NotDifferentiableError, match=f"solution of {name}"):
            x.sum().backward()


def test_a_prior_that_learns_is_seen() -> None:
    w = leaf(torch.tensor(0.1, dtype=D))
    A, y = al.matrix(random(8, 4)), random(8, seed=1)
    for x in (
        pdhg(al.LeastSquares(A, y), al.identity(A.domain), al.prox.l1(w), maxiter=5).x,
        svrg(A, y, subsets=2, maxiter=2, prox=al.prox.l1(w)).x,
    ):
        with pytest.raises(NotDifferentiableError, match="expected no derivative"):
            x.sum().backward()
