"""The dot-product test: it passes for every adjoint and fails for every wrong one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from laws import no_side_effects
from torch import Tensor, nn

import adjointlab as al


def real_conv(**options) -> tuple[nn.Conv2d, al.LinearOperator]:
    layer = nn.Conv2d(1, 1, 3, bias=False, dtype=torch.float64, **options)
    return layer, al.linear_operator(layer, (1, 1, 8, 7))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_transposed_convolution_is_not_the_adjoint_of_a_padding_mode(mode: str) -> None:
    layer, A = real_conv(padding=1, padding_mode=mode)
    assert not al.check_adjoint(A, lambda y: F.conv_transpose2d(y, layer.weight, padding=1)).passed


def test_transposed_convolution_is_the_adjoint_of_zero_padding() -> None:
    layer, A = real_conv(padding=1)
    assert al.check_adjoint(A, lambda y: F.conv_transpose2d(y, layer.weight, padding=1)).passed


def test_transposed_convolution_module_as_adjoint() -> None:
    layer, A = real_conv(padding=1)
    transposed = nn.ConvTranspose2d(1, 1, 3, padding=1, bias=False, dtype=torch.float64)
    transposed.weight = layer.weight
    assert al.check_adjoint(A, transposed).passed


def test_operator_as_adjoint() -> None:
    _, A = real_conv(padding=1)
    assert al.check_adjoint(A, A.H).passed
    assert not al.check_adjoint(A, (2 * A).H).passed


def test_wrong_shape_fails_with_a_diagnosis() -> None:
    layer, A = real_conv(padding=1, stride=2)  # 8 × 7 ↦ 4 × 4 ↦ 7 × 7, for want of an output padding
    report = al.check_adjoint(A, lambda y: F.conv_transpose2d(y, layer.weight, padding=1, stride=2))
    assert not report.passed
    assert "shape" in report.diagnosis
    assert "7, 7" in report.diagnosis


def test_wrong_dtype_fails_with_a_diagnosis() -> None:
    _, A = real_conv()
    report = al.check_adjoint(A, lambda y: A.H(y).float())
    assert not report.passed
    assert "float32" in report.diagnosis


def test_missing_conjugate_is_diagnosed() -> None:
    w = torch.randn(4, 3, dtype=torch.complex128)
    A = al.linear_operator(lambda x: x @ w, torch.zeros(2, 4, dtype=torch.complex128))
    report = al.check_adjoint(A, lambda y: y @ w.mT)
    assert not report.passed
    assert "conj" in report.diagnosis


def test_wrong_factor_is_diagnosed() -> None:
    A = al.linear_operator(torch.fft.fft, torch.zeros(8, dtype=torch.complex128))
    report = al.check_adjoint(A, torch.fft.ifft)
    assert not report.passed
    assert "8" in report.diagnosis or "0.125" in report.diagnosis or "factor" in report.diagnosis


def test_wrong_sign_is_diagnosed() -> None:
    A = al.linear_operator(lambda x: x.diff(), torch.zeros(8, dtype=torch.float64))
    report = al.check_adjoint(A, lambda y: -A.H(y))
    assert "sign" in report.diagnosis or "-1" in report.diagnosis


def test_one_wrong_row_of_4096_is_seen() -> None:
    n = 4096
    weight = torch.rand(n, dtype=torch.float64) + 0.5

    def wrong(y: Tensor) -> Tensor:
        out = weight * y
        out[1234] *= 1 + 1e-6
        return out

    A = al.linear_operator(lambda x: weight * x, torch.zeros(n, dtype=torch.float64))
    assert al.check_adjoint(A).passed
    assert not al.check_adjoint(A, wrong).passed


def test_one_wrong_row_of_4096_is_seen_in_single_precision() -> None:
    def wrong(y: Tensor) -> Tensor:
        out = y.flip(0)
        out[1234] = 0
        return out

    A = al.linear_operator(lambda x: x.flip(0), torch.zeros(4096))
    assert not al.check_adjoint(A, wrong).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_low_precision_adjoints_pass(dtype: torch.dtype) -> None:
    A = al.linear_operator(nn.Linear(60, 50, bias=False, dtype=dtype), (3, 60))
    assert al.check_adjoint(A).passed


def test_adjoint_with_nan_fails() -> None:
    _, A = real_conv()
    assert not al.check_adjoint(A, lambda y: A.H(y) * torch.nan).passed


def test_adjoint_that_raises_is_reported() -> None:
    def broken(y: Tensor) -> Tensor:
        raise ZeroDivisionError("the user's own error")

    _, A = real_conv()
    report = al.check_adjoint(A, broken)
    assert not report.passed
    assert "ZeroDivisionError: the user's own error" in report.diagnosis


def test_wrong_forward_operator_is_seen() -> None:
    A = al.linear_operator(
        lambda x: x + 2 * x.detach(), torch.zeros(5, dtype=torch.float64), check=False, engine="eager"
    )
    assert not al.check_adjoint(A).passed


def test_real_linear_operators_are_compared_by_real_parts() -> None:
    A = al.linear_operator(lambda x: x.real, torch.zeros(6, dtype=torch.complex128))
    assert al.check_adjoint(A, lambda y: y.to(torch.complex128)).passed
    assert not al.check_adjoint(A, lambda y: 1j * y).passed


def test_assert_adjoint_is_silent_when_right() -> None:
    _, A = real_conv()
    al.assert_adjoint(A)
    al.assert_adjoint(A, A.H)


def test_assert_adjoint_raises_the_report() -> None:
    _, A = real_conv()
    with pytest.raises(al.AdjointMismatchError, match="error") as caught:
        al.assert_adjoint(A, lambda y: -A.H(y))
    assert str(al.check_adjoint(A, lambda y: -A.H(y)).diagnosis) in str(caught.value)


def test_a_report_is_two_lines_and_details_are_for_those_who_ask() -> None:
    _, A = real_conv()
    for report in (al.check_adjoint(A), al.check_adjoint(A, lambda y: -A.H(y))):
        first, second = str(report).splitlines()
        assert first == ("adjoint test passed" if report.passed else f"adjoint test FAILED: {report.diagnosis}")
        assert f"{report.pairs} pairs" in second
        for term in ("eps", "worst pair", "missed row"):
            assert term not in str(report)
            assert term in report.details()
        assert "<details>" in report._repr_html_()


def test_the_first_line_of_the_error_is_the_diagnosis() -> None:
    _, A = real_conv()
    with pytest.raises(al.AdjointMismatchError, match="sign") as caught:
        al.assert_adjoint(A, lambda y: -A.H(y))
    first, *rest = str(caught.value).splitlines()
    assert first == al.check_adjoint(A, lambda y: -A.H(y)).diagnosis
    assert rest[0] == "adjoint test FAILED"
    assert all(line.strip() for line in rest)


def test_checks_are_deterministic() -> None:
    _, A = real_conv()
    assert al.check_adjoint(A).error == al.check_adjoint(A).error


def test_report_is_frozen() -> None:
    _, A = real_conv()
    with pytest.raises(dataclasses.FrozenInstanceError, match="passed"):
        al.check_adjoint(A).passed = True


def test_report_prints_well() -> None:
    _, A = real_conv()
    good, bad = al.check_adjoint(A), al.check_adjoint(A, lambda y: 2 * A.H(y))
    assert "pass" in str(good).lower()
    assert "fail" in str(bad).lower()
    assert bad.diagnosis in str(bad)


def test_report_shows_in_notebooks() -> None:
    _, A = real_conv()
    html = al.check_adjoint(A, lambda y: 2 * A.H(y))._repr_html_()
    assert html.lstrip().startswith("<")
    assert "fail" in html.lower()


def test_html_is_escaped() -> None:
    A = al.linear_operator(lambda x: {"<script>": x}, (3,))
    assert "<script>" not in al.check_adjoint(A, lambda y: 2 * A.H(y))._repr_html_()


def test_wrong_structure_fails() -> None:
    A = al.linear_operator(lambda x, z: x + z, ((3,), (3,)))
    report = al.check_adjoint(A, lambda y: y)
    assert not report.passed
    assert report.diagnosis


def test_batched_operators_pass() -> None:
    A = al.linear_operator(nn.Conv1d(1, 1, 3, bias=False), (2, 1, 6), batch_dims=1)
    assert al.check_adjoint(A).passed


def test_algebra_passes() -> None:
    _, A = real_conv()
    for B in (A.gram, A.T, 2 * A, al.vstack([A, A]), al.block_diag([A, A.H]), al.hstack([A, -A]), A.H @ A - A.gram):
        assert al.check_adjoint(B).passed


def test_arguments_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises((TypeError, al.SpaceMismatchError), match=r"LinearOperator|operator"):
        al.check_adjoint(torch.relu)


def test_forward_may_write_to_its_argument() -> None:
    x = torch.ones(5, dtype=torch.float64)
    with no_side_effects(torch.neg, x):
        assert al.check_adjoint(lambda x: x.mul_(2), lambda y: 2 * y, domain=x).passed


def test_the_report_on_an_affine_operator_says_that_its_linear_part_was_tested() -> None:
    A = al.affine_operator(nn.Conv1d(1, 1, 3), (1, 1, 8))
    assert "its linear part, without the offset, was tested" in al.check_adjoint(A).details()
    assert "affine" not in al.check_adjoint(A.linear).details()
