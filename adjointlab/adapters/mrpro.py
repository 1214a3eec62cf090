"""mrpro: an operator as one of its own, with a derived adjoint, and a linear operator of mrpro as one of ours."""

from __future__ import annotations

from typing import Any

from mrpro.operators import LinearOperator as MrproOperator
from torch import Tensor, nn

from adjointlab.derive import linear_operator
from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.tree import SINGLE


class _Operator(MrproOperator):  # type: ignore[misc]
    """A linear operator of mrpro whose ``adjoint`` is ``A.H``."""

    def __init__(self, A: LinearOperator[Tensor, Tensor]) -> None:
        super().__init__()
        self.operator = A

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.operator(x),)

    def adjoint(self, x: Tensor) -> tuple[Tensor]:
        return (self.operator.H(x),)


class _First(nn.Module):
    """The map of an operator of mrpro, which returns a tuple of one tensor."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        (found,) = self.operator(x)
        return found  # type: ignore[no-any-return]


def to_mrpro(A: LinearOperator[Tensor, Tensor]) -> Any:
    """Return A as a ``LinearOperator`` of mrpro, whose ``adjoint`` is the derived ``Aᴴ``.

    Parameters
    ----------
    A : LinearOperator
        An operator between single tensors.

    Returns
    -------
    mrpro.operators.LinearOperator
        The operator; as everywhere in mrpro, it returns a tuple of one tensor.

    Raises
    ------
    SpaceMismatchError
        If A is no operator between single tensors: those of mrpro take and return one.

    Examples
    --------
    >>> import torch
    >>> B = to_mrpro(linear_operator(torch.nn.AvgPool1d(2), (1, 4)))
    >>> (x,) = B.adjoint(torch.ones(1, 2))
    >>> x
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    if not isinstance(A, LinearOperator) or A.domain.structure is not SINGLE or A.codomain.structure is not SINGLE:
        raise SpaceMismatchError(
            f"expected a linear operator between single tensors, got {A!r}: make one with al.linear_operator; a stack "
            "is a LinearOperatorMatrix in mrpro"
        )
    return _Operator(A)


def from_mrpro(operator: Any, domain: Any, *, batch_dims: int = 0) -> LinearOperator[Tensor, Tensor]:
    """Return a linear operator of mrpro as one of ours, ``x ↦ operator(x)[0]``, with a derived adjoint.

    Parameters
    ----------
    operator : mrpro.operators.LinearOperator
        The operator.
    domain : Tensor, tuple of int, TensorSpec or Space
        The space of x. An example tensor says that it is complex.
    batch_dims : int
        Number of leading dimensions of free size.

    Returns
    -------
    LinearOperator
        The operator. Its adjoint is derived without ``operator.adjoint``, so the two can be compared.

    Raises
    ------
    SpaceMismatchError
        If the operator is not one of mrpro, or the domain does not fit it.
    NotLinearError, NotDifferentiableError
        As :func:`adjointlab.linear_operator` does.

    Examples
    --------
    >>> import torch
    >>> from mrpro.operators import FastFourierOp
    >>> A = from_mrpro(FastFourierOp(dim=(-1,)), torch.zeros(4, dtype=torch.complex64))
    >>> A.codomain.specs[0].shape
    (4,)
    """
    if not isinstance(operator, MrproOperator):
        raise SpaceMismatchError(
            f"expected a linear operator of mrpro, got {type(operator).__name__}: use al.linear_operator for other maps"
        )
    return linear_operator(_First(operator), domain, batch_dims=batch_dims)


__all__ = ["from_mrpro", "to_mrpro"]
