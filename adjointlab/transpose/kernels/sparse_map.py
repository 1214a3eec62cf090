"""Sparse maps: the matrix of a map as CSR with indices of 32 bits, and its product with one vector or several."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# PyTorch says once of a process that such matrices are a beta. It says so here: filters belong to all threads.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(
        torch.tensor([0, 1], device="cpu"), torch.tensor([0], device="cpu"), torch.ones(1, device="cpu"), (1, 1),
        check_invariants=False,
    )  # fmt: skip

_SHARE = 64  # a matrix may take this part of the memory of its device


def csr(start: Tensor, column: Tensor, value: Tensor, columns: int) -> Tensor:
    """Return a CSR matrix from the first entry of each row, and the column and value of each entry."""
    index = torch.int32 if max(columns, len(value)) < 1 << 31 else torch.int64
    shape = (len(start) - 1, columns)
    return torch.sparse_csr_tensor(start.to(index), column.to(index), value, shape, check_invariants=False)


def without_entries(matrix: Tensor) -> Tensor:
    """Return the places of a matrix alone."""
    return with_entries(matrix, matrix.values().new_zeros(()).expand_as(matrix.values()))


def with_entries(matrix: Tensor, values: Tensor) -> Tensor:
    """Return a matrix with other entries, which are read where they are."""
    parts = matrix.crow_indices(), matrix.col_indices(), values.reshape(-1).resolve_conj().resolve_neg()
    return torch.sparse_csr_tensor(*parts, matrix.shape, check_invariants=False)


def csr_of(matrix: Tensor) -> Tensor:
    """Return a dense matrix as CSR."""
    row, column = matrix.nonzero(as_tuple=True)
    start = torch.searchsorted(row, torch.arange(len(matrix) + 1, device=matrix.device))
    return csr(start, column, matrix[row, column], matrix.shape[1])


def ways(
    shape: Sequence[int], count: int = 1, *, trails: bool = False, ends: bool = False
) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Return functions of x and a matrix: the product, of a shape, for each of ``count`` places.

    These are the leading dimensions of x or, where they ``trail``, the last, and so of the result where they ``end``
    it.
    """
    shape = tuple(shape)

    def sparse_map(x: Tensor, matrix: Tensor) -> Tensor:
        return (matrix @ x.reshape(-1)).reshape(shape)

    def sparse_map_each(x: Tensor, matrix: Tensor) -> Tensor:
        found = x.new_empty(shape)
        for source, into in zip(x.reshape(count, -1), found.view(count, -1), strict=True):
            torch.mv(matrix, source, out=into)
        return found

    def sparse_map_columns(x: Tensor, matrix: Tensor) -> Tensor:
        found = matrix @ (x.reshape(-1, count) if trails else x.reshape(count, -1).mT)
        return (found if ends else found.mT).reshape(shape)

    if count == 1:
        return [sparse_map]
    return [sparse_map_columns] if trails or ends else [sparse_map_each, sparse_map_columns]


def most_entries(like: Tensor) -> int:
    """Return how many entries like those of a tensor a matrix may have: it takes a 64th of the memory of its device."""
    if like.device.type == "cuda":
        memory = torch.cuda.get_device_properties(like.device).total_memory
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        memory = 16 << 30
    return memory // _SHARE // (like.dtype.itemsize + 4)
