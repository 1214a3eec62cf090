"""The user's function and the eager adjoint of it, on the leaves of elements: what all else is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjointlab.errors import SpaceMismatchError
from adjointlab.numerics import full_precision
from adjointlab.space import Space
from adjointlab.transpose.frontend import vjp
from adjointlab.transpose.frontend.vjp import first_line
from adjointlab.transpose.kernels.registry import channels_last
from adjointlab.transpose.runtime.program import plain
from adjointlab.transpose.sample import Sample, copies, gradients, room
from adjointlab.tree import tree_flatten

Tensors = tuple[Tensor, ...]


_WORTH = 1 << 12  # numbers; of smaller images, the plain sample is as quick


class Reference:
    """``f`` on a domain as the user wrote it, and ``f'ᴴ`` as autograd has it."""

    def __init__(self, function: Callable[..., Any], kwargs: dict[str, Any], domain: Space) -> None:
        self.callable, self.kwargs, self.domain = function, kwargs, domain
        self.structure: Any = None  # of what the function returned last
        self._vjp: tuple[vjp.VJP, str] | None = None

    @property
    def path(self) -> str:
        """Why the adjoint is not by ``torch.func.vjp``, where that is so."""
        return self._vjp[1] if self._vjp else ""

    def flat(self, leaves: Tensors) -> Tensors:
        """Return the leaves of ``f(x)``, calling the user's function itself."""
        leaves = copies(leaves)  # a forward may write to its input; the caller's is not its to write to
        x = self.domain.unflatten(leaves)
        output = self.callable(*x, **self.kwargs) if type(x) is tuple else self.callable(x, **self.kwargs)
        if isinstance(output, Tensor):
            self.structure = None
            return (output,)
        flat, self.structure = tree_flatten(output)
        for leaf in flat:
            if not isinstance(leaf, Tensor):
                raise SpaceMismatchError(
                    f"expected the forward to return a tensor or a pytree of tensors, got {type(leaf).__name__} "
                    f"({str(leaf)[:60]}): return tensors only"
                )
        if not flat:
            raise SpaceMismatchError("expected the forward to return at least one tensor, got an empty pytree")
        return tuple(flat)

    def called(self, leaves: Tensors) -> Tensors:
        """Return the leaves of ``f(x)``; what the function raises on an element of its claimed domain is a mismatch."""
        try:
            return self.flat(leaves)
        except SpaceMismatchError:
            raise
        except Exception as error:  # a third-party forward may raise anything
            raise SpaceMismatchError(
                f"expected the forward to take an element of {self.domain}, but it raised {type(error).__name__}: "
                f"{vjp.first_line(error)}; check the shape and dtype of the domain"
            ) from error

    def offset_free(self, leaves: Tensors) -> Tensors:
        """Return the leaves of ``f(x) − f(0)``."""
        zeros = tuple(torch.zeros_like(leaf) for leaf in leaves)
        return tuple(a - b for a, b in zip(self.flat(leaves), self.flat(zeros), strict=True))

    def adjoint(self, cotangents: Tensors) -> Tensors:
        """Return ``f'(0)ᴴ v`` by the plain eager vector-Jacobian product."""
        k = self.domain.batch_dims
        batch = cotangents[0].shape[:k]
        primals = tuple(torch.zeros((*batch, *s.shape[k:]), dtype=s.dtype, device=s.device) for s in self.domain.specs)
        if self._vjp is None:
            found, why, result = vjp.choose_vjp(self.flat, primals, tuple(c.detach() for c in cotangents))
            self._vjp = found, why
            if plain() and not torch.is_grad_enabled():
                return result
        return self._vjp[0](self.flat, primals, cotangents)

    @full_precision
    def sample(self, x: Tensors, v: Tensors, parameters: Tensors) -> Sample:
        """Evaluate ``f(x)`` and ``f'ᴴ v``, gradients in the parameters, and f far from zero."""
        at_x, found = self._learned(x, v, parameters)
        scale = room((*x, *at_x))
        at_far = self.called(tuple(scale * t for t in x))
        return Sample(x, at_x, v, self.adjoint(copies(v)), found, scale, at_far)

    @full_precision
    def quick_sample(self, x: Tensors, v: Tensors, parameters: Tensors) -> Sample | None:
        """Evaluate the same, but ``f'ᴴ v`` far from zero, in the order of memory that CPU kernels like if there is one.

        It takes a fraction of the time for a convolution of one channel. To agree with it is to agree with the
        function; to differ from it is not yet to be wrong, for what reads strides may be another function there.
        """
        primals = tuple(map(channels_last, x))
        same = all(a is b for a, b in zip(primals, x, strict=True))
        elsewhere = any(t.device.type != "cpu" for t in x)
        if self.domain.is_sharded or same or elsewhere or sum(t.numel() for t in x) < _WORTH:
            return None
        try:
            at_x, found = self._learned(x, v, parameters)
            scale = room((*x, *at_x))
            far = tuple(scale * t for t in primals)
            result: tuple[Any, ...] = torch.func.vjp(lambda *leaves: self.called(leaves), *far)
            at_far, pull_back = result
            return Sample(x, at_x, v, tuple(pull_back(copies(v))), found, scale, at_far, quick=True)
        except Exception:  # a third-party function may raise anything, of strides that it did not expect
            return None

    def _learned(self, x: Tensors, v: Tensors, parameters: Tensors) -> tuple[Tensors, Tensors | str]:
        """Return ``f(x)``, and the gradients of ``Re⟨f(x), v⟩`` in the parameters, or why there are none."""
        # Not far from zero, where what an offset adds to them would be lost.
        try:
            return gradients(self.called, x, copies(v), parameters)
        except RuntimeError as error:  # of a derivative in a parameter
            return self.called(x), first_line(error)


__all__ = ["Reference"]
