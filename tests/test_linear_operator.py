"""Linear operators: their algebra, domains and batches; laws over the whole zoo are in test_laws.py."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from laws import (
    ENGINES,
    assert_acts_as,
    assert_close,
    distance,
    dot_error,
    draw,
    eps,
    frobenius,
    matrix,
    no_side_effects,
)
from torch import nn

import adjointlab as al


@functools.cache
def blur() -> al.LinearOperator:
    return al.linear_operator(nn.Conv2d(1, 2, 3, bias=False, dtype=torch.float64), (1, 1, 5, 4))


def test_matmul_applies_and_composes() -> None:
    A = blur()
    x = draw(A.domain)
    assert torch.equal(A @ x, A(x))
    assert isinstance(A @ A.H, al.LinearOperator)


def test_identity_is_its_own_adjoint() -> None:
    space = al.Space.of({"a": (2, 3), "b": (4,)}, dtype=torch.complex128)
    identity = al.identity(space)
    x = draw(space)
    assert distance(identity(x), x) == 0
    assert distance(identity.H(x), x) == 0
    assert identity.domain == identity.codomain == space


def test_identity_does_not_alias_its_argument_under_algebra() -> None:
    space = al.Space.of((3,), dtype=torch.float64)
    x = draw(space)
    with no_side_effects(lambda: None, x):
        (al.identity(space) + 2 * al.identity(space))(x)


def test_adjoint_of_a_diagonal_is_its_conjugate() -> None:
    d = torch.randn(2, 3, dtype=torch.complex128)
    x = torch.randn(2, 3, dtype=torch.complex128)
    assert_close(al.diagonal(d)(x), d * x, al.Space.of(x).eps)
    assert_close(al.diagonal(d).H(x), d.conj() * x, al.Space.of(x).eps)


@pytest.mark.parametrize("number", [2, torch.tensor(2.0), torch.tensor(2.0, dtype=torch.float64)])
def test_a_diagonal_of_one_number(number: Any) -> None:
    space = al.Space.of({"a": (2, 3), "b": (4,)})
    W = al.diagonal({"a": number, "b": torch.arange(4.0)}, space)
    x = {"a": torch.ones(2, 3), "b": torch.ones(4)}
    assert torch.equal(W(x)["a"], 2 * x["a"])
    assert torch.equal(W.H(x)["b"], torch.arange(4.0))
    assert al.check_adjoint(W).passed
    with pytest.raises(al.SpaceMismatchError, match="d to be an element"):
        al.diagonal({"a": number, "b": torch.ones(3)}, space)


def test_blocks_of_different_spaces() -> None:
    A = blur()
    B = al.linear_operator(torch.fft.rfft, (2, 5), engine="auto")
    blocks = al.block_diag([A, B])
    dense = torch.block_diag(matrix(A, A.domain.zeros()), matrix(B, B.domain.zeros()))
    assert_acts_as(blocks.H, dense.T, draw(blocks.codomain), eps(blocks.domain))


def test_stack_of_one_operator() -> None:
    A = blur()
    for stack in (al.vstack([A]), al.hstack([A]), al.block_diag([A])):
        x, y = draw(stack.domain), draw(stack.codomain)
        assert dot_error(stack, stack.H, x, y, real=False) <= 16 * eps(A.domain)


def test_algebra_of_algebra() -> None:
    A = blur()
    a = matrix(A, A.domain.zeros())
    B = (2 * A.gram - A.H @ A / 3 + al.identity(A.domain)).H @ A.H
    b = (2 * a.T @ a - a.T @ a / 3 + torch.eye(len(a.T), dtype=a.dtype)) @ a.T
    assert_acts_as(B, b, draw(B.domain), eps(A.domain), scale=3 * frobenius(a) ** 3)
    assert_acts_as(B.H, b.T, draw(B.codomain), eps(A.domain), scale=3 * frobenius(a) ** 3)


def test_scalar_tensor_as_factor() -> None:
    A = blur()
    c = torch.tensor(2.5, dtype=torch.float64)
    y = draw(A.codomain)
    assert_close((c * A).H(y), 2.5 * A.H(y), eps(A.domain))


@pytest.mark.parametrize(
    "combine",
    [
        lambda A: A @ A,
        lambda A: A + A.H,
        lambda A: A - A.gram,
        lambda A: al.vstack([A, A.H]),
        lambda A: al.hstack([A, A.H]),
        lambda A: A @ al.identity(A.codomain),
        lambda A: A + al.linear_operator(nn.Conv2d(1, 2, 3, bias=False), (1, 1, 5, 4)),
    ],
    ids=["product", "sum", "difference", "vstack", "hstack", "identity", "dtype"],
)
def test_spaces_that_do_not_fit_are_refused_at_construction(combine) -> None:
    with pytest.raises(al.SpaceMismatchError, match="expected"):
        combine(blur())


def test_complex_multiple_of_a_real_operator_is_refused() -> None:
    with pytest.raises(al.SpaceMismatchError, match="complex"):
        1j * blur()


@pytest.mark.parametrize("stack", [al.vstack, al.hstack, al.block_diag], ids=lambda f: f.__name__)
def test_empty_stack_is_refused(stack) -> None:
    with pytest.raises(al.SpaceMismatchError, match=r"non-empty|at least one"):
        stack([])


@pytest.mark.parametrize("other", ["text", None, [1, 2]], ids=str)
def test_algebra_with_other_things_is_refused(other) -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        blur() + other


def test_explain_is_readable() -> None:
    text = blur().explain()
    assert "conv" in text
    assert "traced" in text


def test_repr_names_the_spaces() -> None:
    assert "(1, 1, 5, 4)" in repr(blur())


# -------------------------------------------------------------------------------------------------------- the domain


@pytest.mark.parametrize(
    "domain",
    [
        torch.full((1, 1, 5, 4), torch.nan, dtype=torch.float64),
        (1, 1, 5, 4),
        al.TensorSpec((1, 1, 5, 4), torch.float64, torch.get_default_device()),
        al.Space.of((1, 1, 5, 4), dtype=torch.float64),
    ],
    ids=["example", "shape", "spec", "space"],
)
def test_ways_to_give_the_domain(domain) -> None:
    A = al.linear_operator(nn.Conv2d(1, 1, 3, bias=False, dtype=torch.float64), domain)
    assert A.domain == al.Space.of((1, 1, 5, 4), dtype=torch.float64)


def test_dtype_of_a_shape_comes_from_the_parameters() -> None:
    A = al.linear_operator(nn.Conv1d(1, 1, 3, bias=False, dtype=torch.complex128), (1, 1, 6))
    assert A.domain.specs[0].dtype == torch.complex128


def test_dtype_of_a_shape_without_parameters_is_the_default() -> None:
    assert al.linear_operator(torch.flipud, (3, 2)).domain.specs[0].dtype == torch.get_default_dtype()


def test_tuple_domain_is_spread_over_the_arguments() -> None:
    A = al.linear_operator(lambda x, z: x + 2 * z, ((3,), (3,)))
    x, z = draw(A.domain)
    assert torch.equal(A((x, z)), x + 2 * z)


def test_list_domain_is_passed_whole() -> None:
    A = al.linear_operator(lambda pair: pair[0] + 2 * pair[1], [torch.zeros(3), torch.zeros(3)])
    assert isinstance(A.H(torch.ones(3)), list)


def test_fixed_keyword_arguments() -> None:
    def masked(x: torch.Tensor, *, mask: torch.Tensor, scale: float = 1) -> torch.Tensor:
        return scale * mask * x

    mask = torch.tensor([1.0, 0, 1])
    A = al.linear_operator(masked, (3,), kwargs={"mask": mask, "scale": 2.0})
    assert torch.equal(A.H(torch.ones(3)), 2 * mask)


def test_tensors_in_keyword_arguments_are_read_at_each_call() -> None:
    mask = torch.tensor([1.0, 0, 1])
    A = al.linear_operator(lambda x, mask: mask * x, (3,), kwargs={"mask": mask})
    A.H(torch.ones(3))
    mask[1] = 5
    assert torch.equal(A.H(torch.ones(3)), mask)


def test_linear_adjoint_is_the_adjoint_function() -> None:
    layer = nn.Conv1d(1, 2, 3, stride=2, bias=False, dtype=torch.complex128)
    adjoint = al.linear_adjoint(layer, torch.zeros(1, 1, 8, dtype=torch.complex128))
    A = al.linear_operator(layer, (1, 1, 8))
    v = draw(A.codomain)
    assert_close(adjoint(v), A.H(v), eps(A.domain))


def test_linear_adjoint_of_several_arguments() -> None:
    adjoint = al.linear_adjoint(lambda x, z: x + 2 * z, torch.zeros(3), torch.zeros(3))
    v = torch.arange(3.0)
    assert distance(tuple(adjoint(v)), (v, 2 * v)) == 0


def test_containers_that_pytree_does_not_know() -> None:
    class Pair:
        def __init__(self, low: torch.Tensor, high: torch.Tensor) -> None:
            self.low, self.high = low, high

    A = al.linear_operator(lambda x: Pair(x[:2], 3 * x[2:]), (5,))
    image = A(torch.ones(5))
    assert isinstance(image, Pair)
    assert torch.equal(A.H(image), torch.tensor([1.0, 1, 9, 9, 9]))


# ----------------------------------------------------------------------------------------------------------- batch_dims


@pytest.mark.parametrize("engine", ENGINES)
def test_batch_sizes_may_change(engine: str) -> None:
    layer = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular", bias=False, dtype=torch.float64)
    A = al.linear_operator(layer, (2, 1, 4, 5), batch_dims=1, engine=engine)
    for batch in (1, 2, 5):
        fixed = al.linear_operator(layer, (batch, 1, 4, 5), engine="eager")
        y = draw(fixed.codomain)
        assert_close(A.H(y), fixed.H(y), eps(A.domain))
        assert_close(A(fixed.H(y)), fixed(fixed.H(y)), eps(A.domain))


@pytest.mark.parametrize("engine", ENGINES)
def test_two_batch_dims(engine: str) -> None:
    A = al.linear_operator(lambda x: x.cumsum(-1), (2, 3, 4), batch_dims=2, engine=engine)
    y = torch.randn(5, 1, 4)
    assert A.H(y).shape == y.shape
    assert_close(A.H(y), y.flip(-1).cumsum(-1).flip(-1), eps(A.domain))


def test_batch_sizes_follow_through_the_algebra() -> None:
    A = al.linear_operator(nn.Conv1d(1, 1, 3, padding=1, bias=False), (2, 1, 6), batch_dims=1)
    x = torch.randn(4, 1, 6)
    for B in (2 * A + A, A.gram, A @ A, al.vstack([A, A]).gram, A.T):
        assert B(x).shape == x.shape


def test_other_sizes_are_refused() -> None:
    A = al.linear_operator(nn.Conv1d(1, 1, 3, bias=False), (2, 1, 6), batch_dims=1)
    with pytest.raises(al.SpaceMismatchError, match=r"\(2, 1, 7\)"):
        A(torch.zeros(2, 1, 7))


def test_without_batch_dims_sizes_are_fixed() -> None:
    A = al.linear_operator(nn.Conv1d(1, 1, 3, bias=False), (2, 1, 6))
    with pytest.raises(al.SpaceMismatchError, match=r"\(3, 1, 6\)"):
        A(torch.zeros(3, 1, 6))


def test_leaves_must_agree_on_the_batch_size() -> None:
    A = al.linear_operator(lambda x, z: x + z, ((2, 3), (2, 3)), batch_dims=1)
    with pytest.raises(al.SpaceMismatchError, match="element"):
        A((torch.zeros(2, 3), torch.zeros(4, 3)))


def test_a_divisor_is_read_at_each_call() -> None:
    p = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    A = al.identity(al.Space.of((2,), dtype=torch.float64)) / p
    x = torch.ones(2, dtype=torch.float64)
    for _ in range(2):
        (found,) = torch.autograd.grad(A(x).sum() + A.H(x).sum(), p)
        assert_close(found, -4 / p.detach().square(), A.domain.eps)
        with torch.no_grad():
            p.fill_(5.0)
        assert_close(A(x), x / 5, A.domain.eps)
        assert_close(A.H(x), x / 5, A.domain.eps)
    z = al.Space.of((2,), dtype=torch.complex128)
    al.assert_adjoint(al.identity(z) / torch.tensor(1 + 2j, dtype=torch.complex128))


@pytest.mark.parametrize("engine", ["traced", "eager"])
@pytest.mark.parametrize("part", [1.0, 1e-3, 1e-9])
@pytest.mark.slow
def test_a_small_part_that_is_only_real_linear_counts(engine: str, part: float) -> None:
    def leaf_by_leaf(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 1000 * z, part * z.conj()

    for f in (leaf_by_leaf, lambda z: torch.cat([z, part * z.conj()])):
        A = al.linear_operator(f, torch.zeros(3, dtype=torch.complex128), engine=engine)
        assert not A.is_complex_linear
        assert not A.H.is_complex_linear
        assert not al.check_linearity(f, A.domain).is_complex_linear
        assert al.check_adjoint(A).passed
        x, dense = draw(A.domain, 1), al.to_dense(A, real=True)
        image = A.codomain.vector(A(x))
        assert_close(dense @ torch.cat([x.real, x.imag]), torch.cat([image.real, image.imag]), A.domain.eps)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
def test_rounding_does_not_make_a_map_real_linear(dtype: torch.dtype) -> None:
    w = torch.randn(40, 40, dtype=dtype)
    maps = {
        "cancellation": lambda z: (w @ z + 1e4 * z) - 1e4 * z,
        "transforms": lambda z: torch.fft.ifft(torch.fft.fft(z) * w[0]),
        "coarse": lambda z: torch.fft.fft(z.to(torch.complex64)).to(dtype),
    }
    space = al.Space.of((40,), dtype=dtype)
    for name, f in maps.items():
        assert al.LinearOperator(f, f, space, space).is_complex_linear, name
