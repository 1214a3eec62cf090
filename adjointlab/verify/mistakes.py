"""The common mistakes, each as a guess about B; the first guess that explains the images of B is the diagnosis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations

import torch
from torch import Tensor

from adjointlab.verify.comparison import Change, Comparison, Guess
from adjointlab.verify.parts import in_words, restricted_to, wrong_entries_of_y
from adjointlab.verify.permutation import permuted
from adjointlab.verify.responses import footprint, kernel

Mistake = Callable[[Comparison], str]


def is_zero(comparison: Comparison) -> str:
    """``B = 0``."""
    return "" if any(bool(t.any()) for t in comparison.found) else "Aᴴ is zero (detached, or never written)"


def low_precision(comparison: Comparison) -> str:
    """``B = Aᴴ`` up to the rounding errors of a coarser dtype."""
    misfit = comparison.misfit
    if not 4 * comparison.eps < misfit <= 0.05 or misfit > 4 * comparison.noise:
        return ""
    return (
        f"computed in lower precision{_dtype_of(misfit, comparison.eps)}: rounding errors of {misfit:.1e} of the "
        f"result, where {comparison.eps:.1e} is one unit of its dtype"
    )


def nearly_right(comparison: Comparison) -> str:
    """``B = Aᴴ`` up to a small error in most entries, as from rounded weights."""
    misfit = comparison.misfit
    if not 4 * comparison.eps < misfit <= 0.02:
        return ""
    near = [(f - e).abs() > misfit / 64 * e.abs() for f, e in zip(comparison.found, comparison.expected, strict=True)]
    if min(float(t.double().mean()) for t in near) < 0.5:
        return ""
    dtype = _dtype_of(misfit, comparison.eps)
    why = f"computed in lower precision{dtype}, or with weights rounded to it" if dtype else "weights differ slightly"
    return f"nearly right: off by {misfit:.1e} of the result everywhere ({why})"


def _dtype_of(error: float, eps: float) -> str:
    """Return in words which coarser dtype has rounding errors of this size, or an empty string."""
    names = {torch.bfloat16: "bfloat16", torch.float16: "float16 or TF32", torch.float32: "float32"}
    typical = {0.3 * torch.finfo(dtype).eps: name for dtype, name in names.items() if torch.finfo(dtype).eps > eps}
    if not typical:
        return ""
    nearest = min(typical, key=lambda size: abs(math.log(size / error)))
    return f" ({typical[nearest]})" if 1 / 16 < error / nearest < 16 else ""


def factor(comparison: Comparison) -> str:
    """``B = α Aᴴ`` with real α: a wrong sign or normalisation."""
    guess = comparison.fit(comparison.expected)
    return Guess.words("", guess.factor) if guess.fits else ""


def conjugate(comparison: Comparison) -> str:
    """``B = conj ∘ Aᴴ``, ``Aᴴ ∘ conj`` or both, which is Aᵀ."""
    if not any(t.is_complex() for t in (*comparison.expected, *comparison.inputs[0])):
        return ""
    for before, after, words in (
        (_conj, _conj, "conjugate missing: B is the transpose Aᵀ"),
        (None, _conj, "conjugate missing: B is Aᴴ conjugated"),
        (_conj, None, "conjugate missing: B is Aᴴ of conj(y)"),
    ):
        guess = comparison.fit(comparison.changed(before, after))
        if guess.fits:
            return Guess.words(words, guess.factor)
    return ""


def part(comparison: Comparison) -> str:
    """B keeps only the real or only the imaginary part of the result or of y."""
    if not any(t.is_complex() for t in (*comparison.expected, *comparison.inputs[0])):
        return ""
    for change, words in ((_real, "only real part"), (_imag, "only imaginary part")):
        for before, after, of in ((None, change, ""), (change, None, " of y")):
            guess = comparison.fit(comparison.changed(before, after))
            if guess.fits:
                return Guess.words(words + of, guess.factor)
    return ""


def complex_factor(comparison: Comparison) -> str:
    """``B = α Aᴴ`` with complex α: a wrong phase."""
    if not all(t.is_complex() for t in comparison.expected):
        return ""
    guess = comparison.fit(comparison.expected, complex_factor=True)
    return Guess.words("", guess.factor) if guess.fits else ""


def batch_mixed(comparison: Comparison) -> str:
    """B maps one batch entry of y to other batch entries of the result, but Aᴴ does not."""
    adjoint, reference = comparison.adjoint, comparison.reference
    if not comparison.batched or any(t.ndim < 2 or t.shape[0] != comparison.batch for t in comparison.inputs[0]):
        return ""
    for entry in (0, comparison.batch - 1):
        alone = tuple(torch.zeros_like(t) for t in comparison.inputs[0])
        for t, u in zip(alone, comparison.inputs[0], strict=True):
            t[entry] = u[entry]
        others = [k for k in range(comparison.batch) if k != entry]
        stray = [any(bool(t[others].any()) for t in side(alone) if t.ndim >= 2) for side in (adjoint, reference)]
        if stray[0] and not stray[1]:
            return f"batch mixed: batch entry {entry} of y reaches other entries of the result"
    return ""


def border(comparison: Comparison) -> str:
    """B is right inside and wrong near the border."""
    if len(comparison.expected) > 1 or not comparison.spatial:
        return ""
    shape, dims = comparison.shape, _long_dims(comparison)
    if not dims:
        return ""
    wrong = comparison.wrong()
    for width in range(1, min(shape[d] for d in dims) // 2 + 1):
        # find the fewest dimensions whose borders contain all wrong entries
        for count in range(1, len(dims) + 1):
            for some in combinations(dims, count):
                near = torch.zeros_like(wrong)
                for d in some:
                    near.narrow(d, 0, width).fill_(True)
                    near.narrow(d, shape[d] - width, width).fill_(True)
                outside = ~near
                if not bool(outside.any()) or bool((wrong & outside).any()):
                    continue
                ends = [bool(wrong.narrow(d, s, 1).any()) for d in some for s in (0, shape[d] - 1)]
                if not any(ends):  # with reflection, the outermost entries may be right
                    ends = [bool(wrong.narrow(d, s, width).any()) for d in some for s in (0, shape[d] - width)]
                    ends = ends if all(ends) and 4 * width <= min(shape[d] for d in some) else []
                if float(wrong.sum()) < 0.2 * float(near.sum()) / width or not any(ends):
                    return ""
                along = "" if len(some) == len(dims) and len(dims) > 1 else f" along dim {_dims_in_words(some)}"
                if len(some) == 1 and not all(ends):
                    along = f" at the {'start' if ends[0] else 'end'} of dim {some[0]}"
                return f"border of width {width} wrong{along} (padding mode)"
    return ""


def shifted(comparison: Comparison) -> str:
    """``B = S Aᴴ`` or ``Aᴴ S`` with a shift S by some pixels, except near the border."""
    dims = _long_dims(comparison)
    if not dims or any(tuple(t.shape[1:]) != comparison.shape for t in comparison.expected):
        return ""
    offsets = _best_shift(comparison, dims)
    moved = [d for d in dims if offsets[d]]
    if moved:
        images = comparison.changed(after=lambda t: torch.roll(t, [offsets[d] for d in moved], moved))
        reach = max(abs(offsets[d]) for d in moved)
        for inside in (
            None,
            _inside(moved, reach),
            _inside(comparison.spatial, reach),
            _inside(comparison.spatial, None),
        ):
            guess = comparison.fit(images, inside)
            if guess.fits:
                return Guess.words(_shift_words({d: offsets[d] for d in moved}, comparison.shape), guess.factor)
    return _shifted_input(comparison)


def _shifted_input(comparison: Comparison) -> str:
    shapes = {tuple(t.shape) for t in comparison.inputs[0]}
    if len(shapes) > 1:
        return ""
    (shape,) = shapes
    dims = [d for d in (range(2, len(shape)) if len(shape) > 2 else range(len(shape))) if shape[d] > 2]
    moves = [{d: s} for d in dims for s in (1, -1)]
    moves += [{d: shape[d] // 2 for d in some} for n in range(len(dims), 0, -1) for some in combinations(dims, n)]
    for move in moves:
        for sign in (1, -1):
            images = comparison.changed(
                before=lambda t, move=move, sign=sign: torch.roll(t, [sign * s for s in move.values()], list(move))  # type: ignore[misc]
            )
            guess = comparison.fit(images)
            if guess.fits:
                return Guess.words(_shift_words({d: sign * s for d, s in move.items()}, shape) + " in y", guess.factor)
    return ""


def flipped(comparison: Comparison) -> str:
    """``B = P Aᴴ P`` with a reversal P, as of a convolution and a correlation; or ``P Aᴴ`` or ``Aᴴ P``."""
    dims = _long_dims(comparison)
    choices = [some for n in range(len(dims), 0, -1) for some in combinations(dims, n)]
    for some in choices:
        reverse = _reverse(some)
        along = "" if len(some) == len(dims) else f" along dim {_dims_in_words(some)}"
        for before, after, words in (
            (reverse, reverse, f"kernel not flipped{along}"),
            (None, reverse, f"reversed along dim {_dims_in_words(some)}"),
            (reverse, None, f"y reversed along dim {_dims_in_words(some)}"),
        ):
            if before is not None and any(t.ndim <= max(some) for t in comparison.inputs[0]):
                continue
            if after is not None and any(t.ndim <= max(some) + 1 for t in comparison.expected):
                continue
            images = comparison.changed(before, after)
            for inside in (None, _inside(dims, 1), _inside(dims, None)):
                guess = comparison.fit(images, inside)
                if guess.fits:
                    return Guess.words(words, guess.factor)
    return ""


def transposed(comparison: Comparison) -> str:
    """``B = P Aᴴ``, ``Aᴴ P`` or ``P Aᴴ P``, where P exchanges two dimensions."""
    for i, j in combinations(range(comparison.ndim), 2):

        def swap(t: Tensor, i: int = i, j: int = j) -> Tensor:
            return t.transpose(i, j) if t.ndim > j else t

        for before, after in ((None, swap), (swap, None), (swap, swap)):
            images = comparison.changed(before, after)
            if images is None or any(t.shape != u.shape for t, u in zip(images, comparison.found, strict=True)):
                continue
            guess = comparison.fit(images)
            if guess.fits:
                return Guess.words(f"dims {i} and {j} transposed", guess.factor)
    return ""


def entrywise(comparison: Comparison) -> str:
    """``B = D Aᴴ`` with a diagonal D: a weight or mask is missing or applied twice."""
    if any(bool((t.abs() == 0).any()) for t in comparison.expected):
        return ""
    ratios = [f / e for f, e in zip(comparison.found, comparison.expected, strict=True)]
    size = max(float(r.abs().max()) for r in ratios)
    if size == 0.0 or any(float((r[0] - r[1]).abs().max()) > 8 * comparison.tolerance * size for r in ratios):
        return ""
    if float((comparison.wrong().double()).mean()) < 0.25:
        return ""  # if few entries are wrong, their places say more
    low, high = (f(float(g(r.abs())) for r in ratios) for f, g in ((min, torch.min), (max, torch.max)))
    return f"each entry is off by its own factor, from {low:.3g} to {high:.3g} (a weight or mask missing or doubled)"


_VALUES: tuple[Mistake, ...] = (is_zero, factor, conjugate, part, complex_factor)  # they do not depend on the shape


def ignored(comparison: Comparison) -> str:
    """B is wrong for some entries of y only, by a known mistake; most often it ignores them."""
    places = wrong_entries_of_y(comparison)
    # A wrong batch entry and a wrong border (both ends) are separate mistakes.
    if (
        not places
        or (comparison.batched and set(places) == {0})
        or any(some[0] == 0 and some[-1] == comparison.inputs[0][0].shape[dim] - 1 for dim, some in places.items())
    ):
        return ""
    alone = restricted_to(comparison, places)
    if is_zero(alone):
        return f"y is ignored {in_words(places)}"
    text = _first(alone, _VALUES)
    return f"only for y {in_words(places)}: {text}" if text else ""


def in_places(comparison: Comparison) -> str:
    """Some entries of the result are wrong by a known mistake; most often they were never written."""
    if len(comparison.found) > 1:
        return ""
    wrong = comparison.wrong()
    if not 0 < float(wrong.double().mean()) <= 0.5:
        return ""
    alone = comparison.masked(wrong)
    text = "zero there (never written)" if is_zero(alone) else _first(alone, _VALUES)
    return f"{comparison.places()}: {text}" if text else ""


def _first(comparison: Comparison, mistakes: tuple[Mistake, ...]) -> str:
    return next((text for text in (mistake(comparison) for mistake in mistakes) if text), "")


MISTAKES: tuple[Mistake, ...] = (
    is_zero, low_precision, factor, conjugate, part, complex_factor, batch_mixed, ignored, border, flipped, shifted,
    permuted, kernel, transposed,
)  # fmt: skip
LAST: tuple[Mistake, ...] = (entrywise, in_places, footprint, nearly_right)  # tried after single batch entries


def _long_dims(comparison: Comparison) -> list[int]:
    """Return the spatial dims of three or more entries; for two entries, a shift equals a reversal."""
    return [d for d in comparison.spatial if comparison.shape[d] > 2]


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
    """Return a function that crops ``margin`` entries (None: a quarter of the size) from every border."""

    def cut(t: Tensor) -> Tensor:
        for d in dims:
            width = t.shape[d] // 4 if margin is None else margin
            if t.shape[d] > 2 * width:
                t = t.narrow(d, width, t.shape[d] - 2 * width)
        return t

    return cut


def _best_shift(comparison: Comparison, dims: list[int]) -> list[int]:
    """Return the shift along ``dims`` for which the wrong and right images have the largest correlation."""
    total: Tensor | None = None
    for found, expected in zip(comparison.found, comparison.expected, strict=True):
        along = [d + 1 for d in dims]
        product = torch.fft.fftn(found, dim=along) * torch.fft.fftn(expected, dim=along).conj()
        rest = [d for d in range(found.ndim) if d not in along]
        correlation = torch.fft.ifftn(product, dim=along).sum(dim=rest, keepdim=True)[0]
        total = correlation if total is None else total + correlation
    assert total is not None
    index = torch.unravel_index(total.abs().argmax(), total.shape)
    return [int(k) - n if int(k) > n // 2 else int(k) for k, n in zip(index, comparison.shape, strict=True)]


def _shift_words(offsets: dict[int, int], shape: tuple[int, ...]) -> str:
    if all(abs(s) == shape[d] // 2 and shape[d] > 3 for d, s in offsets.items()):
        return f"shifted by half the size along dim {_dims_in_words(tuple(offsets))} (fftshift or ifftshift missing)"
    sizes = {abs(s) for s in offsets.values()}
    if len(sizes) == 1:
        size = sizes.pop()
        return f"shifted by {'one pixel' if size == 1 else f'{size} pixels'} along dim {_dims_in_words(tuple(offsets))}"
    return "shifted by " + " and ".join(f"{abs(s)} along dim {d}" for d, s in offsets.items())


def _dims_in_words(dims: tuple[int, ...] | Iterator[int]) -> str:
    return " and ".join(map(str, dims))


__all__ = ["LAST", "MISTAKES", "Mistake"]
