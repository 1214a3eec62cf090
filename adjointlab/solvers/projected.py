"""Spectral projected gradients: ``min F(x)`` over a convex set, by steps of the length of Barzilai and Borwein.

F is quadratic, so that its gradients at a point and at its projected step give its values on the segment between them:
a line search takes no further application of F.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adjointlab.prox import Prox, box
from adjointlab.solvers.arithmetic import Vector, Vectors
from adjointlab.solvers.composite import Composite, Smooth, solve
from adjointlab.solvers.fixed_point import of_minimiser
from adjointlab.solvers.problem import nonnegative
from adjointlab.solvers.solution import Callback, Monitor, Solution, Status
from adjointlab.typed import X

_DECREASE = 1e-4  # of what the slope promises, at least (Armijo)
_MEMORY = 10  # values of the objective, of which a new one may not exceed the largest
_SHORT = 0.5  # ratio of the two steps of Barzilai and Borwein below which a short one is taken
_LONGER = 10  # factor of a step along which there is no curvature


def projected_gradient(
    F: Smooth[X],
    bounds: Prox | Sequence[Any],
    *,
    x0: X | None = None,
    maxiter: int = 1000,
    tol: float = 1e-6,
    callback: Callback[X] | None = None,
    progress: bool | None = None,
) -> Solution[X]:
    r"""Minimise ``F(x)`` over a convex set by spectral projected gradient steps.

    The lengths of the steps are those of Barzilai and Borwein, with which F need not fall at every step: a line search
    asks that it be below the largest of the last ten values. The solver stops as :func:`fista` does. With
    ``batch_dims``, every entry of the batch is a separate problem, with steps of its own.

    Parameters
    ----------
    F : LeastSquares
        The objective, with weights and penalties as it likes.
    bounds : callable, or pair of (lower, upper)
        The projection onto the set, ``projection(x, step)``, such as :func:`adjointlab.prox.nonnegative` returns; or
        two bounds, each a number, a tensor or None.
    x0, maxiter, tol, callback, progress
        As in :func:`fista`.

    Returns
    -------
    Solution
        As of :func:`fista`. If ``bounds`` is no projection onto a convex set, that is seen where a step goes uphill.

    Raises
    ------
    SpaceMismatchError, ValueError
        As :func:`fista` does.

    Notes
    -----
    A step takes one gradient of F and one projection. Besides the memory of these, the solver needs eight elements of
    the domain. x is differentiable as that of :func:`fista` is.

    References
    ----------
    E. G. Birgin, J. M. Martínez, M. Raydan, *Nonmonotone spectral projected gradient methods on convex sets*, SIAM J.
    Optim. 10 (2000) 1196–1211. G. Frassoldati, L. Zanni, G. Zanghirati, *New adaptive stepsize selections in gradient
    methods*, J. Ind. Manag. Optim. 4 (2008) 299–312.

    Examples
    --------
    >>> import torch, adjointlab as al
    >>> F = al.LeastSquares(al.diagonal(torch.tensor([1.0, 2.0])), torch.tensor([3.0, -1.0]))
    >>> projected_gradient(F, (0, 2)).x
    tensor([2., 0.])
    """
    projection = bounds if callable(bounds) else box(*bounds)
    run = partial(_projected, tol=nonnegative("tol", tol))
    found = solve(
        run, F, projection, x0, name="projected_gradient", maxiter=maxiter, callback=callback, progress=progress
    )
    return of_minimiser(F, projection, found, Vectors(F.domain, F.batch_shape), tol)


@dataclass
class _Lengths:
    """The lengths of the steps of every problem, by the rule ABBmin of Frassoldati, Zanni and Zanghirati."""

    now: Tensor
    recent: deque[Tensor] = field(default_factory=lambda: deque(maxlen=3))

    def update(self, square: Tensor, bend: Tensor, stretch: Tensor, noise: Tensor) -> None:
        """Choose the next length after a step d with ``‖d‖²``, ``⟨d, Hd⟩`` and ``‖Hd‖²``."""
        is_bent = bend > noise
        longer, shorter = square / bend, bend / stretch
        self.recent.append(torch.where(is_bent, shorter, torch.inf))
        least = torch.stack(list(self.recent)).amin(0)
        chosen = torch.where(shorter < _SHORT * longer, least, longer)
        self.now = torch.where(is_bent, chosen, _LONGER * self.now)


def _projected(composite: Composite, x: Vector, monitor: Monitor, *, tol: float) -> Vector:
    """Run spectral projected gradients on x in place, and return it."""
    domain, back = composite.domain, composite.domain.scalar(-1)
    inside = composite.proximal(x, 1.0)
    monitor.stop(~(domain.norm(inside) < math.inf), Status.NOT_FINITE)
    composite.replace(x, inside, monitor.running)
    del inside
    gradient = composite.start(x)
    norm = composite.curvature(gradient) or 1.0
    lengths, value = _Lengths(domain.scalar(1 / norm)), domain.scalar(0)
    values = deque([value], maxlen=_MEMORY)
    new = composite.moved(x, gradient, lengths.now, 1.0)
    mapping = domain.norm(domain.plus(new, back, x)) / lengths.now
    composite.rules(monitor, mapping, x, domain.norm(gradient), norm=norm, tol=tol)
    going, _ = monitor.start(mapping, mapping)
    while going:
        d, at_new = domain.plus(new, back, x), composite.gradient(new)
        change = domain.plus(at_new, back, gradient)
        subgradient = domain.norm(domain.plus(change, -1 / lengths.now, d))
        monitor.stop(~(subgradient < math.inf), Status.NOT_FINITE)
        square, slope, bend = domain.dot(d, d), domain.dot(gradient, d), domain.dot(d, change)
        length_of_gradient = domain.norm(at_new)
        noise = composite.noise(length_of_gradient) * square.sqrt()
        monitor.stop(slope > noise, Status.UPHILL)
        moved = monitor.running
        composite.rules(monitor, subgradient, new, length_of_gradient, norm=norm, tol=tol)
        is_low = value + slope + bend / 2 <= torch.stack(list(values)).amax(0) + _DECREASE * slope
        is_full = is_low | ~monitor.running | (bend <= 0)
        length = torch.where(is_full, 1, (-slope / bend).clamp(0, 1))
        composite.replace(x, new, moved & is_full)
        composite.replace(gradient, at_new, moved & is_full)
        lengths.update(square, bend, domain.dot(change, change), noise)
        between = moved & ~is_full
        if bool(between.any()):
            for vector, along in ((x, d), (gradient, change)):
                domain.fill(along, ~between)
                domain.add(vector, torch.where(between, length, 0), along)
        value = value + torch.where(moved, length * slope + length.square() * bend / 2, 0)
        values.append(value)
        del new, at_new, d, change
        going, _ = monitor.step(x, subgradient, subgradient, moved)
        if going:
            new = composite.moved(x, gradient, lengths.now, 1.0)
    return x
