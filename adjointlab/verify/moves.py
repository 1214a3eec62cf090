"""Mistakes that move entries: shifts, reversals, permutations and transpositions of the result or of y."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import torch
from torch import Tensor

from adjointlab.verify.comparison import Change, Comparison, in_words
from adjointlab.verify.places import permuted_result, permuted_y

Changes = list[tuple[Change | None, Change | None, str]]  # of y, of the result, in words


def changed(comparison: Comparison, changes: Iterable[tuple[Change | None, Change | None, str]]) -> str:
    """Return the first ``after ∘ Aᴴ ∘ before`` that reproduces B, in words."""
    for before, after, words in changes:
        factor = comparison.fit(comparison.changed(before, after))
        if factor is not None:
            return in_words(words, factor)
    return ""


def moved_result(comparison: Comparison) -> str:
    """``B = P Aᴴ`` with a shift, a permutation, a reversal or a transposition P."""
    dims = _long(comparison)
    changes: Changes = []
    if dims and all(tuple(t.shape[1:]) == comparison.shape for t in comparison.expected):
        offsets = _best_shift(comparison, dims)
        moved = {d: offsets[d] for d in dims if offsets[d]}
        for shift in (_rolled, _moved) if moved else ():
            words = _shift_words(moved, comparison.shape)
            changes.append((None, lambda t, shift=shift: shift(t, moved), words))  # type: ignore[misc]
    for some in (some for n in range(len(dims), 0, -1) for some in combinations(dims, n)):
        changes.append((None, lambda t, some=some: t.flip(some), f"reversed along dim {_listed(some)}"))  # type: ignore[misc]
    text = changed(comparison, changes)
    words, factor = ("", 0j) if text else permuted_result(comparison)
    swaps: Changes = [(None, swap, words) for swap, words in _swaps(comparison)]
    return text or (in_words(words, factor) if words else changed(comparison, swaps))


def moved_y(comparison: Comparison) -> str:
    """``B = Aᴴ P``, or ``P Aᴴ P`` as of a convolution and a correlation, with such a P."""
    shapes = {tuple(t.shape) for t in comparison.inputs[0]}
    shape = next(iter(shapes))
    if len(shapes) > 1:
        return ""
    changes: Changes = []
    dims = tuple(d for d in (range(2, len(shape)) if len(shape) > 2 else range(len(shape))) if shape[d] > 2)
    all_and_each = list(dict.fromkeys((dims, *((d,) for d in dims)))) if dims else []
    for some in all_and_each:

        def reverse(t: Tensor, some: tuple[int, ...] = some) -> Tensor:
            return t.flip(some)

        along = "" if some == dims else f" along dim {_listed(some)}"
        if len(shape) == len(comparison.shape):
            changes.append((reverse, reverse, f"kernel not flipped{along}: B is Aᴴ between two reversals"))
        changes.append((reverse, None, f"y reversed along dim {_listed(some)}"))
    words, factor = permuted_y(comparison)
    text = in_words(words, factor) if words else changed(comparison, changes)
    if text:
        return text
    moves = [{d: s} for d in dims for s in (1, -1)]
    moves += [{d: s * (shape[d] // 2) for d in some} for some in all_and_each for s in (1, -1)]
    changes = [(lambda t, m=m: _rolled(t, m), None, f"{_shift_words(m, shape)} in y") for m in moves]  # type: ignore[misc]
    for swap, words in _swaps(comparison):
        changes += [(swap, None, words), (swap, swap, words)]
    return changed(comparison, changes)


def _swaps(comparison: Comparison) -> list[tuple[Change, str]]:
    """Return the transpositions of two dimensions of the same size."""
    pairs = [
        p for p in combinations(range(len(comparison.shape)), 2) if comparison.shape[p[0]] == comparison.shape[p[1]] > 1
    ]
    return [
        (lambda t, i=i, j=j: t.transpose(i, j) if t.ndim > j else t, f"dims {i} and {j} transposed")  # type: ignore[misc]
        for i, j in pairs
    ]


def _best_shift(comparison: Comparison, dims: list[int]) -> list[int]:
    """Return the shift along ``dims`` for which the wrong and right images have the largest correlation."""
    total: Tensor | None = None
    for found, expected in zip(comparison.found, comparison.expected, strict=True):
        product = torch.fft.fftn(found[0], dim=dims) * torch.fft.fftn(expected[0], dim=dims).conj()
        rest = [d for d in range(product.ndim) if d not in dims]
        correlation = torch.fft.ifftn(product.sum(dim=rest, keepdim=True) if rest else product, dim=dims)
        total = correlation if total is None else total + correlation
    assert total is not None
    index = torch.unravel_index(total.abs().argmax(), total.shape)
    return [int(k) - n if int(k) > n // 2 else int(k) for k, n in zip(index, comparison.shape, strict=True)]


def _rolled(t: Tensor, moved: dict[int, int]) -> Tensor:
    return torch.roll(t, list(moved.values()), list(moved))


def _moved(t: Tensor, moved: dict[int, int]) -> Tensor:
    result = _rolled(t, moved)
    for d, s in moved.items():
        result.narrow(d, 0 if s > 0 else t.shape[d] + s, abs(s)).zero_()
    return result


def _shift_words(offsets: dict[int, int], shape: tuple[int, ...]) -> str:
    dims = _listed(tuple(offsets))
    if all(abs(s) == shape[d] // 2 and shape[d] > 3 for d, s in offsets.items()):
        return f"shifted by half the size along dim {dims} (fftshift or ifftshift missing)"
    sizes = {abs(s) for s in offsets.values()}
    if len(sizes) == 1:
        size = sizes.pop()
        return f"shifted by {'one pixel' if size == 1 else f'{size} pixels'} along dim {dims}"
    return "shifted by " + " and ".join(f"{abs(s)} along dim {d}" for d, s in offsets.items())


def _long(comparison: Comparison) -> list[int]:
    """Return the spatial dims of three or more entries; for two entries, a shift equals a reversal."""
    return [d for d in comparison.spatial if comparison.shape[d] > 2]


def _listed(dims: tuple[int, ...]) -> str:
    return " and ".join(map(str, dims))


__all__ = ["Changes", "changed", "moved_result", "moved_y"]
