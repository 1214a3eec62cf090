"""PyLops: conversion to and from ``pylops.LinearOperator``, for the solvers of PyLops and PyProximal."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pylops import LinearOperator as PyLopsOperator
from torch import Tensor

from adjointlab.adapters.bridge import Array, array_dtype, from_arrays, on_arrays, torch_dtype
from adjointlab.operators import LinearOperator
from adjointlab.space import Space, TensorSpec
from adjointlab.weighted import without_weights


class _Operator(PyLopsOperator):  # type: ignore[misc]
    def __init__(self, A: LinearOperator) -> None:
        dims, dimsd = (
            space.specs[0].shape if len(space.specs) == 1 and space.specs[0].shape else (space.size,)
            for space in (A.domain, A.codomain)
        )
        dtype = array_dtype(A.domain, A.codomain)
        super().__init__(dtype=dtype, dims=dims, dimsd=dimsd, clinear=A.is_complex_linear, name=type(A).__name__)
        self.adjointlab = A
        plain = without_weights(A)
        self._forward, self._adjoint_map = (on_arrays(B, dtype) for B in (plain, plain.H))

    def _matvec(self, x: Array) -> Array:
        return self._forward(x)

    def _rmatvec(self, x: Array) -> Array:
        return self._adjoint_map(x)


def to_pylops(A: LinearOperator) -> Any:
    """Return ``x ↦ Ax`` as a PyLops ``LinearOperator``; ``dims`` and ``dimsd`` are the shapes of domain and codomain.

    Parameters
    ----------
    A : LinearOperator
        An operator whose dtypes exist in NumPy. Pytrees become vectors, leaf after leaf.

    Returns
    -------
    pylops.LinearOperator
        An operator with the dtype of A, ``clinear`` if A is complex-linear; if not, the adjoint is that for
        ``Re⟨·, ·⟩``, as in PyLops. Arrays and tensors share memory.

    Raises
    ------
    SpaceMismatchError
        If a dtype does not exist in NumPy.

    Examples
    --------
    >>> from pylops.utils import dottest
    >>> from adjointlab import linear_operator
    >>> A = linear_operator(torch.nn.Conv1d(1, 2, 3, bias=False, dtype=torch.float64), (1, 1, 8))
    >>> bool(dottest(to_pylops(A)))
    True
    """
    return _Operator(A)


def from_pylops(
    operator: Any, *, batch_dims: int = 0, device: torch.device | str | None = None, check: bool = True
) -> LinearOperator[Tensor, Tensor]:
    """Return a PyLops operator as ``x ↦ Ax`` from the shape ``dims`` to the shape ``dimsd``.

    Parameters
    ----------
    operator : pylops.LinearOperator
        An operator on NumPy arrays.
    batch_dims : int
        Number of leading dimensions of free size; PyLops gets what is in them as columns (``matmat``).
    device : torch.device or str, optional
        The device of the tensors; the CPU if not given. PyLops computes on the CPU.
    check : bool
        Whether to test that ``rmatvec`` is the adjoint of ``matvec``, as :func:`adjointlab.from_pair` does.

    Returns
    -------
    LinearOperator
        An operator whose forward and adjoint are PyLops' own, each the derivative of the other. A space is real or
        complex as the arrays that PyLops returns: a real FFT has a real domain and a complex codomain.

    Raises
    ------
    AdjointMismatchError
        If one is not the adjoint of the other.

    Examples
    --------
    >>> import pylops
    >>> A = from_pylops(pylops.FirstDerivative(4, kind="forward"))
    >>> A(torch.tensor([0.0, 1.0, 3.0, 6.0], dtype=torch.float64))
    tensor([1., 2., 3., 0.], dtype=torch.float64)
    """
    where = torch.device("cpu" if device is None else device)
    image = operator.matvec(np.zeros(operator.shape[1], operator.dtype))
    back = operator.rmatvec(image)
    dtype = np.dtype(operator.dtype)
    kinds = [dtype if np.iscomplexobj(array) else np.empty(0, dtype).real.dtype for array in (back, image)]
    domain, codomain = (
        Space((TensorSpec((*[1] * batch_dims, *map(int, dims)), torch_dtype(kind), where),), batch_dims=batch_dims)
        for dims, kind in zip((operator.dims, operator.dimsd), kinds, strict=True)
    )
    functions = (operator.matvec, operator.matmat), (operator.rmatvec, operator.rmatmat)
    return from_arrays(*functions, domain, codomain, check)


__all__ = ["from_pylops", "to_pylops"]
