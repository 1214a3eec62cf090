"""The dot-product test: ``⟨Ax, y⟩ = ⟨x, By⟩`` for random x and y, with double-precision sums and a derived tolerance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from adjointlab.affine import AffineOperator
from adjointlab.errors import AdjointMismatchError, SpaceMismatchError
from adjointlab.linear_operator import LinearOperator
from adjointlab.linearity import dot_gap


@dataclass(frozen=True)
class AdjointReport:
    """The outcome of a dot-product test; made by :func:`check_adjoint`.

    Attributes
    ----------
    passed : bool
        Whether the error stayed within the tolerance in every trial.
    error : float
        Largest ``|⟨Ax, y⟩ − ⟨x, By⟩| / max(‖Ax‖‖y‖, ‖x‖‖By‖)``.
    tolerance : float
        What rounding may explain of it.
    eps : float
        Unit roundoff of the coarser space.
    trials : int
        Number of pairs (x, y).
    diagnosis : tuple of str
        What is wrong, in words; empty if the test passed.
    """

    passed: bool
    error: float
    tolerance: float
    eps: float
    trials: int
    diagnosis: tuple[str, ...] = ()

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        lines = [
            f"adjoint test {verdict}",
            f"  error      {self.error:.3e}  ({self.error / self.eps:.3g} eps)",
            f"  tolerance  {self.tolerance:.3e}  ({self.tolerance / self.eps:.3g} eps)",
            f"  trials     {self.trials}",
        ]
        lines.extend(f"  diagnosis  {item}" for item in self.diagnosis)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        return {
            "passed": self.passed,
            "error": self.error,
            "tolerance": self.tolerance,
            "eps": self.eps,
            "trials": self.trials,
            "diagnosis": list(self.diagnosis),
        }


def check_adjoint(
    A: LinearOperator | AffineOperator,
    adjoint: Callable[[Any], Any] | None = None,
    *,
    trials: int = 5,
    seed: int = 0,
    x: Any = None,
    y: Any = None,
) -> AdjointReport:
    """Test ``⟨Ax, y⟩ = ⟨x, By⟩`` for random x and y, B being ``A.H`` or a hand-written adjoint.

    Parameters
    ----------
    A : LinearOperator or AffineOperator
        The operator; of an affine one, the linear part is tested.
    adjoint : callable, optional
        The claimed adjoint B; ``A.H`` if not given.
    trials : int
        Number of random pairs.
    seed : int
        Seed of the draws; torch's global generator is left alone.
    x, y : pytree of tensors, optional
        A pair to test first.

    Returns
    -------
    AdjointReport
        Error, tolerance and diagnosis; nothing is raised if the test fails.

    Raises
    ------
    SpaceMismatchError
        If x or y is not an element of its space, or is not finite.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import linear_operator
    >>> A = linear_operator(torch.nn.Conv2d(1, 1, 3, padding=1, bias=False), (1, 1, 8, 8))
    >>> check_adjoint(A).passed
    True
    >>> check_adjoint(A, adjoint=lambda v: 2 * A.H(v)).passed
    False
    """
    linear = A.linear if isinstance(A, AffineOperator) else A
    back = linear.H if adjoint is None else adjoint
    generator = torch.Generator().manual_seed(seed)
    exact = linear.is_complex_linear
    worst = (0.0, 0.0, 0.0)
    pairs = [] if x is None and y is None else [(x, y)]
    pairs += [(None, None)] * trials
    with torch.no_grad():
        for given_x, given_y in pairs:
            u = linear.domain.leaves(linear.domain.randn(generator) if given_x is None else given_x)
            v = linear.codomain.leaves(linear.codomain.randn(generator) if given_y is None else given_y)
            for name, leaves in (("x", u), ("y", v)):
                if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves):
                    raise SpaceMismatchError(f"expected {name} to be finite, got NaN or infinity: pass finite numbers")
            at_x = linear.codomain.leaves(linear(linear.domain.unflatten(u)))
            at_y = linear.domain.leaves(back(linear.codomain.unflatten(v)), "the result of the adjoint")
            gap, allowed = dot_gap(linear.domain, linear.codomain, u, at_x, v, at_y, exact=exact)
            excess = gap / allowed if allowed else float(gap > 0) * float("inf") if gap else 0.0
            if not excess <= worst[0] or worst[2] == 0.0:
                worst = (excess, gap, allowed)
    eps = max(linear.domain.eps, linear.codomain.eps)
    passed = bool(worst[1] <= worst[2])
    diagnosis = () if passed else ("the inner products differ by more than rounding explains",)
    return AdjointReport(passed, worst[1], worst[2], eps, len(pairs), diagnosis)


def assert_adjoint(A: LinearOperator | AffineOperator, adjoint: Callable[[Any], Any] | None = None, **options: Any) -> None:
    """Raise unless ``⟨Ax, y⟩ = ⟨x, By⟩`` for random x and y: :func:`check_adjoint` as an assertion.

    Parameters
    ----------
    A, adjoint, **options
        As in :func:`check_adjoint`.

    Raises
    ------
    AdjointMismatchError
        If the test fails; the message is the report.

    Examples
    --------
    >>> from adjointlab import identity
    >>> assert_adjoint(identity((3,)))
    """
    report = check_adjoint(A, adjoint, **options)
    if not report.passed:
        raise AdjointMismatchError(str(report))


__all__ = ["AdjointReport", "assert_adjoint", "check_adjoint"]
