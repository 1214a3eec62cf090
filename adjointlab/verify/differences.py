r"""Finite differences of a function along a direction, entry by entry, each with a bound of its own error.

Along d, with ``f₊ = f(x₀ + h d)`` and ``f₋ = f(x₀ − h d)``, two numbers say all: the central difference
``D(h) = (f₊ − f₋) / 2h``, which is ``J d + O(h²)``, and the second difference ``S(h) = f₊ + f₋ − 2 f(x₀)``, which is
``h² f″ + O(h⁴)``. Taylor's remainder is ``S/2 ± h (D − J d)``, and ``|S| / h`` is the gap between the two one-sided
differences. With steps H and ``h = H / r``, Richardson's ``D(h) + (D(h) − D(H)) / (r² − 1)`` is the estimate, and

    |D(h) − D(H)| + |r² S(h) − S(H)| / H + rounding / h

bounds its error. The first term is the larger part of what Richardson removes. The second is ``O(h³)`` for a smooth
function; where the function has a kink within reach of H, at a distance δ, the first is ``3 g δ / 2H`` or more and the
second is ``g |3 − 15 δ/H|`` for a jump g of the slope, and they exceed the error for every δ. Rounding is the larger of
a few units in the last place and what f is seen to move where x₀ moves by a unit in its last place.

Every entry takes the step with the least bound. So truncation and rounding balance by themselves, in each entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adjointlab.numerics import DOT_UNITS, SIGMAS, UNITS, wide
from adjointlab.operators import LinearOperator

Tensors = tuple[Tensor, ...]
Function = Callable[[Tensors], Tensors]

RATIO = 4.0  # of a step and the next
_FIRST = 3  # the largest step is 2^-3 of the norm of the point
_MOST_ENTRIES = 4096  # that are looked at again
_NEARBY = (1, 3)  # how many points near x0 measure rounding; four times as many where something is doubtful


def flat(leaves: Tensors) -> Tensor:
    """Return all entries as one vector in double precision."""
    return torch.cat([wide(t.detach().resolve_conj()).reshape(-1) for t in leaves])


@dataclass(frozen=True)
class Along:
    """What was seen along one direction: for every entry of the result, in the order of its leaves."""

    name: str
    direction: Tensors
    predicted: Tensor  # J d
    estimate: Tensor  # of the derivative along d, by differences
    bound: Tensor  # of the error of the estimate
    kinks: Tensor  # which entries have one-sided differences that stay apart
    curves: tuple[tuple[tuple[float, float, float], ...], ...]  # (h, remainder, its rounding), for every leaf
    calls: int = field(default=0)

    @property
    def gap(self) -> Tensor:
        """``|estimate − J d|``."""
        return (self.estimate - self.predicted).abs()

    @property
    def wrong(self) -> Tensor:
        """Which entries of J d no error of the estimate explains."""
        return ~(self.gap <= self.bound)


class Differences:
    """The differences of f at a point, and the J that is tested."""

    def __init__(self, f: Function, J: LinearOperator, point: Tensors, seed: int) -> None:
        self.f, self.J, self.point, self.domain, self.codomain = f, J, point, J.domain, J.codomain
        self.generator = torch.Generator().manual_seed(seed)
        self.value = flat(f(point))
        self.eps = max(J.domain.eps, J.codomain.eps)
        self.sizes = [t.numel() for t in J.codomain.leaves(J.codomain.zeros())]
        self.digits = round(-math.log2(self.eps))
        self.calls = 1
        self.tiny = max(torch.finfo(spec.dtype).tiny for spec in J.codomain.specs)
        self.noise = self._noise_at_point(_NEARBY[1])

    def draw(self, leaf: int | None = None) -> Tensors:
        """Return a random direction, with the norm of the point in every leaf; or in one leaf alone."""
        drawn = self.domain.leaves(self.domain.randn(self.generator))

        def scaled(index: int, x: Tensor, d: Tensor) -> Tensor:
            if leaf not in {None, index}:
                return torch.zeros_like(d)
            size = float(torch.linalg.vector_norm(wide(x.detach()))) / max(1, x.numel()) ** 0.5
            return d * (size or 1.0)

        return tuple(scaled(i, x, d) for i, (x, d) in enumerate(zip(self.point, drawn, strict=True)))

    def along(self, name: str, direction: Tensors) -> Along:
        """Return the derivative along a direction by differences, beside J d."""
        begun = self.calls
        predicted = self._pushed(direction)
        slopes = self._noise_of_J(direction, predicted, _NEARBY[0])
        everywhere = torch.arange(len(predicted), device=predicted.device)
        steps = [2.0**-k for k in range(_FIRST, max(_FIRST + 5, round(0.45 * self.digits) + 1), 2)]
        ladder = self._ladder(direction, steps, everywhere, predicted)
        estimate, bound = ladder.best(self.noise, slopes, int(math.log2(RATIO)) // 2)
        kinks = torch.zeros_like(bound, dtype=torch.bool)
        doubtful = self._doubtful(predicted, estimate, bound)
        if len(doubtful):
            self.noise = torch.maximum(self.noise, self._noise_at_point(4 * _NEARBY[1]))
            slopes = torch.maximum(slopes, self._noise_of_J(direction, predicted, 4 * _NEARBY[0]))
            closer = [2.0**-k for k in range(_FIRST, max(_FIRST + 5, self.digits - 3))]
            again = self._ladder(direction, closer, doubtful, predicted)
            noise, own = self.noise[doubtful], slopes[doubtful]
            estimate[doubtful], bound[doubtful] = again.best(noise, own, int(math.log2(RATIO)), neighbours=True)
            kinks[doubtful] = again.kinks(noise, math.sqrt(self.eps))
        curves = self._curves(ladder)
        return Along(name, direction, predicted, estimate, bound, kinks, curves, self.calls - begun)

    def _doubtful(self, predicted: Tensor, estimate: Tensor, bound: Tensor) -> Tensor:
        """Return the entries whose estimate is not as good as smooth functions have it, or is not J d."""
        found = []
        for p, e, b in zip(*(t.split(self.sizes) for t in (predicted, estimate, bound)), strict=True):
            scale = torch.maximum(p.abs(), e.abs().nan_to_num(0.0, 0.0)).max() if len(p) else 0.0
            found.append(~((e - p).abs() <= b) | ~(b <= self.eps ** (1 / 3) * scale))
        chosen = torch.cat(found) & (bound > 0)
        return chosen.nonzero().flatten()[:_MOST_ENTRIES]

    def _called(self, leaves: Tensors) -> Tensor:
        """Return the entries of ``f(x)``; NaN where x is outside of the domain of a factorization."""
        self.calls += 1
        try:
            return flat(self.f(leaves))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            return torch.full_like(self.value, math.nan)

    def _pushed(self, d: Tensors) -> Tensor:
        return flat(self.codomain.leaves(self.J(self.domain.unflatten(d))))

    def _moved(self, leaves: Tensors) -> Tensors:
        drawn = self.domain.leaves(self.domain.randn(self.generator))
        return tuple(t * (1 + torch.finfo(t.dtype).eps * r) for t, r in zip(leaves, drawn, strict=True))

    def _noise_at_point(self, times: int) -> Tensor:
        """Return how far each entry of ``f(x₀)`` moves where x₀ moves by rounding."""
        moves = [(self._called(self._moved(self.point)) - self.value).abs() for _ in range(times)]
        return torch.stack(moves).amax(0).nan_to_num(0.0)

    def _noise_of_J(self, d: Tensors, predicted: Tensor, times: int) -> Tensor:
        """Return the rounding error of each entry of J d: a few units of its leaf, or as measured."""
        moves = [(self._pushed(self._moved(d)) - predicted).abs() for _ in range(times)]
        typical = [
            torch.full_like(p.abs(), float(p.norm()) / max(1, len(p)) ** 0.5) for p in predicted.split(self.sizes)
        ]
        return SIGMAS * torch.stack(moves).amax(0) + UNITS * self.eps * torch.cat(typical)

    def _ladder(self, d: Tensors, steps: list[float], entries: Tensor, predicted: Tensor) -> _Ladder:
        central, second, sizes, remainders = [], [], [], []
        for h in steps:
            sides = [
                self._called(tuple(x + s * h * t for x, t in zip(self.point, d, strict=True))) for s in (1.0, -1.0)
            ]
            misfits = (sides[0] - self.value - h * predicted, sides[1] - self.value + h * predicted)
            remainders.append(torch.stack(misfits).abs().square().sum(0))
            plus, minus, value = sides[0][entries], sides[1][entries], self.value[entries]
            central.append((plus - minus) / (2 * h))
            second.append((plus - value) + (minus - value))
            sizes.append(plus.abs() + minus.abs())
        rounding = DOT_UNITS * self.eps * torch.stack(sizes) + self.tiny
        totals = [[float(part.sum()) ** 0.5 for part in r.split(self.sizes)] for r in remainders]
        return _Ladder(
            torch.tensor(steps, dtype=torch.float64, device=self.value.device)[:, None],
            torch.stack(central),
            torch.stack(second),
            rounding,
            totals,
        )

    def _curves(self, ladder: _Ladder) -> tuple[tuple[tuple[float, float, float], ...], ...]:
        """Return Taylor's remainder of each leaf at each step, and what rounding makes of it."""
        noise = [float(n.norm()) for n in (self.noise + DOT_UNITS * self.eps * self.value.abs()).split(self.sizes)]
        steps = ladder.steps.flatten().tolist()
        return tuple(
            tuple((h, total[k], noise[k]) for h, total in zip(steps, ladder.remainders, strict=True))
            for k in range(len(self.sizes))
        )


@dataclass(frozen=True)
class _Ladder:
    """Central and second differences of some entries at steps that shrink; a row for each step."""

    steps: Tensor
    central: Tensor
    second: Tensor
    rounding: Tensor
    remainders: list[list[float]]

    def best(self, noise: Tensor, own: Tensor, apart: int, *, neighbours: bool = False) -> tuple[Tensor, Tensor]:
        """Return the estimate with the least bound, and the bound, for each entry."""
        h, H = self.steps[apart:], self.steps[:-apart]
        fine, coarse = self.central[apart:], self.central[:-apart]
        second = (RATIO**2 * self.second[apart:] - self.second[:-apart]).abs() / H
        bounds = (fine - coarse).abs() + second + (self.rounding[apart:] + SIGMAS * noise) / h + own
        bounds = bounds.nan_to_num(math.inf, math.inf)
        estimates = fine + (fine - coarse) / (RATIO**2 - 1)
        if neighbours:  # which have other rounding errors, so that a bound is not small by chance
            padded = torch.cat([bounds[:1], bounds, bounds[-1:]])
            bounds = torch.stack([padded[:-2], bounds, padded[2:]]).amax(0)
        bound, row = bounds.min(0)
        return estimates.gather(0, row[None])[0], bound

    def kinks(self, noise: Tensor, near: float) -> Tensor:
        """Return which entries have one-sided differences that differ as much at all steps down to rounding."""
        gaps = (self.second.abs() / self.steps).nan_to_num(0.0, 0.0)
        blur = (self.rounding + SIGMAS * noise) / self.steps
        rows = torch.arange(len(gaps), device=gaps.device)[:, None].expand_as(gaps)
        last = torch.where(blur <= gaps / 4, rows, -1).amax(0, keepdim=True)  # the least step at which a gap is seen
        at = last.clamp(min=2)
        gap = gaps.gather(0, at)
        # At steps that would show a gap of this size there is none: the kink is not at the point.
        unseen = (blur <= gap / 4) & (rows > at) & (gaps < gap / 2)
        steady = (gaps.gather(0, at - 1) < 1.5 * gap) & (gaps.gather(0, at - 2) < 2 * gap)
        is_near = self.steps.expand_as(gaps).gather(0, at) <= near
        return ((last >= 2) & steady & is_near)[0] & ~unseen.any(0)
