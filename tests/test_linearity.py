"""The report on linearity: proved, supported or refuted, and why."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from laws import seeded
from operator_zoo import BY_NAME, ZOO
from torch import nn

import adjointlab as al
from adjointlab import linearity
from adjointlab.transpose.kernels import registry as kernels
from adjointlab.transpose.kernels import select as choice


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


@pytest.mark.cpu
def test_rounding_of_the_quick_sample_is_measured_before_the_laws_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose", lambda site, **_: kernels.transformed(site))  # it rounds unlike any other
    module = nn.Conv2d(1, 1, 5, padding=2, bias=False)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    right, known = linearity.dot_gap, []

    def unlucky(*arguments: object, noise: tuple[float, float] = (0.0, 0.0), **options: object) -> tuple[float, float]:
        gap, allowed = right(*arguments, noise=noise, **options)
        known.append(noise)
        return (gap, allowed) if any(noise) else (1.1 * allowed, allowed)

    monkeypatch.setattr(linearity, "dot_gap", unlucky)
    assert al.check_linearity(module, (1, 1, 32, 32)).verdict == "proved"
    assert len(known) == 2
    assert known[1][1] > 0
    assert len(calls) < 8  # the laws take ten more


@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (1.001, False)])
def test_measured_rounding_hides_no_factor(factor: float, agrees: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Conv2d(1, 1, 5, padding=2, bias=False)
    module.weight.data.normal_(generator=seeded(0))
    source = al.linear_operator(module, (1, 1, 32, 32)).source
    sample, adjoint = source.verify(), source.adjoint
    wrong = dataclasses.replace(sample, at_v=tuple(factor * t for t in sample.at_v))
    # What is derived agrees with the eager one in what both have wrong.
    monkeypatch.setattr(type(source), "adjoint", property(lambda _: lambda v: factor * adjoint(v)))
    assert linearity._Numbers(source, 0).sample_agrees(wrong) == agrees
