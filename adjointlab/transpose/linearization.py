"""A function linearized at a point: the pull-back ``v ↦ J(x₀)ᴴ v``, its adjoint J, and the way to other points."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from adjointlab import compat
from adjointlab.errors import NotDifferentiableError, SpaceMismatchError
from adjointlab.modules import read_all
from adjointlab.space import Space
from adjointlab.space.algebra import moved
from adjointlab.transpose.dispatch import Transposition
from adjointlab.transpose.frontend.vjp import PullBack, Tensors
from adjointlab.transpose.options import Options
from adjointlab.transpose.runtime.derivation import Derivation


class Linearization(Transposition):
    """A pull-back with its adjoint J, as a transposition of its own."""

    callable: PullBack

    def __init__(self, pull_back: PullBack, codomain: Space, options: Options, judge: Callable[..., None]) -> None:
        super().__init__(pull_back, codomain, options=options, judge=judge)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Derive afresh where a function moves the point to another dtype or device."""
        if moved(self.domain, fn).specs != self.domain.specs:
            self.callable = self.callable.moved(fn)
        super().move(fn)

    def value(self) -> Any:
        """Return ``f(x₀)``."""
        derivation, state = self._at(self.domain.batch_shape)
        if derivation.residuals is None:
            return self.domain.unflatten(self.callable.value(self.callable.point)[0])
        leaves = derivation.residuals.value(state)
        return self.domain.unflatten([leaf.clone() for leaf in leaves])  # results may be written to

    def _at(self, batch: tuple[int, ...]) -> tuple[Derivation, Tensors]:
        found = super()._at(batch)
        if found[0].user is not None and any(map(compat.is_wrapped, self.callable.point)):
            raise NotDifferentiableError(
                "expected a graph of f for a Jacobian at a point inside of a transform of torch.func, which does not "
                f"see the point in autograd's pull-back, but {found[0].explanation.reason}: use torch.autograd there"
            )
        return found

    def _derived(self, batch: tuple[int, ...]) -> Derivation:
        if batch != self.callable.domain.batch_shape:
            raise SpaceMismatchError(
                f"expected elements of the batch size of the point, {self.callable.domain.batch_shape}, got {batch}: a "
                "Jacobian is one at each point; take J.at(x1) for a point x1 of that size"
            )
        # As of a point that requires gradients, which a later one may: nothing is to be derived again for that.
        plain, eager = self.callable, self.eager
        tracked = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in plain.point]
        self.callable = plain.at(tuple(tracked))
        self.eager = eager.calling(self.callable)
        try:
            found = super()._derived(batch)
            derivation = _elsewhere(found, self.callable, plain)
            if found.residuals is not None:
                found.residuals.forget()  # those of a point that is not met again
        finally:
            eager.structure, self.callable, self.eager = self.eager.structure, plain, eager
        if found in self._judged:
            self._judged[derivation] = self._judged[found]
        return derivation

    def account(self, letter: str = "A", *, adjoint: bool) -> str:
        """Return in words how J, the adjoint of the pull-back, is computed, or how the pull-back is."""
        residuals = self.nominal.residuals
        explanation = replace(self.explanation, programs=self.explanation.programs and self.explanation.programs[::-1])
        lines = [explanation.account(adjoint=not adjoint, letter=letter)]
        if residuals is not None:
            found = residuals(read_all(self.nominal.state))
            size = sum(memory.nbytes() for memory in {t.data_ptr(): t.untyped_storage() for t in found}.values())
            lines.append(f"kept at the point, for both: {size:,} B in {len(found)} residuals")
        return "\n".join(lines)

    def at(self, point: Tensors) -> Linearization:
        """Return the same at another point: nothing is derived again."""
        found = copy.copy(self)
        found.callable = self.callable.at(point)
        if any(derivation.has_checks for known in self._derivations.values() for derivation in known):
            with torch.no_grad():
                found.callable.value(point)  # raises where the function does
        found.eager = self.eager.calling(found.callable)
        found._derivations = OrderedDict(
            (size, [_elsewhere(derivation, self.callable, found.callable) for derivation in known])
            for size, known in self._derivations.items()
        )
        found._judged, found._frozen = WeakKeyDictionary(), None
        return found


def _elsewhere(derivation: Derivation, here: PullBack, there: PullBack) -> Derivation:
    """Return a derivation of a pull-back for the pull-back of the same function at another point."""
    moved = dict(zip(here.sources, there.sources, strict=True))
    state = tuple(moved.get(source, source) for source in derivation.state)
    if derivation.user is None:
        return replace(derivation, state=state)
    user = derivation.user.calling(there)
    return replace(derivation, state=state, user=user, eager=derivation.functions(user))
