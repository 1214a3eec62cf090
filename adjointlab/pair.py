"""Operators from outside: a function and its adjoint, as ``A`` and ``Aᴴ``, checked against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

from torch import Tensor

from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator, Map
from adjointlab.space import Space
from adjointlab.space.spec import OfTensor
from adjointlab.typed import E, F
from adjointlab.verify import assert_adjoint


@overload
def from_pair(
    f: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], domain: OfTensor, codomain: OfTensor,
    *, batch_dims: int = 0, check: bool = True,
) -> LinearOperator[Tensor, Tensor]: ...  # fmt: skip


@overload
def from_pair(
    f: Map, adjoint: Map, domain: Space[E] | E, codomain: OfTensor,
    *, batch_dims: int = 0, check: bool = True,
) -> LinearOperator[E, Tensor]: ...  # fmt: skip


@overload
def from_pair(
    f: Map, adjoint: Map, domain: OfTensor, codomain: Space[F] | F,
    *, batch_dims: int = 0, check: bool = True,
) -> LinearOperator[Tensor, F]: ...  # fmt: skip


@overload
def from_pair(
    f: Map, adjoint: Map, domain: Space[E] | E, codomain: Space[F] | F,
    *, batch_dims: int = 0, check: bool = True,
) -> LinearOperator[E, F]: ...  # fmt: skip


def from_pair(
    f: Map, adjoint: Map, domain: Any, codomain: Any, *, batch_dims: int = 0, check: bool = True
) -> LinearOperator[Any, Any]:
    r"""Return the operator ``A = f`` with the given adjoint: ``⟨f(x), y⟩ = ⟨x, adjoint(y)⟩``.

    Each is the other's derivative in its argument, also where autograd cannot see through it, as with NumPy.
    Gradients in other tensors, such as parameters, are autograd's own.

    Parameters
    ----------
    f, adjoint : callable
        Functions of one argument, an element of the domain and of the codomain.
    domain, codomain : Tensor, tuple of int, TensorSpec, Space or pytree of these
        The spaces; a shape has torch's default dtype and device.
    batch_dims : int
        Number of leading dimensions of free size, in both spaces.
    check : bool
        Whether to test that the functions are linear and adjoint to each other.

    Returns
    -------
    LinearOperator
        The operator.

    Raises
    ------
    AdjointMismatchError
        If one function is not the adjoint of the other; the message has a diagnosis.
    SpaceMismatchError
        If a space is none, or f or its adjoint is not callable or does not fit the spaces.

    Examples
    --------
    >>> import torch
    >>> A = from_pair(
    ...     lambda x: torch.from_numpy(x.detach().numpy()[1:].copy()),
    ...     lambda y: torch.nn.functional.pad(y, (1, 0)),
    ...     (3,),
    ...     (2,),
    ... )
    >>> x = torch.ones(3, requires_grad=True)
    >>> A(x).sum().backward()
    >>> x.grad
    tensor([0., 1., 1.])
    """
    for name, function in (("f", f), ("adjoint", adjoint)):
        if not callable(function):
            raise SpaceMismatchError(f"expected {name} to be a function, got {type(function).__name__}: pass the map")
    A = LinearOperator(f, adjoint, Space.of(domain, batch_dims=batch_dims), Space.of(codomain, batch_dims=batch_dims))
    if check:
        assert_adjoint(A)
    return A
