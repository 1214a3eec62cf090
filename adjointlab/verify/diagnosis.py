"""What is wrong with an adjoint, in words: the usual mistakes are made on the right adjoint until one gives the wrong.

Each mistake is a guess ``T`` with ``B ≈ α T(Aᴴ)``, fitted on random data. Where no reference ``Aᴴ`` is known, the few
that can be *repaired* are: B is the adjoint if ``α T(B)`` passes the dot test.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adjointlab.reporting import Grid
from adjointlab.rounding import dot_gap, norm
from adjointlab.verify.dot_test import BrokenError, DotTest, Side, Tensors, impulse
from adjointlab.verify.evidence import Evidence, Guess
from adjointlab.verify.mistakes import MISTAKES, entrywise

Figure = tuple[tuple[str, Grid], ...]
_MOST_CELLS = 32  # along each side of a heat map


def diagnose(test: DotTest, reference: Side | None, seed: int) -> tuple[str, Figure]:
    """Return what is wrong with the adjoint of a failed test, in words, and a figure of an impulse response.

    Parameters
    ----------
    test : DotTest
        The test that failed.
    reference : Side or None
        A trusted adjoint.
    seed : int
        Seed of the draws.

    Returns
    -------
    tuple of str and figure
        Never an empty text.
    """
    generator = torch.Generator().manual_seed(seed + 100)
    worst = test.worst[3] if test.worst else ""
    try:
        text = _not_linear(test.forward, generator) or _not_linear(test.adjoint, generator)
        if text:
            return text, ()
        if reference is None:
            return _by_repair(test, generator) or f"unrecognised: the inner products differ most for {worst}", ()
        evidence = Evidence(test.adjoint, reference, generator)
        if not evidence.wrong_leaves():
            text = (
                f"unrecognised: right on random data to {evidence.tolerance:.1e}; the inner products differ for {worst}"
            )
            return text, ()
        return _explain(evidence), _figure(evidence)
    except BrokenError as error:  # on input that the test did not try
        return str(error), ()


def _explain(evidence: Evidence) -> str:
    """Return the first mistake that explains all leaves at once, else one for each wrong leaf."""
    wrong = evidence.wrong_leaves()
    count = len(evidence.found)
    if len(wrong) == count:
        text = _first(evidence)
        if text or count == 1:
            return text or evidence.location()
    parts = []
    for number in wrong:
        alone = evidence.leaf(number)
        parts.append(f"leaf {number} of {count}: {_first(alone) or alone.location()}")
    return "; ".join(parts)


def _first(evidence: Evidence) -> str:
    for mistake in MISTAKES:
        text = mistake(evidence)
        if text:
            return text
    if evidence.batched:
        entries = evidence.wrong_batch_entries()
        if 0 < len(entries) < evidence.batch:
            inner = _first(evidence.entries(entries))
            if inner:
                return f"batch entry {', '.join(map(str, entries))} only: {inner}"
    return entrywise(evidence)


def _not_linear(side: Side, generator: torch.Generator) -> str:
    """Return how a function fails to be a linear map at all, or an empty string."""
    y = side.space.leaves(side.space.randn(generator))
    at_y, again = side(y), side(y)
    size = norm(at_y)
    tolerance = 64 * side.codomain.eps * size
    name = side.name
    if norm(tuple(a - b for a, b in zip(at_y, again, strict=True))) > tolerance:
        return f"{name} is not deterministic: two equal calls differ (dropout, random numbers, state)"
    offset = norm(side(tuple(torch.zeros_like(t) for t in y)))
    if offset > tolerance or (size == 0.0 and offset > 0.0):
        return f"{name} is not linear: it maps 0 to something of norm {offset:.3g} (an offset, a bias)"
    for factor in (-1.0, 4.0):
        image = side(tuple(factor * t for t in y))
        gap = norm(tuple(a - factor * b for a, b in zip(image, at_y, strict=True)))
        if gap > max(1.0, abs(factor)) * max(tolerance, 0.02 * size):
            return f"{name} is not linear: its image of {factor:g} y is not {factor:g} times that of y"
    return ""


# -- without a reference ---------------------------------------------------------------------------------------------

Repair = Callable[[Side, Tensors], Tensors]


def _plain(back: Side, y: Tensors) -> Tensors:
    return back(y)


def _conjugated(back: Side, y: Tensors) -> Tensors:
    return tuple(t.conj().resolve_conj() for t in back(tuple(t.conj().resolve_conj() for t in y)))


def _by_repair(test: DotTest, generator: torch.Generator) -> str:
    """Return the factor or conjugation that makes the dot test pass, in words, or an empty string."""
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


def _figure(evidence: Evidence) -> Figure:
    """Return heat maps of the impulse response of B, of Aᴴ and of their difference, where that is largest."""
    adjoint, reference = evidence.adjoint, evidence.reference
    space = adjoint.space
    best: tuple[float, str, Tensors, Tensors] | None = None
    for number, spec in enumerate(space.specs[:4]):
        for index in dict.fromkeys([tuple(s // 2 for s in spec.shape), tuple(0 for _ in spec.shape)]):
            e = impulse(space, number, index)
            got, right = adjoint(e), reference(e)
            gap = norm(tuple(a - b for a, b in zip(got, right, strict=True)))
            if best is None or gap > best[0]:
                best = (gap, f"impulse at {index}", got, right)
    if best is None or best[0] == 0.0:  # a mistake that only shows elsewhere
        found, expected = (tuple(t[0] for t in leaves) for leaves in (evidence.found, evidence.expected))
        best = (1.0, "random input", found, expected)
    _, what, got, right = best
    gaps = [float((a - b).abs().max()) for a, b in zip(got, right, strict=True)]
    leaf = max(range(len(gaps)), key=gaps.__getitem__)
    difference = (got[leaf] - right[leaf]).abs()
    where = int(difference.argmax())
    names = ("Bv", "Aᴴv", "|Bv − Aᴴv|")
    images = (got[leaf].abs(), right[leaf].abs(), difference)
    return tuple((f"{name}, {what}", _grid(image, where)) for name, image in zip(names, images, strict=True))


def _grid(image: Tensor, where: int) -> Grid:
    """Return the plane of the last two dimensions through the entry ``where``, thinned to the largest of each cell."""
    plane = image.detach().double().cpu()
    if plane.ndim < 2:
        plane = plane.reshape(1, -1)
    height, width = plane.shape[-2:]
    plane = plane.reshape(-1, height, width)[where // (height * width)]
    size = (min(height, _MOST_CELLS), min(width, _MOST_CELLS))
    thin = torch.nn.functional.adaptive_max_pool2d(plane[None], size)[0]
    return tuple(tuple(float(f"{value:.4g}") for value in row) for row in thin.tolist())


__all__ = ["Figure", "diagnose"]
