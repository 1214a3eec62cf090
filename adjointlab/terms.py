"""The terms of least squares beside the data: weights W, and penalties ``½ λ ‖Lx − b‖²``."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from adjointlab.affine import Operator
from adjointlab.blocks import block_diag, diagonal, identity, vstack
from adjointlab.errors import SpaceMismatchError
from adjointlab.modules import Entries
from adjointlab.notation import PRODUCT, Notation, number
from adjointlab.operators import LinearOperator, derived
from adjointlab.space import Space
from adjointlab.tree import map_leaves


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


class Penalty(nn.Module):
    """The penalty ``½ λ ‖Lx − b‖²``; tensors are buffers, or parameters where they are.

    λ is a number, a tensor without dimensions, or one with an entry for each problem of a batch; b is zero if None.
    """

    def __init__(self, strength: float | Tensor, L: LinearOperator, b: Any = None) -> None:
        super().__init__()
        self.L = L
        self.strength: float | Tensor
        if isinstance(strength, nn.Parameter):
            self.register_parameter("strength", strength)
        elif isinstance(strength, Tensor):
            self.register_buffer("strength", strength)
        else:
            self.strength = strength
        self.target = None if b is None else Entries(L.codomain.leaves(b, "b"))

    @staticmethod
    def of(penalties: Any, domain: Space, batch: tuple[int, ...]) -> list[Penalty]:
        """Return the penalties on a domain that a list of (λ, L) or (λ, L, b) describes, or raise."""
        found = []
        for penalty in penalties if isinstance(penalties, (tuple, list)) else [penalties]:
            if not isinstance(penalty, (tuple, list)) or len(penalty) not in {2, 3}:
                raise SpaceMismatchError(
                    f"expected penalties as a list of (λ, L) or (λ, L, b), got {type(penalty).__name__} in it: put "
                    "each into brackets, [(λ, L)]"
                )
            strength, L, *b = penalty
            if not isinstance(L, LinearOperator) or L.domain != domain:
                raise SpaceMismatchError(
                    f"expected penalties (λ, L) or (λ, L, b) with operators L on {domain}, got {type(L).__name__}"
                    f"{f' on {L.domain}' if isinstance(L, LinearOperator) else ''}: build L with al.linear_operator "
                    "on the domain of A"
                )
            found.append(Penalty(strength, L, *b))
            found[-1].check(batch)
        return found

    def check(self, batch: tuple[int, ...]) -> None:
        """Raise unless λ is a number of 0 or more, or has one for each problem of the batch, and b is of its sizes."""
        value = self.strength
        if not isinstance(value, Tensor):
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
                raise ValueError(f"expected λ to be a finite number of 0 or more, got {value!r}")
        elif not value.is_floating_point() or tuple(value.shape) not in {(), batch}:
            raise ValueError(
                f"expected λ to be a number, or a real tensor of the shape () or, one for each problem of the batch, "
                f"{batch}, got {value.dtype} of the shape {tuple(value.shape)}: reshape it, or build A and L with "
                "batch_dims"
            )
        elif not bool(((value >= 0) & (value < math.inf)).all()):
            raise ValueError(f"expected λ to be finite numbers of 0 or more, got {value.detach()}: take log λ to learn")
        if self.target is not None and self.target.leaves()[0].shape[: len(batch)] != batch:
            raise SpaceMismatchError(
                f"expected b of the batch sizes of the data, {batch}, got one of shape "
                f"{tuple(self.target.leaves()[0].shape)}: nothing is broadcast"
            )

    @property
    def b(self) -> Any:
        """The element that ``Lx`` is drawn to; None for zero."""
        return None if self.target is None else self.L.codomain.unflatten(self.target.leaves())

    def residual(self, x: Any) -> Any:
        """Return ``Lx − b``."""
        return self.L(x) if self.target is None else map_leaves(lambda a, b: a - b, self.L(x), self.b)

    def times(self, element: Any) -> Any:
        """Return ``λ · element``, problem by problem."""
        value = self.strength
        return map_leaves(lambda leaf: per_problem(value, leaf) * leaf, element)

    def weight(self, space: Space) -> LinearOperator:
        """Return the multiplication by λ on a space."""
        operator: LinearOperator = derived(
            self.times, self.times, space, space, lambda: (Penalty.weight, (self, operator.domain)), self,
            notation=Notation("λ I" if isinstance(self.strength, Tensor) else f"{number(self.strength)} I", PRODUCT),
        )  # fmt: skip
        operator.use_as_adjoint()
        return operator

    @property
    def hessian(self) -> LinearOperator:
        """The Hessian ``λ LᴴL``."""
        found: LinearOperator = self.weight(self.L.domain) @ self.L.gram
        return found


def per_problem(value: Any, leaf: Tensor) -> Any:
    """Return a scalar of every problem so that it multiplies a leaf of them all."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(leaf.device, leaf.dtype.to_real())
    return value.reshape(value.shape + (1,) * (leaf.ndim - value.ndim)) if value.ndim else value


def stacked(A: LinearOperator, penalties: Sequence[Penalty]) -> LinearOperator:
    """Return ``x ↦ (Ax, L₁x, …)``; A itself without penalties."""
    return vstack([A, *[penalty.L for penalty in penalties]]) if penalties else A


def stacked_weight(A: Operator[Any, Any], weight: Any, penalties: Sequence[Penalty]) -> Any:
    """Return ``diag(W, λ₁, …)``; W itself without penalties."""
    if not penalties:
        return weight
    first = identity(A.codomain) if weight is None else weight_operator(A, weight)
    return block_diag([first, *[penalty.weight(penalty.L.codomain) for penalty in penalties]])
