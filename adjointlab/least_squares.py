"""Least squares: ``F(x) = ½‖A x − y‖²_W`` with gradient ``Aᴴ W (A x − y)`` and Hessian ``Aᴴ W A``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor, nn

from adjointlab.affine import AffineOperator, Operator, require_operator, residual_and_gradient
from adjointlab.blocks import diagonal, diagonal_entries
from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.typed import X, Y


class LeastSquares(nn.Module, Generic[X, Y]):
    r"""The objective ``F(x) = ½‖A x − y‖²_W = ½ Re⟨Ax − y, W(Ax − y)⟩``.

    If the spaces of A have weights, so has this inner product, and ``gradient`` is the gradient in the domain of A:
    ``A.domain.weigh(F.gradient(x))`` is the one that autograd computes. They are equal where there are no weights.

    Parameters
    ----------
    A : LinearOperator or AffineOperator
        The forward model.
    y : pytree of tensors
        The data, an element of ``A.codomain``; kept as a buffer.
    weight : LinearOperator, or pytree of real tensors, optional
        ``W``: a self-adjoint operator on the codomain, or the entries of a diagonal one, each 0 or more.

    Raises
    ------
    SpaceMismatchError
        If y, or the weight, does not live on the codomain of A.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import diagonal
    >>> F = LeastSquares(diagonal(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 0.0]))
    >>> F(torch.tensor([0.0, 1.0]))
    tensor(2.5000)
    >>> F.gradient(torch.tensor([0.0, 1.0]))
    tensor([-1.,  4.])
    """

    def __init__(self, A: Operator[X, Y], y: Y, weight: LinearOperator[Y, Y] | Y | None = None) -> None:
        super().__init__()
        require_operator(A)
        leaves = A.codomain.leaves(y, "y")
        self.A = A
        self._names = [f"_y_{index}" for index in range(len(leaves))]
        for name, leaf in zip(self._names, leaves, strict=True):
            self.register_buffer(name, leaf)
        self.weight = None if weight is None else weight_operator(A, weight)

    @property
    def y(self) -> Y:
        """The data."""
        A: Any = self._modules["A"]  # past a search by name, which costs a microsecond
        data: Y = A.codomain.unflatten([self._buffers[name] for name in self._names])
        return data

    def residual(self, x: X) -> Y:
        """Return ``Ax − y``."""
        codomain = self.A.codomain
        pairs = list(zip(codomain.leaves(self.A(x)), codomain.leaves(self.y), strict=True))
        if pairs[0][0].shape != pairs[0][1].shape:
            raise SpaceMismatchError(
                f"expected x of the batch size of the data, got Ax of shape {tuple(pairs[0][0].shape)} for data of "
                f"shape {tuple(pairs[0][1].shape)}: nothing is broadcast"
            )
        return codomain.unflatten([a - b for a, b in pairs])

    if TYPE_CHECKING:

        def __call__(self, x: X) -> Tensor: ...  # noqa: D102

    def forward(self, x: X) -> Tensor:
        """Return ``F(x)``, a real zero-dimensional tensor that autograd can differentiate."""
        residual = self.residual(x)
        return self._value(residual, self._weighted(residual))

    def gradient(self, x: X) -> X:
        """Return ``Aᴴ W (Ax − y)``."""
        return self._residual_and_gradient(x, residual=False)[2]  # which may not need the residual itself

    def value_and_gradient(self, x: X) -> tuple[Tensor, X]:
        """Return ``(F(x), Aᴴ W (Ax − y))`` with one forward and one adjoint."""
        residual, weighted, gradient = self._residual_and_gradient(x, residual=True)
        return self._value(residual, self._weighted(residual) if weighted is None else weighted), gradient

    def _residual_and_gradient(self, x: X, *, residual: bool) -> tuple[Any, Any, X]:
        """Return ``Ax − y``, its weighted form if that was computed, and the gradient: from one graph if possible."""
        entries = None if self.weight is None else diagonal_entries(self.weight)
        if self.weight is None or entries is not None:
            A: Any = self._modules["A"]
            fused = residual_and_gradient(A, x, self.y, entries, residual=residual)
            if fused is not None:
                return fused[0], None, fused[1]
        apart = self.residual(x)
        weighted = self._weighted(apart)
        return apart, weighted, self.A.H(weighted)

    def _weighted(self, residual: Any) -> Any:
        return residual if self.weight is None else self.weight(residual)

    @property
    def hessian(self) -> LinearOperator[X, X]:
        """The Hessian ``Aᴴ W A``, self-adjoint and positive semi-definite."""
        A = self.A.linear if isinstance(self.A, AffineOperator) else self.A
        return A.gram if self.weight is None else A.H @ self.weight @ A

    def _value(self, residual: Any, weighted: Any) -> Tensor:
        codomain = self.A.codomain
        with codomain.without_autocast():
            pairs = zip(codomain.leaves(residual), codomain.leaves(codomain.weigh(weighted)), strict=True)
            return codomain.total([torch.linalg.vecdot(r.reshape(-1), w.reshape(-1)).real for r, w in pairs]) / 2


def weight_operator(A: Operator[Any, Any], weight: Any) -> LinearOperator:
    """Return W as an operator on the codomain of A, or raise."""
    if not isinstance(weight, LinearOperator):
        space = A.codomain
        return diagonal(weight_entries(A, weight), space if space.is_sharded or space.weight is not None else None)
    if weight.domain != A.codomain or weight.codomain != A.codomain:
        raise SpaceMismatchError(
            f"expected a weight that maps {A.codomain} to itself, got one from {weight.domain} to {weight.codomain}; "
            "build it on A.codomain"
        )
    return weight


def weight_entries(A: Operator[Any, Any], weight: Any) -> Any:
    """Return the entries of a diagonal W as an element of the codomain of A, or raise."""
    given, own = A.codomain.structure.leaves(weight), A.codomain.weight
    if own is not None and not own.is_diagonal:
        raise SpaceMismatchError(
            f"expected a weight that is self-adjoint in {A.codomain}, whose own weight is an operator, got entries: "
            "give an operator on A.codomain"
        )
    if given is None:
        A.codomain.check(weight, "weight")  # raises
    leaves = [
        w.to(spec.dtype) if isinstance(w, Tensor) and spec.is_complex and not w.is_complex() else w
        for w, spec in zip(given or (), A.codomain.specs, strict=True)
    ]
    for w in given or ():
        negative = isinstance(w, Tensor) and not w.is_complex() and bool((w < 0).any())
        if not A.codomain.every(not negative):
            raise SpaceMismatchError("expected weights of 0 or more, got negative ones: F would have no minimum")
    entries = A.codomain.unflatten(leaves)
    A.codomain.check(entries, "weight")
    return entries


def least_squares_gradient(A: Operator[X, Y], x: X, y: Y) -> X:
    """Return ``Aᴴ(Ax − y)``, the gradient of ``½‖Ax − y‖²``.

    Parameters
    ----------
    A : LinearOperator or AffineOperator
        The forward model.
    x : pytree of tensors
        An element of the domain.
    y : pytree of tensors
        The data, an element of the codomain.

    Returns
    -------
    pytree of tensors
        An element of the domain.

    Raises
    ------
    SpaceMismatchError
        If x or y is not an element of its space.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import linear_operator
    >>> c = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    >>> A = linear_operator(c, (1, 1, 8, 8))
    >>> least_squares_gradient(A, torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)).shape
    torch.Size([1, 1, 8, 8])
    """
    return LeastSquares(A, y).gradient(x)
