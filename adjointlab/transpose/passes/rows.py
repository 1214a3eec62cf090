"""Sparse matrices by rows, and how they are composed: rows taken, scaled, added to others, products and transposes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    def of(self, start: Tensor, column: Tensor, value: Tensor, *, is_single: bool = False) -> Rows:
        """Return another matrix with the same limit."""
        return Rows(start, column, value, self.most, is_single)

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
        if self.is_single and bool((index >= 0).all()):
            self._check(len(index))
            start = torch.arange(len(index) + 1, device=index.device)
            return self.of(start, self.column[index], self.value[index], is_single=True)
        counts = self.counts[index].masked_fill_(index < 0, 0)
        start = _starts(counts)
        self._check(int(start[-1]))
        first = (self.start[index] - start[:-1]).to(self.column.dtype).repeat_interleave(counts)
        entries = first.add_(torch.arange(len(first), device=first.device, dtype=first.dtype))
        return self.of(start, self.column.index_select(0, entries), self.value.index_select(0, entries))

    def _check(self, entries: int) -> None:
        if entries > self.most:
            raise TooLargeError(f"too large for memory: more than {self.most:,} entries")

    def scaled(self, factor: Tensor) -> Rows:
        """Return the matrix with each row times a factor."""
        return self.of(self.start, self.column, self.value * self._for_each(factor), is_single=self.is_single)

    def _for_each(self, rows: Tensor) -> Tensor:
        return rows if self.is_single else rows.repeat_interleave(self.counts)

    def put(self, target: Tensor, count: int) -> Rows:
        """Return the matrix of ``count`` rows, to each of which those rows are added that have it as target."""
        target = self._for_each(target.to(self.column.dtype))
        start = _starts(torch.bincount(target, minlength=count))
        if bool((target[1:] >= target[:-1]).all()):
            return self.of(start, self.column, self.value)
        order = target.argsort(stable=True)
        return self.of(start, self.column[order], self.value[order])

    def applied(self, other: Rows) -> Rows:
        """Return the product: this matrix times another."""
        rows = other.take(self.column)
        each = other.of(rows.start, rows.column, rows.value * rows._for_each(self.value))
        return each.put(self.row, len(self.start) - 1)

    def transposed(self, columns: int) -> Rows:
        """Return the transpose of a matrix with a number of columns."""
        order = self.column.argsort(stable=True)
        return self.of(_starts(torch.bincount(self.column, minlength=columns)), self.row[order], self.value[order])

    def compact(self, columns: int) -> Rows:
        """Return the matrix with one entry for each place, in the order of columns, and none that is zero."""
        start, column, value = self.start, self.column, self.value
        key = self.row if (len(start) - 1) * columns < 1 << 31 else self.row.long()
        key = key.mul_(columns).add_(column)
        if not bool((key[1:] >= key[:-1]).all()):
            order = key.argsort(stable=True)  # inside of rows, which are in order
            key, column, value = key[order], column[order], value[order]
        is_first = torch.ones(len(key), dtype=torch.bool, device=key.device)
        torch.ne(key[1:], key[:-1], out=is_first[1:])
        if not bool(is_first.all()):
            place = is_first.cumsum(0, dtype=torch.int32 if len(key) < 1 << 31 else torch.int64).sub_(1)
            value = value.new_zeros(int(place[-1]) + 1).index_add_(0, place, value)
            start, column = _starts(is_first)[start], column[is_first]
        if not bool((is_used := value != 0).all()):
            start, column, value = _starts(is_used)[start], column[is_used], value[is_used]
        return self.of(start, column, value)


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.cumsum(0, dtype=torch.int64)])
