"""Types of operators: mypy and pyright read these tests, and pytest runs them."""

from collections.abc import Callable
from typing import assert_type

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

import adjointlab as al


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:2], x[2:]


def difference(a: Tensor, b: Tensor) -> Tensor:
    return a - b


def mean(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (a + b + c) / 3


def total(parts: dict[str, Tensor]) -> Tensor:
    return parts["left"] + parts["right"]


def test_a_module_on_a_shape_maps_tensors_to_tensors() -> None:
    A = al.linear_operator(nn.Conv1d(1, 1, 3, bias=False), (1, 1, 8), engine="eager")
    assert_type(A, al.LinearOperator[Tensor, Tensor])
    x = A.domain.randn()
    assert_type(A(x), Tensor)
    assert_type(A @ x, Tensor)
    assert_type(A.H(A(x)), Tensor)
    assert_type(A.gram @ x, Tensor)
    assert_type(al.linear_operator(nn.Identity(), A.domain), al.LinearOperator[Tensor, Tensor])
    assert isinstance(A.H(A(x)), Tensor)


def test_a_function_maps_to_what_it_returns() -> None:
    A = al.linear_operator(halves, (5,))
    assert_type(A, al.LinearOperator[Tensor, tuple[Tensor, Tensor]])
    y = A(torch.ones(5))
    assert_type(y, tuple[Tensor, Tensor])
    assert isinstance(y, tuple)
    assert_type(A.H, al.LinearOperator[tuple[Tensor, Tensor], Tensor])
    assert_type(A.H(y), Tensor)
    assert_type(A.T(y), Tensor)
    assert_type(al.linear_operator(lambda x: x[1:] - x[:-1], (5,)), al.LinearOperator[Tensor, Tensor])


def test_arguments_of_a_function_are_a_tuple_of_the_domain() -> None:
    x = torch.ones(3)
    for A in (al.linear_operator(difference, ((3,), (3,))), al.linear_operator(difference, (x, x))):
        assert_type(A, al.LinearOperator[tuple[Tensor, Tensor], Tensor])
        assert_type(A.H(x), tuple[Tensor, Tensor])
        assert isinstance(A.H(x), tuple)
    three = al.linear_operator(mean, (x, x, x))
    assert_type(three, al.LinearOperator[tuple[Tensor, Tensor, Tensor], Tensor])
    named = al.linear_operator(total, {"left": (3,), "right": (3,)})
    assert_type(named, al.LinearOperator[dict[str, Tensor], Tensor])
    assert_type(named.H(x), dict[str, Tensor])


def test_algebra_follows_the_spaces() -> None:
    A, B = al.linear_operator(halves, (5,)), al.diagonal(torch.ones(5))
    assert_type(A @ B, al.LinearOperator[Tensor, tuple[Tensor, Tensor]])
    assert_type(A.H @ A + 2 * B - B / 3, al.LinearOperator[Tensor, Tensor])
    assert_type(torch.tensor(2.0) * A, al.LinearOperator[Tensor, tuple[Tensor, Tensor]])
    assert_type(-A.double(), al.LinearOperator[Tensor, tuple[Tensor, Tensor]])
    with pytest.raises(al.SpaceMismatchError, match="the domain of A to be the codomain of B"):
        A @ A  # type: ignore[operator]
    with pytest.raises(al.SpaceMismatchError, match="expected x to be an element"):
        A.H(torch.ones(5))  # type: ignore[arg-type]


def test_blocks_map_to_tuples() -> None:
    A, B = al.identity((3,)), al.diagonal(torch.ones(3))
    assert_type(al.vstack([A, B]), al.LinearOperator[Tensor, tuple[Tensor, ...]])
    assert_type(al.hstack([A, B]), al.LinearOperator[tuple[Tensor, ...], Tensor])
    assert_type(al.block_diag([A, B]), al.LinearOperator[tuple[Tensor, ...], tuple[Tensor, ...]])
    assert isinstance(al.vstack([A, B])(torch.ones(3)), tuple)
    assert_type(al.identity(((3,), (4,))), al.LinearOperator[tuple[Tensor, Tensor], tuple[Tensor, Tensor]])


def test_an_affine_map_has_the_types_of_its_linear_part() -> None:
    f = al.affine_operator(nn.Linear(3, 2), (3,))
    assert_type(f, al.AffineOperator[Tensor, Tensor])
    assert_type(f(torch.ones(3)), Tensor)
    assert_type(f.offset, Tensor)
    assert_type(f.H(f.offset), Tensor)
    assert isinstance(f.offset, Tensor)


def test_matrices_pairs_and_adjoints() -> None:
    assert_type(al.matrix(torch.ones(2, 3)), al.LinearOperator[Tensor, Tensor])
    assert_type(al.from_pair(lambda x: x[1:], lambda y: pad(y, (1, 0)), (3,), (2,)), al.LinearOperator[Tensor, Tensor])
    back = al.linear_adjoint(halves, (5,))
    assert_type(back, Callable[[tuple[Tensor, Tensor]], Tensor])
    assert_type(al.to_dense(al.identity((2,))), Tensor)
    assert isinstance(back((torch.ones(2), torch.ones(3))), Tensor)


def solve_twice(A: al.LinearOperator[Tensor, Tensor], y: Tensor) -> Tensor:
    """A user's own function."""
    x = al.solvers.cgls(A, y, maxiter=5).x
    return al.solvers.lsmr(A, y, x0=x, maxiter=5).x


def test_annotations_of_users() -> None:
    x = solve_twice(al.diagonal(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 1.0]))
    assert_type(x, Tensor)
    assert x.shape == (2,)


def test_names_that_do_not_exist_are_seen() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'linear_operater'"):
        al.linear_operater  # type: ignore[attr-defined]  # noqa: B018
