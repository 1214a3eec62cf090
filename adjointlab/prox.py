r"""Proximal maps, ``prox(x, step) = argmin_z g(z) + ‖z − x‖² / (2 step)``, of the usual functions g.

A proximal map is a function of an element and a positive number; the solvers take any function of this kind. These take
pytrees, leaf by leaf.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from adjointlab.tree import map_leaves

Prox: TypeAlias = Callable[[Any, float], Any]

__all__ = ["box", "conjugate", "l1", "l2", "nonnegative"]


def box(lower: float | Tensor | None = None, upper: float | Tensor | None = None) -> Prox:
    """Return the projection ``min(max(x, lower), upper)``: the proximal map of ``lower ≤ x ≤ upper`` in every entry.

    Parameters
    ----------
    lower, upper : float or Tensor, optional
        The bounds; none on that side if not given.

    Returns
    -------
    callable
        The function of x, with real entries, and a step, which plays no part.

    Raises
    ------
    ValueError
        If a bound is NaN, or the lower one is above the upper one.

    Examples
    --------
    >>> import torch
    >>> box(0.0, 1.0)(torch.tensor([-1.0, 0.5, 2.0]), 0.1)
    tensor([0.0000, 0.5000, 1.0000])
    """
    least, most = (torch.as_tensor(-1.0 if bound is None else bound) for bound in (lower, upper))
    if bool(least.isnan().any() | most.isnan().any()):
        raise ValueError("expected bounds that are numbers, got NaN: use None, or infinity, for no bound")
    if lower is not None and upper is not None and not bool((least <= most).all()):
        raise ValueError(f"expected the lower bound to be at most the upper one, got {lower} and {upper}: swap them")
    return functools.partial(_clamped, lower, upper)


def nonnegative() -> Prox:
    """Return the projection ``max(x, 0)``: the proximal map of ``x ≥ 0`` in every entry.

    Returns
    -------
    callable
        The function of x, with real entries, and a step, which plays no part.

    Examples
    --------
    >>> import torch
    >>> nonnegative()(torch.tensor([-1.0, 2.0]), 0.1)
    tensor([0., 2.])
    """
    return box(0.0)


def l1(weight: float | Tensor = 1.0, *, dim: int | Sequence[int] | None = None) -> Prox:
    """Return the soft threshold ``x · max(1 − step · weight / |x|, 0)``: the proximal map of ``weight · Σ |xᵢ|``.

    Parameters
    ----------
    weight : float or Tensor
        The weight of every absolute value, or of each: a tensor that is broadcast to them.
    dim : int or sequence of int, optional
        Dimensions along which entries are the components of vectors: ``|x|`` is then the length of a vector, and the
        sum that of a group lasso. After :func:`adjointlab.finite_differences`, ``dim=0`` (with ``batch_dims=k``,
        ``dim=k``) makes the total variation isotropic. If not given, every entry is for itself.

    Returns
    -------
    callable
        The function of x, real or complex, and a step.

    Raises
    ------
    ValueError
        If the weight is negative.

    Examples
    --------
    >>> import torch
    >>> l1()(torch.tensor([-3.0, 0.5, 2.0]), 1.0)
    tensor([-2., 0., 1.])
    >>> l1(dim=0)(torch.tensor([[3.0, 0.1], [4.0, 0.1]]), 1.0)
    tensor([[2.4000, 0.0000],
            [3.2000, 0.0000]])
    """
    return functools.partial(_shrunk, _weight(weight), dim)


def l2(weight: float | Tensor = 1.0) -> Prox:
    """Return ``x / (1 + step · weight)``: the proximal map of ``½ weight ‖x‖²``.

    For ``weight · ‖x‖``, the norm itself, use :func:`l1` with all dimensions as ``dim``.

    Parameters
    ----------
    weight : float or Tensor
        The weight of all squares, or of each: a tensor that is broadcast to them.

    Returns
    -------
    callable
        The function of x, real or complex, and a step.

    Raises
    ------
    ValueError
        If the weight is negative.

    Examples
    --------
    >>> import torch
    >>> l2()(torch.tensor([2.0, 4.0]), 1.0)
    tensor([1., 2.])
    """
    return functools.partial(_divided, _weight(weight))


def conjugate(prox: Prox) -> Prox:
    """Return ``u − step · prox(u / step, 1 / step)``: the proximal map of the convex conjugate ``g*``, after Moreau.

    Parameters
    ----------
    prox : callable
        The proximal map of a convex function g.

    Returns
    -------
    callable
        The function of u and a step.

    Examples
    --------
    >>> import torch
    >>> conjugate(l1(2.0))(torch.tensor([-3.0, 1.0]), 0.5)  # the conjugate of 2 |x| is the bound |u| ≤ 2
    tensor([-2., 1.])
    """
    return functools.partial(_conjugated, prox)


def _weight(weight: float | Tensor) -> float | Tensor:
    if not bool((torch.as_tensor(weight) >= 0).all()):
        raise ValueError(f"expected a weight of 0 or more, got {weight}: other functions are not convex")
    return weight


def _clamped(lower: Any, upper: Any, x: Any, step: float) -> Any:
    def clamp(leaf: Tensor) -> Tensor:
        if leaf.is_complex():
            raise ValueError(f"expected real entries for bounds, got {leaf.dtype}: bound torch.view_as_real(x), or |x|")
        if lower is None and upper is None:
            return leaf
        has_tensor = isinstance(lower, Tensor) or isinstance(upper, Tensor)  # clamp takes two of them, or two numbers
        return leaf.clamp(*[
            leaf.new_tensor(bound) if has_tensor and isinstance(bound, (int, float)) else _at(bound, leaf)
            for bound in (lower, upper)
        ])  # fmt: skip

    return map_leaves(clamp, x)


def _shrunk(weight: Any, dim: Any, x: Any, step: float) -> Any:
    def shrink(leaf: Tensor) -> Tensor:
        most = step * _at(weight, leaf)
        if dim is None and not leaf.is_complex():
            return leaf - leaf.clamp(-most, most)
        sizes = leaf.abs() if dim is None else torch.linalg.vector_norm(leaf, dim=dim, keepdim=True)
        return leaf * torch.where(sizes > most, 1 - most / sizes, 0)

    return map_leaves(shrink, x)


def _divided(weight: Any, x: Any, step: float) -> Any:
    return map_leaves(lambda leaf: leaf / (1 + step * _at(weight, leaf)), x)


def _conjugated(prox: Prox, u: Any, step: float) -> Any:
    inner = prox(map_leaves(lambda leaf: leaf / step, u), 1 / step)
    return map_leaves(lambda leaf, shrunk: leaf - step * shrunk, u, inner)


def _at(value: Any, leaf: Tensor) -> Any:
    return value.to(leaf.device, leaf.dtype.to_real()) if isinstance(value, Tensor) else value
