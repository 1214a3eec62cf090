"""The user's function and its eager adjoint, on the leaves of elements: what runs where there is no graph."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from adjointlab import compat
from adjointlab.errors import NotDifferentiableError, SpaceMismatchError, remedy_of
from adjointlab.modules import attributes_kept, modules_of
from adjointlab.space import Space
from adjointlab.transpose.frontend import vjp
from adjointlab.transpose.frontend.vjp import Tensors, applied, flatten_outputs

_REMEDIES = {  # by a word of a TypeError
    "missing": "pass fixed arguments in kwargs={…}",
    "unexpected keyword": "take it out of kwargs",
    "": "check the shape and dtype of the domain",
}


class Eager:
    """``f`` on a domain as the user wrote it, and ``f'ᴴ`` as autograd has it."""

    def __init__(self, function: Callable[..., Any], kwargs: dict[str, Any], domain: Space) -> None:
        self.callable, self.kwargs, self.domain = function, kwargs, domain
        self.modules = modules_of(function, kwargs)
        self.structure: Any = None  # of what the function returned last
        self.most = 0.0  # bytes that a pull-back may take which is kept from call to call
        self.is_shared = domain.is_sharded  # by processes: what one keeps and another does not is one call less there
        self._choice: vjp.Choice | None = None
        self._kept: vjp.Linearized | None = None

    def keeping(self, most: float) -> Eager:
        """Return the same function, which keeps its pull-back if that takes no more than so many bytes."""
        found = copy.copy(self)
        found.most, found._kept = most, None
        return found

    def calling(self, function: Callable[..., Any]) -> Eager:
        """Return the same for another function on the same domain."""
        found = copy.copy(self)
        found.callable, found._kept = function, None
        return found

    def on(self, domain: Space) -> Eager:
        """Return the same function on another size of the free dimensions."""
        if domain.batch_shape == self.domain.batch_shape:
            return self
        found = copy.copy(self)
        found.domain, found._kept = domain, None
        return found

    @property
    def path(self) -> str:
        """Why the adjoint is not by ``torch.func.vjp``, where that is so."""
        return self._choice.why if self._choice else ""

    @property
    def is_kept(self) -> bool:
        """Whether a pull-back is kept from call to call."""
        return self._kept is not None

    def flat(self, leaves: Tensors, *, copied: bool = True) -> Tensors:
        """Return the leaves of ``f(x)``, calling the user's function itself, which may write to its input."""
        x = self.domain.unflatten([leaf.clone() for leaf in leaves] if copied else leaves)
        flat, self.structure = flatten_outputs(applied(self.callable, x, self.kwargs))
        return flat

    def called(self, leaves: Tensors, *, copied: bool = True, times: int = 1) -> Tensors:
        """Return the leaves of ``f(x)``, leaving what modules hold as it was: one may calibrate itself at first.

        Of several calls in a row, the last is returned.
        """
        with attributes_kept(self.modules), self.explained():
            for _ in range(times - 1):
                self.tried(leaves)
            return self.tried(leaves, copied=copied)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Raise what the function raises on elements of its domain as a mismatch, with what to do."""
        try:
            yield
        except (SpaceMismatchError, NotDifferentiableError):
            raise
        except Exception as error:  # a third-party forward may raise anything
            words = str(error) if isinstance(error, TypeError) else ""
            remedy = next(said for word, said in _REMEDIES.items() if word in words)
            raise SpaceMismatchError(
                f"expected the forward to take an element of {self.domain}, but it raised {type(error).__name__}: "
                f"{vjp.first_line(error)}; {remedy_of(error, remedy)}"
            ) from error

    def tried(self, leaves: Tensors, *, copied: bool = True) -> Tensors:
        """Return the leaves of ``f(x)``, without recording gradients unless the function itself needs that."""
        try:
            with torch.no_grad():
                return self.flat(leaves, copied=copied)
        except SpaceMismatchError:
            raise
        except Exception as error:  # a third-party forward may raise anything
            refusal = error
        try:  # one that differentiates inside of itself
            with torch.enable_grad():
                return tuple(out.detach() for out in self.flat(leaves))
        except Exception:  # the first error is the one to tell
            raise refusal from None

    def once(self) -> None:
        """Run the function once, on random data."""
        self.tried(self.domain.leaves(self.domain.randn(torch.Generator().manual_seed(20))))

    def linear(self, leaves: Tensors) -> Tensors:
        """Return the leaves of ``f(x) − f(0)``."""
        zeros = tuple(torch.zeros_like(leaf) for leaf in leaves)
        return tuple(a - b for a, b in zip(self.flat(leaves), self.flat(zeros), strict=True))

    def compiled(self, options: dict[str, Any], *, affine: bool) -> dict[str, Callable[..., Tensors]]:
        """Return the functions of leaves through ``torch.compile``, for all sizes at once."""

        def function(*leaves: Tensor) -> Tensors:
            return self.flat(leaves)

        def linear(*leaves: Tensor) -> Tensors:
            return self.linear(leaves) if affine else self.flat(leaves)

        def adjoint(*cotangents: Tensor) -> Tensors:
            return self.adjoint(cotangents)

        return {f.__name__: torch.compile(f, **{"dynamic": True, **options}) for f in (function, linear, adjoint)}

    def linearized(self, leaves: Tensors, cotangents: Tensors) -> tuple[vjp.Linearized, Tensors]:
        """Return ``f`` at x, and what its pull-back makes of cotangents."""
        if self.most:
            with contextlib.suppress(*vjp.REFUSALS):
                found = vjp.measured(self.flat, leaves)
                return found, found.pull_back(cotangents)
        if self._choice is None:
            self._choice, found, result = vjp.choose(self.flat, leaves, tuple(c.detach() for c in cotangents))
            return found, result
        found = self._choice.linearize(self.flat, leaves)
        return found, found.pull_back(cotangents)

    def residual_and_gradient(
        self, require: Callable[[Tensors], None], x: Tensors, y: Tensors, weight: Tensors | None = None
    ) -> tuple[Tensors, Tensors] | None:
        """Return ``f(x) − y`` and ``f'ᴴ w ⊙ (f(x) − y)`` by one call of f and its pull-back; None where that cannot be.

        ``require`` raises on leaves of ``f(x)`` that are not in the codomain.
        """
        if self.is_shared:
            return None
        try:
            found = vjp.measured(self.flat, x)
        except vjp.REFUSALS:
            return None
        require(found.outputs)
        if torch.is_grad_enabled() and not found.is_alone:
            return None
        with torch.no_grad():
            residual = tuple(a.detach() - b for a, b in zip(found.outputs, y, strict=True))
            weighted = residual if weight is None else tuple(w * r for w, r in zip(weight, residual, strict=True))
            return residual, found.pull_back(weighted)

    def keep(self, found: vjp.Linearized | None) -> None:
        """Use a pull-back for all cotangents from now on, if it keeps no more than it may."""
        self._kept = found if found is not None and found.kept <= self.most else None

    def adjoint(self, cotangents: Tensors) -> Tensors:
        """Return ``f'(1)ᴴ v`` by the plain eager vector-Jacobian product: at zero, a function may do otherwise."""
        is_plain = compat.plain()
        if is_plain:  # torch's own derivative of as_strided reads from the start of the memory
            cotangents = tuple(c.clone() if c.storage_offset() else c for c in cotangents)
        may_keep = self.most and not self.is_shared and is_plain and not compat.differentiated(cotangents)
        kept = self._kept
        if may_keep and kept is not None and (kept.is_alone or not torch.is_grad_enabled()):
            return kept.pull_back(cotangents)
        k = self.domain.batch_dims
        batch = cotangents[0].shape[:k]
        primals = tuple(torch.ones((*batch, *s.shape[k:]), dtype=s.dtype, device=s.device) for s in self.domain.specs)
        if may_keep:
            found, result = self.linearized(primals, cotangents)
            self.keep(found)
            return result
        if torch.compiler.is_compiling():  # which takes no trials
            return vjp.vjp_by_func(self.flat, primals, cotangents)
        if self._choice is None:
            self._choice, _, result = vjp.choose(self.flat, primals, tuple(c.detach() for c in cotangents))
            if is_plain and not torch.is_grad_enabled():
                return result
        return self._choice.linearize(self.flat, primals, once=True).pull_back(cotangents)
