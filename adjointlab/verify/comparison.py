"""The images of two random y under a wrong and a right adjoint, and whether a candidate reproduces the wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adjointlab.numerics import norm, rounding_noise
from adjointlab.verify.checked_map import CheckedMap, Meter, Tensors

Change = Callable[[Tensor], Tensor]  # acts on one tensor
Candidate = Callable[[int], Tensors | None]  # the images of a draw under a supposed adjoint; None if there are none
_DRAWS = 2
_SAMPLE = 4096  # entries of the first draw that are compared first
_WIDE = {True: torch.complex128, False: torch.float64}


def wide(t: Tensor) -> Tensor:
    """Return a tensor in double precision."""
    return t.to(_WIDE[t.is_complex()])


def in_words(what: str, factor: complex) -> str:
    """Return a mistake and a factor in words, as in ``"conjugate missing, and 2.000 × too large"``."""
    size = ""
    if abs(factor.imag) > 1e-3 * abs(factor):
        size = f"off by the complex factor {factor.real:.3f}{factor.imag:+.3f}j"
    else:
        a = abs(factor.real)
        if abs(a - 1) >= 1e-3:
            size = f"{a:.3f} × too large" if a > 1 else f"{1 / a:.3f} × too small"
        elif not what and factor.real > 0:
            size = f"too {'large' if a > 1 else 'small'} by {abs(a - 1):.1e} of its size"
        if factor.real < 0:
            sign = "the sign is wrong" if what else "wrong sign: B = −Aᴴ"
            size = f"{sign}, and it is {size}" if size else sign
            return f"{what}, and {size}" if what else size
    if what:
        return f"{what}, and {size}" if size else what
    return f"Aᴴ is {size}"


@dataclass(frozen=True, eq=False)
class Comparison:
    """The images of two random y under B (``found``) and Aᴴ (``expected``), stacked in double precision."""

    adjoint: CheckedMap
    reference: CheckedMap
    meter: Meter
    inputs: tuple[Tensors, ...]
    found: Tensors
    expected: Tensors
    tolerance: float
    noise: float  # measured rounding errors of B, relative to its image
    view: Change = lambda t: t  # selects the compared part of each leaf of an image
    number: int | None = None  # index of the compared leaf; None for all leaves

    @classmethod
    def of(cls, adjoint: CheckedMap, reference: CheckedMap, meter: Meter, generator: torch.Generator) -> Comparison:
        """Return the comparison on two random y."""
        space = adjoint.space
        inputs = tuple(space.leaves(space.randn(generator)) for _ in range(_DRAWS))
        images = [adjoint(y) for y in inputs]
        found, expected = stacked(images), stacked([reference(y) for y in inputs])
        size = norm(images[0])
        noise = rounding_noise(adjoint, space, adjoint.codomain, inputs[0], images[0]) / size if size else 0.0
        eps = max(space.eps, adjoint.codomain.eps)
        tolerance = min(0.05, max(1024 * eps, 8 * noise))
        return cls(adjoint, reference, meter, inputs, found, expected, tolerance, noise)

    @property
    def eps(self) -> float:
        """Unit roundoff of the coarser space."""
        return max(self.adjoint.space.eps, self.adjoint.codomain.eps)

    # -- parts -------------------------------------------------------------------------------------------------------

    def leaf(self, number: int) -> Comparison:
        """Return the comparison of one leaf of the images."""
        return replace(self, found=(self.found[number],), expected=(self.expected[number],), number=number)

    def viewed(self, view: Change) -> Comparison:
        """Return the comparison of a part of every leaf."""
        found, expected = (tuple(torch.stack([view(d) for d in t]) for t in u) for u in (self.found, self.expected))
        return replace(self, found=found, expected=expected, view=lambda t: view(self.view(t)))

    def with_inputs(self, inputs: tuple[Tensors, ...]) -> Comparison:
        """Return the comparison for other inputs."""
        images = []
        for side in (self.adjoint, self.reference):
            selected = [self.selected(side(y)) for y in inputs]
            images.append(stacked([draw for draw in selected if draw is not None]))
        return replace(self, inputs=inputs, found=images[0], expected=images[1])

    def with_changed_inputs(self, change: Change) -> Comparison:
        """Return the comparison for changed inputs: ``change`` is applied to each leaf."""
        return self.with_inputs(tuple(tuple(change(t) for t in y) for y in self.inputs))

    def selected(self, image: Tensors | None) -> Tensors | None:
        """Return the compared part of an image."""
        if image is None:
            return None
        if self.number is not None:
            image = (image[self.number],)
        return tuple(self.view(t) for t in image)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first compared leaf."""
        return tuple(self.expected[0].shape[1:])

    @property
    def spatial(self) -> tuple[int, ...]:
        """The presumed spatial dimensions: all after batch and channel; if there are three, all after the first."""
        n = len(self.shape)
        return tuple(d for d in range({3: 1}.get(n, 2 if n > 3 else 0), n) if self.shape[d] > 1)

    @property
    def batch(self) -> int:
        """Size of the first dimension, if it may be a batch dimension; else 1."""
        size = self.shape[0] if self.shape else 1
        return size if all(t.ndim >= 3 and t.shape[1] == size for t in self.expected) else 1

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
                return tuple(t[draw] if after is None else after(t[draw]) for t in self.expected)
            y = tuple(before(t).contiguous() for t in self.inputs[draw])
            if [t.shape for t in y] != [t.shape for t in self.inputs[draw]]:
                return None
            image = self.reference(y)
            return self.selected(image if after is None else tuple(after(t) for t in image))

        return images

    def of_program(self, function: Callable[[Tensors], Tensors]) -> Candidate:
        """Return a function of leaves as a candidate."""

        def images(draw: int) -> Tensors | None:
            self.meter.spend()
            return self.selected(function(self.inputs[draw]))

        return images

    def fit(self, candidate: Candidate, *, complex_factor: bool = False, any_size: bool = False) -> complex | None:
        """Return α with ``B = α candidate`` to rounding in both draws, or None if there is none."""
        # A candidate that equals Aᴴ explains nothing, unless `any_size`.
        factor: complex | None = None
        for draw in range(_DRAWS):
            images = candidate(draw)
            found, right = (tuple(t[draw] for t in leaves) for leaves in (self.found, self.expected))
            if images is None or any(a.shape != b.shape for a, b in zip(images, found, strict=True)):
                return None
            step = max(1, sum(t.numel() for t in found) // _SAMPLE)  # a few entries tell most wrong candidates
            for k in (step, 1) if step > 1 and factor is None else (1,):
                got, guess = _flat(found, k), _flat(images, k)
                if factor is not None:
                    if far(got, factor * guess, self.tolerance):
                        return None
                    continue
                fitted = _factor(got, guess, self.tolerance, complex_factor)
                if fitted is None and (k == 1 or bool(guess.any())):
                    return None
            factor = factor or fitted
            if draw == 0 and not any_size and not far(guess, _flat(right, 1), 4 * self.tolerance):
                return None
        return factor


def _flat(leaves: Tensors, step: int) -> Tensor:
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


__all__ = ["Candidate", "Change", "Comparison", "far", "in_words", "places", "ranges", "stacked", "wide"]
