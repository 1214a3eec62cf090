"""Sums of pieces: rectangles of sources, each with a factor, placed in a result that is zero elsewhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import fx

_MOST_BARE = 8  # rectangles that are zeroed one by one


class Span(NamedTuple):
    """A range of one dimension of a result, and of which dimension of the source, None where that has none."""

    dim: int | None
    read: int
    write: int
    length: int


@dataclass(frozen=True)
class Piece:
    """``factor`` times a rectangle of a source, placed in a result, of whose dimensions each has a span."""

    source: fx.Node
    factor: complex
    spans: tuple[Span, ...]
    index: tuple[tuple[int, int], ...] = ()  # dimensions of the source that the result lacks, and where it is in them

    @property
    def volume(self) -> int:
        """Number of entries."""
        return math.prod(span.length for span in self.spans)

    @property
    def places(self) -> tuple[tuple[slice | int, ...], tuple[slice | int, ...]]:
        """How to index the source, and how the result: by a number where the other has no dimension."""
        read: dict[int, slice | int] = dict(self.index)
        read |= {dim: slice(start, start + length) for dim, start, _, length in self.spans if dim is not None}
        write = [start if dim is None else slice(start, start + length) for dim, _, start, length in self.spans]
        return tuple(read[dim] for dim in sorted(read)), tuple(write)

    def meets(self, other: Piece) -> bool:
        """Return whether two pieces of one result have places in common."""
        pairs = zip(self.spans, other.spans, strict=True)
        return all(a.write < b.write + b.length and b.write < a.write + a.length for a, b in pairs)

    @property
    def starts(self) -> dict[int, int]:
        """Where the rectangle begins in the source, by its dimensions."""
        return {span.dim: span.read for span in self.spans if span.dim is not None} | dict(self.index)

    def moved(self, dim: int, by: int, size: int) -> Sum:
        """Return the piece moved along a dimension of the result, and cut to the new size of that."""
        of, read, write, length = self.spans[dim]
        start, stop = max(0, write + by), min(size, write + by + length)
        span = Span(of, read + start - write - by, start, stop - start)
        return (self._with(dim, span),) if start < stop else ()

    def dropped(self, dim: int) -> Piece:
        """Return the piece in a result without a dimension, where it is at one index."""
        of, read, *_ = self.spans[dim]
        return replace(self._with(dim), index=self.index if of is None else (*self.index, (of, read)))

    def inserted(self, dim: int, index: int) -> Piece:
        """Return the piece at one index of a new dimension."""
        return replace(self, spans=(*self.spans[:dim], Span(None, 0, index, 1), *self.spans[dim:]))

    def aligned(self) -> Piece:
        """Return the same with spans of one entry where both source and result have an index alone, if that fits."""
        if not self.index or len(self.index) != sum(span.dim is None for span in self.spans):
            return self
        at = iter(sorted(self.index))
        spans = tuple([Span(*next(at), span.write, 1) if span.dim is None else span for span in self.spans])
        dims = [span.dim or 0 for span in spans]
        return replace(self, spans=spans, index=()) if dims == sorted(dims) else self

    def _with(self, dim: int, *spans: Span) -> Piece:
        return replace(self, spans=(*self.spans[:dim], *spans, *self.spans[dim + 1 :]))


Sum = tuple[Piece, ...]
Place = tuple[slice, ...]


def uncovered(pieces: Sum, shape: Sequence[int]) -> tuple[Place, ...]:
    """Return the rectangles of a result that are to be zero before pieces are added to it.

    They are those that none of the ``pieces`` covers, which do not meet each other, or all of it at once where these
    are many, or large.
    """
    whole = tuple([slice(0, n) for n in shape])
    places = [whole]
    for piece in pieces:
        places = [rest for place in places for rest in _around(place, piece)]
        if len(places) > _MOST_BARE:
            return (whole,)
    volume = sum(math.prod(s.stop - s.start for s in place) for place in places)
    return tuple(places) if 2 * volume <= math.prod(shape) else (whole,)


def _around(place: Place, piece: Piece) -> list[Place]:
    """Return a rectangle without that of a piece, as rectangles that do not meet each other."""
    spans = [
        slice(max(own.start, write), min(own.stop, write + length))
        for own, (_, _, write, length) in zip(place, piece.spans, strict=True)
    ]
    if any(span.start >= span.stop for span in spans):
        return [place]
    found: list[Place] = []
    for dim, (own, span) in enumerate(zip(place, spans, strict=True)):
        sides = slice(own.start, span.start), slice(span.stop, own.stop)
        found += [(*spans[:dim], side, *place[dim + 1 :]) for side in sides if side.start < side.stop]
    return found


def whole(node: fx.Node, factor: complex = 1) -> Sum:
    """Return the sum whose one piece is all of a node."""
    return (Piece(node, factor, tuple(Span(dim, 0, 0, n) for dim, n in enumerate(node.meta["val"].shape))),)


def merged(pieces: Sum) -> Sum:
    """Return an equal sum in which parts of one rectangle are one piece: a write of one entry leaves five around it."""
    found, count = tuple([piece.aligned() for piece in pieces]), len(pieces) + 1
    while 1 < len(found) < count:
        count = len(found)
        for dim in range(len(found[0].spans)):
            found = _joined(found, dim)
    return found


def _joined(pieces: Sum, dim: int) -> Sum:
    """Return an equal sum in which pieces that go on, along a dimension, where others end are parts of these."""
    lines: dict[Any, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda piece: piece.spans[dim].write):
        of, read, write, length = piece.spans[dim]
        line = lines.setdefault((of, write - read, piece._with(dim)), [])
        before = line[-1].spans[dim] if line else None
        if of is not None and before is not None and before.write + before.length == write:
            line[-1] = line[-1]._with(dim, before._replace(length=before.length + length))
        else:
            line.append(piece)
    return tuple(itertools.chain.from_iterable(lines.values()))


def moved(pieces: Sum, dim: int, by: int, size: int) -> Sum:
    """Return pieces moved along a dimension of the result, and cut to the new size of that."""
    return tuple(left for piece in pieces for left in piece.moved(dim, by, size))
