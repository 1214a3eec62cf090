"""A linear (or affine) function between two spaces with its derived adjoint, and the way of every call of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adjointlab import compat, modules
from adjointlab.space.codomain import require_outputs
from adjointlab.transpose.derivations import STAND_IN, Derivations
from adjointlab.transpose.explanation import Explanation
from adjointlab.transpose.frontend.selected import Selected
from adjointlab.transpose.frontend.vjp import Tensors
from adjointlab.transpose.passes.entries import entries
from adjointlab.transpose.passes.rows import NotByIndexError, Rows
from adjointlab.transpose.runtime.derivation import Derivation
from adjointlab.transpose.runtime.program import canonical
from adjointlab.tree import SINGLE

__all__ = ["STAND_IN", "Transposition"]

_is_compiling = torch.compiler.is_compiling


def _has_stand_in() -> bool:
    return not _is_compiling() and STAND_IN.get() is not None


class Transposition(Derivations):
    """``f`` between two spaces and ``v ↦ f'ᴴ v``, each by the derivation that fits the size and state of a call."""

    def function(self, x: Any) -> Any:
        """Return ``f(x)``."""
        return self._call("function", x)

    def linear(self, x: Any) -> Any:
        """Return ``f(x) − f(0)``."""
        return self._call("linear", x)

    def adjoint(self, v: Any) -> Any:
        """Return ``f'ᴴ v``."""
        return self._call("adjoint", v)

    def _call(self, name: str, x: Any) -> Any:
        if self.domain.is_autocast:  # spaces have dtypes, and keep them
            with self.domain.without_autocast():
                return self._call(name, x)
        codomain = self.codomain
        source, target = (codomain, self.domain) if name == "adjoint" else (self.domain, codomain)
        leaves = source.leaves(x)
        derivation, state = self._current(leaves)
        found = derivation.run(name, state, leaves)
        if derivation.user is not None and name != "adjoint":
            require_outputs(found, derivation.user.structure, codomain)
        return target.unflatten(found)

    def _current(self, leaves: Tensors) -> tuple[Derivation, Tensors]:
        return self.now(tuple(leaves[0].shape[: self.domain.batch_dims]) if self.domain.batch_dims else ())

    def now(self, batch: tuple[int, ...]) -> tuple[Derivation, Tensors]:
        """Return the derivation for a size of the free dimensions, and the values of its state, as they are now."""
        derivation, state = self._at(batch)
        if derivation.user is not None:
            modules.require_own(self._registered)
        return derivation, state

    def residual_and_gradient(self, x: Any, y: Any, weight: Any, *, residual: bool) -> tuple[Any, Any] | None:
        """Return ``f(x) − y`` if asked for, and ``f'ᴴ w ⊙ (f(x) − y)``, from one graph; None where none is to run."""
        if self.domain.is_autocast:
            with self.domain.without_autocast():
                return self.residual_and_gradient(x, y, weight, residual=residual)
        codomain = self.codomain
        given = [self.domain.leaves(x), codomain.leaves(y), *([] if weight is None else [codomain.leaves(weight)])]
        leaves = tuple(t for part in given for t in part)
        k = self.domain.batch_dims
        if any(t.shape[:k] != leaves[0].shape[:k] for t in leaves) or not (compat.plain() or _has_stand_in()):
            return None  # for the parts to refuse, one after the other
        derivation, state = self._current(given[0])
        if derivation.of_storage or compat.differentiated((*leaves, *state)):
            return None
        if (user := derivation.user) is not None:
            parts = user.residual_and_gradient(lambda found: require_outputs(found, user.structure, codomain), *given)
            return None if parts is None else (codomain.unflatten(parts[0]), self.domain.unflatten(parts[1]))
        program = derivation.gradient(weight is not None, residual)
        if program is None:
            return None
        outputs = program.run(*state, *map(canonical, leaves))
        n = len(codomain.specs) if residual else 0
        return codomain.unflatten(outputs[:n]) if residual else None, self.domain.unflatten(outputs[n:])

    def gram(self, x: Any, weight: Any, *, swapped: bool) -> Any:
        """Return ``f'ᴴ w ⊙ f' x`` (``swapped``: ``f' w ⊙ f'ᴴ x``) from one simplified graph; None where none serves."""
        if self.domain.is_autocast:
            with self.domain.without_autocast():
                return self.gram(x, weight, swapped=swapped)
        spaces = (self.domain, self.codomain)[:: -1 if swapped else 1]
        leaves = (*spaces[0].leaves(x), *([] if weight is None else spaces[1].leaves(weight)))
        k = self.domain.batch_dims
        if any(t.shape[:k] != leaves[0].shape[:k] for t in leaves) or not compat.plain() or _is_compiling():
            return None
        derivation, state = self._current(leaves)
        if not derivation.programs or derivation.of_storage or compat.differentiated((*leaves, *state)):
            return None
        found = derivation.gram(swapped, weight is not None)
        outputs = None if found is None else found.program.run_if_prepared(*state, *map(canonical, leaves))
        return None if outputs is None else spaces[0].unflatten(outputs)

    def gram_simplified(self, *, swapped: bool, weighted: bool) -> tuple[str, ...]:
        """Return the names of the simplifications in the gram of the nominal size."""
        found = self._at(self.domain.batch_shape)[0].gram(swapped, weighted)
        return () if found is None else found.simplified

    def adjoint_multiplier(self) -> Tensor | None:
        """Return ``K`` with ``f'ᴴ v = F⁻¹(K ⊙ F v)`` where that is how ``f'ᴴ`` is computed, else None."""
        codomain = self.codomain
        if not (self.domain.structure is SINGLE and codomain.structure is SINGLE) or self.domain.is_sharded:
            return None
        derivation, state = self._at(self.domain.batch_shape)
        with torch.no_grad():
            return derivation.multiplier(state)

    def entries(self, batch: tuple[int, ...], most: int) -> list[Rows]:
        """Return the linear part as sparse matrices, one for each output; raise ``NotByIndexError`` if there are none.

        Each has at most so many entries, and is the same for every place of the batch.
        """
        derivation, state = self._at(batch)
        graph = derivation.graphs.get("linear")
        if graph is None or len(self.domain.specs) > 1:
            raise NotByIndexError("there is no graph, or more than one input")
        spec = self.domain.with_batch(batch).specs[0]
        like = torch.empty(spec.shape, dtype=spec.dtype, device=spec.device)
        return entries(graph, state, like, self.domain.batch_dims, most)

    @property
    def explanation(self) -> Explanation:
        """How the nominal size is served."""
        explanation, user = self.nominal.explanation, self.nominal.user
        if self._repeats not in explanation.reason:
            explanation = replace(explanation, repeats=self._repeats)
        if isinstance(self.callable, Selected):
            explanation = replace(explanation, selected=str(self.callable))
        return explanation if user is None else replace(explanation, path=user.path, is_kept=user.is_kept)

    def account(self, letter: str = "A", *, adjoint: bool) -> str:
        """Return in words how A or Aᴴ is computed, and how Aᴴ was derived."""
        return self.explanation.account(adjoint=adjoint, letter=letter)
