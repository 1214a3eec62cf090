"""The entries of y for which an adjoint is wrong, and the impulse for which it is most wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from adjointlab.numerics import norm
from adjointlab.verify.checked_map import CheckedMap, Tensors
from adjointlab.verify.comparison import Change, Comparison, ranges

_MOST_LOOKS = 64  # largest number of tested ranges of y along one dimension


def wrong_entries_of_y(comparison: Comparison) -> dict[int, list[int]]:
    """Return a map from each dim to the wrong entries of y along it, if only some of them are wrong."""
    if len(comparison.inputs[0]) > 1:
        return {}
    (y,) = comparison.inputs[0]
    found = {}
    for dim, size in enumerate(y.shape):

        def wrong(low: int, high: int, dim: int = dim) -> bool:
            return _is_wrong(comparison.with_changed_inputs(_only({dim: range(low, high)})))

        places = _bisected(wrong, size)
        if 0 < len(places) < size:
            found[dim] = places
    return found


def restricted_to(comparison: Comparison, places: dict[int, list[int]]) -> Comparison:
    """Return the comparison for y restricted to some entries."""
    return comparison.with_changed_inputs(_only(places))


def in_words(places: dict[int, list[int]]) -> str:
    """Return places in words: ``"along dim 3 at 12"``."""
    return ", ".join(f"along dim {dim} at {ranges(list(some))}" for dim, some in places.items())


def _is_wrong(comparison: Comparison) -> bool:
    return comparison.misfit > 4 * comparison.tolerance or (
        norm(comparison.expected) == 0.0 and norm(comparison.found) > 0.0
    )


def _only(places: dict[int, Sequence[int]] | dict[int, list[int]] | dict[int, range]) -> Change:
    def change(t: Tensor) -> Tensor:
        kept = t
        for dim, some in places.items():
            mask = torch.zeros(t.shape[dim], dtype=torch.bool, device=t.device)
            mask[list(some)] = True
            shape = [-1 if d == dim else 1 for d in range(t.ndim)]
            kept = torch.where(mask.reshape(shape), kept, torch.zeros_like(kept))
        return kept

    return change


def _bisected(wrong: Callable[[int, int], bool], size: int) -> list[int]:
    """Return the wrong entries, found by bisection; an empty list if most entries are wrong."""
    looks, places, intervals = 0, [], [(0, size)]
    while intervals:
        low, high = intervals.pop()
        looks += 1
        if looks > _MOST_LOOKS:
            return []
        if not wrong(low, high):
            continue
        if high - low == 1:
            places.append(low)
        else:
            middle = (low + high) // 2
            intervals += [(middle, high), (low, middle)]
    return places


def worst_impulse(adjoint: CheckedMap, reference: CheckedMap, y: Tensors) -> tuple[int, tuple[int, ...]]:
    """Return the leaf and the index of an impulse whose response is about the most wrong, by bisection of y.

    Parameters
    ----------
    adjoint, reference : CheckedMap
        The wrong adjoint and the right adjoint.
    y : tuple of Tensor
        Leaves of a random element on which the adjoints differ.

    Returns
    -------
    tuple
        Leaf and index. Bisection keeps the half with the larger error, which takes ``2 log₂ n`` calls of each adjoint.
    """
    sizes = [t.numel() for t in y]
    low, high = 0, sum(sizes)

    def error(start: int, stop: int) -> float:
        parts, offset = [], 0
        for t, size in zip(y, sizes, strict=True):
            part = torch.zeros_like(t).reshape(-1)
            inside = slice(max(start - offset, 0), max(min(stop - offset, size), 0))
            part[inside] = t.reshape(-1)[inside]
            parts.append(part.reshape(t.shape))
            offset += size
        leaves = tuple(parts)
        gap = tuple(
            a.double() - b.double() if not a.is_complex() else a - b
            for a, b in zip(adjoint(leaves), reference(leaves), strict=True)
        )
        return norm(gap)

    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error(low, middle) >= error(middle, high) else (middle, high)
    leaf = 0
    while low >= sizes[leaf]:
        low -= sizes[leaf]
        leaf += 1
    index = np.unravel_index(low, y[leaf].shape) if y[leaf].ndim else ()
    return leaf, tuple(int(k) for k in index)


__all__ = ["in_words", "restricted_to", "worst_impulse", "wrong_entries_of_y"]
