"""Sums, multiples and conjugates of elements, ``x + z``, ``cx`` and ``conj(x)``, and relations between spaces."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

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


class Weighing(nn.Module):
    """``x ↦ Wx``, or ``x ↦ W⁻¹x``, on the elements of a space, as a module that takes the space along."""

    def __init__(self, space: Space, *, inverse: bool) -> None:
        super().__init__()
        self.space, self.inverse = space, inverse

    @property
    def domain(self) -> Space:
        """The space without its weight, which is also the codomain."""
        return self.space.plain

    codomain = domain

    def forward(self, x: Any) -> Any:
        """Return ``Wx`` or ``W⁻¹x``."""
        return self.space.unweigh(x) if self.inverse else self.space.weigh(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.space = moved(self.space, fn)
        return self


class ViewedAsReal(nn.Module):
    """A map of complex elements as one of pairs of real numbers, ``torch.view_as_real``."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Any) -> Any:
        """Return the image of x."""
        domain, codomain = self.operator.domain, self.operator.codomain
        pairs = zip(domain.structure.leaves(x) or (), domain.specs, strict=True)
        given = [torch.view_as_complex(v.contiguous()) if spec.is_complex else v for v, spec in pairs]
        image = codomain.leaves(self.operator(domain.unflatten(given)))
        return codomain.unflatten([torch.view_as_real(v.resolve_conj()) if v.is_complex() else v for v in image])


def viewed_as_real(space: Space) -> Space:
    """Return the space of the same elements, where each complex leaf is ``torch.view_as_real`` of it."""
    require_whole(space, "A.real_view")
    specs = [replace(s, shape=(*s.shape, 2), dtype=s.dtype.to_real()) if s.is_complex else s for s in space.specs]
    return weighted_like(
        Space(tuple(specs), space.structure, space.batch_dims), (space,),
        lambda w, spec: w[..., None] if spec.is_complex else w, ViewedAsReal,
    )  # fmt: skip


def weighted_like(
    plain: Space, parts: Sequence[Space], entries: Callable[..., Tensor], operator: Callable[..., Any]
) -> Space:
    """Return a space with the weight that follows from those of the spaces that its elements are made of."""
    # Of weights that are numbers, ``entries`` makes the numbers from those of each part, and the specs of the leaf
    # there; of others, ``operator`` makes W from the Weighing of each part, and W⁻¹ likewise.
    if all(space.weight is None for space in parts):
        return plain
    if all(space.weight is None or space.weight.is_diagonal for space in parts):
        numbers_of = [
            [torch.ones((), device=spec.device) for spec in space.specs] if space.weight is None
            else space.weight.entries for space in parts
        ]  # fmt: skip
        made = [entries(*each) for each in zip(*numbers_of, *[space.specs for space in parts], strict=True)]
        return Space.of(plain, weight=plain.unflatten(made))
    pair = [operator(*[Weighing(space, inverse=inverse) for space in parts]) for inverse in (False, True)]
    return Space.of(plain, weight=tuple(pair))


def require_whole(space: Space, name: str) -> None:
    """Raise unless a space is one of one process."""
    if space.is_sharded:
        raise SpaceMismatchError(
            f"expected {name} of an operator on one process, got one on {space}: make it of the part of each process"
        )
