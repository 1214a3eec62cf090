"""Diagnosis of a wrong derivative in words: which of J and J.H is wrong, where, and how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adjointlab.jacobians import Jacobian
from adjointlab.space.coordinates import place_of
from adjointlab.verify.differences import Along, Differences, flat


def diagnose(test: Differences, J: Jacobian, seen: Sequence[Along], dot_holds: bool) -> str:
    """Return the mistake in words, for a test that has failed; finite differences tell which of J and J.H it is."""
    wrong = [along for along in seen if bool(along.wrong.any())]
    if wrong:
        adjoint_is_right = all(_agrees(test, J, along) for along in seen)
        if adjoint_is_right and not dot_holds:
            why = "the derivative of the backward is wrong"
            return f"J is wrong, though J.H is right ({why}): {_mistake(test, J, seen, wrong)}"
        return f"the backward of f is wrong: {_mistake(test, J, seen, wrong)}"
    if any(bool(along.kinks.any()) for along in seen):
        along = next(along for along in seen if bool(along.kinks.any()))
        count = int(torch.stack([a.kinks for a in seen]).any(0).sum())
        where = entry_of(test, int(along.kinks.nonzero()[0]))
        more = f" and {count - 1} more" if count > 1 else ""
        apart = f"one-sided differences stay apart in {where}{more}"
        return f"f has a kink at x0: {apart}, so f has no derivative there; move x0"
    return "J.H is wrong: it is not the adjoint of J, and finite differences agree with J"


def _agrees(test: Differences, J: Jacobian, along: Along) -> bool:
    """Return whether ``Re⟨d, Jᴴ v⟩`` is what finite differences make of ``Re⟨J d, v⟩``."""
    v = test.codomain.leaves(test.codomain.randn(test.generator))
    back = flat(test.domain.leaves(J.H(test.codomain.unflatten(v))))
    left, right = (along.estimate.conj() * flat(v)).sum().real, (flat(along.direction).conj() * back).sum().real
    return bool((left - right).abs() <= (along.bound * flat(v).abs()).sum())


def _mistake(test: Differences, J: Jacobian, seen: Sequence[Along], wrong: Sequence[Along]) -> str:
    """Return a common mistake that reproduces J d in all directions, and where it is made."""
    where, rows = _where(test, seen, wrong)
    for words, change in (("transposed", _transposed), ("conjugated", _conjugated)):
        changed = [(along, change(test, J, along)) for along in wrong]
        if all(c is not None and bool(((a.estimate - c).abs() <= a.bound).all()) for a, c in changed):
            return f"J is {words}"
    factor = _factor(wrong, rows)
    if factor is not None:
        return f"J is {factor}{where}"
    entries = torch.stack([along.wrong for along in wrong]).any(0) & rows
    count, of = int(entries.sum()), int(rows.sum())
    worst = max(wrong, key=lambda along: float((along.gap / along.bound.clamp(min=1e-300))[rows].max()))
    share = float(worst.gap[rows].norm() / worst.estimate[rows].norm().clamp(min=1e-300))
    is_one = count == 1 and of > 1
    places = f" in {entry_of(test, int(entries.nonzero()[0]))} alone" if is_one else f" in {count} of {of} entries"
    return f"J d is off by {share:.2g} of its size{places}{where}"


def _transposed(test: Differences, J: Jacobian, along: Along) -> Tensor | None:
    if test.domain.specs != test.codomain.specs:
        return None
    leaves = test.codomain.leaves(test.codomain.unflatten(along.direction))
    real = tuple(t.conj() for t in leaves)  # Jᵀ d is conj(Jᴴ conj(d))
    return flat(test.domain.leaves(J.H(test.codomain.unflatten(real)))).conj()


def _conjugated(_: Differences, __: Jacobian, along: Along) -> Tensor | None:
    return along.predicted.conj() if along.predicted.is_complex() else None


def _where(test: Differences, seen: Sequence[Along], wrong: Sequence[Along]) -> tuple[str, Tensor]:
    """Return in words the leaves that are wrong, where others are right, and the entries of those of f."""
    parts = torch.stack([along.wrong for along in wrong]).any(0).split(test.sizes)
    leaves = [bool(part.any()) for part in parts]
    rows = torch.cat([torch.full_like(part, is_wrong) for part, is_wrong in zip(parts, leaves, strict=True)])
    words = []
    if not all(leaves):
        words.append(f"in leaf {', '.join(str(k) for k, is_wrong in enumerate(leaves) if is_wrong)} of f")
    alone = [along for along in seen if along.name.startswith("leaf")]
    if alone and any(map(_is_wrong, alone)) and not all(map(_is_wrong, alone)):
        words.append(f"with respect to {', '.join(a.name.removesuffix(' alone') for a in alone if _is_wrong(a))}")
    return "".join(f" {word}" for word in words), rows


def _is_wrong(along: Along) -> bool:
    return bool(along.wrong.any())


def _factor(wrong: Sequence[Along], rows: Tensor) -> str | None:
    """Return the factor between J and the derivative in words, if one factor explains all that is wrong."""
    alone = [along for along in wrong if along.name.startswith("leaf")] or list(wrong)
    found = torch.cat([along.predicted[rows] for along in alone])
    right, bound = (torch.cat([getattr(along, name)[rows] for along in alone]) for name in ("estimate", "bound"))
    if not bool(found.any()):
        return "zero (detached, or never written)"
    power = right.abs().square().sum().clamp(min=1e-300)
    factor = complex((right.conj() * found).sum() / power)
    unsure = bound + (right.abs() * bound).sum() / power * right.abs()  # of an entry, and of the factor
    if not bool(((found - factor * right).abs() <= (1 + abs(factor)) * unsure).all()):
        return None
    if abs(factor.imag) > 1e-3 * abs(factor):
        return f"off by the complex factor {factor.real:.3f}{factor.imag:+.3f}j"
    size = abs(factor.real)
    scale = f"{max(size, 1 / size):.4g} × too {'large' if size > 1 else 'small'}"
    if factor.real >= 0:
        return scale
    return "of the wrong sign" if abs(size - 1) < 1e-3 else f"of the wrong sign, and {scale}"


def entry_of(test: Differences, number: int) -> str:
    """Return the place of an entry of f in words."""
    leaf, index = place_of(test.codomain, number)
    of = f" of leaf {leaf}" if len(test.sizes) > 1 else ""
    spot = f"entry {index[0] if len(index) == 1 else index}{of} of f"
    return spot if of or test.codomain.specs[leaf].numel > 1 else "f"
