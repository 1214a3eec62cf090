"""Calls in a row: the memory that they take, once for all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adjointlab.transpose.passes.in_row import InRow, inside, kind

Tensors = tuple[Tensor, ...]


class Row:
    """Calls in a row of a graph that is bound to memory, as often as what is carried is in another part of that."""

    def __init__(self, graph: InRow, state: Tensors, moving: tuple[int, ...]) -> None:
        self._graph, results = graph, set(graph.after)
        self._around: dict[int, tuple[Tensor, Tensor]] = {}  # by what has margins: itself, and its memory with these
        stays = tuple([t for i, t in enumerate(state) if i not in moving])
        fixed = zip((*stays, *graph.once(*state)), graph.moved, strict=True)
        self._fixed = tuple([self._with_margins(self._memory(t).copy_(t)) if moved else t for t, moved in fixed])
        self._rooms = [None if i in results else self._memory(room) for i, room in enumerate(graph.rooms)]
        self._pools: dict[Any, list[Tensor]] = {}
        self._calls: dict[tuple[int, ...], tuple[Tensors, Tensors, Tensors]] = {}  # by what is carried

    def __call__(self, carry: Tensors, given: Tensors, places: Tensors) -> Tensors:
        """Run a call, and return the tensors that the next one takes."""
        found = self._calls.get(tuple(map(id, carry))) or self._found(carry)
        self._graph.run(*given, *places, *found[0])
        return found[1]

    def _found(self, carry: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """Return the views that a call reads and writes, those that it carries on, and those that it was given."""
        made = {id(t) for pool in self._pools.values() for t in pool}
        taken = [t for t in carry if id(t) in made]
        own = tuple([t if id(t) in made else self._free(t, taken).copy_(t) for t in carry])
        key = tuple(map(id, own))
        if key not in self._calls:
            busy = list(own)
            rooms = tuple([self._free(fake, busy) if room is None else room
                           for fake, room in zip(self._graph.rooms, self._rooms, strict=True)])  # fmt: skip
            after = tuple([rooms[i] if i >= 0 else own[-1 - i] for i in self._graph.after])
            bound = self._graph.bind(*self._fixed, *map(self._with_margins, (*own, *rooms)))
            self._calls[key] = bound, after, own
        return self._calls[key]

    def _free(self, like: Tensor, taken: list[Tensor]) -> Tensor:
        """Return memory of the shape and dtype of something that is not taken; it is, from now on."""
        pool = self._pools.setdefault(kind(like), [])
        found = next((t for t in pool if not any(t is other for other in taken)), None)
        if found is None:
            found = self._memory(like)
            pool.append(found)
        taken.append(found)
        return found

    def _memory(self, like: Tensor) -> Tensor:
        margins = self._graph.margins.get(kind(like))
        if margins is None:
            return torch.empty(like.shape, dtype=like.dtype, device=like.device)
        shape = [low + n + high for n, (low, high) in zip(like.shape, margins, strict=True)]
        around = torch.zeros(shape, dtype=like.dtype, device=like.device)
        found = around[inside(like, margins)]
        self._around[id(found)] = found, around
        return found

    def _with_margins(self, tensor: Tensor) -> Tensor:
        return self._around[id(tensor)][1] if id(tensor) in self._around else tensor
