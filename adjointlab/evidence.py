"""The laws of linear maps, tested on random numbers: evidence where there is no proof."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adjointlab.errors import NotDifferentiableError
from adjointlab.modules import attributes_kept, buffers_kept
from adjointlab.numerics import (
    DOT_UNITS,
    SIGMAS,
    UNITS,
    commutes_with_i,
    dot_gap,
    full_precision,
    rounding_noise,
    safe_scale,
)
from adjointlab.space import Space
from adjointlab.transpose import Derivation, Eager, Transposition
from adjointlab.transpose.frontend.vjp import REFUSALS
from adjointlab.transpose.selfcheck import Pair, Sketch, dot_holds

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Counterexample:
    """A law of linear maps that fails: ``‖left − right‖ = gap`` where rounding explains ``allowed``."""

    law: str
    gap: float
    allowed: float
    arguments: tuple[Any, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return f"{self.law} fails: the two sides differ by {self.gap:.2e}, where rounding explains {self.allowed:.1e}"


DETERMINISM = "f(x) = f(x), the same call twice,"
_FINITE = "f(x) is finite"
_DRAWS = 32  # of a function that draws random numbers: that none shows, if each shows in half of all calls, is 2⁻³²


class Numbers:
    """The laws of linear maps, each on random arguments; leaves in and out, so that nothing is checked twice."""

    def __init__(self, map_: Transposition, derivation: Derivation, domain: Space, seed: int) -> None:
        self.map, self.derivation = map_, derivation
        self.domain, self.codomain = domain, map_.codomain.with_batch(domain.batch_shape)
        self.spaces = self.domain, self.codomain
        self.generator = torch.Generator().manual_seed(seed)
        self.offset = 0.0
        self.commutes: bool | None = None  # with i, where that is known

    def draw(self, space: Space) -> Tensors:
        """Return the leaves of a random element."""
        return space.leaves(space.randn(self.generator))

    @property
    def zero(self) -> Tensors:
        """The leaves of zero in the domain."""
        return self.domain.leaves(self.domain.zeros())

    def f(self, x: Tensors, times: int = 1) -> Tensors:
        """Return the leaves of ``f(x)``, of the last of several calls."""
        return tuple(t.detach() for t in self.map.eager.called(x, times=times))

    def linear(self, x: Tensors, leaf: int | None = None) -> Tensors:
        """Return ``f(x) − f(0)``, or one leaf of it."""
        return _only(_minus(self.f(x), self.f(self.zero)), leaf)

    def adjoint(self, y: Tensors, leaf: int | None = None) -> Tensors:
        """Return ``f'ᴴ y``, or one leaf of it: the derived one where there is one, else autograd's."""
        return _only(tuple(t.detach() for t in self.derivation.function("adjoint")(y)), leaf)

    def norm(self, y: Tensors) -> float:
        """Return ``‖y‖``."""
        return float(self.codomain.norm(self.codomain.unflatten(y)))

    def norms(self, y: Tensors) -> list[float]:
        """Return the norm of each leaf, since a large one is to hide nothing in a small one."""
        return [self.norm(_only(y, k)) for k in range(len(y))]

    @full_precision
    def counterexample(self) -> Counterexample | None:
        """Return the first law that fails: the same result twice, additivity, homogeneity at numbers of all sizes."""
        x, z = self.draw(self.domain), self.draw(self.domain)
        at_zero, at_x, at_z = self.f(self.zero), self.f(x), self.f(z)
        if not self.domain.every(all(bool(torch.isfinite(t).all()) for t in (*at_zero, *at_x, *at_z))):
            return Counterexample(_FINITE, float("nan"), 0.0, (x,))
        self.offset = self.norm(at_zero)
        scales = [sum(sizes) for sizes in zip(*map(self.norms, (at_x, at_z, at_zero)), strict=True)]
        rounding = UNITS * self.codomain.eps
        before = torch.get_rng_state()
        twice = self.f(x, times=2)
        # A few numbers may be drawn alike by chance. All processes call alike, whichever of them has drawn.
        if not self.domain.every(torch.equal(before, torch.get_rng_state())):
            twice = max((self.f(x) for _ in range(_DRAWS)), key=lambda y: self.norm(_minus(y, at_x)))
        for again, scale in zip(self.norms(_minus(twice, at_x)), scales, strict=True):
            if again > rounding * scale:
                return Counterexample(DETERMINISM, again, rounding * scale, (x,))

        eps = self.domain.eps
        nudged = tuple(t * (1 + eps * r) for t, r in zip(x, self.draw(self.domain), strict=True))

        def violated(
            law: str, left: Tensors, right: Tensors, size: float, *arguments: Any, at: Tensors = x
        ) -> Counterexample | None:
            gaps, bounds = self.norms(_minus(left, right)), [rounding * size * scale for scale in scales]
            if any(gap > bound for gap, bound in zip(gaps, bounds, strict=True)):
                # Cancellation inside? Then the result moves as much when x moves by rounding.
                moved = self.norms(_minus(self.f(nudged), at_x))
                bounds = [bound + 4 * UNITS * size * noise for bound, noise in zip(bounds, moved, strict=True)]
                if size < 1.0:  # numbers inside that are not small may decide, by rounding no larger than at one
                    pairs = zip(self._noises(at, left), self._noises(x, at_x), strict=True)
                    bounds = [b + SIGMAS * min(small, 2 * one) for b, (small, one) in zip(bounds, pairs, strict=True)]
            found = [pair for pair in zip(gaps, bounds, strict=True) if not pair[0] <= pair[1]]
            return Counterexample(law, *found[0], arguments) if found else None

        a, b = 0.75, -0.5  # exact in every dtype
        combined = self.f(tuple(a * s + b * t for s, t in zip(x, z, strict=True)))
        rest = 1 - a - b
        right = tuple(a * s + b * t + rest * u for s, t, u in zip(at_x, at_z, at_zero, strict=True))
        found = violated("f(αx + βz) = α f(x) + β f(z)" + self._offset(), combined, right, 1.0, x, z)
        far = safe_scale((*x, *at_x))
        for s in dict.fromkeys((-1.0, 2.0**-6, min(2.0**6, far), 1 / far, far)):
            if found is not None:
                break
            at = tuple(s * t for t in x)
            left = self.f(at)
            right = tuple(s * t + (1 - s) * u for t, u in zip(at_x, at_zero, strict=True))
            size = max(abs(s), 1.0) if self.offset else abs(s)
            found = violated(f"f({s:g} x) = {s:g} f(x)" + self._offset(), left, right, size, x, at=at)
        return found

    def _noises(self, x: Tensors, at_x: Tensors) -> list[float]:
        """Return the measured rounding noise of each leaf of ``f(x)``."""

        def leaf(k: int) -> float:
            return rounding_noise(lambda z: _only(self.f(z), k), self.domain, self.codomain, x, _only(at_x, k))

        return [leaf(k) for k in range(len(at_x))]

    def _offset(self) -> str:
        return ", apart from f(0)," if self.offset else ""

    @full_precision
    def is_affine_at_points(self, user: Eager, seen: Sketch | None) -> bool:
        """Return whether f at x, at 0 and far away, with its pull-back there, is one affine map."""
        # Three calls, of which one may have been ``seen`` before, and two of the pull-back. Where there are several
        # leaves, or random numbers are drawn, there is more to look at.
        if any(len(space.specs) > 1 or space.is_sharded for space in self.spaces):
            return False
        near, zero, before = Pair(self.domain, self.codomain), self.zero, torch.get_rng_state()
        x, y = near.x, near.y
        is_complex = all(space.specs[0].is_complex for space in (self.domain, self.codomain))
        w = y if is_complex else replace(near, y_seed=near.y_seed + 6).y
        # One call after the other, so that what one leaves behind shows in the next.
        with attributes_kept(user.modules), user.explained():
            at_x = Sketch.of(user.tried(x), y) if seen is None else seen
            z = self._elsewhere(x, at_x)
            at_zero = user.tried(zero)
            self.offset = self.norm(at_zero)
            try:
                found, at_y = user.linearized(z, y)
                if is_complex:  # a map commutes with i where its adjoint does
                    self.commutes = commutes_with_i(lambda v: at_y if v is y else found.pull_back(v), y, self.domain)
                at_w = at_y if is_complex else found.pull_back(w)
            except (NotDifferentiableError, *REFUSALS):
                return False
        at_z = Sketch.of(_minus(found.outputs, at_zero), w)
        holds = dot_holds(x, y, at_x.minus(Sketch.of(at_zero, y)), at_y, *self.spaces)
        holds = holds and dot_holds(z, w, at_z, at_w, *self.spaces)
        if not holds or not torch.equal(before, torch.get_rng_state()):
            self.commutes = None
            return False
        user.keep(found)
        return True

    def _elsewhere(self, x: Tensors, at_x: Sketch) -> Tensors:
        """Return numbers of all sizes and of other signs than x, as has their sum: a function may decide by each."""
        (t,), (spec,), (size,) = x, self.codomain.specs, at_x.norms
        most = safe_scale((t, torch.tensor(size, dtype=torch.float64).to(spec.dtype)))
        at_random = 2 * torch.rand(t.shape, generator=torch.Generator().manual_seed(26), device="cpu") - 1
        sizes = torch.exp2(math.log2(most) * at_random).to(t.device, t.real.dtype)
        along = (t * t.sum().conj()).real
        with_sum, against = ((sizes * along.abs())[part].sum() for part in (along > 0, along <= 0))
        if bool(with_sum <= against):
            sizes = torch.where(along > 0, (sizes * 2 * against / with_sum).clamp(max=most), sizes)
        return (-t * sizes,)

    @full_precision
    def is_complex_linear(self) -> bool:
        """Return whether ``f(ix) − f(0) = i (f(x) − f(0))``, as far as the spaces are complex."""
        if self.commutes is not None:
            return self.commutes
        if not any(space.is_complex for space in self.spaces):
            return True
        if not all(spec.is_complex for space in self.spaces for spec in space.specs):
            return False
        with buffers_kept(self.map.modules), torch.no_grad():
            at_zero = self.f(self.zero)
            return commutes_with_i(lambda x: _minus(self.f(x), at_zero), self.draw(self.domain), self.codomain)

    @full_precision
    def adjoint_agrees(self) -> bool:
        """Return whether ``Re⟨f(x) − f(0), y⟩ = Re⟨x, f'ᴴ y⟩`` for random x and y."""
        m, n = len(self.domain.specs), len(self.codomain.specs)
        # A leaf at a time besides: a large one is to hide nothing in a small one.
        alone = [*((j, None) for j in range(m)), *((None, k) for k in range(n))] if m > 1 or n > 1 else []
        for j, k in [(None, None)] * 3 + alone:
            x, y = _only(self.draw(self.domain), j), _only(self.draw(self.codomain), k)
            at_x, at_y = self.linear(x, k), self.adjoint(y, j)
            known = (DOT_UNITS * self.codomain.eps * self.offset, 0.0)  # f(x) is rounded before f(0) is subtracted
            gap, allowed = dot_gap(self.domain, self.codomain, x, at_x, y, at_y, exact=False, noise=known)
            if not gap <= allowed:
                # Measured, of a function that is known to be affine.
                forward = rounding_noise(partial(self.linear, leaf=k), self.domain, self.codomain, x, at_x)
                backward = rounding_noise(partial(self.adjoint, leaf=j), self.codomain, self.domain, y, at_y)
                noise = (SIGMAS * forward + known[0], SIGMAS * backward)
                gap, allowed = dot_gap(self.domain, self.codomain, x, at_x, y, at_y, exact=False, noise=noise)
            if not gap <= allowed:
                return False
        return True


def _only(leaves: Tensors, index: int | None) -> Tensors:
    """Return leaves of which all but one are zero, the leaves themselves where none is chosen."""
    if index is None or len(leaves) == 1:
        return leaves
    return tuple(t if i == index else torch.zeros_like(t) for i, t in enumerate(leaves))


def _minus(a: Tensors, b: Tensors) -> Tensors:
    return tuple((s - t).detach() for s, t in zip(a, b, strict=True))
