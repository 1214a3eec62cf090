"""Mistakes in a kernel, found by comparing the impulse responses ``B eₖ`` and ``Aᴴ eₖ`` on their supports.

An impulse response shows a wrong kernel for any stride, dilation, groups and channels. Whole images do not, because
strides and borders break the symmetry between a kernel and the flipped kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from adjointlab.verify.checked_map import CheckedMap, impulse
from adjointlab.verify.comparison import Change, Comparison, Guess

_MOST_CHANNELS = 32  # largest number of channels of y, each of which needs an impulse


@dataclass(frozen=True, eq=False)
class _Patch:
    """Impulse responses at one place, cropped to their support: channels of y, channels of the result, space."""

    values: Tensor
    start: tuple[int, ...]


def kernel(comparison: Comparison) -> str:
    """B's impulse responses are flipped, transposed, conjugated or shifted, in the same way at two places."""
    probes = _probes(comparison)
    for words, change in _changes(probes[0][1].values) if probes else ():
        factors, moves = [], []
        for found, expected in probes:
            image = change(expected.values)
            if image.shape != found.values.shape:
                break
            factor = complex(torch.vdot(image.reshape(-1), found.values.reshape(-1))) / float(
                image.abs().square().sum()
            )
            if float((found.values - factor * image).abs().max()) > comparison.tolerance * float(
                found.values.abs().max()
            ):
                break
            factors.append(factor)
            moves.append(tuple(a - b for a, b in zip(found.start, expected.start, strict=True)))
        alike = len(factors) == len(probes) and abs(factors[0] - factors[-1]) <= comparison.tolerance * abs(factors[0])
        if alike and factors[0]:
            text = _in_words(words, moves)
            if text:
                return Guess.words(text, factors[0])
            # The kernels are equal up to a factor. If the factor is 1, the mistake is elsewhere.
            same = abs(factors[0] - 1) <= comparison.tolerance
            return "" if same else f"{Guess.words('', factors[0])} away from the border"
    return ""


def footprint(comparison: Comparison) -> str:
    """B's impulse responses have another support than the responses of Aᴴ."""
    probes = _probes(comparison)
    sizes = [[tuple(patch.values.shape[2:]) for patch in probe] for probe in probes]
    if not sizes or any(found == expected or [found, expected] != sizes[0] for found, expected in sizes):
        return ""
    got, right = (" × ".join(map(str, size)) for size in sizes[0])
    return f"an impulse reaches {got} pixels where {right} are expected (kernel size or dilation)"


def _in_words(words: str, moves: list[tuple[int, ...]]) -> str:
    """Return the mistake and the shift of the responses in words; empty if there is neither."""
    first = moves[0]
    dims = range(2, len(first) + 2) if len(first) < 4 else range(len(first))
    if any(move != first for move in moves):
        grow = [dims[k] for k in range(len(first)) if moves[-1][k] != first[k]]
        step = f"the step between impulse responses is wrong along dim {' and '.join(map(str, grow))} (stride)"
        return f"{words}, and {step}" if words else step
    moved = " and ".join(f"{abs(s)} along dim {d}" for d, s in zip(dims, first, strict=True) if s)
    text = f"shifted by {moved}" if moved else ""
    return f"{words}, and {text}" if words and text else words or text


def _changes(values: Tensor) -> Iterator[tuple[str, Change]]:
    """Yield the common mistakes with a kernel, in words and as changes of patches."""
    space = list(range(2, values.ndim))
    conjugations: list[tuple[str, Change]] = [("", lambda t: t)]
    if values.imag.any():
        conjugations.append(("conjugate missing", lambda t: t.conj().resolve_conj()))
    exchanges: list[tuple[str, Change]] = [("", lambda t: t)]
    if values.shape[0] == values.shape[1] > 1:
        exchanges.append(("kernel's channels exchanged (in and out)", lambda t: t.transpose(0, 1)))
    for i, j in combinations(space, 2):
        exchanges.append((f"kernel transposed along dims {i} and {j}", lambda t, i=i, j=j: t.transpose(i, j)))  # type: ignore[misc]
    for conjugated, conjugate in conjugations:
        for exchanged, exchange in exchanges:
            for count in (0, *range(len(space), 0, -1)):
                for some in combinations(space, count):
                    along = "" if count == len(space) else f" along dim {' and '.join(map(str, some))}"
                    flipped = f"kernel not flipped{along}" if some else ""
                    words = ", ".join(text for text in (flipped, exchanged, conjugated) if text)

                    def change(
                        t: Tensor,
                        some: tuple[int, ...] = some,
                        exchange: Change = exchange,
                        conjugate: Change = conjugate,
                    ) -> Tensor:
                        return conjugate(exchange(t.flip(some) if some else t))

                    # Flipping a symmetric kernel changes nothing, so it explains nothing.
                    image = change(values)
                    if not words or image.shape != values.shape or not torch.equal(image, values):
                        yield words, change


def _probes(comparison: Comparison) -> list[tuple[_Patch, _Patch]]:
    """Return the patches of B and of Aᴴ at up to two interior places; an empty list if responses are not local."""
    shapes = [spec.shape for space in (comparison.adjoint.space, comparison.adjoint.codomain) for spec in space.specs]
    if len(shapes) != 2 or len(shapes[0]) != len(shapes[1]) or not shapes[0]:
        return []
    shape, sizes = shapes
    lead = 2 if len(shape) > 2 else 0
    if lead and shape[1] > _MOST_CHANNELS:
        return []
    probes = []
    for step in (0, 1, -1):
        place = tuple(min(max(size // 2 + step, 0), size - 1) for size in shape[lead:])
        found, right = (_responses(comparison, side, place) for side in (comparison.adjoint, comparison.reference))
        if found is None or right is None:
            return []
        # A response that reaches the border may be cropped, and would not show the whole kernel.
        ends = [s + n for s, n in zip(right.start, right.values.shape[2:], strict=True)]
        if all(size <= 2 or 0 < s < e < size for s, e, size in zip(right.start, ends, sizes[lead:], strict=True)):
            probes.append((found, right))
    return probes[:2]


def _responses(comparison: Comparison, side: CheckedMap, place: tuple[int, ...]) -> _Patch | None:
    space = side.space
    if len(space.specs[0].shape) > 2:
        rows = [side(impulse(space, 0, (0, c, *place)))[0][0] for c in range(space.specs[0].shape[1])]
    else:
        rows = [side(impulse(space, 0, place))[0][None]]
    return _cut(torch.stack(rows).to(torch.complex128), comparison.tolerance)


def _cut(values: Tensor, tolerance: float) -> _Patch | None:
    """Return the bounding box of the nonzero entries, or None if all entries are zero."""
    lit = values.abs() > tolerance * values.abs().max()
    if not bool(lit.any()):
        return None
    lit = lit.any(dim=0).any(dim=0)
    start, box = [], values
    for dim in range(lit.ndim):
        others = [d for d in range(lit.ndim) if d != dim]
        along = (lit.any(dim=others) if others else lit).nonzero().flatten()
        first, last = int(along[0]), int(along[-1])
        start.append(first)
        box = box.narrow(dim + 2, first, last - first + 1)
    return _Patch(box, tuple(start))


__all__ = ["footprint", "kernel"]
