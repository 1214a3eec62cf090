"""Mistakes that move entries: shifts, reversals, permutations and transpositions of the result or of y."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from adjointlab.verify.checked_map import listed
from adjointlab.verify.comparison import Change, Comparison, stacked

_MOST_ENTRIES = 1024  # largest size of a dimension whose entries are matched
_MOST_PROBES = 6  # largest size of a dimension of y whose entries are tested one by one

Changes = Iterator[tuple[str, Change | None, Change | None]]  # in words, of y, of the result


def moved_result(comparison: Comparison) -> str:
    """``B = P Aᴴ`` with a shift, a permutation, a reversal or a transposition P."""
    return comparison.first(_of_result(comparison))


def _of_result(comparison: Comparison) -> Changes:
    dims, shape = comparison.spatial, comparison.shape
    if dims and all(tuple(t.shape[1:]) == shape for t in comparison.expected):
        moved = _best_shift(comparison)
        for shift in (_rolled, _moved) if moved else ():
            yield _shift_words(moved, shape), None, partial(shift, moved=moved)
    for some in (some for n in range(len(dims), 0, -1) for some in combinations(dims, n)):
        yield f"reversed along dim {listed(some)}", None, partial(torch.flip, dims=some)
    if len(comparison.found) == 1:
        for dim, size in enumerate(shape):
            rows = [t[0].movedim(dim, 0).reshape(size, -1) for (t,) in (comparison.found, comparison.expected)]
            order = _matching(rows[0], rows[1], comparison.tolerance) if 1 < size <= _MOST_ENTRIES else None
            if order is not None:
                words = f"entries along dim {dim} permuted: {_cycles(order)}"
                yield words, None, partial(_reordered, dim=dim, order=order)
    for words, swap in _swaps(shape):
        yield words, None, swap


def moved_y(comparison: Comparison) -> str:
    """``B = Aᴴ P``, or ``P Aᴴ P`` as of a convolution and a correlation, with such a P."""
    shapes = {tuple(t.shape) for t in comparison.inputs[0]}
    return comparison.first(_of_y(comparison, shapes.pop())) if len(shapes) == 1 else ""


def _of_y(comparison: Comparison, shape: tuple[int, ...]) -> Changes:
    for dim, size in enumerate(shape):
        order = _order_of_y(comparison, dim, size) if 1 < size <= _MOST_PROBES else None
        if order is not None:
            index = sorted(range(size), key=order.__getitem__)
            words = f"entries of y along dim {dim} permuted: {_cycles(index)}"
            yield words, partial(_reordered, dim=dim, order=index), None
    dims = tuple(d for d in (range(2, len(shape)) if len(shape) > 2 else range(len(shape))) if shape[d] > 2)
    all_and_each = list(dict.fromkeys((dims, *((d,) for d in dims)))) if dims else []
    for some in all_and_each:
        reverse = partial(torch.flip, dims=some)
        along = "" if some == dims else f" along dim {listed(some)}"
        if len(shape) == len(comparison.shape):
            yield f"kernel not flipped{along}: B is Aᴴ between two reversals", reverse, reverse
        yield f"y reversed along dim {listed(some)}", reverse, None
    moves = [{d: s} for d in dims for s in (1, -1)]
    moves += [{d: s * (shape[d] // 2) for d in some} for some in all_and_each for s in (1, -1)]
    for moved in moves:
        yield f"{_shift_words(moved, shape)} in y", partial(_rolled, moved=moved), None
    for words, swap in _swaps(comparison.shape):
        yield words, swap, None
        yield words, swap, swap


def _swaps(shape: tuple[int, ...]) -> Iterator[tuple[str, Change]]:
    """Yield the transpositions of two dimensions of the same size."""
    for i, j in combinations(range(len(shape)), 2):
        if shape[i] == shape[j] > 1:
            yield f"dims {i} and {j} transposed", partial(_transposed, i=i, j=j)


def _transposed(t: Tensor, i: int, j: int) -> Tensor:
    return t.transpose(i, j) if t.ndim > j else t


def _best_shift(comparison: Comparison) -> dict[int, int]:
    """Return the shift along spatial dims for which the wrong and right images have the largest correlation."""
    dims, total = comparison.spatial, comparison.found[0].new_zeros(())
    for found, expected in zip(comparison.found, comparison.expected, strict=True):
        product = torch.fft.fftn(found[0], dim=dims) * torch.fft.fftn(expected[0], dim=dims).conj()
        rest = [d for d in range(product.ndim) if d not in dims]
        total = total + torch.fft.ifftn(product.sum(dim=rest, keepdim=True) if rest else product, dim=dims)
    index = torch.unravel_index(total.abs().argmax(), total.shape)
    offsets = [int(k) - n if int(k) > n // 2 else int(k) for k, n in zip(index, comparison.shape, strict=True)]
    return {d: offsets[d] for d in dims if offsets[d]}


def _rolled(t: Tensor, moved: dict[int, int]) -> Tensor:
    return torch.roll(t, list(moved.values()), list(moved))


def _moved(t: Tensor, moved: dict[int, int]) -> Tensor:
    result = _rolled(t, moved)
    for d, s in moved.items():
        result.narrow(d, 0 if s > 0 else t.shape[d] + s, abs(s)).zero_()
    return result


def _reordered(t: Tensor, dim: int, order: list[int]) -> Tensor:
    return t.index_select(dim, torch.tensor(order, device=t.device))


def _shift_words(offsets: dict[int, int], shape: tuple[int, ...]) -> str:
    dims = listed(offsets)
    if all(abs(s) == shape[d] // 2 and shape[d] > 3 for d, s in offsets.items()):
        return f"shifted by half the size along dim {dims} (fftshift or ifftshift missing)"
    sizes = {abs(s) for s in offsets.values()}
    if len(sizes) == 1:
        size = sizes.pop()
        return f"shifted by {'one pixel' if size == 1 else f'{size} pixels'} along dim {dims}"
    return "shifted by " + " and ".join(f"{abs(s)} along dim {d}" for d, s in offsets.items())


def _order_of_y(comparison: Comparison, dim: int, size: int) -> list[int] | None:
    """Return for each entry k of y the entry order[k] that B takes it for, if that is a permutation."""
    rows = []
    for entry in range(size):
        alone = tuple(torch.zeros_like(t) for t in comparison.inputs[0])
        for t, u in zip(alone, comparison.inputs[0], strict=True):
            t.select(dim, entry).copy_(u.select(dim, 0))
        images = [comparison.select(side(alone)) for side in comparison.sides]
        rows.append(tuple(torch.cat([t.reshape(-1) for t in image]) for image in images))
    found, expected = stacked(rows)
    return _matching(found, expected, comparison.tolerance)


def _matching(found: Tensor, expected: Tensor, tolerance: float) -> list[int] | None:
    """Return, for each row of ``found``, the row of ``expected`` that it is a multiple of, if that is a permutation."""
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
