"""A pair of functions as each other's derivative: ``d(Ax)ᴴ = Aᴴ``, whether autograd can see through them or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adjointlab import compat
from adjointlab.numerics import UNITS, allowance, eps_of, relative_gap

Tensors = tuple[Tensor, ...]
Leaves = Callable[[Tensors], Tensors]


class Linked:
    """``x ↦ f(x)`` on leaves, with the derivative ``v ↦ fᴴ(v)`` where autograd does not find that by itself."""

    def __init__(self, forward: Leaves, backward: Leaves, batch_dims: int = 0) -> None:
        self.forward, self.backward, self.batch_dims = forward, backward, batch_dims
        self.visible: bool | None = None  # not known before a derivative is asked for
        self.sees_others = False  # whether autograd was found to see other tensors of f than x, such as parameters

    def __call__(self, x: Tensors) -> Tensors:
        """Return the leaves of ``f(x)``; what autograd sees of other tensors in f, such as parameters, remains."""
        if torch.compiler.is_compiling() or not compat.differentiated(x):
            return self.forward(x)
        if self.visible is None and not compat.is_traced():
            with compat.outside_transforms():
                self.visible = self._is_visible(x)
        if self.visible is not False:
            return self.forward(x)
        compat.refuse_tracing()
        if compat.is_transformed() and not self.sees_others:
            found: Tensors = _opaque(self, *x)
            if not self.sees_others:
                return found
        at_x = self.forward(tuple([leaf.detach() for leaf in x]))
        if compat.plain() and not compat.is_forward_mode() and not any(leaf.requires_grad for leaf in at_x):
            found = _eager(self, at_x, *x)
        else:
            found = _linked(self.forward, self.backward, len(at_x), *at_x, *x)
        return found

    def _is_visible(self, x: Tensors) -> bool:
        """Return whether autograd's derivative of f is the adjoint, and the derivative of that is f, on random numbers.

        The backward that somebody wrote for f, through NumPy, say, need not itself be differentiable.
        """
        draw = torch.Generator().manual_seed(0)
        z = _random_like(x, draw)
        try:
            with torch.enable_grad():
                probe = tuple([torch.zeros_like(leaf).requires_grad_() for leaf in z])
                at_zero = self.forward(probe)
                v = tuple([leaf.requires_grad_() for leaf in _random_like(at_zero, draw)])
                back = pulled_back(at_zero, probe, v, create=True)
                forth = pulled_back(back, v, z, create=True)
        except (RuntimeError, NotImplementedError):  # it says that it is not differentiable
            return False
        with torch.no_grad():
            expected, image = self.backward(v), self.forward(z)
        image = tuple(a - b.detach() for a, b in zip(image, at_zero, strict=True))
        bound = allowance(UNITS, eps_of((*image, *expected)))
        return max(relative_gap(expected, back), relative_gap(image, forth)) <= bound


def _random_like(leaves: Tensors, draw: torch.Generator) -> Tensors:
    return tuple([torch.randn(t.shape, dtype=t.dtype, generator=draw, device="cpu").to(t.device) for t in leaves])


def pulled_back(
    outputs: Tensors, inputs: Tensors, cotangents: Tensors, *, create: bool = False, retain: bool = True
) -> Tensors:
    """Return autograd's pull-back, zero where an output does not depend on an input.

    A graph of the derivative itself is recorded to ``create``; that of the outputs is kept to ``retain``.
    """
    pairs = [(t, w) for t, w in zip(outputs, cotangents, strict=True) if t.requires_grad]
    found: Any = [None] * len(inputs)
    if pairs:
        tracked, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            tracked, inputs, given, create_graph=create, retain_graph=create or retain, allow_unused=True
        )
    return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True))


class _Linked(torch.autograd.Function):
    """``(y, x) ↦ y`` with the derivative ``v ↦ (v, fᴴ(v))``, where ``y = f(x)`` does not depend on x for autograd."""

    @staticmethod
    def forward(forward: Leaves, backward: Leaves, count: int, *tensors: Tensor) -> Tensors:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.functions, ctx.count = inputs[:2], inputs[2]
        ctx.save_for_forward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        of_y, of_x = ctx.needs_input_grad[3 : 3 + ctx.count], ctx.needs_input_grad[3 + ctx.count :]
        if any(of_y) and any(of_x) and torch.is_grad_enabled() and compat.plain():
            raise RuntimeError(
                "expected first derivatives of an operator that was given as a pair of functions, got a request for "
                "second ones: autograd sees parameters of the function, but not its argument; write it in torch"
            )
        rest = ctx.functions[1](cotangents) if any(of_x) else [None for _ in of_x]
        return None, None, None, *cotangents, *rest

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        moved = [torch.zeros_like(t) if d is None else d for d, t in zip(tangents[3:], ctx.saved_tensors, strict=True)]
        along = ctx.functions[0](tuple(moved[ctx.count :]))
        return tuple(a + b for a, b in zip(moved[: ctx.count], along, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: Any, forward: Leaves, backward: Leaves, count: int, *tensors: Tensor) -> Any:
        each = _batch_first(info.batch_size, in_dims[3:], tensors)
        found = _linked(_over_batch(forward), _over_batch(backward), count, *each)
        return found, (0,) * len(found)


def _batch_first(size: int, dims: Sequence[int | None], tensors: Tensors) -> Tensors:
    pairs = zip(tensors, dims, strict=True)
    return tuple([t.expand(size, *t.shape) if d is None else t.movedim(d, 0) for t, d in pairs])


def _over_batch(function: Leaves) -> Leaves:
    return lambda leaves: torch.func.vmap(lambda *one: function(one))(*leaves)


class _Eager(torch.autograd.Function):
    """``x ↦ y`` with the derivative ``v ↦ fᴴ(v)``, where ``y = f(x)``: in the old style, which costs a quarter."""

    @staticmethod
    def forward(ctx: Any, link: Linked, y: Tensors, *x: Tensor) -> Tensors:
        ctx.link = link
        return tuple([t.detach() for t in y])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return None, None, *ctx.link.backward(cotangents)


class _Opaque(torch.autograd.Function):
    """``x ↦ f(x)`` with the derivative ``v ↦ fᴴ(v)``, under ``torch.func``, whose tensors f need not understand."""

    @staticmethod
    def forward(link: Linked, *x: Tensor) -> Tensors:
        with torch.enable_grad():
            found = link.forward(x)
        link.sees_others = any(t.requires_grad for t in found)
        return tuple([t.detach() for t in found])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.link = inputs[0]
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return None, *ctx.link.backward(cotangents)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        pairs = zip(tangents[1:], ctx.saved_tensors, strict=True)
        return ctx.link(tuple([torch.zeros_like(t) if d is None else d for d, t in pairs]))

    @staticmethod
    def vmap(info: Any, in_dims: Any, link: Linked, *x: Tensor) -> Any:
        each = _batch_first(info.batch_size, in_dims[1:], x)
        if link.batch_dims:  # of which the first one takes all
            found = [t.unflatten(0, (info.batch_size, -1)) for t in link(tuple([t.flatten(0, 1) for t in each]))]
        else:
            found = [torch.stack(parts) for parts in zip(*[link(one) for one in zip(*each, strict=True)], strict=True)]
        return tuple(found), (0,) * len(found)


_linked: Any = _Linked.apply
_opaque: Any = _Opaque.apply
# Past the checks that Function.apply makes for functorch, which is known not to be at work.
_eager: Any = super(torch.autograd.Function, _Eager).apply
