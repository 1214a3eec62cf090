"""Operators from outside: a function and its adjoint, as ``A`` and ``Aᴴ``, checked against each other."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from adjointlab.compat import pytree, refuse_tracing, uncompiled
from adjointlab.errors import AdjointMismatchError, SpaceMismatchError
from adjointlab.matrices import of_array
from adjointlab.operators import LinearOperator, Map
from adjointlab.space import Space
from adjointlab.space.spec import OfTensor
from adjointlab.typed import E, F
from adjointlab.verify import assert_adjoint


@overload
def from_pair(
    f: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], domain: OfTensor, codomain: OfTensor,
    *, batch_dims: int = 0, check: bool = True, arrays: str | None = None,
) -> LinearOperator[Tensor, Tensor]: ...  # fmt: skip


@overload
def from_pair(
    f: Map, adjoint: Map, domain: Space[E] | E, codomain: OfTensor,
    *, batch_dims: int = 0, check: bool = True, arrays: str | None = None,
) -> LinearOperator[E, Tensor]: ...  # fmt: skip


@overload
def from_pair(
    f: Map, adjoint: Map, domain: OfTensor, codomain: Space[F] | F,
    *, batch_dims: int = 0, check: bool = True, arrays: str | None = None,
) -> LinearOperator[Tensor, F]: ...  # fmt: skip


@overload
def from_pair(
    f: Map, adjoint: Map, domain: Space[E] | E, codomain: Space[F] | F,
    *, batch_dims: int = 0, check: bool = True, arrays: str | None = None,
) -> LinearOperator[E, F]: ...  # fmt: skip


def from_pair(
    f: Map,
    adjoint: Map,
    domain: Any,
    codomain: Any,
    *,
    batch_dims: int = 0,
    check: bool = True,
    arrays: str | None = None,
) -> LinearOperator[Any, Any]:
    r"""Return the operator ``A = f`` with the given adjoint: ``⟨f(x), y⟩ = ⟨x, adjoint(y)⟩``.

    Each is the other's derivative in its argument, to every order, in ``torch.func`` and forward mode too, also where
    autograd cannot see through it, as with NumPy. Gradients in other tensors, such as parameters, are autograd's own.

    Parameters
    ----------
    f, adjoint : callable
        Functions of one argument, an element of the domain and of the codomain. They must leave their argument and
        earlier results as they are. A result that is a view of its argument stays one.
    domain, codomain : Tensor, tuple of int, TensorSpec, Space or pytree of these
        The spaces; a shape has torch's default dtype and device. Between spaces with weights, the adjoint is that for
        their inner products.
    batch_dims : int
        Number of leading dimensions of free size, in both spaces.
    check : bool
        Whether to test that the functions are linear and adjoint to each other. Without it, an adjoint that is not
        matched can be used knowingly: solvers then say how far it is off.
    arrays : str, optional
        A module of arrays, ``"numpy"``, ``"cupy"`` or another one with ``from_dlpack``: the functions get its arrays,
        and return such. Memory is shared with tensors, without copies.

    Returns
    -------
    LinearOperator
        The operator.

    Raises
    ------
    AdjointMismatchError
        If one function is not the adjoint of the other, with a diagnosis; or if one overwrites its argument or its
        last result.
    SpaceMismatchError
        If a space is none, or f or its adjoint is not callable or does not fit the spaces.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> A = from_pair(np.diff, lambda y: np.pad(y, (1, 0)) - np.pad(y, (0, 1)), (3,), (2,), arrays="numpy")
    >>> x = torch.ones(3, requires_grad=True)
    >>> (A(x) * torch.tensor([1.0, 2.0])).sum().backward()
    >>> x.grad
    tensor([-1., -1.,  2.])
    """
    for name, function in (("f", f), ("adjoint", adjoint)):
        if not callable(function):
            raise SpaceMismatchError(f"expected {name} to be a function, got {type(function).__name__}: pass the map")
    spaces = Space.of(domain, batch_dims=batch_dims), Space.of(codomain, batch_dims=batch_dims)
    functions = (f, adjoint) if arrays is None else (_OnArrays(f, arrays), _OnArrays(adjoint, arrays))
    if not check:
        return _unchecked(*functions, *spaces)
    A = LinearOperator(*functions, *spaces)
    assert_adjoint(A)
    for name, side in (("f", A), ("the adjoint", A.H)):
        _require_pure(name, side)
    return A


def _unchecked(f: Map, adjoint: Map, domain: Space, codomain: Space) -> LinearOperator[Any, Any]:
    A = LinearOperator(f, adjoint, domain, codomain)
    A.use_unchecked(_unchecked)
    return A


def _require_pure(name: str, A: LinearOperator) -> None:
    """Raise if a function writes to its argument, or to the result of its last call."""
    space, draw = A.domain, torch.Generator().manual_seed(0)
    x, z = space.leaves(space.randn(draw)), space.randn(draw)
    before = [leaf.clone() for leaf in x]
    with torch.no_grad():
        image = A.codomain.leaves(A(space.unflatten(x)))
        kept = [leaf.clone() for leaf in image]
        A(z)
    with torch.enable_grad():  # finds out once for all whether autograd sees through the function
        A(space.unflatten([leaf.detach().requires_grad_() for leaf in space.leaves(z)]))
    for old, new, what in ((before, x, "its argument"), (kept, image, "its last result")):
        if not space.every(all(map(torch.equal, old, new))):
            raise AdjointMismatchError(f"expected {name} to leave {what} as it is, but it writes to it: copy it first")


class _OnArrays:
    """A function of arrays as one of tensors, which share their memory."""

    def __init__(self, function: Map, arrays: str) -> None:
        self.function, self.arrays, self.__qualname__ = function, arrays, getattr(function, "__qualname__", "")
        if not isinstance(arrays, str) or importlib.util.find_spec(arrays.partition(".")[0]) is None:
            raise SpaceMismatchError(f"expected arrays to name a module, such as 'numpy' or 'cupy', got {arrays!r}")
        if not hasattr(importlib.import_module(arrays), "from_dlpack"):
            raise SpaceMismatchError(f"expected a module with from_dlpack, such as numpy or cupy, got {arrays!r}")

    def __call__(self, x: Any) -> Any:
        return uncompiled(self._call, x) if torch.compiler.is_compiling() else self._call(x)

    def _call(self, x: Any) -> Any:
        convert = importlib.import_module(self.arrays).from_dlpack
        given = pytree.tree_map(lambda t: convert(_with_memory(t)), x)
        return pytree.tree_map(_tensor, self.function(given))


def _with_memory(tensor: Tensor) -> Tensor:
    """Return a tensor as it is in memory, or raise where it is none but a stand-in, as under tracing."""
    refuse_tracing()
    real = tensor.detach().resolve_conj().resolve_neg()
    real.data_ptr()
    return real


def _tensor(array: Any) -> Any:
    """Return a tensor with the memory of an array."""
    if isinstance(array, Tensor):
        return array
    if isinstance(array, (np.ndarray, np.number)):
        return of_array(np.asarray(array))
    return from_dlpack(array) if hasattr(array, "__dlpack__") else array
