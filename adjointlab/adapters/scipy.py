"""SciPy: conversion to and from ``scipy.sparse.linalg.LinearOperator``, for lsqr, lsmr, svds and eigsh."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator as SciPyOperator
from scipy.sparse.linalg import aslinearoperator
from torch import Tensor

from adjointlab.adapters.bridge import array_dtype, from_arrays, numpy_dtype, on_arrays, torch_dtype
from adjointlab.matrices import matrix
from adjointlab.operators import LinearOperator
from adjointlab.space import Space, TensorSpec
from adjointlab.space.coordinates import real_size
from adjointlab.weighted import without_weights


def to_scipy(A: LinearOperator) -> Any:
    """Return A as a SciPy ``LinearOperator``: ``vector(x) ↦ vector(Ax)``, where ``rmatvec`` applies ``Aᴴ``.

    Parameters
    ----------
    A : LinearOperator
        An operator whose dtypes exist in NumPy.

    Returns
    -------
    scipy.sparse.linalg.LinearOperator
        An operator with the dtype of A and the matrix ``al.to_dense(A)``; that of a map that is only real-linear is
        ``al.to_dense(A, real=True)``, in the real coordinates ``[Re x; Im x]``, for SciPy has complex-linear maps only.

    Raises
    ------
    SpaceMismatchError
        If a dtype does not exist in NumPy.

    Examples
    --------
    >>> import torch
    >>> from scipy.sparse.linalg import svds
    >>> from adjointlab import diagonal
    >>> svds(to_scipy(diagonal(torch.tensor([1.0, 3.0, 2.0]))), k=1)[1]
    array([3.], dtype=float32)
    """
    A = without_weights(A)
    real = not A.is_complex_linear
    dtype = array_dtype(A.domain, A.codomain)
    if real:
        dtype = np.empty(0, dtype).real.dtype
    shape = (real_size(A.codomain), real_size(A.domain)) if real else (A.codomain.size, A.domain.size)
    forward, adjoint = (on_arrays(B, dtype, real=real) for B in (A, A.H))
    return SciPyOperator(dtype=dtype, shape=shape, matvec=forward, rmatvec=adjoint)


def from_scipy(
    operator: Any, *, batch_dims: int = 0, device: torch.device | str | None = None, check: bool = True
) -> LinearOperator[Tensor, Tensor]:
    """Return the operator of a SciPy ``LinearOperator``, sparse matrix or array: ``x ↦ Ax`` on vectors.

    Parameters
    ----------
    operator : scipy.sparse.linalg.LinearOperator, sparse array or array
        An argument of ``scipy.sparse.linalg.aslinearoperator`` that has an adjoint (``rmatvec``).
    batch_dims : int
        Number of leading dimensions of free size; SciPy gets the vectors in them as columns (``matmat``).
    device : torch.device or str, optional
        The device of the vectors; the CPU if not given. Matrices become tensors there; SciPy's operators compute on the
        CPU.
    check : bool
        Whether to test that ``rmatvec`` is the adjoint of ``matvec``, as :func:`adjointlab.from_pair` does.

    Returns
    -------
    LinearOperator
        That of :func:`adjointlab.matrix` for a matrix. Otherwise one whose forward and adjoint are SciPy's ``matvec``
        and ``rmatvec``, each the derivative of the other. Integers become floating-point numbers.

    Raises
    ------
    AdjointMismatchError
        If one is not the adjoint of the other.

    Examples
    --------
    >>> import numpy as np
    >>> A = from_scipy(np.array([[1.0, 2.0], [0.0, 1.0]]))
    >>> A(torch.ones(2, dtype=torch.float64))
    tensor([3., 1.], dtype=torch.float64)
    """
    if issparse(operator) or isinstance(operator, np.ndarray):
        entries = operator.astype(numpy_dtype(torch_dtype(operator.dtype)), copy=False)
        return matrix(entries, batch_dims=batch_dims, device=device)
    wrapped = aslinearoperator(operator)
    rows, columns = wrapped.shape
    where = torch.device("cpu" if device is None else device)
    domain, codomain = (
        Space((TensorSpec((*[1] * batch_dims, size), torch_dtype(wrapped.dtype), where),), batch_dims=batch_dims)
        for size in (columns, rows)
    )
    functions = (wrapped.matvec, wrapped.matmat), (wrapped.rmatvec, wrapped.rmatmat)
    return from_arrays(*functions, domain, codomain, check)


__all__ = ["from_scipy", "to_scipy"]
