"""``check_derivative``: right derivatives pass, wrong ones are named, and kinks are not blamed on the backward."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adjointlab as al
from adjointlab.errors import AdjointMismatchError, NotDifferentiableError, SpaceMismatchError
from tests.derivative_study import MISTAKES, false_alarms, function_with, injected, single
from tests.nonlinear_zoo import ZOO, Case

D = torch.float64


def point(*shape: int, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ZOO)
def test_right_derivatives_pass(name: str) -> None:
    is_single = list(ZOO).index(name) % 2  # dtypes take turns
    case = single(ZOO[name]) if is_single else ZOO[name]
    report = al.check_derivative(case.function, case.point())
    assert report.passed, report.details()
    assert not report.diagnosis
    assert report.error <= report.tolerance
    assert report.tolerance <= 16 * report.eps**0.5  # it can tell, with half of the digits
    assert math.isnan(report.slope) or report.slope >= 1.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["in place", "conjugate"])
def test_wrong_backwards_are_found(name: str) -> None:
    found = [*injected([name]), *injected([name], single)]
    assert len(found) >= 2 * 6
    assert [row for row in found if not row[2]] == []


@pytest.mark.slow
def test_right_backwards_raise_no_alarm() -> None:
    assert list(false_alarms(200, list(ZOO)[2::10])) == []


@pytest.mark.parametrize(
    ("name", "kind", "diagnosis"),
    [
        ("sin", "factor 2", "the backward of f is wrong: J is 2 × too large"),
        ("sin", "sign", "the backward of f is wrong: J is of the wrong sign"),
        ("sin", "detached", r"the backward of f is wrong: J is zero \(detached, or never written\)"),
        ("two results", "sign", "the backward of f is wrong: J is of the wrong sign"),
        ("unit", "wrong row", "in entry 2 of f alone"),
        ("in place", "transposed", "the backward of f is wrong: J is transposed"),
        ("autoconvolution", "conjugated", "the backward of f is wrong"),
        ("signal", "detached leaf", "with respect to leaf 1 of x0"),
        ("two results", "missing row", "in leaf 1 of f"),
    ],
)
def test_mistakes_are_named(name: str, kind: str, diagnosis: str) -> None:
    case = ZOO[name]
    wrong = function_with(case, MISTAKES[kind])
    with pytest.raises(AdjointMismatchError, match=diagnosis) as caught:
        al.assert_derivative(wrong, case.point())
    report = caught.value.report  # type: ignore[attr-defined]
    assert str(caught.value).splitlines()[0] == report.diagnosis
    assert report.slope < 1.5


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (torch.abs, torch.zeros(1)),
        (torch.relu, torch.tensor([1.0, 0.0, -1.0], dtype=D)),
        (lambda x: x.norm(), torch.zeros(3, dtype=D)),
        (lambda x: x.amax(0), torch.ones(3)),
        (lambda x: x + 1e-3 * x.abs(), torch.tensor([1.0, 0.0, 2.0], dtype=D)),
        (torch.abs, torch.tensor([0j, 1.0])),
        (nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.ReLU()), torch.zeros(1, 1, 5, 5)),
    ],
)
def test_a_kink_is_no_wrong_backward(f: Any, x: Tensor) -> None:
    report = al.check_derivative(f, x)
    assert not report.passed
    assert report.diagnosis.startswith("f has a kink at x0")
    assert "backward" not in report.diagnosis


def test_a_kink_nearby_is_none() -> None:
    assert al.check_derivative(torch.abs, torch.tensor([1e-6, 1.0], dtype=D)).passed


def test_a_wrong_backward_beside_a_kink_is_named() -> None:
    wrong = function_with(Case(torch.relu, (3,)), MISTAKES["factor 2"])
    report = al.check_derivative(wrong, torch.tensor([1.0, 0.0, -1.0], dtype=D))
    assert report.diagnosis.startswith("the backward of f is wrong")


@pytest.mark.parametrize("f", [lambda x: 3 * x, lambda x: 0 * x, lambda x: x.sum() * torch.ones(2, dtype=D)])
def test_a_linear_function_has_no_slope(f: Any) -> None:
    report = al.check_derivative(f, point(4))
    assert report.passed
    assert math.isnan(report.slope)
    assert json.loads(report.to_json())["slope"] is None


def test_a_large_leaf_hides_no_small_one() -> None:
    class Tiny(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sin()

        @staticmethod
        def backward(ctx: Any, v: Tensor) -> Tensor:
            return v

    def f(x: Tensor, b: Tensor) -> dict[str, Tensor]:
        return {"large": 1e9 * x.cos(), "small": 1e-9 * Tiny.apply(b)}

    report = al.check_derivative(f, (point(3), point(4)))
    assert not report.passed
    assert report.diagnosis.endswith("in leaf 1 of f with respect to leaf 1 of x0")


def test_parameters_batches_and_the_state_of_modules() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    assert al.check_derivative(net, dict(net.named_parameters()), kwargs={"input": point(5, 3)}).passed
    assert al.check_derivative(torch.sin, point(5, 3), batch_dims=1).passed
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_fewer_digits_inside_are_no_mistake() -> None:
    assert al.check_derivative(lambda x: x.half().float() ** 2, point(40, dtype=torch.float32)).passed


def test_the_report_prints_and_has_a_figure() -> None:
    report = al.check_derivative(torch.sin, point(4))
    assert str(report).splitlines()[0] == "derivative test passed"
    assert "slope  2.00 of Taylor's remainder" in str(report)
    html = report._repr_html_()
    assert html.count("<polyline") == report.directions + 2
    assert "slope 2</text>" in html
    assert set(report.to_dict()) >= {"passed", "slope", "error", "tolerance", "diagnosis"}
    assert al.check_derivative(torch.sin, point(4)) == report


@pytest.mark.parametrize(
    ("f", "x", "error", "message"),
    [
        (torch.sqrt, torch.zeros(2), NotDifferentiableError, "NaN or infinite there"),
        (nn.Dropout(), torch.ones(40), NotDifferentiableError, "eval"),
        (torch.sin, torch.tensor([math.inf]), SpaceMismatchError, "expected x0 to be finite"),
        (torch.sin, "x", SpaceMismatchError, "expected a domain"),
    ],
)
def test_what_cannot_be_tested_is_refused(f: Any, x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        al.check_derivative(f, x)
