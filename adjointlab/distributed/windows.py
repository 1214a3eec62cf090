"""Who needs which rows of whom: an array in consecutive shards, and a window of it for each process.

A *window* is any range of rows, in which those before the first and after the last are those of a periodic array. So a
halo of any width is one case, more than one neighbour wide as well, and so are the rows that a strided convolution
needs for its share of the outputs.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Rows that one process holds and one window asks for: ``source`` among those held, ``target`` in the window."""

    peer: int
    source: int
    target: int
    length: int


@dataclass(frozen=True)
class Plan:
    """What one process does in an exchange; lists of pieces are in the order of the window that they are for."""

    rank: int
    needs: tuple[Piece, ...]  # of its window, by the process that holds them
    gives: tuple[tuple[Piece, ...], ...]  # of what it holds, for each process that needs it
    silent: bool  # whether no process needs anything of another

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return len(self.gives)

    def gives_to(self, peer: int) -> tuple[Piece, ...]:
        """Return the pieces of what this process holds that go to another."""
        return () if peer == self.rank else self.gives[peer]

    def takes_from(self, peer: int) -> tuple[Piece, ...]:
        """Return the pieces of this process's window that come from another."""
        return () if peer == self.rank else tuple(piece for piece in self.needs if piece.peer == peer)


@functools.lru_cache(maxsize=256)
def plan_of(owned: tuple[int, ...], windows: tuple[int, ...], rank: int) -> Plan:
    """Return the plan of process ``rank``, with rows ``owned[r]`` to ``owned[r + 1]`` held by process r."""
    ranks = len(owned) - 1
    cuts = [_cut(owned, windows[2 * r], windows[2 * r + 1]) for r in range(ranks)]
    silent = all(piece.peer == r for r, pieces in enumerate(cuts) for piece in pieces)
    gives = tuple(tuple(piece for piece in pieces if piece.peer == rank) for pieces in cuts)
    return Plan(rank, cuts[rank], gives, silent)


def _cut(owned: tuple[int, ...], start: int, stop: int) -> tuple[Piece, ...]:
    """Return a window as pieces of the processes that hold them."""
    size, pieces, row = owned[-1], [], start
    while row < stop:
        inside = row % size
        holder = bisect_right(owned, inside) - 1
        length = min(stop - row, owned[holder + 1] - inside)
        pieces.append(Piece(holder, inside - owned[holder], row - start, length))
        row += length
    return tuple(pieces)


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """Return the rows of one shard by the rule of ``torch.chunk`` and DTensor: of one size, but for the last."""
    step = -(-size // parts)
    return min(size, index * step), min(size, (index + 1) * step)


def bounds(size: int, parts: int) -> tuple[int, ...]:
    """Return where shards begin, and the size."""
    return (*[chunk(size, parts, index)[0] for index in range(parts)], size)


__all__ = ["Piece", "Plan", "bounds", "chunk", "plan_of"]
