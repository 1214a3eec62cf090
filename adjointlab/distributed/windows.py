"""Which rows each process sends to which other process, so that each gets a window of an array split into shards.

A *window* is a range of rows whose indices are taken modulo the size of the array, as if it were periodic. A halo is
one example, even if it is wider than a neighbour's shard. The input rows that a strided convolution needs for this
process's outputs are another.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from typing import NamedTuple

Rows = tuple[int, int]  # the first one, and their number


class Piece(NamedTuple):
    """Consecutive rows of a window that one process holds: from row ``source`` of its shard, to row ``target``."""

    peer: int
    source: int
    target: int
    length: int


class Plan(NamedTuple):
    """The rows that one process keeps, sends and receives in an exchange, for each other in the window's order."""

    kept: tuple[Piece, ...]  # of this process's window, from its own shard
    gives: tuple[tuple[Rows, ...], ...]  # of this process's shard
    takes: tuple[tuple[Rows, ...], ...]  # of this process's window
    local: bool  # whether every process holds its whole window already


@functools.lru_cache(maxsize=256)
def exchange_plan(owned: tuple[int, ...], windows: tuple[int, ...], rank: int) -> Plan:
    """Return the plan of process ``rank``, where process r holds the rows ``owned[r]`` to ``owned[r + 1]``."""
    ranks = range(len(owned) - 1)
    cuts = [_cut(owned, windows[2 * r], windows[2 * r + 1]) for r in ranks]
    return Plan(
        tuple(p for p in cuts[rank] if p.peer == rank),
        tuple(tuple((p.source, p.length) for p in cuts[r] if p.peer == rank != r) for r in ranks),
        tuple(tuple((p.target, p.length) for p in cuts[rank] if p.peer == r != rank) for r in ranks),
        all(p.peer == r for r in ranks for p in cuts[r]),
    )


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
