"""The common mistakes, each as a candidate for B; the first that reproduces the images of B is the diagnosis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adjointlab.numerics import norm
from adjointlab.verify.checked_map import CheckedMap, ExhaustedError, Tensors
from adjointlab.verify.comparison import Candidate, Comparison, far, in_words, places, stacked, wide
from adjointlab.verify.moves import Changes, changed, moved_result, moved_y
from adjointlab.verify.pieces import Mistake
from adjointlab.verify.places import (
    batch_mixed,
    border,
    entries_in_words,
    is_border,
    kept_only,
    wrong_entries_of_y,
)

_OF_PIECES = 24  # applications of A's program with a mistake, before other mistakes have their turn


@dataclass(frozen=True)
class Search:
    """The forward map, the mistakes with A's own pieces, and the tensors that A reads, by name."""

    forward: CheckedMap
    pieces: Callable[[], Iterable[Mistake]]
    tensors: dict[str, Tensor]

    def first(self, comparison: Comparison) -> str:
        """Return the first mistake that reproduces B, in words; an empty string if none does."""
        costly = (
            value, self._pieces, batch_mixed, moved_result, _conjugate_or_part_of_y, _phase, self._one_sided,
            self._itself, _ignored, moved_y, self._inverse,
        )  # fmt: skip
        try:
            text = _first(comparison, costly)
            is_factor = text.startswith("Aᴴ is ") and ("too small" in text or "too large" in text)
            return (
                f"{text}: B is the inverse of A"
                if is_factor and self._inverse(comparison)
                else text or self._last(comparison)
            )
        except ExhaustedError:
            return self._last(comparison)

    def _last(self, comparison: Comparison) -> str:
        """Return the first mistake among those that take no application of an operator."""
        return _first(comparison, (_in_batch, _in_places, self._entrywise, _nearly_right))

    def _pieces(self, comparison: Comparison) -> str:
        if [t.shape for t in comparison.inputs[0]] != [s.shape for s in comparison.adjoint.space.specs]:
            return ""  # the program is for the nominal batch size
        least = comparison.meter.left - _OF_PIECES
        for mistake in self.pieces():
            words, turned = mistake.words, mistake.turned
            factor = comparison.fit(comparison.of_program(mistake.function))
            if factor is not None:
                if turned is not None and self._is_linear_in(comparison, turned):
                    words = words.replace("conjugate missing", "one conjugate too many")
                where = border(comparison)[0] if words.startswith("wrong padding mode") else ""
                return in_words(f"{where} ({words.removeprefix('wrong ')})" if where else words, factor)
            if comparison.meter.left < least:
                break
        return ""

    @staticmethod
    def _is_linear_in(comparison: Comparison, turned: Callable[[Tensors], Tensors]) -> bool:
        """Return whether Aᴴ for i times a tensor is ``i Aᴴ``, and so linear in the tensor, not antilinear."""
        image = comparison.selected(turned(comparison.inputs[0]))
        return image is not None and not any(
            far(wide(t), 1j * e[0], comparison.tolerance) for t, e in zip(image, comparison.expected, strict=True)
        )

    def _itself(self, comparison: Comparison) -> str:
        """``B = A``, up to conjugation."""
        if self.forward.space != self.forward.codomain:
            return ""
        images = [self.forward(y) for y in comparison.inputs]
        for change, words in ((lambda t: t, "B is A itself, not its adjoint"), (_conj, "B is A conjugated")):
            factor = comparison.fit(lambda k, change=change: comparison.selected(tuple(change(t) for t in images[k])))  # type: ignore[misc]
            if factor is not None:
                return in_words(words, factor)
        return ""

    def _is_inverse(self, comparison: Comparison) -> bool:
        """Return whether ``A B = 1`` or ``B A = 1`` on two draws."""
        adjoint, forward = comparison.adjoint, self.forward
        wide_enough = forward.space.size >= forward.codomain.size
        first, second = (adjoint, forward) if wide_enough else (forward, adjoint)
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            z = first.space.leaves(first.space.randn(generator))
            image = second(first(z))
            if any(far(a, b, comparison.tolerance) for a, b in zip(z, image, strict=True)):
                return False
        return True

    def _inverse(self, comparison: Comparison) -> str:
        whole = comparison.number is None and [t.shape for t in comparison.inputs[0]] == [
            s.shape for s in comparison.adjoint.space.specs
        ]
        return "B is an inverse of A, not its adjoint" if whole and self._is_inverse(comparison) else ""

    def _one_sided(self, comparison: Comparison) -> str:
        """B counts the frequencies of a one-sided transform twice, or once where Aᴴ counts them twice."""
        y = comparison.inputs[0]
        if len(y) > 1 or len(comparison.found) > 1 or y[0].is_complex() == comparison.expected[0].is_complex():
            return ""
        of_y = y[0].is_complex()
        for dim, size in enumerate(y[0].shape if of_y else comparison.shape):
            for ends in ({0, size - 1}, {0}) if size > 2 else ():
                inner = [k for k in range(size) if k not in ends]
                for weight in (2.0, 0.5):

                    def weighted(t: Tensor, inner: list[int] = inner, weight: float = weight, dim: int = dim) -> Tensor:
                        return torch.where(kept_only({dim: inner})(torch.ones_like(t)) != 0, weight * t, t)

                    candidate = comparison.changed(weighted if of_y else None, None if of_y else weighted)
                    size_words = "too large" if weight > 1 else "too small"
                    words = (
                        f"frequencies {inner[0]}–{inner[-1]} along dim {dim} are 2.000 × {size_words} "
                        "(a one-sided transform)"
                    )
                    factor = comparison.fit(candidate)
                    if factor is not None:
                        return in_words(words, factor)
                    rest = self._entrywise(comparison, candidate) if of_y else ""
                    if rest:
                        return f"{words}, and {rest}"
        return ""

    def _entrywise(self, comparison: Comparison, candidate: Candidate | None = None) -> str:
        """``B = D Aᴴ`` with a diagonal D, which two draws determine."""
        right = comparison.expected
        if candidate is not None:
            images = [candidate(draw) for draw in range(2)]
            right = stacked([image for image in images if image is not None])
        diagonals = []
        for found, expected in zip(comparison.found, right, strict=True):
            if found.shape != expected.shape:
                return ""
            power = expected.abs().square().sum(dim=0)
            d = (expected.conj() * found).sum(dim=0) / torch.where(power == 0, torch.ones_like(power), power)
            if found.numel() < 8 or far(found, d * expected, comparison.tolerance):
                return ""
            diagonals.append(torch.where(power == 0, torch.ones_like(d), d))
        if candidate is None and float(comparison.wrong().double().mean()) < 0.25:
            return ""  # if few entries are wrong, their places say more
        factors = self.tensors.items() if candidate is None else ()
        name = next((n for n, t in factors if _permutes(diagonals[0], t, comparison.eps)), "")
        if name:
            return f"the entries of `{name}` are permuted"
        low, high = (f(float(g(d.abs())) for d in diagonals) for f, g in ((min, torch.min), (max, torch.max)))
        found, expected = (torch.cat([t.abs().reshape(-1) for t in leaves]) for leaves in (comparison.found, right))
        if not far(found, expected * (found.norm() / expected.norm()), comparison.tolerance):
            return "each entry is off by its own phase or sign"
        return f"each entry is off by its own factor, from {low:.3g} to {high:.3g}"


def _permutes(diagonal: Tensor, t: Tensor, eps: float) -> bool:
    """Return whether the diagonal D makes a permutation of the entries of t, as t or conj(t) is a factor of Aᴴ."""
    if t.shape != diagonal.shape or not bool(t.any()) or not (t.is_floating_point() or t.is_complex()):
        return False
    t = t.detach().to(torch.complex128)
    bound = 1024 * eps * float(t.abs().max())
    for factor in (t, _conj(t)):
        gap = 0.0
        for view in (torch.real, torch.imag, lambda u: u.real + math.pi * u.imag):  # as sets, from three directions
            ends = [view(u).reshape(-1).sort().values for u in (factor, factor * diagonal)]
            gap = max(gap, float((ends[0] - ends[1]).abs().max()))
        if gap <= 8 * bound:
            return True
    return False


def _first(comparison: Comparison, mistakes: Iterable[Callable[[Comparison], str]]) -> str:
    return next((text for text in (mistake(comparison) for mistake in mistakes) if text), "")


def _in_batch(comparison: Comparison) -> str:
    """B is wrong for some batch entries only, by a known mistake with values."""
    if comparison.batch < 2:
        return ""
    wrong = [comparison.wrong(k).flatten(1).any(dim=1) for k in range(len(comparison.expected))]
    entries = [int(k) for k in torch.stack(wrong).any(dim=0).nonzero().flatten()]
    if not 0 < len(entries) < comparison.batch:
        return ""
    inner = value(comparison.viewed(lambda t: t.index_select(0, torch.tensor(entries, device=t.device))))
    return f"batch entry {', '.join(map(str, entries))} only: {inner}" if inner else ""


# -- changes of values -----------------------------------------------------------------------------------------------


def _zero(comparison: Comparison) -> str:
    return "" if any(bool(t.any()) for t in comparison.found) else "Aᴴ is zero (detached, or never written)"


def _low_precision(comparison: Comparison) -> str:
    """``B = Aᴴ`` up to the rounding errors of a coarser dtype, as measured."""
    misfit = comparison.misfit
    if not 4 * comparison.eps < misfit <= 0.05 or misfit > 4 * comparison.noise:
        return ""
    return (
        f"computed in lower precision{_dtype_of(misfit, comparison.eps)}: rounding errors of {misfit:.1e} of the "
        f"result, where {comparison.eps:.1e} is one unit of its dtype"
    )


def _factor(comparison: Comparison) -> str:
    """``B = α Aᴴ``."""
    factor = comparison.fit(comparison.changed(), any_size=True)
    if factor is None:
        return ""
    pairs = list(zip(comparison.found, comparison.expected, strict=True))
    rest = norm(tuple(f - factor.real * e for f, e in pairs))
    # A factor that leaves most of a small error as it is does not explain it.
    return in_words("", factor) if 4 * rest <= norm(tuple(f - e for f, e in pairs)) else ""


def _conjugate(comparison: Comparison) -> str:
    return (
        changed(comparison, [(None, _conj, "conjugate missing: B is Aᴴ conjugated")]) if comparison.is_complex else ""
    )


def _part(comparison: Comparison) -> str:
    parts = [(None, _real, "only real part"), (None, _imag, "only imaginary part")]
    return changed(comparison, parts) if comparison.is_complex else ""


def _phase(comparison: Comparison) -> str:
    """``B = α Aᴴ`` with complex α."""
    if not all(t.is_complex() for t in comparison.expected):
        return ""
    factor = comparison.fit(comparison.changed(), complex_factor=True, any_size=True)
    return "" if factor is None else in_words("", factor)


def value(comparison: Comparison) -> str:
    """Return the first mistake with values that does not depend on the shape."""
    return _first(comparison, (_zero, _low_precision, _factor, _conjugate, _part))


def _conjugate_or_part_of_y(comparison: Comparison) -> str:
    changes: Changes = [
        (_conj, _conj, "conjugate missing: B is the transpose Aᵀ"),
        (_conj, None, "conjugate missing: B is Aᴴ of conj(y)"),
        (_real, None, "only real part of y"),
        (_imag, None, "only imaginary part of y"),
    ]  # fmt: skip
    return changed(comparison, changes) if comparison.is_complex else ""


def _nearly_right(comparison: Comparison) -> str:
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


# -- places ----------------------------------------------------------------------------------------------------------


def _ignored(comparison: Comparison) -> str:
    """B is wrong for some entries of y only, by a known mistake; most often it ignores them."""
    for some in wrong_entries_of_y(comparison):
        # A wrong batch entry and a wrong border (both ends) are separate mistakes.
        if not (comparison.batch > 1 and set(some) == {0}) and not is_border(some, comparison.inputs[0][0].shape):
            alone = comparison.with_changed_inputs(kept_only(dict(some)))
            text = value(alone)
            if text:
                ignored = f"y is ignored {entries_in_words(some)}"
                return ignored if _zero(alone) else f"only for y {entries_in_words(some)}: {text}"
    return ""


def _in_places(comparison: Comparison) -> str:
    """Some entries of the result are wrong: near the border, or by a known mistake with values."""
    if len(comparison.found) > 1:
        return ""
    where, wrong = border(comparison)
    wrong = comparison.wrong() if wrong is None else wrong
    if not 0 < float(wrong.double().mean()) <= 0.5 and not where:
        return ""
    alone = comparison.viewed(lambda t: t[wrong])
    text = "zero there (never written)" if _zero(alone) else value(alone)
    if not where:
        return f"{places(wrong)}: {text}" if text else ""
    return f"{where}: {text}" if text else f"{where}, and right inside"


# -- changes of one tensor -------------------------------------------------------------------------------------------


def _conj(t: Tensor) -> Tensor:
    return t.conj().resolve_conj()


def _real(t: Tensor) -> Tensor:
    return t.real.to(t.dtype) if t.is_complex() else t


def _imag(t: Tensor) -> Tensor:
    return 1j * t.imag if t.is_complex() else t


__all__ = ["Search", "value"]
