"""Sparse matrices while tracing: a product is written as a gather, a product with the entries, and a sum by index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjointlab import compat
from adjointlab.modules import Source
from adjointlab.numerics import same

_SAMPLE = 1 << 14  # places that are looked at; of fewer, all
_COMPRESSED: dict[Any, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    torch.sparse_csr: (Tensor.crow_indices, Tensor.col_indices),
    torch.sparse_csc: (Tensor.ccol_indices, Tensor.row_indices),
    torch.sparse_bsr: (Tensor.crow_indices, Tensor.col_indices),
    torch.sparse_bsc: (Tensor.ccol_indices, Tensor.row_indices),
}  # fmt: skip


def is_sparse(value: Any) -> bool:
    """Return whether a value is a sparse tensor."""
    return isinstance(value, Tensor) and (value.layout is torch.sparse_coo or value.layout in _COMPRESSED)


def places(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row and column of each entry of a sparse matrix, in the order of its values.

    They are kept, and so are ordinary tensors in whatever mode they are made.
    """
    with torch.inference_mode(False), torch.no_grad(), compat.without_functorch(matrix):
        return _places(matrix)


def _places(matrix: Tensor) -> tuple[Tensor, Tensor]:
    if matrix.layout is torch.sparse_coo:
        row, column = matrix._indices()
        return row.clone(), column.clone()
    starts, others = (read(matrix).long() for read in _COMPRESSED[matrix.layout])
    first = torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(starts.diff())
    row, column = (first, others) if matrix.layout in {torch.sparse_csr, torch.sparse_bsr} else (others, first)
    if matrix.layout in {torch.sparse_csr, torch.sparse_csc}:
        return row, column.clone()
    height, width = matrix.values().shape[1:3]
    at = torch.arange(height, device=row.device)[:, None], torch.arange(width, device=row.device)
    rows, columns = (p[:, None, None] * n + a for p, n, a in zip((row, column), (height, width), at, strict=True))
    both = torch.broadcast_tensors(rows, columns)
    return both[0].reshape(-1), both[1].reshape(-1)


def entries(matrix: Tensor) -> Tensor:
    """Return the values of a sparse matrix as a vector that is no view of it: fake tensors cannot be one."""
    matrix = _settled(matrix)
    with compat.without_functorch(matrix):  # which know no columns (CSC)
        is_loose = matrix.layout is torch.sparse_coo and not matrix.is_coalesced()
        values = matrix._values() if is_loose else matrix.values()
    return values.reshape(-1).clone() if matrix.requires_grad else values.data.reshape(-1)


def _settled(matrix: Tensor) -> Tensor:
    """Return the matrix itself, coalesced if its values have a gradient: others have none."""
    if not is_sparse(matrix):
        raise TypeError("a sparse matrix has become a dense one")  # and is no more where it was
    is_loose = matrix.layout is torch.sparse_coo and matrix.requires_grad and not matrix.is_coalesced()
    return matrix.coalesce() if is_loose else matrix


class _Places:
    """The places of the entries of a matrix, the same tensors as long as they are the same.

    To compare all of them takes as long as two products. Where neither the matrix nor the version of one of its parts
    is another one, a sample is compared instead, for what NumPy or ``.data`` may have changed.
    """

    def __init__(self, whole: Source) -> None:
        self._whole = whole
        self._readers = set[int]()  # since places were last compared: one look serves rows and columns
        self._key: Any = None
        self._before: list[Tensor] = []
        self._sample: list[Tensor] = []
        self._found: tuple[Tensor, Tensor] = ()  # type: ignore[assignment]

    def read(self, axis: int) -> Tensor:
        """Return the rows (0) or the columns (1) as they are now."""
        if axis in self._readers or not self._found:
            self._readers.clear()
            self._look()
        self._readers.add(axis)
        return self._found[axis]

    def _look(self) -> None:
        given = self._whole.read()
        with torch.inference_mode(False), torch.no_grad(), compat.without_functorch(given):
            matrix = _settled(given)
            now = self._parts(matrix)
            key = [(id(given), *[(p.data_ptr(), p.shape, -1 if p.is_inference() else p._version) for p in now])]
            if key == self._key and all(map(same, map(_sample, now), self._sample)):
                return
            self._key = key
            if len(now) != len(self._before) or not all(map(same, now, self._before)):
                self._before, self._found = [part.clone() for part in now], places(matrix)
                self._sample = [_sample(part) for part in self._before]

    @staticmethod
    def _parts(matrix: Tensor) -> list[Tensor]:
        if matrix.layout is torch.sparse_coo:
            return [matrix._indices()]
        return [read(matrix) for read in _COMPRESSED[matrix.layout]]


def _sample(part: Tensor) -> Tensor:
    n = part.numel()
    return part if n <= _SAMPLE else part.reshape(-1)[:: n // _SAMPLE]


class SparseMatrices:
    """The sparse matrices that a function multiplies with, in parts that a graph can have."""

    def __init__(self, sources: dict[int, Source]) -> None:
        self.sources = sources  # by the ids of tensors; those of parts are added
        self._parts: dict[int, tuple[Tensor, tuple[Tensor, Tensor, Tensor]]] = {}  # with the matrix: its id is its own

    def product(self, matrix: Tensor, x: Tensor, *, transposed: bool = False) -> Tensor:
        """Return ``matrix @ x``, or that of its transpose."""
        if id(matrix) not in self._parts:
            with compat._disable_current_modes():  # it is real, among tensors without values
                self._parts[id(matrix)] = (matrix, self._taken(matrix))
        row, column, value = self._parts[id(matrix)][1]
        row, column = (column, row) if transposed else (row, column)
        columns = x.unsqueeze(-1) if x.ndim == 1 else x
        terms = value.unsqueeze(-1) * columns.index_select(0, column)
        found = terms.new_zeros((matrix.shape[transposed], columns.shape[1])).index_add(0, row, terms)
        return found.squeeze(-1) if x.ndim == 1 else found

    def _taken(self, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        whole = self.sources.get(id(matrix))
        if whole is None:
            raise compat.RefusedError("it multiplies by a sparse tensor that no module or name holds")
        held = _Places(whole)
        row, column = held.read(0), held.read(1)
        # Tracing takes leaves only: others it asks for their gradients, and is warned.
        value = entries(matrix).detach().requires_grad_(matrix.requires_grad)
        self.sources[id(row)] = Source(lambda: held.read(0), f"rows of {whole.name}", is_private=True)
        self.sources[id(column)] = Source(lambda: held.read(1), f"columns of {whole.name}", is_private=True)
        self.sources[id(value)] = Source(lambda: entries(whole.read()), f"entries of {whole.name}")
        return row, column, value


_LEFT = {
    torch.mm, torch.mv, torch.matmul, torch.sparse.mm, Tensor.mm, Tensor.mv, Tensor.matmul, Tensor.__matmul__,
}  # fmt: skip


def multiplied(func: Any, args: tuple[Any, ...], matrices: SparseMatrices) -> Any:
    """Return the product that a call computes if one factor is a sparse matrix, else NotImplemented."""
    if func is Tensor.__rmatmul__:
        func, args = Tensor.__matmul__, args[::-1]
    if func not in _LEFT or not any(map(is_sparse, args)):
        return NotImplemented
    a, b = args
    if is_sparse(a) and is_sparse(b):
        return NotImplemented
    if is_sparse(a):
        return matrices.product(a, b) if b.ndim < 3 else NotImplemented
    flat = a.reshape(-1, a.shape[-1])
    return matrices.product(b, flat.mT, transposed=True).mT.reshape(*a.shape[:-1], b.shape[-1])
