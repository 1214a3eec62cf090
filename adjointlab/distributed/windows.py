"""Which rows each process sends to which other process, so that each gets a window of an array split into shards.

A *window* is a range of rows whose indices are taken modulo the size of the array, as if it were periodic. A halo is
one example, even if it is wider than a neighbour's shard. The input rows that a strided convolution needs for this
process's outputs are another.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one window that one process (``peer``) holds.

    ``source`` is the first row's index in the peer's shard, ``target`` its index in the window.
    """

    peer: int
    source: int
    target: int
    length: int


@dataclass(frozen=True)
class Plan:
    """The pieces that one process receives and sends in an exchange, each tuple in the order of its window."""

    rank: int
    window: tuple[Piece, ...]  # the pieces of this process's window
    sends: tuple[tuple[Piece, ...], ...]  # for each process, the pieces of its window that this process holds
    local: bool  # whether every process holds its whole window already

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return len(self.sends)

    def sends_to(self, peer: int) -> tuple[Piece, ...]:
        """Return the pieces that this process sends to another process."""
        return () if peer == self.rank else self.sends[peer]

    def receives_from(self, peer: int) -> tuple[Piece, ...]:
        """Return the pieces of this process's window that another process sends."""
        return () if peer == self.rank else tuple(piece for piece in self.window if piece.peer == peer)


@functools.lru_cache(maxsize=256)
def exchange_plan(owned: tuple[int, ...], windows: tuple[int, ...], rank: int) -> Plan:
    """Return the plan of process ``rank``, where process r holds the rows ``owned[r]`` to ``owned[r + 1]``."""
    ranks = len(owned) - 1
    cuts = [_cut(owned, windows[2 * r], windows[2 * r + 1]) for r in range(ranks)]
    local = all(piece.peer == r for r, pieces in enumerate(cuts) for piece in pieces)
    sends = tuple(tuple(piece for piece in pieces if piece.peer == rank) for pieces in cuts)
    return Plan(rank, cuts[rank], sends, local)


def _cut(owned: tuple[int, ...], start: int, stop: int) -> tuple[Piece, ...]:
    """Return a window as pieces, each held by one process."""
    size, pieces, row = owned[-1], [], start
    while row < stop:
        inside = row % size
        holder = bisect_right(owned, inside) - 1
        length = min(stop - row, owned[holder + 1] - inside)
        pieces.append(Piece(holder, inside - owned[holder], row - start, length))
        row += length
    return tuple(pieces)


def shard_range(size: int, parts: int, index: int) -> tuple[int, int]:
    """Return the row range of one shard by the rule of ``torch.chunk`` and DTensor: equal sizes except for the last."""
    step = -(-size // parts)
    return min(size, index * step), min(size, (index + 1) * step)


def shard_bounds(size: int, parts: int) -> tuple[int, ...]:
    """Return the first row of every shard, followed by the size of the array."""
    return (*[shard_range(size, parts, index)[0] for index in range(parts)], size)


__all__ = ["Piece", "Plan", "exchange_plan", "shard_bounds", "shard_range"]
