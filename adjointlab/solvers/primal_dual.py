r"""Primal–dual steps for ``min_x F(x) + h(x) + g(Lx) = min_x max_u F(x) + h(x) + ⟨Lx, u⟩ − g*(u)``.

With the steps τ and σ, an iteration is ``x⁺ = prox_h(x − τ(∇F(x) + Lᴴu))`` and ``u⁺ = prox_g*(u + σ L(2x⁺ − x))``. The
rules of optimality of both make

``p = ∇F(x⁺) − ∇F(x) + Lᴴ(u⁺ − u) + (x − x⁺)/τ``  and  ``q = L(x⁺ − x) + (u⁺ − u)/σ``

residuals of the conditions ``0 ∈ ∇F(x⁺) + ∂h(x⁺) + Lᴴu⁺`` and ``Lx⁺ ∈ ∂g*(u⁺)`` of a saddle point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.prox import Prox, box
from adjointlab.solvers.arithmetic import Vector, Vectors
from adjointlab.solvers.composite import Composite, Smooth, largest, proximal, solve
from adjointlab.solvers.fixed_point import depends, learned, without_derivative
from adjointlab.solvers.problem import nonnegative
from adjointlab.solvers.solution import Callback, Monitor, Solution, Status
from adjointlab.typed import X

_POWER = 10  # products with LᴴL for an estimate of its norm
_SAFE = 1.05  # factor of a norm that is estimated from below
_BALANCE = 8, 1.5, 2.0  # step at which σ is chosen anew; factor to the next one; largest change


def pdhg(
    F: Smooth[X],
    L: LinearOperator[X, Any],
    prox: Prox,
    *,
    bounds: Prox | Sequence[Any] | None = None,
    x0: X | None = None,
    maxiter: int = 2000,
    tol: float = 1e-4,
    callback: Callback[X] | None = None,
    progress: bool | None = None,
) -> Solution[X]:
    r"""Minimise ``F(x) + g(Lx)`` by primal–dual steps of Chambolle and Pock: total variation, if ``g = λ‖·‖₁``.

    F enters by its gradient, as Condat and Vũ proposed. The solver stops where both conditions of a saddle point hold
    up to residuals of ``tol · ‖∇F(0)‖`` and ``tol · ‖L‖ ‖x‖``, or only rounding. With ``batch_dims``, every entry of
    the batch is a separate problem, but the steps have one length.

    Parameters
    ----------
    F : LeastSquares
        The smooth part, with weights and penalties as it likes.
    L : LinearOperator
        An operator on the domain of F, such as :func:`adjointlab.finite_differences` makes.
    prox : callable
        The proximal map of g, ``prox(z, step)``: one of :mod:`adjointlab.prox`, or any function of an element of the
        codomain of L and a number.
    bounds : callable, or pair of (lower, upper), optional
        The proximal map of a further function of x itself: a projection, or two bounds, as
        :func:`projected_gradient` takes them.
    x0, callback, progress
        As in :func:`fista`.
    maxiter : int
        Largest number of steps.
    tol : float
        Relative tolerance of both residuals.

    Returns
    -------
    Solution
        With the larger of the two relative residuals as the residual norms. NaN and running out of steps are reported
        there; what ``prox`` raises is not caught.

    Raises
    ------
    SpaceMismatchError
        If F is no least-squares objective, L is no operator on its domain, or ``x0`` or what a proximal map returns is
        not in its space.
    ValueError
        If ``tol`` or ``maxiter`` is negative.

    Notes
    -----
    A step takes one gradient of F, one L, one Lᴴ and the proximal maps. The lengths of the steps come from estimates of
    ``‖H‖`` and ``‖L‖``, which are raised where a step shows more; their ratio is adapted until both residuals shrink
    alike. Besides the memory of these, the solver needs eleven elements of the domain and eight of the codomain of L. A
    derivative of x is refused: unroll the steps to train through them.

    References
    ----------
    A. Chambolle, T. Pock, *A first-order primal-dual algorithm for convex problems with applications to imaging*, J.
    Math. Imaging Vis. 40 (2011) 120–145. L. Condat, *A primal-dual splitting method for convex optimization involving
    Lipschitzian, proximable and linear composite terms*, J. Optim. Theory Appl. 158 (2013) 460–479.

    Examples
    --------
    >>> import torch, adjointlab as al
    >>> y = torch.tensor([0.1, -0.1, 0.0, 1.1, 0.9, 1.0])
    >>> F = al.LeastSquares(al.identity((6,)), y)
    >>> pdhg(F, al.finite_differences((6,)), al.prox.l1(0.3), tol=1e-5).x
    tensor([0.1000, 0.1000, 0.1000, 0.9000, 0.9000, 0.9000])
    """
    if not isinstance(L, LinearOperator) or (isinstance(F, Smooth) and L.domain != F.domain):
        raise SpaceMismatchError(
            f"expected an operator L on the domain of F, got {type(L).__name__}"
            f"{f' on {L.domain}' if isinstance(L, LinearOperator) else ''}: build L with al.linear_operator"
        )
    own = bounds if bounds is None or callable(bounds) else box(*bounds)
    run = partial(_pdhg, L=L, prox=prox, tol=nonnegative("tol", tol))
    found = solve(
        run, F, own, x0, name="pdhg", maxiter=maxiter, callback=callback, progress=progress, beside=L,
        measure="relative residual",
    )  # fmt: skip
    known = depends(prox, L.codomain.with_batch(F.batch_shape).zeros()) + (depends(own, found.x) if own else [])
    return without_derivative(found, F.domain, [*learned(F, L), *known], "pdhg")


@dataclass
class _State:
    """A pair of iterates, with their images under the operators."""

    x: Vector
    u: Vector
    gradient: Vector
    Lx: Vector
    LHu: Vector


@dataclass
class _Saddle:
    """The saddle-point problem, and the sizes of its steps: estimates of ``‖H‖`` and ``‖L‖²``, and σ."""

    composite: Composite
    dual: Vectors
    L: LinearOperator
    prox: Callable[[Any, float], Any]
    steep: float = 0.0
    square: float = 0.0
    sigma: float = 1.0

    def apply(self, x: Vector) -> Vector:
        """Return ``Lx``."""
        return self.dual.vector(self.L(self.composite.domain.element(x)))

    def pull_back(self, u: Vector) -> Vector:
        """Return ``Lᴴu``."""
        return self.composite.domain.vector(self.L.H(self.dual.element(u)))

    def start(self, x: Vector) -> _State:
        """Return the first iterates, and estimate the norms."""
        composite, domain = self.composite, self.composite.domain
        gradient = composite.start(x)
        self.dual.wide = domain.wide
        self.steep = _SAFE * composite.curvature(gradient)
        v = domain.vector(domain.space.randn(torch.Generator().manual_seed(0)))
        for _ in range(_POWER):
            length = domain.norm(v)
            v = self.pull_back(self.apply(domain.plus(domain.zeros(), torch.where(length > 0, 1 / length, 0), v)))
        self.square = _SAFE * largest(domain.norm(v))
        if self.steep > 0 and self.square > 0:
            self.sigma = self.steep / 2 / self.square
        return _State(x, self.dual.zeros(), gradient, self.apply(x), domain.zeros())

    @property
    def tau(self) -> float:
        """The step of x, for which ``1/τ − σ‖L‖² ≥ ‖H‖/2``."""
        least = self.steep / 2 + self.sigma * self.square
        return 1 / least if 0 < least < math.inf else 1.0

    def step(self, at: _State, running: Tensor) -> _State:
        """Return the next iterates, from steps that are short enough along the way."""
        composite, domain, dual, one = self.composite, self.composite.domain, self.dual, self.composite.domain.scalar(1)
        while True:
            x = composite.moved(at.x, domain.plus(at.gradient, one, at.LHu), domain.scalar(self.tau), self.tau)
            gradient, Lx = composite.gradient(x), self.apply(x)
            d, change = domain.plus(x, -one, at.x), domain.plus(gradient, -one, at.gradient)
            length = domain.norm(d)
            noise = composite.noise(gradient) * length, 4 * dual.space.eps * dual.norm(Lx)
            bent = running & (length > 0)
            steep = largest((domain.dot(d, change) - noise[0]) / length.square(), bent)
            square = largest((dual.norm(dual.plus(Lx, -one, at.Lx)) - noise[1]).clamp(min=0) / length, bent) ** 2
            if steep <= self.steep and square <= self.square:
                break
            self.steep = _SAFE * steep if steep > self.steep else self.steep
            self.square = _SAFE * square if square > self.square else self.square
        u = self._ascended(at.u, dual.plus(dual.plus(Lx, -one, at.Lx), one, Lx))
        return _State(x, u, gradient, Lx, self.pull_back(u))

    def _ascended(self, u: Vector, along: Vector) -> Vector:
        """Return ``prox_g*(u + σ · along)``: ``z − σ prox_g(z / σ, 1 / σ)``, after Moreau."""
        dual, sigma = self.dual, self.dual.scalar(self.sigma)
        z = dual.plus(along, 1 / sigma, u)
        found = proximal(self.prox, dual, z, 1 / self.sigma, "prox(z, step)")
        apart = dual.plus(z, -torch.ones_like(sigma), found)
        dual.scale(apart, sigma)
        return apart

    def residuals(self, at: _State, new: _State) -> tuple[Tensor, Tensor]:
        """Return the norms of p and q, in units of ``‖∇F(0)‖`` and ``‖L‖ ‖x‖``."""
        domain, dual, one = self.composite.domain, self.dual, self.composite.domain.scalar(1)
        p = domain.plus(new.gradient, -one, at.gradient)
        domain.add(p, one, new.LHu)
        domain.add(p, -one, at.LHu)
        domain.add(p, one / self.tau, domain.plus(at.x, -one, new.x))
        q = dual.plus(new.Lx, -one, at.Lx)
        dual.add(q, one / self.sigma, dual.plus(new.u, -one, at.u))
        return _ratio(domain.norm(p), self.composite.size), _ratio(dual.norm(q), self.square**0.5 * domain.norm(new.x))

    def balance(self, p: Tensor, q: Tensor) -> None:
        """Choose σ anew, and with it τ: larger where the dual condition is behind."""
        ratio, most = float((q.norm() / p.norm()).cpu()), _BALANCE[2]
        if 0 < ratio < math.inf:
            self.sigma *= min(max(ratio, 1 / most), most)


def _ratio(value: Tensor, unit: Tensor) -> Tensor:
    return torch.where(unit > 0, value / unit, value)


def _pdhg(
    composite: Composite,
    x: Vector,
    monitor: Monitor,
    *,
    L: LinearOperator,
    prox: Callable[[Any, float], Any],
    tol: float,
) -> Vector:
    """Run primal–dual steps on x in place, and return it."""
    saddle = _Saddle(composite, Vectors(L.codomain, composite.domain.batch), L, prox)
    at, taken, due = saddle.start(x), 0, _BALANCE[0]
    eps, going, is_first = composite.domain.space.eps, True, True
    while going:
        new = saddle.step(at, monitor.running)
        p, q = saddle.residuals(at, new)
        worst = torch.maximum(p, q)
        if is_first:
            is_first, (going, _) = False, monitor.start(worst, worst)
            if not going:
                return x
        monitor.stop(~(worst < math.inf), Status.NOT_FINITE)
        moved = monitor.running
        monitor.stop(worst <= tol, Status.OPTIMAL)
        noise = _ratio(composite.noise(new.gradient), composite.size) + 4 * eps
        monitor.stop(worst <= noise, Status.PRECISION)
        composite.replace(x, new.x, moved)
        at, taken = _State(x if bool(moved.all()) else new.x, new.u, new.gradient, new.Lx, new.LHu), taken + 1
        if taken >= due:
            due = math.ceil(_BALANCE[1] * due)
            saddle.balance(p[monitor.running], q[monitor.running])
        going, _ = monitor.step(x, worst, worst, moved)
    return x
