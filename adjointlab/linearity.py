r"""Is a map linear? ``f(αx + βz) = α f(x) + β f(z)``: proved from the graph of its derivative, or tested by numbers.

A *proof* is a derivative that does not read the input (the map is affine), no number taken from the input,
``f(0) = 0``, and a dot test against what autograd may hide. Everything else is evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adjointlab.errors import NotDifferentiableError
from adjointlab.modules import buffers_kept, modules_of
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
from adjointlab.reporting import aligned, html_table, strict_json
from adjointlab.space import Space
from adjointlab.transpose import Derivation, ReadsInputError, Transposition

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


@dataclass(frozen=True)
class LinearityReport:
    """The report on the linearity of a map, with its evidence; made by :func:`check_linearity`.

    Attributes
    ----------
    verdict : str
        ``"proved"``, ``"supported"`` (numerical evidence only) or ``"refuted"``.
    is_affine : bool
        Whether ``f(x) − f(0)`` passed as linear; true for linear maps too.
    is_complex_linear : bool
        Whether ``f(ix) = i f(x)``, as far as the spaces are complex.
    differentiable : bool
        Whether autograd's derivative passed the dot test.
    deterministic : bool
        Whether equal inputs gave equal outputs and left no trace.
    offset : float
        ``‖f(0)‖``.
    evidence : tuple of str
        What was seen, in words.
    reads_input : tuple of str
        Ops of the derivative (or reads of a number) that read the input.
    counterexample : Counterexample or None
        The law that failed.
    """

    verdict: str
    is_affine: bool
    is_complex_linear: bool
    differentiable: bool
    deterministic: bool
    offset: float
    evidence: tuple[str, ...]
    reads_input: tuple[str, ...]
    counterexample: Counterexample | None

    def _rows(self) -> list[tuple[str, str]]:
        rows = [
            ("affine", f"{'yes' if self.is_affine else 'no'}, ‖f(0)‖ = {self.offset:.3g}"),
            ("complex-linear", "yes" if self.is_complex_linear else "no"),
            *(("evidence", item) for item in self.evidence),
        ]
        if self.reads_input:
            rows.append(("reads the input", ", ".join(self.reads_input)))
        if self.counterexample is not None:
            rows.append(("counterexample", str(self.counterexample)))
        return rows

    def __str__(self) -> str:
        return aligned(f"linearity: {self.verdict}", self._rows())

    def _repr_html_(self) -> str:
        return html_table(f"linearity: {self.verdict}", self.verdict != "refuted", self._rows())

    def to_json(self, indent: int | None = None) -> str:
        """Return :meth:`to_dict` as JSON; numbers that are not finite become ``null``."""
        return strict_json(self.to_dict(), indent)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        seen = self.counterexample
        lists = {"evidence": list(self.evidence), "reads_input": list(self.reads_input)}
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | lists | {"counterexample": None if seen is None else str(seen)}


def check_linearity(
    f: Callable[..., Any], domain: Any, *, batch_dims: int = 0, kwargs: dict[str, Any] | None = None, seed: int = 0
) -> LinearityReport:
    """Report whether ``f(αx + βz) = α f(x) + β f(z)`` for all elements x, z of the domain.

    Parameters
    ----------
    f : nn.Module or callable
        The map; called as :func:`adjointlab.linear_operator` would.
    domain : Tensor, tuple of int, TensorSpec, Space or pytree of these
        Where it is defined.
    batch_dims : int
        Number of leading dimensions of free size.
    kwargs : dict, optional
        Fixed keyword arguments of the map.
    seed : int
        Seed of the random inputs; torch's global generator is left alone.

    Returns
    -------
    LinearityReport
        Verdict, evidence and counterexample; nothing is raised for a map that is not linear.

    Raises
    ------
    SpaceMismatchError
        If the domain is none, or the map does not take its elements or does not return tensors.

    Examples
    --------
    >>> import torch
    >>> check_linearity(torch.nn.Conv2d(1, 1, 3, bias=False), (1, 1, 8, 8)).verdict
    'proved'
    >>> report = check_linearity(torch.relu, (8,))
    >>> report.verdict, report.reads_input
    ('refuted', ('threshold_backward',))
    """
    space = like_parameters(f, domain, batch_dims)
    source = Transposition(f, space, kwargs)
    return assess(source, source.nominal, seed)


def like_parameters(f: Any, domain: Any, batch_dims: int) -> Space:
    """Return the space of ``domain``; where it gives a shape only, dtype and device are those of f's parameters."""
    # The modules that a function closes over, or whose method it is, are f's as well.
    dtype = device = None
    for module in modules_of(f):
        for tensor in (*module.parameters(), *module.buffers()):
            if dtype is None and (tensor.is_floating_point() or tensor.is_complex()):
                dtype, device = tensor.dtype, tensor.device
    return Space.of(domain, dtype=dtype, device=device, batch_dims=batch_dims)


def assess(
    map_: Transposition, derivation: Derivation, seed: int = 0, *, domain: Space | None = None
) -> LinearityReport:
    """Return the evidence for the linearity of a map, from what was derived of it on a domain and from numbers."""
    with map_.domain.without_autocast():
        return _assess(map_, derivation, _Numbers(map_, derivation, domain or map_.domain, seed))


def _assess(map_: Transposition, derivation: Derivation, numbers: _Numbers) -> LinearityReport:
    explanation = derivation.explanation
    evidence, reads = _of_graph(map_, derivation)
    # Where the graph agrees with the function, and shows all that it does, f(0) = 0 is all that is left to test.
    quick = map_.domain.every(explanation.is_evident and derivation.checked)
    changes: list[str] = []
    counterexample, differentiable = None, True
    if quick:
        with torch.no_grad():
            numbers.offset = numbers.norm(derivation.function("function")(numbers.zero))
    else:
        with buffers_kept(map_.modules) as changes, torch.no_grad():
            counterexample = numbers.counterexample()
            if counterexample is None:
                evidence.append("additivity and homogeneity hold to rounding on random inputs")
                try:
                    differentiable = numbers.adjoint_agrees()
                except NotDifferentiableError as error:
                    evidence.append(str(error))
                    differentiable = False
    if counterexample is None:
        evidence.append("the dot test holds" if differentiable else "the dot test fails: autograd hides something")
    if not changes and not map_.domain.every(not changes):
        changes = ["something on another process"]
    if changes and counterexample is None:
        counterexample = Counterexample(f"a call leaves {changes[0]} as it was, which", math.inf, 0.0)
    deterministic = not changes and (counterexample is None or counterexample.law != _DETERMINISM)
    if changes:
        evidence.append(f"a call changes {', '.join(changes)}")
    if numbers.offset > 0.0:
        evidence.append(f"f(0) is not zero: its norm is {numbers.offset:.3g}")
    is_affine = counterexample is None
    settled = not explanation.cut and not explanation.is_stateful
    verdict = "proved" if explanation.independent and settled and differentiable else "supported"
    if not is_affine or numbers.offset > 0.0:
        verdict = "refuted"
        counterexample = counterexample or Counterexample("f(0) = 0", numbers.offset, 0.0, (map_.domain.zeros(),))
    return LinearityReport(
        verdict, is_affine, is_affine and numbers.is_complex_linear(), differentiable, deterministic, numbers.offset,
        tuple(evidence), reads, counterexample,
    )  # fmt: skip


def _of_graph(map_: Transposition, derivation: Derivation) -> tuple[list[str], tuple[str, ...]]:
    """Return the evidence that the graph of the derivative gives, in words, and the operations that read the input."""
    explanation, evidence = derivation.explanation, []
    reads = explanation.readers or ()
    if explanation.independent:
        evidence.append("the derivative does not read the input" + ("" if explanation.cut else ": the map is affine"))
    elif reads:
        evidence.append(f"the derivative reads the input in {', '.join(reads)}")
    if explanation.cut:
        evidence.append(f"autograd does not see all of it: {explanation.cut} cuts the input off")
    if map_.untraceable is not None:
        evidence.append(str(map_.untraceable))
        if isinstance(map_.untraceable, ReadsInputError):
            reads = (str(map_.untraceable).split(" ", 1)[0],)
    return evidence, reads


_DETERMINISM = "f(x) = f(x), the same call twice,"
_FINITE = "f(x) is finite"
_DRAWS = 32  # of a function that draws random numbers: that none shows, if each shows in half of all calls, is 2⁻³²


class _Numbers:
    """The laws of linear maps, each on random arguments; leaves in and out, so that nothing is checked twice."""

    def __init__(self, map_: Transposition, derivation: Derivation, domain: Space, seed: int) -> None:
        self.map, self.derivation = map_, derivation
        self.domain, self.codomain = domain, map_.codomain.with_batch(domain.batch_shape)
        self.generator = torch.Generator().manual_seed(seed)
        self.offset = 0.0

    def draw(self, space: Space) -> Tensors:
        return space.leaves(space.randn(self.generator))

    @property
    def zero(self) -> Tensors:
        return self.domain.leaves(self.domain.zeros())

    def f(self, x: Tensors, times: int = 1) -> Tensors:
        return tuple(t.detach() for t in self.map.eager.called(x, times=times))

    def linear(self, x: Tensors, leaf: int | None = None) -> Tensors:
        """Return ``f(x) − f(0)``, or one leaf of it."""
        return _only(_minus(self.f(x), self.f(self.zero)), leaf)

    def adjoint(self, y: Tensors, leaf: int | None = None) -> Tensors:
        """Return ``f'ᴴ y``, or one leaf of it: the derived one where there is one, else autograd's."""
        return _only(tuple(t.detach() for t in self.derivation.function("adjoint")(y)), leaf)

    def norm(self, y: Tensors) -> float:
        return float(self.codomain.norm(self.codomain.unflatten(y)))

    def norms(self, y: Tensors) -> list[float]:
        """Return the norm of each leaf, since a large one is to hide nothing in a small one."""
        return [self.norm(_only(y, k)) for k in range(len(y))]

    @full_precision
    def counterexample(self) -> Counterexample | None:
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
                return Counterexample(_DETERMINISM, again, rounding * scale, (x,))

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
    def is_complex_linear(self) -> bool:
        spaces = (self.domain, self.codomain)
        if not any(space.is_complex for space in spaces):
            return True
        if not all(spec.is_complex for space in spaces for spec in space.specs):
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
