"""Random data on which a derived program is compared with the eager reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adjointlab.rounding import norm
from adjointlab.space import Space

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sample:
    """What the eager reference makes of random x and v: ``f(x)`` and ``f'ᴴv``."""

    x: Tensors
    at_x: Tensors
    v: Tensors
    at_v: Tensors
    quick: bool = False  # by Reference.quick_sample


def copies(leaves: Tensors) -> Tensors:
    """Return copies that may be written to."""
    return tuple(t.clone() for t in leaves)


def eps(leaves: Tensors) -> float:
    """Return the unit roundoff of the coarsest leaf."""
    return max(float(torch.finfo(t.dtype).eps) for t in leaves)


def nudged(leaves: Tensors) -> Tensors:
    """Return the leaves changed at random by one unit of rounding."""
    draw = torch.Generator().manual_seed(1)
    return tuple(t * (1 + eps(leaves) * torch.randn(t.shape, generator=draw).to(t)) for t in leaves)


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
