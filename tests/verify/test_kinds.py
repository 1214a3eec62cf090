"""The kinds of mistakes in hand-written adjoints: each is named, with the tensor at fault, or is unrecognised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import seeded
from torch import Tensor

import adjointlab as al
from adjointlab.verify.checked_map import CheckedMap
from adjointlab.verify.comparison import Comparison

C, R = torch.complex128, torch.float64
Map = Callable[[Any], Any]
KINDS: dict[str, tuple[Map, Tensor, Map, Map, str]] = {}


def random(*shape: int, dtype: torch.dtype = C, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=seeded(seed))


def kind(name: str, forward: Map, x: Tensor, right: Map, wrong: Map, said: str) -> None:  # noqa: PLR0917  # a row
    KINDS[name] = forward, x, right, wrong, said


def zeros(*shape: int, dtype: torch.dtype = C) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def fft(x: Tensor) -> Tensor:
    return torch.fft.fft2(x, norm="ortho")


def ifft(y: Tensor) -> Tensor:
    return torch.fft.ifft2(y, norm="ortho")


def tensors() -> None:
    ramp = torch.exp(1j * random(9, dtype=R))
    kind(
        "permuted phase ramp",
        lambda x: ramp * x,
        zeros(9),
        lambda y: ramp.conj() * y,
        lambda y: ramp[[3, 1, 4, 0, 5, 8, 2, 6, 7]].conj() * y,
        "the entries of `ramp` are permuted",
    )
    kind(
        "another phase",
        lambda x: ramp * x,
        zeros(9),
        lambda y: ramp.conj() * y,
        lambda y: torch.exp(1j * torch.arange(9, dtype=R)) * y,
        "each entry is off by its own phase",
    )
    weight = random(7, 5, dtype=R).abs() + 1
    kind(
        "inverse",
        lambda x: weight * x,
        zeros(7, 5, dtype=R),
        lambda y: weight * y,
        lambda y: y / weight,
        "divides by `weight`: an inverse",
    )
    kind(
        "twice",
        lambda x: weight * x,
        zeros(7, 5, dtype=R),
        lambda y: weight * y,
        lambda y: weight**2 * y,
        "`weight` is applied twice",
    )
    probe = random(8, 9)
    kind(
        "probe",
        lambda x: fft(probe * x),
        zeros(8, 9),
        lambda y: probe.conj() * ifft(y),
        lambda y: probe * ifft(y),
        "conjugate missing: conjugate `probe`",
    )
    kind(
        "probe conjugated",
        lambda x: fft(probe.conj() * x),
        zeros(8, 9),
        lambda y: probe * ifft(y),
        lambda y: probe.conj() * ifft(y),
        "one conjugate too many: conjugate `probe`",
    )
    otf = random(8, 9) + 2
    kind(
        "deconvolution",
        lambda x: ifft(otf * fft(x)),
        zeros(8, 9),
        lambda y: ifft(otf.conj() * fft(y)),
        lambda y: ifft(fft(y) / otf),
        "divides by `otf`: an inverse",
    )
    kind(
        "otf",
        lambda x: ifft(otf * fft(x)),
        zeros(8, 9),
        lambda y: ifft(otf.conj() * fft(y)),
        lambda y: ifft(otf * fft(y)),
        "conjugate `otf`",
    )


def mri() -> None:
    maps, mask = random(3, 8, 9), (random(8, 9, dtype=R) > 0).double()
    other = (random(8, 9, dtype=R, seed=1) > 0).double()

    def forward(x: Tensor) -> Tensor:
        return mask * fft(maps * x)

    def right(y: Tensor) -> Tensor:
        return (maps.conj() * ifft(mask * y)).sum(0)

    def mistake(name: str, wrong: Map, said: str) -> None:
        kind(name, forward, zeros(8, 9), right, wrong, said)

    mistake("coil maps", lambda y: (maps * ifft(mask * y)).sum(0), "conjugate missing: conjugate `maps`")
    mistake("forgotten mask", lambda y: (maps.conj() * ifft(y)).sum(0), "`mask` is missing")
    mistake("another mask", lambda y: (maps.conj() * ifft(other * y)).sum(0), "reads `other` where A reads `mask`")
    mistake("shifted mask", lambda y: (maps.conj() * ifft(torch.fft.fftshift(mask) * y)).sum(0), "`mask` is shifted")
    mistake("reversed mask", lambda y: (maps.conj() * ifft(mask.flip(1) * y)).sum(0), "`mask` is reversed along dim 1")
    mistake("fft for ifft", lambda y: (maps.conj() * fft(mask * y)).sum(0), "Fourier transform in the wrong direction")
    probe = random(8, 9, seed=3)
    kind(
        "one conjugate of two",
        lambda x: fft(maps * (probe * x)),
        zeros(8, 9),
        lambda y: (probe.conj() * maps.conj() * ifft(y)).sum(0),
        lambda y: (probe * maps.conj() * ifft(y)).sum(0),
        "conjugate missing: conjugate `probe`",
    )
    kind(
        "both conjugates",
        lambda x: fft(maps * (probe * x)),
        zeros(8, 9),
        lambda y: (probe.conj() * maps.conj() * ifft(y)).sum(0),
        lambda y: (probe * maps * ifft(y)).sum(0),
        "conjugates missing: conjugate",
    )
    kind(
        "one use of two",
        lambda x: probe * fft(probe * x),
        zeros(8, 9),
        lambda y: probe.conj() * ifft(probe.conj() * y),
        lambda y: probe * ifft(probe.conj() * y),
        "conjugate missing: conjugate `probe`",
    )
    kind(
        "computed mask",
        lambda x: fft(x) * (torch.arange(9) < 4),
        zeros(8, 9),
        lambda y: ifft(y * (torch.arange(9) < 4)),
        ifft,
        "a factor computed by A is missing",
    )


def matrices() -> None:
    M, N = random(6, 6), random(6, 6, seed=1)
    kind(
        "not transposed",
        lambda x: M @ (N @ x),
        zeros(6),
        lambda y: N.mH @ (M.mH @ y),
        lambda y: N.conj() @ (M.mH @ y),
        "matrix `N` not transposed",
    )
    kind(
        "neither",
        lambda x: M @ (N @ x),
        zeros(6),
        lambda y: N.mH @ (M.mH @ y),
        lambda y: N @ (M.mH @ y),
        "matrix `N` neither transposed nor conjugated",
    )
    kind(
        "wrong order",
        lambda x: M @ (N @ x),
        zeros(6),
        lambda y: N.mH @ (M.mH @ y),
        lambda y: M.mH @ (N.mH @ y),
        "factors in the wrong order",
    )
    K = random(6, 6, dtype=R) + 4 * torch.eye(6, dtype=R)
    kind(
        "real matrix",
        lambda x: K @ x,
        zeros(6, dtype=R),
        lambda y: K.mT @ y,
        lambda y: K @ y,
        "matrix `K` not transposed",
    )
    kind(
        "solved",
        lambda x: K @ x,
        zeros(6, dtype=R),
        lambda y: K.mT @ y,
        lambda y: torch.linalg.solve(K, y),
        "B is an inverse of A",
    )
    mask = (random(8, 9, dtype=R) > 0).double()
    kind(
        "mask on the wrong side",
        lambda x: mask * fft(x),
        zeros(8, 9),
        lambda y: ifft(mask * y),
        lambda y: mask * ifft(y),
        "factors in the wrong order",
    )
    kind(
        "cumulative sum",
        lambda x: x.cumsum(0),
        zeros(6, dtype=R),
        lambda y: y.flip(0).cumsum(0).flip(0),
        lambda y: y.cumsum(0),
        "B is A itself, not its adjoint",
    )


def transforms() -> None:
    kind(
        "ifft",
        torch.fft.fft,
        zeros(8),
        lambda y: 8 * torch.fft.ifft(y),
        torch.fft.ifft,
        "Aᴴ is 8.000 × too small: B is the inverse of A",
    )
    shift, unshift = torch.fft.fftshift, torch.fft.ifftshift
    x = zeros(9, 7)
    for name, wrong, said in (
        ("both shifts", lambda y: unshift(ifft(shift(y))), "fftshift and ifftshift exchanged"),
        ("first shift", lambda y: shift(ifft(shift(y))), "fftshift and ifftshift exchanged"),
        ("last shift", lambda y: unshift(ifft(unshift(y))), "fftshift and ifftshift exchanged"),
        ("no shift", lambda y: shift(ifft(y)), "is missing (roll, fftshift or ifftshift)"),
        ("no shifts", ifft, "all 2 shifts are missing"),
    ):
        kind(name, lambda x: shift(fft(unshift(x))), x, lambda y: shift(ifft(unshift(y))), wrong, said)
    kind(
        "roll",
        lambda x: x.roll(2, 0),
        zeros(9, dtype=R),
        lambda y: y.roll(-2, 0),
        lambda y: y.roll(2, 0),
        "shifted by 2 along dim 0 in the wrong direction (roll)",
    )
    for n in (8, 9):
        kind(
            f"irfft {n}",
            torch.fft.rfft,
            zeros(n, dtype=R),
            lambda y, n=n: n * torch.fft.ifft(y, n).real,
            lambda y, n=n: n * torch.fft.irfft(y, n),
            "along dim 0 are 2.000 × too large (a one-sided transform)",
        )
    kind(
        "rfft",
        lambda x: torch.fft.irfft(x, 8),
        zeros(5),
        lambda y: torch.fft.rfft(y) / 8 * torch.tensor([1, 2, 2, 2, 1]),
        lambda y: torch.fft.rfft(y) / 8,
        "frequencies 1–3 along dim 0 are 2.000 × too small (a one-sided transform)",
    )
    window = torch.hann_window(8, dtype=R) + 0.1

    def stft(x: Tensor) -> Tensor:
        return torch.stft(x, 8, 4, window=window, center=False, return_complex=True)

    def overlapped(y: Tensor) -> Tensor:
        return F.fold((8 * torch.fft.ifft(y, 8, dim=0).real * window[:, None])[None], (1, 32), (1, 8), stride=(1, 4))[
            0, 0, 0
        ]

    def istft(y: Tensor) -> Tensor:
        envelope = F.fold((window**2)[:, None].expand(8, y.shape[1])[None], (1, 32), (1, 8), stride=(1, 4))[0, 0, 0]
        return (
            F.fold((torch.fft.irfft(y, 8, dim=0) * window[:, None])[None], (1, 32), (1, 8), stride=(1, 4))[0, 0, 0]
            / envelope
        )

    kind(
        "istft",
        stft,
        zeros(32, dtype=R),
        overlapped,
        istft,
        "frequencies 1–3 along dim 0 are 2.000 × too large (a one-sided transform), and each entry is off",
    )


def convolutions() -> None:
    w = random(2, 2, 3, 3, dtype=R)
    for mode, title in (("circular", "circular"), ("reflect", "reflecting"), ("replicate", "replicating")):

        def forward(x: Tensor, mode: str = mode) -> Tensor:
            return F.conv2d(F.pad(x, (1, 1, 1, 1), mode=mode), w)

        x = zeros(1, 2, 8, 9, dtype=R)
        right = al.linear_operator(forward, x, engine="eager").H
        plain = lambda y: F.conv_transpose2d(y, w, padding=1)  # noqa: E731
        kind(f"padding {mode}", forward, x, right, plain, "wrong (padding mode: the adjoint for zero padding)")
        kind(
            f"padding not {mode}",
            lambda x: F.conv2d(x, w, padding=1),
            x,
            plain,
            right,
            f"(padding mode: the adjoint for {title} padding)",
        )
    kind(
        "kernel",
        lambda x: F.conv2d(x, w, padding=1),
        x,
        plain,
        lambda y: F.conv_transpose2d(y, w.flip(2, 3), padding=1),
        "kernel not flipped (`w`)",
    )
    kind(
        "channels",
        lambda x: F.conv2d(x, w, padding=1),
        x,
        plain,
        lambda y: F.conv_transpose2d(y, w.transpose(0, 1), padding=1),
        "kernel's channels exchanged (in and out) (`w`)",
    )


for family in (tensors, mri, matrices, transforms, convolutions):
    family()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.slow
def test_each_kind_is_named(name: str) -> None:
    forward, x, right, wrong, said = KINDS[name]
    A = al.linear_operator(forward, x)
    good = al.check_adjoint(A, right)
    assert good.passed, good
    assert good.diagnosis == ""
    report = al.check_adjoint(A, wrong)
    assert not report.passed
    assert said in report.diagnosis, report.diagnosis


ODD: dict[str, Map] = {
    "random matrix": lambda y: random(8, 8, seed=5) @ y,
    "half a transform": lambda y: ifft(y) + 0.1 * y.flip(0),
    "another probe": lambda y: random(8, 9, seed=6) * ifft(random(8, 9, seed=7) * y),
    "sum of two": lambda y: ifft(y) + fft(y).conj().mT.reshape(8, 9),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_common_mistake_is_unrecognised(name: str) -> None:
    probe = random(8, 9)
    report = al.check_adjoint(al.linear_operator(lambda x: fft(probe * x), zeros(8, 9)), ODD[name])
    assert not report.passed
    assert report.diagnosis.startswith("unrecognised: "), report.diagnosis


def test_weights_that_differ_slightly_are_no_factor() -> None:
    weight = random(400, dtype=R).abs() + 1
    A = al.linear_operator(lambda x: weight * x, zeros(400, dtype=R))
    slightly = 1 + 64 * 2.2e-16 * random(400, dtype=R, seed=1)
    report = al.check_adjoint(A, lambda y: slightly * weight * y)
    assert not report.passed
    assert report.diagnosis.startswith("nearly right"), report.diagnosis


def test_adjoints_that_write_to_their_argument_are_named() -> None:
    A = al.linear_operator(lambda x: 2 * x, zeros(5, dtype=R))
    for wrong in (lambda y: y.mul_(2), lambda y: (2 * y, y.zero_())[0]):
        report = al.check_adjoint(A, wrong)
        assert not report.passed
        assert "the adjoint writes to its argument" in report.diagnosis
    by_numpy = al.check_adjoint(A, lambda y: (2 * y, y.numpy().fill(0))[0])
    assert "writes to its argument" in by_numpy.diagnosis
    assert al.check_adjoint(lambda x: x.mul_(2), lambda y: 2 * y, domain=zeros(5, dtype=R)).passed


COUNTED: dict[str, tuple[Map, Tensor, Map]] = {
    "border of a volume": (lambda x: 2 * x, zeros(1, 1, 16, 16, 16, dtype=R), lambda y: 2 * F.pad(
        y[..., 3:-3, 3:-3, 3:-3], [3] * 6)),
    "noise": (fft, zeros(8, 9), lambda y: ifft(y) + 0.1 * y.flip(0)),
    "kernel": (lambda x: F.conv2d(x, random(4, 4, 3, 3, dtype=R), padding=1), zeros(2, 4, 12, 12, dtype=R),
               lambda y: y.roll(3, 2) + y.cumsum(3)),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_failing_checks_take_at_most_five_times_the_applications(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, x, wrong = COUNTED[name]
    A = al.linear_operator(forward, x)
    calls = [0]

    def counted(function: Map) -> Map:
        def call(*args: Any) -> Any:
            calls[0] += 1
            return function(*args)

        return call

    of_program = Comparison.of_program
    monkeypatch.setattr(CheckedMap, "__call__", counted(CheckedMap.__call__))
    monkeypatch.setattr(Comparison, "of_program", lambda self, f: of_program(self, counted(f)))
    counts = []
    for adjoint in (A.H.forward, wrong):
        calls[0] = 0
        report = al.check_adjoint(A, adjoint)
        counts.append(calls[0])
        assert report.passed is (adjoint is not wrong)
    assert counts[1] <= 5 * counts[0], counts
