"""The user's function and the eager adjoint of it, on the leaves of elements: what all else is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adjointlab.errors import SpaceMismatchError
from adjointlab.space import Space
from adjointlab.transpose import vjp
from adjointlab.transpose.kernels import channels_last
from adjointlab.transpose.program import plain
from adjointlab.transpose.sample import Sample, copies, gradients, room
from adjointlab.transpose.vjp import first_line
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

    def sample(self, x: Tensors, v: Tensors, parameters: Tensors) -> Sample:
        """Evaluate ``f(x)`` and ``f'ᴴ v``, and gradients in the parameters."""
        return self._sample(x, self.called(x), v, self.adjoint(copies(v)), parameters)

    def quick_sample(self, x: Tensors, v: Tensors, parameters: Tensors) -> Sample | None:
        """Evaluate ``f(x)`` and ``f'(x)ᴴ v`` for x in the order of memory that suits CPU kernels, if there is one.

        It takes a fraction of the time for a convolution of one channel. To agree with it is to agree with the
        function; to differ from it is not yet to be wrong, for what reads strides may be another function there.
        """
        primals = tuple(map(channels_last, x))
        same = all(a is b for a, b in zip(primals, x, strict=True))
        if self.domain.is_sharded or same or sum(t.numel() for t in x) < _WORTH:
            return None
        try:
            result: tuple[Any, ...] = torch.func.vjp(lambda *leaves: self.called(leaves), *primals)
            at_x, pull_back = result
            at_v = tuple(pull_back(copies(v)))
        except Exception:  # a third-party function may raise anything, of strides that it did not expect
            return None
        return self._sample(x, at_x, v, at_v, parameters, quick=True)

    def _sample(
        self, x: Tensors, at_x: Tensors, v: Tensors, at_v: Tensors, parameters: Tensors, *, quick: bool = False
    ) -> Sample:
        near = Sample(x, at_x, v, at_v, room(*x, *at_x), (), (), quick)
        found: Tensors | str
        try:
            at_far, found = gradients(self.called, *near.far, parameters)
        except RuntimeError as error:  # of a derivative in a parameter
            at_far, found = self.called(near.far[0]), first_line(error)
        return replace(near, at_far=tuple(t.detach() for t in at_far), gradients=found)


__all__ = ["Reference"]
