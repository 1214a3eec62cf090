"""Laws of `F(x) = ½‖A x − y‖²`: value, gradient `Aᴴ (A x − y)`, Hessian `Aᴴ A`."""

from __future__ import annotations

from laws import (
    Case,
    assert_acts_as,
    assert_close,
    coordinates,
    draw,
    frobenius,
    in_widest_dtype,
    is_linear,
    law,
    norm,
    once,
)

import adjointlab as al


@law(is_linear, in_widest_dtype, once)
def value_of_least_squares_is_half_the_squared_residual(case: Case) -> None:
    A = case.A
    x, y = draw(A.domain, 1), draw(A.codomain, 2)
    residual = case.dense @ coordinates(x) - coordinates(y)
    size = frobenius(case.dense) * norm(x) + norm(y)
    assert abs(float(al.LeastSquares(A, y)(x).detach()) - float(residual @ residual) / 2) <= 16 * A.domain.eps * size**2


@law(is_linear, in_widest_dtype, once)
def gradient_of_least_squares_is_the_adjoint_of_the_residual(case: Case) -> None:
    A = case.A
    x, y = draw(A.domain, 1), draw(A.codomain, 2)
    dense = case.dense
    expected = dense.T @ (dense @ coordinates(x) - coordinates(y))
    size = frobenius(dense) * (frobenius(dense) * norm(x) + norm(y))
    assert_close(coordinates(al.LeastSquares(A, y).gradient(x)), expected, A.domain.eps, size)


@law(is_linear, in_widest_dtype, once)
def least_squares_gradient_in_one_line(case: Case) -> None:
    A = case.A
    x, y = draw(A.domain, 1), draw(A.codomain, 2)
    assert_close(al.least_squares_gradient(A, x, y), al.LeastSquares(A, y).gradient(x), A.domain.eps)


@law(is_linear, in_widest_dtype, once)
def value_and_gradient_agree_with_each(case: Case) -> None:
    A = case.A
    x, y = draw(A.domain, 1), draw(A.codomain, 2)
    objective = al.LeastSquares(A, y)
    value, gradient = objective.value_and_gradient(x)
    assert_close(value, objective(x), A.domain.eps)
    assert_close(gradient, objective.gradient(x), A.domain.eps)


@law(is_linear, in_widest_dtype, once)
def hessian_of_least_squares_is_the_gram(case: Case) -> None:
    A = case.A
    dense = case.dense
    hessian = al.LeastSquares(A, draw(A.codomain)).hessian
    assert_acts_as(hessian, dense.T @ dense, draw(A.domain), A.domain.eps, frobenius(dense) ** 2)
