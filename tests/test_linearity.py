"""The report on linearity: proved, supported or refuted, and why."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from operator_zoo import BY_NAME, ZOO
from torch import nn

import adjointlab as al


@pytest.mark.parametrize("name", ["conv2d", "fft2", "irfft-6", "real-part", "conj", "rfft-7", "multi-coil-mri"])
def test_complex_linearity(name: str) -> None:
    entry = BY_NAME[name]
    report = al.check_linearity(*entry.build(entry.dtypes[-1]))
    assert report.is_complex_linear == entry.complex_linear


def test_at_least_95_percent_are_proved() -> None:
    linear = [entry for entry in ZOO if not entry.affine]
    assert sum(entry.proved for entry in linear) >= 0.95 * len(linear)


def test_single_precision_is_enough_for_a_proof() -> None:
    assert al.check_linearity(nn.Conv2d(1, 1, 3, bias=False), (1, 1, 5, 5)).verdict == "proved"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_low_precision_is_not_refuted(dtype: torch.dtype) -> None:
    assert al.check_linearity(nn.Linear(40, 30, bias=False, dtype=dtype), (2, 40)).verdict != "refuted"


def test_affine_map_is_reported_as_such() -> None:
    report = al.check_linearity(nn.Linear(3, 2), (3,))
    assert report.is_affine
    assert any("f(0)" in line or "offset" in line for line in report.evidence)


def test_evidence_is_text() -> None:
    report = al.check_linearity(nn.Linear(3, 2, bias=False), (3,))
    assert report.evidence
    assert all(isinstance(line, str) for line in report.evidence)
    assert report.counterexample is None
    assert report.reads_input == ()


def test_report_is_frozen() -> None:
    report = al.check_linearity(torch.flipud, (3, 2))
    with pytest.raises(dataclasses.FrozenInstanceError, match="verdict"):
        report.verdict = "proved"


def test_report_prints_its_verdict() -> None:
    assert "proved" in str(al.check_linearity(torch.flipud, (3, 2)))
    assert "refuted" in str(al.check_linearity(torch.relu, (3, 2)))


@pytest.mark.parametrize("function", [torch.relu, torch.square], ids=lambda f: f.__name__)
def test_reports_do_not_raise(function) -> None:
    assert al.check_linearity(function, (3,)).verdict == "refuted"


def test_checks_are_deterministic() -> None:
    first, second = (str(al.check_linearity(nn.ReLU(), (4,))) for _ in range(2))
    assert first == second


def test_number_from_the_input_prevents_a_proof() -> None:
    # Linear as far as numbers can tell; but a program that branches on its input is not the program that was traced.
    def function(x: torch.Tensor) -> torch.Tensor:
        return 2 * x if x.sum() > 0 else x + x

    assert al.check_linearity(function, torch.zeros(5, dtype=torch.float64)).verdict == "supported"


def test_value_of_the_input_in_a_comparison_prevents_a_proof() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, 2 * x, x + x)

    assert al.check_linearity(function, torch.zeros(5, dtype=torch.float64)).verdict == "supported"


def test_hidden_custom_function_is_not_proved_by_its_backward() -> None:
    class Lying(torch.autograd.Function):
        """abs, with the backward of the identity."""

        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            return x.abs()

        @staticmethod
        def setup_context(ctx, inputs, output) -> None:
            pass

        @staticmethod
        def backward(ctx, g: torch.Tensor) -> torch.Tensor:
            return g

    assert al.check_linearity(Lying.apply, (5,)).verdict == "refuted"


def test_keyword_arguments() -> None:
    report = al.check_linearity(lambda x, *, power: x**power, (3,), kwargs={"power": 2})
    assert report.verdict == "refuted"


def test_nan_weights_are_refuted() -> None:
    weight = torch.full((3,), torch.nan)
    assert al.check_linearity(lambda x: weight * x, (3,)).verdict == "refuted"


def test_a_proof_calls_the_function_once() -> None:
    module, calls = nn.Conv2d(1, 1, 5, padding=2, bias=False), []

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return module(x)

    counted.__module__ = "elsewhere"
    assert al.check_linearity(module, (1, 1, 32, 32)).verdict == "proved"
    report = al.check_linearity(counted, (1, 1, 32, 32))
    assert report.verdict == "supported"  # it keeps state in Python, whatever that is for
