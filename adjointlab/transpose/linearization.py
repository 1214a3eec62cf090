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

from adjointlab.errors import SpaceMismatchError
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

    def _derived(self, batch: tuple[int, ...]) -> Derivation:
        if batch != self.callable.domain.batch_shape:
            raise SpaceMismatchError(
                f"expected elements of the batch size of the point, {self.callable.domain.batch_shape}, got {batch}: a "
                "Jacobian is one at each point; take J.at(x1) for a point x1 of that size"
            )
        return super()._derived(batch)

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
        moved = dict(zip(self.callable.sources, found.callable.sources, strict=True))

        def elsewhere(derivation: Derivation) -> Derivation:
            state = tuple(moved.get(source, source) for source in derivation.state)
            if derivation.user is None:
                return replace(derivation, state=state)
            user = derivation.user.calling(found.callable)
            return replace(derivation, state=state, user=user, eager=derivation.functions(user))

        found._derivations = OrderedDict({size: [*map(elsewhere, known)] for size, known in self._derivations.items()})
        found._judged, found._frozen = WeakKeyDictionary(), None
        return found
