"""A step of a recurrence and its gradients in the state, for a sweep forwards and one back.

``forth`` returns the next u and what is kept of the step; ``back`` takes that, and returns ``Sᴴ v`` with the gradients
in what moves. Those in all else are summed over the steps, and returned by ``ends``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adjointlab.errors import NotDifferentiableError
from adjointlab.numerics import eps_of, norm
from adjointlab.transpose.runtime.program import Call, Program, Tensors

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
        made, m = [node.meta["val"] for node in programs.forth.graph.outputs[count:]], len(programs.sums)
        like = [node.meta["val"] for node in programs.back.graph.inputs]
        start, stop = len(made) + len(programs.given) + len(programs.forth.graph.inputs) - count, len(like) - m
        moves, sums = [(i, start + i) for i in range(count)], [(programs.count + i, stop + i) for i in range(m)]
        self._forth = programs.forth.row(state, moving, tuple((i, i) for i in range(count)), programs.given)
        self._back = programs.back.row(state, moving, (*moves, *sums))
        self._computes, self._like = bool(made), tuple(like[: len(made) + len(programs.given)])
        self._kept: list[Tensors] = []  # room for what is kept of each step of a segment
        self._sums = tuple(map(zeros, programs.sums))
        self._of_moving = tuple([zeros(n.meta["val"]) for n in programs.back.graph.outputs[programs.count + m :]])

    def forth(
        self, u: Tensors, moved: Tensors, inputs: Tensors, j: int, *, last: bool = False
    ) -> tuple[Tensors, Tensors]:
        """Return the next u, unless that is the last and not asked for, and what is kept of the j-th of a segment."""
        if last and not self._computes:
            x = (*u, *inputs)
            return (), tuple([x[i] for i in self._programs.given])
        if j == len(self._kept):
            self._kept.append(tuple(map(zeros, self._like)))
        return self._forth(u, (*[moved[i] for i in self._order], *inputs), self._kept[j]), self._kept[j]

    def back(
        self, v: Tensors, moved: Tensors, kept: Tensors, inputs: Tensors, taken: Tensors, places: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Return the part of ``Sᴴ v`` in u and the gradients in what moves; write that in inputs to places."""
        given = (*[moved[i] for i in self._order], *kept, *inputs, *taken)
        found = self._back((*v, *self._sums), given, (*places, *self._of_moving))
        self._sums = found[self._count :]
        return found[: self._count], self._of_moving

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

    def forth(
        self, u: Tensors, moved: Tensors, inputs: Tensors, j: int, *, last: bool = False
    ) -> tuple[Tensors, Tensors]:
        """Return the next u, unless that is the last and not asked for, and what is kept of the j-th of a segment."""
        return () if last else self._function(moved, (*u, *inputs))[: self._count], u

    def back(
        self, v: Tensors, moved: Tensors, kept: Tensors, inputs: Tensors, taken: Tensors, places: Tensors
    ) -> tuple[Tensors, Tensors]:
        """Return the part of ``Sᴴ v`` in u and the gradients in what moves; write that in inputs to places."""
        v = (*v, *taken)
        pairs = list(zip(self._is_moving, self._gradient(moved, (*kept, *inputs), v), strict=True))
        terms = [gradient for moves, gradient in pairs if not moves]
        before = self._sums or [torch.zeros_like(term) for term in terms]
        self._sums = [a + b for a, b in zip(before, terms, strict=True)]
        found = self._adjoint(moved, v)
        write(found[self._count :], places)
        return found[: self._count], tuple(gradient for moves, gradient in pairs if moves)

    def ends(self) -> Sequence[Tensor]:
        """Return the gradients in what does not move."""
        return self._sums


class Recomputed:
    """The values that steps keep, the last first: computed again for each segment from the state at its beginning."""

    def __init__(self, steps: Together | Apart, starts: Sequence[Tensors]) -> None:
        self._steps, self._starts = steps, list(starts)

    def backwards(self, moved: Sequence[Tensors], inputs: Sequence[Tensors]) -> Iterator[Tensors]:
        """Yield what is kept of each step of a segment."""
        u, found = self._starts.pop(), list[Tensors]()
        for j, (x, i) in enumerate(zip(moved, inputs, strict=True)):
            u, kept = self._steps.forth(u, x, i, j, last=j + 1 == len(moved))
            found.append(kept)
        while found:
            yield found.pop()


class Marks:
    """A record of the states at the beginning of segments: their products with a random one, and the largest norm."""

    def __init__(self, like: Tensors) -> None:
        self._probe = tuple([
            torch.randn(t.shape, generator=torch.Generator(t.device).manual_seed(i), dtype=t.dtype, device=t.device)
            for i, t in enumerate(like)
        ])  # fmt: skip
        self.largest, self.products = 0.0, list[complex]()

    def add(self, u: Tensors) -> None:
        """Take the next state."""
        self.largest = max(self.largest, norm(u))
        self.products.append(self.product(u))

    def product(self, u: Tensors) -> complex:
        """Return the product of a state with the random one, which shows about as much of an error as its norm does."""
        return sum(complex(torch.vdot(p.flatten(), t.flatten())) for p, t in zip(self._probe, u, strict=True))


class Undone:
    """The same from the last state on, where ``back`` undoes a step; ``order`` says which of what moves it reads."""

    def __init__(self, steps: Together | Apart, back: Call, order: Sequence[int], last: Tensors, marks: Marks) -> None:
        self._steps, self._back, self._order, self._u = steps, back, tuple(order), last
        self._marks, self._products = marks, list(marks.products)

    def backwards(self, moved: Sequence[Tensors], inputs: Sequence[Tensors]) -> Iterator[Tensors]:
        """Yield what is kept of each step of a segment; raise if the state at its beginning does not come back.

        It has to, to half of the digits of the largest state.
        """
        for x, i in zip(reversed(moved), reversed(inputs), strict=True):
            self._u = self._back(self._u, (*[x[slot] for slot in self._order], *i), ())
            yield self._steps.forth(self._u, x, i, 0, last=True)[1]
        gap, most = abs(self._marks.product(self._u) - self._products.pop()), math.sqrt(eps_of(self._u))
        largest = self._marks.largest
        if not gap <= most * largest:
            raise NotDifferentiableError(
                f"expected the inverse of the step to give the states back to {most:.1e} of the largest, got "
                f"{gap / largest if largest else gap:.1e}: rounding grows in each step back; leave inverse= out, which "
                "keeps √T states, or compute in double precision"
            )


def zeros(like: Tensor) -> Tensor:
    """Return zeros of the shape, dtype and device of a fake tensor."""
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def write(results: Sequence[Tensor], places: Tensors) -> None:
    """Copy results to places."""
    for result, place in zip(results, places, strict=True):
        place.copy_(result)
