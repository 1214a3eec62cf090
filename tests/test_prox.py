"""Proximal maps: `prox(x, step)` minimises `g(z) + ‖z − x‖² / (2 step)`."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import adjointlab as al

D = torch.float64
EPS = torch.finfo(D).eps
WEIGHTS = torch.tensor([[0.5, 0.0, 2.0, 1.0]], dtype=D)

FUNCTIONS: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "box": (al.prox.box(-0.5, 0.7), lambda z: torch.where(((z < -0.5) | (z > 0.7)).any(), torch.inf, 0.0)),
    "nonnegative": (al.prox.nonnegative(), lambda z: torch.where((z < 0).any(), torch.inf, 0.0)),
    "l1": (al.prox.l1(0.8), lambda z: 0.8 * z.abs().sum()),
    "weighted l1": (al.prox.l1(WEIGHTS), lambda z: (WEIGHTS * z.abs()).sum()),
    "joint l1": (al.prox.l1(0.8, dim=0), lambda z: 0.8 * torch.linalg.vector_norm(z, dim=0).sum()),
    "the norm": (al.prox.l1(1.5, dim=(0, 1)), lambda z: 1.5 * z.norm()),
    "l2": (al.prox.l2(3.0), lambda z: 1.5 * z.abs().square().sum()),
}
COMPLEX = [name for name in FUNCTIONS if name not in {"box", "nonnegative"}]


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, D) for n in FUNCTIONS] + [(n, torch.complex128) for n in COMPLEX], ids=str
)
@pytest.mark.parametrize("step", [0.3, 2.0])
def test_nothing_near_is_lower(name: str, dtype: torch.dtype, step: float) -> None:
    prox, g = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, dtype=dtype, generator=generator)

    def objective(z: Tensor) -> float:
        return float(g(z) + (z - x).abs().square().sum() / (2 * step))

    found = prox(x, step)
    least = objective(found)
    assert least < objective(torch.zeros_like(x)) or not found.any()
    for size in (1.0, 1e-2, 1e-4):
        for _ in range(50):
            move = size * torch.randn(3, 4, dtype=dtype, generator=generator)
            # The objective is strongly convex: it grows by at least ‖move‖² / (2 step).
            grown = objective(found + move) - least
            assert grown >= float(move.abs().square().sum()) / (2 * step) - 64 * EPS * (1 + least)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_moreau(name: str) -> None:
    prox, _ = FUNCTIONS[name]
    x, step = torch.randn(3, 4, dtype=D, generator=torch.Generator().manual_seed(1)), 0.4
    whole = prox(x, step) + step * al.prox.conjugate(prox)(x / step, 1 / step)
    assert torch.dist(whole, x) <= 16 * EPS * x.norm()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_pytrees_pickles_and_arguments(name: str) -> None:
    prox, _ = FUNCTIONS[name]
    x = torch.randn(3, 4, dtype=D, generator=torch.Generator().manual_seed(2))
    before = x.clone()
    found = prox({"a": x, "b": (2 * x,)}, 0.5)
    assert torch.equal(found["a"], prox(x, 0.5))
    assert torch.equal(found["b"][0], prox(2 * x, 0.5))
    assert torch.equal(pickle.loads(pickle.dumps(prox))(x, 0.5), found["a"])
    assert torch.equal(x, before)
    assert prox(x.float(), 0.5).dtype is torch.float32


def test_zeros_stay_zeros() -> None:
    for prox in (al.prox.l1(0.0), al.prox.l1(0.0, dim=0), al.prox.l1(1.0, dim=0), al.prox.l2(0.0)):
        assert not prox(torch.zeros(2, 3), 1.0).any()
        assert not prox(torch.zeros(2, 3, dtype=torch.complex64), 1.0).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: al.prox.box(1.0, 0.0), "lower bound to be at most the upper one"),
        (lambda: al.prox.box(torch.tensor([0.0, torch.nan])), "got NaN"),
        (lambda: al.prox.l1(-1.0), "a weight of 0 or more"),
        (lambda: al.prox.l2(torch.tensor([1.0, torch.nan])), "a weight of 0 or more"),
        (lambda: al.prox.nonnegative()(torch.ones(2, dtype=torch.complex64), 1.0), "real entries for bounds"),
    ],
)
def test_refusals(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_number_and_a_tensor_as_bounds() -> None:
    x, most = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([1.0, 0.2, 1.0])
    assert torch.equal(al.prox.box(0.0, most)(x, 1.0), torch.tensor([0.0, 0.2, 1.0]))
    assert torch.equal(al.prox.box(-most, 1)(x, 1.0), torch.tensor([-1.0, 0.5, 1.0]))
