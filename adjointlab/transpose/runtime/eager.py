"""The user's function and its eager adjoint, on the leaves of elements: what runs where there is no graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from adjointlab import compat
from adjointlab.errors import SpaceMismatchError
from adjointlab.modules import attributes_kept, modules_of
from adjointlab.space import Space
from adjointlab.transpose.frontend import vjp
from adjointlab.transpose.frontend.capture import Tensors, flatten_outputs


class Eager:
    """``f`` on a domain as the user wrote it, and ``f'ᴴ`` as autograd has it."""

    def __init__(self, function: Callable[..., Any], kwargs: dict[str, Any], domain: Space) -> None:
        self.callable, self.kwargs, self.domain = function, kwargs, domain
        self.modules = modules_of(function, kwargs)
        self.structure: Any = None  # of what the function returned last
        self._vjp: tuple[vjp.VJP, str] | None = None

    def on(self, domain: Space) -> Eager:
        """Return the same function on another size of the free dimensions."""
        if domain.batch_shape == self.domain.batch_shape:
            return self
        found = Eager(self.callable, self.kwargs, domain)
        found.structure = self.structure
        return found

    @property
    def path(self) -> str:
        """Why the adjoint is not by ``torch.func.vjp``, where that is so."""
        return self._vjp[1] if self._vjp else ""

    def flat(self, leaves: Tensors, *, copied: bool = True) -> Tensors:
        """Return the leaves of ``f(x)``, calling the user's function itself, which may write to its input."""
        x = self.domain.unflatten([leaf.clone() for leaf in leaves] if copied else leaves)
        output = self.callable(*x, **self.kwargs) if type(x) is tuple else self.callable(x, **self.kwargs)
        flat, self.structure = flatten_outputs(output)
        return flat

    def called(self, leaves: Tensors, *, copied: bool = True, times: int = 1) -> Tensors:
        """Return the leaves of ``f(x)``, leaving what modules hold as it was: one may calibrate itself at first.

        Of several calls in a row, the last is returned. An error that the function raises on an element of its claimed
        domain is a mismatch.
        """
        try:
            with attributes_kept(self.modules):
                for _ in range(times - 1):
                    self.tried(leaves)
                return self.tried(leaves, copied=copied)
        except SpaceMismatchError:
            raise
        except Exception as error:  # a third-party forward may raise anything
            raise SpaceMismatchError(
                f"expected the forward to take an element of {self.domain}, but it raised {type(error).__name__}: "
                f"{vjp.first_line(error)}; check the shape and dtype of the domain"
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

    def adjoint(self, cotangents: Tensors) -> Tensors:
        """Return ``f'(1)ᴴ v`` by the plain eager vector-Jacobian product: at zero, a function may do otherwise."""
        if compat.plain():  # torch's own derivative of as_strided reads from the start of the memory
            cotangents = tuple(c.clone() if c.storage_offset() else c for c in cotangents)
        k = self.domain.batch_dims
        batch = cotangents[0].shape[:k]
        primals = tuple(torch.ones((*batch, *s.shape[k:]), dtype=s.dtype, device=s.device) for s in self.domain.specs)
        if self._vjp is None:
            found, why, result = vjp.choose_vjp(self.flat, primals, tuple(c.detach() for c in cotangents))
            self._vjp = found, why
            if compat.plain() and not torch.is_grad_enabled():
                return result
        return self._vjp[0](self.flat, primals, cotangents)
