"""The eager reference: ``Aᴴv`` as the vector-Jacobian product of the forward, computed afresh at every call.

``torch.func.vjp`` comes first. It refuses some functions that ``torch.autograd.grad`` takes (old-style
``autograd.Function``, custom ops with ``register_autograd``, sparse CSR); the second is then the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjointlab import compat
from adjointlab.errors import NotDifferentiableError, SpaceMismatchError

Tensors = tuple[Tensor, ...]
Function = Callable[[Tensors], Tensors]
VJP = Callable[[Function, Tensors, Tensors], Tensors]
_REFUSALS = (RuntimeError, NotImplementedError, AssertionError)  # the last by torch.cond, scan and map


def vjp_by_func(function: Function, primals: Tensors, cotangents: Tensors) -> Tensors:
    """Return ``J(primals)ᴴ cotangents`` by ``torch.func.vjp``."""
    result: tuple[Any, ...] = torch.func.vjp(lambda *leaves: function(leaves), *primals)
    outputs, pull_back = result
    if len(cotangents) != len(outputs):
        raise RuntimeError(f"the forward returned {len(outputs)} tensors where it had returned {len(cotangents)}")
    return tuple(pull_back(tuple(cotangents)))


def vjp_by_grad(function: Function, primals: Tensors, cotangents: Tensors) -> Tensors:
    """Return ``J(primals)ᴴ cotangents`` by ``torch.autograd.grad``."""
    if torch.is_inference_mode_enabled():  # nothing would be recorded, and all gradients be zero
        with torch.inference_mode(False), torch.no_grad():
            return vjp_by_grad(function, tuple(p.clone() for p in primals), tuple(c.clone() for c in cotangents))
    with torch.enable_grad():
        inputs = tuple(p.detach().requires_grad_() for p in primals)
        # A view of the leaf is handed over, since autograd forbids writing to a leaf in place.
        outputs = function(tuple(leaf.view_as(leaf) for leaf in inputs))
    pairs = zip(outputs, _like(cotangents, outputs), strict=True)
    attached = [(out, ct) for out, ct in pairs if out.requires_grad]
    if not attached:
        return tuple(torch.zeros_like(p) for p in primals)
    tracked, given = zip(*attached, strict=True)
    create = torch.is_grad_enabled()
    gradients = torch.autograd.grad(tracked, inputs, given, create_graph=create, allow_unused=True)
    return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(gradients, primals, strict=True))


def _like(cotangents: Tensors, outputs: Tensors) -> Tensors:
    before, now = ([tuple(t.shape) for t in tensors] for tensors in (cotangents, outputs))
    if before != now:
        raise SpaceMismatchError(
            f"expected the function to return tensors of shapes {before}, as it did, but it returns {now}: build the "
            "operator anew"
        )
    return tuple(cotangents)


def choose_vjp(function: Function, primals: Tensors, cotangents: Tensors) -> tuple[VJP, str, Tensors]:
    """Return the VJP that works for ``function``, why ``torch.func.vjp`` does not where that is so, and its result."""
    try:
        result = vjp_by_func(function, primals, cotangents)
        if not compat.plain() or any(t.any() for t in result):
            return vjp_by_func, "", result
        # Of what runs in another thread, torch.func sees nothing.
        result = vjp_by_grad(function, primals, cotangents)
        seen = any(t.any() for t in result)
        return (vjp_by_grad, "torch.func.vjp does not see it", result) if seen else (vjp_by_func, "", result)
    except _REFUSALS as refusal:
        try:
            result = vjp_by_grad(function, primals, cotangents)
        except _REFUSALS as error:
            raise NotDifferentiableError(
                f"expected a map that autograd can differentiate, but it says: {first_line(error).rstrip('.')}; "
                "write that part with other ops, or as an autograd.Function"
            ) from refusal
        return vjp_by_grad, f"torch.func.vjp refuses it ({first_line(refusal)})", result


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, for use inside another message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
