"""Differences of neighbours and the Laplacian, by their definition, over borders and dimensions."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from laws import assert_close, draw
from torch import Tensor

import adjointlab as al

D = torch.float64
BEYOND = {"reflect": lambda x: x[-1], "circular": lambda x: x[0], "zero": lambda x: 0 * x[0]}
BEFORE = {"reflect": lambda x: x[0], "circular": lambda x: x[-1], "zero": lambda x: 0 * x[0]}
every_border = pytest.mark.parametrize("border", BEYOND)


def forward(x: Tensor, dim: int, border: str, h: float) -> Tensor:
    """Return differences along a dimension, entry by entry."""
    rows = x.movedim(dim, 0)
    longer = [*rows, BEYOND[border](rows)]
    return torch.stack([(b - a) / h for a, b in itertools.pairwise(longer)]).movedim(0, dim)


def second(x: Tensor, dim: int, border: str, h: float) -> Tensor:
    rows = x.movedim(dim, 0)
    longer = [BEFORE[border](rows), *rows, BEYOND[border](rows)]
    terms = zip(longer, longer[1:], longer[2:], strict=False)
    return torch.stack([(a - 2 * b + c) / h**2 for a, b, c in terms]).movedim(0, dim)


@pytest.mark.parametrize(
    ("shape", "dims", "found", "options"),
    [
        ((5,), None, (0,), {}),
        ((3, 4), None, (0, 1), {"spacing": (0.5, 2.0)}),
        ((2, 3, 4, 3), None, (2, 3), {"dtype": torch.complex128, "spacing": 3}),
        ((1, 1, 6), None, (2,), {}),
        ((2, 3, 4), (-1, 1), (2, 1), {"batch_dims": 1, "spacing": [1.0, 2.0]}),
    ],
)
@every_border
def test_by_definition(border: str, shape: tuple[int, ...], dims: Any, found: Any, options: dict[str, Any]) -> None:
    spacing, k = options.get("spacing", 1.0), options.get("batch_dims", 0)
    space = al.Space.of(shape, dtype=options.get("dtype", D), batch_dims=k)
    L = al.finite_differences(space, dims, border=border, spacing=spacing)
    x = draw(space, 1)
    steps = spacing if isinstance(spacing, (tuple, list)) else [spacing] * len(found)
    expected = torch.stack([forward(x, dim, border, h) for dim, h in zip(found, steps, strict=True)], k)
    assert_close(L(x), expected, space.eps)
    assert al.check_adjoint(L).passed
    assert L.engine == "traced"
    laplacian = al.laplacian(space, dims, border=border, spacing=spacing)
    total = sum(second(x, dim, border, h) for dim, h in zip(found, steps, strict=True))
    assert_close(laplacian(x), total, space.eps)
    assert_close(laplacian.H(x), total, space.eps)
    if border != "zero":
        assert_close(laplacian(x), -L.gram(x), space.eps, 16 * float(x.norm()))


def test_copies_and_what_is_printed() -> None:
    L = al.finite_differences((1, 1, 4, 4), border="circular")
    x = torch.randn(1, 1, 4, 4)
    assert torch.equal(pickle.loads(pickle.dumps(L))(x), L(x))
    assert torch.equal(copy.deepcopy(L).double()(x.double()).float(), L(x))
    assert "FiniteDifferences(dims=(-2, -1), border='circular'" in repr(L)
    assert "Laplacian(dims=(-1,)" in repr(al.laplacian((3, 3), -1))


def test_default_dimensions() -> None:
    for shape, count in {(2, 3, 2, 3, 4): 3, (1, 1): 2, (1, 8): 1, (3, 4, 5): 3}.items():
        assert al.finite_differences(shape).codomain.specs[0].shape[0] == count


def test_batch_sizes_are_free() -> None:
    L = al.finite_differences((2, 5), batch_dims=1)
    assert L(torch.ones(3, 5)).shape == (3, 1, 5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"space": ((3,), (4,))}, al.SpaceMismatchError, "domain of one tensor"),
        ({"border": "replicate"}, ValueError, "border to be one of 'reflect', 'circular', 'zero', got 'replicate'"),
        ({"dims": 2}, ValueError, "from 0 to 1, or from -2 to -1, got 2"),
        ({"dims": (0, -2)}, ValueError, "different dimensions"),
        ({"dims": ()}, ValueError, "different dimensions"),
        ({"dims": 0, "batch_dims": 1}, ValueError, "batch dimensions have no neighbours"),
        ({"spacing": 0.0}, ValueError, "spacing to be a positive number"),
        ({"spacing": (1.0, 2.0, 3.0)}, ValueError, "one for each of the 2"),
        ({"batch_dims": 2}, ValueError, "lower batch_dims"),
    ],
)
@pytest.mark.parametrize("make", [al.finite_differences, al.laplacian])
def test_refusals(make: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**{"space": (3, 4), **options})
