"""The equations of least squares, ``N = AᴴWA + damp²``, and what preconditioners are made with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adjointlab import blocks
from adjointlab.affine import AffineOperator, Operator, require_operator
from adjointlab.errors import SpaceMismatchError
from adjointlab.notation import Notation
from adjointlab.operators import LinearOperator, derived, self_adjoint
from adjointlab.precondition.columns import Leaves, probed_norms, squared_norms
from adjointlab.space import Space
from adjointlab.terms import weight_operator
from adjointlab.weighted import weighing, without_weights

_LEAST = 1e-3  # of the largest norm, below which one that is probed may be an error


class Equations:
    """``N = AᴴWA + damp²`` on leaves; where spaces have weights, in ``u = W_X^½ x``, so that N is as without them."""

    def __init__(
        self, A: Operator[Any, Any], weight: Any, damp: float | Tensor, batch: tuple[int, ...] | None = None
    ) -> None:
        require_operator(A)
        A = A.linear if isinstance(A, AffineOperator) else A
        self.roots = _roots(A.domain)
        self.A: LinearOperator = without_weights(A)
        damping = torch.as_tensor(damp, dtype=torch.float64, device=A.domain.specs[0].device).detach()
        if not bool(((damping >= 0) & (damping < math.inf)).all()):
            raise ValueError(f"expected damp to be finite and 0 or more, got {damping}: take its absolute")
        self.square = damping.square()
        sizes = batch or tuple(self.square.shape) or None  # of a weight that has no entries
        given = None if weight is None else without_weights(weight_operator(A, weight, sizes))
        entries = None if given is None else blocks.diagonal_entries(given)
        if batch is None and entries is not None:
            batch = tuple(A.codomain.leaves(entries)[0].shape[: A.codomain.batch_dims])
        elif batch is None:
            batch = tuple(self.square.shape) if self.square.ndim else A.domain.batch_shape
        self.domain = A.domain.with_batch(batch[: A.domain.batch_dims])
        self.space = self.domain.plain
        batch = self.space.batch_shape
        if self.square.shape not in {(), batch}:
            raise ValueError(
                f"expected damp to be a number or, one for each problem of the batch, a tensor of the shape {batch}, "
                f"got the shape {tuple(self.square.shape)}"
            )
        self.weight, own = given, A.codomain.weight
        self.is_diagonal = (given is None or entries is not None) and (own is None or own.is_diagonal)
        self.entries = entries
        if own is not None:
            self.weight = weighing(A.codomain) if given is None else weighing(A.codomain) @ given
            if self.is_diagonal:
                codomain = A.codomain.with_batch(batch)
                ones = [torch.ones(s.shape, dtype=s.dtype, device=s.device) for s in codomain.specs]
                self.entries = codomain.weigh(codomain.unflatten(ones) if entries is None else entries)

    def __call__(self, leaves: Leaves) -> Leaves:
        """Return the product with N."""
        with torch.no_grad(), self.space.without_autocast():
            y = self.A(self.space.unflatten(_each(torch.div, leaves, self.roots)))
            image = self.space.leaves(self.A.H(y if self.weight is None else self.weight(y)))
            pairs = zip(_each(torch.div, image, self.roots), leaves, strict=True)
            return tuple(a + self.damping(b) * b for a, b in pairs)

    def preconditioner(self, module: nn.Module) -> LinearOperator:
        """Return the self-adjoint operator on the domain of A of a module on leaves, which is about ``N⁻¹``."""
        return of_module(module if self.roots is None else _Between(module, self.roots), self.domain)

    def divided(self, entries: Sequence[Tensor]) -> LinearOperator:
        """Return the division by entries, such as those of the diagonal of N."""
        pairs = zip(entries, self.space.specs, strict=True)
        return blocks.diagonal(self.space.unflatten([(1 / d).to(spec.dtype) for d, spec in pairs]), self.domain)

    def damping(self, leaf: Tensor) -> Tensor:
        """Return ``damp²`` as a factor of a leaf."""
        square = self.square.to(leaf.device, leaf.real.dtype)
        return square.reshape(square.shape + (1,) * (leaf.ndim - square.ndim)) if square.ndim else square

    def diagonal(self, samples: int, generator: torch.Generator) -> tuple[list[Tensor], float]:
        """Return the diagonal of N, positive, and its relative error."""
        exact = squared_norms(self.A, self.entries, self.space) if self.is_diagonal else None
        if exact is not None:
            exact = exact if self.roots is None else exact / self.roots[0].double().square()
            exact = exact + self.damping(exact)
            return [torch.where(exact > 0, exact, exact.amax() if bool((exact > 0).any()) else 1.0)], 0.0
        found, error = probed_norms(self, self.space, samples, generator)
        largest = max(float(d.amax()) for d in found)
        return [d.clamp_min(_LEAST * largest if largest > 0 else 1.0) for d in found], error


class _Between(nn.Module):
    """``x ↦ r⁻¹ M(r x)`` on leaves: in x what M is in ``u = r x``."""

    def __init__(self, module: nn.Module, roots: Sequence[Tensor]) -> None:
        super().__init__()
        self.module = module
        for index, root in enumerate(roots):
            self.register_buffer(f"root_{index}", root)

    def forward(self, leaves: Leaves) -> Sequence[Tensor]:
        roots = list(self._buffers.values())
        return _each(torch.div, self.module(tuple(_each(torch.mul, leaves, roots))), roots)


def _each(
    operation: Callable[[Tensor, Tensor], Tensor], leaves: Sequence[Tensor], roots: Sequence[Any] | None
) -> Sequence[Tensor]:
    return leaves if roots is None else [operation(a, r) for a, r in zip(leaves, roots, strict=True)]


def _roots(space: Space) -> list[Tensor] | None:
    """Return the roots of the numbers that are the weight of a space; None without one."""
    if space.weight is None:
        return None
    if not space.weight.is_diagonal:
        raise SpaceMismatchError(
            f"expected a preconditioner for a domain whose weight is numbers, got {space}, whose weight is an operator"
            ": give M as a function, self-adjoint in the domain"
        )
    return [w.sqrt() for w in space.weight.entries]


def of_module(module: nn.Module, space: Space) -> LinearOperator:
    """Return the self-adjoint operator of a module on leaves."""
    operator: LinearOperator

    def apply(x: Any) -> Any:
        return operator.domain.unflatten(module(operator.domain.leaves(x)))

    operator = derived(
        apply, apply, space, space, lambda: (of_module, (module, operator.domain)), module,
        notation=Notation(meaning=f"a preconditioner on {space}"),
    )  # fmt: skip
    return self_adjoint(operator)


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """Return a generator, one with a seed if none is given."""
    return generator or torch.Generator().manual_seed(0)


def positive(name: str, value: int) -> int:
    """Return a count; raise if it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"expected {name} to be an integer of 1 or more, got {value!r}")
    return value
