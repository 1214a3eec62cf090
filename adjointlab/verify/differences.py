r"""Finite differences of a function along a direction, entry by entry, each with a bound of its own error.

Along d, with ``f₊ = f(x₀ + h d)`` and ``f₋ = f(x₀ − h d)``, two numbers say all: the central difference
``D(h) = (f₊ − f₋) / 2h``, which is ``J d + O(h²)``, and the second difference ``S(h) = f₊ + f₋ − 2 f(x₀)``, which is
``h² f″ + O(h⁴)``. Taylor's remainder is ``S/2 ± h (D − J d)``, and ``|S| / h`` is the gap between the two one-sided
differences. With steps H and ``h = H / r``, Richardson's ``D(h) + (D(h) − D(H)) / (r² − 1)`` is the estimate, and

    |D(h) − D(H)| + |r² S(h) − S(H)| / H + rounding / h

bounds its error. The first term is the larger part of what Richardson removes. The second is ``O(h³)`` for a smooth
function; where the function has a kink within reach of H, at a distance δ, the first is ``3 g δ / 2H`` or more and the
second is ``g |3 − 15 δ/H|`` for a jump g of the slope, and they exceed the error for every δ. Rounding is a few
units in the last place, and what f is seen to move where x₀ moves by a unit in its last place.

Every entry takes the step with the least bound. So truncation and rounding balance by themselves, in each entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adjointlab.numerics import DOT_UNITS, MULTIPLES, SIGMAS, UNITS, nudged, wide
from adjointlab.operators import LinearOperator
from adjointlab.space import Space

Tensors = tuple[Tensor, ...]
Function = Callable[[Tensors], Tensors]

RATIO = 4.0  # of a step and the next
_FIRST = 3  # the largest step is 2^-3 of the norm of the point
_MOST_ENTRIES = 4096  # that are looked at again
_NEARBY = 4  # how many points nearby measure rounding; four times as many where something is doubtful


def flat(leaves: Tensors) -> Tensor:
    """Return all entries as one vector in double precision."""
    return torch.cat([wide(t.detach().resolve_conj()).reshape(-1) for t in leaves])


def _sizes(space: Space) -> list[int]:
    return [spec.numel for spec in space.specs]


def _typical(entries: Tensor, space: Space) -> Tensor:
    """Return for each entry the root mean square of its leaf."""
    parts = entries.abs().split(_sizes(space))
    return torch.cat([torch.full_like(t, float(t.norm()) / max(1, len(t)) ** 0.5) for t in parts])


@dataclass(frozen=True)
class Along:
    """The differences along one direction: for every entry of the result, in the order of its leaves."""

    name: str
    direction: Tensors
    predicted: Tensor  # J d
    estimate: Tensor  # of the derivative along d, by differences
    bound: Tensor  # of the error of the estimate
    rounding: Tensor  # of J d
    kinks: Tensor  # which entries have one-sided differences that stay apart
    curves: tuple[tuple[tuple[float, float, float], ...], ...]  # (h, remainder, its rounding), for every leaf

    @property
    def gap(self) -> Tensor:
        """``|estimate − J d|``, zero where there is no estimate."""
        return torch.where(self.bound.isfinite(), (self.estimate - self.predicted).abs(), 0.0)

    @property
    def wrong(self) -> Tensor:
        """Which entries of J d no error of the estimate explains; without an estimate, the bound is infinite."""
        return (self.bound.isfinite() & ~(self.gap <= self.bound)) | ~self.predicted.isfinite()


class Differences:
    """The differences of f at a point, and the J that is tested."""

    def __init__(self, f: Function, J: LinearOperator, point: Tensors, seed: int) -> None:
        self.f, self.J, self.point, self.domain, self.codomain = f, J, point, J.domain, J.codomain
        self.generator = torch.Generator().manual_seed(seed)
        self.value = flat(f(point))
        self.eps = max(J.domain.eps, J.codomain.eps)
        self.sizes = _sizes(J.codomain)
        self.digits = round(-math.log2(self.eps))
        self.calls = 1
        self.tiny = max(torch.finfo(spec.dtype).tiny for spec in J.codomain.specs)
        self.noise = self._noise_at_point(_NEARBY)

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
        predicted, slopes = self._linear(self.J, direction, _NEARBY)
        self._know_coarse(predicted, slopes)
        everywhere = torch.arange(len(predicted), device=predicted.device)
        steps = [2.0**-k for k in range(_FIRST, max(_FIRST + 5, round(0.45 * self.digits) + 1), 2)]
        ladder = self._ladder(direction, steps, everywhere, predicted)
        estimate, bound = ladder.best(self.noise, slopes, self.eps)
        kinks = torch.zeros_like(bound, dtype=torch.bool)
        doubtful = self._doubtful(predicted, estimate, bound)
        if len(doubtful):
            self.noise = torch.maximum(self.noise, self._noise_at_point(4 * _NEARBY))
            slopes = torch.maximum(slopes, self._linear(self.J, direction, 4 * _NEARBY)[1])
            closer = [2.0**-k for k in range(_FIRST, max(_FIRST + 5, self.digits - 3))]
            again = self._ladder(direction, closer, doubtful, predicted)
            noise, own = self.noise[doubtful], slopes[doubtful]
            estimate[doubtful], bound[doubtful] = again.best(noise, own, self.eps, neighbours=True)
            bound[doubtful] = torch.where(again.is_stuck(predicted[doubtful]), math.inf, bound[doubtful])
            kinks[doubtful] = again.kinks(noise, math.sqrt(self.eps))
        curves = self._curves(ladder)
        return Along(name, direction, predicted, estimate, bound, slopes, kinks, curves)

    def _know_coarse(self, predicted: Tensor, slopes: Tensor) -> None:
        """Let the noise of f be no less than that of J, where J shows that numbers inside have fewer digits."""
        size = _typical(predicted, self.codomain)
        share = _typical(slopes, self.codomain) / torch.where(size > 0, size, math.inf)
        coarse = torch.where(share > self.eps**0.75, share, 0.0) * _typical(self.value, self.codomain)
        self.noise = torch.maximum(self.noise, coarse)

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

    def _moved(self, leaves: Tensors, space: Space) -> Tensors:
        drawn = space.leaves(space.randn(self.generator))
        return nudged(leaves, drawn)

    def _noise_at_point(self, times: int) -> Tensor:
        """Return how far each entry of ``f(x₀)`` moves where x₀ moves by rounding."""
        moves = [(self._called(self._moved(self.point, self.domain)) - self.value).abs() for _ in range(times)]
        return torch.stack(moves).amax(0).nan_to_num(0.0)

    def _linear(self, A: LinearOperator, z: Tensors, times: int) -> tuple[Tensor, Tensor]:
        """Return the entries of ``A z``, and the rounding error of each: a few units of its leaf, or as measured."""
        nearby = [(1.0, self._moved(z, A.domain)) for _ in range(times)]
        # Multiples show what a coarser dtype inside makes of it, as in rounding_noise.
        nearby += [(s, tuple(s * t for t in z)) for s in MULTIPLES]

        def image(u: Tensors) -> Tensor:
            return flat(A.codomain.leaves(A(A.domain.unflatten(u))))

        at_z = image(z)
        noise = torch.stack([(image(u) - s * at_z).abs() for s, u in nearby]).amax(0)
        return at_z, SIGMAS * noise + UNITS * self.eps * _typical(at_z, A.codomain)

    def dot_gaps(self, seen: Sequence[Along]) -> list[tuple[float, float]]:
        """Return ``|⟨J d, v⟩ − ⟨d, Jᴴ v⟩|`` and what rounding explains, for v in each leaf and each d that was seen."""
        found = []
        for k in range(len(self.sizes)):
            drawn = self.codomain.leaves(self.codomain.randn(self.generator))
            v = tuple(t if i == k else torch.zeros_like(t) for i, t in enumerate(drawn))
            (back, blur), y = self._linear(self.J.H, v, _NEARBY), flat(v)
            for along in seen:
                d = flat(along.direction)
                gap = (along.predicted.conj() * y).sum() - (d.conj() * back).sum()
                allowed = float((along.rounding * y.abs()).sum() + (blur * d.abs()).sum()) + self.tiny
                part = along.predicted[y != 0]
                scale = max(float(part.norm() * y.norm()), float(d.norm() * back.norm())) or 1.0
                found.append((float((gap if self.J.is_complex_linear else gap.real).abs()) / scale, allowed / scale))
        return found

    def _ladder(self, d: Tensors, steps: list[float], entries: Tensor, predicted: Tensor) -> _Ladder:
        central, second, sizes, remainders = [], [], [], []
        for h in steps:
            moved = [tuple(x + s * h * t for x, t in zip(self.point, d, strict=True)) for s in (1.0, -1.0)]
            sides = list(map(self._called, moved))
            misfits = (sides[0] - self.value - h * predicted, sides[1] - self.value + h * predicted)
            remainders.append(torch.stack(misfits).abs().square().sum(0))
            plus, minus, value = sides[0][entries], sides[1][entries], self.value[entries]
            central.append((plus - minus) / (2 * h))
            second.append((plus - value) + (minus - value))
            leaf = sum(_typical(side.nan_to_num(0.0, 0.0), self.codomain)[entries] for side in sides)
            sizes.append(DOT_UNITS * (plus.abs() + minus.abs()) + leaf)
        rounding = self.eps * torch.stack(sizes) + self.tiny
        totals = [[float(part.sum()) ** 0.5 for part in r.split(self.sizes)] for r in remainders]
        heights = torch.tensor(steps, dtype=torch.float64, device=self.value.device)[:, None]
        return _Ladder(heights, torch.stack(central), torch.stack(second), rounding, totals)

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

    def best(self, noise: Tensor, own: Tensor, eps: float, *, neighbours: bool = False) -> tuple[Tensor, Tensor]:
        """Return the estimate with the least bound, and the bound, for each entry."""
        apart = round(math.log(RATIO) / math.log(float(self.steps[0] / self.steps[1])))
        h, H = self.steps[apart:], self.steps[:-apart]
        fine, coarse = self.central[apart:], self.central[:-apart]
        second = (RATIO**2 * self.second[apart:] - self.second[:-apart]).abs() / H
        truncation, rounding = (fine - coarse).abs() + second, (self.rounding[apart:] + SIGMAS * noise) / h + own
        # Truncation shrinks with the step; where it has grown at some smaller step, the step is too large.
        seen = torch.where(truncation > rounding, truncation, 0.0)
        later = seen.flip(0).cummax(0).values.flip(0)[1:]
        grows = later > torch.maximum(truncation, rounding)[:-1]
        bounds = (truncation + rounding).nan_to_num(math.inf, math.inf)
        bounds[:-1][grows] = math.inf
        # Where x0 moves by rounding, and f by much of all that it moves, it is too rough for differences.
        is_rough = (noise > eps**-0.5 / DOT_UNITS * self.rounding.nan_to_num(0.0).amax(0)) & (
            16 * noise > (2 * self.steps * self.central.abs()).nan_to_num(0.0).amax(0)
        )
        bounds[:, is_rough] = math.inf
        estimates = fine + (fine - coarse) / (RATIO**2 - 1)
        if neighbours:  # which have other rounding errors, so that a bound is not small by chance
            padded = torch.cat([bounds[:1], bounds, bounds[-1:]])
            bounds = torch.stack([padded[:-2], bounds, padded[2:]]).amax(0)
        bound, row = bounds.min(0)
        best = estimates.gather(0, row[None])[0]
        # Where other steps contradict it, as where f is so coarse that it does not move, it is not trusted.
        apart_by = (estimates - best).abs().nan_to_num(0.0, 0.0)
        contradicts = bounds.isfinite() & (apart_by > bounds + bound)
        return best, torch.maximum(bound, torch.where(contradicts, apart_by + bounds, 0.0).amax(0))

    def is_stuck(self, predicted: Tensor) -> Tensor:
        """Return which entries move at some steps, but not at the smallest, where J d would have them move."""
        # So do results that are rounded to fewer digits than their dtype has.
        still = (self.central[-3:].abs() + self.second[-3:].abs()).amax(0) == 0
        return still & (self.central.abs().amax(0) > 0) & (predicted.abs() * self.steps[-3] > self.rounding[-3])

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
