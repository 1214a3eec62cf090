r"""Implicit differentiation of solutions: the equation is differentiated, and no step of the solver.

Let x solve ``Mx = AᴴWy`` with ``M = AᴴWA + damp²``, and let v be the cotangent of x. With ``w = M⁺v``, ``z = Aw`` and
the weighted residual ``ω = W(y − Ax)``,

``Re⟨v, dx⟩ = Re⟨z, dω⟩ + Re⟨w, d(Aᴴω − damp² x)⟩ + Re⟨v − Mw, (dAᴴ) t + dx₀⟩,``

where ``dω`` is the differential at fixed x, the second one is at fixed ω and x, and ``Aᴴt = x − x₀``. The last term
belongs to the kernel of A, in which v has the part ``v − Mw``: it is zero where the solution is unique. This is the
derivative of the pseudo-inverse by Golub and Pereyra; in the parameters of A it exists where the rank of A is constant.

A preconditioner P changes the norm in which x is the smallest of many solutions, that is ``P^(−1/2) x``. The same
formula in terms of this vector has ``w = P^(1/2) (P^(1/2) M P^(1/2))⁺ P^(1/2) v``, ``P(v − Mw)`` before ``(dAᴴ) t``,
and ``PAᴴt = x − x₀``. The dependence on P itself is left out.

So autograd sees x as a function of the tensors ``ω``, ``Aᴴω − damp² x``, ``Aᴴt`` and ``x₀``, which it can follow to y,
to the weight, to the damping and to the parameters of A. One solve with M computes their cotangents. If A has more
unknowns than equations, parameters that need a gradient, and no damping, another one computes t. If it has not, it
should have no kernel: if v has a part in one, a gradient in the parameters of A is NaN.

References
----------
G. H. Golub and V. Pereyra, *The differentiation of pseudo-inverses and nonlinear least squares problems whose variables
separate*, SIAM J. Numer. Anal. 10 (1973) 413–432.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adjointlab.errors import ConvergenceWarning
from adjointlab.solvers.arithmetic import Vector, Vectors, as_vector, times
from adjointlab.solvers.problem import Problem, detached
from adjointlab.solvers.solution import Solution
from adjointlab.space import Space
from adjointlab.space.coordinates import real_size

Map = Callable[[Vector], tuple[Vector, Tensor]]  # r ↦ (Mr, ⟨r, Mr⟩)
Leaves = tuple[Tensor, ...]

_ROUNDING = 4  # a product Mr contains errors of a few eps ‖M‖ ‖r‖; what is smaller is only rounding


def of_system(problem: Problem, solution: Solution, tol: float, maxiter: int, x0: Any) -> Solution:
    """Make x, the solution of ``Ax = b``, differentiable: ``Re⟨v, dx⟩ = Re⟨w, d(b − Ax)⟩`` with ``Aw = v``."""
    if not torch.is_grad_enabled():
        return solution
    domain = problem.domain
    residual, needs_operator = _residual(problem, solution)

    def cotangents(v: Vector) -> dict[str, Vector]:
        inner, unit = problem.diagonalized().leveled(), domain.scale_to_one(v)
        vector = inner.vector(domain.element(times(v, unit)))
        *found, has_kernel = _pseudo_inverse(
            inner.domain, inner.system, vector, tol, maxiter, precondition=_preconditioner(inner), decide=needs_operator
        )
        if needs_operator and bool(has_kernel.any()):
            raise RuntimeError(
                "expected the operator of cg to be positive definite, got one with a kernel, in which the cotangent of "
                "the solution has a part: the gradient with respect to its parameters takes cgls or lsmr"
            )
        w, rest = (times(domain.vector(inner.element(t)), 1 / unit) for t in found)
        return {"residual": w, "start": rest}

    return as_function_of(domain, solution, {"residual": residual}, x0, cotangents)


def of_least_squares(problem: Problem, solution: Solution, tol: float, maxiter: int, x0: Any) -> Solution:
    """Make x, the minimiser, differentiable with respect to y, the weight, the damping and the parameters of A."""
    if not torch.is_grad_enabled():
        return solution
    domain, codomain = problem.domain, problem.codomain
    residual, needs_operator = _residual(problem, solution)
    if problem.weight is not None:
        residual = codomain.space.leaves(problem.weight(codomain.space.unflatten(residual)))
    inputs = {"residual": residual}
    is_wide = real_size(codomain.space) < real_size(domain.space)
    is_undamped = not bool((problem.damp > 0).all())

    def cotangents(v: Vector) -> dict[str, Vector]:
        inner, gain, unit = problem.diagonalized().leveled(), problem.scaled().gain, domain.scale_to_one(v)
        normal = replace(inner, gain=gain, damp=gain * inner.damp.detach()).normal
        vector = inner.vector(domain.element(times(v, unit)))
        unique = needs_operator and is_undamped and not is_wide
        *found, has_kernel = _pseudo_inverse(
            inner.domain, normal, vector, tol, maxiter, precondition=_preconditioner(inner), decide=unique
        )
        w, rest = (domain.vector(inner.element(t)) for t in found)
        image = problem.apply(w)
        # By one factor after the other: their product may exceed what the results do not.
        image, w = (times(times(times(t, gain), 1 / unit), gain) for t in (image, w))
        rest = times(rest, 1 / unit)
        kernel = problem.preconditioned(rest)[0] if is_undamped and is_wide else rest
        if unique and bool(has_kernel.any()):
            warnings.warn(
                "the least-squares problem has many solutions, although it has no fewer equations than unknowns: the "
                "gradient with respect to the operator's parameters is not determined, and NaN; use damp > 0 (the "
                "gradient with respect to the data is right)",
                RuntimeWarning,
                stacklevel=2,
            )
            w = [t.clone() for t in w]
            domain.fill(w, has_kernel, math.nan)
        return {"residual": image, "gradient": w, "kernel": kernel, "start": rest}

    if needs_operator or problem.damp.requires_grad:
        inputs["gradient"] = _gradient(problem, solution, residual)
    if needs_operator and is_undamped and is_wide:
        correction = detached(domain, solution.x)
        if x0 is not None:
            correction = [a - b for a, b in zip(correction, detached(domain, x0), strict=True)]
        t = _preimage(problem, correction, tol, maxiter)
        inputs["kernel"] = domain.space.leaves(problem.A.H(codomain.space.unflatten(t)))
    return as_function_of(domain, solution, inputs, x0, cotangents, codomain=codomain)


def of_minimum(gradient: Callable[[Any], Any], solution: Solution, space: Space, tol: float) -> Solution:
    """Make x with ``g(x) = 0`` differentiable: ``Re⟨v, dx⟩ = −Re⟨H⁻¹v, dg⟩``, with the derivative H of g in x."""
    # g is the gradient of an objective, so that H is self-adjoint; dg is the differential at fixed x.
    if not torch.is_grad_enabled():
        return solution
    domain, most = Vectors(space, space.batch_shape), min(10_000, 10 * real_size(space) + 10)
    fixed = tuple([leaf.detach() for leaf in space.leaves(solution.x)])

    def cotangents(v: Vector) -> dict[str, Vector]:
        with torch.enable_grad():
            x = tuple([leaf.clone().requires_grad_() for leaf in fixed])
            at_x = space.leaves(gradient(space.unflatten(x)))

        def hessian(r: Vector) -> tuple[Vector, Tensor]:
            along = space.leaves(domain.element(domain.weigh(r)))
            found = torch.autograd.grad(at_x, x, along, retain_graph=True, materialize_grads=True)
            image = domain.copy(domain.unweigh(as_vector(found)))
            return image, domain.dot(r, image)

        unit, size = domain.scale_to_one(v), float(domain.norm(as_vector(fixed)))
        # Where the gradient is not quite zero, the curvature along a valley of minima is not either: of the order of
        # the gradient over x.
        valley = 4 * float(domain.norm(as_vector(tuple(t.detach() for t in at_x)))) / size if size else 0.0
        w, _, has_kernel = _pseudo_inverse(domain, hessian, times(v, unit), tol, most, decide=True, floor=valley)
        if bool(has_kernel.any()):
            warnings.warn(
                "the minimum is not isolated, or x is not near enough to it: its derivative is not determined, and "
                "NaN; add a penalty or damp, or lower tol",
                RuntimeWarning,
                stacklevel=2,
            )
            domain.fill(w, has_kernel, math.nan)
        return {"gradient": times(w, -1 / unit)}

    return as_function_of(
        domain, solution, {"gradient": space.leaves(gradient(space.unflatten(fixed)))}, None, cotangents
    )


def _residual(problem: Problem, solution: Solution) -> tuple[Leaves, bool]:
    """Return ``y − Ax`` at fixed x, and whether A needs a gradient."""
    codomain = problem.codomain.space
    images = codomain.leaves(problem.A(solution.x))
    residual = tuple(y - image for y, image in zip(codomain.leaves(problem.y), images, strict=True))
    return residual, _required(codomain, images)


def _gradient(problem: Problem, solution: Solution, residual: Leaves) -> Leaves:
    """Return ``Aᴴω − damp² x`` at fixed ω and x."""
    domain, fixed = problem.domain, tuple(t.detach() for t in residual)
    leaves = domain.space.leaves(problem.A.H(problem.codomain.space.unflatten(fixed)))
    if not problem.damp.requires_grad:
        return leaves
    x = [t.detach() for t in domain.vector(solution.x)]
    return domain.space.leaves(domain.element(domain.plus(as_vector(leaves), -problem.damp.square(), x)))


def _preimage(problem: Problem, x: Vector, tol: float, maxiter: int) -> Leaves:
    """Return t with ``Aᴴt = x``, the smallest one for the weight: ``t = WAq`` with ``Mq = x``; or ``PAᴴt = x``."""
    codomain = problem.codomain
    with torch.no_grad(), problem.domain.space.without_autocast(), problem.A.frozen():
        gain = problem.scaled().gain
        inner = replace(problem, gain=gain)
        if problem.precondition is None:
            q, *_ = _pseudo_inverse(problem.domain, inner.normal, x, tol, maxiter)
            t, _ = problem.weighted(problem.apply(q))
            return codomain.space.leaves(codomain.element(times(times(t, gain), gain)))

        def outer(r: Vector) -> tuple[Vector, Tensor]:
            z, energy = inner.preconditioned(inner.pull_back(r)[0])
            return inner.weighted(inner.apply(z))[0], energy

        codomain.choose_precision(codomain.norm(problem.data()))
        right, _ = inner.weighted(inner.apply(x))
        q, *_ = _pseudo_inverse(codomain, outer, right, tol, maxiter)
        t, _ = problem.weighted(q)
        return codomain.space.leaves(codomain.element(times(t, gain)))


def _preconditioner(problem: Problem) -> Map | None:
    return None if problem.precondition is None else problem.preconditioned


def _required(space: Space, leaves: Leaves) -> bool:
    """Return whether a leaf requires a gradient, on this process or any other."""
    return not space.every(not any(leaf.requires_grad for leaf in leaves))


def as_function_of(
    domain: Vectors,
    solution: Solution,
    inputs: dict[str, Leaves],
    x0: Any,
    cotangents: Callable[[Vector], dict[str, Vector]],
    *,
    codomain: Vectors | None = None,
) -> Solution:
    """Return the solution with x as a function of inputs; ``cotangents`` maps the cotangent of x to theirs."""
    if x0 is not None and _required(domain.space, domain.space.leaves(x0)):
        inputs["start"] = domain.space.leaves(x0)
    if not any(_required(domain.space, leaves) for leaves in inputs.values()):
        return solution

    def in_order(v: Vector) -> list[Vector]:
        # Autograd's cotangents are for inner products without weights: its Re⟨v, dx⟩ is Re⟨W⁻¹v, dx⟩ in the space.
        with domain.space.without_autocast():
            found = cotangents(domain.unweigh(v))
            where = {"residual": codomain or domain}  # all else is in the domain
            return [where.get(name, domain).weigh(found[name]) for name in inputs]

    given = [leaf for leaves in inputs.values() for leaf in leaves]
    x = _implicit_function(in_order, domain.space.leaves(solution.x), *given)
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


def _lower_bound(space: Vectors, apply: Map, P: Map) -> Tensor:
    """Return a lower bound of ``‖P^(1/2) M P^(1/2)‖`` that no kernel makes small."""
    pg, size = P(space.vector(space.space.randn(torch.Generator().manual_seed(0))))
    return (P(apply(pg)[0])[1] / size).sqrt()


def _pseudo_inverse(
    space: Vectors,
    apply: Map,
    v: Vector,
    tol: float,
    maxiter: int,
    *,
    precondition: Map | None = None,
    decide: bool = False,
    floor: float = 0.0,
) -> tuple[Vector, Vector, Tensor]:
    """Return ``M⁺v``, ``v − MM⁺v``, and whether that is in the kernel of M, self-adjoint and positive semidefinite."""
    # E. Stiefel, Relaxationsmethoden bester Strategie, Comment. Math. Helv. 29 (1955) 157-179. It minimises ‖v − Mw‖:
    # for M = AᴴA these are the steps of CGLS for ‖v − Aᴴz‖, with z = Aw. The part of v in the kernel of M stays in r
    # as it is, and gets into w as a multiple of r: κ. `decide` goes on until a kernel is told for sure. With P, all
    # of this is about P^(1/2)MP^(1/2) and P^(1/2)v: z = Pr, and ‖P^(1/2)r‖² = ⟨r, z⟩.
    tol = max(tol, _ROUNDING * space.space.eps)
    P: Map = precondition or (lambda r: (r, space.dot(r, r)))
    space.choose_precision(space.norm(v))
    largest = _lower_bound(space, apply, P)
    z, size = P(v)
    size = length = size.sqrt()
    r, p, w = space.copy(v), space.copy(z), space.zeros()
    z = space.copy(z) if precondition else r
    mr, energy = apply(z)
    pmr, image = P(mr)
    mp, target, previous = space.copy(mr), 0 if decide else tol**2 * energy, energy
    pmp = space.copy(pmr) if precondition else mp
    kappa_p, kappa = torch.ones_like(size), torch.zeros_like(size)
    solved, vanished = size == 0, torch.zeros_like(size, dtype=torch.bool)
    finished = solved
    steps = 0
    while True:
        image = image.sqrt()
        largest = torch.fmax(largest, torch.where(length > 0, image / length, 0))
        solved = solved | (~finished & (length <= tol * size))
        vanished = vanished | (
            ~finished & ~solved & (image <= (_ROUNDING * space.space.eps * largest + floor) * length)
        )
        finished = finished | solved | vanished | ~(energy > 0)
        if steps:
            finished = finished | (energy <= target)
            beta = torch.where(finished, 0, energy / previous)
            space.update(p, z, beta)
            space.update(mp, mr, beta)
            if precondition:
                space.update(pmp, pmr, beta)
            kappa_p = 1 + beta * kappa_p
        if steps == maxiter or bool(finished.all()):
            break
        step = torch.where(finished, 0, energy / space.dot(mp, pmp))
        space.add(w, step, p)
        space.add(r, -step, mp)
        if precondition:
            space.add(z, -step, pmp)
        kappa = kappa + step * kappa_p
        previous, steps = energy, steps + 1
        del mr, pmr
        mr, energy = apply(z)
        pmr, image = P(mr)
        length = space.dot(r, z).sqrt()
    if not bool(finished.all()):
        warnings.warn(
            f"the solve for the gradient did not converge in maxiter={maxiter} steps: raise it or tol, or use damp",
            ConvergenceWarning,
            stacklevel=2,
        )
    space.add(w, -torch.where(solved, 0, kappa), z)
    space.fill(r, solved)
    return w, r, vanished
