"""Mistakes around convolutions are named in 1 to 3 dimensions, whatever stride, dilation, groups and channels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import seeded
from torch import Tensor

import adjointlab as al

C = torch.complex128
FORWARD = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
BACKWARD = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
SHAPES = {1: (2, 4, 25), 2: (2, 4, 15, 13), 3: (2, 2, 9, 10, 9)}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"padding": 1},
    "stride": {"padding": 1, "stride": 2},
    "stride 3": {"padding": 2, "stride": 3},
    "dilation": {"padding": 2, "dilation": 2},
    "groups": {"padding": 1, "groups": 2},
    "groups and stride": {"padding": 1, "stride": 2, "groups": 2},
    "stride and dilation": {"padding": 2, "stride": 2, "dilation": 2},
    "channels and stride": {"padding": 1, "stride": 2, "out": 3},
}
Adjoint = Callable[[Tensor], Tensor]


@functools.cache
def make(dims: int, variant: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor, Callable[..., Adjoint]]:
    """Return A, its weight, and what makes the adjoint for a (wrong) weight."""
    options = dict(VARIANTS[variant])
    shape = SHAPES[dims]
    generator = seeded(1)
    out, groups = options.pop("out", shape[1]), options.get("groups", 1)
    weight = torch.randn(out, shape[1] // groups, *[3] * dims, dtype=dtype, generator=generator)

    def adjoint(weight: Tensor, complete: bool = True) -> Adjoint:
        def apply(y: Tensor) -> Tensor:
            weights = weight.conj().resolve_conj()
            result = BACKWARD[dims](y, weights, **options)
            missing = [a - b for a, b in zip(shape[2:], result.shape[2:], strict=True)]
            return BACKWARD[dims](y, weights, output_padding=missing, **options) if complete else result

        return apply

    x = torch.zeros(shape, dtype=dtype)
    return al.linear_operator(lambda x: FORWARD[dims](x, weight, **options), x), weight, adjoint


def mistakes(dims: int, variant: str) -> Iterator[tuple[str, Adjoint]]:
    A, w, adjoint = make(dims, variant)
    right, space = adjoint(w), tuple(range(2, 2 + dims))
    assert al.check_adjoint(A, right).passed
    yield "kernel not flipped", adjoint(w.flip(space))
    if dims > 1:
        yield "kernel not flipped along dim 2", adjoint(w.flip(2))
        yield "kernel transposed along dims 2 and 3", adjoint(w.transpose(2, 3))
    if w.shape[0] == w.shape[1]:
        yield "kernel's channels exchanged (in and out)", adjoint(w.transpose(0, 1))
        yield "kernel not flipped, kernel's channels exchanged", adjoint(w.transpose(0, 1).flip(space))
    yield "wrong sign", lambda y: -right(y)
    yield "2.000 × too large", lambda y: 2 * right(y)
    yield "batch mixed", lambda y: right(y).flip(0)
    yield "shifted by one pixel along dim 2", lambda y: right(y).roll(1, 2)
    yield "entries along dim 1 permuted: 0 ↔ 1", lambda y: right(y)[:, [1, 0, *range(2, A.domain.specs[0].shape[1])]]
    yield "entries of y along dim 1 permuted: 0 ↔ 1", lambda y: right(y[:, [1, 0, *range(2, w.shape[0])]])
    yield "y is ignored along dim 1 at", lambda y: right(torch.cat([y[:, :1], 0 * y[:, 1:]], 1))
    yield f"y is ignored along dim {dims + 1} at", lambda y: right(F.pad(y[..., :-1], (0, 1)))
    inner = [1, -1] * dims
    yield "border of width 1 wrong", lambda y: F.pad(F.pad(right(y), [-abs(k) for k in inner]), [1] * 2 * dims)
    if adjoint(w, False)(A.codomain.zeros()).shape != A.domain.specs[0].shape:
        yield "wrong shape", adjoint(w, False)
        yield "output_padding", adjoint(w, False)


# What has options combined stands for each of them, but in two dimensions.
COMBINED = ("plain", "groups and stride", "stride and dilation", "channels and stride")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dims", "variant"), [(2, name) for name in VARIANTS] + [(n, name) for n in (1, 3) for name in COMBINED]
)
def test_mistakes_of_convolutions_are_named(dims: int, variant: str) -> None:
    A, _, _ = make(dims, variant)
    for said, wrong in mistakes(dims, variant):
        report = al.check_adjoint(A, wrong)
        assert not report.passed, said
        assert said in report.diagnosis, f"{said}: {report.diagnosis}"


@pytest.mark.slow
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("variant", ["stride", "groups"])
def test_complex_mistakes_of_convolutions_are_named(dims: int, variant: str) -> None:
    A, w, adjoint = make(dims, variant, C)
    space = tuple(range(2, 2 + dims))
    for said, wrong in (
        ("conjugate missing", adjoint(w.conj())),
        ("kernel not flipped, conjugate missing", adjoint(w.flip(space).conj())),
        ("only real part", lambda y: adjoint(w)(y).real.to(C)),
    ):
        assert said in al.check_adjoint(A, wrong).diagnosis


def test_another_dilation_is_named() -> None:
    w = torch.randn(1, 1, 3, dtype=torch.float64, generator=seeded(0))
    x = torch.zeros(1, 1, 40, dtype=torch.float64)
    A = al.linear_operator(lambda x: F.conv1d(x, w, padding=1), x)
    wider = al.check_adjoint(A, lambda y: F.conv_transpose1d(y, w, padding=2, dilation=2)).diagnosis
    assert wider == "dilation of 2 where A has 1"


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([1, 0, 2, 3], "entries along dim 1 permuted: 0 ↔ 1"),
        ([1, 0, 3, 2], "entries along dim 1 permuted: 0 ↔ 1; 2 ↔ 3"),
        ([3, 0, 1, 2], "entries along dim 1 permuted: 0 → 1 → 2 → 3 → 0"),
        ([1, 2, 0, 3], "entries along dim 1 permuted: 0 → 2 → 1 → 0"),
    ],
)
def test_permuted_channels_are_named(order: list[int], said: str) -> None:
    A, w, adjoint = make(2, "plain")
    assert al.check_adjoint(A, lambda y: adjoint(w)(y)[:, order]).diagnosis == said


def test_two_entries_are_permuted_and_three_are_shifted() -> None:
    for size, said in ((2, "entries along dim 2 permuted: 0 ↔ 1"), (3, "shifted by one pixel along dim 2")):
        A = al.linear_operator(lambda x: 2 * x, torch.zeros(1, 2, size, 5, dtype=torch.float64))
        assert al.check_adjoint(A, lambda y: 2 * y.roll(1, 2)).diagnosis == said


def test_exchanged_leaves_are_named() -> None:
    A = al.linear_operator(lambda x, z: x + 3 * z, ((2, 7), (2, 7)))
    assert al.check_adjoint(A, lambda y: (3 * y, y)).diagnosis
    B = al.linear_operator(lambda x, z: (x.cumsum(-1), 3 * z), ((2, 7), (2, 7)))
    assert "leaves 0 ↔ 1 exchanged" in al.check_adjoint(B, lambda y: B.H(y)[::-1]).diagnosis


def test_figure_shows_an_error_that_few_impulses_meet() -> None:
    A, w, adjoint = make(2, "plain")

    def wrong(y: Tensor) -> Tensor:
        result = adjoint(w)(y).clone()
        result[1, 2, 11, 10] = 0
        return result

    report = al.check_adjoint(A, wrong)
    assert "along dim 2 only at 11, along dim 3 only at 10: zero there" in report.diagnosis
    assert max(map(max, report.figure[-1][1])) > 0
    assert "impulse at (1," in report.figure[-1][0]
