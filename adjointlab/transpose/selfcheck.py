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

from adjointlab.linked import pulled_back
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
from adjointlab.space import Space, TensorSpec
from adjointlab.transpose.frontend.vjp import Function, Tensors, first_line

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

    def minus(self, other: Sketch) -> Sketch:
        """Return the sketch of the difference, with norms that bound those of its parts."""
        products = tuple(a - b for a, b in zip(self.products, other.products, strict=True))
        return Sketch(products, tuple(map(math.hypot, self.norms, other.norms)))


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
    pairs = pair, replace(pair, y_seed=pair.y_seed + 2)
    with torch.no_grad(), warnings.catch_warnings():
        # torch.compile runs complex numbers op by op, and says so; the explanation has what we have to say.
        warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
        said, images = "", dict[str, list[Sketch]]()
        for name in ("function", "linear") if affine else ("function",):
            found, said = _tried(getattr(candidate, name), pair.x, name, domain, compiled=compiled)
            if found is None:
                return said
            images[name] = [Sketch.of(found, each.y) for each in pairs]
            del found
        if affine:
            offset = Sketch.of(candidate.function(tuple(torch.zeros_like(t) for t in pair.x)), pair.y)
            difference = images["function"][0].minus(offset)
            said = _differ(difference, images["linear"][0], None, candidate, tol, "linear part")
        moved = lambda: Sketch.of(user(perturbed(pair.x)), pair.y)  # noqa: E731
        said = _differ(seen, images["function"][0], moved, candidate, tol, "forward") or said
        if not domain.every(not said):
            return said or f"the derived forward differs from the user's {_ELSEWHERE}"
        return _of_adjoint(candidate, list(zip(pairs, images[name], strict=True)), tol, compiled=compiled)


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
    expected: Sketch, found: Sketch, moved: Callable[[], Sketch] | None, candidate: Candidate, tol: float | None,
    name: str,
) -> str:  # fmt: skip
    """Return how two results differ by more than rounding explains, leaf by leaf."""
    wide, gaps = max(candidate.domain.eps, candidate.codomain.eps), expected.gaps(found)
    bounds = [allowance(_UNITS, wide) * size for size in expected.norms]
    if not candidate.domain.every(all(gap <= bound for gap, bound in zip(gaps, bounds, strict=True))):
        # Cancellation inside? Then the result moves as much when the argument does.
        noises = [0.0] * len(gaps) if moved is None else expected.gaps(moved())
        bounds = [b + allowance(_UNITS, wide) / wide * noise for b, noise in zip(bounds, noises, strict=True)]
        bounds = [max(b, (tol or 0.0) * size) for b, size in zip(bounds, expected.norms, strict=True)]
    for gap, bound, size in zip(gaps, bounds, expected.norms, strict=True):
        if not gap <= bound:
            return (
                f"the derived {name} differs from the user's by {gap / max(size, 1e-300):.1e} of its norm, where "
                f"rounding explains {bound / max(size, 1e-300):.1e}"
            )
    return ""


def _of_adjoint(candidate: Candidate, images: list[tuple[Pair, Sketch]], tol: float | None, *, compiled: bool) -> str:
    """Return how the dot test fails, on pairs of random x and y with the images of x."""
    norms: list[float] = []
    for pair, image in images:
        found, said = _tried(candidate.adjoint, pair.y, "adjoint", candidate.domain, compiled=compiled)
        said = said if found is None else _dot(candidate, pair, image, found, tol)
        if found is None or said:
            return said
        norms = [norm((t,)) for t in found]
        del found
    spaces = candidate.domain, candidate.codomain
    if candidate.domain.every(all(len(space.specs) == 1 for space in spaces)):
        return ""
    largest = max(norms, default=0.0) or 1.0
    inverses = [1.0 / (n or largest) for n in norms], [1.0 / (n or 1.0) for n in image.norms]
    scales = [tuple(map(_near, each, space.specs)) for each, space in zip(inverses, spaces, strict=True)]
    even = Pair(*spaces, 24, 25, *scales)
    return _dot(candidate, even, Sketch.of(candidate.linear(even.x), even.y), candidate.adjoint(even.y), tol)


def _near(scale: float, spec: TensorSpec) -> float:
    """Return a power of two close to a scale, within what products in a dtype hold."""
    most = 12 if torch.finfo(spec.dtype).max < 1e30 else 40
    return 2.0 ** max(-most, min(most, round(math.log2(max(scale, 1e-300)))))


def _dot(candidate: Candidate, pair: Pair, image: Sketch, at_y: Tensors, tol: float | None = None) -> str:
    """Return how ``Re⟨Ax, y⟩ = Re⟨x, Aᴴy⟩`` fails."""
    domain, codomain, x, y = candidate.domain, candidate.codomain, pair.x, pair.y
    products = [sketch(s, t) for s, t in zip(x, at_y, strict=True)]
    left, right = (_sum(space, [float(p.real.sum()) for p in found])
                   for space, found in ((codomain, image.products), (domain, products)))  # fmt: skip
    # Errors of a leaf meet a y, or an x, of its own scale.
    sizes = image.norms, tuple(norm((t,)) for t in at_y)
    scales = pair.y_scales or (1.0,) * len(sizes[0]), pair.x_scales or (1.0,) * len(sizes[1])
    of_ax, of_by = (
        _length(space, [a * b for a, b in zip(*each, strict=True)])
        for space, *each in zip((codomain, domain), sizes, scales, strict=True)
    )
    lengths, gap, eps = (norm(x, domain), norm(y, codomain)), abs(left - right), max(domain.eps, codomain.eps)
    norms = (*(lengths if pair.x_scales is None else (1.0, 1.0)), of_ax, of_by)
    # Long sums and chains of them lose more than one rounding, which is worth a measurement only where it is much.
    bound = dot_bound(domain, codomain, norms, units=_units(domain, codomain))
    if not gap <= bound:
        again = relative_gap(at_y, candidate.adjoint(y))
        if not domain.every(again <= allowance(_UNITS, eps)):
            return f"the derived adjoint fails the dot test, and differs from itself by {again:.1e} when called again"
        noise = (
            rounding_noise(candidate.linear, domain, codomain, x, candidate.linear(x)),
            rounding_noise(candidate.adjoint, codomain, domain, y, at_y),
        )
        whole = _length(codomain, sizes[0]) or 1.0, _length(domain, sizes[1]) or 1.0
        parts = SIGMAS * noise[0] * of_ax / whole[0], SIGMAS * noise[1] * of_by / whole[1]
        bound = dot_bound(domain, codomain, norms, noise=parts)
    size = max(of_ax * lengths[1], of_by * lengths[0], 1e-300)
    if gap <= max(bound, (tol or 0.0) * size):
        return ""
    return f"the derived adjoint fails the dot test by {gap / size:.1e}, where rounding explains {bound / size:.1e}"


def dot_holds(x: Tensors, y: Tensors, image: Sketch, at_y: Tensors, domain: Space, codomain: Space) -> bool:
    """Return whether ``Re⟨Ax, y⟩ = Re⟨x, Aᴴy⟩`` to the rounding of a chain of operations, without a measurement."""
    left = math.fsum(float(p.real.sum()) for p in image.products)
    right = math.fsum(float(sketch(s, t).real.sum()) for s, t in zip(x, at_y, strict=True))
    norms = norm(x, domain), norm(y, codomain), math.hypot(*image.norms), norm(at_y, domain)
    return abs(left - right) <= dot_bound(domain, codomain, norms, units=_units(domain, codomain))


def _units(domain: Space, codomain: Space) -> float:
    """Return how many roundings a chain may lose: more than a few where they are small."""
    return max(DOT_UNITS, min(_UNITS, _FINE / max(domain.eps, codomain.eps)))


def _sum(space: Space, numbers: Sequence[float]) -> float:
    """Return the sum of a number of each leaf, over processes if any."""
    if not space.is_sharded:
        return sum(numbers)
    return float(space.total([torch.tensor(number, dtype=torch.float64) for number in numbers]))


def _length(space: Space, norms: Sequence[float]) -> float:
    """Return the norm of an element from those of its leaves."""
    return math.sqrt(_sum(space, [n * n for n in norms])) if space.is_sharded else math.hypot(*norms)


# -- against autograd, where that may be another derivative ------------------------------------------------------------


def _gaps(
    expected: Tensors, found: Tensors, moved: Callable[[], Tensors] | None, units: float, eps: float = 0.0
) -> list[tuple[float, float]]:
    """Return for each leaf how far it is off, as a part of its norm, and how far rounding explains.

    ``moved`` returns what is expected where the argument is perturbed: where there is cancellation inside, that shows.
    """
    gaps = [relative_gap((a,), (b,)) for a, b in zip(expected, found, strict=True)]
    roundings = [eps or eps_of((a,)) for a in expected]
    bounds = [allowance(units, rounding) for rounding in roundings]
    if moved is not None and any(gap > bound for gap, bound in zip(gaps, bounds, strict=True)):
        noises = [relative_gap((a,), (b,)) for a, b in zip(expected, moved(), strict=True)]
        bounds = [b * (1 + noise / rounding) for b, noise, rounding in zip(bounds, noises, roundings, strict=True)]
    return list(zip(gaps, bounds, strict=True))


@full_precision
def autograd_gap(candidate: Candidate, eager_adjoint: Function) -> tuple[float, bool]:
    """Return how far autograd's own adjoint is from the derived one on a random y, and whether that is rounding."""
    y, eps = Pair(candidate.domain, candidate.codomain).y, max(candidate.domain.eps, candidate.codomain.eps)
    with torch.no_grad():
        found = _gaps(eager_adjoint(y), candidate.adjoint(y), lambda: eager_adjoint(perturbed(y)), _UNITS, eps)
    return max(gap for gap, _ in found), all(gap <= bound for gap, bound in found)


@full_precision
def gradient_disagreement(candidate: Candidate, user: Function, parameters: Sequence[tuple[str, Tensor]]) -> str:
    """Return how gradients in the parameters differ from plain autograd's, or nothing where they agree.

    A straight-through estimator or a block under no_grad gives parameters a derivative that is not the function's.
    """
    pair = Pair(candidate.domain, candidate.codomain)
    tensors = tuple(tensor for _, tensor in parameters)
    try:
        expected, found = (_gradients(f, pair.x, pair.y, tensors) for f in (user, candidate.function))
        gaps = _gaps(expected, found, lambda: _gradients(user, perturbed(pair.x), pair.y, tensors), 2 * _UNITS)
    except RuntimeError as error:
        return f"the gradient in the parameters failed ({first_line(error)})"
    for (name, _), (gap, bound) in zip(parameters, gaps, strict=True):
        if not gap <= bound:
            return f"the gradient in {name} differs from autograd's by {gap:.1e} of its norm"
    return ""


def _gradients(function: Function, x: Tensors, v: Tensors, parameters: Tensors) -> Tensors:
    """Return the gradients of ``Re⟨f(x), v⟩`` in the parameters, zero where it does not depend on one."""
    with torch.enable_grad():  # parameters may be made from others in a graph that is the user's, who still needs it
        return pulled_back(function(x), parameters, v)


@full_precision
def alike(function: Function, reference: Function, shapes: Sequence[Tensor]) -> bool:
    """Return whether two functions agree on random leaves: for what is made of parts that were compared before."""
    draw = torch.Generator().manual_seed(21)
    leaves = tuple(torch.randn(t.shape, generator=draw, device="cpu").to(t.device, t.dtype) for t in shapes)
    with torch.no_grad():
        expected, found = reference(leaves), function(leaves)
    return all(gap <= bound for gap, bound in _gaps(expected, found, None, 2 * _UNITS))
