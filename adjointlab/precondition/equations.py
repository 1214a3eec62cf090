"""The equations of least squares, ``N = AᴴWA + damp²``, and what preconditioners are made with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from adjointlab import blocks
from adjointlab.affine import AffineOperator, Operator, require_operator
from adjointlab.notation import Notation
from adjointlab.operators import LinearOperator, derived
from adjointlab.precondition.columns import Leaves, probed_norms, squared_norms
from adjointlab.space import Space
from adjointlab.space.algebra import require_plain
from adjointlab.terms import weight_operator

_LEAST = 1e-3  # of the largest norm, below which one that is probed may be an error


class Equations:
    """``N = AᴴWA + damp²`` on leaves."""

    def __init__(
        self, A: Operator[Any, Any], weight: Any, damp: float | Tensor, batch: tuple[int, ...] | None = None
    ) -> None:
        require_operator(A)
        self.A: LinearOperator = A.linear if isinstance(A, AffineOperator) else A
        for space in (self.A.domain, self.A.codomain):
            require_plain(space, "a preconditioner", sharded=True)
        self.weight = None if weight is None else weight_operator(self.A, weight)
        entries = None if self.weight is None else blocks.diagonal_entries(self.weight)
        damping = torch.as_tensor(damp, dtype=torch.float64, device=A.domain.specs[0].device).detach()
        if not bool(((damping >= 0) & (damping < math.inf)).all()):
            raise ValueError(f"expected damp to be finite and 0 or more, got {damping}: take its absolute")
        self.square = damping.square()
        if batch is None and entries is not None:
            batch = tuple(A.codomain.leaves(entries)[0].shape[: A.codomain.batch_dims])
        elif batch is None:
            batch = tuple(self.square.shape) if self.square.ndim else A.domain.batch_shape
        self.space = self.A.domain.with_batch(batch[: A.domain.batch_dims])
        batch = self.space.batch_shape
        if self.square.shape not in {(), batch}:
            raise ValueError(
                f"expected damp to be a number or, one for each problem of the batch, a tensor of the shape {batch}, "
                f"got the shape {tuple(self.square.shape)}"
            )

    def __call__(self, leaves: Leaves) -> Leaves:
        """Return the product with N."""
        with torch.no_grad(), self.space.without_autocast():
            y = self.A(self.space.unflatten(leaves))
            image = self.space.leaves(self.A.H(y if self.weight is None else self.weight(y)))
            return tuple(a + self.damping(b) * b for a, b in zip(image, leaves, strict=True))

    def damping(self, leaf: Tensor) -> Tensor:
        """Return ``damp²`` as a factor of a leaf."""
        square = self.square.to(leaf.device, leaf.real.dtype)
        return square.reshape(square.shape + (1,) * (leaf.ndim - square.ndim)) if square.ndim else square

    def diagonal(self, samples: int, generator: torch.Generator) -> tuple[list[Tensor], float]:
        """Return the diagonal of N, positive, and its relative error."""
        weight = None if self.weight is None else blocks.diagonal_entries(self.weight)
        exact = squared_norms(self.A, weight, self.space) if self.weight is None or weight is not None else None
        if exact is not None:
            exact = exact + self.damping(exact)
            return [torch.where(exact > 0, exact, exact.amax() if bool((exact > 0).any()) else 1.0)], 0.0
        found, error = probed_norms(self, self.space, samples, generator)
        largest = max(float(d.amax()) for d in found)
        return [d.clamp_min(_LEAST * largest if largest > 0 else 1.0) for d in found], error


def of_module(module: nn.Module, space: Space) -> LinearOperator:
    """Return the self-adjoint operator of a module on leaves."""
    operator: LinearOperator

    def apply(x: Any) -> Any:
        return operator.domain.unflatten(module(operator.domain.leaves(x)))

    operator = derived(
        apply, apply, space, space, lambda: (of_module, (module, operator.domain)), module,
        notation=Notation(meaning=f"a preconditioner on {space}"),
    )  # fmt: skip
    operator.use_as_adjoint()
    return operator


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """Return a generator, one with a seed if none is given."""
    return generator or torch.Generator().manual_seed(0)


def positive(name: str, value: int) -> int:
    """Return a count; raise if it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"expected {name} to be an integer of 1 or more, got {value!r}")
    return value
