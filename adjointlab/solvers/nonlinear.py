r"""Non-linear least squares, ``½‖f(x) − y‖²_W + ½ damp² ‖x‖² + ½ Σ λ ‖Lx − b‖²``, by linearizing f at each iterate.

With the Jacobian J of f at x, a step d minimises the quadratic model, in which f is ``f(x) + J d``: a linear problem,
that ``cg`` or ``cgls`` solves as far as is worth while. The norm of its gradient is brought down by a *forcing term*,
which shrinks as well as the last model foretold the gradient of the objective.

References
----------
R. S. Dembo, S. C. Eisenstat, T. Steihaug, *Inexact Newton methods*, SIAM J. Numer. Anal. 19 (1982) 400–408. S. C.
Eisenstat, H. F. Walker, *Choosing the forcing terms in an inexact Newton method*, SIAM J. Sci. Comput. 17 (1996) 16–32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adjointlab.blocks import identity
from adjointlab.jacobians import Jacobian, jacobian
from adjointlab.progress import Line, progress_of
from adjointlab.solvers import implicit
from adjointlab.solvers.objective import Inner, Iterate, Objective
from adjointlab.solvers.problem import Preconditioner, count, nonnegative
from adjointlab.solvers.solution import CONVERGED, REASONS, Callback, Info, Solution, Status
from adjointlab.space.algebra import added, scaled
from adjointlab.terms import Penalty, weight_operator
from adjointlab.tree import map_leaves

_INNER = 100  # steps of the linear solver for one step, unless told
_DECREASE = 1e-4  # of what a linear model promises, at least (Armijo)
_FORCING = 0.1, 0.5  # of the first step, and the largest of the others
_FREE = 0.1  # of the gradient, up to which the damping of a step plays no part in it
_EASE = 1e-3  # of a damping that keeps steps too short to be seen


# From an iterate and a forcing term to the next one, and whether the step was not shortened; else why there is none.
Advance = Callable[[Iterate, float], "tuple[Iterate, bool] | Status"]


def _line_search(inner: Inner) -> Advance:
    """Return the rule of Gauss–Newton: along the step of the model, as far as the objective falls enough."""

    def advance(at: Iterate, forcing: float) -> tuple[Iterate, bool] | Status:
        d, length = at.step(forcing, inner), 1.0
        if isinstance(d, Status):
            return d
        along = -float(at.J.domain.inner(at.descent, d).real)
        if not -math.inf < along < 0:
            return Status.NOT_FINITE if math.isnan(along) else Status.NO_DESCENT
        if -along <= at.noise:
            return _settled(at, at.moved(d))
        seen = at.noise
        while -along * length > at.noise:
            new = at.moved(d, length)
            if new.value < at.value and new.value <= at.value + _DECREASE * length * along:
                return new, length == 1
            excess = new.value - at.value - length * along  # of the curve over its tangent: the parabola's minimum
            best = -along * length**2 / (2 * excess) if excess > 0 and math.isfinite(excess) else 0.0
            length = min(max(best, length / 10), length / 2)
            seen = abs(new.value - at.value)  # of the last and shortest step, the rounding of the objective
        return Status.PRECISION if -along <= 16 * max(seen, at.noise) else Status.NO_DESCENT

    return advance


def _settled(at: Iterate, new: Iterate) -> tuple[Iterate, bool] | Status:
    """Return an iterate whose objective equals the last one's within rounding, as long as its gradient is smaller."""
    is_better = new.value <= at.value + at.noise and new.slope < at.slope
    return (new, True) if is_better else Status.PRECISION


def _trust(inner: Inner, tau: float) -> Advance:
    """Return the rule of Levenberg and Marquardt: damped steps, by the ratio of gain and promise."""
    mu, factor = math.nan, 2.0

    def advance(at: Iterate, forcing: float) -> tuple[Iterate, bool] | Status:
        nonlocal mu, factor
        if math.isnan(mu):  # a curvature of the model stands for the largest entry of its diagonal
            mu = tau * at.energy(scaled(1 / at.slope, at.descent))
        tries = 0
        while True:
            if not mu < math.inf:
                return Status.NO_DESCENT if tries else Status.NOT_FINITE
            d = at.step(forcing, inner, math.sqrt(mu))
            if isinstance(d, Status):
                return d
            promised, is_free = at.promise(d), 0 < mu * float(at.J.domain.norm(d)) <= _FREE * at.slope
            if not math.isfinite(promised):
                return Status.NOT_FINITE
            if promised <= at.noise and tries:
                return Status.NO_DESCENT
            if promised <= at.noise and (is_free or not mu):
                return _settled(at, at.moved(d))
            if promised <= at.noise:  # a step that is short for its damping tells nothing
                mu *= _EASE
                continue
            new = at.moved(d)
            gain = (at.value - new.value) / promised
            if gain > 0:
                mu, factor = mu * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2.0
                return new, is_free and not tries
            mu, factor, tries = mu * factor, 2 * factor, tries + 1

    return advance


def gauss_newton(
    f: Callable[..., Any],
    y: Any,
    x0: Any,
    *,
    kwargs: dict[str, Any] | None = None,
    weight: Any = None,
    damp: float | Tensor = 0.0,
    penalties: Sequence[tuple[Any, ...]] = (),
    maxiter: int = 50,
    tol: float = 1e-6,
    inner: int = _INNER,
    normal: bool | None = None,
    precondition: Preconditioner[Any] | None = None,
    callback: Callback | None = None,
    progress: bool | None = None,
) -> Solution:
    r"""Minimise ``½‖f(x) − y‖²_W + ½ damp² ‖x‖² + ½ Σ λ ‖Lx − b‖²`` by Gauss–Newton steps with a line search.

    The solver stops where the norm of the gradient is at most ``tol`` times that at x₀, or a step is at most ``tol``
    times x long.

    Parameters
    ----------
    f : callable or Jacobian
        A differentiable function, as :func:`adjointlab.jacobian` takes it, or a Jacobian of it, which is not derived
        again.
    y : pytree of tensors
        The data, of the form of ``f(x)``.
    x0 : pytree of tensors
        The first iterate.
    kwargs : dict, optional
        Fixed keyword arguments of f.
    weight : LinearOperator, float, or pytree of real tensors, optional
        The weight W of the data, a self-adjoint positive operator or the entries of a diagonal one; a number is for
        all.
    damp : float or Tensor
        ``damp²`` is the weight of the penalty ``‖x‖²``.
    penalties : sequence of (λ, L) or (λ, L, b)
        Further penalties ``λ ‖Lx − b‖²`` with a number λ ≥ 0, an operator L and an element b of its codomain.
    maxiter : int
        Largest number of steps.
    tol : float
        Relative tolerance of the gradient and of the step.
    inner : int
        Largest number of steps of the linear solver for a step.
    normal : bool, optional
        Whether the linear problem of a step is solved by ``cg`` with ``JᴴWJ + Σ λ LᴴL``, in place of ``cgls``: no
        residuals are updated, which is faster where there are many data, and less accurate. None takes ``cg`` until
        rounding stops it, and ``cgls`` from there.
    precondition : LinearOperator, callable or "auto", optional
        The preconditioner ``M ≈ (JᴴWJ + damp² + Σ λ LᴴL)⁻¹`` of these problems, the same one at all points, or
        ``"auto"`` for :func:`adjointlab.precondition.auto` at each point: some 60 products with J and Jᴴ, unless the
        entries of J are known. One that turns out to be none is a ``reason``.
    callback : callable, optional
        Function of x and :class:`Info`, called after each step. If it returns True, the solver stops.
    progress : bool, optional
        Whether to show a line on standard error; None shows it on a terminal, after two seconds.

    Returns
    -------
    Solution
        With ``√(2F)`` as the residual norms, F being the objective. That no step brings the objective down, NaN and
        running out of steps are reported there; nothing is raised. x is differentiable once, by the implicit function
        theorem, in y, the weight, ``damp``, λ, b and the parameters of f and L, if the minimum is isolated.

    Raises
    ------
    SpaceMismatchError
        If y, the weight, a penalty or M does not fit the spaces of f.
    NotDifferentiableError
        If f has no derivative at x₀.
    ValueError
        If ``tol``, ``maxiter`` or ``inner`` is negative.

    Examples
    --------
    >>> import torch
    >>> from adjointlab.solvers import gauss_newton
    >>> t = torch.arange(4.0)
    >>> y = 2 * torch.exp(-0.5 * t)
    >>> gauss_newton(lambda p: p[0] * torch.exp(-p[1] * t), y, torch.tensor([1.0, 1.0])).x
    tensor([2.0000, 0.5000])
    """
    return _solved(
        _prepared(f, y, x0, kwargs, (weight, damp, penalties)), _line_search(_inner(inner, normal, precondition)),
        name="gauss_newton", maxiter=maxiter, tol=tol, callback=callback, progress=progress,
    )  # fmt: skip


def levenberg_marquardt(
    f: Callable[..., Any],
    y: Any,
    x0: Any,
    *,
    kwargs: dict[str, Any] | None = None,
    weight: Any = None,
    damp: float | Tensor = 0.0,
    penalties: Sequence[tuple[Any, ...]] = (),
    tau: float = 1e-3,
    maxiter: int = 100,
    tol: float = 1e-6,
    inner: int = _INNER,
    normal: bool | None = None,
    precondition: Preconditioner[Any] | None = None,
    callback: Callback | None = None,
    progress: bool | None = None,
) -> Solution:
    r"""Minimise ``½‖f(x) − y‖²_W + ½ damp² ‖x‖² + ½ Σ λ ‖Lx − b‖²`` by damped steps, with trust by the gain ratio.

    A step minimises the linear model plus ``½ μ ‖d‖²``. Where the objective falls by what the model promised, μ
    shrinks; where it does not fall, μ grows, and the step is tried again.

    Parameters
    ----------
    f, y, x0, kwargs, weight, damp, penalties, maxiter, tol, inner, normal, precondition, callback, progress
        As in :func:`gauss_newton`.
    tau : float
        The first μ, in units of the curvature of the model along the gradient: small where x₀ is near the minimum.

    Returns
    -------
    Solution
        As of :func:`gauss_newton`.

    Raises
    ------
    SpaceMismatchError, NotDifferentiableError, ValueError
        As :func:`gauss_newton` does.

    References
    ----------
    K. Madsen, H. B. Nielsen, O. Tingleff, *Methods for non-linear least squares problems*, IMM, DTU 2004,
    algorithm 3.16.

    Examples
    --------
    >>> import torch
    >>> from adjointlab.solvers import levenberg_marquardt
    >>> rosenbrock = lambda x: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])
    >>> levenberg_marquardt(rosenbrock, torch.zeros(2), torch.tensor([-1.2, 1.0]), tol=1e-7).x
    tensor([1.0000, 1.0000])
    """
    return _solved(
        _prepared(f, y, x0, kwargs, (weight, damp, penalties)),
        _trust(_inner(inner, normal, precondition), _positive("tau", tau)),
        name="levenberg_marquardt", maxiter=maxiter, tol=tol, callback=callback, progress=progress,
    )  # fmt: skip


def _prepared(f: Any, y: Any, x0: Any, kwargs: dict[str, Any] | None, terms: tuple[Any, Any, Any]) -> Iterate:
    """Return the first iterate; ``terms`` are the weight, the damping and the penalties."""
    weight, damp, penalties = terms
    J = f.at(x0) if isinstance(f, Jacobian) else jacobian(f, x0, kwargs=kwargs)
    J.codomain.leaves(y, "y")
    found = Penalty.of(penalties, J.domain, J.domain.batch_shape)
    _require_number("damp", damp)
    if isinstance(damp, Tensor) or damp:
        found.append(Penalty(damp**2, identity(J.domain)))
    W = None if weight is None else weight_operator(J, weight)
    return Iterate(Objective(y, W, tuple(found)), J, J.point)


def _inner(most: int, normal: bool | None, precondition: Any) -> Inner:
    return Inner(count("inner", most, least=1), normal, precondition)


def _positive(name: str, value: float) -> float:
    if not nonnegative(name, value):
        raise ValueError(f"expected {name} to be positive, got {value!r}")
    return float(value)


def _require_number(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.ndim:
        raise ValueError(f"expected {name} to be one number, got a tensor of shape {tuple(value.shape)}")
    nonnegative(name, value.detach().item() if isinstance(value, Tensor) else value)


def _solved(
    at: Iterate, advance: Advance, *, name: str, maxiter: int, tol: float, callback: Callback | None,
    progress: bool | None,
) -> Solution:  # fmt: skip
    most, tol = count("maxiter", maxiter), nonnegative("tol", tol)
    domain = at.J.domain
    with torch.no_grad(), domain.without_autocast(), progress_of(name, progress, most, most=True) as line:
        last, status, values = _run(at, advance, most, tol, callback=callback, line=line)
    norms = torch.tensor([math.sqrt(2 * value) if value >= 0 else value for value in values], dtype=torch.float64)
    solution = Solution(last.x, status in CONVERGED, len(values) - 1, norms, REASONS[status])
    return implicit.of_minimum(lambda x: scaled(-1, replace(at, J=last.J.at(x), x=x).descent), solution, domain, tol)


def _forcing(last: float, ratio: float) -> float:
    """Return how exact the next step is to be, from the ratio of gradients that the last one made of ``last``."""
    # Where a model foretold its gradient badly, more steps with the next one are in vain: Eisenstat and Walker, choice
    # 1, with their safeguard against a small term by chance.
    slow = last ** ((1 + math.sqrt(5)) / 2)
    return min(max(abs(ratio - last), slow if slow > 0.1 else 0.0), _FORCING[1])


def _run(
    at: Iterate, advance: Advance, most: int, tol: float, *, callback: Callback | None, line: Line
) -> tuple[Iterate, Status, list[float]]:
    """Iterate; return the last iterate, why it is the last, and all values of the objective."""
    values, start, forcing, status = [at.value], at.slope, _FORCING[0], Status.EXHAUSTED
    if not math.isfinite(at.value) or not math.isfinite(start):
        return at, Status.NOT_FINITE, values
    while True:
        if at.slope <= tol * start or at.value == 0:
            return at, Status.LEAST_SQUARES, values
        if len(values) > most:
            return at, status, values
        forcing = max(forcing, tol / 10)
        found = advance(at, forcing)
        if isinstance(found, Status):
            return at, found, values
        new, is_full = found
        if not math.isfinite(new.slope):
            return at, Status.NOT_FINITE, values
        length, size = float(at.J.domain.norm(added(new.x, scaled(-1, at.x)))), float(at.J.domain.norm(new.x))
        forcing = _forcing(forcing, new.slope / at.slope)
        at = new
        values.append(at.value)
        line.step(note=lambda: f"objective {values[-1]:.3e}")
        if callback is not None:
            info = Info(len(values) - 1, math.sqrt(2 * at.value), at.slope)
            if callback(map_leaves(torch.clone, at.x), info) is True:
                return at, Status.STOPPED, values
        if is_full and length <= tol * size:
            return at, Status.SHORT, values
