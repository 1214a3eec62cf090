"""The test of a derivative: Taylor's remainder, J against finite differences, and J.H against J."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adjointlab.errors import NotDifferentiableError, SpaceMismatchError
from adjointlab.jacobians import Jacobian, jacobian
from adjointlab.modules import attributes_kept, buffers_kept
from adjointlab.numerics import full_precision
from adjointlab.reporting import Curve
from adjointlab.space import Space
from adjointlab.verify.derivative_diagnosis import diagnose, entry_of
from adjointlab.verify.derivative_report import DerivativeReport
from adjointlab.verify.differences import Along, Differences, flat

_RANDOM = 3  # directions in all leaves at once


def check_derivative(
    f: Callable[..., Any],
    x0: Any,
    *,
    kwargs: dict[str, Any] | None = None,
    batch_dims: int = 0,
    seed: int = 0,
) -> DerivativeReport:
    r"""Test ``f(x₀ + h d) = f(x₀) + h J d + O(h²)`` and ``⟨J d, v⟩ = ⟨d, Jᴴ v⟩``, where J is ``al.jacobian(f, x0)``.

    It is a test of the backward of f, a hand-written one above all: autograd knows the derivative from that alone, and
    J as well as ``J.H`` are wrong where it is wrong. So both are compared with differences of values of f.

    In random directions, in all leaves of x₀ and in each alone, every entry of ``J d`` is compared with central
    differences at a ladder of steps. Each difference has a bound of its own error, of truncation by Richardson's rule
    and of rounding as it is measured, and each entry takes the step where its bound is least. A function with a kink at
    x₀, as ``|x|`` has at 0, is told from a wrong backward: its one-sided differences stay apart at all steps.

    Parameters
    ----------
    f : nn.Module or callable
        A differentiable function, as for :func:`adjointlab.jacobian`.
    x0 : pytree of tensors
        The point. If f is a module and x₀ a dictionary with names of its parameters, the derivative in these is tested.
    kwargs : dict, optional
        Fixed keyword arguments of f.
    batch_dims : int
        The first ``batch_dims`` dimensions of every leaf count samples, which f treats one by one.
    seed : int
        Seed of the directions; torch's global generator is not used.

    Returns
    -------
    DerivativeReport
        Slope, error, tolerance and diagnosis. A failed test does not raise.

    Raises
    ------
    NotDifferentiableError
        If autograd has no derivative of f at x₀, as :func:`adjointlab.jacobian` says, f is not finite there, or two
        calls at x₀ differ.
    SpaceMismatchError
        If x₀ is no pytree of finite tensors, is spread over processes, or f does not take it.

    References
    ----------
    L. F. Richardson, *The approximate arithmetical solution by finite differences …*, Phil. Trans. R. Soc. A 210, 1911.

    Examples
    --------
    >>> import torch
    >>> x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    >>> report = check_derivative(torch.sin, x)
    >>> report.passed, round(report.slope, 1)
    (True, 2.0)
    >>> check_derivative(torch.abs, torch.zeros(1)).diagnosis
    'f has a kink at x0: one-sided differences stay apart in f, so f has no derivative there; move x0'
    """
    if not all(bool(torch.isfinite(leaf).all()) for leaf in Space.of(x0, batch_dims=batch_dims).leaves(x0, "x0")):
        raise SpaceMismatchError("expected x0 to be finite, got NaN or infinity: pass finite numbers")
    return check_jacobian(jacobian(f, x0, kwargs=kwargs, batch_dims=batch_dims), seed)


def assert_derivative(f: Callable[..., Any], x0: Any, **options: Any) -> None:
    """Raise unless ``f(x₀ + h d) = f(x₀) + h J d + O(h²)``: :func:`check_derivative` as an assertion.

    Parameters
    ----------
    f, x0, **options
        As in :func:`check_derivative`.

    Raises
    ------
    AdjointMismatchError
        If the test fails; the message is the diagnosis and the details, and the attribute ``report`` is the report.

    Examples
    --------
    >>> import torch
    >>> assert_derivative(torch.sin, torch.ones(3))
    """
    check_derivative(f, x0, **options).require()


def check_jacobian(J: Jacobian, seed: int = 0) -> DerivativeReport:
    """Return the report of :func:`check_derivative` for a Jacobian that was built."""
    if J.domain.is_sharded:
        raise SpaceMismatchError("expected x0 on one process, got a sharded one: check the derivative on one process")
    point = tuple(leaf.detach() for leaf in J.domain.leaves(J.point))
    modules = tuple(J.function.modules)
    with attributes_kept(modules), buffers_kept(modules), full_precision:
        f = J.function.tried
        with torch.no_grad():
            test = Differences(f, J, point, seed)
            _require_values(test, flat(f(point)))
            leaves = range(len(point)) if len(point) > 1 else ()
            seen = [test.along(f"random direction {number}", test.draw()) for number in range(_RANDOM)]
            seen += [test.along(f"leaf {leaf} of x0 alone", test.draw(leaf)) for leaf in leaves]
            return _report(test, J, seen)


def _require_values(test: Differences, again: Tensor) -> None:
    if not bool(torch.isfinite(test.value).all()):
        raise NotDifferentiableError("expected f(x0) to be finite, got NaN or infinity: move x0")
    # A parallel sum may be rounded in another order each time.
    if bool(((again - test.value).abs() > math.sqrt(test.eps) * test.value.abs().max()).any()):
        raise NotDifferentiableError(
            "expected a function, but two calls at x0 differ: call .eval() on dropout, or fix the random numbers"
        )


def _report(test: Differences, J: Jacobian, seen: Sequence[Along]) -> DerivativeReport:
    is_wrong, has_kink = (any(bool(getattr(a, name).any()) for a in seen) for name in ("wrong", "kinks"))
    dots = test.dot_gaps(seen)
    dot_error, dot_tolerance = max(dots, key=lambda dot: dot[0] / dot[1] if math.isfinite(dot[0]) else math.inf)
    dot_holds = dot_error <= dot_tolerance
    passed = dot_holds and not is_wrong and not has_kink
    error, tolerance, worst = _worst(test, seen)
    slopes = [[_slope(curve) for curve in along.curves] for along in seen]
    least = [min((s[k] for s in slopes if not math.isnan(s[k])), default=math.inf) for k in range(len(test.sizes))]
    leaf = min(range(len(least)), key=least.__getitem__)
    blurred = _blurred(test, seen)
    notes = [f"differences say little about {blurred}: f is rough or rounded there"] if blurred and passed else []
    return DerivativeReport(
        passed, least[leaf] if math.isfinite(least[leaf]) else math.nan, error, tolerance, dot_error, dot_tolerance,
        test.eps, len(seen), test.calls, worst, tuple(notes),
        "" if passed else diagnose(test, J, seen, dot_holds), _figure(seen, leaf),
    )  # fmt: skip


def _worst(test: Differences, seen: Sequence[Along]) -> tuple[float, float, str]:
    """Return error and tolerance of the entry whose ratio is largest, in units of its leaf, and its name."""
    found = (-1.0, 0.0, 0.0, "")
    begins = [0, *itertools.accumulate(test.sizes)]
    for along, (begin, end) in itertools.product(seen, itertools.pairwise(begins)):
        gap, bound = along.gap[begin:end], along.bound[begin:end].clamp(max=1e300)
        excess = torch.where(gap == 0, 0.0, gap / bound).nan_to_num(math.inf)
        if begin < end and float(excess.max()) > found[0]:
            at = int(excess.argmax())
            sizes = along.predicted[begin:end].abs(), along.estimate[begin:end].abs().nan_to_num(0.0)
            scale = float(torch.maximum(*sizes).max()) or 1.0
            name = f"{along.name}, {entry_of(test, begin + at)}"
            found = float(excess[at]), float(gap[at]) / scale, float(bound[at]) / scale, name
    return found[1:]


def _blurred(test: Differences, seen: Sequence[Along]) -> str:
    """Return the leaves of f in which bounds exceed a half of the derivative and of f, in words."""

    def is_blurred(k: int) -> bool:
        bounds, estimates = ([getattr(a, name).split(test.sizes)[k] for a in seen] for name in ("bound", "estimate"))
        value = test.value.split(test.sizes)[k].norm() + test.tiny / test.eps
        pairs = zip(bounds, estimates, strict=True)
        return all(bool(2 * b.norm() > e.norm().nan_to_num(0.0) + value) for b, e in pairs)

    leaves = [str(k) for k in range(len(test.sizes)) if is_blurred(k)]
    return f"leaf {', '.join(leaves)} of f" if leaves and len(test.sizes) > 1 else "f" if leaves else ""


def _slope(curve: Sequence[tuple[float, float, float]]) -> float:
    """Return the slope of Taylor's remainder at the smallest steps where it is not rounding; NaN if it always is."""
    seen = list(itertools.takewhile(lambda point: point[1] > 8 * point[2], curve))
    if len(seen) < 2:
        return math.nan
    (h, larger, _), (small, smaller, _) = seen[-2:]
    slope = math.log(larger / smaller) / math.log(h / small)
    if len(seen) < len(curve):
        h, now, noise = curve[len(seen)]
        fall = math.log(smaller / max(now, 8 * noise, 1e-300)) / math.log(small / h)
        if fall > slope + 1:  # nearer than some kink, there is no remainder but rounding
            return math.nan
    return slope


def _figure(seen: Sequence[Along], leaf: int) -> tuple[Curve, ...]:
    return tuple((along.name, tuple((h, remainder) for h, remainder, _ in along.curves[leaf])) for along in seen)
