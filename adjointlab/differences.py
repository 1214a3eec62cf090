"""Differences of neighbours, ``(Lx)_d = (x shifted by one along d − x) / h_d``, and the Laplacian ``Σ ∂_d²``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adjointlab.derive import linear_operator
from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.space import Space
from adjointlab.tree import SINGLE

BORDERS = ("reflect", "circular", "zero")


def finite_differences(
    space: Any,
    dims: int | Sequence[int] | None = None,
    *,
    border: str = "reflect",
    spacing: float | Sequence[float] = 1.0,
    batch_dims: int = 0,
) -> LinearOperator[Tensor, Tensor]:
    """Return ``x ↦ ((x_{i+1} − x_i) / h)`` along every spatial dimension: the gradient of an image, as one tensor.

    The differences along the dimensions are stacked in a new dimension, after the batch dimensions:
    ``(d, *x.shape)`` without any, and ``(N, d, *x.shape[1:])`` with one.

    Parameters
    ----------
    space : Space, or a description accepted by :meth:`Space.of`
        The domain, of one real or complex tensor: ``A.domain``, to penalise the x of A.
    dims : int or sequence of int, optional
        The spatial dimensions. If not given, and x has four dimensions or more, those after the first two, which
        torch has for batch and channel; of fewer, all. The batch dimensions, and dimensions of size one, are left out.
    border : str
        What lies beyond the last entry: its mirror image, so that the last difference is zero (``"reflect"``, a Neumann
        border), the first entry (``"circular"``), or ``"zero"``.
    spacing : float or sequence of float
        The distance h of neighbours, along every dimension or each.
    batch_dims : int
        Number of leading dimensions that may have any size, if ``space`` is no Space.

    Returns
    -------
    LinearOperator
        From the space to tensors with one dimension more.

    Raises
    ------
    SpaceMismatchError
        If the domain is not one tensor.
    ValueError
        If a dimension, the border or a spacing is none.

    Examples
    --------
    >>> import torch
    >>> L = finite_differences((4,))
    >>> L(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    tensor([[1., 2., 4., 0.]])
    >>> finite_differences((8, 3, 32, 32), border="circular").codomain.specs[0].shape
    (2, 8, 3, 32, 32)
    """
    domain, found, distances = _prepared(space, dims, border, spacing, batch_dims)
    return linear_operator(FiniteDifferences(found, border, distances, domain.batch_dims), domain)


def laplacian(
    space: Any,
    dims: int | Sequence[int] | None = None,
    *,
    border: str = "reflect",
    spacing: float | Sequence[float] = 1.0,
    batch_dims: int = 0,
) -> LinearOperator[Tensor, Tensor]:
    """Return ``x ↦ Σ (x_{i+1} − 2 x_i + x_{i−1}) / h²`` over every spatial dimension.

    It is self-adjoint and negative semi-definite. With the borders ``"reflect"`` and ``"circular"``, it is ``−LᴴL`` for
    the L of :func:`finite_differences`; with ``"zero"``, zeros lie on either side, as for a Dirichlet border.

    Parameters
    ----------
    space, dims, border, spacing, batch_dims
        As in :func:`finite_differences`.

    Returns
    -------
    LinearOperator
        From the space to itself.

    Raises
    ------
    SpaceMismatchError, ValueError
        As :func:`finite_differences` does.

    Examples
    --------
    >>> import torch
    >>> laplacian((4,))(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    tensor([ 1.,  1.,  2., -4.])
    """
    domain, found, distances = _prepared(space, dims, border, spacing, batch_dims)
    return linear_operator(Laplacian(found, border, distances), domain)


class FiniteDifferences(nn.Module):
    """The map of :func:`finite_differences`; ``at`` is the dimension in which the differences are stacked."""

    def __init__(self, dims: tuple[int, ...], border: str, spacing: tuple[float, ...], at: int) -> None:
        super().__init__()
        self.dims, self.border, self.spacing, self.at = dims, border, spacing, at

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"dims={self.dims}, border={self.border!r}, spacing={self.spacing}"

    def forward(self, x: Tensor) -> Tensor:
        """Return the differences of x."""
        image = x.new_zeros((*x.shape[: self.at], len(self.dims), *x.shape[self.at :]))
        for index, (dim, h) in enumerate(zip(self.dims, self.spacing, strict=True)):
            part, n = image.select(self.at, index), x.shape[dim]
            inner, last = x.narrow(dim, 1, n - 1) - x.narrow(dim, 0, n - 1), x.narrow(dim, n - 1, 1)
            part.narrow(dim, 0, n - 1).copy_(inner if h == 1 else inner / h)
            if self.border != "reflect":
                beyond = x.narrow(dim, 0, 1) - last if self.border == "circular" else -last
                part.narrow(dim, n - 1, 1).copy_(beyond / h)
        return image


class Laplacian(nn.Module):
    """The map of :func:`laplacian`."""

    def __init__(self, dims: tuple[int, ...], border: str, spacing: tuple[float, ...]) -> None:
        super().__init__()
        self.dims, self.border, self.spacing = dims, border, spacing

    extra_repr = FiniteDifferences.extra_repr

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the second differences of x."""
        terms = [_second(x, dim, self.border, h) for dim, h in zip(self.dims, self.spacing, strict=True)]
        return sum(terms[1:], start=terms[0])


def _second(x: Tensor, dim: int, border: str, h: float) -> Tensor:
    """Return ``(x_{i+1} − 2 x_i + x_{i−1}) / h²`` along a dimension."""
    n = x.shape[dim]
    first, last = x.narrow(dim, 0, 1), x.narrow(dim, n - 1, 1)
    if border == "circular":
        first, last = last, first
    if border == "zero":
        first, last = torch.zeros_like(first), torch.zeros_like(last)
    longer = torch.cat([first, x, last], dim)
    inner = longer.narrow(dim, 0, n) - 2 * x + longer.narrow(dim, 2, n)
    return inner if h == 1 else inner / h**2


def _prepared(
    space: Any, dims: int | Sequence[int] | None, border: str, spacing: float | Sequence[float], batch_dims: int
) -> tuple[Space[Tensor], tuple[int, ...], tuple[float, ...]]:
    """Return the domain, the dimensions counted from the last, and the spacings, or raise."""
    domain = space if isinstance(space, Space) else Space.of(space, batch_dims=batch_dims)
    if domain.structure is not SINGLE or domain.is_sharded:
        raise SpaceMismatchError(
            f"expected a domain of one tensor, got {domain}: make one operator for each, and join them by al.block_diag"
        )
    if border not in BORDERS:
        raise ValueError(f"expected border to be one of {', '.join(map(repr, BORDERS))}, got {border!r}")
    shape, k = domain.specs[0].shape, domain.batch_dims
    found = _spatial(shape, k) if dims is None else _given(dims, len(shape), k)
    spacings = tuple(spacing) if isinstance(spacing, Sequence) else (spacing,) * len(found)
    if len(spacings) != len(found) or any(not 0 < h < math.inf for h in spacings):
        raise ValueError(
            f"expected spacing to be a positive number, or one for each of the {len(found)} dimensions, got {spacing!r}"
        )
    return domain, found, spacings


def _spatial(shape: tuple[int, ...], batch_dims: int) -> tuple[int, ...]:
    """Return the spatial dimensions that a shape has by default."""
    first = max(batch_dims, 2 if len(shape) >= 4 else 0)
    every = tuple(dim - len(shape) for dim in range(first, len(shape)))
    if not every:
        raise ValueError(f"expected a spatial dimension besides the batch, got the shape {shape}: lower batch_dims")
    return tuple(dim for dim in every if shape[dim] > 1) or every


def _given(dims: int | Sequence[int], rank: int, batch_dims: int) -> tuple[int, ...]:
    """Return dimensions as they were given, counted from the last."""
    given = (dims,) if isinstance(dims, int) else tuple(dims)
    found = tuple(dim - rank if dim >= 0 else dim for dim in given)
    if not found or len(set(found)) < len(found) or any(not batch_dims - rank <= dim < 0 for dim in found):
        raise ValueError(
            f"expected dims to be different dimensions from {batch_dims} to {rank - 1}, or from {batch_dims - rank} to "
            f"-1, got {dims!r}: batch dimensions have no neighbours"
        )
    return found
