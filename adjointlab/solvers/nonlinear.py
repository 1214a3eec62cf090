r"""Non-linear least squares, ``½‖f(x) − y‖²_W + ½ damp² ‖x‖² + ½ Σ λ ‖Lx − b‖²``, by linearizing f at each iterate.

With the Jacobian J of f at x, a step d minimises the quadratic model, in which f is ``f(x) + J d``: a linear problem,
that ``cgls`` solves as far as is worth while. The norm of its gradient is brought down by a *forcing term*, which
shrinks as the gradient of the objective does.

References
----------
R. S. Dembo, S. C. Eisenstat, T. Steihaug, *Inexact Newton methods*, SIAM J. Numer. Anal. 19 (1982) 400–408. S. C.
Eisenstat, H. F. Walker, *Choosing the forcing terms in an inexact Newton method*, SIAM J. Sci. Comput. 17 (1996) 16–32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from adjointlab.blocks import block_diag, identity, vstack
from adjointlab.errors import SpaceMismatchError
from adjointlab.jacobians import Jacobian, jacobian
from adjointlab.least_squares import weight_operator
from adjointlab.operators import LinearOperator
from adjointlab.progress import Line, progress_of
from adjointlab.solvers import implicit
from adjointlab.solvers.conjugate_gradients import cgls
from adjointlab.solvers.problem import count, nonnegative
from adjointlab.solvers.solution import CONVERGED, REASONS, Callback, Info, Solution, Status
from adjointlab.space.algebra import added, scaled

Penalty = Sequence[Any]  # (λ, L) or (λ, L, b)

_INNER = 100  # steps of cgls for one step, unless told
_DECREASE = 1e-4  # of what a linear model promises, at least (Armijo)
_FORCING = 0.1, 0.9  # of the first step; factor of the others (Eisenstat and Walker, choice 2)
_ROUNDING = 8  # a decrease of so many units of rounding of the objective cannot be seen


@dataclass(frozen=True)
class Objective:
    """``½‖f(x) − y‖²_W + ½ damp² ‖x‖² + ½ Σ λ ‖Lx − b‖²``, apart from f: as ``½‖r − S d‖²`` in the norm of a weight."""

    y: Any
    weight: LinearOperator | None
    damp: float | Tensor
    penalties: tuple[tuple[Any, LinearOperator, Any], ...]

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing but the data term."""
        return not self.penalties and not isinstance(self.damp, Tensor) and self.damp == 0

    def weights(self, J: LinearOperator) -> LinearOperator | None:
        """Return the weight of the residuals."""
        if self.is_plain:
            return self.weight
        parts = [identity(J.codomain) if self.weight is None else self.weight, self.damp**2 * identity(J.domain)]
        return block_diag([*parts, *[number * identity(L.codomain) for number, L, _ in self.penalties]])

    def stacked(self, J: LinearOperator) -> LinearOperator:
        """Return ``S``, from steps to changes of all residuals."""
        return J if self.is_plain else vstack([J, identity(J.domain), *[L for _, L, _ in self.penalties]])

    def residual(self, value: Any, x: Any) -> Any:
        """Return the residuals ``(y − f(x), −x, b − Lx, …)``."""
        apart = added(self.y, scaled(-1, value))
        if self.is_plain:
            return apart
        rest = [(scaled(-1, L(x)), b) for _, L, b in self.penalties]
        return (apart, scaled(-1, x), *[r if b is None else added(r, b) for r, b in rest])


@dataclass(frozen=True)
class Iterate:
    """The objective at a point, with its gradient and its linear model."""

    objective: Objective
    J: Jacobian
    x: Any

    @cached_property
    def S(self) -> LinearOperator:
        """From steps to changes of the residuals."""
        return self.objective.stacked(self.J)

    @cached_property
    def weight(self) -> LinearOperator | None:
        """Of the residuals."""
        return self.objective.weights(self.J)

    @cached_property
    def residual(self) -> Any:
        """The residuals."""
        return self.objective.residual(self.J.value, self.x)

    @cached_property
    def _weighted(self) -> Any:
        return self.residual if self.weight is None else self.weight(self.residual)

    @cached_property
    def value(self) -> float:
        """The objective."""
        return float(self.S.codomain.inner(self.residual, self._weighted).real) / 2

    @cached_property
    def descent(self) -> Any:
        """The negative gradient ``SᴴWr``."""
        return self.S.H(self._weighted)

    @cached_property
    def slope(self) -> float:
        """The norm of the gradient."""
        return float(self.J.domain.norm(self.descent))

    def step(self, forcing: float, most: int, damp: float = 0.0) -> Any:
        """Return the step that minimises the model, ``damp²`` of its own norm added, up to a part of the gradient."""
        return cgls(self.S, self.residual, weight=self.weight, damp=damp, tol=forcing, maxiter=most).x

    def promise(self, d: Any) -> float:
        """Return how far the model falls along a step, ``⟨−g, d⟩ − ½‖S d‖²_W``."""
        image = self.S(d)
        image_weighted = image if self.weight is None else self.weight(image)
        bend = float(self.S.codomain.inner(image, image_weighted).real)
        return float(self.J.domain.inner(self.descent, d).real) - bend / 2

    def moved(self, d: Any, length: float = 1.0) -> Iterate:
        """Return the iterate after a step."""
        x = added(self.x, d if length == 1 else scaled(length, d))
        return replace(self, J=self.J.at(x), x=x)


# From an iterate and a forcing term to the next one, and whether the step was not shortened; else why there is none.
Advance = Callable[[Iterate, float], "tuple[Iterate, bool] | Status"]


def _line_search(most: int) -> Advance:
    """Return the rule of Gauss–Newton: along the step of the model, as far as the objective falls enough."""

    def advance(at: Iterate, forcing: float) -> tuple[Iterate, bool] | Status:
        d, length = at.step(forcing, most), 1.0
        along = -float(at.J.domain.inner(at.descent, d).real)
        if not -math.inf < along < 0:
            return Status.NOT_FINITE if math.isnan(along) else Status.NO_DESCENT
        if -along <= _noise(at):
            return _settled(at, at.moved(d))
        while -along * length > _noise(at):  # beyond, equal values would be taken for a decrease
            new = at.moved(d, length)
            if new.value <= at.value + _DECREASE * length * along:
                return new, length == 1
            excess = new.value - at.value - length * along  # of the curve over its tangent: the parabola's minimum
            best = -along * length**2 / (2 * excess) if excess > 0 and math.isfinite(excess) else 0.0
            length = min(max(best, length / 10), length / 2)
        return Status.NO_DESCENT

    return advance


def _noise(at: Iterate) -> float:
    """Return how far rounding moves the objective."""
    return _ROUNDING * at.J.codomain.eps * at.value


def _settled(at: Iterate, new: Iterate) -> tuple[Iterate, bool] | Status:
    """Return an iterate whose objective equals the last one's within rounding, as long as its gradient is smaller."""
    is_better = new.value <= at.value + _noise(at) and new.slope < at.slope
    return (new, True) if is_better else Status.PRECISION


def _trust(most: int, tau: float) -> Advance:
    """Return the rule of Levenberg and Marquardt: damped steps, by the ratio of gain and promise."""
    mu, factor = math.nan, 2.0

    def advance(at: Iterate, forcing: float) -> tuple[Iterate, bool] | Status:
        nonlocal mu, factor
        if math.isnan(mu):  # a curvature of the model stands for the largest entry of its diagonal
            mu = tau * _curvature(at)
        for tries in itertools.count():
            if not mu < math.inf:
                return Status.NO_DESCENT if tries else Status.NOT_FINITE
            d = at.step(forcing, most, math.sqrt(mu))
            promised = at.promise(d)
            if not math.isfinite(promised):
                return Status.NOT_FINITE
            if promised <= _noise(at):
                return Status.NO_DESCENT if tries else _settled(at, at.moved(d))
            new = at.moved(d)
            gain = (at.value - new.value) / promised
            if gain > 0:
                mu, factor = mu * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2.0
                return new, not tries
            mu, factor = mu * factor, 2 * factor
        raise AssertionError("there is a next try")

    return advance


def _curvature(at: Iterate) -> float:
    """Return ``‖S g‖²_W / ‖g‖²``, the curvature of the model along the gradient."""
    image = at.S(at.descent)
    weighted = image if at.weight is None else at.weight(image)
    return float(at.S.codomain.inner(image, weighted).real) / at.slope**2 if at.slope else 1.0


def gauss_newton(
    f: Callable[..., Any],
    y: Any,
    x0: Any,
    *,
    kwargs: dict[str, Any] | None = None,
    weight: Any = None,
    damp: float | Tensor = 0.0,
    penalties: Sequence[Penalty] = (),
    maxiter: int = 50,
    tol: float = 1e-6,
    inner: int = _INNER,
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
    weight : LinearOperator, or pytree of real tensors, optional
        The weight W of the data, a self-adjoint positive operator or the entries of a diagonal one.
    damp : float or Tensor
        ``damp²`` is the weight of the penalty ``‖x‖²``.
    penalties : sequence of (λ, L) or (λ, L, b)
        Further penalties ``λ ‖Lx − b‖²`` with a number λ ≥ 0, an operator L and an element b of its codomain.
    maxiter : int
        Largest number of steps.
    tol : float
        Relative tolerance of the gradient and of the step.
    inner : int
        Largest number of steps of ``cgls`` for a step.
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
        If y, the weight or a penalty does not fit the spaces of f.
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
        _prepared(f, y, x0, kwargs, (weight, damp, penalties)), _line_search(count("inner", inner)),
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
    penalties: Sequence[Penalty] = (),
    tau: float = 1e-3,
    maxiter: int = 100,
    tol: float = 1e-6,
    inner: int = _INNER,
    callback: Callback | None = None,
    progress: bool | None = None,
) -> Solution:
    r"""Minimise ``½‖f(x) − y‖²_W + ½ damp² ‖x‖² + ½ Σ λ ‖Lx − b‖²`` by damped steps, with trust by the gain ratio.

    A step minimises the linear model plus ``½ μ ‖d‖²``. Where the objective falls by what the model promised, μ
    shrinks; where it does not fall, μ grows, and the step is tried again.

    Parameters
    ----------
    f, y, x0, kwargs, weight, damp, penalties, maxiter, tol, inner, callback, progress
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
        _prepared(f, y, x0, kwargs, (weight, damp, penalties)), _trust(count("inner", inner), nonnegative("tau", tau)),
        name="levenberg_marquardt", maxiter=maxiter, tol=tol, callback=callback, progress=progress,
    )  # fmt: skip


def _prepared(f: Any, y: Any, x0: Any, kwargs: dict[str, Any] | None, terms: tuple[Any, Any, Any]) -> Iterate:
    """Return the first iterate; ``terms`` are the weight, the damping and the penalties."""
    weight, damp, penalties = terms
    J = f.at(x0) if isinstance(f, Jacobian) else jacobian(f, x0, kwargs=kwargs)
    J.codomain.leaves(y, "y")
    found = []
    for number, L, *b in penalties:
        if not isinstance(L, LinearOperator) or L.domain != J.domain or len(b) > 1:
            raise SpaceMismatchError(
                f"expected penalties (λ, L) or (λ, L, b) with operators L on {J.domain}, got {type(L).__name__}"
                f"{f' on {L.domain}' if isinstance(L, LinearOperator) else ''}: wrap L with al.linear_operator"
            )
        if b:
            L.codomain.leaves(b[0], "b")
        nonnegative("λ", float(number.detach() if isinstance(number, Tensor) else number))
        found.append((number, L, b[0] if b else None))
    if not isinstance(damp, Tensor):
        nonnegative("damp", damp)
    W = None if weight is None else weight_operator(J, weight)
    return Iterate(Objective(y, W, damp, tuple(found)), J, J.point)


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
        found = advance(at, max(forcing, tol / 10))
        if isinstance(found, Status):
            return at, found, values
        new, is_full = found
        if not math.isfinite(new.slope):
            return at, Status.NOT_FINITE, values
        length, size = float(at.J.domain.norm(added(new.x, scaled(-1, at.x)))), float(at.J.domain.norm(new.x))
        forcing = min(_FORCING[0], _FORCING[1] * (new.slope / at.slope) ** 2)
        at = new
        values.append(at.value)
        line.step(note=lambda: f"objective {values[-1]:.3e}")
        told = None if callback is None else callback(at.x, Info(len(values) - 1, math.sqrt(2 * at.value), at.slope))
        if told is True:
            return at, Status.STOPPED, values
        if is_full and length <= tol * size:
            return at, Status.SHORT, values
