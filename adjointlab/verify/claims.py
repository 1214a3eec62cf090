"""The claim that one map is the adjoint of another, and a trusted adjoint to compare it with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from adjointlab.affine import AffineOperator
from adjointlab.derive import linear_operator
from adjointlab.errors import NotDifferentiableError, NotLinearError, SpaceMismatchError
from adjointlab.linearity import like_parameters
from adjointlab.operators import LinearOperator
from adjointlab.space import Space
from adjointlab.space.coordinates import real_element, real_size, real_vector
from adjointlab.tree import tree_flatten
from adjointlab.verify.checked_map import BrokenError, CheckedMap
from adjointlab.verify.dot_test import DotTest


@dataclass(frozen=True)
class Claim:
    """A claim that one map is the adjoint of another, and how to derive a trusted adjoint."""

    forward: CheckedMap
    adjoint: CheckedMap
    exact: bool
    powers: tuple[int, ...]
    # Returns an operator whose A.H may serve as the reference. No process can compare all entries of a sharded element,
    # so there is none for it, and the diagnosis uses inner products only.
    derive: Callable[[], LinearOperator] | None


def claim_of(A: Any, adjoint: Any, domain: Any, codomain: Any) -> Claim:
    """Return the claim to test, for the arguments of ``check_adjoint``."""
    if adjoint is not None and not callable(adjoint):
        raise SpaceMismatchError(
            f"expected adjoint to be callable, got {type(adjoint).__name__}: pass the function itself"
        )
    if isinstance(A, (LinearOperator, AffineOperator)):
        if domain is not None or codomain is not None:
            raise SpaceMismatchError(
                "expected no domain or codomain beside an operator, which has its own: leave it out"
            )
        return _of_operator(A.linear if isinstance(A, AffineOperator) else A, adjoint)
    if not callable(A):
        raise SpaceMismatchError(f"expected a LinearOperator, a module or a function, got {type(A).__name__}")
    if domain is None:
        raise SpaceMismatchError(
            f"expected a LinearOperator, or a domain beside the plain callable {getattr(A, '__name__', 'A')}: "
            "pass domain=(1, 1, 64, 64), say, or wrap it with al.linear_operator"
        )
    if adjoint is None:
        return _of_operator(linear_operator(A, domain, check=False), None)
    return _of_pair(A, adjoint, domain, codomain)


def _of_operator(operator: LinearOperator, adjoint: Callable[[Any], Any] | None) -> Claim:
    forward = CheckedMap(operator, operator.domain, operator.codomain, "A")
    name = "the derived adjoint" if adjoint is None else "the adjoint"
    back = CheckedMap(adjoint or operator.H, operator.codomain, operator.domain, name, read_only=True)
    parts = [part for part in operator.modules() if isinstance(part, LinearOperator)]
    # Subtracting an offset causes rounding errors that are large relative to small elements.
    offset = any(part.source is not None and part.source.options.affine for part in parts)
    derive = None if adjoint is None or operator.domain.is_sharded else lambda: operator
    return Claim(forward, back, operator.is_complex_linear, (20,) if offset else (20, -20), derive)


def _of_pair(function: Callable[..., Any], adjoint: Callable[[Any], Any], domain: Any, codomain: Any) -> Claim:
    space = like_parameters(function, domain, 0)
    if space.is_sharded and codomain is None:
        raise SpaceMismatchError(
            f"expected a codomain beside the sharded domain {space}: how results are spread cannot be seen from one "
            "process; pass codomain=adjointlab.distributed.space(...)"
        )

    def forward(x: Any) -> Any:
        return function(*x) if type(x) is tuple else function(x)

    image = _image(forward, space) if codomain is None else Space.of(codomain, dtype=space.specs[0].dtype)
    back = CheckedMap(adjoint, image, space, "the adjoint", read_only=True)
    forward_side = CheckedMap(forward, space, image, "A")
    pair = LinearOperator(lambda x: image.unflatten(forward_side(space.leaves(x))), adjoint, space, image)
    try:
        exact = pair.is_complex_linear
    except BrokenError:  # which the test will meet and report
        exact = False
    derive = None if space.is_sharded else lambda: linear_operator(function, space, check=False)
    return Claim(forward_side, back, exact, (20, -20), derive)


def _image(forward: Callable[[Any], Any], space: Space) -> Space:
    """Return the space of the results of a function, by calling it once on random numbers."""
    with torch.no_grad():
        try:
            result = forward(space.randn(torch.Generator().manual_seed(0)))
        except Exception as error:
            line = next(iter(str(error).splitlines()), "")
            raise SpaceMismatchError(
                f"expected A to take an element of {space}, but it raised {type(error).__name__}: {line}; check domain"
            ) from error
    leaves, _ = tree_flatten(result)
    if not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise SpaceMismatchError(
            f"expected A to return a tensor or a pytree of tensors, got {type(result).__name__}: return tensors only"
        )
    return Space.of(result)


_MOST_COLUMNS = 512  # largest real dimension for which the dense matrix is computed


def reference_of(claim: Claim, seed: int) -> tuple[CheckedMap | None, LinearOperator | None]:
    """Return a trusted adjoint with its operator: the derived one if it passes the test, else the dense one."""
    if claim.derive is None:
        return None, None
    # There may be no derived adjoint, or the map may be no map.
    with contextlib.suppress(SpaceMismatchError, NotDifferentiableError, NotLinearError, BrokenError):
        operator = claim.derive()
        if operator.codomain == claim.adjoint.space:
            derived = CheckedMap(operator.H, claim.adjoint.space, claim.forward.space, "the derived adjoint")
            test = DotTest(claim.forward, derived, exact=claim.exact, seed=seed + 1)
            test.run(2, thorough=False)
            if test.passed:
                return derived, operator
    with contextlib.suppress(BrokenError):
        return _dense(claim.forward), None
    return None, None


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


__all__ = ["Claim", "claim_of", "reference_of"]
