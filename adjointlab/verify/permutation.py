"""Recognition of permuted entries along one dimension: ``B = P Aᴴ`` or ``Aᴴ P`` with a permutation P."""

from __future__ import annotations

import torch
from torch import Tensor

from adjointlab.verify.comparison import Change, Comparison, Guess

_MOST_PROBES = 64  # largest size of a dimension of y whose entries are tested one by one
_MOST_ENTRIES = 1024


def permuted(comparison: Comparison) -> str:
    """Entries along one dimension of the result, or of y, are permuted."""
    if len(comparison.found) > 1:
        return ""
    for dim in range(comparison.ndim):
        found, expected = (_rows(t, dim + 1) for (t,) in (comparison.found, comparison.expected))
        order = _matching(found, expected, comparison.tolerance)
        if order is not None:
            index = torch.tensor(order, device="cpu")
            guess = comparison.fit(comparison.changed(after=_reordering(dim, index)))
            if guess.fits:
                return Guess.words(f"entries along dim {dim} permuted: {_cycles(order)}", guess.factor)
    return _permuted_input(comparison)


def _permuted_input(comparison: Comparison) -> str:
    shapes = {tuple(t.shape) for t in comparison.inputs[0]}
    if len(shapes) > 1:
        return ""
    (shape,) = shapes
    for dim, size in enumerate(shape):
        if not 1 < size <= _MOST_PROBES:
            continue
        images = []
        for entry in range(size):

            def alone(t: Tensor, dim: int = dim, entry: int = entry) -> Tensor:
                only = torch.zeros_like(t)
                only.select(dim, entry).copy_(t.select(dim, 0))
                return only

            images.append(comparison.with_changed_inputs(alone))
        found, expected = (
            torch.stack([getattr(image, name)[0].reshape(-1) for image in images]) for name in ("found", "expected")
        )
        order = _matching(found, expected, comparison.tolerance)
        if order is not None:
            # B treats entry k of y as if it were entry order[k].
            index = torch.tensor(order, device="cpu").argsort()
            guess = comparison.fit(comparison.changed(before=_reordering(dim, index)))
            if guess.fits:
                return Guess.words(f"entries of y along dim {dim} permuted: {_cycles(index.tolist())}", guess.factor)
    return ""


def _reordering(dim: int, index: Tensor) -> Change:
    return lambda t: t.index_select(dim, index.to(t.device))


def _rows(t: Tensor, dim: int) -> Tensor:
    return t.movedim(dim, 0).reshape(t.shape[dim], -1)


def _matching(found: Tensor, expected: Tensor, tolerance: float) -> list[int] | None:
    """Return, for each row of ``found``, the row of ``expected`` that it is a multiple of, if that is a permutation."""
    count = len(found)
    if not 1 < count <= _MOST_ENTRIES or found.shape != expected.shape:
        return None
    wide = torch.promote_types(found.dtype, expected.dtype)
    sizes = [torch.linalg.vector_norm(t, dim=1, keepdim=True).to(wide) for t in (found, expected)]
    if any(bool((size == 0).any()) for size in sizes):
        return None
    cosines = ((found.to(wide) / sizes[0]) @ (expected.to(wide) / sizes[1]).mH).abs()
    best, order = cosines.max(dim=1)
    if float(best.min()) < 1 - tolerance or len(set(order.tolist())) < count:
        return None
    places = [int(k) for k in order]
    return None if places == list(range(count)) else places


def _cycles(order: list[int]) -> str:
    """Return a permutation in words; ``0 → 1`` means that the entry that belongs at 0 is at 1."""
    goes = {source: place for place, source in enumerate(order)}
    texts, seen = [], set()
    for start in range(len(order)):
        cycle = [start]
        while goes[cycle[-1]] != start:
            cycle.append(goes[cycle[-1]])
        if len(cycle) > 1 and start not in seen:
            short = cycle if len(cycle) <= 6 else [*cycle[:6], "…"]
            texts.append(" ↔ ".join(map(str, cycle)) if len(cycle) == 2 else " → ".join(map(str, [*short, start])))
        seen.update(cycle)
    return "; ".join(texts[:4]) + ("; …" if len(texts) > 4 else "")


__all__ = ["permuted"]
