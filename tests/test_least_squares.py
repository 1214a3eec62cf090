"""`F(x) = ½‖A x − y‖²_W`: value, gradient `Aᴴ W (A x − y)`, Hessian `Aᴴ W A`."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from laws import assert_close, draw, frobenius, leaves, matrix, no_side_effects, norm, tree_map
from torch import nn

import adjointlab as al


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Conv1d, al.LinearOperator, torch.Tensor, torch.Tensor]:
    layer = nn.Conv1d(1, 2, 3, stride=2, padding=1, bias=False, dtype=dtype)
    A = al.linear_operator(layer, (1, 1, 9))
    return layer, A, draw(A.domain, 1), draw(A.codomain, 2)


every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32], ids=str)


@every_dtype
def test_gradient_is_that_of_autograd(dtype: torch.dtype) -> None:
    _, A, x, y = problem(dtype)
    objective = al.LeastSquares(A, y)
    leaf = x.clone().requires_grad_()
    objective(leaf).backward()
    assert_close(leaf.grad, objective.gradient(x), A.domain.eps)


@every_dtype
def test_value_is_a_real_scalar(dtype: torch.dtype) -> None:
    _, A, x, y = problem(dtype)
    value = al.LeastSquares(A, y)(x)
    assert value.shape == ()
    assert not value.is_complex()
    assert float(value.detach()) >= 0


@every_dtype
def test_gradient_matches_differences_of_the_value(dtype: torch.dtype) -> None:
    _, A, x, y = problem(dtype)
    objective = al.LeastSquares(A, y)
    d = draw(A.domain, 3)
    # F is quadratic, so that central differences are exact apart from rounding.
    slope = float((objective(x + d) - objective(x - d)).detach()) / 2
    expected = float(A.domain.inner(objective.gradient(x).detach(), d).real)
    size = float((objective(x + d) + objective(x - d)).detach())
    assert abs(slope - expected) <= 16 * A.domain.eps * size


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_gradcheck(dtype: torch.dtype) -> None:
    layer, A, x, y = problem(dtype)
    objective = al.LeastSquares(A, y)
    assert torch.autograd.gradcheck(lambda z, _: objective(z), (x.requires_grad_(), layer.weight))
    assert torch.autograd.gradgradcheck(lambda z, _: objective(z), (x, layer.weight))


@every_dtype
def test_weight_enters_value_gradient_and_hessian(dtype: torch.dtype) -> None:
    _, A, x, y = problem(dtype)
    weight = torch.rand(y.shape, dtype=dtype.to_real()) + 0.1
    objective = al.LeastSquares(A, y, weight=weight)
    residual = A(x) - y
    eps = A.domain.eps
    value = 0.5 * (weight * residual.abs().square()).sum()
    assert_close(objective(x), value, eps)
    gradient = A.H(weight * residual)
    assert_close(objective.gradient(x), gradient, eps)
    assert_close(objective.value_and_gradient(x), (value, gradient), eps)
    assert_close(objective.hessian(x), A.H(weight * A(x)), eps)


def test_zero_weight_ignores_the_data_there() -> None:
    _, A, x, y = problem()
    weight = torch.zeros_like(y)
    objective = al.LeastSquares(A, y, weight=weight)
    assert float(objective(x).detach()) == 0
    assert norm(objective.gradient(x)) == 0


def test_hessian_is_self_adjoint() -> None:
    _, A, _, y = problem(torch.complex128)
    objective = al.LeastSquares(A, y, weight=torch.rand(y.shape, dtype=torch.float64))
    dense = matrix(objective.hessian, A.domain.zeros())
    assert_close(dense, dense.T.contiguous(), A.domain.eps)
    assert al.check_adjoint(objective.hessian).passed


def test_affine_forward() -> None:
    layer = nn.Conv1d(1, 2, 3, dtype=torch.float64)
    f = al.affine_operator(layer, (1, 1, 6))
    x, y = draw(f.linear.domain, 1), draw(f.linear.codomain, 2)
    objective = al.LeastSquares(f, y)
    residual = layer(x) - y
    assert_close(objective(x), 0.5 * residual.square().sum(), f.linear.domain.eps)
    assert_close(objective.gradient(x), f.H(residual.detach()), f.linear.domain.eps)
    assert_close(al.least_squares_gradient(f, x, y), f.H(residual.detach()), f.linear.domain.eps)
    assert_close(objective.hessian(x), f.linear.gram(x), f.linear.domain.eps)


def test_gradient_vanishes_at_the_solution() -> None:
    _, A, x, _ = problem()
    assert norm(al.LeastSquares(A, A(x)).gradient(x)) == 0


def test_gradient_descent_decreases_the_value() -> None:
    _, A, x, y = problem()
    objective = al.LeastSquares(A, y)
    step = 1 / frobenius(matrix(A, A.domain.zeros())) ** 2
    values = []
    for _ in range(10):
        value, gradient = objective.value_and_gradient(x)
        values.append(float(value.detach()))
        x = x - step * gradient
    assert all(after < before for before, after in itertools.pairwise(values))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_with_a_torch_optimizer(dtype: torch.dtype) -> None:
    _, A, x, y = problem(dtype)
    objective = al.LeastSquares(A, y)
    x = nn.Parameter(x)
    optimizer = torch.optim.SGD([x], lr=1 / frobenius(matrix(A, A.domain.zeros())) ** 2)
    before = float(objective(x).detach())
    for _ in range(3):
        optimizer.zero_grad()
        objective(x).backward()
        optimizer.step()
    assert float(objective(x).detach()) < before


def test_gradient_in_the_parameters() -> None:
    layer, A, x, y = problem()
    (found,) = torch.autograd.grad(al.LeastSquares(A, y)(x), layer.weight)
    (expected,) = torch.autograd.grad(0.5 * (layer(x) - y).square().sum(), layer.weight)
    assert_close(found, expected, A.domain.eps)


def test_gradient_is_differentiable_in_the_parameters() -> None:
    layer, A, x, y = problem()
    (found,) = torch.autograd.grad(al.LeastSquares(A, y).gradient(x).square().sum(), layer.weight)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(0.5 * (layer(leaf) - y).square().sum(), leaf, create_graph=True)
    (expected,) = torch.autograd.grad(gradient.square().sum(), layer.weight)
    assert_close(found, expected, A.domain.eps)


def test_pytrees() -> None:
    A = al.linear_operator(lambda x, z: {"sum": x + z, "first": 2 * x}, ((3,), (3,)))
    x, y = draw(A.domain, 1), draw(A.codomain, 2)
    objective = al.LeastSquares(A, y, weight={"sum": torch.ones(3), "first": torch.full((3,), 2.0)})
    residual = tree_map(torch.sub, A(x), y)
    expected = 0.5 * (residual["sum"].square().sum() + 2 * residual["first"].square().sum())
    assert_close(objective(x), expected, A.domain.eps)
    assert len(leaves(objective.gradient(x))) == 2


def test_nothing_is_changed() -> None:
    layer, A, x, y = problem()
    with no_side_effects(layer, x, y):
        objective = al.LeastSquares(A, y)
        objective(x)
        objective.value_and_gradient(x)


@pytest.mark.parametrize("data", [None, torch.zeros(3), torch.zeros(1, 2, 5)], ids=["none", "shape", "dtype"])
def test_data_must_be_in_the_codomain(data) -> None:
    _, A, _, _ = problem()
    with pytest.raises(al.SpaceMismatchError, match="expected y to be an element"):
        al.LeastSquares(A, data)
    with pytest.raises(al.SpaceMismatchError, match="expected y to be an element"):
        al.least_squares_gradient(A, A.domain.zeros(), data)


def test_argument_must_be_in_the_domain() -> None:
    _, A, _, y = problem()
    with pytest.raises(al.SpaceMismatchError, match="expected x to be an element"):
        al.LeastSquares(A, y)(torch.zeros(1, 1, 9))
    with pytest.raises(al.SpaceMismatchError, match="expected x to be an element"):
        al.LeastSquares(A, y).gradient(y)


D = torch.float64


def two_outputs() -> tuple[al.LinearOperator, dict[str, torch.Tensor]]:
    A = al.linear_operator(lambda x: {"a": x.diff(), "b": torch.fft.fft(x)}, torch.zeros(6, dtype=D))
    return A, draw(A.codomain, 2)


NUMBERS: dict[str, tuple[Any, float, float]] = {  # with those of the first and the second leaf
    "a number": (2, 2.0, 2.0),
    "a tensor without dimensions": (torch.tensor(2.0), 2.0, 2.0),
    "numbers for leaves": ({"a": 3.0, "b": torch.tensor(0.5, dtype=D)}, 3.0, 0.5),
    "a number beside entries": ({"a": 3.0, "b": torch.full((6,), 0.5, dtype=D)}, 3.0, 0.5),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_weights_of_all_entries(name: str) -> None:
    A, y = two_outputs()
    weight, a, b = NUMBERS[name]
    whole = {"a": torch.full((5,), a, dtype=D), "b": torch.full((6,), b, dtype=D)}
    F, G, x = al.LeastSquares(A, y, weight), al.LeastSquares(A, y, whole), draw(A.domain)
    assert_close(F(x), G(x), A.domain.eps)
    assert_close(F.gradient(x), G.gradient(x), A.domain.eps)
    assert_close(F.value_and_gradient(x)[1], G.gradient(x), A.domain.eps)
    assert_close(F.hessian(x), G.hessian(x), A.domain.eps)
    for solver in (al.solvers.cgls, al.solvers.lsmr):
        assert_close(solver(A, y, weight=weight, damp=0.1).x, solver(A, y, weight=whole, damp=0.1).x, A.domain.eps)


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("options", [{}, {"normal": True}, {"precondition": "auto"}])
def test_a_number_is_the_weight_of_every_batch(batch: int, options: dict[str, Any]) -> None:
    layer = nn.Conv1d(1, 2, 3, padding=1, bias=False, dtype=D).requires_grad_(False)
    A = al.linear_operator(layer, (2, 1, 9), batch_dims=1)
    y = torch.rand(batch, 2, 9, dtype=D)
    whole = torch.full_like(y, 2.0)
    F, G, x = al.LeastSquares(A, y, 2.0), al.LeastSquares(A, y, whole), torch.rand(batch, 1, 9, dtype=D)
    assert_close(F.gradient(x), G.gradient(x), A.domain.eps)
    assert_close(F.hessian(x), G.hessian(x), A.domain.eps)
    found, expected = (
        al.solvers.cgls(A, y, weight=w, damp=0.5, tol=1e-12, **options).x for w in (torch.tensor(2.0), whole)
    )
    assert_close(found, expected, A.domain.eps, factor=64)


def test_a_weight_without_dimensions_is_learned() -> None:
    _, A, x, y = problem()
    w = nn.Parameter(torch.tensor(2.0, dtype=D))
    F = al.LeastSquares(A, y, w)
    assert [name for name, p in F.named_parameters() if p is w] == ["weight.operator_0.entries_0"]
    (found,) = torch.autograd.grad(F(x), w)
    assert_close(found, F(x).detach() / 2, A.domain.eps)
    assert torch.autograd.gradcheck(lambda w: al.solvers.cgls(A, y, weight=w, damp=0.5, tol=1e-12).x, (w,))
    copied = copy.deepcopy(F)
    with torch.no_grad():
        w.mul_(2)
    assert_close(F(x).detach(), 2 * copied(x).detach(), A.domain.eps)


@pytest.mark.parametrize(
    ("weight", "message"),
    [(-1.0, "weights of 0 or more"), (torch.tensor(-1.0), "weights of 0 or more"), (True, "weight"), ("2", "weight"),
     (1j, "weight"), (torch.tensor(1j), "weight"), (torch.ones(1, dtype=D), "weight")],
)  # fmt: skip
def test_what_is_no_weight_of_all_entries(weight: Any, message: str) -> None:
    _, A, _, y = problem()
    with pytest.raises(al.SpaceMismatchError, match=message):
        al.LeastSquares(A, y, weight)
    with pytest.raises(al.SpaceMismatchError, match=message):
        al.solvers.lsmr(A, y, weight=weight)


def test_weight_must_fit() -> None:
    _, A, _, y = problem()
    with pytest.raises(al.SpaceMismatchError, match="weight"):
        al.LeastSquares(A, y, weight=torch.ones(3, dtype=torch.float64))


def test_autocast_changes_nothing() -> None:
    A = al.linear_operator(torch.nn.Linear(8, 8, bias=False).requires_grad_(requires_grad=False), (3, 8))
    x, y = A.domain.randn(), A.codomain.randn()
    F = al.LeastSquares(A, y)
    for _ in range(2):  # before there is a fused program, and after
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            value, gradient = F.value_and_gradient(x)
        assert value.dtype == gradient.dtype == torch.float32
        assert_close((value, gradient), (F(x), A.H(A(x) - y)), A.domain.eps)
        assert_close(F.gradient(x), gradient, A.domain.eps)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_like_the_one_before_see_every_change(weighted: bool) -> None:
    layer = torch.nn.Conv1d(1, 1, 3, padding=1, bias=False).double().requires_grad_(requires_grad=False)
    A = al.linear_operator(layer, (2, 1, 8), batch_dims=1)
    x, y = A.domain.randn(), A.codomain.randn()
    w = y.abs() if weighted else None
    F = al.LeastSquares(A, y, w)

    def expected(x: torch.Tensor) -> torch.Tensor:
        r = layer(x) - y
        return A.H(r * w if weighted else r)

    for change in (
        lambda: None,
        lambda: layer.weight.mul_(2),
        lambda: layer.weight.data.fill_(3.0),
        lambda: setattr(layer, "weight", torch.nn.Parameter(torch.ones(1, 1, 3).double(), requires_grad=False)),
        lambda: setattr(layer, "padding", (1,)),
    ):
        change()
        for z in (x, x, torch._neg_view(-x), x.permute(2, 1, 0).contiguous().permute(2, 1, 0), x + 1, x):
            assert_close(F.gradient(z), expected(z), A.domain.eps)
    tracked = x.clone().requires_grad_()
    assert F.gradient(tracked).requires_grad
    assert not F.gradient(x).requires_grad
    with pytest.raises(al.SpaceMismatchError, match="batch"):
        F.gradient(x[:1])
    F.double()
    F.A.double()
    with pytest.raises(al.SpaceMismatchError, match="float32"):
        F.gradient(x.float())


@pytest.mark.parametrize("engine", ["traced", "eager"])
def test_the_linear_part_of_an_affine_operator_has_no_offset(engine: str) -> None:
    layer = nn.Linear(3, 4, dtype=torch.float64).requires_grad_(False)
    f = al.affine_operator(layer, (3,), engine=engine)
    x, y = draw(f.domain, 1), draw(f.codomain, 2)
    for A, residual in ((f.linear, layer.weight @ x - y), (f, layer(x) - y)):
        objective = al.LeastSquares(A, y)
        value, gradient = objective.value_and_gradient(x)
        expected = layer.weight.T @ residual
        for found in (gradient, objective.gradient(x), al.least_squares_gradient(A, x, y)):
            assert_close(found, expected, A.domain.eps)
        assert_close(value, residual.square().sum() / 2, A.domain.eps)
        assert_close(objective(x), value, A.domain.eps)
