"""How far a claimed adjoint B is from Aᴴ, where that is not known: the root mean square of ``⟨Ax, y⟩ − ⟨x, By⟩``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from adjointlab.numerics import UNITS, allowance, full_precision
from adjointlab.operators import LinearOperator
from adjointlab.space import Space
from adjointlab.verify.comparison import in_words

Map = Callable[[Any], Any]

_DRAWS = 4
_LONG_SUMS = 64  # times the rounding of a short one
_EXACT = 1e-3  # of Aᴴ, up to which B is taken for a multiple of it
_ROUGH = 0.5  # of Aᴴ, up to which B is taken for another discretisation of it


def mismatch(A: Map, B: Map, domain: Space, codomain: Space, generator: torch.Generator) -> tuple[float, float]:
    """Return α and ``‖B/α − Aᴴ‖ / ‖Aᴴ‖`` for the α that makes it least, as estimated from random vectors."""
    # For random x and y, ⟨Ax, y⟩ − ⟨x, By⟩ has the mean square ‖Aᴴ − B‖², in the norm of all entries of the matrix.
    pairs = [(x, A(x)) for x in (domain.randn(generator) for _ in range(_DRAWS))]
    others = [(y, B(y)) for y in (codomain.randn(generator) for _ in range(_DRAWS))]
    left = [float(codomain.inner(at_x, y).real) for _, at_x in pairs for y, _ in others]
    right = [float(domain.inner(x, at_y).real) for x, _ in pairs for _, at_y in others]
    power = math.fsum(v * v for v in left)
    if not power and not any(right):  # both are zero
        return 1.0, 0.0
    alpha = math.fsum(u * v for u, v in zip(left, right, strict=True)) / power if power else 0.0
    if not (alpha and math.isfinite(alpha)):
        return 0.0, math.inf
    rest = math.fsum((u - v / alpha) ** 2 for u, v in zip(left, right, strict=True))
    return alpha, math.sqrt(rest / power)


def roughly(alpha: float, error: float) -> str:
    """Return in words that B is near to ``α Aᴴ``, or an empty string if it is not."""
    if not (alpha > 0 and error <= _ROUGH):
        return ""
    if error < _EXACT:
        return in_words("", complex(alpha))
    factor = f", and about {alpha:.2g} × too large" if alpha > 1 else f", and about {1 / alpha:.2g} × too small"
    text = f"roughly Aᴴ: {error:.1%} off, as with another interpolation or discretisation (an unmatched pair)"
    return text + factor * (abs(alpha - 1) > 2 * error)


def cost_of_mismatch(A: LinearOperator) -> str:
    """Return in words what unchecked adjoints in A, given as pairs of functions, cost; an empty string if nothing."""
    said = unmatched(A)
    cost = "x is at best where it takes the residual to zero, instead of the minimum, and derivatives of x are inexact"
    return f"{said}; {cost}" if said else ""


def unmatched(A: LinearOperator) -> str:
    """Return in words that an unchecked adjoint in A, given with a function, is none; an empty string if all are."""
    unchecked = [part for part in A.modules() if isinstance(part, LinearOperator) and part.is_unchecked]
    with torch.no_grad(), full_precision:
        for part in unchecked:
            draw = torch.Generator().manual_seed(0)
            alpha, error = mismatch(part, part.H, part.domain, part.codomain, draw)
            apart = math.hypot(error, alpha - 1) if alpha else math.inf
            if apart > allowance(_LONG_SUMS * UNITS, max(part.domain.eps, part.codomain.eps)):
                near = roughly(alpha, error) or "it is not near to Aᴴ"
                return f"what was given as the adjoint, with check=False, is none: {near}"
    return ""
