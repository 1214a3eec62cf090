"""Each rule of a gram fires on the graph that it is for, and not on one that differs by a little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from built import operator
from laws import assert_close, draw
from torch import Tensor, nn

import adjointlab as al
from adjointlab.transpose.kernels.registry import transformed

fft2, ifft2, roll = torch.fft.fft2, torch.fft.ifft2, torch.roll
N = 12


def noise(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype, device="cpu")


COILS = noise(3, N, N, dtype=torch.complex128)
K = noise(N, N, dtype=torch.complex128, seed=2)
REAL = noise(N, N, seed=3)
LINES = (noise(N, 1, seed=4) > 0).double()
INDEX = torch.tensor([0, 3, 3, 7])

COMPLEX, IMAGE = torch.zeros(N, N, dtype=torch.complex128), torch.zeros(N, N, dtype=torch.float64)
Case = tuple[Callable[[Tensor], Any], Tensor, str, bool]


def centred(x: Tensor, shift: int = N // 2, back: int = N // 2) -> Tensor:
    return roll(fft2(roll(x, (shift, shift), (-2, -1)), norm="ortho"), (back, back), (-2, -1))


CASES: dict[str, Case] = {
    "unitary": (lambda x: fft2(x, norm="ortho"), COMPLEX, "ifft2 · fft2 cancelled", True),
    "inverse": (ifft2, COMPLEX, "fft2 · ifft2 cancelled", True),
    "three": (torch.fft.fftn, torch.zeros(4, 5, 6, dtype=torch.complex128), "ifftn · fftn cancelled", True),
    "lines": (lambda x: LINES * fft2(x), COMPLEX, "ifft · fft cancelled along dimension 1", True),
    "coils": (lambda x: LINES * fft2(COILS * x), COMPLEX, "ifft · fft cancelled along dimension 2", True),
    "a mask that varies": (lambda x: REAL * fft2(x), COMPLEX, "ft2 cancelled", False),
    "a real part in between": (lambda x: fft2(x).real, COMPLEX, "ft2 cancelled", False),
    "a shift of frequencies by one": (lambda x: LINES * roll(fft2(x), 1, 1), COMPLEX, "roll · roll cancelled", True),
    "shifts": (lambda x: LINES * centred(COILS * x), COMPLEX, "roll · roll cancelled", True),
    "a factor between shifts": (lambda x: roll(K * roll(x, 2, 0), 3, 0), COMPLEX, "roll · roll cancelled", True),
    "sums between shifts": (lambda x: roll(x, 2, 0).cumsum(0), IMAGE, "roll · roll", False),
    "shifts by other amounts": (lambda x: x + roll(x, 2, 0), IMAGE, "roll · roll cancelled", False),
    "diagonals": (lambda x: REAL * x, IMAGE, "diagonal · diagonal merged", True),
    "a weight between convolutions": (lambda x: REAL * x.cumsum(0), IMAGE, "ft cancelled", False),
    "a sum of diagonals": (lambda x: COILS * x, COMPLEX, "sum of diagonals merged", True),
    "a sum of images": (lambda x: (COILS * x).cumsum(1), COMPLEX, "sum of diagonals merged", False),
    "numbers": (lambda x: 2 * x.cumsum(0), IMAGE, "scalar merged", True),
    "index": (lambda x: fft2(x)[INDEX], COMPLEX, "reading and adding by index to a mask", True),
    "index and weights": (lambda x: REAL[:4] * fft2(x)[INDEX], COMPLEX, "by index to a mask", True),
    "index_select": (lambda x: x.index_select(1, INDEX), IMAGE, "by index to a mask", True),
    "an index, then sums": (lambda x: x[INDEX].cumsum(0), IMAGE, "by index to a mask", False),
    "a crop": (lambda x: x[2:7, 3:], IMAGE, "pad · crop cancelled", False),
    "every other line": (lambda x: fft2(x)[::2], COMPLEX, "ft2 cancelled", False),
    "padding": (lambda x: nn.functional.pad(x, (1, 2, 0, 3)), IMAGE, "pad · crop cancelled", True),
    "padding with reflections": (
        lambda x: nn.functional.pad(x[None], (1, 2), mode="reflect"), IMAGE, "pad · crop cancelled", False
    ),
    "real to complex": (lambda x: x.to(torch.complex128), IMAGE, "real part of a real image dropped", True),
    "real to complex times complex": (lambda x: K * x, IMAGE, "real part of a real image dropped", False),
    "rfft": (lambda x: REAL[:, :7] * torch.fft.rfft2(x), IMAGE, "real part of ifft to irfft", True),
    "a blur by rfft": (
        lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * K[:, :7]), IMAGE, "rfft2 · irfft2 cancelled", True
    ),
    "a blur by rfft of odd size": (
        lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * K[:11, :6], s=(11, 11)), IMAGE[:11, :11], "irfft2 canc", True
    ),
    "a blur by fft": (lambda x: ifft2(fft2(x) * K).real, IMAGE, "rfft2 · irfft2 cancelled", True),
    "a blur by fft, its imaginary part": (lambda x: ifft2(fft2(x) * K).imag, IMAGE, "irfft2 cancelled", False),
    "a blur, masked": (lambda x: REAL * ifft2(fft2(x) * K).real, IMAGE, "irfft2 cancelled", False),
    "a blur of a masked image": (lambda x: ifft2(fft2(REAL * x) * K).real, IMAGE, "rfft2 · irfft2 cancelled", True),
    "a number between transforms": (
        lambda x: 2 * torch.fft.irfft2(3 * torch.fft.rfft2(x) * K[:, :7]), IMAGE, "rfft2 · irfft2 cancelled", True
    ),
    "another norm": (
        lambda x: ifft2(fft2(x, norm="ortho") * K, norm="forward").real, IMAGE, "rfft2 · irfft2 cancelled", True
    ),
    "other dimensions": (
        lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=0)[:, :7] * K[:7, :7], dim=1), IMAGE, "irfft cancelled", False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    f, example, said, fires = CASES[name]
    A = al.linear_operator(f, example)
    gram, x = A.gram, draw(A.domain)
    assert (said in gram.explain()) is fires
    assert_close(gram(x), A.H(A(x)), A.domain.eps)
    assert_close(A.H.gram(A(x)), A(A.H(A(x))), A.domain.eps)


def test_products_of_transforms_meet() -> None:
    c = nn.Conv2d(1, 1, 15, padding=7, padding_mode="circular", bias=False).requires_grad_(False)
    A = operator(c, (2, 1, 64, 64), transformed)
    x = draw(A.domain)
    assert "ifft · fft between convolutions cancelled" in A.gram.explain()
    assert_close(A.gram(x), A.H(A(x)), A.domain.eps)
    masked = al.diagonal(draw(A.codomain)) @ A
    assert "between convolutions" not in masked.gram.explain()
    assert_close(masked.gram(x), masked.H(masked(x)), A.domain.eps)


def test_transforms_of_several_images_stay_whole_where_half_of_them_is_slower() -> None:
    A = al.linear_operator(lambda x: LINES * fft2(x), torch.zeros(5, N, N, dtype=torch.complex128))
    assert "cancelled along" not in A.gram.explain()
    assert "diagonal · diagonal merged" in A.gram.explain()


def test_dtypes_that_a_product_would_change_are_kept() -> None:
    narrow = REAL.float()
    A = al.linear_operator(lambda x: (narrow.double() * x).float() * narrow, torch.zeros(N, N, dtype=torch.float64))
    x = draw(A.domain)
    assert A.gram(x).dtype == torch.float64
    assert_close(A.gram(x), A.H(A(x)), A.codomain.eps)
