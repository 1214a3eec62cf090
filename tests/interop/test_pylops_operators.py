"""PyLops operators, re-expressed as torch forwards: the derived adjoint is PyLops' hand-written one, entry by entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conformance import relative_gap

import adjointlab as al

pytestmark = pytest.mark.slow

pylops = pytest.importorskip("pylops")
bridge = pytest.importorskip("adjointlab.adapters.pylops")

N, SHAPE = 9, (5, 6)
rng = np.random.default_rng(0)
D = rng.standard_normal(N)
M = rng.standard_normal((4, N))
H1 = rng.standard_normal(3)
H2 = rng.standard_normal((3, 3))
PLACES = np.array([0, 3, 4, 7])
BETWEEN = np.array([0.5, 2.25, 5.75, 6.0])
AT = np.array([[0.3, 2.5, 3.1], [1.5, 0.25, 4.2]])
T = np.linspace(0.0, 1.0, N)


def t(a: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(a))


def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def conv1d(x: torch.Tensor) -> torch.Tensor:
    return F.conv1d(x[None, None], t(H1[::-1])[None, None], padding=1)[0, 0]


def conv2d(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x[None, None], h.flip(0, 1)[None, None], padding=1)[0, 0]


def laplacian(x: torch.Tensor) -> torch.Tensor:
    rows = F.pad(x[2:] - 2 * x[1:-1] + x[:-2], (0, 0, 1, 1))
    return rows + F.pad(x[:, 2:] - 2 * x[:, 1:-1] + x[:, :-2], (1, 1))


def bilinear(x: torch.Tensor) -> torch.Tensor:
    low = np.floor(AT).astype(int)
    a, b = t(AT - low)
    i, j = t(low)
    top = x[i, j] * (1 - b) + x[i, j + 1] * b
    return top * (1 - a) + (x[i + 1, j] * (1 - b) + x[i + 1, j + 1] * b) * a


def linear_interpolation(x: torch.Tensor) -> torch.Tensor:
    low = np.floor(BETWEEN).astype(int)
    w = t(BETWEEN - low)
    return x[t(low)] * (1 - w) + x[t(low) + 1] * w


def symmetrised(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[1:].flip(0), x])


def dct(x: torch.Tensor) -> torch.Tensor:
    n = torch.arange(N, dtype=x.dtype)
    basis = torch.cos(torch.pi * (2 * n + 1) * n[:, None] / (2 * N)) * (2 / N) ** 0.5
    basis[0] /= 2**0.5
    return basis @ x


REAL = zeros(N)
IMAGE = zeros(*SHAPE)
COMPLEX = zeros(N, dtype=torch.complex128)
COMPLEX_IMAGE = zeros(*SHAPE, dtype=torch.complex128)

Forward = Callable[[torch.Tensor], Any]
CASES: dict[str, tuple[Callable[[], Any], Forward, torch.Tensor]] = {
    "Identity": (lambda: pylops.Identity(N), lambda x: x * 1, REAL),
    "Identity-wide": (lambda: pylops.Identity(4, N), lambda x: x[:4], REAL),
    "Zero": (lambda: pylops.Zero(4, N), lambda x: 0 * x[:4], REAL),
    "Diagonal": (lambda: pylops.Diagonal(D), lambda x: t(D) * x, REAL),
    "Diagonal-complex": (
        lambda: pylops.Diagonal(D + 1j * D[::-1], dtype="complex128"),
        lambda x: t(D + 1j * D[::-1]) * x,
        COMPLEX,
    ),
    "MatrixMult": (lambda: pylops.MatrixMult(M), lambda x: t(M) @ x, REAL),
    "MatrixMult-otherdims": (lambda: pylops.MatrixMult(M, otherdims=(2,)), lambda x: t(M) @ x, zeros(N, 2)),
    "FirstDerivative-forward": (
        lambda: pylops.FirstDerivative(N, kind="forward"),
        lambda x: F.pad(x[1:] - x[:-1], (0, 1)),
        REAL,
    ),
    "FirstDerivative-backward": (
        lambda: pylops.FirstDerivative(N, kind="backward"),
        lambda x: F.pad(x[1:] - x[:-1], (1, 0)),
        REAL,
    ),
    "FirstDerivative-centered": (
        lambda: pylops.FirstDerivative(N, kind="centered"),
        lambda x: F.pad((x[2:] - x[:-2]) / 2, (1, 1)),
        REAL,
    ),
    "SecondDerivative": (
        lambda: pylops.SecondDerivative(N),
        lambda x: F.pad(x[2:] - 2 * x[1:-1] + x[:-2], (1, 1)),
        REAL,
    ),
    "Gradient": (
        lambda: pylops.Gradient(SHAPE, kind="forward"),
        lambda x: torch.stack([F.pad(x[1:] - x[:-1], (0, 0, 0, 1)), F.pad(x[:, 1:] - x[:, :-1], (0, 1))]),
        IMAGE,
    ),
    "Laplacian": (lambda: pylops.Laplacian(SHAPE, axes=(0, 1)), laplacian, IMAGE),
    "Sum": (lambda: pylops.Sum(SHAPE, axis=0), lambda x: x.sum(0), IMAGE),
    "Flip": (lambda: pylops.Flip(SHAPE, axis=1), lambda x: x.flip(1), IMAGE),
    "Roll": (lambda: pylops.Roll(SHAPE, axis=0, shift=2), lambda x: x.roll(2, 0), IMAGE),
    "Pad": (lambda: pylops.Pad(SHAPE, ((1, 2), (0, 3))), lambda x: F.pad(x, (0, 3, 1, 2)), IMAGE),
    "Restriction": (lambda: pylops.Restriction(N, PLACES), lambda x: x[t(PLACES)], REAL),
    "Transpose": (lambda: pylops.Transpose(SHAPE, axes=(1, 0)), lambda x: x.T.contiguous(), IMAGE),
    "Symmetrize": (lambda: pylops.Symmetrize(N), symmetrised, REAL),
    "CausalIntegration": (
        lambda: pylops.CausalIntegration(N, kind="full"),
        lambda x: x.cumsum(0),
        REAL,
    ),
    "CausalIntegration-trapezoidal": (
        lambda: pylops.CausalIntegration(N, kind="trapezoidal"),
        lambda x: F.pad(((x[1:] + x[:-1]) / 2).cumsum(0), (1, 0)) + F.pad(x[:1] / 2, (0, N - 1)),
        REAL,
    ),
    "Smoothing1D": (
        lambda: pylops.Smoothing1D(3, N),
        lambda x: F.conv1d(x[None, None], torch.full((1, 1, 3), 1 / 3, dtype=x.dtype), padding=1)[0, 0],
        REAL,
    ),
    "Smoothing2D": (
        lambda: pylops.Smoothing2D([3, 3], SHAPE),
        lambda x: conv2d(x, torch.full((3, 3), 1 / 9, dtype=x.dtype)),
        IMAGE,
    ),
    "LinearRegression": (lambda: pylops.LinearRegression(T), lambda x: x[0] + x[1] * t(T), zeros(2)),
    "Regression": (
        lambda: pylops.Regression(T, order=2),
        lambda x: x[0] + x[1] * t(T) + x[2] * t(T) ** 2,
        zeros(3),
    ),
    "Real": (lambda: pylops.Real(N, dtype="complex128"), lambda x: x.real * 1, COMPLEX),
    "Imag": (lambda: pylops.Imag(N, dtype="complex128"), lambda x: x.imag * 1, COMPLEX),
    "Conj": (lambda: pylops.Conj(N, dtype="complex128"), torch.conj_physical, COMPLEX),
    "VStack": (
        lambda: pylops.VStack([pylops.MatrixMult(M), pylops.Diagonal(D)]),
        lambda x: torch.cat([t(M) @ x, t(D) * x]),
        REAL,
    ),
    "HStack": (
        lambda: pylops.HStack([pylops.MatrixMult(M), pylops.Identity(4)]),
        lambda x: t(M) @ x[:N] + x[N:],
        zeros(N + 4),
    ),
    "BlockDiag": (
        lambda: pylops.BlockDiag([pylops.MatrixMult(M), pylops.Identity(4)]),
        lambda x: torch.cat([t(M) @ x[:N], x[N:]]),
        zeros(N + 4),
    ),
    "Kronecker": (
        lambda: pylops.Kronecker(pylops.MatrixMult(H2), pylops.MatrixMult(M)),
        lambda x: (t(H2) @ x.reshape(3, N) @ t(M).T).reshape(-1),
        zeros(3 * N),
    ),
    "Convolve1D": (lambda: pylops.signalprocessing.Convolve1D(N, H1, offset=1), conv1d, REAL),
    "Convolve2D": (
        lambda: pylops.signalprocessing.Convolve2D(SHAPE, H2, offset=(1, 1)),
        lambda x: conv2d(x, t(H2)),
        IMAGE,
    ),
    "FFT": (
        lambda: pylops.signalprocessing.FFT(N, norm="none", dtype="complex128"),
        torch.fft.fft,
        COMPLEX,
    ),
    "FFT-ortho": (
        lambda: pylops.signalprocessing.FFT(N, norm="ortho", dtype="complex128"),
        lambda x: torch.fft.fft(x, norm="ortho"),
        COMPLEX,
    ),
    "FFT2D": (
        lambda: pylops.signalprocessing.FFT2D(SHAPE, norm="ortho", dtype="complex128"),
        lambda x: torch.fft.fft2(x, norm="ortho"),
        COMPLEX_IMAGE,
    ),
    "DCT": (lambda: pylops.signalprocessing.DCT(N), dct, REAL),
    "Interp-linear": (
        lambda: pylops.signalprocessing.Interp(N, BETWEEN, kind="linear")[0],
        linear_interpolation,
        REAL,
    ),
    "Interp-nearest": (
        lambda: pylops.signalprocessing.Interp(N, np.array([0.4, 2.2, 5.8]), kind="nearest")[0],
        lambda x: x[[0, 2, 6]],
        REAL,
    ),
    "Bilinear": (lambda: pylops.signalprocessing.Bilinear(AT, SHAPE), bilinear, IMAGE),
    "Shift": (
        lambda: pylops.signalprocessing.Shift(8, 2.0, real=True, dtype="float64"),
        lambda x: x.roll(2),
        zeros(8),
    ),
    "product": (
        lambda: pylops.MatrixMult(M) @ pylops.Diagonal(D),
        lambda x: t(M) @ (t(D) * x),
        REAL,
    ),
    "sum": (lambda: pylops.Diagonal(D) + 2 * pylops.Identity(N), lambda x: t(D) * x + 2 * x, REAL),
}


def test_enough_operators_are_compared() -> None:
    assert len({name.split("-")[0] for name in CASES}) >= 25


@pytest.mark.parametrize("name", CASES)
def test_derived_adjoint_is_the_one_of_pylops(name: str) -> None:
    make, forward, example = CASES[name]
    theirs, ours = bridge.from_pylops(make(), device=torch.get_default_device()), al.linear_operator(forward, example)
    bound = 64 * ours.domain.eps
    for a, b in ((ours, theirs), (ours.H, theirs.H)):
        assert relative_gap(al.to_dense(a, real=True), al.to_dense(b, real=True)) <= bound
