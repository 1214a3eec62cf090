"""Diagnosis of a wrong adjoint in words, by applying the common mistakes to the right adjoint until one matches.

Each mistake is a guess ``T`` with ``B ≈ α T(Aᴴ)``, fitted on random data. Without a reference ``Aᴴ``, a mistake is
recognised by its repair: B has the mistake T if ``T⁻¹(B) / α`` passes the dot test.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adjointlab.numerics import dot_gap, norm
from adjointlab.reporting import Grid
from adjointlab.verify.checked_map import BrokenError, CheckedMap, Tensors, impulse
from adjointlab.verify.comparison import Comparison, Guess
from adjointlab.verify.dot_test import DotTest
from adjointlab.verify.mistakes import LAST, MISTAKES
from adjointlab.verify.parts import worst_impulse

Figure = tuple[tuple[str, Grid], ...]
_NEAR, _FAR = (-1.0, 4.0), (2.0**20, 2.0**-20)  # factors s in tests of f(sx) = s f(x)
_MOST_CELLS = 32  # along each side of a heat map


def diagnose(test: DotTest, reference: CheckedMap | None, seed: int) -> tuple[str, Figure]:
    """Return the mistake ``B − Aᴴ`` of a failed test in words, and a figure of an impulse response.

    Parameters
    ----------
    test : DotTest
        The test that failed.
    reference : CheckedMap or None
        A trusted adjoint.
    seed : int
        Seed of the draws.

    Returns
    -------
    tuple of str and figure
        The text is never empty.
    """
    generator = torch.Generator().manual_seed(seed + 100)
    worst = test.worst[3] if test.worst else ""
    try:
        text = _not_linear(test.forward, generator) or _not_linear(test.adjoint, generator)
        if text:
            return text, ()
        if test.domain.is_sharded:
            text = _not_alike(test, generator)
            if text:
                return text, ()
        if reference is None:
            return _by_repair(test, generator) or f"unrecognised: the inner products differ most for {worst}", ()
        comparison = Comparison(test.adjoint, reference, generator)
        where = ""
        if not comparison.wrong_leaves() and test.worst_y:  # a small error, or an error for some inputs only
            text = _not_linear(test.forward, generator, _FAR) or _not_linear(test.adjoint, generator, _FAR)
            if text:
                return text, ()
            comparison, where = comparison.with_inputs((test.worst_y, test.worst_y)), f"for {worst}: "
            if not comparison.wrong_leaves():
                return f"unrecognised: right on random data, but the inner products differ for {worst}", ()
        return where + _explain(comparison), _figure(comparison)
    except BrokenError as error:  # on input that the test did not try
        return str(error), ()


def _explain(comparison: Comparison) -> str:
    """Return the first mistake that explains all leaves at once, else one for each wrong leaf."""
    wrong = comparison.wrong_leaves()
    count = len(comparison.found)
    if len(wrong) == count:
        text = _first(comparison)
        if text or count == 1:
            return text or comparison.location()
    exchanged = _exchanged(comparison, wrong)
    if exchanged:
        return exchanged
    parts = []
    for number in wrong:
        alone = comparison.leaf(number)
        parts.append(f"leaf {number} of {count}: {_first(alone) or alone.location()}")
    return "; ".join(parts)


def _exchanged(comparison: Comparison, wrong: list[int]) -> str:
    """Return in words which leaves are exchanged, or an empty string if that does not explain all wrong leaves."""
    pairs = set()
    for number in wrong:
        alone = comparison.leaf(number)
        others = (k for k in wrong if k != number and comparison.expected[k].shape == alone.found[0].shape)
        partner = next((k for k in others if alone.fit((comparison.expected[k],)).fits), None)
        if partner is None:
            return ""
        pairs.add((min(number, partner), max(number, partner)))
    return f"leaves {', '.join(f'{i} ↔ {j}' for i, j in sorted(pairs))} exchanged" if pairs else ""


def _first(comparison: Comparison) -> str:
    for mistake in MISTAKES:
        text = mistake(comparison)
        if text:
            return text
    if comparison.batched:
        entries = comparison.wrong_batch_entries()
        if 0 < len(entries) < comparison.batch:
            inner = _first(comparison.batch_entries(entries))
            if inner:
                return f"batch entry {', '.join(map(str, entries))} only: {inner}"
    return next((text for text in (mistake(comparison) for mistake in LAST) if text), "")


def _not_linear(side: CheckedMap, generator: torch.Generator, factors: tuple[float, ...] = _NEAR) -> str:
    """Return in words why a function is not linear, or an empty string."""
    y = side.space.leaves(side.space.randn(generator))
    at_y, again = side(y), side(y)
    size = norm(at_y, side.codomain)
    tolerance = 64 * side.codomain.eps * size
    name = side.name
    if norm(tuple(a - b for a, b in zip(at_y, again, strict=True)), side.codomain) > tolerance:
        return f"{name} is not deterministic: two equal calls differ (dropout, random numbers, state)"
    offset = norm(side(tuple(torch.zeros_like(t) for t in y)), side.codomain)
    if offset > tolerance or (size == 0.0 and offset > 0.0):
        return f"{name} is not linear: it maps 0 to something of norm {offset:.3g} (an offset, a bias)"
    tiny = max(torch.finfo(t.dtype).smallest_normal * t.numel() ** 0.5 for t in at_y)  # absolute underflow error
    for factor in factors:
        try:
            image = side(tuple(factor * t for t in y))
        except BrokenError:  # an overflow
            continue
        gap = norm(tuple(a - factor * b for a, b in zip(image, at_y, strict=True)), side.codomain)
        if gap > abs(factor) * max(tolerance, 0.02 * size) + tiny:
            return f"{name} is not linear: its image of {factor:.4g} y is not {factor:.4g} times that of y"
    return ""


# -- without a reference ---------------------------------------------------------------------------------------------

Repair = Callable[[CheckedMap, Tensors], Tensors]


def _plain(back: CheckedMap, y: Tensors) -> Tensors:
    return back(y)


def _conjugated(back: CheckedMap, y: Tensors) -> Tensors:
    return tuple(t.conj().resolve_conj() for t in back(tuple(t.conj().resolve_conj() for t in y)))


def _not_alike(test: DotTest, generator: torch.Generator) -> str:
    """Return in words how replicated results differ between processes, or an empty string."""
    x, y = (space.leaves(space.randn(generator)) for space in (test.domain, test.codomain))
    at_y = test.adjoint(y)
    shardings = [spec.sharding for spec in test.domain.specs if spec.sharding is not None]
    sums = tuple(sharding.reduce(t) for sharding, t in zip(shardings, at_y, strict=True))
    gaps = tuple(t - sharding.share * s for sharding, t, s in zip(shardings, at_y, sums, strict=True))
    sizes = [test.domain.norm(test.domain.unflatten(leaves)) for leaves in (gaps, at_y)]
    if sizes[0] <= 64 * test.eps * sizes[1]:
        return ""
    gap, allowed = dot_gap(test.domain, test.codomain, x, test.forward(x), y, sums, exact=test.exact)
    missing = "the all-reduce over processes is missing" if gap <= 2 * allowed else "it is no all-reduce of theirs"
    return f"{test.adjoint.name} returns parts that differ between processes where they should be the same: {missing}"


def _by_repair(test: DotTest, generator: torch.Generator) -> str:
    """Return in words the factor or conjugation whose repair makes the dot test pass, or an empty string."""
    repairs: list[tuple[str, Repair, bool]] = [("", _plain, False)]
    if test.domain.is_complex and test.codomain.is_complex:
        repairs += [("conjugate missing", _conjugated, False), ("", _plain, test.exact)]
    for words, repair, complex_factor in repairs:
        draws = []
        for _ in range(4):
            x, y = (space.leaves(space.randn(generator)) for space in (test.domain, test.codomain))
            draws.append((x, test.forward(x), y, repair(test.adjoint, y)))
        left, right = [], []
        for x, at_x, y, at_y in draws:
            left.append(complex(test.codomain.inner(test.codomain.unflatten(at_x), test.codomain.unflatten(y))))
            right.append(complex(test.domain.inner(test.domain.unflatten(x), test.domain.unflatten(at_y))))
        if not test.exact:
            left, right = [complex(v.real) for v in left], [complex(v.real) for v in right]
        power = sum(abs(v) ** 2 for v in left)
        if power == 0.0:
            return ""
        alpha = sum(u.conjugate() * v for u, v in zip(left, right, strict=True)) / power
        if alpha == 0.0:
            return "Aᴴ is zero"
        scale = alpha if complex_factor else alpha.real
        if scale == 0.0:
            continue
        scaled = [(x, at_x, y, tuple((t / scale).to(t.dtype) for t in at_y)) for x, at_x, y, at_y in draws]
        spaces = (test.domain, test.codomain)
        gaps = [dot_gap(*spaces, *draw, exact=test.exact) for draw in scaled]
        if all(gap <= 2 * allowed for gap, allowed in gaps):
            return Guess.words(words, complex(scale))
    return ""


# -- the figure ------------------------------------------------------------------------------------------------------


def _figure(comparison: Comparison) -> Figure:
    """Return heat maps of an impulse response of B, of Aᴴ and of their difference, where the difference is large."""
    adjoint, reference = comparison.adjoint, comparison.reference
    space = adjoint.space
    space = space.with_batch(comparison.inputs[0][0].shape[: space.batch_dims])
    places = [(0, tuple(size // 2 for size in space.specs[0].shape))]
    places.append(worst_impulse(adjoint, reference, comparison.inputs[0]))
    best: tuple[float, str, Tensors, Tensors] | None = None
    for number, index in places:
        e = impulse(space, number, index)
        got, right = adjoint(e), reference(e)
        gap = norm(tuple(a - b for a, b in zip(got, right, strict=True)))
        if best is None or gap > 2 * best[0]:  # prefer the centre unless the other impulse shows twice the error
            best = (gap, f"impulse at {index}", got, right)
    if best is None or best[0] == 0.0:  # neither impulse shows the mistake
        found, expected = (tuple(t[0] for t in leaves) for leaves in (comparison.found, comparison.expected))
        best = (1.0, "random input", found, expected)
    _, what, got, right = best
    gaps = [float((a - b).abs().max()) for a, b in zip(got, right, strict=True)]
    leaf = max(range(len(gaps)), key=gaps.__getitem__)
    difference = (got[leaf] - right[leaf]).abs()
    where = int(difference.argmax())
    names = ("Bv", "Aᴴv", "|Bv − Aᴴv|")
    images = [_plane(image, where) for image in (got[leaf].abs(), right[leaf].abs(), difference)]
    (top, bottom), (left, end) = _window(images)
    height, width = images[0].shape
    if (bottom - top, end - left) != (height, width):
        what += f", rows {top}–{bottom - 1} of {height}, columns {left}–{end - 1} of {width}"
    return tuple(
        (f"{name}, {what}", _grid(image[top:bottom, left:end])) for name, image in zip(names, images, strict=True)
    )


def _plane(image: Tensor, where: int) -> Tensor:
    """Return the plane of the last two dimensions that contains the entry with flat index ``where``."""
    plane = image.detach().double().cpu()
    plane = plane.reshape(1, -1) if plane.ndim < 2 else plane
    height, width = plane.shape[-2:]
    return plane.reshape(-1, height, width)[where // (height * width)]


def _window(images: list[Tensor]) -> list[tuple[int, int]]:
    """Return the rows and columns where some image is not zero, with a margin."""
    lit = torch.stack([image > 1e-6 * float(image.max()) for image in images]).any(dim=0)
    bounds = []
    for dim, size in enumerate(lit.shape):
        places = lit.any(dim=1 - dim).nonzero().flatten()
        low, high = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, size)
        margin = max(2, (high - low) // 4)
        bounds.append((max(0, low - margin), min(size, high + margin)))
    return bounds


def _grid(plane: Tensor) -> Grid:
    """Return a plane as numbers, reduced to the largest entry of each cell, with the same aspect ratio."""
    height, width = plane.shape
    share = min(1.0, _MOST_CELLS / max(height, width))
    size = (max(1, round(share * height)), max(1, round(share * width)))
    thin = torch.nn.functional.adaptive_max_pool2d(plane[None], size)[0]
    return tuple(tuple(float(f"{value:.4g}") for value in row) for row in thin.tolist())


__all__ = ["Figure", "diagnose"]
