"""The problem ``min ½‖Ax − y‖² + ½ damp² ‖x‖² + h(x)`` in parts, and methods that take them in turn."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from adjointlab.affine import AffineOperator, Operator, require_operator
from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.progress import progress_of
from adjointlab.solvers.fixed_point import depends, learned, without_derivative
from adjointlab.solvers.problem import count, nonnegative
from adjointlab.solvers.solution import CONVERGED, REASONS, Callback, Info, Solution, Status, qualified
from adjointlab.space import Space
from adjointlab.space.algebra import added, common, scaled
from adjointlab.space.selection import selection
from adjointlab.spectral import operator_norm
from adjointlab.tree import map_leaves, tree_flatten

Prox = Callable[[Any, float], Any]  # (x, step) ↦ argmin_u h(u) + ‖u − x‖² / (2 step)

_TOL = 0.005  # relative error of norms
_SAFE = (1 + _TOL) ** 2  # times the estimates of squared norms, which are from below
_WORSE = 4.0  # times the residual, from which on steps diverge, where there is a prox
_MOST_HALVED = 40
_ROUNDING = 4  # units of the data, to which a residual is known


@dataclass(frozen=True)
class At:
    """An iterate: x, ``Aᵢx − yᵢ`` of all parts, and ``‖Ax − y‖² + damp² ‖x‖²``."""

    x: Any
    residuals: list[Any]
    value: float
    gradient: float = math.nan  # the norm of the last gradient that the method has known


@dataclass(frozen=True)
class Parts:
    """The problem in n parts, with the length of the steps and the order of the parts."""

    operators: list[Operator]
    data: list[Any]
    damp: float
    step: float
    prox: Prox | None
    generator: torch.Generator
    linear: list[LinearOperator] = field(init=False)

    def __post_init__(self) -> None:
        linear = [A.linear if isinstance(A, AffineOperator) else A for A in self.operators]
        object.__setattr__(self, "linear", linear)

    @property
    def domain(self) -> Space:
        """The space of x."""
        return self.operators[0].domain

    def __len__(self) -> int:
        return len(self.operators)

    def order(self) -> list[int]:
        """Return the numbers of all parts in a random order."""
        drawn: list[int] = torch.randperm(len(self), generator=self.generator, device=self.generator.device).tolist()
        return drawn

    def residual(self, i: int, x: Any) -> Any:
        """Return ``Aᵢx − yᵢ``."""
        return map_leaves(torch.sub, self.operators[i](x), self.data[i])

    def at(self, x: Any, gradient: float = math.nan) -> At:
        """Return an iterate with its residuals, by one application of every part."""
        residuals = [self.residual(i, x) for i in range(len(self))]
        squares = [self._square(A.codomain, r) for A, r in zip(self.operators, residuals, strict=True)]
        return At(x, residuals, sum(squares) + self.damp**2 * self._square(self.domain, x), gradient)

    @staticmethod
    def _square(space: Space, a: Any) -> float:
        return float(space.norm(a)) ** 2

    def pulled(self, residuals: Sequence[Any]) -> Any:
        """Return ``Aᴴr``, the sum over all parts."""
        total = self.linear[0].H(residuals[0])
        for A, r in zip(self.linear[1:], residuals[1:], strict=True):
            total = added(total, A.H(r))
        return total

    def moved(self, x: Any, direction: Any) -> Any:
        """Return x after a step against a gradient of ``½‖Ax − y‖² / n``, with damping and the proximal map."""
        n, s = len(self), self.step
        x = x if not self.damp else scaled(1 - s * self.damp**2 / n, x)
        x = map_leaves(lambda a, d: torch.add(a, d, alpha=-s), x, direction)
        return x if self.prox is None else self.prox(x, s / n)


def nesterov(t: float) -> tuple[float, float]:
    """Return Nesterov's momentum of a step, and the number that follows t."""
    following = (1 + math.sqrt(1 + 4 * t**2)) / 2
    return (t - 1) / following, following


def ahead(new: Any, x: Any, beta: float) -> Any:
    """Return ``x' + β (x' − x)``."""
    return map_leaves(lambda a, b: torch.lerp(b, a, 1 + beta), new, x) if beta else new


class Method:
    """A method that takes the parts in turn; steps are halved where they diverge."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.halved = parts, 0
        self.first = math.nan  # value
        self.bound = sum(float(A.codomain.norm(y)) ** 2 for A, y in zip(parts.operators, parts.data, strict=True))

    def limit(self, at: At) -> float:
        """Return the value from which on steps diverge."""
        self.first = at.value if math.isnan(self.first) else self.first
        return _WORSE * max(self.first, self.bound)

    def taken_back(self, at: At) -> At | Status:
        """Return the iterate before an epoch, and halve the steps."""
        self.parts, self.halved = replace(self.parts, step=self.parts.step / 2), self.halved + 1
        return Status.BREAKDOWN if self.halved > _MOST_HALVED else at


class SGD(Method):
    """``x ← z − s Aᵢᴴ(Aᵢz − yᵢ)``, z being ahead of x by momentum, with a step that shrinks from epoch to epoch."""

    def __init__(self, parts: Parts, decay: float, momentum: float) -> None:
        super().__init__(parts)
        self.decay, self.momentum = decay, momentum
        self.epochs, self.t = 0, 1.0
        self.ahead: Any = None  # z

    def epoch(self, at: At) -> At | Status:
        """Return the iterate after every part had its turn, or why there is none."""
        parts = replace(self.parts, step=self.parts.step / (1 + self.decay * self.epochs))
        x, self.epochs = at.x, self.epochs + 1
        z = at.x if self.ahead is None else self.ahead
        for i in parts.order():
            new = parts.moved(z, parts.linear[i].H(parts.residual(i, z)))
            beta, self.t = nesterov(self.t)
            z = ahead(new, x, min(beta, self.momentum))
            x = new
        self.ahead = z
        change = float(parts.domain.norm(map_leaves(torch.sub, x, at.x)))
        found = parts.at(x, change / parts.step)
        if found.value <= self.limit(at):
            return found
        self.ahead, self.t = None, 1.0
        return self.taken_back(at)


class SAGA(Method):
    """The same with the mean of all gradients, of which one is renewed at each step."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.residuals: list[Any] = []  # as each part was seen last
        self.total: Any = None  # Aᴴ of them

    def epoch(self, at: At) -> At | Status:
        """Return the iterate after every part had its turn, or why there is none."""
        parts, x = self.parts, at.x
        if not self.residuals:
            self.residuals, self.total = list(at.residuals), parts.pulled(at.residuals)
        for i in parts.order():
            new = parts.residual(i, x)
            change = parts.linear[i].H(map_leaves(torch.sub, new, self.residuals[i]))
            x = parts.moved(x, map_leaves(lambda c, t: c + t / len(parts), change, self.total))
            self.residuals[i], self.total = new, added(self.total, change)
        found = parts.at(x, float(parts.domain.norm(added(self.total, scaled(parts.damp**2, x)))))
        if found.value <= self.limit(at):
            return found
        self.residuals = []
        return self.taken_back(at)


class SVRG(Method):
    """The same with the whole gradient at the start of the epoch, and momentum, as far as the objective falls."""

    def __init__(self, parts: Parts, tol: float) -> None:
        super().__init__(parts)
        self.tol, self.start, self.t = tol, math.nan, 1.0  # start: the first norm of the gradient
        self.behind: Any = None  # the last iterate without momentum

    def epoch(self, at: At) -> At | Status:
        """Return the iterate after every part had its turn, or why there is none."""
        parts = self.parts
        total = parts.pulled(at.residuals)
        mean = scaled(1 / len(parts), total)
        slope = self._slope(at.x, total)
        if not math.isfinite(slope):  # of steps that are far too long
            return self.taken_back(at)
        self.start = slope if math.isnan(self.start) else self.start
        if slope <= self.tol * self.start:
            return Status.LEAST_SQUARES
        z = at.x
        x = z if self.behind is None else self.behind
        for i in parts.order():
            direction = mean
            if z is not at.x:
                away = map_leaves(torch.sub, z, at.x)
                direction = added(parts.linear[i].H(parts.linear[i](away)), mean)
            new = parts.moved(z, direction)
            beta, self.t = nesterov(self.t)
            z = ahead(new, x, beta)
            x = new
        found = parts.at(z, slope)
        if found.value <= self.limit(at):
            self.behind = x
            return found
        self.t, self.behind = 1.0, None
        return self.taken_back(replace(at, gradient=slope))

    def limit(self, at: At) -> float:
        """Return the value of the iterate, within rounding; if there is an h, that from which steps diverge."""
        if self.parts.prox is not None:
            return super().limit(at)
        eps = max(A.codomain.eps for A in self.parts.operators)
        return (math.sqrt(at.value) + _ROUNDING * eps * math.sqrt(self.bound)) ** 2

    def _slope(self, x: Any, total: Any) -> float:
        """Return the norm of the gradient or, with a proximal map, that of a step in units of its length."""
        parts, n = self.parts, len(self.parts)
        if parts.prox is None:
            return float(parts.domain.norm(added(total, scaled(parts.damp**2, x))))
        ahead = parts.moved(x, scaled(1 / n, total))
        return float(parts.domain.norm(map_leaves(torch.sub, ahead, x))) * n / parts.step


class Options(TypedDict, total=False):
    """The arguments that all methods share; :func:`adjointlab.solvers.sgd` says what they mean."""

    subsets: int | None
    dim: int
    x0: Any
    damp: float
    prox: Prox | None
    step: float | None
    generator: torch.Generator | None
    callback: Callback | None
    progress: bool | None


def _in_parts(
    A: Any, y: Any, subsets: int | None, dim: int, *, damp: float, prox: Prox | None, step: float | None, share: float,
    generator: torch.Generator | None,
) -> Parts:  # fmt: skip
    """Return the problem in parts; steps that are not given are a share of ``1 / max ‖Aᵢ‖²``."""
    if isinstance(A, (list, tuple)):
        operators, data = _given(A, y, subsets)
    else:
        require_operator(A)
        n = count("subsets", subsets, least=1)  # type: ignore[arg-type]
        A.codomain.leaves(y, "y")
        chosen = [selection(slice(i, None, n), dim, A.codomain) for i in range(n)]
        operators, data = [A.rows(slice(i, None, n), dim) for i in range(n)], [rows(y) for rows in chosen]
    damp, source = nonnegative("damp", damp), generator or torch.Generator().manual_seed(0)
    parts = Parts(operators, [map_leaves(Tensor.detach, part) for part in data], damp, 1.0, prox, source)
    if step is None:
        with torch.no_grad():
            size = max(float(operator_norm(A, tol=_TOL)) ** 2 for A in parts.linear) * _SAFE + damp**2 / len(parts)
        step = share / size if size > 0 else 1.0
    elif not nonnegative("step", step):
        raise ValueError(f"expected step to be positive, got {step!r}")
    return replace(parts, step=float(step))


def _given(A: Sequence[Any], y: Any, subsets: int | None) -> tuple[list[Any], list[Any]]:
    if subsets is not None:
        raise ValueError(f"expected no number of subsets beside a list of operators, got subsets={subsets!r}")
    if not A:
        raise SpaceMismatchError("expected at least one operator, got an empty list: pass A.split(n), say")
    if not isinstance(y, (list, tuple)) or len(y) != len(A):
        found = f"{len(y)} of them" if isinstance(y, (list, tuple)) else f"a {type(y).__name__}"
        raise SpaceMismatchError(f"expected a list of data for {len(A)} operators, one for each, got {found}")
    for operator, part in zip(A, y, strict=True):
        require_operator(operator)
        common(A[0].domain, operator.domain, "the operators to have one domain", "build them on the same space")
        operator.codomain.leaves(part, "y")
    return list(A), list(y)


def solve(
    make: Callable[[Parts], SGD | SAGA | SVRG], A: Any, y: Any, *, name: str, share: float, maxiter: int,
    tol: float | None, subsets: int | None = None, dim: int = 0, x0: Any = None, damp: float = 0.0,
    prox: Prox | None = None, step: float | None = None, generator: torch.Generator | None = None,
    callback: Callback | None = None, progress: bool | None = None,
) -> Solution:  # fmt: skip
    """Run epochs until x settles, as a method or the change of x tells; steps are a share of ``1 / max ‖Aᵢ‖²``."""
    parts = _in_parts(A, y, subsets, dim, damp=damp, prox=prox, step=step, share=share, generator=generator)
    method, most = make(parts), count("maxiter", maxiter)
    tol = None if tol is None else nonnegative("tol", tol)
    domain = parts.domain
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(domain.without_autocast())
        for part in parts.linear:
            stack.enter_context(part.frozen())
        line = stack.enter_context(progress_of(name, progress, most, most=True))
        at = parts.at(_start(parts, x0))
        norms, status = [math.sqrt(at.value)], Status.EXHAUSTED
        if not math.isfinite(at.value):
            status, most = Status.NOT_FINITE, 0
        while len(norms) <= most:
            found = method.epoch(at)
            if isinstance(found, Status):
                status = found
                break
            if not math.isfinite(found.value):
                status = Status.NOT_FINITE
                break
            before, at = at, found
            norms.append(math.sqrt(at.value))
            line.step(note=lambda: f"residual {norms[-1]:.2e}")
            info = Info(len(norms) - 1, norms[-1], at.gradient)
            if callback is not None and callback(map_leaves(torch.clone, at.x), info) is True:
                status = Status.STOPPED
                break
            change = float(domain.norm(map_leaves(torch.sub, at.x, before.x)))
            if tol is not None and at.x is not before.x and change <= tol * float(domain.norm(at.x)):
                status = Status.SHORT
                break
    sizes = torch.tensor(norms, dtype=torch.float64)
    solution = qualified(Solution(at.x, status in CONVERGED, len(norms) - 1, sizes, REASONS[status]), *parts.linear)
    known = [] if parts.prox is None else depends(parts.prox, at.x)
    return without_derivative(solution, domain, [*learned(*parts.operators), *tree_flatten(y)[0], *known], name)


def _start(parts: Parts, x0: Any) -> Any:
    batch = tuple(parts.operators[0].codomain.leaves(parts.data[0])[0].shape[: parts.domain.batch_dims])
    space = parts.domain.with_batch(batch)
    if x0 is None:
        return space.zeros()
    space.leaves(x0, "x0")
    return map_leaves(lambda leaf: leaf.detach().clone(), x0)
