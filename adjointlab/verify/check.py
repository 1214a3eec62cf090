"""The dot-product test of derived and hand-written adjoints: ``⟨Ax, y⟩ = ⟨x, By⟩``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from adjointlab.affine import AffineOperator
from adjointlab.errors import AdjointMismatchError, SpaceMismatchError
from adjointlab.numerics import full_precision
from adjointlab.operators import LinearOperator
from adjointlab.space import Space
from adjointlab.verify.checked_map import BrokenError, Tensors
from adjointlab.verify.claims import claim_of, reference_of
from adjointlab.verify.diagnosis import diagnose
from adjointlab.verify.dot_test import DotTest
from adjointlab.verify.figure import Figure
from adjointlab.verify.report import AdjointReport


def check_adjoint(
    A: LinearOperator | AffineOperator | Callable[..., Any],
    adjoint: Callable[[Any], Any] | None = None,
    *,
    domain: Any = None,
    codomain: Any = None,
    trials: int = 5,
    seed: int = 0,
    x: Any = None,
    y: Any = None,
) -> AdjointReport:
    r"""Test ``⟨Ax, y⟩ = ⟨x, By⟩`` on random and structured x and y, where B is ``A.H`` or a hand-written adjoint.

    Random pairs detect errors anywhere. Impulses at the centre and the corners, constants, and random numbers on the
    support of an impulse response detect errors at borders and corners that are small relative to the whole. A pair
    scaled up and down by a million detects saturation, and a pair of another batch size detects an adjoint that works
    for one size only. B must not write to its argument.

    The tolerance is derived from the unit roundoff of the dtype (``adjointlab.numerics``). If a map has internal
    cancellation, its rounding errors are measured. The rounding errors of a hand-written adjoint may exceed those of
    the derived adjoint or of A by a small factor only, so an adjoint that computes in a coarser dtype fails.

    If the test fails, the report names the mistake, with the tensor of A at fault, provided that it is one of the
    common ones: the derived adjoint with that mistake gives the same numbers as B on two random y. All else is called
    unrecognised.

    Parameters
    ----------
    A : LinearOperator, AffineOperator, nn.Module or callable
        The operator. If it is affine, its linear part is tested. A plain callable needs ``domain``.
    adjoint : callable, optional
        The claimed adjoint B, a function of one element of the codomain; ``A.H`` if not given.
    domain : Tensor, tuple of int, TensorSpec, Space or pytree of these, optional
        The domain of a plain callable A, as for :func:`adjointlab.linear_operator`.
    codomain : Tensor, tuple of int, TensorSpec, Space or pytree of these, optional
        The codomain of a plain callable A; found by calling A if not given.
    trials : int
        Number of random draws of x and of y.
    seed : int
        Seed of the draws; torch's global generator is not used.
    x, y : pytree of tensors, optional
        The pair to test first.

    Returns
    -------
    AdjointReport
        Error, tolerance and diagnosis. A failed test does not raise, nor does an adjoint that raises.

    Raises
    ------
    SpaceMismatchError
        If A is neither an operator nor given with a domain, the adjoint is not callable, or x or y is not a finite
        element of its space.
    ValueError
        If ``trials`` is not an integer of 0 or more, or no pair would be compared.

    References
    ----------
    J. F. Claerbout, *Earth Soundings Analysis: Processing versus Inversion*, Blackwell, 1992, chapter 5 (the dot test).

    Examples
    --------
    >>> import torch
    >>> from adjointlab import linear_operator
    >>> A = linear_operator(torch.nn.Conv2d(1, 1, 3, padding=1, bias=False), (1, 1, 8, 8))
    >>> check_adjoint(A).passed
    True
    >>> check_adjoint(A, adjoint=lambda v: 2 * A.H(v)).diagnosis
    'Aᴴ is 2.000 × too large'
    >>> check_adjoint(torch.fft.fft, torch.fft.ifft, domain=torch.zeros(8, dtype=torch.complex64)).diagnosis
    'Aᴴ is 8.000 × too small: B is the inverse of A'
    """
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 0:
        raise ValueError(f"expected trials to be an integer of 0 or more, got {trials!r}")
    if trials == 0 and x is None and y is None:
        raise ValueError("expected trials of 1 or more, or a pair x, y, got neither: nothing would be compared")
    claim = claim_of(A, adjoint, domain, codomain)
    given = None
    if x is not None or y is not None:
        given = (_finite(claim.forward.space, x, "x"), _finite(claim.adjoint.space, y, "y"))
    trusted = functools.cache(lambda: reference_of(claim, seed))  # built once, and only if it is needed
    test = DotTest(
        claim.forward,
        claim.adjoint,
        exact=claim.exact,
        seed=seed,
        reference=None if claim.derive is None else lambda: trusted()[0],
        powers=claim.powers,
    )
    with torch.no_grad(), full_precision:
        try:
            test.run(trials, given)
        except BrokenError as error:
            return _report(test, trials, str(error), broken=True)
        return _report(test, trials, *(("",) if test.passed else diagnose(test, *trusted(), seed)))


def _report(test: DotTest, trials: int, diagnosis: str, figure: Figure = (), *, broken: bool = False) -> AdjointReport:
    vacuous = test.vacuous and not broken
    rounding = "rounding inside is {:.3g} eps (cancellation): the tolerance was measured"
    avoidable = "rounding inside the adjoint is {:.3g} eps, more than it need be: the tolerance leaves it out"
    lost = ", ".join(dict.fromkeys(test.lost_in_rounding))
    notes = [
        *(["vacuous: A and B are zero on every draw, so nothing was compared"] if vacuous else []),
        *([rounding.format(test.used_noise)] if test.used_noise > 1.0 else []),
        *([avoidable.format(test.avoidable_noise)] if test.avoidable_noise else []),
        *test.notes,
        *([f"left out, lost in rounding: {lost}"] if lost else []),
    ]
    _, error, tolerance, worst = test.worst or (0.0, float("nan"), 4 * test.eps, "")
    if broken:
        error, worst = float("nan"), ""
    return AdjointReport(
        test.passed and not broken, error, tolerance, test.eps, trials, diagnosis, test.pairs, worst,
        test.missed_row_probability(), vacuous, tuple(notes), figure,
    )  # fmt: skip


def assert_adjoint(
    A: LinearOperator | AffineOperator | Callable[..., Any],
    adjoint: Callable[[Any], Any] | None = None,
    **options: Any,
) -> None:
    """Raise unless ``⟨Ax, y⟩ = ⟨x, By⟩`` on random and structured x and y: :func:`check_adjoint` as an assertion.

    Parameters
    ----------
    A, adjoint, **options
        As in :func:`check_adjoint`.

    Raises
    ------
    AdjointMismatchError
        If the test fails; the message is the report, and the attribute ``report`` holds it.

    Examples
    --------
    >>> from adjointlab import identity
    >>> assert_adjoint(identity((3,)))
    """
    report = check_adjoint(A, adjoint, **options)
    if not report.passed:
        error = AdjointMismatchError(str(report))
        error.report = report  # type: ignore[attr-defined]
        raise error


def _finite(space: Space, element: Any, name: str) -> Tensors | None:
    if element is None:
        return None
    leaves = space.leaves(element, name)
    if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
        raise SpaceMismatchError(f"expected {name} to be finite, got NaN or infinity: pass finite numbers")
    return tuple(leaf.detach() for leaf in leaves)


__all__ = ["assert_adjoint", "check_adjoint"]
