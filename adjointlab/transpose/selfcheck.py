"""Whether derived functions are what they should be, on random data: nothing derived is used before that.

By the definition alone: the derived forward is compared with the user's own, and the derived adjoint with the derived
forward by the dot test. That needs no activations, and holds where autograd itself is wrong. Of results, only products
with random directions are kept, so that a check takes the memory of one call.

Note: leaf by leaf
------------------
One norm over all leaves would let a large leaf hide a small one. So each leaf of a result is compared in its own norm,
and where there are several leaves, a second pair (x, y) is scaled so that all of them contribute alike to ``⟨Ax, y⟩``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adjointlab.numerics import (
    DOT_UNITS,
    SIGMAS,
    allowance,
    dot_bound,
    eps_of,
    full_precision,
    norm,
    perturbed,
    relative_gap,
    rounding_noise,
    sketch,
)  # fmt: skip
from adjointlab.space import Space
from adjointlab.transpose.frontend.vjp import first_line

Tensors = tuple[Tensor, ...]
Function = Callable[[Tensors], Tensors]

_UNITS = 32  # of rounding that two ways to compute the same may be apart
_FINE = 2.0**-12  # of a norm: what one wrong entry of 2²⁴ is; no bound that is not measured is wider
_ELSEWHERE = "on another process"


@dataclass(frozen=True)
class Pair:
    """Random x and y, by their seeds: made when they are used, so that they take no memory meanwhile."""

    domain: Space
    codomain: Space
    x_seed: int = 20
    y_seed: int = 21
    x_scales: tuple[float, ...] | None = None
    y_scales: tuple[float, ...] | None = None

    @property
    def x(self) -> Tensors:
        """The leaves of x."""
        return _scaled(self.domain, self.x_seed, self.x_scales)

    @property
    def y(self) -> Tensors:
        """The leaves of y."""
        return _scaled(self.codomain, self.y_seed, self.y_scales)


def _scaled(space: Space, seed: int, scales: tuple[float, ...] | None) -> Tensors:
    leaves = space.leaves(space.randn(torch.Generator().manual_seed(seed)))
    return leaves if scales is None else tuple(t.mul_(s) for t, s in zip(leaves, scales, strict=True))


@dataclass(frozen=True)
class Sketch:
    """A result as far as it is kept: the products of each leaf with that of y, block by block, and its norm."""

    products: tuple[Tensor, ...]
    norms: tuple[float, ...]

    @classmethod
    def of(cls, result: Tensors, directions: Tensors) -> Sketch:
        """Return the sketch of a result along directions."""
        pairs = zip(result, directions, strict=True)
        return cls(tuple(sketch(t, d) for t, d in pairs), tuple(norm((t,)) for t in result))

    def gaps(self, other: Sketch) -> list[float]:
        """Return for each leaf ``‖a − b‖``, as far as the products tell."""
        return [float(torch.linalg.vector_norm(a - b)) for a, b in zip(self.products, other.products, strict=True)]

    @property
    def total(self) -> float:
        """``Re ⟨a, y⟩`` on this process."""
        return sum(float(product.real.sum()) for product in self.products)


@dataclass(frozen=True)
class Candidate:
    """Derived functions on leaves, and the spaces of these."""

    function: Function
    linear: Function
    adjoint: Function
    domain: Space
    codomain: Space


@full_precision
def disagreement(
    candidate: Candidate, seen: Sketch, user: Function, *, affine: bool, compiled: bool, tol: float | None = None
) -> str:
    """Return how derived functions fail to be the user's function and its adjoint, or nothing where they do not."""
    domain, pair = candidate.domain, Pair(candidate.domain, candidate.codomain)
    with torch.no_grad(), warnings.catch_warnings():
        # torch.compile runs complex numbers op by op, and says so; the explanation has what we have to say.
        warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
        said, sketches = "", []
        for name in ("function", *(["linear"] if affine else [])):
            found, said = _tried(getattr(candidate, name), pair.x, name, domain, compiled=compiled)
            if found is None:
                return said
            sketches.append((Sketch.of(found, pair.y), Sketch.of(found, _other(pair).y)))
            del found
        if affine:
            zeros = tuple(torch.zeros_like(t) for t in pair.x)
            offset = Sketch.of(candidate.function(zeros), pair.y)
            difference = [a - b for a, b in zip(sketches[0][0].products, offset.products, strict=True)]
            norms = tuple(map(math.hypot, sketches[0][0].norms, offset.norms))
            said = _differ(Sketch(tuple(difference), norms), sketches[1][0], candidate, user, pair, tol, "linear part")
        said = _differ(seen, sketches[0][0], candidate, user, pair, tol, "forward") or said
        if not domain.every(not said):
            return said or f"the derived forward differs from the user's {_ELSEWHERE}"
        return _of_adjoint(candidate, pair, sketches[-1], tol, compiled=compiled)


def _other(pair: Pair) -> Pair:
    """Return a pair of the same x and another y."""
    return replace(pair, y_seed=pair.y_seed + 2)


def _tried(
    function: Function, argument: Tensors, name: str, space: Space, *, compiled: bool
) -> tuple[Tensors | None, str]:
    """Call a derived function; return its result, or nothing and the reason."""
    said, found = "", None
    try:
        found = function(argument)
    except (RuntimeError, AssertionError) as error:  # of a compiler, or of an op that strides do not suit
        lines = [line for line in str(error).splitlines() if line.strip()]
        said = " ".join(lines[:2])[:300] or type(error).__name__  # where it failed, and what was said
    if space.every(found is not None):
        return found, ""
    what = "torch.compile" if compiled else f"the derived {name}"
    return None, f"{what} failed ({said or _ELSEWHERE})"


def _differ(
    expected: Sketch, found: Sketch, candidate: Candidate, user: Function, pair: Pair, tol: float | None, name: str
) -> str:
    """Return how two results differ by more than rounding explains, leaf by leaf."""
    eps = [float(torch.finfo(spec.dtype).eps) for spec in candidate.codomain.specs]
    wide = max(*eps, eps_of(pair.x))
    gaps, bounds = expected.gaps(found), [allowance(_UNITS, wide) * size for size in expected.norms]
    if not candidate.domain.every(all(gap <= bound for gap, bound in zip(gaps, bounds, strict=True))):
        # Cancellation inside? Then the result moves as much when the argument does.
        moved = expected.gaps(Sketch.of(user(perturbed(pair.x)), pair.y)) if name == "forward" else [0.0] * len(gaps)
        bounds = [bound + allowance(_UNITS, wide) / wide * noise for bound, noise in zip(bounds, moved, strict=True)]
        if tol is not None:
            bounds = [max(bound, tol * size) for bound, size in zip(bounds, expected.norms, strict=True)]
    for gap, bound, size in zip(gaps, bounds, expected.norms, strict=True):
        if not gap <= bound:
            return (
                f"the derived {name} differs from the user's by {gap / max(size, 1e-300):.1e} of its norm, where "
                f"rounding explains {bound / max(size, 1e-300):.1e}"
            )
    return ""


def _of_adjoint(
    candidate: Candidate, pair: Pair, images: tuple[Sketch, Sketch], tol: float | None, *, compiled: bool
) -> str:
    """Return how the dot test fails, on pairs of random x and y."""
    norms: list[float] = []
    for each, image in zip((pair, _other(pair)), images, strict=True):
        found, said = _tried(candidate.adjoint, each.y, "adjoint", candidate.domain, compiled=compiled)
        if found is None:
            return said
        norms = [norm((t,)) for t in found]
        said = _dot(candidate, each, image, found, tol)
        if said:
            return said
        del found
    several = len(candidate.domain.specs) > 1 or len(candidate.codomain.specs) > 1
    if not candidate.domain.every(not several):
        largest = max(norms, default=0.0) or 1.0
        x_scales = tuple(_near(1.0 / (n or largest), s.dtype) for n, s in zip(norms, pair.domain.specs, strict=True))
        y_scales = tuple(
            _near(1.0 / (n or 1.0), s.dtype) for n, s in zip(images[0].norms, pair.codomain.specs, strict=True)
        )
        even = Pair(pair.domain, pair.codomain, 24, 25, x_scales, y_scales)
        image = Sketch.of(candidate.linear(even.x), even.y)
        return _dot(candidate, even, image, candidate.adjoint(even.y), tol)
    return ""


def _near(scale: float, dtype: torch.dtype) -> float:
    """Return a power of two close to a scale, within what products in a dtype hold."""
    most = 12 if torch.finfo(dtype).max < 1e30 else 40
    return 2.0 ** max(-most, min(most, round(math.log2(max(scale, 1e-300)))))


def _dot(candidate: Candidate, pair: Pair, image: Sketch, at_y: Tensors, tol: float | None) -> str:
    """Return how ``Re⟨Ax, y⟩ = Re⟨x, Aᴴy⟩`` fails."""
    domain, codomain, x = candidate.domain, candidate.codomain, pair.x
    right = sum(float(sketch(s, t).real.sum()) for s, t in zip(x, at_y, strict=True))
    gap = abs(_total(codomain, image.total) - _total(domain, right))
    # Errors of a leaf meet a y, or an x, of its own scale.
    sizes = image.norms, tuple(norm((t,)) for t in at_y)
    scales = pair.y_scales or (1.0,) * len(sizes[0]), pair.x_scales or (1.0,) * len(sizes[1])
    scaled = [_norm(s, [a * b for a, b in zip(*each, strict=True)])
              for s, *each in zip((codomain, domain), sizes, scales, strict=True)]  # fmt: skip
    lengths = norm(x, domain), norm(pair.y, codomain)
    near = lengths if pair.x_scales is None else (1.0, 1.0)
    norms = (*near, scaled[0], scaled[1])
    # Long sums and chains of them lose more than one rounding, which is worth a measurement only where it is much.
    eps = max(domain.eps, codomain.eps)
    bound = dot_bound(domain, codomain, norms, units=max(DOT_UNITS, min(_UNITS, _FINE / eps)))
    if not gap <= bound:
        again = relative_gap(at_y, candidate.adjoint(pair.y))
        if not domain.every(again <= allowance(_UNITS, max(domain.eps, codomain.eps))):
            return f"the derived adjoint fails the dot test, and differs from itself by {again:.1e} when called again"
        noise = (
            rounding_noise(candidate.linear, domain, codomain, x, candidate.linear(x)),
            rounding_noise(candidate.adjoint, codomain, domain, pair.y, at_y),
        )
        whole = [_norm(s, each) or 1.0 for s, each in zip((codomain, domain), sizes, strict=True)]
        parts = [SIGMAS * n * a / b for n, a, b in zip(noise, scaled, whole, strict=True)]
        bound = dot_bound(domain, codomain, norms, noise=(parts[0], parts[1]))
    size = max(scaled[0] * lengths[1], scaled[1] * lengths[0], 1e-300)
    if gap <= max(bound, (tol or 0.0) * size):
        return ""
    return f"the derived adjoint fails the dot test by {gap / size:.1e}, where rounding explains {bound / size:.1e}"


def _total(space: Space, number: float) -> float:
    if not space.is_sharded:
        return number
    terms = [torch.tensor(number if i == 0 else 0.0, dtype=torch.float64) for i in range(len(space.specs))]
    return float(space.total(terms))


def _norm(space: Space, norms: Sequence[float]) -> float:
    if not space.is_sharded:
        return math.hypot(*norms)
    return math.sqrt(float(space.total([torch.tensor(n * n, dtype=torch.float64) for n in norms])))


# -- against autograd, where that may be another derivative ------------------------------------------------------------


@full_precision
def autograd_gap(candidate: Candidate, eager_adjoint: Function) -> tuple[float, bool]:
    """Return how far autograd's own adjoint is from the derived one on a random y, and whether that is rounding."""
    y, eps = Pair(candidate.domain, candidate.codomain).y, max(candidate.domain.eps, candidate.codomain.eps)
    with torch.no_grad():
        expected = eager_adjoint(y)
        gap, bound = relative_gap(expected, candidate.adjoint(y)), allowance(_UNITS, eps)
        if gap > bound:
            bound *= 1 + relative_gap(expected, eager_adjoint(perturbed(y))) / eps
    return gap, gap <= bound


@full_precision
def gradient_disagreement(candidate: Candidate, user: Function, parameters: Sequence[tuple[str, Tensor]]) -> str:
    """Return how gradients in the parameters differ from plain autograd's, or nothing where they agree.

    A straight-through estimator or a block under no_grad gives parameters a derivative that is not the function's.
    """
    pair = Pair(candidate.domain, candidate.codomain)
    tensors = tuple(tensor for _, tensor in parameters)
    try:
        expected, found = (_gradients(f, pair.x, pair.y, tensors) for f in (user, candidate.function))
        bounds = [allowance(2 * _UNITS, eps_of((t,))) for t in expected]
        gaps = [relative_gap((a,), (b,)) for a, b in zip(expected, found, strict=True)]
        if any(gap > bound for gap, bound in zip(gaps, bounds, strict=True)):  # cancellation inside? as above
            moved = _gradients(user, perturbed(pair.x), pair.y, tensors)
            noise = [relative_gap((a,), (b,)) for a, b in zip(expected, moved, strict=True)]
            bounds = [b * (1 + n / eps_of((t,))) for b, n, t in zip(bounds, noise, expected, strict=True)]
    except RuntimeError as error:
        return f"the gradient in the parameters failed ({first_line(error)})"
    for (name, _), gap, bound in zip(parameters, gaps, bounds, strict=True):
        if not gap <= bound:
            return f"the gradient in {name} differs from autograd's by {gap:.1e} of its norm"
    return ""


def _gradients(function: Function, x: Tensors, v: Tensors, parameters: Tensors) -> Tensors:
    """Return the gradients of ``Re⟨f(x), v⟩`` in the parameters, zero where it does not depend on one."""
    with torch.enable_grad():
        pairs = [(o, t) for o, t in zip(function(x), v, strict=True) if o.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(parameters)
        if pairs:
            tracked, cotangents = zip(*pairs, strict=True)
            # Parameters may be made from others in a graph that is the user's, who still needs it.
            found = torch.autograd.grad(tracked, parameters, cotangents, allow_unused=True, retain_graph=True)
    return tuple(torch.zeros_like(t) if g is None else g for g, t in zip(found, parameters, strict=True))


@full_precision
def alike(function: Function, reference: Function, shapes: Sequence[Tensor]) -> bool:
    """Return whether two functions agree on random leaves: for what is made of parts that were compared before."""
    draw = torch.Generator().manual_seed(21)
    leaves = tuple(torch.randn(t.shape, generator=draw, device="cpu").to(t.device, t.dtype) for t in shapes)
    with torch.no_grad():
        expected, found = reference(leaves), function(leaves)
    bounds = [allowance(2 * _UNITS, eps_of((t,))) for t in expected]
    gaps = [relative_gap((a,), (b,)) for a, b in zip(expected, found, strict=True)]
    return all(gap <= bound for gap, bound in zip(gaps, bounds, strict=True))
