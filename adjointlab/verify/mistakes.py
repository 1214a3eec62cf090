"""The usual mistakes, each as a guess about B; the first that explains what was found is the diagnosis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

import torch
from torch import Tensor

from adjointlab.verify.evidence import Change, Evidence, Guess

Mistake = Callable[[Evidence], str]


def is_zero(evidence: Evidence) -> str:
    """``B = 0``."""
    return "" if any(bool(t.any()) for t in evidence.found) else "Aᴴ is zero (detached, or never written)"


def factor(evidence: Evidence) -> str:
    """``B = α Aᴴ`` with real α: a sign, a normalisation."""
    guess = evidence.fit(evidence.expected)
    return Guess.words("", guess.factor) if guess.fits else ""


def conjugate(evidence: Evidence) -> str:
    """``B = conj ∘ Aᴴ``, ``Aᴴ ∘ conj`` or both: Aᵀ for Aᴴ."""
    if not any(t.is_complex() for t in (*evidence.expected, *evidence.inputs[0])):
        return ""
    for before, after, words in (
        (_conj, _conj, "conjugate missing: B is the transpose Aᵀ"),
        (None, _conj, "conjugate missing: B is Aᴴ conjugated"),
        (_conj, None, "conjugate missing: B is Aᴴ of conj(y)"),
    ):
        guess = evidence.fit(evidence.changed(before, after))
        if guess.fits:
            return Guess.words(words, guess.factor)
    return ""


def part(evidence: Evidence) -> str:
    """``B = Re Aᴴ`` or ``i Im Aᴴ``, of the result or of y."""
    if not any(t.is_complex() for t in (*evidence.expected, *evidence.inputs[0])):
        return ""
    for change, words in ((_real, "only the real part"), (_imag, "only the imaginary part")):
        for before, after, of in ((None, change, ""), (change, None, " of y")):
            guess = evidence.fit(evidence.changed(before, after))
            if guess.fits:
                return Guess.words(words + of, guess.factor)
    return ""


def complex_factor(evidence: Evidence) -> str:
    """``B = α Aᴴ`` with complex α: a phase."""
    if not all(t.is_complex() for t in evidence.expected):
        return ""
    guess = evidence.fit(evidence.expected, complex_factor=True)
    return Guess.words("", guess.factor) if guess.fits else ""


def batch_mixed(evidence: Evidence) -> str:
    """B moves something from one batch entry to another, where Aᴴ does not."""
    adjoint, reference = evidence.adjoint, evidence.reference
    if not evidence.batched or any(t.ndim < 2 or t.shape[0] != evidence.batch for t in evidence.inputs[0]):
        return ""
    for entry in (0, evidence.batch - 1):
        alone = tuple(torch.zeros_like(t) for t in evidence.inputs[0])
        for t, u in zip(alone, evidence.inputs[0], strict=True):
            t[entry] = u[entry]
        others = [k for k in range(evidence.batch) if k != entry]
        stray = [any(bool(t[others].any()) for t in side(alone) if t.ndim >= 2) for side in (adjoint, reference)]
        if stray[0] and not stray[1]:
            return f"batch mixed: batch entry {entry} of y reaches other entries of the result"
    return ""


def border(evidence: Evidence) -> str:
    """B is right inside and wrong near the border."""
    if len(evidence.expected) > 1 or not evidence.spatial:
        return ""
    shape, dims = evidence.shape, [d for d in evidence.spatial if evidence.shape[d] >= 3]
    if not dims:
        return ""
    wrong = evidence.wrong()
    for width in range(1, min(shape[d] for d in dims) // 2 + 1):
        # the fewest dimensions whose borders hold all that is wrong
        for count in range(1, len(dims) + 1):
            for some in combinations(dims, count):
                near = torch.zeros_like(wrong)
                for d in some:
                    near.narrow(d, 0, width).fill_(True)
                    near.narrow(d, shape[d] - width, width).fill_(True)
                outside = ~near
                if not bool(outside.any()) or bool((wrong & outside).any()):
                    continue
                ends = sum(bool(wrong.narrow(d, s, 1).any()) for d in some for s in (0, shape[d] - 1))
                if float(wrong.sum()) < 0.2 * float(near.sum()) / width or ends == 0:
                    return ""
                along = "" if len(some) == len(dims) and len(dims) > 1 else f" along dim {_listed(some)}"
                return f"border of width {width} wrong{along} (padding mode)"
    return ""


def shifted(evidence: Evidence) -> str:
    """``B = S Aᴴ`` or ``Aᴴ S`` with a shift S by some pixels, but for a border."""
    dims = [d for d in range(evidence.ndim) if evidence.shape[d] > 1]
    if not dims or any(tuple(t.shape[1:]) != evidence.shape for t in evidence.expected):
        return ""
    offsets = _peak(evidence)
    moved = [d for d in dims if offsets[d]]
    if moved:
        images = evidence.changed(after=lambda t: torch.roll(t, [offsets[d] for d in moved], moved))
        reach = max(abs(offsets[d]) for d in moved)
        for inside in (None, _inside(moved, reach), _inside(evidence.spatial, reach), _inside(evidence.spatial, None)):
            guess = evidence.fit(images, inside)
            if guess.fits:
                return Guess.words(_shift_words({d: offsets[d] for d in moved}, evidence.shape), guess.factor)
    return _shifted_input(evidence)


def _shifted_input(evidence: Evidence) -> str:
    shapes = {tuple(t.shape) for t in evidence.inputs[0]}
    if len(shapes) > 1:
        return ""
    (shape,) = shapes
    dims = [d for d in (range(2, len(shape)) if len(shape) > 2 else range(len(shape))) if shape[d] > 1]
    moves = [{d: s} for d in dims for s in (1, -1)]
    moves += [{d: shape[d] // 2 for d in some} for n in range(len(dims), 0, -1) for some in combinations(dims, n)]
    for move in moves:
        for sign in (1, -1):
            images = evidence.changed(
                before=lambda t, move=move, sign=sign: torch.roll(t, [sign * s for s in move.values()], list(move))  # type: ignore[misc]
            )
            guess = evidence.fit(images)
            if guess.fits:
                return Guess.words(_shift_words({d: sign * s for d, s in move.items()}, shape) + " in y", guess.factor)
    return ""


def flipped(evidence: Evidence) -> str:
    """``B = P Aᴴ P`` with a reversal P: a correlation for a convolution; or P on one side only."""
    dims = evidence.spatial
    choices = [some for n in range(len(dims), 0, -1) for some in combinations(dims, n)]
    for some in choices:
        reverse = _reverse(some)
        along = "" if len(some) == len(dims) else f" along dim {_listed(some)}"
        for before, after, words in (
            (reverse, reverse, f"kernel not flipped{along}"),
            (None, reverse, f"reversed along dim {_listed(some)}"),
            (reverse, None, f"y reversed along dim {_listed(some)}"),
        ):
            if before is not None and any(t.ndim <= max(some) for t in evidence.inputs[0]):
                continue
            if after is not None and any(t.ndim <= max(some) + 1 for t in evidence.expected):
                continue
            images = evidence.changed(before, after)
            for inside in (None, _inside(dims, 1), _inside(dims, None)):
                guess = evidence.fit(images, inside)
                if guess.fits:
                    return Guess.words(words, guess.factor)
    return ""


def transposed(evidence: Evidence) -> str:
    """``B = P Aᴴ``, ``Aᴴ P`` or ``P Aᴴ P`` with two dimensions exchanged by P."""
    for i, j in combinations(range(evidence.ndim), 2):

        def swap(t: Tensor, i: int = i, j: int = j) -> Tensor:
            return t.transpose(i, j) if t.ndim > j else t

        for before, after in ((None, swap), (swap, None), (swap, swap)):
            images = evidence.changed(before, after)
            if images is None or any(t.shape != u.shape for t, u in zip(images, evidence.found, strict=True)):
                continue
            guess = evidence.fit(images)
            if guess.fits:
                return Guess.words(f"dims {i} and {j} transposed", guess.factor)
    return ""


def entrywise(evidence: Evidence) -> str:
    """``B = D Aᴴ`` with a diagonal D: a weight or mask that is missing, or applied twice."""
    if any(bool((t.abs() == 0).any()) for t in evidence.expected):
        return ""
    ratios = [f / e for f, e in zip(evidence.found, evidence.expected, strict=True)]
    size = max(float(r.abs().max()) for r in ratios)
    if size == 0.0 or any(float((r[0] - r[1]).abs().max()) > 8 * evidence.tolerance * size for r in ratios):
        return ""
    if float((evidence.wrong().double()).mean()) < 0.25:
        return ""  # a few wrong entries: where they are says more
    low, high = (f(float(g(r.abs())) for r in ratios) for f, g in ((min, torch.min), (max, torch.max)))
    return f"each entry is off by its own factor, from {low:.3g} to {high:.3g} (a weight or mask missing or doubled)"


MISTAKES: tuple[Mistake, ...] = (
    is_zero, factor, conjugate, part, complex_factor, batch_mixed, border, flipped, shifted, transposed,
)  # fmt: skip


# -- changes -----------------------------------------------------------------------------------------------------------


def _conj(t: Tensor) -> Tensor:
    return t.conj().resolve_conj()


def _real(t: Tensor) -> Tensor:
    return t.real.to(t.dtype) if t.is_complex() else t


def _imag(t: Tensor) -> Tensor:
    return 1j * t.imag if t.is_complex() else t


def _reverse(dims: tuple[int, ...]) -> Change:
    return lambda t: t.flip(dims) if t.ndim > max(dims) else t


def _inside(dims: tuple[int, ...] | list[int], margin: int | None) -> Change:
    """Return the cut to what lies ``margin`` (or a quarter of the size) from the border."""

    def cut(t: Tensor) -> Tensor:
        for d in dims:
            width = t.shape[d] // 4 if margin is None else margin
            if t.shape[d] > 2 * width:
                t = t.narrow(d, width, t.shape[d] - 2 * width)
        return t

    return cut


def _peak(evidence: Evidence) -> list[int]:
    """Return the shift at which the wrong images correlate most with the right ones."""
    total: Tensor | None = None
    for found, expected in zip(evidence.found, evidence.expected, strict=True):
        dims = list(range(1, found.ndim))
        product = torch.fft.fftn(found, dim=dims) * torch.fft.fftn(expected, dim=dims).conj()
        correlation = torch.fft.ifftn(product, dim=dims).sum(dim=0)
        total = correlation if total is None else total + correlation
    assert total is not None
    index = torch.unravel_index(total.abs().argmax(), total.shape)
    return [int(k) - n if int(k) > n // 2 else int(k) for k, n in zip(index, evidence.shape, strict=True)]


def _shift_words(offsets: dict[int, int], shape: tuple[int, ...]) -> str:
    if all(abs(s) == shape[d] // 2 and shape[d] > 3 for d, s in offsets.items()):
        return f"shifted by half the size along dim {_listed(tuple(offsets))} (fftshift or ifftshift missing)"
    sizes = {abs(s) for s in offsets.values()}
    if len(sizes) == 1:
        size = sizes.pop()
        return f"shifted by {'one pixel' if size == 1 else f'{size} pixels'} along dim {_listed(tuple(offsets))}"
    return "shifted by " + " and ".join(f"{abs(s)} along dim {d}" for d, s in offsets.items())


def _listed(dims: tuple[int, ...] | Iterator[int]) -> str:
    return " and ".join(map(str, dims))


__all__ = ["MISTAKES", "Mistake", "entrywise"]
