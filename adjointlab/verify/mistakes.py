"""The common mistakes, each as a candidate for B; the first that reproduces the images of B is the diagnosis."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adjointlab.space.algebra import conjugated
from adjointlab.verify.checked_map import CheckedMap, ExhaustedError, Tensors
from adjointlab.verify.comparison import Comparison, far, in_words, wide
from adjointlab.verify.moves import moved_result, moved_y
from adjointlab.verify.pieces import Mistake
from adjointlab.verify.places import batch_mixed, border, ignored, in_batch, in_places
from adjointlab.verify.values import (
    conjugate_or_part_of_y,
    entrywise,
    first,
    nearly_right,
    one_sided,
    phase,
    value,
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
            value, self._pieces, batch_mixed, moved_result, conjugate_or_part_of_y, phase, one_sided, self._itself,
            ignored, moved_y, self._inverse,
        )  # fmt: skip
        try:
            text = first(comparison, costly)
            is_factor = text.startswith("Aᴴ is ") and ("too small" in text or "too large" in text)
            if is_factor and self._inverse(comparison):
                return f"{text}: B is the inverse of A"
        except ExhaustedError:
            text = ""
        # The last ones take no application of an operator.
        last = (in_batch, in_places, functools.partial(entrywise, tensors=self.tensors), nearly_right)
        return text or first(comparison, last)

    def _pieces(self, comparison: Comparison) -> str:
        if not comparison.is_nominal:
            return ""  # the program is for the nominal batch size
        least = comparison.meter.left - _OF_PIECES
        for mistake in self.pieces():
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

    def _itself(self, comparison: Comparison) -> str:
        """``B = A``, up to conjugation."""
        if self.forward.space != self.forward.codomain:
            return ""
        images = [comparison.select(self.forward(y)) for y in comparison.inputs]
        text = comparison.named("B is A itself, not its adjoint", images.__getitem__)
        return text or comparison.named("B is A conjugated", [conjugated(image) for image in images].__getitem__)

    def _inverse(self, comparison: Comparison) -> str:
        """``A B = 1`` or ``B A = 1`` on two draws."""
        if not comparison.is_nominal or len(comparison.found) < len(self.forward.space.specs):
            return ""
        wide_enough = self.forward.space.size >= self.forward.codomain.size
        sides = comparison.adjoint, self.forward
        one, other = sides if wide_enough else sides[::-1]
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            z = one.space.leaves(one.space.randn(generator))
            if any(far(a, b, comparison.tolerance) for a, b in zip(z, other(one(z)), strict=True)):
                return ""
        return "B is an inverse of A, not its adjoint"


def _is_linear_in(comparison: Comparison, turned: Callable[[Tensors], Tensors]) -> bool:
    """Return whether Aᴴ for i times a tensor is ``i Aᴴ``, and so linear in the tensor, not antilinear."""
    image = comparison.select(turned(comparison.inputs[0]))
    pairs = zip(image, comparison.expected, strict=True)
    return not any(far(wide(t), 1j * e[0], comparison.tolerance) for t, e in pairs)


__all__ = ["Search"]
