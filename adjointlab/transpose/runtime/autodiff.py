"""A and Aᴴ as each other's derivative, to any order, with nothing but the arguments saved.

The derivative of ``v ↦ Aᴴv`` in ``v`` is ``A``, that of ``x ↦ Ax`` in ``x`` is ``Aᴴ``. With respect to what A depends
on besides x (parameters θ, here called *state*) both have the derivative of one scalar: ``Re⟨A_θ g, v⟩``, whose
gradient in θ is a first-order VJP of the forward, itself made of differentiable ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjointlab import compat
from adjointlab.transpose.runtime.program import Program, Tensors, canonical

Run = Callable[..., Tensors]
StateGradient = Callable[[Tensors, Tensors, Tensors, tuple[bool, ...]], list[Any]]


def pair(forward: Program, adjoint: Program, n_state: int, of_state: Program | None = None) -> tuple[Run, Run]:
    """Return ``forward`` and ``adjoint`` as functions of ``(*state, *inputs)`` that are each other's derivative.

    Both are linear in the inputs. ``of_state`` is ``(*state, *x, *v) → ∂θ Re⟨A_θ x, v⟩``, None for each θ where it does
    not know.
    """
    of_forward = state_gradient(forward.whole, of_state, n_state, adjoint_side=False)
    of_adjoint = state_gradient(forward.whole, of_state, n_state, adjoint_side=True)

    def run_adjoint(*tensors: Tensor) -> Tensors:  # the two refer to each other, so one must come before it exists
        return second(*tensors)

    first = _link(forward, adjoint.whole, run_adjoint, None, of_forward, n_state)
    second = _link(adjoint, forward.whole, first, None, of_adjoint, n_state)
    return first, second


def affine(forward: Program, linear: Run, adjoint: Run, whole: Run, n_state: int, of_state: Program | None) -> Run:
    """Return an affine ``forward`` whose derivative is that of its linear part.

    ``linear`` and ``adjoint`` are a pair; ``whole`` is the adjoint as a graph of differentiable operations.
    """
    gradient = state_gradient(forward.whole, of_state, n_state, adjoint_side=False)
    return _link(forward, whole, adjoint, linear, gradient, n_state)


def state_gradient(forward: Run, known: Program | None, n_state: int, *, adjoint_side: bool) -> StateGradient:
    """Return the function that computes the gradient of ``Re⟨A_θ g, v⟩`` in the wanted θ.

    By the program that is ``known`` for it, where there is one and no derivative of it is asked for.
    """

    def gradient(state: Tensors, argument: Tensors, cotangents: Tensors, wanted: tuple[bool, ...]) -> list[Any]:
        x, v = (cotangents, argument) if adjoint_side else (argument, cotangents)
        chosen = [i for i in range(n_state) if wanted[i]]
        gradients: list[Any] = [None] * n_state
        if not chosen:
            return gradients
        if known is not None and compat.plain() and not compat.differentiated((*state, *x, *v)):
            found = known.run(*state, *map(canonical, (*x, *v)))
            if all(found[i] is not None for i in chosen):
                return [gradient if i in chosen else None for i, gradient in enumerate(found)]

        def of_state(*values: Tensor) -> Tensors:
            full = list(state)
            for i, value in zip(chosen, values, strict=True):
                full[i] = value
            return tuple(forward(*full, *x))

        pull_back: Any = torch.func.vjp(of_state, *[state[i] for i in chosen])[1]
        for i, value in zip(chosen, pull_back(tuple(v)), strict=True):
            gradients[i] = value
        return gradients

    return gradient


def _link(
    program: Program, derivative_whole: Run, derivative: Run, linear: Run | None, gradient: StateGradient, n_state: int
) -> Run:
    """Return ``program`` as a function with the given derivative in its inputs and gradient in its state.

    There are three, since none serves everywhere: old-style Functions cost a quarter of what functorch's need,
    functorch takes only the new style, and torch.compile takes neither objects nor Functions in a backward.
    """
    whole = program.whole
    compiled = _plain(program.whole, _backward(derivative_whole, gradient, n_state))
    eager = _plain(program.run, _backward(derivative, gradient, n_state))
    # Past the checks that Function.apply makes for functorch, which is known not to be at work.
    apply_eagerly = super(torch.autograd.Function, eager).apply

    def apply(*tensors: Tensor) -> Tensors:
        if torch.compiler.is_compiling():
            # torch.compile inlines a Function that needs no gradient, and trips over its context; nor does it know
            # what transforms are to make of one. The graph itself is differentiable, if not to be differentiated fast.
            tracked = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
            use = tracked and not compat.is_transformed()
            return compiled.apply(*tensors) if use else tuple(whole(*tensors))
        if compat.is_nested_forward_mode():
            return tuple(whole(*tensors))  # the jvp of a Function is not itself differentiated forward
        if compat.plain() and not compat.is_forward_mode():
            return apply_eagerly(*tensors)  # type: ignore[no-any-return]
        return transformable.apply(*tensors)  # type: ignore[no-any-return]

    transformable: Any = _transformable(
        program, _backward(derivative, gradient, n_state), _jvp(linear or apply, gradient, n_state)
    )
    return apply


def _plain(run: Run, pull_back: Callable[..., Any]) -> Any:
    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensors:
            ctx.save_for_backward(*tensors)
            return tuple(run(*tensors))

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> Any:
            return pull_back(ctx.saved_tensors, cotangents, ctx.needs_input_grad)

    return Plain


def _transformable(run: Run, pull_back: Callable[..., Any], push_forward: Callable[..., Any]) -> Any:
    class Transformable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*tensors: Tensor) -> Tensors:
            return tuple(run(*tensors))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, *cotangents: Tensor) -> Any:
            return pull_back(ctx.saved_tensors, cotangents, ctx.needs_input_grad)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            return push_forward(ctx.saved_tensors, tangents)

    return Transformable


def _backward(derivative: Run, gradient: StateGradient, n_state: int) -> Callable[..., Any]:
    def pull_back(tensors: Tensors, cotangents: Tensors, wanted: tuple[bool, ...]) -> Any:
        state, argument = tensors[:n_state], tensors[n_state:]
        of_state = gradient(state, argument, cotangents, wanted)
        if any(wanted[n_state:]):
            return (*of_state, *derivative(*state, *cotangents))
        return (*of_state, *[None for _ in argument])

    return pull_back


def _jvp(linear: Run, gradient: StateGradient, n_state: int) -> Callable[..., Any]:
    def push_forward(tensors: Tensors, tangents: tuple[Any, ...]) -> Any:
        state, argument = tensors[:n_state], tensors[n_state:]
        moved = [
            torch.zeros_like(like) if tangent is None else tangent
            for tangent, like in zip(tangents[n_state:], argument, strict=True)
        ]
        result = linear(*state, *moved)
        wanted = tuple(tangent is not None for tangent in tangents[:n_state])
        if not any(wanted):
            return result

        # The derivative along the state is the transpose of v ↦ ∂θ Re⟨A_θ g, v⟩, which is linear in v.
        def gradients(*v: Tensor) -> Tensors:
            return tuple(g for g in gradient(state, argument, v, wanted) if g is not None)

        transpose: Any = torch.func.vjp(gradients, *[torch.zeros_like(r) for r in result])[1]
        along = transpose(tuple(tangent for tangent in tangents[:n_state] if tangent is not None))
        return tuple(r + a for r, a in zip(result, along, strict=True))

    return push_forward
