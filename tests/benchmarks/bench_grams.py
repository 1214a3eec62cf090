"""Grams ``A.gram`` against the two maps one after the other, against what one writes by hand, and against mrpro's.

The operators are called within `frozen()`, as solvers call them. What is written by hand is the gram with the same
transforms removed, in plain PyTorch, with factors multiplied before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from maps import radon
from torch import Tensor

import adjointlab as al

AXES = (-2, -1)


@dataclass(frozen=True)
class Model:
    """A forward model and, where that is simpler than its two maps, its gram by hand."""

    name: str
    forward: Callable[[Tensor], Tensor]
    x: Tensor
    by_hand: Callable[[Tensor], Tensor] | None = None
    mrpro: Callable[[], Callable[[Tensor], Any]] | None = None


def sense(n: int, coils: int, *, lines: bool) -> Model:
    """Return a parallel MRI scan: coil maps, a centred transform, every third line or random points of it."""
    maps = torch.randn(1, coils, 1, n, n, dtype=torch.complex64)
    chosen = torch.randperm(n)[: n // 3].sort().values
    mask = torch.zeros(n, 1).index_fill(0, chosen, 1) if lines else (torch.rand(n, n) < 0.3).float()
    square, conjugate = torch.fft.ifftshift(mask**2, dim=AXES if not lines else -2), maps.conj().resolve_conj()

    def forward(x: Tensor) -> Tensor:
        k = torch.fft.fft2(torch.fft.ifftshift(maps * x, dim=AXES), norm="ortho")
        return mask * torch.fft.fftshift(k, dim=AXES)

    def by_hand(x: Tensor) -> Tensor:
        k = torch.fft.fft2(maps * x, norm="ortho")
        return (conjugate * torch.fft.ifft2(square * k, norm="ortho")).sum(1, keepdim=True)

    def mrpro() -> Callable[[Tensor], Any]:
        from mrpro.data import KTrajectory, SpatialDimension
        from mrpro.operators import FourierOp, SensitivityOp

        at = (torch.arange(n) - n // 2).float()
        where = KTrajectory(torch.zeros(1, 1, 1, 1, 1), at[chosen].reshape(1, 1, 1, -1, 1), at.reshape(1, 1, 1, 1, -1))
        size, coil = SpatialDimension(1, n, n), SensitivityOp(maps)
        gram = coil.H @ FourierOp(size, size, where).gram @ coil
        return lambda x: gram(x)[0]

    name = f"SENSE, {coils} coils, {n}², " + ("lines" if lines else "points")
    x = torch.randn(1, 1, 1, n, n, dtype=torch.complex64)
    return Model(name, forward, x, by_hand, mrpro if lines else None)


def blur(n: int, *, masked: str = "") -> Model:
    """Return a blur by Fourier transforms, of a masked image or with a masked result."""
    kernel, mask = torch.fft.rfft2(torch.rand(21, 21) / 441, s=(n, n)), (torch.rand(n, n) > 0.3).float()
    before, after = (mask if masked == where else 1.0 for where in ("image", "data"))
    energy = kernel.abs().square()

    def forward(x: Tensor) -> Tensor:
        return after * torch.fft.irfft2(torch.fft.rfft2(before * x) * kernel, s=(n, n))

    def by_hand(x: Tensor) -> Tensor:
        if masked == "data":
            blurred = mask * torch.fft.irfft2(torch.fft.rfft2(x) * kernel, s=(n, n))
            return torch.fft.irfft2(torch.fft.rfft2(blurred) * kernel.conj(), s=(n, n))
        return before * torch.fft.irfft2(torch.fft.rfft2(before * x) * energy, s=(n, n))

    return Model(f"blur, {n}²" + (f", masked {masked}" if masked else ""), forward, torch.rand(n, n), by_hand)


def separable_blur(n: int) -> Model:
    """Return a blur along rows, then along columns."""
    k = torch.rand(1, 1, 1, 15) / 15

    def forward(x: Tensor) -> Tensor:
        rows = F.conv2d(F.pad(x, (7, 7, 0, 0), mode="circular"), k)
        return F.conv2d(F.pad(rows, (0, 0, 7, 7), mode="circular"), k.mT)

    return Model(f"separable blur, {n}², 15 taps", forward, torch.rand(1, 1, n, n))


def projections(n: int) -> Model:
    """Return a Radon transform by rotations."""
    found = radon(n, 30)
    return Model(found.case, found.forward, found.x)


MODELS: dict[str, Callable[[bool], Model]] = {
    "lines": lambda quick: sense(16 if quick else 256, 8, lines=True),
    "points": lambda quick: sense(16 if quick else 256, 8, lines=False),
    "blur": lambda quick: blur(16 if quick else 512),
    "masked image": lambda quick: blur(32 if quick else 512, masked="image"),
    "masked data": lambda quick: blur(32 if quick else 512, masked="data"),
    "separable blur": lambda quick: separable_blur(32 if quick else 512),
    "Radon": lambda quick: projections(16 if quick else 128),
}


@pytest.mark.parametrize("name", MODELS)
def test_gram(name: str, quick: bool, compare: Any) -> None:
    torch.manual_seed(0)
    model = MODELS[name](quick)
    A, x = al.linear_operator(model.forward, model.x), model.x
    gram, skipped = A.gram, {}
    ways: dict[str, Callable[[], Any]] = {"adjointlab": lambda: gram(x), "two maps": lambda: A.H(A(x))}
    if model.by_hand is not None:
        ways["by hand"] = lambda: model.by_hand(x)
    if model.mrpro is not None:
        try:
            theirs = model.mrpro()
            ways["mrpro"] = lambda: theirs(x)
        except ImportError:
            skipped["mrpro"] = "not installed"
    expected = A.H(A(x))
    gaps = {way: float(torch.dist(run(), expected) / expected.norm()) for way, run in ways.items()}
    assert max(gaps.values()) <= 1e-5
    said = next(line for line in gram.explain().splitlines() if line.startswith(("one graph", "nothing")))
    eps = gaps["adjointlab"] / A.domain.eps
    with gram.frozen():
        compare(ways, skipped=skipped, section="grams", case=model.name, said=said, eps=eps)
