"""What is said about a wrong adjoint: the usual mistakes are recognised, alone and in one part of a whole."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import seeded
from torch import Tensor, nn

import adjointlab as al

C = torch.complex128


def conv(shape: tuple[int, ...] = (2, 1, 9, 8), **options: Any) -> tuple[nn.Conv2d, al.LinearOperator]:
    torch.manual_seed(3)
    layer = nn.Conv2d(1, 1, 3, bias=False, dtype=torch.float64, **options)
    return layer, al.linear_operator(layer, shape)


def padded(mode: str = "zeros") -> tuple[nn.Conv2d, al.LinearOperator]:
    return conv(padding=1, padding_mode=mode)


def put(t: Tensor, index: Any, value: Any) -> Tensor:
    t = t.clone()
    t[index] = value if not callable(value) else value(t[index])
    return t


def dense() -> tuple[Tensor, al.LinearOperator]:
    w = torch.randn(6, 5, dtype=C, generator=seeded(1))
    return w, al.linear_operator(lambda x: x @ w, torch.zeros(3, 6, dtype=C))


def reversed_kernel(y: Tensor) -> Tensor:
    return F.conv2d(y, layer.weight, padding=1)


MISTAKES: dict[str, tuple[al.LinearOperator, Callable[[Any], Any], str]] = {}


def mistake(name: str, A: al.LinearOperator, adjoint: Callable[[Any], Any], said: str) -> None:
    MISTAKES[name] = (A, adjoint, said)


layer, A = padded()
circular = padded("circular")
w, M = dense()
mistake("factor", A, lambda y: 2 * A.H(y), "Aᴴ is 2.000 × too large")
mistake("small factor", A, lambda y: A.H(y) / 3, "Aᴴ is 3.000 × too small")
mistake("slight factor", A, lambda y: A.H(y) * (1 + 1e-9), "Aᴴ is too large by 1.0e-09 of its size")
mistake("sign", A, lambda y: -A.H(y), "wrong sign: B = −Aᴴ")
mistake("sign and factor", A, lambda y: -2 * A.H(y), "wrong sign: B = −Aᴴ, and it is 2.000 × too large")
mistake("zero", A, lambda y: 0 * A.H(y), "Aᴴ is zero")
mistake("kernel", A, reversed_kernel, "kernel not flipped")
mistake("kernel, circular", circular[1], circular[0], "kernel not flipped")
mistake("shift", A, lambda y: A.H(y).roll(1, 2), "shifted by one pixel along dim 2")
mistake("shift back", A, lambda y: A.H(y).roll(-1, 3), "shifted by one pixel along dim 3")
mistake("cropped shift", A, lambda y: F.pad(A.H(y), (2, -2)), "shifted by 2 pixels along dim 3")
mistake("batch", A, lambda y: A.H(y).flip(0), "batch mixed")
mistake("batch mean", A, lambda y: A.H(y).mean(0, keepdim=True).expand(2, -1, -1, -1), "batch mixed")
mistake("one batch entry", A, lambda y: put(A.H(y), 1, lambda t: -t), "batch entry 1 only: wrong sign")
mistake(
    "border",
    A,
    lambda y: F.pad(A.H(y)[..., 2:-2, 2:-2], (2, 2, 2, 2)),
    "border of width 2 wrong: zero there (never written)",
)
mistake(
    "padding mode",
    circular[1],
    lambda y: F.conv_transpose2d(y, circular[0].weight, padding=1),
    "border of width 1 wrong (padding mode: the adjoint for zero padding)",
)
line = nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect", bias=False, dtype=torch.float64)
mistake(
    "padding mode of a signal",
    al.linear_operator(line, (3, 1, 16)),
    lambda y: F.conv_transpose1d(y, line.weight, padding=1),
    "border of width 2 wrong along dim 2 (padding mode: the adjoint for zero padding)",
)
stack = al.linear_operator(lambda x: F.conv2d(x[:, None], layer.weight, padding=1)[:, 0], (3, 12, 12))
mistake("shift in a stack", stack, lambda y: stack.H(y).roll(1, 1), "shifted by one pixel along dim 1")
mistake("kernel in a stack", stack, stack, "kernel not flipped")
mistake("conjugate", M, lambda y: y @ w.mT, "conjugate missing")
mistake("conjugate of the result", M, lambda y: M.H(y).conj(), "conjugate missing")
mistake("real part", M, lambda y: M.H(y).real.to(C), "only real part")
mistake("imaginary part", M, lambda y: 1j * M.H(y).imag, "only imaginary part")
mistake("phase", M, lambda y: 1j * M.H(y), "off by the complex factor 0.000+1.000j")
mistake("offset", A, lambda y: A.H(y) + 1, "is not linear: it maps 0 to something")
mistake("absolute value", A, lambda y: A.H(y).abs(), "is not linear: its image of -1 y")
mistake("weights", A, lambda y: A.H(y) * torch.linspace(1, 2, 8).double(), "each entry is off by its own factor")
mistake("None", A, lambda y: None, "returned None")
mistake(
    "shape", A, lambda y: A.H(y)[..., :-1], "wrong shape: (2, 1, 9, 7) where (2, 1, 9, 8) is expected: output_padding"
)
mistake("larger", A, lambda y: F.pad(A.H(y), (1, 1)), "not cropped along dim 3")
mistake("transposed shape", A, lambda y: A.H(y).mT, "dimensions transposed")
mistake("dtype", A, lambda y: A.H(y).float(), "wrong dtype: float32 where float64 is expected")
mistake("real dtype", M, lambda y: M.H(y).real, "only real part")
mistake("NaN", A, lambda y: put(A.H(y), (0, 0, 0, 0), math.nan), "NaN or infinity")
mistake("one entry", A, lambda y: put(A.H(y), (1, 0, 4, 3), 0.0), "along dim 2 only at 4")

square = al.linear_operator(nn.AvgPool2d(2), torch.zeros(1, 1, 8, 8, dtype=torch.float64))
mistake("transposed", square, lambda y: square.H(y).mT, "dims 2 and 3 transposed")
fft = al.linear_operator(torch.fft.fft2, torch.zeros(1, 1, 8, 8, dtype=C))
mistake("normalisation", fft, torch.fft.ifft2, "Aᴴ is 64.000 × too small")
mistake("fftshift", fft, lambda y: fft.H(torch.fft.fftshift(y, dim=(-2, -1))), "(fftshift or ifftshift missing)")
pair = al.linear_operator(lambda x, z: 2 * x + z, (torch.zeros(5, dtype=C), torch.zeros(5, dtype=C)))
mistake("one leaf", pair, lambda y: (pair.H(y)[0], -pair.H(y)[1]), "leaf 1 of 2: wrong sign")
mistake("structure", pair, lambda y: pair.H(y)[0], "wrong structure")


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name: str) -> None:
    operator, adjoint, said = MISTAKES[name]
    report = al.check_adjoint(operator, adjoint)
    assert not report.passed
    assert said in report.diagnosis, report.diagnosis
    assert said in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["factor", "sign", "kernel", "border", "conjugate"])
def test_plain_callables_get_the_same_diagnosis(name: str) -> None:
    operator, adjoint, said = MISTAKES[name]
    report = al.check_adjoint(operator.__call__, adjoint, domain=operator.domain)
    assert said in report.diagnosis


def test_pairs_of_callables() -> None:
    assert al.check_adjoint(torch.fft.fft, lambda y: 8 * torch.fft.ifft(y), domain=torch.zeros(8, dtype=C)).passed
    assert al.check_adjoint(lambda x, z: x + z, lambda y: (y, y), domain=((3,), (3,))).passed
    assert al.check_adjoint(padded()[0], domain=(1, 1, 8, 8)).passed  # its own derived adjoint
    given = al.check_adjoint(lambda x: x[:2], lambda y: F.pad(y, (0, 1)), domain=(3,), codomain=(2,))
    assert given.passed


def test_without_a_reference_what_can_be_repaired_is_named() -> None:
    class Opaque:  # autograd sees nothing of it, and it is too large to be made dense
        def __call__(self, x: Tensor) -> Tensor:
            return torch.as_tensor(x.cpu().numpy() * (1 + 2j))

    x = torch.zeros(1000, dtype=C)
    assert al.check_adjoint(Opaque(), lambda y: (1 - 2j) * y, domain=x).passed
    assert "3.000 × too large" in al.check_adjoint(Opaque(), lambda y: (3 - 6j) * y, domain=x).diagnosis
    assert "conjugate missing" in al.check_adjoint(Opaque(), lambda y: (2 + 4j) * y, domain=x).diagnosis
    assert "zero" in al.check_adjoint(Opaque(), torch.zeros_like, domain=x).diagnosis
    said = al.check_adjoint(Opaque(), lambda y: y.roll(1), domain=x).diagnosis
    assert "unrecognised" in said or "shifted by" in said  # where torch can read NumPy code, it has a reference


def test_small_operators_have_the_dense_matrix_as_reference() -> None:
    opaque = lambda x: torch.as_tensor(x.cpu().numpy()[::-1].copy())  # noqa: E731
    assert "shifted by one pixel" in al.check_adjoint(opaque, lambda y: y.flip(0).roll(1), domain=(9,)).diagnosis


def test_hidden_inputs_are_seen_in_derived_adjoints() -> None:
    operator = al.linear_operator(lambda x: x + 2 * x.detach(), (5,), check=False, engine="eager")
    assert al.check_adjoint(operator).diagnosis == "Aᴴ is 3.000 × too small"


def test_functions_that_are_not_linear_are_said_to_be() -> None:
    assert "A is not linear" in al.check_adjoint(lambda x: x + 1, lambda y: y, domain=(5,)).diagnosis
    assert "A is not linear" in al.check_adjoint(torch.relu, lambda y: y, domain=(50,)).diagnosis
    generator = seeded(0)
    noisy = al.check_adjoint(lambda x: x, lambda y: y * torch.rand(5, generator=generator), domain=(5,))
    assert "not deterministic" in noisy.diagnosis


def test_adjoint_that_raises_is_reported() -> None:
    def broken(y: Tensor) -> Tensor:
        raise ZeroDivisionError("the user's own error")

    report = al.check_adjoint(A, broken)
    assert not report.passed
    assert report.diagnosis == "the adjoint raised ZeroDivisionError: the user's own error"
    assert json.loads(report.to_json())["error"] is None


def test_vacuous_checks_say_so() -> None:
    report = al.check_adjoint(lambda x: 0 * x, lambda y: 0 * y, domain=(5,))
    assert report.vacuous
    assert "vacuous" in str(report)
    assert not al.check_adjoint(A).vacuous
    assert not al.check_adjoint(lambda x: 0 * x, lambda y: y, domain=(5,)).passed


def test_cancellation_inside_is_no_error() -> None:
    def forward(x: Tensor) -> Tensor:
        return 1e4 * x - (1e4 * x).mean()

    for function in (forward, lambda x: (1e4 * x) - (1e4 * x - x)):
        operator = al.linear_operator(function, (4096,), check=False)
        report = al.check_adjoint(operator, trials=20)
        assert report.passed, report
        assert not al.check_adjoint(operator, lambda y, operator=operator: 1.5 * operator.H(y)).passed


def test_complex_phase_is_seen() -> None:
    assert not al.check_adjoint(M, lambda y: put(M.H(y), (0, 0), lambda t: 1j * t)).passed


@pytest.mark.parametrize("trials", [-1, 0, 1.5, True, None])
def test_checks_of_nothing_are_refused(trials: Any) -> None:
    with pytest.raises(ValueError, match="expected trials"):
        al.check_adjoint(A, trials=trials)


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(al.SpaceMismatchError, match="pass domain="):
        al.check_adjoint(torch.relu, torch.relu)
    with pytest.raises(al.SpaceMismatchError, match="expected adjoint to be callable"):
        al.check_adjoint(A, 3)
    with pytest.raises(al.SpaceMismatchError, match="leave it out"):
        al.check_adjoint(A, domain=(3,))
    with pytest.raises(al.SpaceMismatchError, match="it raised"):
        al.check_adjoint(layer, layer, domain=torch.zeros(3))
    with pytest.raises(al.SpaceMismatchError, match="to be finite"):
        al.check_adjoint(A, x=torch.full((2, 1, 9, 8), math.nan, dtype=torch.float64))


def test_given_pair_is_tested_first() -> None:
    x = A.domain.randn(torch.Generator().manual_seed(0))
    report = al.check_adjoint(A, lambda y: 2 * A.H(y), x=x, y=A(x), trials=0)
    assert report.worst == "the given pair"
    assert 0.1 < report.error <= 0.5
    assert al.check_adjoint(A, x=x).passed


def test_missed_row_probability_is_one_half_precision_and_none_in_single() -> None:
    def report(dtype: torch.dtype) -> al.AdjointReport:
        return al.check_adjoint(al.diagonal(torch.linspace(0.5, 1.5, 8192, dtype=dtype)))

    assert report(torch.float32).missed_row_probability < 1e-12
    assert report(torch.bfloat16).missed_row_probability > 0.9


def test_missed_row_probability_is_what_happens() -> None:
    n, missed, expected = 2048, 0, 0.0
    d = (torch.rand(n, generator=seeded(0)) * 0.1 + 1).half()
    operator = al.diagonal(d)
    for seed in range(40):
        report = al.check_adjoint(operator, lambda y, seed=seed: put(d * y, 500 + seed, 0.0), trials=1, seed=seed)
        missed, expected = missed + report.passed, expected + report.missed_row_probability
    deviation = math.sqrt(max(expected * (1 - expected / 40), 1))
    assert abs(missed - expected) <= 4 * deviation


# ------------------------------------------------------------------------------------------------------------- reports


def test_reports_show_where_an_impulse_response_differs() -> None:
    report = al.check_adjoint(A, lambda y: A.H(y).roll(1, 2))
    names = [name for name, _ in report.figure]
    assert names[-1].startswith("|Bv − Aᴴv|")
    assert max(map(max, report.figure[-1][1])) > 0
    html = report._repr_html_()
    assert html.count("<svg") == 3
    assert "shifted by one pixel" in html


def test_reports_serialise() -> None:
    for report in (al.check_adjoint(A), al.check_adjoint(A, lambda y: -A.H(y))):
        record = json.loads(report.to_json(indent=1))
        assert record["passed"] is report.passed
        assert record["diagnosis"] == report.diagnosis
        assert set(record) == {f.name for f in dataclasses.fields(report)} - {"figure"}


def test_large_responses_are_thinned_in_the_figure() -> None:
    big = al.linear_operator(torch.fft.fft2, torch.zeros(100, 50, dtype=C))
    for _, rows in al.check_adjoint(big, lambda y: 2 * big.H(y)).figure:
        assert (len(rows), len(rows[0])) == (32, 16)


def test_small_responses_are_cut_out_in_the_figure() -> None:
    big = al.identity(torch.zeros(100, 70))
    for name, rows in al.check_adjoint(big, lambda y: 2 * y).figure:
        assert (len(rows), len(rows[0])) == (5, 5)
        assert "rows 48–52 of 100, columns 33–37 of 70" in name


def test_assertion_carries_the_report() -> None:
    with pytest.raises(al.AdjointMismatchError, match=r"2\.000 × too large") as caught:
        al.assert_adjoint(A, lambda y: 2 * A.H(y))
    assert not caught.value.report.passed


def test_linearity_reports_show_and_serialise() -> None:
    for f in (torch.relu, lambda x: 2 * x):
        report = al.check_linearity(f, (4,))
        assert json.loads(report.to_json())["verdict"] == report.verdict
        assert report.verdict in report._repr_html_()
