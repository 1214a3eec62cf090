"""The pairs of the dot-product test: random pairs, and impulses and constants for corners and borders."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from adjointlab.numerics import DOT_UNITS, SIGMAS, dot_gap, norm, rounding_noise
from adjointlab.space import Space
from adjointlab.verify.checked_map import BrokenError, CheckedMap, Tensors, structured, vanishes

# A function may compute weights internally, such as those of an interpolation. Every call rounds them in the same way,
# so measurements do not show this error: for bicubic interpolation, A and its derivative differ by 4 eps, 2.4 times the
# measured noise. So measured noise counts twice, up to _UNSEEN eps. Cancellation exceeds that, and half-precision
# functions compute weights in single precision, so neither needs the factor.
_UNSEEN, _HALF = 4, 1e-4
_HIDDEN = 0.02  # of a result: with more noise, a function is not linear, or its result has no correct digits


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
        self._relative: tuple[
            float, ...
        ] = ()  # measured noise of the first failed pair, relative to the norms of images
        self._norms: list[tuple[float, ...]] = []
        self._rows: list[float] = []
        self._through_zero: bool | None = None
        self._trusted: tuple[CheckedMap | None] | None = None  # the result of `reference`

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
        if given is not None:
            x, y = given
            batch = (x or y or ())[0].shape[: self.domain.batch_dims]
            x = self._draw(self.domain.with_batch(batch)) if x is None else x
            y = self._draw(self.codomain.with_batch(batch)) if y is None else y
            self._compare(
                "the given pair", x, self.forward(x), y, self.adjoint(y), random=(given[0] is None, given[1] is None)
            )
        first: tuple[Tensors, Tensors, Tensors, Tensors] | None = None
        before: tuple[Tensors, Tensors] | None = None
        for trial in range(trials):
            x, y = self._draw(self.domain), self._draw(self.codomain)
            at_x, at_y = self.forward(x), self.adjoint(y)
            self._compare(f"random pair {trial}", x, at_x, y, at_y, random=(True, True))
            if before is not None:
                self._compare(f"random pair {trial - 1}, {trial}", *before, y, at_y, random=(True, True))
            before = (x, at_x)
            first = first or (x, at_x, y, at_y)
        if first is not None and self.passed and thorough:  # errors that random pairs may miss
            self._run_scaled(*first)
            self._run_other_batch()
            self._run_structured(*first)

    def _run_scaled(self, x: Tensors, at_x: Tensors, y: Tensors, at_y: Tensors) -> None:
        """Compare a pair with images of far larger and smaller elements, to detect saturation."""
        for power in self.powers:
            far = []
            for side, at, z in ((self.forward, at_x, x), (self.adjoint, at_y, y)):
                image = _scaled_image(side, at, z, power)
                if image is None:  # the scaled pair may overflow, as it always may in half precision
                    return
                far.append(image)
            # Of the operator alone: it says what is right, where the adjoint may drop small numbers.
            if power < 0 and self._is_hidden(self.forward, x, power):
                self.notes.append(f"not compared at 2^{power}: rounding of larger numbers inside hides the result")
                continue
            name = f"random pair 0, Ax at 2^{power} x and By at 2^{power} y"
            self._compare(name, x, far[0], y, far[1], random=(True, True), count=False)

    def _is_hidden(self, side: CheckedMap, z: Tensors, power: int) -> bool:
        """Return whether a result far below one has no correct digits, by rounding that is no larger than at one."""
        small = tuple(t * 2.0**power for t in z)
        image = side(small)
        noise = rounding_noise(side, side.space, side.codomain, small, image)
        if noise <= _HIDDEN * norm(image, side.codomain):
            return False
        return noise <= 2 * rounding_noise(side, side.space, side.codomain, z, side(z))

    def _run_other_batch(self) -> None:
        """Compare a pair of another batch size, to detect an adjoint that works for one size only."""
        if not self.domain.batch_dims:
            return
        batch = [size + 1 for size in self.domain.batch_shape]
        x, y = (self._draw(space.with_batch(batch)) for space in (self.domain, self.codomain))
        try:
            at_x = self.forward(x)
        except BrokenError as error:  # the forward failed, not the adjoint
            self.notes.append(f"only one batch size compared: at {tuple(batch)}, {error}")
            return
        name = f"random pair of batch size {tuple(batch)}"
        self._compare(name, x, at_x, y, self.adjoint(y), random=(True, True), count=False)

    def _run_structured(self, x: Tensors, at_x: Tensors, y: Tensors, at_y: Tensors) -> None:
        """Compare impulses with a random element, then with random numbers on their response, which is local."""
        for name, u in structured(self.domain):
            at_u = self.forward(u)
            self._compare(f"x = {name}", u, at_u, y, at_y, random=(False, True))
            if name != "constant" and not vanishes(self.codomain, at_u):
                local = _random_within(self.codomain, at_u, self._draw(self.codomain))
                self._compare(
                    f"x = {name}, y = Ax by random numbers", u, at_u, local, self.adjoint(local), random=(False, False)
                )
        for name, v in structured(self.codomain):
            at_v = self.adjoint(v)
            self._compare(f"y = {name}", x, at_x, v, at_v, random=(True, False))
            if name != "constant" and not vanishes(self.domain, at_v):
                local = _random_within(self.domain, at_v, self._draw(self.domain))
                self._compare(
                    f"y = {name}, x = By by random numbers", local, self.forward(local), v, at_v, random=(False, False)
                )

    def _draw(self, space: Space) -> Tensors:
        return space.leaves(space.randn(self.generator))

    def _compare(
        self,
        name: str,
        x: Tensors,
        at_x: Tensors,
        y: Tensors,
        at_y: Tensors,
        *,
        random: tuple[bool, bool],
        count: bool = True,
    ) -> None:
        norms = (norm(x, self.domain), norm(y, self.codomain), norm(at_x, self.codomain), norm(at_y, self.domain))
        self.pairs += 1
        count = count and all(random)  # whether the pair is one of the random draws
        if count or not self._norms:
            self._norms.append(norms)
        # For a special x, rounding errors are relative to the norm of the image of a typical input.
        floor = tuple(DOT_UNITS * self.eps * size for size in self._typical(norms)) if not all(random) else (0.0, 0.0)
        options: dict[str, Any] = {"exact": self.exact, "random": random, "norms": norms}
        spaces = (self.domain, self.codomain)
        error, tolerance = dot_gap(*spaces, x, at_x, y, at_y, noise=(floor[0], floor[1]), **options)
        if not error <= tolerance and (self.worst is None or not error / tolerance <= self.worst[0]):
            noise = self._noise_once_failed(norms) or self._noise(x, at_x, y, at_y, norms, random=all(random))
            if noise is not None:
                unseen = _UNSEEN * self.eps if self.eps < _HALF else 0.0
                most = [unseen * size for size in self._typical(norms)]
                e, f = (SIGMAS * max(n, min(2 * n, m)) for n, m in zip(noise, most, strict=True))
                known = (max(floor[0], e), max(floor[1], f))
                error, tolerance = dot_gap(*spaces, x, at_x, y, at_y, noise=known, **options)
                if error > tolerance:
                    self._relative = tuple(
                        n / s if s else 0.0 for n, s in zip(noise, self._typical(norms), strict=True)
                    )
                if error <= tolerance:
                    sizes = self._typical(norms)
                    self.used_noise = max(
                        [self.used_noise, *(n / s / self.eps for n, s in zip(noise, sizes, strict=True) if s)]
                    )
            elif not all(random) and self._starts_at_zero() and self._is_lost(x, at_x, y, at_y, norms):
                self.lost_in_rounding.append(name)
                return
        if count:
            self._rows.append(tolerance * max(norms[2] * norms[1], norms[0] * norms[3]))
        excess = error / tolerance if tolerance else (0.0 if error == 0.0 else math.inf)
        if self.worst is None or not excess <= self.worst[0]:
            self.worst, self.worst_y = (excess, error, tolerance, name), y

    def _typical(self, norms: tuple[float, ...]) -> tuple[float, float]:
        """Return the norms of Ax and By, or the typical norms for x and y of this size if these are larger."""
        totals = [math.hypot(*(n[k] for n in self._norms)) for k in range(4)]
        gains = [totals[2] / totals[0] if totals[0] else 0.0, totals[3] / totals[1] if totals[1] else 0.0]
        return max(norms[2], gains[0] * norms[0]), max(norms[3], gains[1] * norms[1])

    def _noise_once_failed(self, norms: tuple[float, ...]) -> tuple[float, float] | None:
        """Return the noise as it was for the first failed pair: then nothing more is to be decided by it."""
        if not self._relative:
            return None
        sizes = self._typical(norms)
        return self._relative[0] * sizes[0], self._relative[1] * sizes[1]

    def _noise(
        self, x: Tensors, at_x: Tensors, y: Tensors, at_y: Tensors, norms: tuple[float, ...], *, random: bool
    ) -> tuple[float, float] | None:
        """Return the measured rounding errors of Ax and By, or None if they are too large to be rounding."""
        if not self._starts_at_zero():
            return None
        try:
            forward = self._noise_of(self.forward, x, at_x, random=random)
            backward = self._noise_of(self.adjoint, y, at_y, random=random)
        except BrokenError:
            return None
        most = max(_HIDDEN, 32 * self.eps)
        sizes = self._typical(norms)
        if forward > most * sizes[0] or backward > most * sizes[1]:
            return None
        if self.reference is not None and backward > self._attainable(y, forward, sizes, random=random):
            self.avoidable_noise = max(self.avoidable_noise, backward / sizes[1] / self.eps)
            backward = 0.0  # avoidable noise does not raise the tolerance
        return forward, backward

    def _noise_of(self, side: CheckedMap, z: Tensors, at_z: Tensors, *, random: bool) -> float:
        """Return the measured rounding errors at z; for a structured z, at least those of a random element."""
        # A single entry may have no rounding error in all three measurements; thousands of entries will.
        noise = rounding_noise(side, side.space, side.codomain, z, at_z)
        if random:
            return noise
        if side.name not in self._gains:
            u = side.space.leaves(side.space.randn(torch.Generator().manual_seed(0)))
            there = rounding_noise(side, side.space, side.codomain, u, side(u))
            self._gains[side.name] = there / norm(u, side.space)
        return max(noise, self._gains[side.name] * norm(z, side.space))

    def _is_lost(self, x: Tensors, at_x: Tensors, y: Tensors, at_y: Tensors, norms: tuple[float, ...]) -> bool:
        """Return whether random elements are about as noisy as x and y, up to the factor √n of sums of n terms."""
        # If so, rounding leaves no correct digits. If not, the function is not linear at x or at y.
        for side, z, at_z, size in ((self.forward, x, at_x, norms[0]), (self.adjoint, y, at_y, norms[1])):
            u = self._draw(side.space)
            try:
                here = rounding_noise(side, side.space, side.codomain, z, at_z)
                there = rounding_noise(side, side.space, side.codomain, u, side(u)) / norm(u, side.space) * size
            except BrokenError:
                return False
            if here > 8 * math.sqrt(max(side.space.size, side.codomain.size)) * there:
                return False
        return True

    def _attainable(self, y: Tensors, forward: float, sizes: tuple[float, float], *, random: bool) -> float:
        """Return the largest rounding noise at y that any correct adjoint may need."""
        # A sum of n terms in an unlucky order loses about √n eps. An adjoint with internal cancellation loses as much
        # as A or the derived adjoint, up to a small factor. An adjoint that computes in a coarser dtype loses more.
        units = min(max(64.0, math.sqrt(max(self.domain.size, self.codomain.size))), 512.0)
        most = max(units * self.eps, 8 * forward / sizes[0] if sizes[0] else 0.0) * sizes[1]
        if self._trusted is None:
            assert self.reference is not None
            self._trusted = (self.reference(),)
        (side,) = self._trusted
        if side is not None:
            most = max(most, 8 * self._noise_of(side, y, side(y), random=random))
        return most

    def _starts_at_zero(self) -> bool:
        """Return whether A(0) = 0 and B(0) = 0; otherwise, a measurement shows the offset and not rounding."""
        if self._through_zero is None:
            self._through_zero = True
            for side in (self.forward, self.adjoint):
                zero = side.space.leaves(side.space.zeros())
                self._through_zero &= vanishes(side.codomain, side(zero))
        return self._through_zero

    def missed_row_probability(self) -> float:
        """Return the probability that all random draws miss an error ``e dᴴ`` that makes one row of A wrong.

        Here e is a unit vector and ``‖d‖ = ‖A‖_F / √m``, the norm of a typical row. The gap of a draw is an entry of y
        times a normal number of standard deviation ‖d‖. The draws miss the error if every gap is within the tolerance.

        Returns
        -------
        float
            The probability, from 0 to 1.
        """
        trials = [n for n in self._norms if n[2] or n[3]]
        if not trials or not self._rows:
            return 1.0
        row = math.sqrt(sum(n[2] ** 2 for n in trials) / len(trials) / self.codomain.size)
        if row == 0.0:
            return 1.0
        draws = (len(self._rows) + 1) // 2  # omit the pairs (k, k + 1), which are not independent
        return product_within(max(self._rows) / row, self._kind_of_product()) ** draws

    def _kind_of_product(self) -> tuple[bool, float]:
        """Return whether inner products are complex, and the standard deviation of a product of real coordinates."""
        halves = sum(space.is_complex for space in (self.domain, self.codomain))
        return (True, 1.0) if self.exact and halves == 2 else (False, 2.0 ** (-halves / 2))


def _random_within(space: Space, image: Tensors, numbers: Tensors) -> Tensors:
    """Return random numbers weighted by an image that is scaled to a largest entry of one."""
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in image]
    # No process knows the largest entry of a sharded image; scaling by its norm works as well.
    largest = norm(tuple(wide), space) if space.is_sharded else max(float(t.abs().max()) for t in wide)
    return tuple(((t / largest) * r).to(r.dtype) for t, r in zip(wide, numbers, strict=True))


def _scaled_image(side: CheckedMap, at_z: Tensors, z: Tensors, power: int) -> Tensors | None:
    """Return ``2⁻ᵖ f(2ᵖ z)``, which is exactly ``f(z)`` for a linear f, or None if it may overflow."""
    limit = min(torch.finfo(t.dtype).max for t in (*z, *at_z))
    fits = limit >= 1e30 and max(float(t.abs().max()) for t in (*z, *at_z)) * 2.0 ** (2 * abs(power)) <= limit
    if not side.space.every(fits):
        return None
    try:
        image = side(tuple(t * 2.0**power for t in z))
    except BrokenError:  # perhaps an overflow inside
        return None
    return tuple(t * 2.0**-power for t in image)


def product_within(bound: float, kind: tuple[bool, float]) -> float:
    """Return ``P(|u v| ≤ bound)`` for normal u and v: both complex of variance one, or real with a scaled product."""
    u = torch.logspace(-9, 1.2, 4001, dtype=torch.float64, device="cpu")
    if kind[0]:
        density, within = 2 * u * torch.exp(-u.square()), -torch.expm1(-(bound / u).square())
    else:
        density = math.sqrt(2 / math.pi) * torch.exp(-u.square() / 2)
        within = torch.erf(bound / kind[1] / u / math.sqrt(2))
    return float(torch.trapezoid(density * within, u).clamp(0, 1))


__all__ = ["DotTest", "product_within"]
