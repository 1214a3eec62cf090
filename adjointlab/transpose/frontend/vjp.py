"""The eager reference: ``Aᴴv`` as the vector-Jacobian product of the forward, computed afresh at every call.

``torch.func.vjp`` comes first. It refuses some functions that ``torch.autograd.grad`` takes (old-style
``autograd.Function``, custom ops with ``register_autograd``, sparse CSR); the second is then the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjointlab.errors import NotDifferentiableError

Tensors = tuple[Tensor, ...]
Function = Callable[[Tensors], Tensors]
VJP = Callable[[Function, Tensors, Tensors], Tensors]


def vjp_by_func(function: Function, primals: Tensors, cotangents: Tensors) -> Tensors:
    """Return ``J(primals)ᴴ cotangents`` by ``torch.func.vjp``."""
    result: tuple[Any, ...] = torch.func.vjp(lambda *leaves: function(leaves), *primals)
    outputs, pull_back = result
    if len(cotangents) != len(outputs):
        raise RuntimeError(f"the forward returned {len(outputs)} tensors where it had returned {len(cotangents)}")
    return tuple(pull_back(tuple(cotangents)))


def vjp_by_grad(function: Function, primals: Tensors, cotangents: Tensors) -> Tensors:
    """Return ``J(primals)ᴴ cotangents`` by ``torch.autograd.grad``."""
    with torch.enable_grad():
        inputs = tuple(p.detach().requires_grad_() for p in primals)
        # A view of the leaf is handed over, since autograd forbids writing to a leaf in place.
        outputs = function(tuple(leaf.view_as(leaf) for leaf in inputs))
    attached = [(out, ct) for out, ct in zip(outputs, cotangents, strict=True) if out.requires_grad]
    if not attached:
        return tuple(torch.zeros_like(p) for p in primals)
    tracked, given = zip(*attached, strict=True)
    create = torch.is_grad_enabled()
    gradients = torch.autograd.grad(tracked, inputs, given, create_graph=create, allow_unused=True)
    return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(gradients, primals, strict=True))


def choose_vjp(function: Function, primals: Tensors, cotangents: Tensors) -> tuple[VJP, str, Tensors]:
    """Return the VJP that works for ``function``, why ``torch.func.vjp`` does not where that is so, and its result."""
    try:
        return vjp_by_func, "", vjp_by_func(function, primals, cotangents)
    except (RuntimeError, NotImplementedError) as refusal:
        try:
            result = vjp_by_grad(function, primals, cotangents)
        except (RuntimeError, NotImplementedError) as error:
            raise NotDifferentiableError(
                f"expected a map that autograd can differentiate, but it says: {first_line(error).rstrip('.')}; "
                "write that part with other ops, or as an autograd.Function"
            ) from refusal
        return vjp_by_grad, f"torch.func.vjp refuses it ({first_line(refusal)})", result


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, for use inside another message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
