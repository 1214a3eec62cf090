"""Diagnosis of a wrong adjoint in words: the first of the common mistakes that reproduces its numbers.

A mistake is a candidate for B, made of the derived adjoint or of A's own pieces. It is named only if it gives the
images of two random y to rounding. Without a reference ``Aᴴ``, a mistake is recognised by its repair: B has the mistake
T if ``T⁻¹(B) / α`` passes the dot test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from adjointlab.numerics import dot_gap, norm, wide
from adjointlab.operators import LinearOperator
from adjointlab.space.algebra import conjugated
from adjointlab.verify.checked_map import BrokenError, CheckedMap, ExhaustedError, Meter, Tensors
from adjointlab.verify.comparison import Comparison, far, in_words
from adjointlab.verify.dot_test import DotTest
from adjointlab.verify.figure import Figure, figure_of
from adjointlab.verify.mismatch import mismatch, roughly
from adjointlab.verify.moves import moved_result, moved_y
from adjointlab.verify.pieces import of_pieces, read_tensors
from adjointlab.verify.places import batch_mixed, border, ignored, in_batch, in_places
from adjointlab.verify.values import (
    Kind,
    conjugate_or_part_of_y,
    entrywise,
    first,
    nearly_right,
    one_sided,
    phase,
    value,
)

_NEAR, _FAR = (-1.0, 4.0), (2.0**20, 2.0**-20)  # factors s in tests of f(sx) = s f(x)
_MOST_APPLICATIONS, _OF_FIGURE = 66, 28  # of A, B and Aᴴ, in all
_OF_PIECES = 24  # applications of A's program with a mistake, before other mistakes have their turn


def diagnose(
    test: DotTest, reference: CheckedMap | None, operator: LinearOperator | None, seed: int
) -> tuple[str, Figure]:
    """Return the mistake ``B − Aᴴ`` of a failed test in words, never empty, and a figure of an impulse response."""
    # The reference is a trusted adjoint, and `operator` an operator for the same A that knows its pieces.
    generator = torch.Generator().manual_seed(seed + 100)
    worst = test.worst[3] if test.worst else ""
    try:
        text = _not_linear((test.forward, test.adjoint), generator, _NEAR)
        if not text and test.domain.is_sharded:
            text = _not_alike(test, generator)
        if not text and reference is None:
            text = _by_repair(test, generator) or f"unrecognised: the inner products differ most for {worst}"
        if text or reference is None:
            return text, ()
        meter = Meter(_MOST_APPLICATIONS)
        forward, adjoint, right = (side.metered(meter) for side in (test.forward, test.adjoint, reference))
        comparison = Comparison.of(forward, adjoint, right, meter, generator)
        where = ""
        if not comparison.wrong_leaves() and test.worst_y:  # a small error, or an error for some inputs only
            text = _not_linear((forward, adjoint), generator, _FAR)
            if text:
                return text, ()
            comparison, where = comparison.with_inputs((test.worst_y, test.worst_y)), f"for {worst}: "
            if not comparison.wrong_leaves():
                return f"unrecognised: right on random data, but the inner products differ for {worst}", ()
        text = where + _explain(comparison, functools.partial(_first, operator=operator))
        meter.left = _OF_FIGURE
        return text, figure_of(comparison)
    except BrokenError as error:  # on input that the test did not try
        return str(error), ()


def _explain(comparison: Comparison, search: Kind) -> str:
    """Return the first mistake that explains all leaves at once, else one for each wrong leaf."""
    wrong = comparison.wrong_leaves()
    count = len(comparison.found)
    if len(wrong) == count:
        text = search(comparison)
        if text or count == 1:
            return text or f"unrecognised: {comparison.location()}"
    exchanged = _exchanged(comparison, wrong)
    if exchanged:
        return exchanged
    leaves = {number: comparison.leaf(number) for number in wrong}
    return "; ".join(
        f"leaf {number} of {count}: {search(alone) or f'unrecognised: {alone.location()}'}"
        for number, alone in leaves.items()
    )


def _exchanged(comparison: Comparison, wrong: list[int]) -> str:
    """Return in words which leaves are exchanged, or an empty string if that does not explain all wrong leaves."""
    leaves = {number: comparison.leaf(number) for number in wrong}
    pairs = set()
    for number, alone in leaves.items():
        others = (k for k in wrong if k != number and alone.fit(leaves[k].changed()) is not None)
        partner = next(others, None)
        if partner is None:
            return ""
        pairs.add((min(number, partner), max(number, partner)))
    return f"leaves {', '.join(f'{i} ↔ {j}' for i, j in sorted(pairs))} exchanged" if pairs else ""


def _not_linear(sides: tuple[CheckedMap, ...], generator: torch.Generator, factors: tuple[float, ...]) -> str:
    """Return in words why one of some functions is not linear, or an empty string."""
    for side in sides:
        y = side.space.leaves(side.space.randn(generator))
        at_y, again = side(y), side(y)
        size = norm(at_y, side.codomain)
        tolerance = 64 * side.codomain.eps * size
        if norm(tuple(map(torch.sub, at_y, again)), side.codomain) > tolerance:
            return f"{side.name} is not deterministic: two equal calls differ (dropout, random numbers, state)"
        offset = norm(side(tuple(map(torch.zeros_like, y))), side.codomain)
        if offset > tolerance or (size == 0.0 and offset > 0.0):
            return f"{side.name} is not linear: it maps 0 to something of norm {offset:.3g} (an offset, a bias)"
        tiny = max(torch.finfo(t.dtype).smallest_normal * t.numel() ** 0.5 for t in at_y)  # absolute underflow error
        for factor in factors:
            try:
                image = side(tuple(factor * t for t in y))
            except BrokenError:  # an overflow
                continue
            gap = norm(tuple(a - factor * b for a, b in zip(image, at_y, strict=True)), side.codomain)
            if gap > abs(factor) * max(tolerance, 0.02 * size) + tiny:
                return f"{side.name} is not linear: its image of {factor:.4g} y is not {factor:.4g} times that of y"
    return ""


# -- the search for a mistake -----------------------------------------------------------------------------------------


def _first(comparison: Comparison, operator: LinearOperator | None) -> str:
    """Return the first mistake that reproduces B, in words; an empty string if none does."""
    costly = (
        value, functools.partial(_of_pieces, operator=operator), batch_mixed, moved_result, conjugate_or_part_of_y,
        phase, one_sided, _itself, ignored, moved_y, _inverse,
    )  # fmt: skip
    try:
        text = first(comparison, costly)
        is_factor = text.startswith("Aᴴ is ") and ("too small" in text or "too large" in text)
        if is_factor and _inverse(comparison):
            return f"{text}: B is the inverse of A"
    except ExhaustedError:
        text = ""
    tensors = {} if operator is None else read_tensors(getattr(operator.source, "callable", None))
    # The last ones take no application of an operator.
    entries = functools.partial(entrywise, tensors=tensors)
    return text or first(comparison, (in_batch, in_places, entries, nearly_right, _roughly_right))


def _of_pieces(comparison: Comparison, operator: LinearOperator | None) -> str:
    """The derived adjoint with one of A's pieces changed; the program is for the nominal batch size."""
    if operator is None or not comparison.is_nominal:
        return ""
    least = comparison.meter.left - _OF_PIECES
    for mistake in of_pieces(operator, comparison.adjoint.function):
        factor = comparison.fit(comparison.of_program(mistake.function))
        if factor is not None:
            words = mistake.words
            if mistake.turned is not None and _is_linear_in(comparison, mistake.turned):
                words = words.replace("conjugate missing", "one conjugate too many")
            where = border(comparison) if words.startswith("wrong padding mode") else ""
            return in_words(f"{where} ({words.removeprefix('wrong ')})" if where else words, factor)
        if comparison.meter.left < least:
            break
    return ""


def _is_linear_in(comparison: Comparison, turned: Callable[[Tensors], Tensors]) -> bool:
    """Return whether Aᴴ for i times a tensor is ``i Aᴴ``, and so linear in the tensor, not antilinear."""
    image = comparison.select(turned(comparison.inputs[0]))
    pairs = zip(image, comparison.expected, strict=True)
    return not any(far(wide(t), 1j * e[0], comparison.tolerance) for t, e in pairs)


def _roughly_right(comparison: Comparison) -> str:
    """``B`` is near to ``α Aᴴ``, but differs in most entries."""
    found, expected = (torch.cat([t.reshape(-1) for t in leaves]) for leaves in (comparison.found, comparison.expected))
    power = float(torch.linalg.vector_norm(expected))
    alpha = float(torch.vdot(expected.to(found.dtype), found).real) / power**2 if power else 0.0
    if not alpha or min(float(comparison.wrong(k).double().mean()) for k in range(len(comparison.found))) < 0.5:
        return ""
    return roughly(alpha, float(torch.linalg.vector_norm(found / alpha - expected)) / power)


def _itself(comparison: Comparison) -> str:
    """``B = A``, up to conjugation."""
    forward = comparison.forward
    if forward.space != forward.codomain:
        return ""
    images = [comparison.select(forward(y)) for y in comparison.inputs]
    text = comparison.named("B is A itself, not its adjoint", images.__getitem__)
    return text or comparison.named("B is A conjugated", [conjugated(image) for image in images].__getitem__)


def _inverse(comparison: Comparison) -> str:
    """``A B = 1`` or ``B A = 1`` on two draws."""
    forward, adjoint = comparison.forward, comparison.adjoint
    if not comparison.is_nominal or len(comparison.found) < len(forward.space.specs):
        return ""
    one, other = (adjoint, forward) if forward.space.size >= forward.codomain.size else (forward, adjoint)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        z = one.space.leaves(one.space.randn(generator))
        if any(far(a, b, comparison.tolerance) for a, b in zip(z, other(one(z)), strict=True)):
            return ""
    return "B is an inverse of A, not its adjoint"


# -- without a reference ---------------------------------------------------------------------------------------------


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
    """Return in words the factor or conjugation whose repair makes the dot test pass, or that B is near to Aᴴ."""
    repairs: list[tuple[str, Callable[[Tensors], Tensors], bool]] = [("", tuple, False)]
    if test.domain.is_complex and test.codomain.is_complex:
        repairs += [("conjugate missing", conjugated, False), ("", tuple, test.exact)]
    for words, change, complex_factor in repairs:
        draws = []
        for _ in range(4):
            x, y = (space.leaves(space.randn(generator)) for space in (test.domain, test.codomain))
            draws.append((x, test.forward(x), y, change(test.adjoint(change(y)))))
        left = [complex(test.codomain.inner(*map(test.codomain.unflatten, (at_x, y)))) for _, at_x, y, _ in draws]
        right = [complex(test.domain.inner(*map(test.domain.unflatten, (x, at_y)))) for x, _, _, at_y in draws]
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
        gaps = [dot_gap(test.domain, test.codomain, *draw, exact=test.exact) for draw in scaled]
        if all(gap <= 2 * allowed for gap, allowed in gaps):
            return in_words(words, complex(scale))
    forward, adjoint = (_on_elements(side) for side in (test.forward, test.adjoint))
    return roughly(*mismatch(forward, adjoint, test.domain, test.codomain, generator))


def _on_elements(side: CheckedMap) -> Callable[[Any], Any]:
    return lambda x: side.codomain.unflatten(side(side.space.leaves(x)))
