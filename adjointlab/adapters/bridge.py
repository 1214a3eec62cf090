"""Conversion between NumPy arrays and tensors, sharing memory if possible, and operators from maps on arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjointlab.errors import SpaceMismatchError
from adjointlab.numerics import UNITS, allowance
from adjointlab.operators import LinearOperator
from adjointlab.space import Space

Array = np.ndarray[Any, np.dtype[Any]]
ArrayMap = Callable[[Array], Array]


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return the NumPy dtype that equals a PyTorch dtype."""
    try:
        return torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
    except TypeError:
        raise SpaceMismatchError(
            f"expected a dtype that NumPy has, got {dtype}: convert the operator, e.g. A.to(torch.float32)"
        ) from None


def torch_dtype(dtype: Any) -> torch.dtype:
    """Return the floating-point or complex PyTorch dtype that represents a NumPy dtype."""
    kind = np.dtype(dtype)
    if kind.kind not in "fc" or kind.itemsize > (16 if kind.kind == "c" else 8):
        kind = np.result_type(kind, np.float32) if kind.kind in "biu" else np.dtype("f8" if kind.kind == "f" else "c16")
    return torch.from_numpy(np.empty(0, kind)).dtype


def to_tensor(array: Array, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the array as a tensor that shares its memory if dtype, order, device and writability allow it."""
    wanted = numpy_dtype(dtype)
    if array.dtype.kind == "c" and wanted.kind != "c":
        lost = float(np.linalg.norm(array.imag))
        if not lost <= allowance(UNITS, float(np.finfo(array.dtype).eps)) * float(np.linalg.norm(array)):
            raise SpaceMismatchError(
                f"expected real numbers of an operator with the dtype {wanted}, got complex ones with imaginary parts "
                f"of norm {lost:.2e}: declare the operator complex"
            )
        array = array.real
    return torch.from_numpy(np.require(array, wanted, ["C", "W"])).to(device)


def to_array(tensor: Tensor) -> Array:
    """Return the tensor as an array, which shares its memory if the tensor is on the CPU."""
    array: Array = tensor.detach().resolve_conj().resolve_neg().cpu().numpy()
    return array


def on_arrays(A: LinearOperator, *, real: bool = False) -> ArrayMap:
    """Return ``vector(x) ↦ vector(Ax)`` on arrays, in the coordinates of ``Space.vector``.

    Parameters
    ----------
    A : LinearOperator
        The operator.
    real : bool
        Whether to use the real coordinates ``[Re x; Im x]`` in domain and codomain, as ``al.to_dense(A, real=True)``.

    Returns
    -------
    callable
        A function that neither overwrites its argument nor returns memory shared with it.
    """
    device = A.domain.specs[0].device
    dtype = _common_dtype(A.domain)
    scalar = torch.empty(0, dtype=dtype).real.dtype if real else dtype

    def apply(array: Array) -> Array:
        with torch.no_grad():
            vector = to_tensor(array.reshape(-1), scalar, device)
            x = A.domain.element(_join_complex(vector, A.domain) if real else vector)
            y = A.codomain.vector(A(x))
            result = to_array(_split_complex(y, A.codomain) if real else y)
        return result.copy() if np.may_share_memory(result, array) else result

    return apply


def _common_dtype(space: Space) -> torch.dtype:
    dtype = space.specs[0].dtype
    for spec in space.specs[1:]:
        dtype = torch.promote_types(dtype, spec.dtype)
    return dtype


def _complex_entries(space: Space) -> slice | Tensor:
    """Return the positions of complex entries: a full slice if all are complex, else a mask."""
    if all(spec.is_complex for spec in space.specs):
        return slice(None)
    device = space.specs[0].device
    return torch.cat([torch.full((spec.numel,), spec.is_complex, device=device) for spec in space.specs])


def _split_complex(vector: Tensor, space: Space) -> Tensor:
    if not vector.is_complex():
        return vector
    return torch.cat([vector.real, vector.imag[_complex_entries(space)]])


def _join_complex(coordinates: Tensor, space: Space) -> Tensor:
    if not space.is_complex:
        return coordinates
    real = coordinates[: space.size]
    imaginary = torch.zeros_like(real)
    imaginary[_complex_entries(space)] = coordinates[space.size :]
    return torch.complex(real, imaginary)


def common_dtype(*spaces: Space) -> np.dtype[Any]:
    """Return the NumPy dtype that holds the entries of all the spaces."""
    return np.result_type(*[numpy_dtype(_common_dtype(space)) for space in spaces])


def from_arrays(forward: ArrayMap, adjoint: ArrayMap, domain: Space, codomain: Space) -> LinearOperator:
    """Return ``x ↦ forward(x)`` as an operator whose adjoint and derivative is ``y ↦ adjoint(y)``, on flat arrays.

    Parameters
    ----------
    forward, adjoint : callable
        Functions on one-dimensional arrays. That one is the adjoint of the other is not checked.
    domain, codomain : Space
        Spaces of one leaf each.

    Returns
    -------
    LinearOperator
        An operator with gradients in x of any order.
    """

    def wrapped(function: ArrayMap, source: Space, target: Space) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            spec = target.specs[0]
            given = to_array(x.reshape(-1)).copy()  # which the function may write to
            result = to_tensor(np.asarray(function(given)), spec.dtype, spec.device)
            return result.clone().reshape(spec.shape)  # it may be the function's workspace, or a part of what is given

        return run

    return LinearOperator(wrapped(forward, domain, codomain), wrapped(adjoint, codomain, domain), domain, codomain)
