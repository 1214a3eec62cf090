"""From graphs to what is called: a forward and its adjoint as programs, run in one of three ways, and as a pair."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adjointlab.space import Space
from adjointlab.transpose.explanation import Account, listing
from adjointlab.transpose.frontend.capture import Capture
from adjointlab.transpose.graph.ir import Graph, cut_off
from adjointlab.transpose.kernels import registry as kernels
from adjointlab.transpose.kernels import select as choice
from adjointlab.transpose.kernels.convolution import Site
from adjointlab.transpose.passes.compose import residual_and_gradient, without_offset
from adjointlab.transpose.passes.convolutions import in_slabs, joined, lower, multiplier
from adjointlab.transpose.passes.drop_forward import Pruned, ops
from adjointlab.transpose.passes.fuse_slices import simplify
from adjointlab.transpose.runtime import autodiff as pair
from adjointlab.transpose.runtime.derived import Derived, Function, Tensors, bound, metadata_of
from adjointlab.transpose.runtime.program import Program, of_state
from adjointlab.transpose.selfcheck import alike, examples

Maps = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


@dataclass(frozen=True)
class Choices:
    """How an operator is to be derived: the engine asked for, and what that may do."""

    requested: str
    affine: bool = False
    lowering: bool = True
    autotune: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of torch.compile

    @property
    def modes(self) -> list[str]:
        """The ways to run a graph, the most wanted first; each is tried until one agrees with eager."""
        modes = ["lowered", "plain"] if self.lowering else ["plain"]
        return ["compiled", *modes] if self.requested == "compiled" else modes


@dataclass(frozen=True)
class Way:
    """One of the modes, after what kept those before it from being used."""

    mode: str
    reason: str = ""
    # Function, linear part and adjoint as they are for free sizes: a graph is for one batch size, and compiling takes
    # seconds, so that these are compiled once, with dynamic shapes.
    dynamic: Maps | None = None


def assemble(forward: Graph, pruned: Pruned, captured: Capture, domain: Space, choices: Choices, way: Way) -> Derived:
    """Return what is called for the graphs of a function and of its adjoint.

    Parameters
    ----------
    forward, pruned : Graph and Pruned
        The graphs.
    captured : Capture
        What they were traced with.
    domain : Space
        Of the function.
    choices : Choices
        How the operator is to be derived.
    way : Way
        How the graphs are to be run.

    Returns
    -------
    Derived
        Which has not been compared with the eager reference.
    """
    lines: list[str] = []
    program = functools.partial(_program, choices=choices, mode=way.mode, lines=lines)
    n, state = len(forward.state), forward.state
    function, adjoint = program(forward), program(pruned.graph)
    linear = program(without_offset(forward)) if choices.affine else function
    programs = {"function": function, "linear": linear, "adjoint": adjoint}
    if way.mode == "compiled":
        _compile(programs, choices, way, n)
    of_state = None if pruned.of_state is None else program(pruned.of_state)
    run_linear, run_adjoint = pair.pair(linear, adjoint, n, None if choices.affine else of_state)
    run = pair.affine(function, linear, adjoint, n, of_state) if choices.affine else run_linear
    account = replace(_account(forward, pruned, adjoint.graph, choices, way), kernels=tuple(lines))
    calls = (bound(function, run, state), bound(linear, run_linear, state), bound(adjoint, run_adjoint, state))

    @functools.cache
    def fused(weighted: bool, residual: bool) -> Program | None:
        graph = residual_and_gradient(forward, pruned.graph, weighted=weighted, residual=residual)
        wholes = [program(graph)]
        if way.mode == "compiled" and way.dynamic is None:
            wholes[0].compile(choices.options)
        elif way.mode == "lowered":
            others = in_slabs(wholes[0].graph), joined(lower(simplify(graph), kernels.transformed)[0])
            wholes += [Program(other, graph) for other in others if other is not None]

        def parts(leaves: Tensors) -> Tensors:
            m, k = len(forward.inputs), len(forward.outputs)
            apart = tuple(a - b for a, b in zip(calls[0](leaves[:m]), leaves[m : m + k], strict=True))
            cotangents = tuple(map(torch.mul, leaves[m + k :], apart)) if weighted else apart
            return (*(apart if residual else ()), *calls[2](cotangents))

        leaves = examples((*forward.inputs, *forward.outputs, *(forward.outputs if weighted else ())))
        runs = {each: bound(each, each.whole, state) for each in wholes}
        agreeing = [each for each, run in runs.items() if domain.every(alike(run, parts, leaves))]
        return choice.quickest({each: functools.partial(runs[each], leaves) for each in agreeing}, leaves[0].device)

    @functools.cache
    def find() -> Callable[..., Any] | None:
        # Graphs that do not run have not been compared with eager.
        known = choices.lowering and way.mode != "plain" and way.dynamic is None
        return _multiplier(forward, pruned.graph, calls[2], affine=choices.affine) if known else None

    def multiply() -> Tensor | None:
        found = find()
        with torch.no_grad():
            return None if found is None else found(*[source.read() for source in state])[0]

    return Derived(
        *calls,
        account,
        captured,
        state,
        _metadata(forward),
        forward.baked,
        (forward, pruned),
        programs,
        fused,
        multiply,
    )


def waiting(eager: Derived, forward: Graph, pruned: Pruned, choices: Choices) -> Derived:
    """Return what has graphs that are still to be compared with the eager reference, and is that until then."""
    account = _account(forward, pruned, pruned.graph, choices, Way(choices.modes[-1]))
    graphs, metadata = (forward, pruned), _metadata(forward)
    return replace(eager, account=account, state=forward.state, metadata=metadata, baked=forward.baked, graphs=graphs)


def _account(forward: Graph, pruned: Pruned, adjoint: Graph, choices: Choices, way: Way) -> Account:
    return Account(
        "compiled" if way.mode == "compiled" else "traced", choices.requested, way.reason, readers=pruned.readers,
        ops_before=pruned.ops_before, ops_after=ops(adjoint), program=listing(adjoint), cut=cut_off(forward),
    )  # fmt: skip


def _metadata(graph: Graph) -> tuple[Any, ...]:
    return tuple(metadata_of(source.read()) for source in graph.state)


def _program(graph: Graph, *, choices: Choices, mode: str, lines: list[str]) -> Program:
    """Return a graph as a program, lowered unless that is turned off; add a line on each kernel."""

    def choose(site: Site) -> str:
        return choice.choose(site, measure=True, thorough=choices.autotune)

    if mode == "plain" or not choices.lowering:
        return Program(graph, graph)
    lowered, chosen = lower(simplify(graph), choose, choice.by_transforms)
    lines.extend(line for line in chosen if line not in lines)
    return Program(lowered, graph)


def _multiplier(forward: Graph, adjoint: Graph, run: Function, *, affine: bool) -> Callable[..., Any] | None:
    """Return what the adjoint multiplies spectra with, of the state, if that is all that it does.

    ``run`` is the adjoint that has been compared with eager. Without a check (``affine``), that f has no offset is a
    claim.
    """
    by_fft, _ = lower(simplify(adjoint), kernels.transformed)
    node = multiplier(by_fft)
    if node is None or not (affine or multiplier(lower(simplify(forward), kernels.transformed)[0]) is not None):
        return None
    program = Program(by_fft, adjoint)
    same = alike(bound(program, program.whole, adjoint.state), run, examples(adjoint.inputs))
    return of_state(by_fft, node) if same else None


def _compile(programs: dict[str, Program], choices: Choices, way: Way, n_state: int) -> None:
    if way.dynamic is None:
        for each in set(programs.values()):
            each.compile(choices.options)
        return
    run_function, run_linear, run_adjoint = way.dynamic
    programs["function"].replace(run_function, n_state)
    programs["adjoint"].replace(run_adjoint, n_state)
    if programs["linear"] is not programs["function"]:
        programs["linear"].replace(run_linear, n_state)


__all__ = ["Choices", "Way", "assemble", "waiting"]
