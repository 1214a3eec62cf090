"""Operators built from other operators (stacks, block diagonals), the identity, and diagonal operators."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from adjointlab.errors import SpaceMismatchError
from adjointlab.grams import as_gram
from adjointlab.modules import Entries
from adjointlab.notation import Notation, outline
from adjointlab.operators import LinearOperator, derived, self_adjoint
from adjointlab.space import Space, TensorSpec
from adjointlab.space.algebra import added, common
from adjointlab.space.spec import OfDict, OfPair, OfTensor
from adjointlab.tree import map_leaves
from adjointlab.typed import E, X, Y
from adjointlab.weighted import in_spaces


def _product_space(spaces: Sequence[Space]) -> Space:
    free = {space.batch_dims for space in spaces}
    if len(free) > 1:
        raise SpaceMismatchError(f"expected operators with equal batch_dims, got {sorted(free)}: build them alike")
    return Space.of(tuple(spaces), batch_dims=free.pop())


def _operators(operators: Sequence[LinearOperator], name: str) -> list[LinearOperator]:
    found = list(operators) if isinstance(operators, (list, tuple)) else []
    if not found or not all(isinstance(operator, LinearOperator) for operator in found):
        kinds = [type(o).__name__ for o in found] or type(operators).__name__
        raise SpaceMismatchError(
            f"expected {name} of a non-empty list of linear operators, got {kinds}: wrap each with al.linear_operator"
        )
    return found


@overload
def vstack(operators: Sequence[LinearOperator[X, Y]]) -> LinearOperator[X, tuple[Y, ...]]: ...


@overload
def vstack(operators: Sequence[LinearOperator[Any, Any]]) -> LinearOperator[Any, tuple[Any, ...]]: ...


def vstack(operators: Sequence[LinearOperator[Any, Any]]) -> LinearOperator[Any, Any]:
    """Return ``x ↦ (A₁x, …, Aₙx)``; its adjoint is ``(y₁, …, yₙ) ↦ Σ Aᵢᴴyᵢ``.

    Parameters
    ----------
    operators : sequence of LinearOperator
        Operators that share one domain.

    Returns
    -------
    LinearOperator
        From the shared domain to tuples of elements of the codomains.

    Raises
    ------
    SpaceMismatchError
        If the domains differ or the list is empty.

    Examples
    --------
    >>> A = identity((3,))
    >>> len(vstack([A, 2 * A])(A.domain.zeros()))
    2
    """
    parts = _operators(operators, "vstack")
    for part in parts[1:]:
        common(parts[0].domain, part.domain, "the operators of vstack to have one domain", "use block_diag otherwise")
    return derived(
        lambda x: tuple(part(x) for part in parts),
        lambda y: functools.reduce(added, [part.H(piece) for part, piece in zip(parts, y, strict=True)]),
        parts[0].domain, _product_space([part.codomain for part in parts]), (vstack, (parts,)), *parts,
        notation=Notation("vstack", is_stack=True),
    )  # fmt: skip


@overload
def hstack(operators: Sequence[LinearOperator[X, Y]]) -> LinearOperator[tuple[X, ...], Y]: ...


@overload
def hstack(operators: Sequence[LinearOperator[Any, Any]]) -> LinearOperator[tuple[Any, ...], Any]: ...


def hstack(operators: Sequence[LinearOperator[Any, Any]]) -> LinearOperator[Any, Any]:
    """Return ``(x₁, …, xₙ) ↦ Σ Aᵢxᵢ``; its adjoint is ``y ↦ (A₁ᴴy, …, Aₙᴴy)``.

    Parameters
    ----------
    operators : sequence of LinearOperator
        Operators that share one codomain.

    Returns
    -------
    LinearOperator
        From tuples of elements of the domains to the shared codomain.

    Raises
    ------
    SpaceMismatchError
        If the codomains differ or the list is empty.

    Examples
    --------
    >>> A = identity((3,))
    >>> hstack([A, A]).domain.size
    6
    """
    parts = _operators(operators, "hstack")
    for part in parts[1:]:
        common(parts[0].codomain, part.codomain, "the operators of hstack to have one codomain", "use block_diag")
    return derived(
        lambda x: functools.reduce(added, [part(piece) for part, piece in zip(parts, x, strict=True)]),
        lambda y: tuple(part.H(y) for part in parts),
        _product_space([part.domain for part in parts]), parts[0].codomain, (hstack, (parts,)), *parts,
        notation=Notation("hstack", is_stack=True),
    )  # fmt: skip


@overload
def block_diag(operators: Sequence[LinearOperator[X, Y]]) -> LinearOperator[tuple[X, ...], tuple[Y, ...]]: ...


@overload
def block_diag(operators: Sequence[LinearOperator[Any, Any]]) -> LinearOperator[tuple[Any, ...], tuple[Any, ...]]: ...


def block_diag(operators: Sequence[LinearOperator[Any, Any]]) -> LinearOperator[Any, Any]:
    """Return ``(x₁, …, xₙ) ↦ (A₁x₁, …, Aₙxₙ)``; its adjoint is ``(y₁, …, yₙ) ↦ (A₁ᴴy₁, …, Aₙᴴyₙ)``.

    Parameters
    ----------
    operators : sequence of LinearOperator
        The blocks on the diagonal.

    Returns
    -------
    LinearOperator
        From tuples of elements of the domains to tuples of elements of the codomains.

    Raises
    ------
    SpaceMismatchError
        If the list is empty.

    Examples
    --------
    >>> A = block_diag([identity((3,)), identity((2, 2))])
    >>> A.domain == A.codomain
    True
    """
    parts = _operators(operators, "block_diag")
    return derived(
        lambda x: tuple(part(piece) for part, piece in zip(parts, x, strict=True)),
        lambda y: tuple(part.H(piece) for part, piece in zip(parts, y, strict=True)),
        _product_space([part.domain for part in parts]), _product_space([part.codomain for part in parts]),
        (block_diag, (parts,)), *parts, notation=Notation("block_diag", is_stack=True),
    )  # fmt: skip


@overload
def identity(space: OfTensor) -> LinearOperator[Tensor, Tensor]: ...


@overload
def identity(space: OfPair) -> LinearOperator[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]: ...


@overload
def identity(space: OfDict) -> LinearOperator[dict[str, Tensor], dict[str, Tensor]]: ...


@overload
def identity(space: Space[E] | E) -> LinearOperator[E, E]: ...


@overload
def identity(space: Any) -> LinearOperator[Any, Any]: ...


def identity(space: Any) -> LinearOperator[Any, Any]:
    """Return ``x ↦ x``, which is its own adjoint.

    Parameters
    ----------
    space : Space, or a description accepted by :meth:`Space.of`
        The domain.

    Returns
    -------
    LinearOperator
        The identity.

    Raises
    ------
    SpaceMismatchError
        If ``space`` describes no space.

    Examples
    --------
    >>> I = identity((2, 2))
    >>> I.H is I
    True
    """
    where = Space.of(space)
    operator: LinearOperator = derived(
        _copied, _copied, where, where, lambda: (identity, (operator.domain,)), notation=Notation("I")
    )
    return self_adjoint(operator)


def _copied(x: Any) -> Any:
    return map_leaves(Tensor.clone, x)  # results are their caller's, to write to


@overload
def diagonal(d: Tensor, space: Space[Tensor] | None = None) -> LinearOperator[Tensor, Tensor]: ...


@overload
def diagonal(d: X, space: Space[X] | None = None) -> LinearOperator[X, X]: ...


def diagonal(d: Any, space: Space | None = None) -> LinearOperator[Any, Any]:
    """Return ``x ↦ d ⊙ x``; its adjoint is ``y ↦ conj(d) ⊙ y``.

    Parameters
    ----------
    d : Tensor or pytree of tensors
        The diagonal, with the shape and dtype of x. Parameters stay parameters. If the space is given, a real number,
        or a real tensor without dimensions, is for all entries of a leaf.
    space : Space, optional
        The domain; the space of ``d`` if not given. A domain that is sharded or has a weight must be given, because
        ``d`` does not show it.

    Returns
    -------
    LinearOperator
        From the space to itself.

    Raises
    ------
    SpaceMismatchError
        If ``d`` contains leaves that are not floating-point or complex tensors, or is not in ``space``.

    Examples
    --------
    >>> import torch
    >>> diagonal(torch.tensor([1.0, 2.0]))(torch.tensor([3.0, 4.0]))
    tensor([3., 8.])
    """
    if space is not None and space.weight is not None:
        return in_spaces(diagonal(d, space.plain), space, space)
    where = Space.of(d) if space is None else space
    found = where.structure.leaves(d)
    has_scalars = space is not None and found is not None and any(map(is_scalar, found))
    entries = Entries(_diagonal(where, found) if has_scalars and found is not None else where.leaves(d, "d"))

    def product(d: Sequence[Tensor], x: Any) -> Any:
        pairs = zip(d, where.structure.leaves(x) or (), strict=True)
        return where.unflatten([a * b if a.ndim else a.to(b.dtype) * b for a, b in pairs])

    operator: LinearOperator = derived(
        lambda x: product(entries.leaves(), x), lambda y: product([a.conj() for a in entries.leaves()], y),
        where, where,
        lambda: (diagonal, (where.unflatten(entries.leaves()), *([] if space is None else [operator.domain]))), entries,
        notation=Notation(meaning=f"diag(d) for d in {outline(where)}"),
    )  # fmt: skip
    return operator


def is_scalar(value: Any) -> bool:
    """Return whether a value is a real number, or a real tensor without dimensions."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.is_floating_point()
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def as_scalar(value: Any, spec: TensorSpec) -> Tensor:
    """Return a real number as a tensor without dimensions that multiplies a leaf."""
    if not isinstance(value, Tensor):
        value = torch.tensor(float(value), dtype=spec.dtype.to_real(), device=spec.device)
    found: Tensor = value.to(spec.device) if spec.shape else value.to(spec.device, spec.dtype)
    return found


def _diagonal(space: Space, leaves: Sequence[Any]) -> Sequence[Tensor]:
    """Return the leaves of a diagonal, some of which are numbers, as tensors; raise where the others do not fit."""
    leaves = [as_scalar(d, spec) if is_scalar(d) else d for d, spec in zip(leaves, space.specs, strict=True)]
    whole = [d.shape for d in leaves if isinstance(d, Tensor) and d.ndim]
    wide = space.with_batch(whole[0][: space.batch_dims]) if whole else space
    wide.check(wide.unflatten(_expanded(wide, leaves)), "d")
    return leaves


def _expanded(space: Space, leaves: Sequence[Tensor]) -> list[Tensor]:
    return [
        d.to(spec.dtype).expand(spec.shape) if spec.shape and is_scalar(d) else d
        for d, spec in zip(leaves, space.specs, strict=True)
    ]


def diagonal_entries(operator: LinearOperator) -> Any:
    """Return the diagonal of an operator made by :func:`diagonal`, or None for any other operator."""
    entries = getattr(operator, "operator_0", None)
    if not isinstance(entries, Entries):
        return None
    return operator.domain.unflatten(_expanded(operator.domain, entries.leaves()))


def weighted_gram(A: LinearOperator, weight: LinearOperator) -> LinearOperator:
    """Return ``AᴴWA`` for a self-adjoint W; from one simplified graph where W is diagonal and A is derived."""
    operator: LinearOperator = A.H @ weight @ A
    if diagonal_entries(weight) is not None:
        as_gram(operator, A, lambda: diagonal_entries(weight))
        operator.made_by(weighted_gram, A, weight)
    return operator
