"""Parts that act by index along one dimension become small matrices, whatever is between and around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from built import first_way, last_way, operator
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import assert_close
from torch import Tensor, nn

import adjointlab as al

pytestmark = pytest.mark.cpu
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
BOTH = (-1, -2)


class Along(nn.Module):
    """Weighted sums of neighbours along one dimension after another, level after level of what is left."""

    def __init__(self, dims: tuple[int, ...] = BOTH, levels: int = 2, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weights = nn.Parameter(torch.randn(2, 3, dtype=dtype, generator=draw))
        self.tables = {n: torch.randint(n, (n // 2, 3), generator=draw) for n in (4, 6, 8, 12)}
        self.levels, self.dims = levels, dims

    def along(self, x: Tensor, dim: int) -> Tensor:
        near = x.movedim(dim, -1)[..., self.tables[x.shape[dim]]]
        return torch.cat([(near * w).sum(-1) for w in self.weights], -1).movedim(-1, dim)

    def forward(self, x: Tensor) -> Tensor:
        out = x.clone()
        for level in range(self.levels):
            h, w = (n >> level for n in x.shape[-2:])
            part = out[..., :h, :w]
            for dim in self.dims:
                part = self.along(part, dim)
            out[..., :h, :w] = part
        return out


def made(f: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, way: Any = first_way) -> al.LinearOperator:
    return operator(f, al.TensorSpec(shape, dtype), None, choose_map=way)


def matrices(A: al.LinearOperator) -> list[str]:
    lines = [line.split(" with")[0] for line in str(A.explain()).splitlines()]
    return sorted(line.removeprefix("kernel: sparse map ") for line in lines if line.startswith("kernel: sparse map"))


def assert_same(A: al.LinearOperator, f: Any) -> None:
    x, v = A.domain.randn(), A.codomain.randn()
    with torch.no_grad():
        assert_close(A(x), f(x), A.domain.eps)
        assert_close(A.H(v), torch.func.vjp(f, x)[1](v)[0], A.domain.eps)


@settings(max_examples=24)
@given(st.data(), st.sampled_from(DTYPES), st.integers(1, 2), st.sampled_from([first_way, last_way]))
def test_agreement(data: Any, dtype: torch.dtype, levels: int, way: Any) -> None:
    batch = data.draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
    sizes = data.draw(st.tuples(*[st.sampled_from([8, 12])] * 2))
    f = Along(data.draw(st.sampled_from([(-1,), (-2,), BOTH, BOTH[::-1], (-2, -2)])), levels, dtype)
    A = made(f, (*batch, *sizes), dtype, way)
    assert matrices(A)
    assert_same(A, f)


def test_the_matrices_are_small() -> None:
    A = made(Along(), (12, 8))
    forward = ["12 × 12", "8 × 8", "6 × 6", "4 × 8"]  # the last one takes a part of a row first
    assert matrices(A) == sorted([*forward, "12 × 12", "8 × 8", "6 × 6", "4 × 4"])
    assert matrices(made(Along((-1,), 1), (3, 8, 12))) == ["12 × 12", "12 × 12"]


def test_parts_that_are_no_faster_are_left() -> None:
    f = Along()
    A = made(f, (12, 8), way=lambda native, ways, device, beside: None)
    assert not matrices(A)
    assert_same(A, f)


def test_what_acts_along_two_dimensions_at_once_is_one_matrix() -> None:
    places = torch.randperm(12).reshape(3, 4)
    A = made(lambda x: x.reshape(12)[places] + 0 * x, (3, 4))
    assert_same(A, lambda x: x.reshape(12)[places])
    assert "12 × 12" in matrices(A)


def test_weights_may_change_and_have_gradients() -> None:
    f = Along()
    A, (x, v) = made(f, (12, 8)), torch.randn(2, 12, 8, dtype=torch.float64)
    A(x), A.H(v)
    for change in (lambda: f.weights.data.mul_(2), lambda: f.tables[12].fill_(3), f.tables[4].zero_):
        change()
        assert_same(A, f)
    expected = torch.autograd.grad((f(x) * v).sum(), f.weights)[0]
    for value in ((A(x) * v).sum(), (x * A.H(v)).sum()):
        assert_close(torch.autograd.grad(value, f.weights)[0], expected, 1e-15)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_not_a_number_stays_where_it_was(number: float) -> None:
    f = Along()
    A = made(f, (12, 8))
    for B, g in ((A, f), (A.H, lambda v: torch.func.vjp(f, A.domain.zeros())[1](v)[0])):
        x = B.domain.randn()
        x[1, 2] = number
        with torch.no_grad():
            assert torch.equal(B(x).isfinite(), g(x).isfinite())
