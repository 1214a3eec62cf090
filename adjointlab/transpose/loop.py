"""A linear step S applied T times, and the adjoint of that backwards in time, for which no state is stored.

Forwards, ``(u_{t+1}, o_t) = S(u_t, i_t)`` for t = 0, …, T − 1; backwards, ``(λ_t, ī_t) = Sᴴ(λ_{t+1}, ō_t)``. Gradients
in what S depends on take both: the states are computed again, segment by segment of √T steps, from the state at the
beginning of each, while the adjoint runs backwards through the segment.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adjointlab import compat
from adjointlab.modules import Entries
from adjointlab.numerics import UNITS, allowance, eps_of, norm, relative_gap
from adjointlab.slots import Slots
from adjointlab.space import Space
from adjointlab.transpose.dispatch import Transposition
from adjointlab.transpose.frontend.vjp import Tensors
from adjointlab.transpose.runtime.autodiff import state_gradient
from adjointlab.transpose.runtime.derivation import Derivation
from adjointlab.transpose.runtime.program import Call, as_traced
from adjointlab.transpose.runtime.steps import Apart, Marks, Recomputed, Step, Together, Undone


@dataclass(frozen=True)
class Way:
    """One of the two directions of time: what is given to it, and what it returns."""

    name: str  # of the function of the step
    first: bool  # whether the state that it starts from is given, which is zero otherwise
    last: bool  # whether it returns the state that it ends with
    is_back: bool


class Loop:
    """A step from ``(state, input)`` to ``(state, output)``, ``steps`` times, on leaves.

    ``count`` is the number of leaves of the state; ``slots`` holds tensors that the step reads, to be replaced by those
    of each time in ``series``.
    """

    def __init__(
        self, source: Transposition, steps: int, count: int, slots: Slots, series: Entries, *,
        initial: bool, final: bool,
    ) -> None:  # fmt: skip
        self.source, self.steps, self.count, self.slots, self.series = source, steps, count, slots, series
        self.forwards = Way("function", initial, final, is_back=False)
        self.backwards = Way("adjoint", final, initial, is_back=True)
        self.inverse: Loop | None = None  # of u_t = S⁻¹(u_{t+1}, i_t), if known
        self.length = max(1, math.isqrt(max(steps - 1, 0)) + 1)  # of a segment, √T rounded up

    @property
    def segments(self) -> list[range]:
        """The steps, in segments."""
        starts = range(0, self.steps, self.length)
        return [range(start, min(start + self.length, self.steps)) for start in starts]

    def spaces(self, way: Way) -> tuple[Space, Space]:
        """Return the domain and the codomain of the step, or of its adjoint."""
        pair = self.source.domain, self.source.codomain
        return pair[::-1] if way.is_back else pair

    def __call__(self, leaves: Tensors, way: Way) -> Tensors:
        """Return the results of a way for leaves, with a derivative where one may be asked for."""
        k = self.source.domain.batch_dims
        run, state = self.run(tuple(leaves[0].shape[:k]))
        return run(way, (*state, *self.series.leaves(), *leaves))

    def run(self, batch: tuple[int, ...]) -> tuple[Run, Tensors]:
        """Return the loop as it is now for a size of batches, and the state of the step."""
        derivation, state = self.source.now(batch)
        return Run(self, derivation, self._places(derivation), batch), state

    @torch.no_grad()
    def differs(self) -> str:
        """Return how the step is another one than was derived, or not linear, at some time; nothing where it is not.

        Where the derivation holds for all values of what the step reads, three times are looked at, else all of them.
        """
        domain, codomain = self.source.domain, self.source.codomain
        run, state = self.run(domain.batch_shape)
        derivation = run.derivation
        draw, series = torch.Generator().manual_seed(0), self.series.leaves()
        x, z, v = (space.leaves(space.randn(draw)) for space in (domain, domain, codomain))
        both, bound = tuple(a + b for a, b in zip(x, z, strict=True)), allowance(UNITS, eps_of((*x, *v)))
        certain = not series or (derivation.programs and not derivation.is_doubtful)
        forth, back = (functools.partial(run.tracked, name, state) for name in ("function", "adjoint"))
        for t in sorted({0, self.steps // 2, self.steps - 1} if series else {0}) if certain else range(self.steps):
            moved = run.at_times(series, 0, range(t, t + 1))[0]
            with self.slots.kept():
                self.slots.put(moved)
                own = self.source.eager.called(x)
                of_x, of_z, of_both, of_v = forth(moved, x), forth(moved, z), forth(moved, both), back(moved, v)
            if relative_gap(own, of_x) > bound:
                return (
                    f"at step {t} it is not what was derived: it takes numbers or choices from its x; compute with "
                    'tensors alone, or choose engine="eager"'
                )
            pairs = [(domain, both, of_v), (codomain, of_both, v)]
            left, right = (space.inner(space.unflatten(a), space.unflatten(b)).real for space, a, b in pairs)
            scale = norm(of_both) * norm(v)
            added = tuple(a + b for a, b in zip(of_x, of_z, strict=True))
            if relative_gap(added, of_both) > 2 * bound or abs(left - right) > bound * scale:
                return f"at step {t} it is not: an offset has to come in by inputs, a choice to be made before"
        for name, leaves in (("function", x), ("adjoint", v)) if derivation.programs and self.steps else ():
            if run.gap(name, state, leaves) > bound:
                derivation.programs[name][0].unbind()
        return ""

    def _places(self, derivation: Derivation) -> tuple[tuple[int, int], ...]:
        """Return where the state has which slot."""
        slots = {id(slot): number for number, slot in enumerate(self.slots.leaves())}
        read = [source.read() for source in derivation.state]
        return tuple((place, slots[id(tensor)]) for place, tensor in enumerate(read) if id(tensor) in slots)


@dataclass(frozen=True, eq=False)
class Run:
    """A loop as it is now. What it is called with are the state of the derivation, the series, and leaves."""

    loop: Loop
    derivation: Derivation
    places: tuple[tuple[int, int], ...]
    batch: tuple[int, ...]

    def __call__(self, way: Way, tensors: Tensors) -> Tensors:
        """Return the results of a way for leaves, with a derivative where one may be asked for."""
        if not compat.plain():
            return self.unrolled(way, tensors)
        if not compat.differentiated(tensors):
            return self.swept(way, tensors) if self.derivation.programs else self.unrolled(way, tensors)
        if compat.is_forward_mode() or not self.derivation.programs:
            return self.unrolled(way, tensors)
        found: Tensors = _swept(self, way, *tensors)
        return found

    # -- parts of what is given, and room for what is made -------------------------------------------------------------

    def parts(self, tensors: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """Return the state, the series and the leaves."""
        n, m = len(self.derivation.state), len(self.loop.series.leaves())
        return tensors[:n], tensors[n : n + m], tensors[n + m :]

    def _given(self, way: Way, leaves: Tensors) -> tuple[Tensors, Tensors]:
        """Return the state that a way starts from, and what it reads at each time."""
        n, specs = self.loop.count, self.loop.spaces(way)[0].specs
        if way.first:
            return leaves[:n], leaves[n:]
        k = len(self.batch)
        start = [torch.zeros((*self.batch, *s.shape[k:]), dtype=s.dtype, device=s.device) for s in specs[:n]]
        return tuple(start), leaves

    def _room(self, way: Way) -> Tensors:
        k, specs = len(self.batch), self.loop.spaces(way)[1].specs[self.loop.count :]
        shapes = [(*self.batch, self.loop.steps, *spec.shape[k:]) for spec in specs]
        return tuple(
            [torch.empty(s, dtype=spec.dtype, device=spec.device) for s, spec in zip(shapes, specs, strict=True)]
        )

    def at_times(self, tensors: Sequence[Tensor], dim: int, times: range) -> list[Tensors]:
        """Return the entries of stacked tensors at each of some times, as programs take them."""
        return [tuple(map(self._ready, entries)) for entries in _entries(tensors, dim, times)]

    def _ready(self, tensor: Tensor) -> Tensor:
        return as_traced(tensor, of_storage=self.derivation.of_storage)

    def step(self, name: str, state: Tensors) -> Step:
        """Return the step, or its adjoint, as a function of the entries of the series and of leaves."""
        if not self.derivation.programs:
            return lambda moved, leaves: self.tracked(name, state, moved, leaves)
        program, _ = self.derivation.programs[name]
        run = program.each(state, tuple(place for place, _ in self.places))
        return lambda moved, leaves: run(
            tuple([moved[slot] for _, slot in self.places]), tuple(map(self._ready, leaves))
        )

    def row(self, name: str, state: Tensors) -> Call:
        """Return the step, or its adjoint, for many calls in a row: see :meth:`Program.row`."""
        moving, carried = tuple(place for place, _ in self.places), tuple((i, i) for i in range(self.loop.count))
        return self.derivation.programs[name][0].row(state, moving, carried)

    def gap(self, name: str, state: Tensors, leaves: Tensors) -> float:
        """Return how far some steps in a row are from steps one by one: as many as put each tensor at each place."""
        n, row = self.loop.count, self.row(name, state)
        moved = self.at_times(self.loop.series.leaves(), 0, range(1))[0]
        carry, inputs, gaps = leaves[:n], tuple(map(self._ready, leaves[n:])), list[float]()
        for _ in range(min(self.loop.steps, n + 2)):
            expected = tuple([t.clone() for t in self.tracked(name, state, moved, (*carry, *inputs))])
            places = tuple(map(torch.empty_like, expected[n:]))
            carry = row(carry, (*[moved[slot] for _, slot in self.places], *inputs), places)
            gaps.append(relative_gap(expected, (*carry, *places)))
        return max(gaps)

    # -- sweeps --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def swept(self, way: Way, tensors: Tensors, kept: list[Any] | None = None) -> Tensors:
        """Return the results of a way for leaves; put the states at the beginning of each segment into ``kept``.

        Where the inverse of the step is known, it is the last state instead, and marks to know the others by.
        """
        state, series, leaves = self.parts(tensors)
        step, order, k = self.row(way.name, state), [slot for _, slot in self.places], len(self.batch)
        (carry, given), room = self._given(way, leaves), self._room(way)
        marks = None if kept is None or self.loop.inverse is None else Marks(carry)
        for times in self._in_order(way):
            if marks is not None:
                marks.add(carry)
            elif kept is not None:
                kept.append(tuple([t.clone() for t in carry]))
            moved, read = self.at_times(series, 0, times), self.at_times(given, k, times)
            entries = [
                ((*[x[slot] for slot in order], *i), places)
                for x, i, places in zip(moved, read, _entries(room, k, times), strict=True)
            ]
            for others, places in reversed(entries) if way.is_back else entries:
                carry = step(carry, others, places)
        if kept is not None and marks is not None:
            kept += [tuple([t.clone() for t in carry]), marks]
        return self._result(way, carry, room)

    def _in_order(self, way: Way) -> Iterator[range]:
        return iter(self.loop.segments[::-1] if way.is_back else self.loop.segments)

    def _result(self, way: Way, carry: Tensors, room: Tensors) -> Tensors:
        """Return results in memory of their own, to which the caller may write: steps share that of their arguments."""
        return (*[t.clone() for t in carry], *room) if way.last else room

    @torch.no_grad()
    def gradients(
        self, tensors: Tensors, cotangents: Tensors, wanted: tuple[bool, ...], kept: Sequence[Any]
    ) -> tuple[list[Tensor | None], Tensors]:
        """Return the gradients of ``Re⟨A_θ x, v⟩`` in the wanted ones of state and series, and ``Aᴴ v``.

        ``kept`` are the states at the beginning of each segment, or the last state.
        """
        state, series, leaves = self.parts(tensors)
        way, k = self.loop.backwards, len(self.batch)
        moving = [(place, slot) for place, slot in self.places if wanted[len(state) + slot]]
        summed = [i for i in range(len(state)) if wanted[i] and i not in dict(self.places)]
        steps = self._steps(state, tuple(sorted([*summed, *(place for place, _ in moving)])))
        # A series that the step does not read has the gradient zero.
        of_series = [torch.zeros_like(s) if wanted[len(state) + j] else None for j, s in enumerate(series)]
        given = self._given(self.loop.forwards, leaves)[1]
        states = Recomputed(steps, kept) if self.loop.inverse is None else self._undone(steps, *kept)
        (carry, taken), room = self._given(way, cotangents), self._room(way)
        for times in self._in_order(way):
            moved, read = self.at_times(series, 0, times), self.at_times(given, k, times)
            pulled, places = self.at_times(taken, k, times), _entries(room, k, times)
            for j, found in zip(reversed(range(len(times))), states.backwards(moved, read), strict=True):
                carry, gradients = steps.back(carry, moved[j], found, read[j], pulled[j], places[j])
                for (_, slot), gradient in zip(moving, gradients, strict=True):
                    of_series[slot][times[j]] += gradient  # type: ignore[index]
        of_state: list[Tensor | None] = [None for _ in state]
        for place, gradient in zip(summed, steps.ends(), strict=False):  # of no step there may be none
            of_state[place] = gradient
        return [*of_state, *of_series], self._result(way, carry, room)

    def _undone(self, steps: Together | Apart, last: Tensors, marks: Marks) -> Undone:
        assert self.loop.inverse is not None
        run, state = self.loop.inverse.run(self.batch)
        return Undone(steps, run.row("function", state), [slot for _, slot in run.places], last, marks)

    def _steps(self, state: Tensors, chosen: tuple[int, ...]) -> Together | Apart:
        """Return steps with gradients in chosen places of the state."""
        moving, n = tuple(place for place, _ in self.places), self.loop.count
        programs = self.derivation.in_sweeps(n, moving, chosen)
        if programs is not None:
            return Together(programs, state, self.places, n)
        wanted = tuple(i in chosen for i in range(len(state)))
        of_state = state_gradient(self.derivation.programs["function"][0].whole, None, len(state), adjoint_side=False)

        def gradient(moved: Tensors, x: Tensors, v: Tensors) -> list[Tensor]:
            x, v = (tuple(map(self._ready, leaves)) for leaves in (x, v))
            found = of_state(self._state_at(state, moved), x, v, wanted)
            return [found[i] for i in chosen]

        is_moving = [i in moving for i in chosen]
        return Apart(self.step("function", state), self.step("adjoint", state), gradient, is_moving, n)

    def _state_at(self, state: Tensors, moved: Tensors) -> Tensors:
        found = list(state)
        for place, slot in self.places:
            found[place] = moved[slot]
        return tuple(found)

    # -- with derivatives of autograd's own, of any order, which keep each state ---------------------------------------

    def unrolled(self, way: Way, tensors: Tensors) -> Tensors:
        """Return the results of a way for leaves, step by step in the sight of autograd and of transforms."""
        state, series, leaves = self.parts(tensors)
        n, k, made = self.loop.count, len(self.batch), []
        carry, given = self._given(way, leaves)
        times = range(self.loop.steps)
        with self.loop.slots.kept():
            for t in reversed(times) if way.is_back else times:
                moved = tuple([s.select(0, t) for s in series])
                found = self.tracked(way.name, state, moved, (*carry, *[g.select(k, t) for g in given]))
                carry = found[:n]
                made.append(found[n:])
        made = made[::-1] if way.is_back else made
        return self._result(way, carry, tuple([torch.stack(entries, k) for entries in zip(*made, strict=True)]))

    def tracked(self, name: str, state: Tensors, moved: Tensors, leaves: Tensors) -> Tensors:
        """Return the step, or its adjoint, with a derivative where one may be asked for."""
        if self.derivation.programs:
            return self.derivation.programs[name][1](*self._state_at(state, moved), *map(self._ready, leaves))
        self.loop.slots.put(moved)
        user = self.derivation.user
        if not moved or user is None:
            return self.derivation.eager[name](leaves)
        return self.derivation.functions(user.keeping(0))[name](leaves)  # a pull-back is of one time

    def pull_back(
        self, way: Way, tensors: Tensors, cotangents: Tensors, wanted: tuple[bool, ...], kept: Sequence[Any]
    ) -> tuple[Any, ...]:
        """Return the gradients of ``Re⟨way(x), v⟩`` in all tensors that it was called with."""
        state, series, leaves = self.parts(tensors)
        n = len(state) + len(series)
        other = self.loop.forwards if way.is_back else self.loop.backwards
        if not any(wanted[:n]):
            found = self(other, (*state, *series, *cotangents)) if any(wanted) else [None for _ in leaves]
            return *[None] * n, *found
        x, v = (cotangents, leaves) if way.is_back else (leaves, cotangents)
        if compat.differentiated((*tensors, *cotangents)):
            found = self(other, (*state, *series, *cotangents)) if any(wanted[n:]) else [None for _ in leaves]
            return *self._differentiable((*state, *series), x, v, wanted[:n]), *found
        given, states, along = (*state, *series, *x), list(kept), None
        if way.is_back:
            along = self.swept(other, given, states)
        gradients, back = self.gradients(given, v, wanted[:n], states)
        return *gradients, *(back if along is None else along)

    def _differentiable(self, given: Tensors, x: Tensors, v: Tensors, wanted: tuple[bool, ...]) -> list[Tensor | None]:
        """Return the gradients in state and series as functions that can be differentiated again."""
        images = self.unrolled(self.loop.forwards, (*given, *x))
        pairs = [(a, b) for a, b in zip(images, v, strict=True) if a.requires_grad]
        gradients: list[Tensor | None] = [None] * len(given)
        chosen = [i for i, asked in enumerate(wanted) if asked]
        if pairs:
            outputs, weights = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                outputs, [given[i] for i in chosen], weights, create_graph=True, allow_unused=True
            )
            for i, gradient in zip(chosen, found, strict=True):
                gradients[i] = gradient
        return gradients


def _entries(tensors: Sequence[Tensor], dim: int, times: range) -> list[Tensors]:
    """Return views of the entries of stacked tensors at each of some times."""
    parts = [t.narrow(dim, times.start, len(times)).unbind(dim) for t in tensors]
    return list(zip(*parts, strict=True)) if parts else [()] * len(times)


class _Swept(torch.autograd.Function):
    """A way through time with the adjoint, and gradients by two sweeps, as its derivative."""

    @staticmethod
    def forward(ctx: Any, run: Run, way: Way, *tensors: Tensor) -> Tensors:
        ctx.run, ctx.way, ctx.kept = run, way, []
        ctx.save_for_backward(*tensors)
        n = len(tensors) - len(run.parts(tensors)[2])
        return run.swept(way, tensors, ctx.kept if any(ctx.needs_input_grad[2 : 2 + n]) and not way.is_back else None)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        wanted = tuple(ctx.needs_input_grad[2:])
        return None, None, *ctx.run.pull_back(ctx.way, ctx.saved_tensors, cotangents, wanted, ctx.kept)


_swept: Any = _Swept.apply
