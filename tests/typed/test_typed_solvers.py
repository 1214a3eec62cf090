"""Types of objectives and solvers: mypy and pyright read these tests, and pytest runs them."""

from typing import assert_type

import torch
from torch import Tensor

import adjointlab as al


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:2], x[2:]


def test_a_gradient_is_an_element_of_the_domain() -> None:
    A, x = al.linear_operator(halves, (5,)), torch.ones(5)
    F = al.LeastSquares(A, (torch.ones(2), torch.ones(3)))
    assert_type(F(x), Tensor)
    assert_type(F.y, tuple[Tensor, Tensor])
    assert_type(F.residual(x), tuple[Tensor, Tensor])
    assert_type(F.gradient(x), Tensor)
    assert_type(F.value_and_gradient(x)[1], Tensor)
    assert_type(F.hessian(x), Tensor)
    assert_type(al.least_squares_gradient(A, x, F.y), Tensor)
    assert isinstance(F.gradient(x), Tensor)
    assert isinstance(F.residual(x), tuple)


def test_a_solution_is_an_element_of_the_domain() -> None:
    A = al.linear_operator(halves, (5,))
    y = A(torch.ones(5))
    system = al.solvers.cg(A.gram, torch.ones(5))
    for solution in (system, al.solvers.cgls(A, y, weight=y), al.solvers.lsmr(A, y, damp=0.1)):
        assert_type(solution, al.solvers.Solution[Tensor])
        assert_type(solution.x, Tensor)
        assert isinstance(solution.x, Tensor)
    f = al.affine_operator(torch.nn.Linear(3, 2), (3,))
    assert_type(al.solvers.lsmr(f, f.offset).x, Tensor)
    B = al.identity(((2,), (3,)))
    assert_type(al.solvers.cg(B, B.domain.zeros()).x, tuple[Tensor, Tensor])


def test_a_callback_gets_an_element_and_an_info() -> None:
    A = al.diagonal(torch.tensor([1.0, 2.0, 3.0]))

    def callback(x: Tensor, info: al.solvers.Info) -> bool:
        assert_type(info.iteration, int)
        assert_type(info.residual, float | Tensor)
        return x.shape == (3,) and info.iteration == 2

    assert al.solvers.cg(A, torch.ones(3), callback=callback).iterations == 2
    al.solvers.cgls(A, torch.ones(3), callback=lambda x, info: assert_type(x, Tensor))
