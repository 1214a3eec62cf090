"""Sums, multiples and conjugates of elements, ``x + z``, ``cx`` and ``conj(x)``, and relations between spaces."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adjointlab.errors import SpaceMismatchError
from adjointlab.space.space import Space
from adjointlab.space.spec import TensorSpec
from adjointlab.tree import map_leaves


def added(x: Any, z: Any) -> Any:
    """Return ``x + z``."""
    return map_leaves(torch.add, x, z)


def scaled(scalar: Any, x: Any) -> Any:
    """Return ``cx``."""
    return map_leaves(lambda leaf: scalar * leaf, x)


def conjugated(x: Any) -> Any:
    """Return ``conj(x)``."""
    return map_leaves(lambda leaf: leaf.conj().resolve_conj(), x)


def is_scalar(value: Any) -> bool:
    """Return whether a value is a number, or a tensor without dimensions."""
    return isinstance(value, numbers.Number) or (isinstance(value, Tensor) and value.ndim == 0)


def require_scalar(scalar: Any, space: Space) -> None:
    """Raise unless the multiple ``cx`` of an element of a space is in that space."""
    is_complex = isinstance(scalar, numbers.Complex) and not isinstance(scalar, numbers.Real)
    if isinstance(scalar, Tensor):
        is_complex = scalar.is_complex()
    if is_complex and not all(spec.is_complex for spec in space.specs):
        raise SpaceMismatchError(
            f"expected a real scalar for the real space {space}, got {scalar}: a complex multiple of a real element "
            "is not in it; use a real scalar, or a complex domain"
        )


def common(left: Space, right: Space, what: str, remedy: str) -> Space:
    """Return the space that left and right are equal to, with the fewer free dimensions of both."""
    free = min(left.batch_dims, right.batch_dims)
    left, right = left.with_batch_dims(free), right.with_batch_dims(free)
    if left != right:
        raise SpaceMismatchError(f"expected {what}, got {left} and {right}; {remedy}")
    return left


def moved(space: Space, function: Callable[[Tensor], Tensor]) -> Space:
    """Return the space that a conversion of tensors, such as ``x ↦ x.to(device)``, maps a space to."""

    def move(spec: TensorSpec) -> TensorSpec:
        probe = function(torch.empty(0, dtype=spec.dtype, device=spec.device))
        return replace(spec, dtype=probe.dtype, device=probe.device)

    specs = tuple(map(move, space.specs))
    weight = None if space.weight is None else space.weight.moved(function, specs, moved)
    return Space(specs, space.structure, space.batch_dims, weight)


def viewed_as_real(space: Space) -> Space:
    """Return the space of the same elements, where each complex leaf is ``torch.view_as_real`` of it."""
    require_plain(space, "A.real_view")
    specs = [replace(s, shape=(*s.shape, 2), dtype=s.dtype.to_real()) if s.is_complex else s for s in space.specs]
    return Space(tuple(specs), space.structure, space.batch_dims)


def require_plain(space: Space, name: str, *, sharded: bool = False) -> None:
    """Raise unless a space is without weights and, if it may not be ``sharded``, one of one process."""
    if space.weight is not None or (space.is_sharded and not sharded):
        raise SpaceMismatchError(
            f"expected {name} of an operator on one process between spaces without weights, got one on {space}: make "
            "it of the operator between the plain spaces, and weigh what comes out"
        )
