"""Sparse matrices by rows, and how they are composed: rows taken, scaled, added to others, products and transposes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 17  # entries that are sorted at once
_TRIED = 4  # blocks at least
_HARDLY = 0.9  # of the entries are left where sorting is not worth it: products take as long


class NotByIndexError(Exception):
    """A program is no linear map by index; the message is the reason."""


class TooLargeError(NotByIndexError):
    """A matrix would have too many entries."""


@dataclass(frozen=True)
class Rows:
    """A sparse matrix by rows: the entries of row i are those from ``start[i]`` to ``start[i + 1]``."""

    start: Tensor
    column: Tensor
    value: Tensor
    most: int = 1 << 62  # entries that it may have
    is_single: bool = False  # whether it is known that each row has one entry
    is_one: bool = False  # whether it is known that all entries are one

    def of(
        self, start: Tensor, column: Tensor, value: Tensor, *, is_single: bool = False, is_one: bool = False
    ) -> Rows:
        """Return another matrix with the same limit."""
        return Rows(start, column, value, self.most, is_single, is_one)

    @property
    def counts(self) -> Tensor:
        """Number of entries of each row."""
        return self.start.diff()

    @property
    def row(self) -> Tensor:
        """The row of each entry."""
        counts = self.counts
        return torch.arange(len(counts), device=counts.device, dtype=self.column.dtype).repeat_interleave(counts)

    def take(self, index: Tensor) -> Rows:
        """Return the matrix of the rows with the given numbers, empty for −1."""
        if len(index) == len(self.start) - 1 and torch.equal(index, torch.arange(len(index)).to(index)):
            return self
        if self.is_single and bool((index >= 0).all()):
            self.check(len(index))
            start = torch.arange(len(index) + 1, device=index.device)
            return self.of(start, *self._at(index), is_single=True, is_one=self.is_one)
        counts = self.counts[index].masked_fill_(index < 0, 0)
        start = starts(counts)
        self.check(int(start[-1]))
        first = (self.start[index] - start[:-1]).to(self.column.dtype).repeat_interleave(counts)
        entries = first.add_(torch.arange(len(first), device=first.device, dtype=first.dtype))
        return self.of(start, *self._at(entries), is_one=self.is_one)

    def _at(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Return columns and values of some entries, by the door that is two to three times as fast."""
        return self.column.index_select(0, entries), self.value.index_select(0, entries)

    def check(self, entries: int) -> None:
        """Raise if there are more entries than there may be."""
        if entries > self.most:
            raise TooLargeError(f"too large for memory: more than {self.most:,} entries")

    def scaled(self, factor: Tensor) -> Rows:
        """Return the matrix with each row times a factor; the factors themselves where it has ones."""
        each = self._for_each(factor.resolve_conj().resolve_neg())
        value = each if self.is_one else self.value * each
        return self.of(self.start, self.column, value, is_single=self.is_single)

    def _for_each(self, rows: Tensor) -> Tensor:
        return rows if self.is_single else rows.repeat_interleave(self.counts)

    def put(self, target: Tensor, count: int) -> Rows:
        """Return the matrix of ``count`` rows, to each of which those rows are added that have it as target."""
        target = self._for_each(target.to(self.column.dtype))
        start = starts(torch.bincount(target, minlength=count))
        if bool((target[1:] >= target[:-1]).all()):
            return self.of(start, self.column, self.value, is_one=self.is_one)
        order = target.argsort(stable=True)
        return self.of(start, *self._at(order), is_one=self.is_one)

    def applied(self, other: Rows) -> Rows:
        """Return the product: this matrix times another."""
        if other.is_single:
            self.check(len(self.column))
            column, value = other._at(self.column)
            return other.of(self.start, column, self.value * value)
        rows = other.take(self.column)
        return other.of(rows.start[self.start], rows.column, rows.value * rows._for_each(self.value))

    def merged(self, count: int) -> Rows:
        """Return the matrix in which each ``count`` rows that follow one another are added."""
        return self.of(self.start[::count].contiguous(), self.column, self.value, is_one=self.is_one)

    def transposed(self, columns: int) -> Rows:
        """Return the transpose of a matrix with a number of columns."""
        order = self.column.argsort(stable=True)
        start = starts(torch.bincount(self.column, minlength=columns))
        return self.of(start, self.row.index_select(0, order), self.value.index_select(0, order))

    def compact(self, columns: int) -> Rows:
        """Return the matrix with one entry for each place, in the order of columns.

        It is sorted by blocks of rows, which fit into the caches.
        """
        lengths, found, values = zip(*[self._compact(*block, columns) for block in _blocks(self.start)], strict=True)
        return self.of(starts(torch.cat(lengths)), torch.cat(found), torch.cat(values))

    def smaller(self, columns: int) -> Rows:
        """Return the compact matrix, or this one where some blocks say that it has hardly more entries."""
        blocks = _blocks(self.start)
        tried = blocks[:: max(1, len(blocks) // _TRIED)]
        left = sum(len(self._compact(*block, columns)[1]) for block in tried)
        is_lean = left > _HARDLY * sum(int(self.start[last] - self.start[first]) for first, last in tried)
        return self if is_lean else self.compact(columns)

    def _compact(self, first: int, last: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the counts, columns and values of some rows; entries of one place are added in double precision."""
        part = slice(int(self.start[first]), int(self.start[last]))
        column, value, each = self.column[part], self.value[part], self.counts[first:last]
        small = (last - first) * columns < 1 << 31
        row = torch.arange(last - first, device=column.device, dtype=torch.int32 if small else torch.int64)
        key = row.repeat_interleave(each).mul_(columns).add_(column)
        if not bool((key[1:] >= key[:-1]).all()):
            order = key.argsort(stable=True)  # inside of rows, which are in order
            key, column, value = (part.index_select(0, order) for part in (key, column, value))
        is_first = torch.ones(len(key), dtype=torch.bool, device=key.device)
        torch.ne(key[1:], key[:-1], out=is_first[1:])
        if not bool(is_first.all()):
            place = is_first.cumsum(0).sub_(1)
            wide = value.to(torch.complex128 if value.is_complex() else torch.float64)
            value = wide.new_zeros(int(place[-1]) + 1).index_add_(0, place, wide).to(value.dtype)
            column, each = column[is_first], starts(is_first)[self.start[first : last + 1] - part.start].diff()
        return each, column, value


def _blocks(start: Tensor) -> list[tuple[int, int]]:
    """Return ranges of rows, each with so many entries as a cache has room for, or one row."""
    marks = torch.arange(0, int(start[-1]), _BLOCK, device=start.device)
    edges = sorted({0, len(start) - 1, *torch.searchsorted(start, marks).tolist()})
    return list(itertools.pairwise(edges))


def starts(counts: Tensor) -> Tensor:
    """Return where the entries of each row begin, and the last ones end."""
    return torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.cumsum(0, dtype=torch.int64)])


def diagonal(blocks: Sequence[Rows], times: int, columns: int) -> Rows:
    """Return a matrix with blocks on its diagonal, each of them several times, with a number of columns."""
    first, start, column, value, at = 0, [], [], [], 0
    for block in blocks:
        for _ in range(times):
            start.append(block.start[:-1] + first)
            column.append(block.column + at)
            value.append(block.value)
            first, at = first + len(block.column), at + columns
    ends = blocks[0].start.new_tensor([first])
    return blocks[0].of(torch.cat([*start, ends]), torch.cat(column), torch.cat(value))
