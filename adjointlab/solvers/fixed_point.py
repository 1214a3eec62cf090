r"""Implicit differentiation of ``x = prox(x − τ ∇F(x), τ)``, the rule of optimality of ``F + g``, for a quadratic F.

Let H be the Hessian of F, P the derivative of the proximal map at ``z = x − τ ∇F(x)``, and v the cotangent of x. P is
self-adjoint with ``0 ≤ P ≤ 1``, since a proximal map is the gradient of a convex function. With u in the range of P and

``(P⁺ − 1 + τH) u = v  there,   w = v + u − τHu,``

``Re⟨v, dx⟩ = −τ Re⟨u, d∇F⟩ + Re⟨w, d prox⟩``, both differentials at fixed x and z. Where P is a projection, as of
bounds or of sparsity, this is the system of those unknowns that may move: ``PHP u = Pv / τ``. Conjugate gradients with
P as the preconditioner solve it without P⁺: each direction ``p = Pq`` comes with a q that stands for ``P⁺p``.

References
----------
Q. Bertrand et al., *Implicit differentiation for fast hyperparameter selection in non-smooth convex learning*, J. Mach.
Learn. Res. 23 (2022).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adjointlab.compat import pytree
from adjointlab.errors import ConvergenceWarning, NotDifferentiableError
from adjointlab.operators import LinearOperator
from adjointlab.solvers import implicit
from adjointlab.solvers.arithmetic import Vector, Vectors, as_vector, times
from adjointlab.solvers.solution import Solution
from adjointlab.space import Space

Map = Callable[[Vector], Vector]
_ROUNDING = 4  # units of eps of a product


def learned(*modules: Any) -> list[Tensor]:
    """Return the tensors of modules, or that their operators read, in which a gradient is asked for."""
    found = []
    for module in modules:
        for part in module.modules() if isinstance(module, nn.Module) else ():
            read = part.source.tensors() if isinstance(part, LinearOperator) and part.source is not None else []
            found += [*part.parameters(recurse=False), *part.buffers(recurse=False), *read]
    return list({id(tensor): tensor for tensor in found if tensor.requires_grad}.values())


def depends(prox: Callable[[Any, float], Any], x: Any) -> list[Tensor]:
    """Return the leaves of a proximal map at x in which a gradient is asked for."""
    found = pytree.tree_leaves(prox(x, 1.0)) if torch.is_grad_enabled() else []
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.requires_grad]


def without_derivative(solution: Solution, space: Space, tensors: Iterable[Tensor], name: str) -> Solution:
    """Return the solution of a solver as a function of tensors, whose derivative is refused when it is asked for."""
    wanted = [tensor for tensor in tensors if tensor.requires_grad] if torch.is_grad_enabled() else []
    if not wanted:
        return solution
    return replace(solution, x=space.unflatten(_refused(name, space.leaves(solution.x), *wanted)))


class _Refused(torch.autograd.Function):
    """The solution, whose derivative nobody knows."""

    @staticmethod
    def forward(ctx: Any, name: str, x: tuple[Tensor, ...], *inputs: Tensor) -> Any:
        ctx.name = name
        return tuple(leaf.view_as(leaf) for leaf in x)

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> Any:
        raise NotDifferentiableError(
            f"expected no derivative of the solution of {ctx.name}, got a request for one: detach x, or unroll the "
            "steps of the solver"
        )


_refused: Any = _Refused.apply


def of_minimiser(
    F: Any, prox: Callable[[Any, float], Any], solution: Solution, domain: Vectors, tol: float
) -> Solution:
    """Make the minimiser x of ``F + g`` differentiable in what F and the proximal map of g depend on."""
    space, most = domain.space, min(10_000, 10 * domain.space.size + 10)
    fixed = [leaf.detach() for leaf in space.leaves(solution.x)]
    if not torch.is_grad_enabled() or not (learned(F) or depends(prox, space.unflatten(fixed))):
        return solution
    at_x = space.leaves(F.gradient(space.unflatten(fixed)))
    slope = [leaf.detach() for leaf in at_x]
    with torch.no_grad():
        length, steep = (float(domain.norm(as_vector(leaves)).amax()) for leaves in (fixed, slope))
        tau = length / steep if 0 < length < math.inf and 0 < steep < math.inf else 1.0  # any is right
        z = [leaf - tau * g for leaf, g in zip(fixed, slope, strict=True)]
    inputs = {"gradient": at_x, "prox": space.leaves(prox(space.unflatten(z), tau))}
    inputs = {name: leaves for name, leaves in inputs.items() if any(leaf.requires_grad for leaf in leaves)}

    def hessian(r: Vector) -> Vector:
        return domain.scaled(domain.vector(F.hessian(domain.element(r))), domain.scalar(tau))

    def cotangents(v: Vector) -> dict[str, Vector]:
        unit = domain.scale_to_one(v)
        with F.frozen():
            u, w = _solved(domain, _derivative(prox, domain, z, tau), hessian, times(v, unit), (tol, most))
        return {"gradient": times(u, -tau / unit), "prox": times(w, 1 / unit)}

    return implicit.as_function_of(domain, solution, inputs, None, cotangents)


def _derivative(prox: Callable[[Any, float], Any], domain: Vectors, z: list[Tensor], tau: float) -> Map:
    """Return the derivative of a proximal map at z, or raise where it is none of a convex function."""
    space = domain.space
    with torch.enable_grad():
        at = [leaf.clone().requires_grad_() for leaf in z]
        images = space.leaves(prox(space.unflatten(at), tau))

    def apply(r: Vector) -> Vector:
        along = space.leaves(domain.element(domain.weigh(r)))
        found = torch.autograd.grad(images, at, along, retain_graph=True, materialize_grads=True)
        return domain.copy(domain.unweigh(as_vector(found)))

    if not all(image.requires_grad for image in images):
        raise NotDifferentiableError(
            "expected prox to be differentiable by autograd, got one whose result is detached from its argument: write "
            "it with operations of torch, or call the solver within torch.no_grad()"
        )
    a, b = (domain.vector(space.randn(torch.Generator().manual_seed(seed))) for seed in (1, 2))
    pa, pb = apply(a), apply(b)
    gap, size = (domain.dot(pa, b) - domain.dot(a, pb)).abs(), domain.norm(a) * domain.norm(b)
    if bool((gap > space.eps**0.5 * size).any()):
        raise NotDifferentiableError(
            "expected prox to be the proximal map of a convex function, got one whose derivative is not self-adjoint: "
            "the derivative of the solution is not known; unroll the steps instead"
        )
    return apply


def _solved(domain: Vectors, P: Map, H: Map, v: Vector, limits: tuple[float, int]) -> tuple[Vector, Vector]:
    """Return u and w for ``τH``, NaN in problems whose minimiser is not isolated."""
    tol, most = max(limits[0], _ROUNDING * domain.space.eps), limits[1]
    domain.choose_precision(domain.norm(v))
    r, total, u = domain.copy(v), domain.zeros(), domain.zeros()  # total: the sum of steps along q
    z = P(r)
    p, q, rho = domain.copy(z), domain.copy(r), domain.dot(r, z)
    target, largest, one = tol**2 * rho, torch.zeros_like(rho), domain.scalar(1)
    flat = torch.zeros_like(rho, dtype=torch.bool)
    for _ in range(most):
        finished = flat | ~(rho > target)
        if bool(finished.all()):
            break
        ap = domain.plus(q, -one, p)
        domain.add(ap, one, H(p))
        curvature, square = domain.dot(p, ap), domain.dot(p, p)
        largest = torch.fmax(largest, torch.where(square > 0, curvature / square, 0))
        flat = flat | (~finished & ~(curvature > _ROUNDING * domain.space.eps * largest * square))
        finished = finished | flat
        step = torch.where(finished, 0, rho / curvature)
        domain.add(u, step, p)
        domain.add(total, step, q)
        domain.add(r, -step, ap)
        z, before = P(r), rho
        rho = torch.where(finished, rho, domain.dot(r, z))
        ratio = torch.where(finished, 0, rho / before)
        domain.update(p, z, ratio)
        domain.update(q, r, ratio)
    else:
        warnings.warn(
            f"the solve for the gradient did not converge in {most} steps: raise tol, or add a penalty",
            ConvergenceWarning,
            stacklevel=2,
        )
    if bool(flat.any()):
        warnings.warn(
            "the minimum is not isolated: its derivative is not determined, and NaN; add a penalty",
            RuntimeWarning,
            stacklevel=2,
        )
    unknown = flat | ~rho.isfinite()
    domain.fill(u, unknown, math.nan)
    domain.fill(total, unknown, math.nan)
    return u, domain.plus(r, one, total)
