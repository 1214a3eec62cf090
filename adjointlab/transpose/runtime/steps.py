"""A step of a recurrence and its gradients in the state, for a sweep forwards and one back.

``forth`` returns the next u and what is kept of the step; ``back`` takes that, and returns ``Sᴴ v`` with the gradients
in what moves. Those in all else are summed over the steps, and returned by ``ends``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adjointlab.transpose.runtime.program import Program, Tensors

Step = Callable[[Tensors, Tensors], Tensors]  # (what moves, leaves) → leaves


@dataclass(frozen=True)
class InSweeps:
    """The programs of :class:`adjointlab.transpose.passes.sweeps.Sweeps`; ``count`` is that of what Sᴴ returns."""

    forth: Program
    back: Program
    end: Callable[..., Tensors]
    given: tuple[int, ...]
    sums: tuple[Tensor, ...]
    count: int


class Together:
    """Steps by programs that share what they compute.

    ``places`` says which of what moves is where in the state; ``count`` is the number of leaves of u.
    """

    def __init__(self, programs: InSweeps, state: Tensors, places: Sequence[tuple[int, int]], count: int) -> None:
        self._programs, self._state, self._count = programs, state, count
        moving, self._order = tuple(place for place, _ in places), tuple(slot for _, slot in places)
        self._forth, self._back = programs.forth.each(state, moving), programs.back.each(state, moving)
        self._computes = len(programs.forth.graph.outputs) > count
        self._sums = tuple([torch.zeros(s.shape, dtype=s.dtype, device=s.device) for s in programs.sums])

    def forth(self, moved: Tensors, x: Tensors, *, last: bool = False) -> tuple[Tensors, Tensors]:
        """Return the next u, unless that is the last and not asked for, and what is kept."""
        given = tuple([x[i] for i in self._programs.given])
        if last and not self._computes:
            return (), given
        found = self._forth(tuple([moved[i] for i in self._order]), x)
        return found[: self._count], (*found[self._count :], *given)

    def back(self, moved: Tensors, kept: Tensors, inputs: Tensors, v: Tensors) -> tuple[Tensors, Tensors]:
        """Return ``Sᴴ v`` and the gradients in what moves."""
        moving = tuple([moved[i] for i in self._order])
        found, n = self._back(moving, (*kept, *inputs, *v, *self._sums)), self._programs.count
        self._sums = found[n : n + len(self._sums)]
        return found[:n], found[n + len(self._sums) :]

    def ends(self) -> Tensors:
        """Return the gradients in what does not move."""
        return tuple(self._programs.end(*self._state, *self._sums))


class Apart:
    """Steps by functions that know nothing of each other; ``gradient`` returns those of chosen places of the state."""

    def __init__(
        self, function: Step, adjoint: Step, gradient: Callable[[Tensors, Tensors, Tensors], Sequence[Tensor]],
        is_moving: Sequence[bool], count: int,
    ) -> None:  # fmt: skip
        self._function, self._adjoint, self._gradient = function, adjoint, gradient
        self._is_moving, self._count = is_moving, count
        self._sums: list[Tensor] = []

    def forth(self, moved: Tensors, x: Tensors, *, last: bool = False) -> tuple[Tensors, Tensors]:
        """Return the next u, unless that is the last and not asked for, and what is kept."""
        return () if last else self._function(moved, x)[: self._count], x[: self._count]

    def back(self, moved: Tensors, kept: Tensors, inputs: Tensors, v: Tensors) -> tuple[Tensors, Tensors]:
        """Return ``Sᴴ v`` and the gradients in what moves."""
        pairs = list(zip(self._is_moving, self._gradient(moved, (*kept, *inputs), v), strict=True))
        terms = [gradient for moves, gradient in pairs if not moves]
        before = self._sums or [torch.zeros_like(term) for term in terms]
        self._sums = [a + b for a, b in zip(before, terms, strict=True)]
        return self._adjoint(moved, v), tuple(gradient for moves, gradient in pairs if moves)

    def ends(self) -> Sequence[Tensor]:
        """Return the gradients in what does not move."""
        return self._sums
