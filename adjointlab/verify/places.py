"""Mistakes in some places only: near the border, in some entries of the result or of y, in some batch entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from adjointlab.numerics import wide
from adjointlab.verify.checked_map import Tensors, listed
from adjointlab.verify.comparison import Comparison, places, ranges
from adjointlab.verify.values import is_zero, value

_MOST_LOOKS = 10  # largest number of tested ranges of y along one dimension


def border(comparison: Comparison) -> str:
    """Return in words in which border B is wrong; an empty string if also inside."""
    shape, dims = comparison.shape, comparison.spatial
    wrong = comparison.wrong()
    index = wrong.nonzero()
    if len(comparison.expected) > 1 or not dims or not len(index):
        return ""
    depth = {d: torch.minimum(index[:, d], shape[d] - 1 - index[:, d]) for d in dims}
    subsets = [some for count in range(1, len(dims) + 1) for some in combinations(dims, count)]
    widths = {some: int(torch.stack([depth[d] for d in some]).min(dim=0).values.max()) + 1 for some in subsets}
    narrow = [some for some in subsets if all(4 * widths[some] <= shape[d] for d in some)]
    if not narrow:
        return ""
    some = min(narrow, key=widths.__getitem__)  # the smallest width, then the fewest dimensions
    width = widths[some]
    near = wrong.numel() * (1 - math.prod(1 - 2 * width / shape[d] for d in some))
    ends = [bool(wrong.narrow(d, s, width).any()) for d in some for s in (0, shape[d] - width)]
    outermost = any(bool(wrong.narrow(d, s, 1).any()) for d in some for s in (0, shape[d] - 1))
    if len(index) < 0.2 * near / width or not (outermost or all(ends)):
        return ""
    along = "" if len(some) == len(dims) > 1 else f" along dim {listed(some)}"
    if len(some) == 1 and not all(ends):
        along = f" at the {'start' if ends[0] else 'end'} of dim {some[0]}"
    return f"border of width {width} wrong{along}"


def in_places(comparison: Comparison) -> str:
    """Some entries of the result are wrong: near the border, or by a known mistake with values."""
    if len(comparison.found) > 1:
        return ""
    where, wrong = border(comparison), comparison.wrong()
    if not 0 < float(wrong.double().mean()) <= 0.5 and not where:
        return ""
    alone = comparison.part(lambda leaves: tuple(t[wrong] for t in leaves))
    text = "zero there (never written)" if is_zero(alone) else value(alone)
    if not where:
        return f"{places(wrong)}: {text}" if text else ""
    return f"{where}: {text}" if text else f"{where}, and right inside"


def in_batch(comparison: Comparison) -> str:
    """B is wrong for some batch entries only, by a known mistake with values."""
    if comparison.batch < 2:
        return ""
    wrong = [comparison.wrong(k).flatten(1).any(dim=1) for k in range(len(comparison.expected))]
    entries = torch.stack(wrong).any(dim=0).nonzero().flatten()
    if not 0 < len(entries) < comparison.batch:
        return ""
    inner = value(comparison.part(lambda leaves: tuple(t.index_select(0, entries) for t in leaves)))
    return f"batch entry {', '.join(map(str, entries.tolist()))} only: {inner}" if inner else ""


def batch_mixed(comparison: Comparison) -> str:
    """B maps one batch entry of y to other batch entries of the result, but Aᴴ does not."""
    size = comparison.batch
    if size < 2 or any(t.ndim < 2 or t.shape[0] != size for t in comparison.inputs[0]):
        return ""
    alone = _kept_only(comparison.inputs[0], {0: [0]})
    stray = [any(bool(t[1:].any()) for t in side(alone) if t.ndim >= 2) for side in comparison.sides]
    return "batch mixed: batch entry 0 of y reaches other entries of the result" if stray[0] and not stray[1] else ""


def ignored(comparison: Comparison) -> str:
    """B is wrong for some entries of y only, by a known mistake; most often it ignores them."""
    for some in _wrong_entries_of_y(comparison):
        shape = comparison.inputs[0][0].shape
        # A wrong batch entry and a wrong border (both ends) are separate mistakes.
        both_ends = any(entries[0] == 0 and entries[-1] == shape[dim] - 1 for dim, entries in some.items())
        if not (comparison.batch > 1 and set(some) == {0}) and not both_ends:
            alone = comparison.with_inputs(tuple(_kept_only(y, some) for y in comparison.inputs))
            text = value(alone)
            where = ", ".join(f"along dim {dim} at {ranges(entries)}" for dim, entries in some.items())
            if text:
                return f"y is ignored {where}" if is_zero(alone) else f"only for y {where}: {text}"
    return ""


def _wrong_entries_of_y(comparison: Comparison) -> Iterator[dict[int, list[int]]]:
    """Yield maps from dims to wrong entries of y along them, with one more dim each time, from the last."""
    y = comparison.inputs[0]
    if len(y) > 1 or len(comparison.found) > 1:
        return
    found: dict[int, list[int]] = {}
    whole = torch.stack([t[0].reshape(-1) for t in (*comparison.found, *comparison.expected)])

    def images(entries: Sequence[int], dim: int) -> Tensor:
        kept = _kept_only(y, {dim: entries})
        return torch.stack([wide(comparison.select(side(kept))[0]).reshape(-1) for side in comparison.sides])

    def is_wrong(both: Tensor, size: int) -> bool:
        sizes = [float(torch.linalg.vector_norm(t)) for t in (both[0] - both[1], *both, whole[1])]
        return sizes[0] > comparison.tolerance * max(4 * sizes[1], 4 * sizes[2], sizes[3] / size)

    for dim, size in reversed(list(enumerate(y[0].shape))):
        few = (0, size // 2)  # if both are wrong, all seem to be
        if size < 2 or (size > 2 and all(is_wrong(images([k], dim), size) for k in few)):
            continue
        some = _bisected(range(size), whole, partial(images, dim=dim), partial(is_wrong, size=size))
        if 0 < len(some) < size:
            found = {dim: some, **found}
            yield found


def _bisected(
    entries: Sequence[int], whole: Tensor, images: Callable[[Sequence[int]], Tensor], is_wrong: Callable[[Tensor], bool]
) -> list[int]:
    """Return the wrong entries, found by bisection; an empty list if that takes too many looks."""
    looks, pending = 0, [(entries, whole)]
    found: list[int] = []
    while pending:
        some, both = pending.pop()
        if not is_wrong(both):
            continue
        if len(some) == 1:
            found += some
            continue
        looks += 1
        if looks > _MOST_LOOKS:
            return []
        half = len(some) // 2
        first = images(some[:half])  # the rest is the difference, as both maps are linear
        pending += [(some[half:], both - first), (some[:half], first)]
    return found


def _kept_only(leaves: Tensors, some: Mapping[int, Sequence[int]]) -> Tensors:
    """Return the leaves with all but some entries along some dimensions set to zero."""
    for dim, entries in some.items():
        kept = [torch.tensor(entries, device=t.device) for t in leaves]
        parts = [(t, k, t.index_select(dim, k)) for t, k in zip(leaves, kept, strict=True)]
        leaves = tuple(torch.zeros_like(t).index_copy(dim, k, part) for t, k, part in parts)
    return leaves
