"""Factors that meet before the input does: the same J and ``J.H``, by fewer operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import adjointlab as al
from adjointlab.transpose.graph.ops import op_name

D, C = torch.float64, torch.complex128
EPS = torch.finfo(D).eps
DRAW = torch.Generator().manual_seed(0)
T, BIG, SIDE, MASK = (
    torch.rand(*shape, generator=DRAW, dtype=D) + 0.5 for shape in ((5, 1, 1), (5, 3, 4), (3, 1), (3, 4))
)
WAVE = torch.randn(5, 3, 4, generator=DRAW, dtype=C)


def signal(m: Tensor) -> Tensor:
    rho, r1, r2 = m
    return rho * torch.exp(-T * r2) * (1 - torch.exp(-4 * T / r1))


def intensity(x: Tensor) -> Tensor:
    return torch.fft.fft2(WAVE * torch.exp(1j * x)).abs().square()


# The shape of the point and a function of it.
MAPS: dict[str, tuple[tuple[int, ...], torch.dtype, Callable[[Tensor], Any]]] = {
    "signal": ((3, 3, 4), D, signal),
    "intensity": ((3, 4), D, intensity),
    "intensity of complex": ((3, 4), C, lambda z: torch.fft.fft2(WAVE * z).abs() ** 2),
    "modulus": ((3, 4), C, lambda z: (MASK * z).abs() * z.abs()),
    "powers": ((3, 4), D, lambda x: x.abs() ** 3 / (1 + x.abs())),
    "sums over the middle": ((3, 4), D, lambda x: (BIG * x.exp() / SIDE).sum(1) * x.sin().sum(0)),
    "sums that keep": ((3, 4), D, lambda x: (BIG * x.exp()).sum((0, 2), keepdim=True) / x.cos().sum(1, keepdim=True)),
    "sums of more dimensions": (
        (3, 4),
        D,
        lambda x: (x.exp() * T).sum(1, keepdim=True) * (x * T).sum((1, 2))[:, None, None],
    ),
    "fewer dimensions": ((4,), D, lambda x: ((x * x.exp()) * BIG / SIDE).sum(1).sum(0) + (x.sin() * SIDE).sum(0)),
    "views": ((3, 4), D, lambda x: ((x.exp() * MASK)[None] * BIG).view(1, 5, 12).squeeze(0) * x.sin().view(12)),
    "shapes that meet": ((5, 1, 1), D, lambda x: x.exp() * MASK / (x * x) * BIG * SIDE),
    "repeated": ((3, 4), D, lambda x: (x.exp() * MASK).expand(5, 3, 4) * BIG / x.expand(5, 3, 4).cosh()),
    "differences": ((3, 4), D, lambda x: (x.exp() * MASK - x.sin() * x) * x.cosh() / 3),
    "real parts": ((3, 4), C, lambda z: (z * z.conj() * WAVE).real * (z * WAVE).imag.exp()),
    "dimensions apart": (
        (3, 4),
        D,
        lambda x: (x.exp() * T).unsqueeze(3).squeeze(3) * x.unsqueeze(0).sin().unsqueeze(0)[0],
    ),
    "imaginary numbers": ((3, 4), D, lambda x: (2j * (3j * x.exp()) * WAVE * 1j).sum(0)),
    "numbers that are equal": ((3, 4), D, lambda x: (x.exp() * 2, x.exp() * (2 + 0j), x.exp() * 1, x.exp() * (1 + 0j))),
    "two precisions": ((3, 4), D, lambda x: x.exp() * torch.tensor(0.1) * MASK * x.sin() * torch.tensor(0.3)),
    "half a number": ((3, 4), D, lambda x: torch.where(x > 0.7, x.exp() * x, x.sin() * (x > 0.2)) / -x),
}


@pytest.mark.parametrize("name", MAPS)
def test_it_is_the_derivative(name: str) -> None:
    shape, dtype, f = MAPS[name]
    draw = torch.Generator().manual_seed(1)
    x, x1, d = (torch.rand(shape, generator=draw, dtype=dtype) + 0.3 for _ in range(3))
    J = al.jacobian(f, x)
    assert J.engine == "traced"
    assert not J._linearization.nominal.explanation.reason  # type: ignore[attr-defined]
    for K, point in ((J, x), (J.at(x1), x1)):
        value, push = torch.func.jvp(f, (point,), (d,))
        v = K.codomain.randn(draw)
        (pull,) = torch.func.vjp(f, point)[1](v)
        pairs = zip(K.codomain.leaves(K(d)), K.codomain.leaves(push), strict=True)
        for found, expected in [*pairs, (K.H(v), pull)]:
            assert found.dtype == expected.dtype
            assert torch.dist(found, expected) <= 64 * EPS * (1 + expected.norm()) * (1 + x.numel())
        assert all(map(torch.equal, K.codomain.leaves(K.value), K.codomain.leaves(value)))


def operations(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Counter[str], Counter[str]]:
    """Return how often J and ``J.H`` call each operation, without views."""
    programs = al.jacobian(f, x)._linearization.nominal.programs
    counts = [Counter(op_name(n.target) for n in programs[k][0].graph.body.nodes if n.op == "call_function")
              for k in ("adjoint", "linear")]  # fmt: skip
    return counts[0], counts[1]


def test_one_factor_for_each_sum_and_each_unknown() -> None:
    forth, back = operations(signal_of_two_times, torch.ones(3, 3, 4, dtype=D))
    assert (forth["mul"], forth["addcmul"], forth["neg"]) == (4, 2, 0)  # three small ones, and one for all times
    assert (back["mul"], back["sum"], back["neg"]) == (5, 2, 0)  # two for all times, and three small ones


def signal_of_two_times(m: Tensor) -> Tensor:
    rho, r1, r2 = m
    return rho * torch.exp(-T * r2) * (1 - torch.exp(-1 / r1))


def test_the_modulus_of_a_number_times_its_sign_is_the_number() -> None:
    forth, back = operations(lambda z: torch.fft.fft(z).abs().square(), torch.ones(8, dtype=C))
    assert forth["mul"] == back["mul"] == 1
    assert not (forth + back)["sgn"]


def test_residuals_take_no_more_than_before() -> None:
    x = torch.rand(3, 64, 64, dtype=D)
    J = al.jacobian(lambda m: m[0] * torch.exp(-m[1] * T) * torch.exp(-m[2] / T), x)
    found = J._linearization.nominal
    assert found.residuals is not None
    kept = sum(t.nbytes for t in found.residuals(tuple(source.read() for source in found.state)))
    saved: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t
    ):
        m = x.clone().requires_grad_()
        (m[0] * torch.exp(-m[1] * T) * torch.exp(-m[2] / T)).sum()
    assert kept <= sum(saved.values())
