"""Matrices as operators: dense ones, sparse ones, and those of SciPy, on images as well as on vectors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adjointlab.derive import linear_operator
from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.space import Space, TensorSpec
from adjointlab.transpose.frontend.sparse import places
from adjointlab.tree import SINGLE


class _Product(nn.Module):
    """``x ↦ Mx``, for elements of a space with some free dimensions, and results of a shape."""

    matrix: Tensor

    def __init__(self, matrix: Tensor, batch_dims: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        if isinstance(matrix, nn.Parameter):
            self.matrix = matrix
        else:
            self.register_buffer("matrix", matrix)
        self.batch_dims, self.shape = batch_dims, shape

    def __repr__(self) -> str:
        rows, columns = self.matrix.shape
        layout = "dense" if self.matrix.layout is torch.strided else str(self.matrix.layout).removeprefix("torch.")
        return f"the {layout} matrix of {rows} × {columns} entries"

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        matrix, batch = self.matrix, x.shape[: self.batch_dims]
        columns = matrix.shape[1]
        flat = x.reshape(-1, columns) if self.batch_dims else x.reshape(columns)
        if matrix.is_complex() and not x.is_complex():
            flat = flat.to(matrix.dtype)
        if not matrix.is_complex() and x.is_complex():  # the real and the imaginary parts, one beside the other
            parts = torch.view_as_real(flat)
            parts = parts.reshape(-1, columns, 2).transpose(0, 1).reshape(columns, -1) if self.batch_dims else parts
            found = torch.view_as_complex((matrix @ parts).reshape(len(matrix), -1, 2))
            return found.mT.reshape(*batch, *self.shape)
        found = (matrix @ flat.mT).mT if self.batch_dims else matrix @ flat
        return found.reshape(*batch, *self.shape)


def matrix(
    M: Any,
    domain: Any = None,
    codomain: Any = None,
    *,
    batch_dims: int = 0,
    device: torch.device | str | None = None,
) -> LinearOperator[Tensor, Tensor]:
    """Return ``x ↦ Mx``, the elements of both spaces being read as vectors; its adjoint is ``y ↦ Mᴴy``.

    Sparse matrices are multiplied as such, forwards and backwards. Parameters stay parameters, of which gradients are
    sparse where the matrix is (COO and CSR: torch accumulates no others).

    Parameters
    ----------
    M : Tensor, NumPy array or SciPy sparse matrix
        A matrix of rows × columns numbers: dense, or with the layout COO, CSR, CSC or BSR.
    domain : tuple of int, TensorSpec, Space or example tensor, optional
        What x is: images, say, with as many entries as M has columns. Vectors if not given. A real matrix can have
        complex domains, and a complex one real ones.
    codomain : the same, optional
        What ``Mx`` is, with as many entries as M has rows. Vectors if not given. Spaces may have weights.
    batch_dims : int
        Number of leading dimensions of the domain that may have any size: M multiplies what is at each place of them.
    device : torch.device or str, optional
        Where M is to be; where it is if not given. Arrays of NumPy and SciPy are on the CPU.

    Returns
    -------
    LinearOperator
        From the domain to the codomain, on the device of the matrix. M is read at each call: it may change, or be
        learned. Memory of NumPy and SciPy is shared where their dtypes and layouts are those of tensors.

    Raises
    ------
    SpaceMismatchError
        If M is no matrix of numbers, or a space has another number of entries, another precision or another device.

    Examples
    --------
    >>> A = matrix(torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]]).to_sparse(), domain=(2, 2))
    >>> A(torch.ones(2, 2))
    tensor([3., 3.])
    >>> A.H(torch.ones(2))
    tensor([[1., 2.],
            [0., 3.]])
    """
    held = _tensor(M) if device is None else _tensor(M).to(device)
    rows, columns = held.shape
    vectors = (*[1] * batch_dims, columns)
    described = vectors if domain is None else domain
    given: Space[Tensor] = Space.of(described, dtype=held.dtype, device=held.device, batch_dims=batch_dims)
    spec = _single(given, "domain")
    k = given.batch_dims
    shape = spec.shape[k:]
    if math.prod(shape) != columns:
        raise SpaceMismatchError(
            f"expected a domain with {columns} entries, one for each column of the matrix, got the shape {shape} with "
            f"{math.prod(shape)}: reshape the domain, or declare dimensions that the matrix leaves alone as batch_dims"
        )
    real = [d.to_real() if d.is_complex else d for d in (spec.dtype, held.dtype)]
    if real[0] != real[1] or spec.device != held.device:
        raise SpaceMismatchError(
            f"expected a domain with the precision and device of the matrix, {held.dtype} on {held.device}, got "
            f"{spec.dtype} on {spec.device}: convert the matrix, M.to(dtype=…, device=…)"
        )
    result: tuple[int, ...] = (rows,)
    target: Space[Tensor] | None = None
    if codomain is not None:
        target = Space.of(codomain, dtype=held.dtype, device=held.device)
        result = _single(target, "codomain").shape[target.batch_dims :]
        if math.prod(result) != rows:
            raise SpaceMismatchError(
                f"expected a codomain with {rows} entries, one for each row of the matrix, got the shape {result} with "
                f"{math.prod(result)}"
            )
    weighted = None if target is None or target.weight is None else target
    return linear_operator(_Product(held, k, result), given, codomain=weighted)


def _single(space: Space, name: str) -> TensorSpec:
    if space.structure is not SINGLE:
        raise SpaceMismatchError(f"expected a {name} of one tensor, got {space}: a matrix maps one tensor to one")
    return space.specs[0]


def _tensor(M: Any) -> Tensor:
    """Return a matrix as a tensor that shares its memory where that is possible."""
    if hasattr(M, "tocsr") and hasattr(M, "nnz"):  # SciPy's, of any format
        return _of_scipy(M)
    found = M if isinstance(M, Tensor) else of_array(np.asarray(M))
    if found.layout in {torch.sparse_bsr, torch.sparse_bsc}:  # of which torch multiplies with some only
        at = torch.stack(places(found))
        found = torch.sparse_coo_tensor(at, found.values().reshape(-1), found.shape, check_invariants=False).coalesce()
    _require_matrix(found.shape)
    return _floating(found)


def _require_matrix(shape: Sequence[int]) -> None:
    if len(shape) != 2 or 0 in shape:
        raise SpaceMismatchError(f"expected a matrix: rows and columns of numbers, got the shape {tuple(shape)}")


def _floating(numbers: Tensor) -> Tensor:
    """Return integers in the default dtype, other numbers as they are."""
    return numbers if numbers.is_floating_point() or numbers.is_complex() else numbers.to(torch.get_default_dtype())


def of_array(array: Any) -> Tensor:
    """Return an array as a tensor; those are copied that tensors cannot share: other byte orders, read-only memory."""
    kind = array.dtype
    if kind.kind not in "fcbiu" or kind.itemsize > (16 if kind.kind == "c" else 8):
        raise SpaceMismatchError(
            f"expected numbers that tensors have, got an array of {kind}: convert it, e.g. to float64"
        )
    if not kind.isnative or not array.flags.writeable or any(step < 0 for step in array.strides):
        array = array.astype(kind.newbyteorder("="))
    return torch.from_numpy(array)


def _of_scipy(M: Any) -> Tensor:
    _require_matrix(M.shape)
    rows = M.tocsr()
    if not rows.has_canonical_format:  # several entries of one place, or in another order
        rows = rows.copy()
        rows.sum_duplicates()
    start, column, value = map(of_array, (rows.indptr, rows.indices, rows.data))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(start, column, _floating(value), rows.shape, check_invariants=False)
