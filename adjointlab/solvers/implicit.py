r"""Implicit differentiation of solutions: the equation is differentiated, and no step of the solver.

Let x solve ``Mx = AᴴWy`` with ``M = AᴴWA + damp²``, and let v be the cotangent of x. With ``Mw = v``, ``z = Aw`` and
the weighted residual ``ω = W(y − Ax)``,

``Re⟨v, dx⟩ = Re⟨z, dω⟩ + Re⟨w, (dAᴴ) ω⟩,``

where ``dω`` is the differential at fixed x. So autograd sees x as a function of two tensors, ``ω`` (at fixed x) and
``η = Aᴴω`` (at fixed ω), which it can follow to y, to the weight and to the parameters of A. One solve with M computes
the cotangents z and w of these two tensors. If A has more unknowns than equations, ``Mw = v`` only has a least-squares
solution, with a remainder ``v − Mw`` in the kernel of A. Then ``Re⟨v, dx⟩`` has one more term,
``Re⟨v − Mw, (dAᴴ) t⟩`` with ``Aᴴt = x``.

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
    """Make x, the solution of ``Ax = b``, differentiable: ``Re⟨v, dx⟩ = Re⟨w, d(b − Ax)⟩`` with ``Aw = v``."""
    residual = _residual(problem, solution)
    if residual is None:
        return solution
    domain = problem.domain

    def cotangents(v: Vector) -> list[Vector]:
        inner = problem.diagonalized()
        found = _solve(inner.domain, inner.apply, inner.vector(domain.element(v)), tol, maxiter)
        return [domain.vector(inner.element(found.x))]

    return _as_function_of(domain, solution, [residual], cotangents)


def of_least_squares(
    problem: Problem, solution: Solution, damp: float, tol: float, maxiter: int, *, started: bool
) -> Solution:
    """Make x, the minimiser, differentiable with respect to y, to the weight and to the parameters of A."""
    residual = _residual(problem, solution)
    if residual is None:
        return solution
    domain, codomain = problem.domain, problem.codomain
    if problem.weight is not None:
        residual = codomain.space.leaves(problem.weight(codomain.space.unflatten(residual)))
    inputs = [residual]
    image = _adjoint_image(problem, tuple(t.detach() for t in residual))
    wide = damp == 0 and not started and real_size(codomain.space) < real_size(domain.space)
    if image is not None:
        inputs.append(image)
        if wide:
            inputs.append(_adjoint_image(problem, _preimage(problem, solution, tol, maxiter)) or ())

    def cotangents(v: Vector) -> list[Vector]:
        inner = problem.diagonalized()
        found = _solve(inner.domain, inner.normal(damp), inner.vector(domain.element(v)), tol, maxiter)
        w = domain.vector(inner.element(found.x))
        if found.remainder and len(inputs) == 2 and damp == 0:
            warnings.warn(
                "the gradient with respect to the operator's parameters is not determined, since the least-squares "
                "problem has many solutions: use damp > 0 (the gradient with respect to the data is right)",
                RuntimeWarning,
                stacklevel=2,
            )
        rest = [a - b for a, b in zip(v, problem.normal(damp)(w), strict=True)] if len(inputs) == 3 else []
        return [problem.apply(w), w, rest][: len(inputs)]

    return _as_function_of(domain, solution, inputs, cotangents)


def _residual(problem: Problem, solution: Solution) -> tuple[Tensor, ...] | None:
    """Return ``y − Ax`` at fixed x, or None if it needs no gradient."""
    if not torch.is_grad_enabled():
        return None
    codomain = problem.codomain.space
    pairs = zip(codomain.leaves(problem.y), codomain.leaves(problem.A(solution.x)), strict=True)
    residual = tuple(y - image for y, image in pairs)
    return residual if _required(codomain, residual) else None


def _adjoint_image(problem: Problem, element: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Return ``Aᴴ`` of a fixed element, or None if A needs no gradient."""
    leaves = problem.domain.space.leaves(problem.A.H(problem.codomain.space.unflatten(element)))
    return leaves if _required(problem.domain.space, leaves) else None


def _required(space: Space, leaves: tuple[Tensor, ...]) -> bool:
    """Return whether a leaf requires a gradient, on this process or any other."""
    return not space.every(not any(leaf.requires_grad for leaf in leaves))


def _preimage(problem: Problem, solution: Solution, tol: float, maxiter: int) -> tuple[Tensor, ...]:
    """Return t with ``Aᴴt = x``, the solution of ``A Aᴴ t = Ax``."""
    with torch.no_grad():

        def apply(t: Vector) -> Vector:
            return problem.apply(problem.domain.vector(problem.A.H(problem.codomain.element(t))))

        image = problem.apply(problem.domain.vector(solution.x))
        t = _solve(problem.codomain, apply, image, tol, maxiter).x
        return problem.codomain.space.leaves(problem.codomain.element(t))


def _as_function_of(
    domain: Vectors, solution: Solution, inputs: list[tuple[Tensor, ...]], cotangents: Callable[[Vector], list[Vector]]
) -> Solution:
    """Return the solution with x as a function of ``inputs``; ``cotangents`` maps the cotangent of x to theirs."""
    x = _implicit_function(cotangents, domain.space.leaves(solution.x), *[leaf for source in inputs for leaf in source])
    return replace(solution, x=domain.space.unflatten(x))


class _ImplicitFunction(torch.autograd.Function):
    """The solution as a function of ``inputs``; one solve computes the cotangents of all of them."""

    @staticmethod
    def forward(ctx: Any, cotangents: Callable[[Vector], list[Vector]], x: tuple[Tensor, ...], *inputs: Tensor) -> Any:
        ctx.cotangents = cotangents
        ctx.save_for_backward(*inputs)
        ctx.complex = [source.is_complex() for source in inputs]
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
            found = list(_differentiable_once(len(found), *found, *v, *ctx.saved_tensors))
        return None, None, *found


class _DifferentiableOnce(torch.autograd.Function):
    """The identity on the first ``count`` tensors; its derivative raises, because a second derivative would be wrong.

    The first tensors depend on the other tensors. These are inputs, so that a derivative with respect to them raises,
    too, instead of being zero.
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


_implicit_function: Any = _ImplicitFunction.apply
_differentiable_once: Any = _DifferentiableOnce.apply


@dataclass(frozen=True)
class _LeastSquares:
    """The minimiser x of ``‖v − Mx‖``, and whether a remainder ``v − Mx`` beyond the tolerance is left."""

    x: Vector
    remainder: bool


def _solve(space: Vectors, apply: Map, v: Vector, tol: float, maxiter: int) -> _LeastSquares:
    """Return the minimiser w of ``‖v − Mw‖`` for a self-adjoint positive semidefinite M, by conjugate residuals."""
    with space.space.without_autocast():
        return _conjugate_residuals(space, apply, v, tol, maxiter)


def _conjugate_residuals(space: Vectors, apply: Map, v: Vector, tol: float, maxiter: int) -> _LeastSquares:
    # E. Stiefel, Relaxationsmethoden bester Strategie, Comment. Math. Helv. 29 (1955) 157-179. The method works even if
    # there is no solution: the component of v in the kernel of M remains as the residual.
    tol = max(tol, 4 * space.space.eps)
    r, p, w = space.copy(v), space.copy(v), space.zeros()
    size = space.norm(r)
    space.choose_precision(size)
    mr = apply(r)
    mp = space.copy(mr)
    gamma = space.dot(r, mr)
    solved = size == 0
    finished = solved | ~(gamma > 0)
    largest = torch.zeros_like(size)  # the largest ‖Mr‖ / ‖r‖ so far, an estimate of ‖M‖
    steps = 0
    while steps < maxiter and not bool(finished.all()):
        step = torch.where(finished, 0, gamma / space.dot(mp, mp))
        space.add(w, step, p)
        space.add(r, -step, mp)
        del mr
        mr = apply(r)
        previous, gamma = gamma, space.dot(r, mr)
        length, image = space.norm(r), space.norm(mr)
        largest = torch.fmax(largest, torch.where(length > 0, image / length, 0))
        solved = solved | (length <= tol * size)
        finished = finished | solved | (image <= tol * largest * length) | ~(gamma > 0)
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
    return _LeastSquares(w, not bool(solved.all()))
