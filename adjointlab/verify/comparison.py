"""The images of two random y under a wrong and a right adjoint, and whether a candidate reproduces the wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adjointlab.numerics import norm, rounding_noise, wide
from adjointlab.verify.checked_map import CheckedMap, Meter, Tensors

Change = Callable[[Tensor], Tensor]  # acts on one tensor
Candidate = Callable[[int], Tensors | None]  # the images of a draw under a supposed adjoint; None if there are none
_DRAWS = 2
_SAMPLE = 4096  # entries of the first draw that are compared first


def in_words(what: str, factor: complex) -> str:
    """Return a mistake and a factor in words, as in ``"conjugate missing, and 2.000 × too large"``."""
    a, size = abs(factor.real), ""
    is_complex = abs(factor.imag) > 1e-3 * abs(factor)
    if is_complex:
        size = f"off by the complex factor {factor.real:.3f}{factor.imag:+.3f}j"
    elif abs(a - 1) >= 1e-3:
        size = f"{a:.3f} × too large" if a > 1 else f"{1 / a:.3f} × too small"
    elif not what and factor.real > 0:
        size = f"too {'large' if a > 1 else 'small'} by {abs(a - 1):.1e} of its size"
    if factor.real < 0 and not is_complex:
        sign = "the sign is wrong" if what else "wrong sign: B = −Aᴴ"
        size = f"{sign}, and it is {size}" if size else sign
    elif not what:
        return f"Aᴴ is {size}"
    return ", and ".join(filter(None, (what, size)))


@dataclass(frozen=True, eq=False)
class Comparison:
    """The images of two random y under B (``found``) and Aᴴ (``expected``), stacked in double precision."""

    forward: CheckedMap
    adjoint: CheckedMap
    reference: CheckedMap
    meter: Meter
    inputs: tuple[Tensors, ...]
    found: Tensors
    expected: Tensors
    tolerance: float
    noise: float  # measured rounding errors of B, relative to its image
    select: Callable[[Tensors], Tensors] = lambda image: image  # the compared part of an image

    @classmethod
    def of(
        cls, forward: CheckedMap, adjoint: CheckedMap, reference: CheckedMap, meter: Meter, generator: torch.Generator
    ) -> Comparison:
        """Return the comparison on two random y."""
        space = adjoint.space
        inputs = tuple(space.leaves(space.randn(generator)) for _ in range(_DRAWS))
        images = [adjoint(y) for y in inputs]
        found, expected = stacked(images), stacked([reference(y) for y in inputs])
        size = norm(images[0])
        noise = rounding_noise(adjoint, space, adjoint.codomain, inputs[0], images[0]) / size if size else 0.0
        eps = max(space.eps, adjoint.codomain.eps)
        tolerance = min(0.05, max(1024 * eps, 8 * noise))
        return cls(forward, adjoint, reference, meter, inputs, found, expected, tolerance, noise)

    @property
    def sides(self) -> tuple[CheckedMap, CheckedMap]:
        """B and Aᴴ."""
        return self.adjoint, self.reference

    @property
    def eps(self) -> float:
        """Unit roundoff of the coarser space."""
        return max(self.adjoint.space.eps, self.adjoint.codomain.eps)

    # -- parts -------------------------------------------------------------------------------------------------------

    def part(self, select: Callable[[Tensors], Tensors]) -> Comparison:
        """Return the comparison of a part of the images."""
        found, expected = (stacked([select(_draw(u, k)) for k in range(_DRAWS)]) for u in (self.found, self.expected))
        return replace(self, found=found, expected=expected, select=lambda image: select(self.select(image)))

    def leaf(self, number: int) -> Comparison:
        """Return the comparison of one leaf of the images."""
        return self.part(lambda leaves: leaves[number : number + 1])

    def with_inputs(self, inputs: tuple[Tensors, ...]) -> Comparison:
        """Return the comparison for other inputs."""
        found, expected = (stacked([self.select(side(y)) for y in inputs]) for side in self.sides)
        return replace(self, inputs=inputs, found=found, expected=expected)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first compared leaf."""
        return tuple(self.expected[0].shape[1:])

    @property
    def spatial(self) -> tuple[int, ...]:
        """The presumed spatial dimensions of three or more entries; for two entries, a shift equals a reversal."""
        n = len(self.shape)  # all dimensions after batch and channel; if there are three, all after the first
        return tuple(d for d in range({3: 1}.get(n, 2 if n > 3 else 0), n) if self.shape[d] > 2)

    @property
    def batch(self) -> int:
        """Size of the first dimension, if it may be a batch dimension; else 1."""
        size = self.shape[0] if self.shape else 1
        return size if all(t.ndim >= 3 and t.shape[1] == size for t in self.expected) else 1

    @property
    def is_nominal(self) -> bool:
        """Whether y has the nominal batch size."""
        return [t.shape for t in self.inputs[0]] == [s.shape for s in self.adjoint.space.specs]

    @property
    def is_complex(self) -> bool:
        """Whether y or its image is complex."""
        return any(t.is_complex() for t in (*self.expected, *self.inputs[0]))

    # -- wrong entries -----------------------------------------------------------------------------------------------

    def wrong(self, number: int = 0) -> Tensor:
        """Return a mask of the entries of a leaf that are wrong in some draw."""
        expected = self.expected[number]
        size = max(float(expected.abs().max()), float(self.found[number].abs().max()))
        return ((self.found[number] - expected).abs() > self.tolerance * size).any(dim=0)

    def wrong_leaves(self) -> list[int]:
        """Return the indices of the leaves that differ by more than rounding."""
        return [k for k, (f, e) in enumerate(zip(self.found, self.expected, strict=True)) if far(f, e, 4 * self.eps)]

    @property
    def misfit(self) -> float:
        """``‖B − Aᴴ‖ / ‖Aᴴ‖``, estimated from the draws."""
        size = norm(self.expected)
        return norm(tuple(f - e for f, e in zip(self.found, self.expected, strict=True))) / size if size else 0.0

    def location(self) -> str:
        """Return in words where the largest difference is; used if no mistake is recognised."""
        difference = (self.found[0] - self.expected[0]).abs()
        draw, *index = (int(k) for k in torch.unravel_index(difference.argmax(), difference.shape))
        got, right = (complex(t[(draw, *index)]) for t in (self.found[0], self.expected[0]))
        return (
            f"{places(self.wrong())}; the largest difference is at {tuple(index)}: {_number(got)} where "
            f"{_number(right)} is expected"
        )

    # -- candidates --------------------------------------------------------------------------------------------------

    def changed(self, before: Change | None = None, after: Change | None = None) -> Candidate:
        """Return the candidate ``after ∘ Aᴴ ∘ before``."""

        def images(draw: int) -> Tensors | None:
            if before is None:
                right = _draw(self.expected, draw)
                return right if after is None else tuple(map(after, right))
            y = tuple(before(t).contiguous() for t in self.inputs[draw])
            if [t.shape for t in y] != [t.shape for t in self.inputs[draw]]:
                return None
            image = self.reference(y)
            return self.select(image if after is None else tuple(map(after, image)))

        return images

    def of_program(self, function: Callable[[Tensors], Tensors]) -> Candidate:
        """Return a function of leaves as a candidate."""

        def images(draw: int) -> Tensors:
            self.meter.spend()
            return self.select(function(self.inputs[draw]))

        return images

    def named(self, words: str, candidate: Candidate, **options: bool) -> str:
        """Return a mistake in words if its candidate reproduces B up to a factor, else an empty string."""
        factor = self.fit(candidate, **options)
        return "" if factor is None else in_words(words, factor)

    def first(self, changes: Iterable[tuple[str, Change | None, Change | None]]) -> str:
        """Return the first of some changes of y and of the result that reproduces B, in words."""
        return next(filter(None, (self.named(words, self.changed(*change)) for words, *change in changes)), "")

    def fit(self, candidate: Candidate, *, complex_factor: bool = False, any_size: bool = False) -> complex | None:
        """Return α with ``B = α candidate`` to rounding in both draws, or None if there is none."""
        first, second = (_draw(self.found, number) for number in range(_DRAWS))
        guess = candidate(0)
        if guess is None or not _alike(guess, first):
            return None
        factor = self._factor_of(first, guess, complex_factor=complex_factor, any_size=any_size)
        again = None if factor is None else candidate(1)
        if factor is None or again is None or not _alike(again, second):
            return None
        return None if far(_flat(second), factor * _flat(again), self.tolerance) else factor

    def _factor_of(self, found: Tensors, guess: Tensors, *, complex_factor: bool, any_size: bool) -> complex | None:
        """Return α with ``B y = α guess`` for the first y, or None if there is none, or if the guess is ``Aᴴ y``."""
        how, step = (self.tolerance, complex_factor), sum(t.numel() for t in found) // _SAMPLE
        sample = _flat(guess, step) if step > 1 else None  # a few entries tell most wrong candidates
        if sample is not None and bool(sample.any()) and _factor(_flat(found, step), sample, *how) is None:
            return None
        whole = _flat(guess)
        factor = _factor(_flat(found), whole, *how)
        # A candidate that equals Aᴴ explains nothing, unless `any_size`.
        same = not any_size and not far(whole, _flat(_draw(self.expected, 0)), 4 * self.tolerance)
        return None if same else factor


def _alike(images: Tensors, found: Tensors) -> bool:
    return [t.shape for t in images] == [t.shape for t in found]


def _draw(images: Tensors, number: int) -> Tensors:
    return tuple(t[number] for t in images)


def _flat(leaves: Tensors, step: int = 1) -> Tensor:
    return torch.cat([t.reshape(-1)[::step].to(torch.complex128) for t in leaves])


def _factor(found: Tensor, guess: Tensor, tolerance: float, complex_factor: bool) -> complex | None:
    power = float(torch.vdot(guess, guess).real)
    if power == 0.0 or found.numel() < 2 or not bool(found.any()):
        return None
    factor = complex(torch.vdot(guess, found)) / power
    factor = factor if complex_factor else complex(factor.real)
    return factor if factor and not far(found, factor * guess, tolerance) else None


def stacked(draws: Sequence[Tensors]) -> Tensors:
    """Return the leaves of several draws, stacked in double precision."""
    return tuple(torch.stack([wide(t) for t in leaves]) for leaves in zip(*draws, strict=True))


def far(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Return whether ``‖a − b‖`` exceeds the tolerance times the larger norm."""
    norms = max(float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b)))
    return float(torch.linalg.vector_norm(a - b)) > tolerance * norms


def places(wrong: Tensor) -> str:
    """Return in words how many entries of a mask are wrong, and where along each dimension."""
    text = f"{int(wrong.sum())} of {wrong.numel()} entries differ"
    for dim, size in enumerate(wrong.shape):
        others = [d for d in range(wrong.ndim) if d != dim]
        along = wrong.any(dim=others) if others else wrong
        some = [int(k) for k in along.nonzero().flatten()]
        if 0 < len(some) < size:
            text += f", along dim {dim} only at {ranges(some)}"
    return text


def ranges(some: list[int]) -> str:
    """Return integers in words: ``"4"``, ``"0, 9"``, ``"3–7"``."""
    if len(some) > 2 and some[-1] - some[0] == len(some) - 1:
        return f"{some[0]}–{some[-1]}"
    return ", ".join(map(str, some[:6])) + (", …" if len(some) > 6 else "")


def _number(value: complex) -> str:
    return f"{value.real:.4g}{value.imag:+.4g}j" if value.imag else f"{value.real:.4g}"
