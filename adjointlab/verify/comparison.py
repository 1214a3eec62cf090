"""The images of the same random y under a wrong and a right adjoint, and the fit of guesses to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adjointlab.numerics import norm, rounding_noise
from adjointlab.verify.checked_map import CheckedMap, Tensors

Change = Callable[[Tensor], Tensor]  # acts on one tensor, without the leading dimension of draws
_DRAWS = 2
_WIDE = {True: torch.complex128, False: torch.float64}


@dataclass(frozen=True)
class Guess:
    """Whether ``B ≈ α T(Aᴴ)`` fits, and the factor α."""

    fits: bool
    factor: complex

    @staticmethod
    def words(what: str, factor: complex) -> str:
        """Return the mistake and the factor in words, as in ``"conjugate missing, and 2.000 × too large"``."""
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
    """The images of a few random y under B (``found``) and Aᴴ (``expected``), stacked in double precision."""

    adjoint: CheckedMap
    reference: CheckedMap
    generator: torch.Generator
    inputs: tuple[Tensors, ...] = ()
    found: Tensors = ()
    expected: Tensors = ()
    tolerance: float = 0.0
    noise: float = 0.0  # measured rounding errors of B, relative to its image
    view: Change = lambda t: t  # selects the compared part of each leaf of an image
    number: int | None = None  # index of the compared leaf; None for all leaves

    def __post_init__(self) -> None:
        if self.inputs:
            return
        space = self.adjoint.space
        inputs = tuple(space.leaves(space.randn(self.generator)) for _ in range(_DRAWS))
        found = [self.adjoint(y) for y in inputs]
        size = norm(found[0])
        noise = rounding_noise(self.adjoint, space, self.adjoint.codomain, inputs[0], found[0]) / size if size else 0.0
        for name, value in (
            ("inputs", inputs),
            ("found", _stacked(found)),
            ("expected", _stacked([self.reference(y) for y in inputs])),
            ("tolerance", min(0.05, max(1024 * self.eps, 8 * noise, 1e-9))),
            ("noise", noise),
        ):
            object.__setattr__(self, name, value)

    @property
    def eps(self) -> float:
        """Unit roundoff of the coarser space."""
        return max(self.adjoint.space.eps, self.adjoint.codomain.eps)

    # -- parts -------------------------------------------------------------------------------------------------------

    def leaf(self, number: int) -> Comparison:
        """Return the comparison of one leaf of the images."""
        return replace(self, found=(self.found[number],), expected=(self.expected[number],), number=number)

    def batch_entries(self, entries: Sequence[int]) -> Comparison:
        """Return the comparison of some batch entries."""
        chosen = torch.tensor(entries, device="cpu")

        def view(t: Tensor) -> Tensor:
            return t.index_select(0, chosen.to(t.device))

        found, expected = (tuple(torch.stack([view(d) for d in t]) for t in u) for u in (self.found, self.expected))
        return replace(self, found=found, expected=expected, view=view)

    def masked(self, mask: Tensor) -> Comparison:
        """Return the comparison of the masked entries of the only leaf, as one row."""

        def view(t: Tensor) -> Tensor:
            return self.view(t)[mask]

        found, expected = ((torch.stack([d[mask] for d in t]),) for (t,) in (self.found, self.expected))
        return replace(self, found=found, expected=expected, view=view)

    def with_changed_inputs(self, change: Change) -> Comparison:
        """Return the comparison for changed inputs: ``change`` is applied to each leaf."""
        return self.with_inputs(tuple(tuple(change(t) for t in y) for y in self.inputs))

    def with_inputs(self, inputs: tuple[Tensors, ...]) -> Comparison:
        """Return the comparison for other inputs."""
        found, expected = (self._images(side, inputs) for side in (self.adjoint, self.reference))
        return replace(self, inputs=inputs, found=found, expected=expected)

    def _images(self, side: CheckedMap, inputs: Sequence[Tensors], after: Change = lambda t: t) -> Tensors:
        images = _stacked([side(y) for y in inputs])
        if self.number is not None:
            images = (images[self.number],)
        # `after` acts on whole images; the compared part is selected afterwards.
        return tuple(torch.stack([self.view(after(d)) for d in t]) for t in images)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first compared leaf."""
        return tuple(self.expected[0].shape[1:])

    @property
    def ndim(self) -> int:
        """Number of dimensions of the first compared leaf."""
        return len(self.shape)

    @property
    def spatial(self) -> tuple[int, ...]:
        """The presumed spatial dimensions: all after batch and channel; if there are three, all after the first."""
        dims = range({3: 1}.get(self.ndim, 2 if self.ndim > 3 else 0), self.ndim)
        return tuple(d for d in dims if self.shape[d] > 1)

    @property
    def batched(self) -> bool:
        """Whether the first dimension may be a batch dimension."""
        return all(t.ndim >= 3 and t.shape[1] == self.batch for t in self.expected) and self.batch > 1

    @property
    def batch(self) -> int:
        """Size of the first dimension."""
        return self.shape[0] if self.shape else 1

    # -- wrong entries ----------------------------------------------------------------------------------------------

    def wrong(self, number: int = 0) -> Tensor:
        """Return a mask of the entries of a leaf that are wrong in some draw."""
        expected = self.expected[number]
        size = max(float(expected.abs().max()), float(self.found[number].abs().max()))
        return ((self.found[number] - expected).abs() > self.tolerance * size).any(dim=0)

    def wrong_leaves(self) -> list[int]:
        """Return the indices of the leaves that differ by more than rounding."""
        return [k for k, (f, e) in enumerate(zip(self.found, self.expected, strict=True)) if _far(f, e, 4 * self.eps)]

    @property
    def misfit(self) -> float:
        """``‖B − Aᴴ‖ / ‖Aᴴ‖``, estimated from the draws."""
        size = norm(self.expected)
        return norm(tuple(f - e for f, e in zip(self.found, self.expected, strict=True))) / size if size else 0.0

    def wrong_batch_entries(self) -> list[int]:
        """Return the indices of the wrong batch entries."""
        wrong = torch.stack([self.wrong(k).flatten(1).any(dim=1) for k in range(len(self.expected))]).any(dim=0)
        return [int(k) for k in wrong.nonzero().flatten()]

    def places(self) -> str:
        """Return in words how many entries of the first leaf are wrong, and where along each dimension."""
        wrong = self.wrong()
        text = f"{int(wrong.sum())} of {wrong.numel()} entries differ"
        for dim, size in enumerate(self.shape):
            others = [d for d in range(self.ndim) if d != dim]
            along = wrong.any(dim=others) if others else wrong
            places = [int(k) for k in along.nonzero().flatten()]
            if 0 < len(places) < size:
                text += f", along dim {dim} only at {ranges(places)}"
        return text

    def location(self) -> str:
        """Return in words where the largest difference is; used if no mistake is recognised."""
        difference = (self.found[0] - self.expected[0]).abs()
        draw, *index = (int(k) for k in torch.unravel_index(difference.argmax(), difference.shape))
        got, right = (complex(t[(draw, *index)]) for t in (self.found[0], self.expected[0]))
        return (
            f"unrecognised: {self.places()}; the largest difference is at {tuple(index)}: {_number(got)} where "
            f"{_number(right)} is expected"
        )

    # -- guesses -----------------------------------------------------------------------------------------------------

    def changed(self, before: Change | None = None, after: Change | None = None) -> Tensors | None:
        """Return the images under ``after ∘ Aᴴ ∘ before``, or None if the shapes do not allow it."""
        expected = self.expected
        if before is not None:
            inputs = [tuple(before(t).contiguous() for t in y) for y in self.inputs]
            shapes = [[t.shape for y in draws for t in y] for draws in (self.inputs, inputs)]
            if shapes[0] != shapes[1]:
                return None
            return self._images(self.reference, inputs, after or (lambda t: t))
        if after is not None:
            expected = tuple(torch.stack([after(d) for d in t]) for t in expected)
        same = all(t.shape == u.shape for t, u in zip(expected, self.found, strict=True))
        return expected if same else None

    def fit(self, images: Tensors | None, inside: Change | None = None, *, complex_factor: bool = False) -> Guess:
        """Return whether ``found ≈ α images`` on the part ``inside``, for images that differ from the right ones."""
        if images is None:
            return Guess(False, 0.0)
        inside = inside or (lambda t: t)
        found, right, guess = (
            torch.cat([torch.stack([inside(d) for d in t]).reshape(-1).to(torch.complex128) for t in leaves])
            for leaves in (self.found, self.expected, images)
        )
        power = float(torch.vdot(guess, guess).real)
        size = float(torch.linalg.vector_norm(found))
        if power == 0.0 or size == 0.0 or found.numel() < 2:
            return Guess(False, 0.0)
        factor = complex(torch.vdot(guess, found)) / power
        if not complex_factor:
            factor = complex(factor.real)
        misfit = float(torch.linalg.vector_norm(found - factor * guess))
        fits = misfit <= self.tolerance * size
        # A guess that changes nothing explains nothing, such as the conjugation of a real operator.
        telling = _far(guess, right, 4 * self.tolerance) or images is self.expected
        return Guess(fits and telling, factor)


def _stacked(draws: list[Tensors]) -> Tensors:
    return tuple(torch.stack(leaves).to(_WIDE[leaves[0].is_complex()]) for leaves in zip(*draws, strict=True))


def _far(a: Tensor, b: Tensor, tolerance: float) -> bool:
    norms = max(float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b)))
    return float(torch.linalg.vector_norm(a - b)) > tolerance * norms


def ranges(places: list[int]) -> str:
    """Return integers in words: ``"4"``, ``"0, 9"``, ``"3–7"``."""
    if len(places) > 2 and places[-1] - places[0] == len(places) - 1:
        return f"{places[0]}–{places[-1]}"
    return ", ".join(map(str, places[:6])) + (", …" if len(places) > 6 else "")


def _number(value: complex) -> str:
    return f"{value.real:.4g}{value.imag:+.4g}j" if value.imag else f"{value.real:.4g}"


__all__ = ["Change", "Comparison", "Guess", "ranges"]
