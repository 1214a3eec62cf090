"""Whether derived functions are what the eager reference is, on random data: nothing derived is used before that."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from adjointlab.numerics import full_precision
from adjointlab.space import Space
from adjointlab.transpose.frontend import vjp
from adjointlab.transpose.frontend.capture import Capture, Source
from adjointlab.transpose.sample import Sample, copies, eps, gap, gradients, nudged

Tensors = tuple[Tensor, ...]
Function = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Maps:
    """A function and its adjoint, on the leaves of elements."""

    function: Function
    adjoint: Function
    domain: Space
    codomain: Space


@full_precision
def disagreement(  # two pairs of maps, and what they are compared on
    reference: Maps, derived: Maps, sample: Sample, captured: Capture, state: tuple[Source, ...], *, compiled: bool
) -> str:
    """Return how derived functions differ from the eager reference, or nothing where they agree."""
    trials = [
        ("forward", reference.function, derived.function, sample.x, sample.at_x, reference.codomain),
        ("adjoint", reference.adjoint, derived.adjoint, sample.v, sample.at_v, reference.domain),
    ]
    with captured.preserved(), torch.no_grad(), warnings.catch_warnings():
        # torch.compile runs complex numbers op by op, and says so; the account has what we have to say.
        warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
        for name, plain, fast, argument, expected, space in trials:
            said = ""
            try:
                found = fast(copies(argument))
            except (RuntimeError, AssertionError) as error:  # of a compiler, or of an op that strides do not suit
                lines = [line for line in str(error).splitlines() if line.strip()]
                said = " ".join(lines[:2])[:300]  # where it failed, and what was said
            if not space.every(not said):
                return f"{'torch.compile' if compiled else f'the derived {name}'} failed ({said or _ELSEWHERE})"
            distance, allowed = gap(expected, found, space), _rounding(32, expected)
            # Cancellation inside? Then the result moves as much when the argument does; a quick sample is left to the
            # plain one, since what it expects and what the reference gives may be two different functions.
            if distance > allowed and not sample.quick:
                allowed *= 1 + gap(expected, plain(nudged(argument)), space) / eps(expected)
            if not distance <= allowed:
                return (
                    f"the derived {name} differs from the eager one by {distance:.1e} of its norm, where rounding "
                    f"explains {allowed:.1e}"
                )
    wanted = [(source.name, source.read()) for source in state if source.read().requires_grad]
    if reference.domain.every(not wanted):
        return ""
    if not reference.domain.every(bool(wanted)):
        return "parameters require gradients on some processes only"
    with captured.preserved():
        said = _of_gradients(reference, derived.function, sample, wanted)
    return "" if reference.domain.every(not said) else said or f"gradients differ from autograd's {_ELSEWHERE}"


_ELSEWHERE = "on another process"


def _rounding(units: int, leaves: Tensors) -> float:
    """Return what rounding explains of a norm: at most a sixteenth, which is 64 eps of float16 and 8 eps of bfloat16.

    64 eps of the latter were half of the norm, which passes what is no rounding.
    """
    return min(units * eps(leaves), 1 / 16)


def _of_gradients(reference: Maps, function: Function, sample: Sample, wanted: list[tuple[str, Tensor]]) -> str:
    """Return how gradients in the parameters differ from plain autograd's, or nothing where they agree.

    A straight-through estimator or a block under no_grad gives parameters a derivative that is not the function's.
    """
    if isinstance(sample.gradients, str):
        return f"the gradient in the parameters failed ({sample.gradients})"
    parameters, expected = tuple(tensor for _, tensor in wanted), sample.gradients
    try:
        _, found = gradients(function, sample.x, sample.v, parameters)
        apart = [gap((a,), (b,)) for a, b in zip(expected, found, strict=True)]
        allowed = [_rounding(64, (a,)) for a in expected]
        if not reference.domain.every(all(map(operator.le, apart, allowed))):  # cancellation inside? as above
            _, moved = gradients(reference.function, nudged(sample.x), sample.v, parameters)
            allowed = [u * (1 + gap((a,), (c,)) / eps((a,))) for u, a, c in zip(allowed, expected, moved, strict=True)]
    except RuntimeError as error:
        return f"the gradient in the parameters failed ({vjp.first_line(error)})"
    for (name, _), distance, most in zip(wanted, apart, allowed, strict=True):
        if not distance <= most:
            return f"the gradient in {name} differs from autograd's by {distance:.1e} of its norm"
    return ""


def examples(nodes: Iterable[fx.Node]) -> Tensors:
    """Return random leaves like those of nodes."""
    draw = torch.Generator().manual_seed(21)
    values = [node.meta["val"] for node in nodes]
    return tuple(torch.randn(v.shape, generator=draw, device="cpu").to(v.device, v.dtype) for v in values)


@full_precision
def alike(function: Function, reference: Function, leaves: Tensors) -> bool:
    """Return whether two functions agree on random leaves.

    For what is made of parts that were compared with eager: neither is run where that was not so.
    """
    with torch.no_grad():
        expected, found = reference(leaves), function(leaves)
    return all(gap((a,), (b,)) <= _rounding(64, (a,)) for a, b in zip(expected, found, strict=True))


__all__ = ["Maps", "alike", "disagreement", "examples"]
