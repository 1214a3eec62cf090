"""Conversion between NumPy arrays and tensors, sharing memory if possible, and operators from maps on arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjointlab.errors import SpaceMismatchError
from adjointlab.numerics import UNITS, allowance
from adjointlab.operators import LinearOperator, Map
from adjointlab.pair import from_pair
from adjointlab.space import Space, TensorSpec
from adjointlab.space.coordinates import common_dtype, join_complex, split_complex

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


def on_arrays(A: LinearOperator, dtype: np.dtype[Any], *, real: bool = False) -> ArrayMap:
    """Return ``vector(x) ↦ vector(Ax)`` on arrays of this ``dtype``, or the same in coordinates ``[Re x; Im x]``."""
    # The function neither overwrites its argument nor returns memory shared with it.
    own = common_dtype(A.domain)
    scalar = own.to_real() if real else own

    def apply(array: Array) -> Array:
        if np.iscomplexobj(array) and dtype.kind != "c":  # SciPy and PyLops pass complex vectors to real operators, too
            extended: Array = apply(array.real) + 1j * apply(array.imag)
            return extended
        with torch.no_grad():
            vector = to_tensor(array.reshape(-1), scalar, A.domain.specs[0].device)
            x = A.domain.element(join_complex(A.domain, vector) if real else vector)
            y = A.codomain.vector(A(x))
            result = to_array(split_complex(A.codomain, y) if real else y)
        return result.copy() if np.may_share_memory(result, array) else result

    return apply


def array_dtype(*spaces: Space) -> np.dtype[Any]:
    """Return the NumPy dtype that holds the entries of all the spaces."""
    return np.result_type(*[numpy_dtype(common_dtype(space)) for space in spaces])


def from_arrays(
    forward: tuple[ArrayMap, ArrayMap], adjoint: tuple[ArrayMap, ArrayMap], domain: Space, codomain: Space, check: bool
) -> LinearOperator:
    """Return the operator of functions of a flat array, and of a matrix of columns, with the adjoint of such."""

    def on_tensors(functions: tuple[ArrayMap, ArrayMap], source: TensorSpec, target: TensorSpec) -> Map:
        k = domain.batch_dims
        shape = target.shape[k:]

        def run(x: Tensor) -> Tensor:
            given = to_array(x).reshape(-1, math.prod(source.shape[k:])) if k else to_array(x).reshape(-1)
            # Copies: the function may write to its argument, and return its workspace, or a part of its argument.
            result = np.asarray(functions[1](given.T.copy()) if k else functions[0](given.copy()))
            tensor = to_tensor(result.T if k else result, target.dtype, target.device).clone()
            return tensor.reshape(*x.shape[:k], *shape)

        return run

    specs = domain.specs[0], codomain.specs[0]
    return from_pair(on_tensors(forward, *specs), on_tensors(adjoint, *specs[::-1]), domain, codomain, check=check)
