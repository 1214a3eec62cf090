r"""Derivatives of solutions, by the equation they solve: no step of the solver is differentiated.

Let x solve ``Mx = AᴴWy`` with ``M = AᴴWA + damp²``, and let v be the cotangent of x. With ``Mw = v``, ``z = Aw`` and
the weighted residual ``ω = W(y − Ax)``,

``Re⟨v, dx⟩ = Re⟨z, dω⟩ + Re⟨w, (dAᴴ) ω⟩,``

where ``dω`` is taken at fixed x. So the solution is tied to two tensors that autograd can follow to y, to the weight
and to whatever A depends on, ``ω`` and ``η = Aᴴω`` (ω held fixed here), and one solve with M makes their cotangents.
Where A has more unknowns than equations, ``Mw = v`` can be solved in the sense of least squares only, with a remainder
``v − Mw`` in the kernel of A, and ``dx`` has one more term, ``Re⟨v − Mw, (dAᴴ) t⟩`` with ``Aᴴt = x``.

References
----------
G. H. Golub and V. Pereyra, *The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
separate*, SIAM J. Numer. Anal. 10 (1973) 413–432.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adjointlab.solvers.arithmetic import Vector, Vectors, as_vector
from adjointlab.solvers.problem import Problem
from adjointlab.solvers.solution import Solution
from adjointlab.space import Space
from adjointlab.spectral import real_size

Map = Callable[[Vector], Vector]


def of_system(problem: Problem, solution: Solution, tol: float, maxiter: int) -> Solution:
    """Return the solution of ``Ax = b`` with x tied to b and A: ``Re⟨v, dx⟩ = Re⟨w, d(b − Ax)⟩`` with ``Aw = v``."""
    residual = _residual(problem, solution)
    if residual is None:
        return solution
    domain = problem.domain

    def cotangents(v: Vector) -> list[Vector]:
        inner = problem.diagonalized()
        found = _solve(inner.domain, inner.apply, inner.vector(domain.element(v)), tol, maxiter)
        return [domain.vector(inner.element(found.x))]

    return _tied(domain, solution, [residual], cotangents)


def of_least_squares(
    problem: Problem, solution: Solution, damp: float, tol: float, maxiter: int, *, started: bool
) -> Solution:
    """Return the minimiser with x tied to y, to the weight and to A."""
    residual = _residual(problem, solution)
    if residual is None:
        return solution
    domain, codomain = problem.domain, problem.codomain
    if problem.weight is not None:
        residual = codomain.space.leaves(problem.weight(codomain.space.unflatten(residual)))
    ties = [residual]
    pulled = _pulled(problem, tuple(t.detach() for t in residual))
    wide = damp == 0 and not started and real_size(codomain.space) < real_size(domain.space)
    if pulled is not None:
        ties.append(pulled)
        if wide:
            ties.append(_pulled(problem, _preimage(problem, solution, tol, maxiter)) or ())

    def cotangents(v: Vector) -> list[Vector]:
        inner = problem.diagonalized()
        found = _solve(inner.domain, inner.normal(damp), inner.vector(domain.element(v)), tol, maxiter)
        w = domain.vector(inner.element(found.x))
        if found.remainder and len(ties) == 2 and damp == 0:
            warnings.warn(
                "the gradient with respect to the operator's parameters is not determined, since the least-squares "
                "problem has many solutions: use damp > 0 (the gradient with respect to the data is right)",
                RuntimeWarning,
                stacklevel=2,
            )
        rest = [a - b for a, b in zip(v, problem.normal(damp)(w), strict=True)] if len(ties) == 3 else []
        return [problem.apply(w), w, rest][: len(ties)]

    return _tied(domain, solution, ties, cotangents)


def _residual(problem: Problem, solution: Solution) -> tuple[Tensor, ...] | None:
    """Return ``y − Ax`` with x held fixed, if anything in it is to be differentiated."""
    if not torch.is_grad_enabled():
        return None
    codomain = problem.codomain.space
    pairs = zip(codomain.leaves(problem.y), codomain.leaves(problem.A(solution.x)), strict=True)
    residual = tuple(y - image for y, image in pairs)
    return residual if _required(codomain, residual) else None


def _pulled(problem: Problem, element: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Return ``Aᴴ`` of a fixed element, if A is to be differentiated."""
    leaves = problem.domain.space.leaves(problem.A.H(problem.codomain.space.unflatten(element)))
    return leaves if _required(problem.domain.space, leaves) else None


def _required(space: Space, leaves: tuple[Tensor, ...]) -> bool:
    """Return whether a gradient is asked for: on all processes, where it is on one."""
    return not space.every(not any(leaf.requires_grad for leaf in leaves))


def _preimage(problem: Problem, solution: Solution, tol: float, maxiter: int) -> tuple[Tensor, ...]:
    """Return t with ``Aᴴt = x``, by ``A Aᴴ t = Ax``."""
    with torch.no_grad():

        def apply(t: Vector) -> Vector:
            return problem.apply(problem.domain.vector(problem.A.H(problem.codomain.element(t))))

        image = problem.apply(problem.domain.vector(solution.x))
        t = _solve(problem.codomain, apply, image, tol, maxiter).x
        return problem.codomain.space.leaves(problem.codomain.element(t))


def _tied(
    domain: Vectors, solution: Solution, ties: list[tuple[Tensor, ...]], cotangents: Callable[[Vector], list[Vector]]
) -> Solution:
    """Return the solution with x as a function of ``ties``, whose cotangents are made from that of x."""
    x = _tie(cotangents, domain.space.leaves(solution.x), *[leaf for tie in ties for leaf in tie])
    return replace(solution, x=domain.space.unflatten(x))


class _Tie(torch.autograd.Function):
    """The solution as a function of what ties it to its data; the cotangents of all ties come from one solve."""

    @staticmethod
    def forward(ctx: Any, cotangents: Callable[[Vector], list[Vector]], x: tuple[Tensor, ...], *ties: Tensor) -> Any:
        ctx.cotangents = cotangents
        ctx.save_for_backward(*ties)
        ctx.complex = [tie.is_complex() for tie in ties]
        return tuple(leaf.view_as(leaf) for leaf in x)

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> Any:
        with torch.no_grad():
            parts = [part for vector in ctx.cotangents(as_vector(v)) for part in vector]
            found = [
                torch.view_as_complex(part) if is_complex else part
                for part, is_complex in zip(parts, ctx.complex, strict=True)
            ]
        if torch.is_grad_enabled():
            found = list(_once(len(found), *found, *v, *ctx.saved_tensors))
        return None, None, *found


class _Once(torch.autograd.Function):
    """The first ``count`` tensors, which refuse to be differentiated: a second derivative would be wrong.

    The other tensors are what they depend on, so that whoever asks gets here, rather than a derivative of nothing.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Any:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise RuntimeError(
            "expected the solution of a solver to be differentiated once, got a request for a second derivative: "
            "differentiate an unrolled solver instead"
        )


_tie: Any = _Tie.apply
_once: Any = _Once.apply


@dataclass(frozen=True)
class _Found:
    x: Vector
    remainder: bool


def _solve(space: Vectors, apply: Map, v: Vector, tol: float, maxiter: int) -> _Found:
    """Return w with least ``‖v − Mw‖``, M being self-adjoint and positive semi-definite, by conjugate residuals."""
    with space.space.without_autocast():
        return _conjugate_residuals(space, apply, v, tol, maxiter)


def _conjugate_residuals(space: Vectors, apply: Map, v: Vector, tol: float, maxiter: int) -> _Found:
    # E. Stiefel, Relaxationsmethoden bester Strategie, Comment. Math. Helv. 29 (1955) 157-179. The method needs no
    # solution to exist: where v has a part in the kernel of M, that part is the remainder.
    tol = max(tol, 4 * space.space.eps)
    r, p, w = space.copy(v), space.copy(v), space.zeros()
    size = space.norm(r)
    space.choose_precision(size)
    mr = apply(r)
    mp = space.copy(mr)
    gamma = space.dot(r, mr)
    solved = size == 0
    finished = solved | ~(gamma > 0)
    largest = torch.zeros_like(size)  # the largest ‖Mr‖ / ‖r‖ seen stands for ‖M‖
    steps = 0
    while steps < maxiter and not bool(finished.all()):
        step = torch.where(finished, 0, gamma / space.dot(mp, mp))
        space.add(w, step, p)
        space.add(r, -step, mp)
        del mr
        mr = apply(r)
        previous, gamma = gamma, space.dot(r, mr)
        length, pulled = space.norm(r), space.norm(mr)
        largest = torch.fmax(largest, torch.where(length > 0, pulled / length, 0))
        solved = solved | (length <= tol * size)
        finished = finished | solved | (pulled <= tol * largest * length) | ~(gamma > 0)
        beta = torch.where(finished, 0, gamma / previous)
        space.update(p, r, beta)
        space.update(mp, mr, beta)
        steps += 1
    if not bool(finished.all()):
        warnings.warn(
            f"the solve for the gradient did not converge in maxiter={maxiter} steps: raise it or tol, or use damp",
            RuntimeWarning,
            stacklevel=2,
        )
    return _Found(w, not bool(solved.all()))
