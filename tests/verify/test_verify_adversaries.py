"""Adjoints that are written to slip through the test, and correct ones that are written oddly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import seeded
from torch import Tensor, nn

import adjointlab as al

WEIGHT = torch.randn(3, 2, 3, 3, generator=seeded(0))
SHAPE = (2, 2, 12, 12)
A = al.linear_operator(lambda x: F.conv2d(x, WEIGHT, padding=1), SHAPE)


def back(y: Tensor, weight: Tensor = WEIGHT) -> Tensor:
    return F.conv_transpose2d(y, weight, padding=1)


# ----------------------------------------------------------------------------------------------------------- precision

COARSE = {
    "bfloat16 inside": (lambda y: back(y.bfloat16(), WEIGHT.bfloat16()).float(), "bfloat16"),
    "float16 inside": (lambda y: back(y.half(), WEIGHT.half()).float(), "float16"),
    "bfloat16 result": (lambda y: back(y).bfloat16().float(), "bfloat16"),
    "float16 result": (lambda y: back(y).half().float(), "float16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COARSE)
@pytest.mark.parametrize("seed", range(3))
def test_lower_precision_inside_is_no_excuse(name: str, seed: int) -> None:
    coarse, dtype = COARSE[name]
    report = al.check_adjoint(A, coarse, seed=seed)
    assert not report.passed
    assert "computed in lower precision" in report.diagnosis
    assert dtype in report.diagnosis
    assert any("more than it need be" in note for note in report.notes)
    plain = al.check_adjoint(lambda x: F.conv2d(x, WEIGHT, padding=1), coarse, domain=SHAPE, seed=seed)
    assert not plain.passed


def test_single_precision_inside_double_is_named() -> None:
    B = al.linear_operator(lambda x: F.conv2d(x, WEIGHT.double(), padding=1), torch.zeros(SHAPE, dtype=torch.float64))
    assert "computed in lower precision (float32)" in al.check_adjoint(B, lambda y: back(y.float()).double()).diagnosis


def test_rounded_weights_are_named() -> None:
    report = al.check_adjoint(A, lambda y: back(y, WEIGHT.bfloat16().float()))
    assert "nearly right" in report.diagnosis
    assert "bfloat16" in report.diagnosis


def test_without_a_reference_precision_is_judged_by_size() -> None:
    opaque = lambda x: torch.as_tensor(x.cpu().numpy()[::-1].copy())  # noqa: E731  # too large to be made dense
    assert al.check_adjoint(opaque, lambda y: y.flip(0), domain=(3000,)).passed
    assert not al.check_adjoint(opaque, lambda y: y.flip(0).bfloat16().float(), domain=(3000,)).passed


@pytest.mark.slow
def test_an_adjoint_may_be_as_coarse_as_its_operator() -> None:
    def forward(x: Tensor) -> Tensor:
        return F.conv2d(x.bfloat16(), WEIGHT.bfloat16(), padding=1).float()

    B = al.linear_operator(forward, SHAPE, check=False, engine="eager")
    for adjoint in (None, COARSE["bfloat16 inside"][0], lambda y: back(y, WEIGHT.bfloat16().float())):
        for seed in range(5):
            assert al.check_adjoint(B, adjoint, seed=seed).passed


@pytest.mark.slow
def test_an_adjoint_may_be_summed_in_another_order() -> None:
    box = al.linear_operator(lambda x: F.conv1d(x, torch.ones(1, 1, 31), padding=15), (1, 1, 4096))

    def by_sums(y: Tensor) -> Tensor:
        total = F.pad(y, (16, 15)).cumsum(-1)
        return total[..., 31:] - total[..., :-31]

    for seed in range(10):
        assert al.check_adjoint(box, by_sums, seed=seed).passed
        assert not al.check_adjoint(box, lambda y: by_sums(y.bfloat16()).float(), seed=seed).passed


# ---------------------------------------------------------------------------------------------- odd, and nevertheless


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_entries_that_happen_to_be_rounded_by_nothing_raise_no_alarm(dtype: torch.dtype) -> None:
    def noisy(x: Tensor) -> Tensor:  # its own adjoint; exact for impulses, and for some single entries
        return (1e4 * x + x) - 1e4 * x

    for seed in range(8):
        assert al.check_adjoint(noisy, noisy, domain=torch.zeros(200, dtype=dtype), seed=seed).passed


@pytest.mark.parametrize("seed", range(5))
def test_an_offset_buries_small_elements(seed: int) -> None:
    A = al.affine_operator(lambda x: x + 3, (3,))  # at 2^-20 x, x + 3 − 3 has one digit
    assert al.check_adjoint(A, seed=seed).passed
    assert not al.check_adjoint(lambda x: F.hardshrink(x, 1e-3), lambda y: y, domain=(2000,), seed=seed).passed


def test_adjoint_that_writes_to_one_buffer_passes() -> None:
    buffer = torch.empty(SHAPE)
    assert al.check_adjoint(A, lambda y: buffer.copy_(back(y))).passed


def test_adjoint_that_differentiates_inside_passes() -> None:
    def adjoint(y: Tensor) -> Tensor:
        x = torch.zeros(SHAPE, requires_grad=True)
        return torch.autograd.grad(F.conv2d(x, WEIGHT, padding=1), x, y)[0]

    assert al.check_adjoint(A, adjoint).passed
    assert not al.check_adjoint(A, lambda y: 2 * adjoint(y)).passed


def test_adjoint_that_returns_its_own_argument_passes() -> None:
    same = al.identity(torch.zeros(4, 5))
    assert al.check_adjoint(same, lambda y: y).passed
    assert al.check_adjoint(al.linear_operator(lambda x: x.mT, (4, 5)), lambda y: y.mT).passed


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e18])
def test_large_and_small_operators_pass(scale: float) -> None:
    scaled = al.linear_operator(lambda x: scale * x, (7,))
    assert al.check_adjoint(scaled).passed
    assert al.check_adjoint(scaled, lambda y: scale * y).passed
    assert not al.check_adjoint(scaled, lambda y: scale * y.flip(0)).passed


# ------------------------------------------------------------------------------------------------------- for some input

SLIPPERY: dict[str, Any] = {
    "saturates": lambda y: back(y).clamp(-1e3, 1e3),
    "drops small values": lambda y: F.hardshrink(back(y), 1e-5),
    "one pixel": lambda y: back(y).index_fill(3, torch.tensor(11), 0.0),
    "drops what is exactly one": lambda y: back(torch.where(y == 1, 0, y)),
}


@pytest.mark.parametrize("name", SLIPPERY)
def test_adjoints_wrong_for_some_input_fail(name: str) -> None:
    report = al.check_adjoint(A, SLIPPERY[name])
    assert not report.passed
    assert report.diagnosis


def test_saturation_is_named() -> None:
    assert "is not linear: its image of 1.049e+06 y" in al.check_adjoint(A, SLIPPERY["saturates"]).diagnosis


def test_imaginary_parts_count() -> None:
    B = al.linear_operator(lambda x: 1j * x, torch.zeros(3, 5, dtype=torch.complex64))

    def wrong(y: Tensor) -> Tensor:
        result = -1j * y
        result[1, 2] = torch.complex(result[1, 2].real, 2 * result[1, 2].imag)
        return result

    assert not al.check_adjoint(B, wrong).passed


def test_adjoint_for_one_batch_size_only_fails() -> None:
    layer = nn.Conv1d(1, 1, 3, bias=False)
    B = al.linear_operator(layer, (2, 1, 6), batch_dims=1)
    right = lambda y: F.conv_transpose1d(y, layer.weight)  # noqa: E731
    assert al.check_adjoint(B, right).passed
    ragged = al.check_adjoint(B, lambda y: torch.cat([right(y[:2]), 0 * right(y[2:])]))
    assert "batch entry 2 only: Aᴴ is zero" in ragged.diagnosis
    assert not al.check_adjoint(B, lambda y: right(y[:2])).passed


def test_operator_that_takes_one_batch_size_is_noted() -> None:
    d = torch.rand(2, 5)
    B = al.LinearOperator(
        lambda x: x.view(2, 5) * d, lambda y: y.view(2, 5) * d, al.Space.of((2, 5), batch_dims=1),
        al.Space.of((2, 5), batch_dims=1),
    )  # fmt: skip
    report = al.check_adjoint(B)
    assert report.passed
    assert any("only one batch size compared" in note for note in report.notes)


def test_coarse_dtypes_and_pytrees_fail_when_wrong() -> None:
    B = al.linear_operator(lambda x: {"a": 2 * x[0], "b": x[1] - x[0]}, [torch.zeros(6, 6).bfloat16()] * 2)
    assert al.check_adjoint(B).passed
    assert not al.check_adjoint(B, lambda y: B.H(y)[::-1]).passed
    assert not al.check_adjoint(B, lambda y: [B.H(y)[0], 1.1 * B.H(y)[1]]).passed
    for wrong in (tuple, lambda v: [v[0]], lambda v: {"a": v[0], "b": v[1]}, lambda v: [v[0].float(), v[1]]):
        assert "wrong" in al.check_adjoint(B, lambda y, wrong=wrong: wrong(B.H(y))).diagnosis
