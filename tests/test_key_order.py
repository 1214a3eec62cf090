"""Elements that are dictionaries: a key belongs to its value, in whatever order the keys come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import assert_close
from torch import Tensor

import adjointlab as al

KEYS = ("p", "q", "r")
orders = st.permutations(KEYS)


def element(order: Any, seed: int, *, positive: bool = False) -> dict[str, Tensor]:
    """Return an element whose entries depend on the seed and the key, not on the order of the keys."""
    draws = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator(device="cpu").manual_seed(seed))
    values = dict(zip(KEYS, draws.abs() + 0.5 if positive else draws, strict=True))
    return {key: values[key].to(torch.get_default_device()) for key in order}


def stacked(x: dict[str, Tensor]) -> Tensor:
    return torch.cat([x[key] for key in KEYS])


def dense(seed: int) -> tuple[al.LinearOperator, Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    matrix = (matrix @ matrix.T + torch.eye(6, dtype=torch.float64, device="cpu")).to(torch.get_default_device())

    def apply(x: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(KEYS, (matrix @ stacked(x)).split(2), strict=True))

    space = al.Space.of(element(KEYS, 0))
    return al.LinearOperator(apply, apply, space, space), matrix


@settings(max_examples=15)
@given(orders, orders, orders)
def test_diagonal(first: Any, second: Any, third: Any) -> None:
    d, x = element(first, 1), element(second, 2)
    for A in (al.diagonal(d), al.diagonal(d, al.Space.of(element(third, 0)))):
        assert_close(stacked(A(x)), stacked(d) * stacked(x), 1e-16)
        assert_close(stacked(A.H(x)), stacked(d) * stacked(x), 1e-16)
        assert_close(stacked((A + 2 * A)(x)), 3 * stacked(d) * stacked(x), 1e-16)


@settings(max_examples=15)
@given(orders, orders, orders)
def test_least_squares(first: Any, second: Any, third: Any) -> None:
    A, matrix = dense(0)
    x, y, w = element(first, 1), element(second, 2), element(third, 3, positive=True)
    residual = matrix @ stacked(x) - stacked(y)
    for weight in (w, al.diagonal(w, A.codomain)):
        objective = al.LeastSquares(A, y, weight=weight)
        value, gradient = objective.value_and_gradient(x)
        assert_close(value, (stacked(w) * residual**2).sum() / 2, A.domain.eps)
        assert_close(stacked(gradient), matrix @ (stacked(w) * residual), A.domain.eps)
        assert_close(stacked(objective.hessian(x)), matrix @ (stacked(w) * (matrix @ stacked(x))), A.domain.eps)


@settings(max_examples=15)
@given(orders, orders, orders)
@pytest.mark.parametrize("name", ["cg", "cgls", "lsmr"])
def test_solvers(name: str, first: Any, second: Any, third: Any) -> None:
    A, matrix = dense(0)
    y, w, x0 = element(first, 2), element(second, 3, positive=True), element(third, 4)
    tolerance = {"atol": 1e-13, "btol": 1e-13} if name == "lsmr" else {"tol": 1e-13}
    options = {} if name == "cg" else {"weight": w, "damp": 0.5}
    found = getattr(al.solvers, name)(A, y, x0=x0, maxiter=200, **tolerance, **options).x
    if name == "cg":
        expected = torch.linalg.solve(matrix, stacked(y))
    else:
        normal = matrix @ (stacked(w)[:, None] * matrix) + 0.25 * torch.eye(6, dtype=torch.float64)
        expected = torch.linalg.solve(normal, matrix @ (stacked(w) * stacked(y)))
    condition = float(torch.linalg.cond(matrix)) ** 2
    gap = torch.linalg.vector_norm(stacked(found) - expected)
    assert gap <= condition * (1e-13 + 16 * A.domain.eps) * torch.linalg.vector_norm(expected)


def test_a_weight_with_other_keys_is_refused() -> None:
    A, _ = dense(0)
    with pytest.raises(al.SpaceMismatchError, match="weight to be an element"):
        al.LeastSquares(A, element(KEYS, 1), weight={"p": torch.ones(2).double()})
