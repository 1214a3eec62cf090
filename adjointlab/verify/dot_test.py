"""The pairs of the dot-product test: random pairs, and impulses and constants for corners and borders."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from adjointlab.numerics import DOT_UNITS, SIGMAS, dot_gap, norm, rounding_noise
from adjointlab.progress import expect
from adjointlab.space import Space
from adjointlab.verify.checked_map import BrokenError, CheckedMap, Tensors, number_of_structured, structured, vanishes

# A function may compute weights internally, such as those of an interpolation. Every call rounds them in the same way,
# so measurements do not show this error: for bicubic interpolation, A and its derivative differ by 4 eps, 2.4 times the
# measured noise. So measured noise counts twice, up to _UNSEEN eps. Cancellation exceeds that, and half-precision
# functions compute weights in single precision, so neither needs the factor.
_UNSEEN, _HALF = 4, 1e-4
_HIDDEN = 0.02  # of a result: with more noise, a function is not linear, or its result has no correct digits


@dataclass(frozen=True)
class _Sample:
    """An element of the domain of A or B with its image, and whether it is a random draw."""

    side: CheckedMap
    z: Tensors
    image: Tensors
    random: bool = True

    @classmethod
    def at(cls, side: CheckedMap, z: Tensors, *, random: bool = True) -> _Sample:
        return cls(side, z, side(z), random)

    @functools.cached_property
    def norm(self) -> float:
        return norm(self.z, self.side.space)

    @functools.cached_property
    def image_norm(self) -> float:
        return norm(self.image, self.side.codomain)

    @functools.cached_property
    def noise(self) -> float:
        """The measured rounding error of the image."""
        return rounding_noise(self.side, self.side.space, self.side.codomain, self.z, self.image)


class DotTest:
    """The comparison of ``⟨Ax, y⟩`` with ``⟨x, By⟩`` over many pairs; it keeps the worst pair."""

    def __init__(
        self,
        forward: CheckedMap,
        adjoint: CheckedMap,
        *,
        exact: bool,
        seed: int,
        reference: Callable[[], CheckedMap | None] | None = None,
        powers: tuple[int, ...] = (20, -20),
    ) -> None:
        self.forward, self.adjoint, self.exact = forward, adjoint, exact
        self.powers = powers  # exponents p of the factors 2^p by which a pair is scaled
        self.reference = reference  # shows how precise an adjoint can be; None if B is derived
        self.avoidable_noise = 0.0  # largest measured noise of B beyond that precision, in eps
        self.notes: list[str] = []
        self.domain, self.codomain = forward.space, adjoint.space
        self.generator = torch.Generator().manual_seed(seed)
        self.eps = max(self.domain.eps, self.codomain.eps)
        self.worst: tuple[float, float, float, str] | None = None  # excess, error, tolerance, pair
        self.worst_y: Tensors = ()
        self.pairs = 0
        self.used_noise = 0.0  # largest measured noise that raised a tolerance, in eps
        self.lost_in_rounding: list[str] = []
        self._gains: dict[str, float] = {}  # rounding noise of random elements, relative to their norm
        self._relative: tuple[float, ...] = ()  # noise of the first failed pair, relative to the norms of its images
        self._norms: list[tuple[float, ...]] = []  # of x, y, Ax and By, for each random pair
        self._rows: list[float] = []

    @property
    def passed(self) -> bool:
        """Whether at least one pair was compared and all compared pairs agree."""
        return self.worst is not None and self.worst[0] <= 1.0

    @property
    def vacuous(self) -> bool:
        """Whether all images were zero."""
        return all(norms[2] == norms[3] == 0.0 for norms in self._norms)

    def run(
        self, trials: int, given: tuple[Tensors | None, Tensors | None] | None = None, *, thorough: bool = True
    ) -> None:
        """Compare the given pair, ``trials`` random pairs and each x with the next y; if thorough, special ones too."""
        sides = self.forward, self.adjoint
        if thorough:
            special = sum(2 * number_of_structured(side.space) for side in sides)
            expect(2 * trials + 3 * len(self.powers) + 2 * bool(self.domain.batch_dims) + special)
        if given is not None:
            batch = next(z for z in given if z)[0].shape[: self.domain.batch_dims]
            drawn = [z or self._draw(side.space.with_batch(batch)) for side, z in zip(sides, given, strict=True)]
            pair = [_Sample.at(s, z, random=not own) for s, z, own in zip(sides, drawn, given, strict=True)]
            self._compare("the given pair", *pair)
        pairs: list[tuple[_Sample, _Sample]] = []
        for trial in range(trials):
            x, y = [self._draw(side.space) for side in sides]
            a, b = _Sample.at(self.forward, x), _Sample.at(self.adjoint, y)
            self._compare(f"random pair {trial}", a, b)
            if pairs:
                self._compare(f"random pair {trial - 1}, {trial}", pairs[-1][0], b)
            pairs = [*pairs[:1], (a, b)]
        if pairs and self.passed and thorough:  # errors that random pairs may miss
            self._run_scaled(*pairs[0])
            self._run_other_batch()
            self._run_structured(*pairs[0])

    def _run_scaled(self, *pair: _Sample) -> None:
        """Compare a pair with images of far larger and smaller elements, to detect saturation."""
        for power in self.powers:
            images = [_scaled_image(sample, power) for sample in pair]
            far = [replace(s, image=image) for s, image in zip(pair, images, strict=True) if image is not None]
            if len(far) < len(pair):  # the scaled pair may overflow, as it always may in half precision
                return
            # Of the operator alone: it says what is right, where the adjoint may drop small numbers.
            if power < 0 and _is_hidden(pair[0], power):
                self.notes.append(f"not compared at 2^{power}: rounding of larger numbers inside hides the result")
                continue
            self._compare(f"random pair 0, Ax at 2^{power} x and By at 2^{power} y", *far, count=False)

    def _run_other_batch(self) -> None:
        """Compare a pair of another batch size, to detect an adjoint that works for one size only."""
        if not self.domain.batch_dims:
            return
        batch = [size + 1 for size in self.domain.batch_shape]
        x, y = (self._draw(space.with_batch(batch)) for space in (self.domain, self.codomain))
        try:
            a = _Sample.at(self.forward, x)
        except BrokenError as error:  # the forward failed, not the adjoint
            self.notes.append(f"only one batch size compared: at {tuple(batch)}, {error}")
            return
        self._compare(f"random pair of batch size {tuple(batch)}", a, _Sample.at(self.adjoint, y), count=False)

    def _run_structured(self, a: _Sample, b: _Sample) -> None:
        """Compare impulses with a random element, then with random numbers on their response, which is local."""
        for one, other, letter, response in ((a, b, "x", "y = Ax"), (b, a, "y", "x = By")):
            codomain = one.side.codomain
            for name, z in structured(one.side.space):
                special = _Sample.at(one.side, z, random=False)
                self._compare(f"{letter} = {name}", special, other)
                if name != "constant" and not vanishes(codomain, special.image):
                    local = _random_within(codomain, special.image, self._draw(codomain))
                    met = _Sample.at(other.side, local, random=False)
                    self._compare(f"{letter} = {name}, {response} by random numbers", special, met)

    def _draw(self, space: Space) -> Tensors:
        return space.leaves(space.randn(self.generator))

    def _compare(self, name: str, *pair: _Sample, count: bool = True) -> None:
        """Compare ``⟨Ax, y⟩`` with ``⟨x, By⟩`` for a sample of A and one of B, in either order."""
        a, b = pair if pair[0].side is self.forward else pair[::-1]
        random = a.random and b.random
        self.pairs += 1
        count = count and random  # whether the pair is one of the random draws
        if count or not self._norms:
            self._norms.append((a.norm, b.norm, a.image_norm, b.image_norm))
        # For a special x, rounding errors are relative to the norm of the image of a typical input.
        typical = self._typical(a, b)
        floor = [0.0 if random else DOT_UNITS * self.eps * size for size in typical]
        error, tolerance = self._gap(a, b, floor)
        if not error <= tolerance and (self.worst is None or not error / tolerance <= self.worst[0]):
            noise = self._noise(a, b, typical)
            if noise is not None:
                error, tolerance = self._measured_gap(a, b, floor, noise, typical)
            elif not random and self._starts_at_zero and self._is_lost(a, b):
                self.lost_in_rounding.append(name)
                return
        if count:
            self._rows.append(tolerance * max(a.image_norm * b.norm, a.norm * b.image_norm))
        excess = error / tolerance if tolerance else (0.0 if error == 0.0 else math.inf)
        if self.worst is None or not excess <= self.worst[0]:
            self.worst, self.worst_y = (excess, error, tolerance, name), b.z

    def _measured_gap(
        self, a: _Sample, b: _Sample, floor: list[float], noise: tuple[float, float], typical: tuple[float, float]
    ) -> tuple[float, float]:
        """Return error and tolerance by measured noise, and note that it was used, or that it is not enough."""
        unseen = _UNSEEN * self.eps if self.eps < _HALF else 0.0
        most = [max(n, min(2 * n, unseen * size)) for n, size in zip(noise, typical, strict=True)]
        error, tolerance = self._gap(a, b, [max(f, SIGMAS * n) for f, n in zip(floor, most, strict=True)])
        relative = tuple(n / size if size else 0.0 for n, size in zip(noise, typical, strict=True))
        if error > tolerance:
            self._relative = relative
        elif error <= tolerance:
            self.used_noise = max(self.used_noise, *(n / self.eps for n in relative))
        return error, tolerance

    def _gap(self, a: _Sample, b: _Sample, noise: list[float]) -> tuple[float, float]:
        return dot_gap(
            self.domain, self.codomain, a.z, a.image, b.z, b.image, exact=self.exact, noise=(noise[0], noise[1]),
            random=(a.random, b.random), norms=(a.norm, b.norm, a.image_norm, b.image_norm),
        )  # fmt: skip

    def _typical(self, a: _Sample, b: _Sample) -> tuple[float, float]:
        """Return the norms of Ax and By, or the typical norms for x and y of this size if these are larger."""
        totals = [math.hypot(*(n[k] for n in self._norms)) for k in range(4)]
        gains = [totals[2] / totals[0] if totals[0] else 0.0, totals[3] / totals[1] if totals[1] else 0.0]
        return max(a.image_norm, gains[0] * a.norm), max(b.image_norm, gains[1] * b.norm)

    def _noise(self, a: _Sample, b: _Sample, typical: tuple[float, float]) -> tuple[float, float] | None:
        """Return the measured rounding errors of Ax and By, or None if they are too large to be rounding."""
        if self._relative:  # a pair has failed: nothing more is to be decided by the noise
            return self._relative[0] * typical[0], self._relative[1] * typical[1]
        if not self._starts_at_zero:
            return None
        random = a.random and b.random
        try:
            forward, backward = self._noise_of(a, random), self._noise_of(b, random)
        except BrokenError:
            return None
        most = max(_HIDDEN, 32 * self.eps)
        if forward > most * typical[0] or backward > most * typical[1]:
            return None
        if self.reference is not None and backward > self._attainable(b, forward, typical, random):
            self.avoidable_noise = max(self.avoidable_noise, backward / typical[1] / self.eps)
            backward = 0.0  # avoidable noise does not raise the tolerance
        return forward, backward

    def _noise_of(self, sample: _Sample, random: bool) -> float:
        """Return the measured rounding error; for a structured pair, at least that of a random element."""
        # A single entry may have no rounding error in all three measurements; thousands of entries will.
        side = sample.side
        if random:
            return sample.noise
        if side.name not in self._gains:
            drawn = _Sample.at(side, side.space.leaves(side.space.randn(torch.Generator().manual_seed(0))))
            self._gains[side.name] = drawn.noise / drawn.norm
        return max(sample.noise, self._gains[side.name] * sample.norm)

    def _is_lost(self, *pair: _Sample) -> bool:
        """Return whether random elements are about as noisy as x and y, up to the factor √n of sums of n terms."""
        # If so, rounding leaves no correct digits. If not, the function is not linear at x or at y.
        for sample in pair:
            side, u = sample.side, self._draw(sample.side.space)
            try:
                drawn = _Sample.at(side, u)
                typical = drawn.noise / drawn.norm * sample.norm
                if sample.noise > 8 * math.sqrt(max(side.space.size, side.codomain.size)) * typical:
                    return False
            except BrokenError:
                return False
        return True

    def _attainable(self, b: _Sample, forward: float, typical: tuple[float, float], random: bool) -> float:
        """Return the largest rounding noise at y that any correct adjoint may need."""
        # A sum of n terms in an unlucky order loses about √n eps. An adjoint with internal cancellation loses as much
        # as A or the derived adjoint, up to a small factor. An adjoint that computes in a coarser dtype loses more.
        assert self.reference is not None
        units = min(max(64.0, math.sqrt(max(self.domain.size, self.codomain.size))), 512.0)
        most = max(units * self.eps, 8 * forward / typical[0] if typical[0] else 0.0) * typical[1]
        side = self.reference()
        return most if side is None else max(most, 8 * self._noise_of(_Sample.at(side, b.z), random))

    @functools.cached_property
    def _starts_at_zero(self) -> bool:
        """Whether A(0) = 0 and B(0) = 0; otherwise, a measurement shows the offset and not rounding."""
        sides = self.forward, self.adjoint
        return all(vanishes(side.codomain, side(side.space.leaves(side.space.zeros()))) for side in sides)

    def missed_row_probability(self) -> float:
        """Return the probability that all random draws miss an error ``e dᴴ`` that makes one row of A wrong."""
        # Here e is a unit vector, and d has the norm of a typical row, ‖A‖_F / √m. The gap of a draw is an entry of y
        # times a normal number of standard deviation ‖d‖. It is missed if every gap is within the tolerance.
        trials = [n for n in self._norms if n[2] or n[3]]
        if not trials or not self._rows:
            return 1.0
        row = math.sqrt(sum(n[2] ** 2 for n in trials) / len(trials) / self.codomain.size)
        if row == 0.0:
            return 1.0
        draws = (len(self._rows) + 1) // 2  # omit the pairs (k, k + 1), which are not independent
        halves = self.domain.is_complex + self.codomain.is_complex
        complex_product = self.exact and halves == 2
        return _product_within(max(self._rows) / row, None if complex_product else 2.0 ** (-halves / 2)) ** draws


def _random_within(space: Space, image: Tensors, numbers: Tensors) -> Tensors:
    """Return random numbers weighted by an image that is scaled to a largest entry of one."""
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in image]
    # No process knows the largest entry of a sharded image; scaling by its norm works as well.
    largest = norm(tuple(wide), space) if space.is_sharded else max(float(t.abs().max()) for t in wide)
    return tuple(((t / largest) * r).to(r.dtype) for t, r in zip(wide, numbers, strict=True))


def _scaled_image(sample: _Sample, power: int) -> Tensors | None:
    """Return ``2⁻ᵖ f(2ᵖ z)``, which is exactly ``f(z)`` for a linear f, or None if it may overflow."""
    tensors = (*sample.z, *sample.image)
    limit = min(torch.finfo(t.dtype).max for t in tensors)
    fits = limit >= 1e30 and max(float(t.abs().max()) for t in tensors) * 2.0 ** (2 * abs(power)) <= limit
    if not sample.side.space.every(fits):
        return None
    try:
        image = sample.side(tuple(t * 2.0**power for t in sample.z))
    except BrokenError:  # perhaps an overflow inside
        return None
    return tuple(t * 2.0**-power for t in image)


def _is_hidden(sample: _Sample, power: int) -> bool:
    """Return whether a result far below one has no correct digits, by rounding that is no larger than at one."""
    small = _Sample.at(sample.side, tuple(t * 2.0**power for t in sample.z))
    return small.noise > _HIDDEN * small.image_norm and small.noise <= 2 * sample.noise


def _product_within(bound: float, deviation: float | None) -> float:
    """Return ``P(|u v| ≤ bound)`` for normal u and v: real with a product of a deviation, or complex of variance 1."""
    u = torch.logspace(-9, 1.2, 4001, dtype=torch.float64, device="cpu")
    if deviation is None:
        density, within = 2 * u * torch.exp(-u.square()), -torch.expm1(-(bound / u).square())
    else:
        density = math.sqrt(2 / math.pi) * torch.exp(-u.square() / 2)
        within = torch.erf(bound / deviation / u / math.sqrt(2))
    return float(torch.trapezoid(density * within, u).clamp(0, 1))
