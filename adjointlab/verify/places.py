"""Mistakes in some places only: near the border, in some entries of the result or of y, in some batch entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

from adjointlab.verify.checked_map import Tensors
from adjointlab.verify.comparison import Change, Comparison, ranges, wide

_MOST_LOOKS = 10  # largest number of tested ranges of y along one dimension
_MOST_ENTRIES = 1024  # largest size of a dimension whose entries are matched
_MOST_PROBES = 6  # largest size of a dimension of y whose entries are tested one by one


def border(comparison: Comparison) -> tuple[str, Tensor | None]:
    """Return in words in which border B is wrong, and the mask of wrong entries; an empty string if also inside."""
    shape, dims = comparison.shape, [d for d in comparison.spatial if comparison.shape[d] > 2]
    if len(comparison.expected) > 1 or not dims:
        return "", None
    wrong = comparison.wrong()
    index = wrong.nonzero()
    if not len(index):
        return "", None
    depth = {d: torch.minimum(index[:, d], shape[d] - 1 - index[:, d]) for d in dims}
    best: tuple[int, int, tuple[int, ...]] | None = None  # the smallest width, then the fewest dimensions
    for count in range(1, len(dims) + 1):
        for some in combinations(dims, count):
            width = int(torch.stack([depth[d] for d in some]).min(dim=0).values.max()) + 1
            if all(4 * width <= shape[d] for d in some) and (best is None or width < best[0]):
                best = width, count, some
    if best is None:
        return "", None
    width, _, some = best
    near = wrong.numel() * (1 - torch.tensor([1 - 2 * width / shape[d] for d in some]).prod().item())
    ends = [bool(wrong.narrow(d, s, width).any()) for d in some for s in (0, shape[d] - width)]
    outermost = any(bool(wrong.narrow(d, s, 1).any()) for d in some for s in (0, shape[d] - 1))
    if len(index) < 0.2 * near / width or not (outermost or all(ends)):
        return "", None
    along = "" if len(some) == len(dims) > 1 else f" along dim {' and '.join(map(str, some))}"
    if len(some) == 1 and not all(ends):
        along = f" at the {'start' if ends[0] else 'end'} of dim {some[0]}"
    return f"border of width {width} wrong{along}", wrong


def batch_mixed(comparison: Comparison) -> str:
    """B maps one batch entry of y to other batch entries of the result, but Aᴴ does not."""
    size = comparison.batch
    if size < 2 or any(t.ndim < 2 or t.shape[0] != size for t in comparison.inputs[0]):
        return ""
    alone = tuple(torch.zeros_like(t) for t in comparison.inputs[0])
    for t, u in zip(alone, comparison.inputs[0], strict=True):
        t[0] = u[0]
    stray = [
        any(bool(t[1:].any()) for t in side(alone) if t.ndim >= 2)
        for side in (comparison.adjoint, comparison.reference)
    ]
    return "batch mixed: batch entry 0 of y reaches other entries of the result" if stray[0] and not stray[1] else ""


def wrong_entries_of_y(comparison: Comparison) -> Iterator[dict[int, list[int]]]:
    """Yield maps from dims to wrong entries of y along them, with one more dim each time, from the last."""
    if len(comparison.inputs[0]) > 1 or len(comparison.found) > 1:
        return
    (y,) = comparison.inputs[0]
    found: dict[int, list[int]] = {}
    whole = _joined(tuple(t[0] for t in comparison.found)), _joined(tuple(t[0] for t in comparison.expected))
    for dim, size in reversed(list(enumerate(y.shape))):

        def images(low: int, high: int, dim: int = dim) -> tuple[Tensor, Tensor]:
            kept = (kept_only({dim: range(low, high)})(y),)
            got, right = (
                _joined(comparison.selected(s(kept)) or ()) for s in (comparison.adjoint, comparison.reference)
            )
            return got, right

        def wrong(got: Tensor, right: Tensor, size: int = size) -> bool:
            sizes = [float(torch.linalg.vector_norm(t)) for t in (got - right, got, right, whole[1])]
            return sizes[0] > comparison.tolerance * max(4 * sizes[1], 4 * sizes[2], sizes[3] / size)

        few = (0, size // 2)  # if both are wrong, all seem to be
        if size < 2 or (size > 2 and all(wrong(*images(k, k + 1)) for k in few)):
            continue
        some = _bisected(images, wrong, whole, size)
        if 0 < len(some) < size:
            found = {dim: some, **found}
            yield found


def _joined(leaves: Tensors) -> Tensor:
    return torch.cat([wide(t).reshape(-1) for t in leaves])


def kept_only(some: dict[int, Sequence[int]]) -> Change:
    """Return the change of a tensor that sets all but some entries along some dimensions to zero."""

    def change(t: Tensor) -> Tensor:
        for dim, entries in some.items():
            mask = torch.zeros(t.shape[dim], dtype=torch.bool, device=t.device)
            mask[list(entries)] = True
            t = torch.where(mask.reshape([-1 if d == dim else 1 for d in range(t.ndim)]), t, torch.zeros_like(t))
        return t

    return change


def _bisected(
    images: Callable[[int, int], tuple[Tensor, Tensor]],
    wrong: Callable[[Tensor, Tensor], bool],
    whole: tuple[Tensor, Tensor],
    size: int,
) -> list[int]:
    """Return the wrong entries, found by bisection; an empty list if that takes too many looks."""
    looks, found, intervals = 0, [], [(0, size, whole)]
    while intervals:
        low, high, (got, right) = intervals.pop()
        if not wrong(got, right):
            continue
        if high - low == 1:
            found.append(low)
            continue
        looks += 1
        if looks > _MOST_LOOKS:
            return []
        middle = (low + high) // 2
        first = images(low, middle)  # the rest is the difference, as both maps are linear
        intervals += [(middle, high, (got - first[0], right - first[1])), (low, middle, first)]
    return found


def permuted_result(comparison: Comparison) -> tuple[str, complex]:
    """Return in words how entries along one dimension of the result are permuted, and the factor."""
    if len(comparison.found) > 1:
        return "", 0.0
    for dim, size in enumerate(comparison.shape):
        if not 1 < size <= _MOST_ENTRIES:
            continue
        found, expected = (t[0].movedim(dim, 0).reshape(size, -1) for (t,) in (comparison.found, comparison.expected))
        order = _matching(found, expected, comparison.tolerance)
        if order is not None:
            factor = comparison.fit(comparison.changed(after=_reordering(dim, order)))
            if factor is not None:
                return f"entries along dim {dim} permuted: {_cycles(order)}", factor
    return "", 0.0


def permuted_y(comparison: Comparison) -> tuple[str, complex]:
    """Return in words how entries along one dimension of y are permuted, and the factor."""
    shapes = {tuple(t.shape) for t in comparison.inputs[0]}
    for dim, size in enumerate(next(iter(shapes)) if len(shapes) == 1 else ()):
        if not 1 < size <= _MOST_PROBES:
            continue
        rows: tuple[list[Tensor], list[Tensor]] = ([], [])
        for entry in range(size):
            alone = tuple(torch.zeros_like(t) for t in comparison.inputs[0])
            for t, u in zip(alone, comparison.inputs[0], strict=True):
                t.select(dim, entry).copy_(u.select(dim, 0))
            for side, images in zip((comparison.adjoint, comparison.reference), rows, strict=True):
                images.append(torch.cat([t.reshape(-1) for t in comparison.selected(side(alone)) or ()]))
        order = _matching(torch.stack(rows[0]), torch.stack(rows[1]), comparison.tolerance)
        if order is not None:  # B treats entry k of y as if it were entry order[k]
            index = sorted(range(size), key=order.__getitem__)
            factor = comparison.fit(comparison.changed(before=_reordering(dim, index)))
            if factor is not None:
                return f"entries of y along dim {dim} permuted: {_cycles(index)}", factor
    return "", 0.0


def _reordering(dim: int, order: list[int]) -> Change:
    return lambda t: t.index_select(dim, torch.tensor(order, device=t.device))


def _matching(found: Tensor, expected: Tensor, tolerance: float) -> list[int] | None:
    """Return, for each row of ``found``, the row of ``expected`` that it is a multiple of, if that is a permutation."""
    both = torch.promote_types(found.dtype, expected.dtype)
    found, expected = found.to(both), expected.to(both)
    sizes = [torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in (found, expected)]
    if any(bool((size == 0).any()) for size in sizes) or found.shape[1] < 2:
        return None
    best, order = ((found / sizes[0]) @ (expected / sizes[1]).mH).abs().max(dim=1)
    entries = [int(k) for k in order]
    identity = list(range(len(entries)))
    if float(best.min()) < 1 - tolerance or sorted(entries) != identity or entries == identity:
        return None
    return entries


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


def entries_in_words(some: dict[int, list[int]]) -> str:
    """Return places in words: ``"along dim 3 at 12"``."""
    return ", ".join(f"along dim {dim} at {ranges(entries)}" for dim, entries in some.items())


def is_border(some: dict[int, list[int]], shape: tuple[int, ...]) -> bool:
    """Return whether wrong entries of y are at both ends of a dimension."""
    return any(entries[0] == 0 and entries[-1] == shape[dim] - 1 for dim, entries in some.items())


__all__ = [
    "batch_mixed", "border", "entries_in_words", "is_border", "kept_only", "permuted_result", "permuted_y",
    "wrong_entries_of_y",
]  # fmt: skip
