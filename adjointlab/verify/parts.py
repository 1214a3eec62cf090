"""Which part of y, or of the result, an adjoint treats wrongly; and the impulse that it treats worst."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from adjointlab.numerics import norm
from adjointlab.verify.evidence import Change, Evidence, ranges
from adjointlab.verify.side import Side, Tensors

_MOST_LOOKS = 64  # at parts of y along one dimension


def wrong_entries_of_y(evidence: Evidence) -> dict[int, list[int]]:
    """Return, for the dims along which only some entries of y are treated wrongly, which these are."""
    if len(evidence.inputs[0]) > 1:
        return {}
    (y,) = evidence.inputs[0]
    found = {}
    for dim, size in enumerate(y.shape):
        places = _bisected(lambda low, high, dim=dim: _is_wrong(evidence.of(_only({dim: range(low, high)}))), size)  # type: ignore[misc]
        if 0 < len(places) < size:
            found[dim] = places
    return found


def of_entries(evidence: Evidence, places: dict[int, list[int]]) -> Evidence:
    """Return the evidence of those entries of y alone."""
    return evidence.of(_only(places))


def said(places: dict[int, list[int]]) -> str:
    """Return places in words: ``"along dim 3 at 12"``."""
    return ", ".join(f"along dim {dim} at {ranges(list(some))}" for dim, some in places.items())


def _is_wrong(evidence: Evidence) -> bool:
    return evidence.misfit > 4 * evidence.tolerance or (norm(evidence.expected) == 0.0 and norm(evidence.found) > 0.0)


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
    """Return the wrong entries, found by halving; nothing if that needs too many looks: then most are wrong."""
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


def worst_impulse(adjoint: Side, reference: Side, y: Tensors) -> tuple[int, tuple[int, ...]]:
    """Return the leaf and the index of an impulse whose response is wrong, and nearly the worst, by halving y.

    Parameters
    ----------
    adjoint, reference : Side
        The adjoint at hand and the right one.
    y : tuple of Tensor
        Random leaves, on which they differ.

    Returns
    -------
    tuple
        The half with the larger error is kept until one entry is left: some ``2 log₂ n`` calls of each.
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


__all__ = ["of_entries", "said", "worst_impulse", "wrong_entries_of_y"]
