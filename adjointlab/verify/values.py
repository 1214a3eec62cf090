"""Mistakes with values: factors, signs, conjugates, parts of complex numbers, dtypes, weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from adjointlab.numerics import norm
from adjointlab.space.algebra import conjugated
from adjointlab.verify.comparison import Candidate, Comparison, far, in_words, stacked

Kind = Callable[[Comparison], str]  # returns a mistake in words, or an empty string


def first(comparison: Comparison, kinds: Iterable[Kind]) -> str:
    """Return the first mistake that reproduces B, in words; an empty string if none does."""
    return next(filter(None, (kind(comparison) for kind in kinds)), "")


def is_zero(comparison: Comparison) -> bool:
    """Return whether B gives zero in both draws."""
    return not any(bool(t.any()) for t in comparison.found)


def value(comparison: Comparison) -> str:
    """Return the first mistake with values that does not depend on the shape."""
    if is_zero(comparison):
        return "Aᴴ is zero (detached, or never written)"
    return first(comparison, (_low_precision, _factor, _conjugate_or_part))


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


def _real(t: Tensor) -> Tensor:
    return t.real.to(t.dtype) if t.is_complex() else t


def _imag(t: Tensor) -> Tensor:
    return 1j * t.imag if t.is_complex() else t


def _conjugate_or_part(comparison: Comparison) -> str:
    changes = [
        ("conjugate missing: B is Aᴴ conjugated", None, conjugated),
        ("only real part", None, _real),
        ("only imaginary part", None, _imag),
    ]
    return comparison.first(changes) if comparison.is_complex else ""


def conjugate_or_part_of_y(comparison: Comparison) -> str:
    """``B = Aᵀ``, ``Aᴴ`` of ``conj(y)``, or of a part of y."""
    changes = [
        ("conjugate missing: B is the transpose Aᵀ", conjugated, conjugated),
        ("conjugate missing: B is Aᴴ of conj(y)", conjugated, None),
        ("only real part of y", _real, None),
        ("only imaginary part of y", _imag, None),
    ]
    return comparison.first(changes) if comparison.is_complex else ""


def phase(comparison: Comparison) -> str:
    """``B = α Aᴴ`` with complex α."""
    if not all(t.is_complex() for t in comparison.expected):
        return ""
    return comparison.named("", comparison.changed(), complex_factor=True, any_size=True)


def one_sided(comparison: Comparison) -> str:
    """B counts the frequencies of a one-sided transform twice, or once where Aᴴ counts them twice."""
    y = comparison.inputs[0]
    if len(y) > 1 or len(comparison.found) > 1 or y[0].is_complex() == comparison.expected[0].is_complex():
        return ""
    of_y = y[0].is_complex()
    for dim, size in enumerate(y[0].shape if of_y else comparison.shape):
        for stop in (size - 1, size) if size > 2 else ():  # the last frequency of an even size is not counted twice
            for weight, how in ((2.0, "large"), (0.5, "small")):
                scaled = functools.partial(_scaled, dim=dim, stop=stop, weight=weight)
                candidate = comparison.changed(scaled) if of_y else comparison.changed(after=scaled)
                where = f"frequencies 1–{stop - 1} along dim {dim}"
                words = f"{where} are 2.000 × too {how} (a one-sided transform)"
                text = comparison.named(words, candidate)
                rest = entrywise(comparison, {}, candidate) if of_y and not text else ""
                if text or rest:
                    return text or f"{words}, and {rest}"
    return ""


def _scaled(t: Tensor, dim: int, stop: int, weight: float) -> Tensor:
    result = t.clone()
    result.narrow(dim, 1, stop - 1).mul_(weight)
    return result


def entrywise(comparison: Comparison, tensors: Mapping[str, Tensor], candidate: Candidate | None = None) -> str:
    """``B = D Aᴴ``, or D times a candidate, with a diagonal D, which two draws determine."""
    right = comparison.expected
    if candidate is not None:
        right = stacked([image for image in map(candidate, range(2)) if image is not None])
    diagonals = []
    for found, expected in zip(comparison.found, right, strict=True):
        if found.shape != expected.shape:
            return ""
        power = expected.abs().square().sum(dim=0)
        d = (expected.conj() * found).sum(dim=0) / torch.where(power == 0, 1, power)
        if found.numel() < 8 or far(found, d * expected, comparison.tolerance):
            return ""
        diagonals.append(torch.where(power == 0, 1, d))
    if candidate is None and float(comparison.wrong().double().mean()) < 0.25:
        return ""  # if few entries are wrong, their places say more
    name = next((n for n, t in tensors.items() if _permutes(diagonals[0], t, comparison.eps)), "")
    if name:
        return f"the entries of `{name}` are permuted"
    found, expected, sizes = (
        torch.cat([t.abs().reshape(-1) for t in leaves]) for leaves in (comparison.found, right, diagonals)
    )
    if not far(found, expected * (found.norm() / expected.norm()), comparison.tolerance):
        return "each entry is off by its own phase or sign"
    return f"each entry is off by its own factor, from {float(sizes.min()):.3g} to {float(sizes.max()):.3g}"


def _permutes(diagonal: Tensor, t: Tensor, eps: float) -> bool:
    """Return whether the diagonal D makes a permutation of the entries of t, as t or conj(t) is a factor of Aᴴ."""
    if t.shape != diagonal.shape or not bool(t.any()) or not (t.is_floating_point() or t.is_complex()):
        return False
    t = t.detach().to(torch.complex128)
    bound = 8192 * eps * float(t.abs().max())
    views = torch.real, torch.imag, lambda u: u.real + math.pi * u.imag  # as sets, from three directions
    for factor in (t, conjugated(t)):
        ends = [[view(u).reshape(-1).sort().values for view in views] for u in (factor, factor * diagonal)]
        if all(float((a - b).abs().max()) <= bound for a, b in zip(*ends, strict=True)):
            return True
    return False


def nearly_right(comparison: Comparison) -> str:
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
    nearest = min(typical, key=lambda size: abs(math.log(size / error)), default=0.0)
    return f" ({typical[nearest]})" if nearest / 16 < error < 16 * nearest else ""
