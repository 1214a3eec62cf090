"""The draws of the dot-product test: random pairs for everything, impulses and constants for corners and borders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from adjointlab.errors import SpaceMismatchError
from adjointlab.rounding import DOT_UNITS, SIGMAS, dot_gap, norm, rounding_noise
from adjointlab.space import Space
from adjointlab.tree import tree_flatten

Tensors = tuple[Tensor, ...]

_MOST_LEAVES = 4  # that impulses are sent through, one by one
_PHASE = 0.8 + 0.6j  # of complex impulses and constants: neither real nor imaginary


class BrokenError(Exception):
    """A function gave nothing that could be compared; the message is the diagnosis."""


class Side:
    """One of the two functions, on leaves: it gets copies, and what it returns is checked."""

    def __init__(self, function: Callable[[Any], Any], space: Space, codomain: Space, name: str) -> None:
        self.function, self.space, self.codomain, self.name = function, space, codomain, name

    def __call__(self, leaves: Tensors) -> Tensors:
        """Return the leaves of the image.

        Parameters
        ----------
        leaves : tuple of Tensor
            Of an element of ``space``.

        Returns
        -------
        tuple of Tensor
            Of an element of ``codomain``.

        Raises
        ------
        BrokenError
            If the function raises, or does not return a finite element of its codomain.
        """
        try:
            result = self.function(self.space.unflatten([leaf.clone() for leaf in leaves]))
        except Exception as error:
            line = next(iter(str(error).splitlines()), "")
            raise BrokenError(f"{self.name} raised {type(error).__name__}: {line}") from error
        try:
            found = self.codomain.leaves(result)
        except (SpaceMismatchError, TypeError, ValueError, AttributeError):
            raise BrokenError(wrong_kind(self.name, result, self.codomain)) from None
        if not all(bool(torch.isfinite(leaf).all()) for leaf in found):
            raise BrokenError(f"{self.name} returned NaN or infinity for finite input")
        # A batch of free size must come back as it went in.
        k = self.codomain.batch_dims
        if k and found[0].shape[:k] != leaves[0].shape[: self.space.batch_dims]:
            raise BrokenError(wrong_kind(self.name, result, self.codomain.with_batch(leaves[0].shape[:k])))
        return tuple(leaf.detach() for leaf in found)


def wrong_kind(name: str, result: Any, space: Space) -> str:
    """Return in words why ``result`` is not an element of ``space``: structure, shape, dtype or device."""
    if result is None:
        return f"{name} returned None: a return statement is missing"
    flat, _ = tree_flatten(result)
    if not all(isinstance(leaf, Tensor) for leaf in flat) or len(flat) != len(space.specs):
        kinds = ", ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in flat[:4])
        wanted = ", ".join(str(spec.shape) for spec in space.specs[:4])
        return f"{name}: wrong structure: {len(flat)} leaves ({kinds}) where {len(space.specs)} ({wanted}) are expected"
    for leaf, spec in zip(flat, space.specs, strict=True):
        got, wanted_shape = tuple(leaf.shape), spec.shape
        if got != wanted_shape:
            return f"{name}: wrong shape: {got} where {wanted_shape} is expected{_why_shape(got, wanted_shape)}"
        if leaf.dtype != spec.dtype:
            names = [str(dtype).removeprefix("torch.") for dtype in (leaf.dtype, spec.dtype)]
            why = ": only the real part" if spec.is_complex and not leaf.is_complex() else ""
            why = ": take the real part" if leaf.is_complex() and not spec.is_complex else why
            return f"{name}: wrong dtype: {names[0]} where {names[1]} is expected{why}"
        if leaf.device != spec.device:
            return f"{name}: wrong device: {leaf.device} where {spec.device} is expected"
    return f"{name}: wrong structure: {type(result).__name__} is not the pytree of the space"


def _why_shape(got: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if len(got) != len(wanted):
        return f": {len(got)} dimensions for {len(wanted)}"
    if sorted(got) == sorted(wanted):
        return ": dimensions transposed"
    gaps = [w - g for g, w in zip(got, wanted, strict=True)]
    dims = [dim for dim, gap in enumerate(gaps) if gap]
    if min(dims) >= 1 and all(gap >= 0 for gap in gaps):
        return f": output_padding of {', '.join(str(gaps[d]) for d in dims)} (or cropped) along dim {_listed(dims)}"
    if min(dims) >= 1 and all(gap <= 0 for gap in gaps):
        return f": not cropped along dim {_listed(dims)}, the adjoint of padding"
    return f": differs along dim {_listed(dims)}"


def _listed(dims: list[int]) -> str:
    return " and ".join(map(str, dims))


def impulse(space: Space, leaf: int, index: tuple[int, ...]) -> Tensors:
    """Return the leaves of the unit vector at ``index`` of one leaf."""
    leaves = space.leaves(space.zeros())
    leaves[leaf][index] = torch.tensor(_PHASE if leaves[leaf].is_complex() else 1.0)
    return leaves


def structured(space: Space) -> Iterator[tuple[str, Tensors]]:
    """Yield impulses at the centre and at the first and last corner of every leaf (the first few), and a constant."""
    for number, spec in enumerate(space.specs[:_MOST_LEAVES]):
        where = f" of leaf {number}" if len(space.specs) > 1 else ""
        centre = tuple(size // 2 for size in spec.shape)
        corners = [tuple(0 for _ in spec.shape), tuple(size - 1 for size in spec.shape)]
        for index in dict.fromkeys([centre, *corners]):
            yield f"impulse at {index}{where}", impulse(space, number, index)
    size = 2.0 ** -round(math.log2(space.size) / 2)  # of norm one or so: sums of many ones overflow in half precision
    values = [size * _PHASE if spec.is_complex else size for spec in space.specs]
    ones = [torch.full(s.shape, v, dtype=s.dtype, device=s.device) for s, v in zip(space.specs, values, strict=True)]
    yield "constant", tuple(ones)


class DotTest:
    """The comparison of ``⟨Ax, y⟩`` with ``⟨x, By⟩`` over many pairs; keeps the worst one."""

    def __init__(self, forward: Side, adjoint: Side, *, exact: bool, seed: int) -> None:
        self.forward, self.adjoint, self.exact = forward, adjoint, exact
        self.domain, self.codomain = forward.space, adjoint.space
        self.generator = torch.Generator().manual_seed(seed)
        self.eps = max(self.domain.eps, self.codomain.eps)
        self.worst: tuple[float, float, float, str] | None = None  # excess, error, tolerance, pair
        self.pairs = 0
        self.measured = 0.0  # largest rounding noise that was measured and believed, in units of eps
        self.too_noisy: list[str] = []
        self._norms: list[tuple[float, ...]] = []
        self._rows: list[float] = []
        self._through_zero: bool | None = None

    @property
    def passed(self) -> bool:
        """Whether some pair was compared and all of them agree."""
        return self.worst is not None and self.worst[0] <= 1.0

    @property
    def vacuous(self) -> bool:
        """Whether all images were zero."""
        return all(norms[2] == norms[3] == 0.0 for norms in self._norms)

    def run(self, trials: int, given: tuple[Tensors | None, Tensors | None] | None = None) -> None:
        """Compare the given pair, ``trials`` random draws, each with the next, then impulses and constants."""
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
        if first is not None and self.passed:  # they look for what random pairs may miss
            self._run_structured(*first)

    def _run_structured(self, x: Tensors, at_x: Tensors, y: Tensors, at_y: Tensors) -> None:
        """Compare impulses with a random element, then with what they light up: the second is as local as a bug."""
        for name, u in structured(self.domain):
            at_u = self.forward(u)
            self._compare(f"x = {name}", u, at_u, y, at_y, random=(False, True))
            if name != "constant" and any(bool(t.any()) for t in at_u):
                local = tuple(t * r for t, r in zip(at_u, self._draw(self.codomain), strict=True))
                self._compare(
                    f"x = {name}, y = Ax by random numbers", u, at_u, local, self.adjoint(local), random=(False, False)
                )
        for name, v in structured(self.codomain):
            at_v = self.adjoint(v)
            self._compare(f"y = {name}", x, at_x, v, at_v, random=(True, False))
            if name != "constant" and any(bool(t.any()) for t in at_v):
                local = tuple(t * r for t, r in zip(at_v, self._draw(self.domain), strict=True))
                self._compare(
                    f"y = {name}, x = By by random numbers", local, self.forward(local), v, at_v, random=(False, False)
                )

    def _draw(self, space: Space) -> Tensors:
        return space.leaves(space.randn(self.generator))

    def _compare(
        self, name: str, x: Tensors, at_x: Tensors, y: Tensors, at_y: Tensors, *, random: tuple[bool, bool]
    ) -> None:
        norms = (norm(x), norm(y), norm(at_x), norm(at_y))
        self.pairs += 1
        if all(random) or not self._norms:
            self._norms.append(norms)
        # What an operator does to typical input is what its rounding errors are relative to, where x is special.
        floor = tuple(DOT_UNITS * self.eps * size for size in self._typical(norms)) if not all(random) else (0.0, 0.0)
        options: dict[str, Any] = {"exact": self.exact, "random": random, "norms": norms}
        spaces = (self.domain, self.codomain)
        error, tolerance = dot_gap(*spaces, x, at_x, y, at_y, noise=(floor[0], floor[1]), **options)
        if not error <= tolerance and (self.worst is None or not error / tolerance <= self.worst[0]):
            noise = self._noise(x, at_x, y, at_y, norms)
            if noise is not None:
                known = (max(floor[0], SIGMAS * noise[0]), max(floor[1], SIGMAS * noise[1]))
                error, tolerance = dot_gap(*spaces, x, at_x, y, at_y, noise=known, **options)
                if error <= tolerance:
                    sizes = self._typical(norms)
                    self.measured = max(
                        [self.measured, *(n / s / self.eps for n, s in zip(noise, sizes, strict=True) if s)]
                    )
            elif not all(random) and self._starts_at_zero():
                self.too_noisy.append(name)
                return
        if all(random):
            self._rows.append(tolerance * max(norms[2] * norms[1], norms[0] * norms[3]))
        excess = error / tolerance if tolerance else (0.0 if error == 0.0 else math.inf)
        if self.worst is None or not excess <= self.worst[0]:
            self.worst = (excess, error, tolerance, name)

    def _typical(self, norms: tuple[float, ...]) -> tuple[float, float]:
        """Return the norms of Ax and By, or what they would typically be for x and y of this size, if that is more."""
        totals = [math.hypot(*(n[k] for n in self._norms)) for k in range(4)]
        gains = [totals[2] / totals[0] if totals[0] else 0.0, totals[3] / totals[1] if totals[1] else 0.0]
        return max(norms[2], gains[0] * norms[0]), max(norms[3], gains[1] * norms[1])

    def _noise(
        self, x: Tensors, at_x: Tensors, y: Tensors, at_y: Tensors, norms: tuple[float, ...]
    ) -> tuple[float, float] | None:
        """Return the measured rounding errors of Ax and By, or None where they are not what rounding can be."""
        if not self._starts_at_zero():
            return None
        try:
            forward = rounding_noise(self.forward, self.domain, self.codomain, x, at_x)
            backward = rounding_noise(self.adjoint, self.codomain, self.domain, y, at_y)
        except BrokenError:
            return None
        most = max(0.02, 32 * self.eps)  # beyond that, either the function is not linear or its digits are gone
        sizes = self._typical(norms)
        return (forward, backward) if forward <= most * sizes[0] and backward <= most * sizes[1] else None

    def _starts_at_zero(self) -> bool:
        """Return whether A(0) = 0 and B(0) = 0, without which what is measured is an offset and not rounding."""
        if self._through_zero is None:
            self._through_zero = True
            for side in (self.forward, self.adjoint):
                zero = side.space.leaves(side.space.zeros())
                self._through_zero &= not any(bool(leaf.any()) for leaf in side(zero))
        return self._through_zero

    def missed_row_probability(self) -> float:
        """Return the probability that all random draws miss an error in one row of A: a typical row, wholly wrong.

        The error is ``e dᴴ`` with a unit vector e and ``‖d‖ = ‖A‖_F / √m``: its gap is the product of an entry of y and
        of a normal number of that size, and it is missed if that stays within the tolerance in every draw.

        Returns
        -------
        float
            From 0 to 1.
        """
        trials = [n for n in self._norms if n[2] or n[3]]
        if not trials or not self._rows:
            return 1.0
        row = math.sqrt(sum(n[2] ** 2 for n in trials) / len(trials) / self.codomain.size)
        if row == 0.0:
            return 1.0
        draws = (len(self._rows) + 1) // 2  # the pairs (k, k + 1) are not independent of the others: leave them out
        return product_within(max(self._rows) / row, self._kinds()) ** draws

    def _kinds(self) -> tuple[bool, float]:
        """Return whether entries are complex and count as such; else the deviation of a product of real coordinates."""
        halves = sum(space.is_complex for space in (self.domain, self.codomain))
        return (True, 1.0) if self.exact and halves == 2 else (False, 2.0 ** (-halves / 2))


def product_within(bound: float, kind: tuple[bool, float]) -> float:
    """Return ``P(|u v| ≤ bound)`` for normal u and v: complex of variance one, or real and the product scaled."""
    u = torch.logspace(-9, 1.2, 4001, dtype=torch.float64)
    if kind[0]:
        density, within = 2 * u * torch.exp(-u.square()), -torch.expm1(-(bound / u).square())
    else:
        density = math.sqrt(2 / math.pi) * torch.exp(-u.square() / 2)
        within = torch.erf(bound / kind[1] / u / math.sqrt(2))
    return float(torch.trapezoid(density * within, u).clamp(0, 1))


__all__ = ["BrokenError", "DotTest", "Side", "impulse", "product_within", "structured", "wrong_kind"]
