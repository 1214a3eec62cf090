"""The dot-product test of derived and hand-written adjoints: ``⟨Ax, y⟩ = ⟨x, By⟩``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from adjointlab.affine import AffineOperator
from adjointlab.derive import linear_operator
from adjointlab.errors import NotDifferentiableError, NotLinearError, SpaceMismatchError, remedy_of
from adjointlab.linearity import like_parameters, require_map
from adjointlab.numerics import full_precision
from adjointlab.operators import LinearOperator
from adjointlab.progress import progress_of
from adjointlab.space import Space
from adjointlab.space.coordinates import real_element, real_size, real_vector
from adjointlab.space.refusals import remedy_for
from adjointlab.transpose.frontend.vjp import applied
from adjointlab.tree import tree_flatten
from adjointlab.verify.checked_map import BrokenError, CheckedMap, Tensors
from adjointlab.verify.diagnosis import diagnose
from adjointlab.verify.dot_test import DotTest
from adjointlab.verify.figure import Figure
from adjointlab.verify.report import AdjointReport
from adjointlab.weighted import without_weights

_MOST_COLUMNS = 512  # largest real dimension for which the dense matrix is computed


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
    progress: bool | None = None,
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
    progress : bool, optional
        Whether to show a line on standard error with the progress; by default on a terminal, after two seconds.

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
    claim, is_affine = _claim_of(A, adjoint, domain, codomain), isinstance(A, AffineOperator)
    given = None
    if x is not None or y is not None:
        given = (_finite(claim.forward.space, x, "x"), _finite(claim.adjoint.space, y, "y"))
    trusted = functools.cache(lambda: _reference_of(claim, seed))  # built once, and only if it is needed
    test = DotTest(
        claim.forward,
        claim.adjoint,
        exact=claim.exact,
        seed=seed,
        reference=None if claim.derive is None else lambda: trusted()[0],
        powers=claim.powers,
    )
    with torch.no_grad(), full_precision, progress_of("check_adjoint", progress):
        try:
            test.run(trials, given)
        except BrokenError as error:
            return _report(test, trials, is_affine, str(error), broken=True)
        if test.passed:
            return _report(test, trials, is_affine, "")
        if claim.unweighted is not None and _passes(claim, claim.unweighted, seed):
            said = "the weights of the spaces are missing: B is Aᴴ instead of W_X⁻¹ Aᴴ W_Y"
            return _report(test, trials, is_affine, said)
        return _report(test, trials, is_affine, *diagnose(test, *trusted(), seed))


def _report(
    test: DotTest, trials: int, is_affine: bool, diagnosis: str, figure: Figure = (), *, broken: bool = False
) -> AdjointReport:
    vacuous = test.vacuous and not broken
    rounding = "rounding inside is {:.3g} eps (cancellation): the tolerance was measured"
    avoidable = "rounding inside the adjoint is {:.3g} eps, more than it need be: the tolerance leaves it out"
    lost = ", ".join(dict.fromkeys(test.lost_in_rounding))
    notes = [
        *(["A is affine: its linear part, without the offset, was tested"] if is_affine else []),
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
        test.passed and not broken, error, tolerance, test.eps, trials, test.pairs, worst,
        test.missed_row_probability(), vacuous, tuple(notes), diagnosis, figure,
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
        If the test fails; the message is the diagnosis and the details, and the attribute ``report`` is the report.

    Examples
    --------
    >>> from adjointlab import identity
    >>> assert_adjoint(identity((3,)))
    """
    check_adjoint(A, adjoint, **options).require()


def _finite(space: Space, element: Any, name: str) -> Tensors | None:
    if element is None:
        return None
    leaves = space.leaves(element, name)
    if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
        raise SpaceMismatchError(f"expected {name} to be finite, got NaN or infinity: pass finite numbers")
    return tuple(leaf.detach() for leaf in leaves)


# -- the claim -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Claim:
    """A claim that one map is the adjoint of another, and how to derive a trusted adjoint."""

    forward: CheckedMap
    adjoint: CheckedMap
    exact: bool
    powers: tuple[int, ...]
    # Returns an operator whose A.H may serve as the reference. No process can compare all entries of a sharded element,
    # so there is none for it, and the diagnosis uses inner products only.
    derive: Callable[[], LinearOperator] | None
    unweighted: CheckedMap | None = None  # the claimed adjoint as that of the spaces without their weights, if any


def _claim_of(A: Any, adjoint: Any, domain: Any, codomain: Any) -> _Claim:
    """Return the claim to test, for the arguments of ``check_adjoint``."""
    if adjoint is not None and not callable(adjoint):
        raise SpaceMismatchError(
            f"expected adjoint to be callable, got {type(adjoint).__name__}: pass the function itself, "
            "and a domain as domain=…"
        )
    if isinstance(A, (LinearOperator, AffineOperator)):
        if domain is not None or codomain is not None:
            raise SpaceMismatchError(
                "expected no domain or codomain beside an operator, which has its own: leave it out"
            )
        return _of_operator(A.linear if isinstance(A, AffineOperator) else A, adjoint)
    require_map(A)
    if domain is None:
        raise SpaceMismatchError(
            f"expected a LinearOperator, or a domain beside the plain callable {getattr(A, '__name__', 'A')}: "
            "pass domain=(1, 1, 64, 64), say, or wrap it with al.linear_operator"
        )
    if adjoint is None:
        return _of_operator(linear_operator(A, domain, check=False), None)
    return _of_pair(A, adjoint, domain, codomain)


def _of_operator(operator: LinearOperator, adjoint: Callable[[Any], Any] | None) -> _Claim:
    domain, codomain = operator.domain, operator.codomain
    forward = CheckedMap(operator, domain.plain, codomain.plain, "A")
    is_pair = operator.source is None and not operator.parts
    name = "the derived adjoint" if adjoint is None and not is_pair else "the adjoint"
    back, unweighted = _plain_adjoint(adjoint or operator.H, domain, codomain, name)
    parts = [part for part in operator.modules() if isinstance(part, LinearOperator)]
    # Subtracting an offset causes rounding errors that are large relative to small elements.
    offset = any(part.source is not None and part.source.options.affine for part in parts)
    derive: Callable[[], LinearOperator] | None = None
    if not domain.is_sharded:
        if adjoint is not None:
            derive = lambda: without_weights(operator)  # noqa: E731
        elif is_pair:
            derive = _underivable
    return _Claim(forward, back, operator.is_complex_linear, (20,) if offset else (20, -20), derive, unweighted)


def _underivable() -> LinearOperator:
    raise NotDifferentiableError("expected a map to differentiate, got one that is given with its adjoint")


def _plain_adjoint(adjoint: Any, domain: Space, codomain: Space, name: str) -> tuple[CheckedMap, CheckedMap | None]:
    """Return a claimed adjoint B as one between the spaces without weights, ``W_X B W_Y⁻¹``; and B itself, if other."""
    side = CheckedMap(adjoint, codomain, domain, name, read_only=True)
    if domain.weight is codomain.weight is None:
        return side, None

    def plain(y: Any) -> Any:
        return domain.weigh(domain.unflatten(side(codomain.leaves(codomain.unweigh(y)))))

    spaces = codomain.plain, domain.plain
    return CheckedMap(plain, *spaces, name), CheckedMap(adjoint, *spaces, name)


def _of_pair(function: Callable[..., Any], adjoint: Callable[[Any], Any], domain: Any, codomain: Any) -> _Claim:
    space = like_parameters(function, domain, 0)
    if space.is_sharded and codomain is None:
        raise SpaceMismatchError(
            f"expected a codomain beside the sharded domain {space}: how results are spread cannot be seen from one "
            "process; pass codomain=adjointlab.distributed.space(...)"
        )

    def forward(x: Any) -> Any:
        return applied(function, x, {})

    image = _image(forward, space) if codomain is None else Space.of(codomain, dtype=space.specs[0].dtype)
    back, unweighted = _plain_adjoint(adjoint, space, image, "the adjoint")
    forward_side = CheckedMap(forward, space.plain, image.plain, "A")
    pair = LinearOperator(lambda x: image.unflatten(forward_side(space.leaves(x))), adjoint, space, image)
    try:
        exact = pair.is_complex_linear
    except BrokenError:  # which the test will meet and report
        exact = False
    derive = None if space.is_sharded else lambda: linear_operator(function, space.plain, check=False)
    return _Claim(forward_side, back, exact, (20, -20), derive, unweighted)


def _image(forward: Callable[[Any], Any], space: Space) -> Space:
    """Return the space of the results of a function, by calling it once on random numbers."""
    with torch.no_grad():
        try:
            result = forward(space.randn(torch.Generator().manual_seed(0)))
        except Exception as error:  # a third-party function may raise anything
            line = next(iter(str(error).splitlines()), "")
            raise SpaceMismatchError(
                f"expected A to take an element of {space}, but it raised {type(error).__name__}: {line}; "
                f"{remedy_of(error, 'check domain')}"
            ) from error
    others = [leaf for leaf in tree_flatten(result)[0] or [None] if not isinstance(leaf, torch.Tensor)]
    if others:
        raise SpaceMismatchError(
            f"expected A to return a tensor or a pytree of tensors, got {type(result).__name__}: "
            f"{remedy_for(others[0])}"
        )
    return Space.of(result)


def _reference_of(claim: _Claim, seed: int) -> tuple[CheckedMap | None, LinearOperator | None]:
    """Return a trusted adjoint with its operator: the derived one if it passes the test, else the dense one."""
    if claim.derive is None:
        return None, None
    # There may be no derived adjoint, or the map may be no map.
    with contextlib.suppress(SpaceMismatchError, NotDifferentiableError, NotLinearError, BrokenError):
        operator = claim.derive()
        if operator.codomain == claim.adjoint.space:
            derived = CheckedMap(operator.H, claim.adjoint.space, claim.forward.space, "the derived adjoint")
            if _passes(claim, derived, seed):
                return derived, operator
    with contextlib.suppress(BrokenError):
        return _dense(claim.forward), None
    return None, None


def _passes(claim: _Claim, adjoint: CheckedMap, seed: int) -> bool:
    """Return whether a map passes a short test as the adjoint."""
    test = DotTest(claim.forward, adjoint, exact=claim.exact, seed=seed + 1)
    test.run(2, thorough=False)
    return test.passed


def _dense(forward: CheckedMap) -> CheckedMap | None:
    """Return the transpose of A's real matrix, computed column by column, if A is small."""
    space, codomain = forward.space, forward.codomain
    if real_size(space) > _MOST_COLUMNS:
        return None

    def coordinates(y: Any) -> torch.Tensor:
        return real_vector(codomain, y).double()

    basis = torch.eye(real_size(space), device=space.specs[0].device)
    images = [forward(space.leaves(real_element(space, e))) for e in basis]
    matrix = torch.stack([coordinates(codomain.unflatten(image)) for image in images])
    return CheckedMap(lambda y: real_element(space, matrix @ coordinates(y)), codomain, space, "the dense adjoint")
