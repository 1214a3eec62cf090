"""Random data on which a derived program is compared with the eager reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adjointlab.numerics import norm
from adjointlab.space import Space

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sample:
    """What the eager reference makes of random x and v: ``f(x)`` and ``f'ᴴv``, and what it is far from zero."""

    x: Tensors
    at_x: Tensors
    v: Tensors
    at_v: Tensors
    gradients: Tensors | str  # of Re⟨f(x), v⟩ in the parameters, or why there are none
    scale: float
    at_far: Tensors  # f(scale · x)
    quick: bool = False  # by Reference.quick_sample


def copies(leaves: Tensors) -> Tensors:
    """Return copies that may be written to."""
    return tuple(t.clone() for t in leaves)


def eps(leaves: Tensors) -> float:
    """Return the unit roundoff of the coarsest leaf."""
    return max(float(torch.finfo(t.dtype).eps) for t in leaves)


def room(leaves: Tensors) -> float:
    """Return a power of two that leaves can be scaled with: as far as there is room for."""
    return 2.0**20 if min(float(torch.finfo(t.dtype).max) for t in leaves) > 1e30 else 2.0**6


def gradients(
    function: Callable[[Tensors], Tensors], x: Tensors, v: Tensors, parameters: Tensors
) -> tuple[Tensors, Tensors]:
    """Return ``f(x)``, and the gradients of ``Re⟨f(x), v⟩`` in the parameters, zero where it does not depend on one."""
    if not parameters:
        return function(x), ()
    with torch.enable_grad():
        outputs = function(x)
        pairs = [(o, t) for o, t in zip(outputs, v, strict=True) if o.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(parameters)
        if pairs:
            tracked, cotangents = zip(*pairs, strict=True)
            # Parameters may be made from others in a graph that is the user's, who still needs it.
            found = torch.autograd.grad(tracked, parameters, cotangents, allow_unused=True, retain_graph=True)
    filled = tuple(torch.zeros_like(t) if g is None else g for g, t in zip(found, parameters, strict=True))
    return tuple(o.detach() for o in outputs), filled


def nudged(leaves: Tensors) -> Tensors:
    """Return the leaves changed at random by one unit of rounding."""
    draw = torch.Generator().manual_seed(1)
    return tuple(t * (1 + eps(leaves) * torch.randn(t.shape, generator=draw, device="cpu").to(t)) for t in leaves)


def gap(expected: Tensors, found: Tensors, space: Space | None = None) -> float:
    """Return ``‖expected − found‖ / ‖expected‖`` in the norm of ``space``, infinite where only the first is zero."""
    difference = _norm([a - b for a, b in zip(expected, found, strict=True)], space)
    scale = _norm(expected, space)
    return difference / scale if scale else math.inf if difference else 0.0


def _norm(leaves: Sequence[Tensor], space: Space | None) -> float:
    if space is not None and space.is_sharded:
        return norm(tuple(leaves), space)
    wide = {True: torch.complex128, False: torch.float64}
    return math.hypot(*(float(torch.linalg.vector_norm(t.detach(), dtype=wide[t.is_complex()])) for t in leaves))
