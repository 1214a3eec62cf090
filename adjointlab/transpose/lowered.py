"""The graphs of a function, and the programs that they are lowered to: each map by itself, and A and Aᴴ together."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adjointlab.modules import read_all
from adjointlab.space import Space
from adjointlab.transpose import selfcheck
from adjointlab.transpose.explanation import Explanation
from adjointlab.transpose.frontend.vjp import Function, Tensors
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import op_name
from adjointlab.transpose.kernels.registry import transformed
from adjointlab.transpose.options import Options
from adjointlab.transpose.passes import compose, convolutions, gram_indices, gram_kernels, gram_real
from adjointlab.transpose.passes.drop_forward import Adjoint
from adjointlab.transpose.passes.fuse_slices import fuse_slices
from adjointlab.transpose.passes.gram import RULES, simplified
from adjointlab.transpose.passes.maps_by_index import maps_by_index
from adjointlab.transpose.passes.own_outputs import own_outputs
from adjointlab.transpose.passes.partition import value_of_state
from adjointlab.transpose.passes.sweeps import sweeps
from adjointlab.transpose.runtime.derivation import Derivation, Gram
from adjointlab.transpose.runtime.program import Program, Residuals
from adjointlab.transpose.runtime.steps import InSweeps, Together

BUILDING = threading.RLock()  # tracing replaces functions of torch for a while, and graphs share what is fake
Compiled = Callable[[], Mapping[str, Callable[..., Tensors]]]


@dataclass(frozen=True)
class Graphs:
    """The graphs of a function: itself, its linear part, the adjoint of that, and its own gradients in the state."""

    forward: Graph
    linear: Graph
    adjoint: Adjoint
    of_state: Graph | None  # of the function itself, where it is not linear
    holds: Callable[[], bool]
    explanation: Explanation  # what is known before they are programs
    value: Graph | None = None  # of the function whose pull-back at a point the forward is
    has_checks: bool = False  # whether that raises on some values, which a graph does not

    def stateful(self, is_stateful: bool) -> Graphs:
        """Return the same of a function of which calls change what the next ones do, or not."""
        return replace(self, explanation=replace(self.explanation, is_stateful=is_stateful))

    def mapping(self) -> dict[str, Graph]:
        """Return the graphs of what can be called, by name."""
        return {"function": self.forward, "linear": self.linear, "adjoint": self.adjoint.graph}


def program_of(
    graph: Graph, reference: Graph | None = None, residuals: Residuals | None = None, *, options: Options, mode: str
) -> Program:
    """Return a graph as a program, with fused slices and kernels of its own unless that is turned off."""
    reference = reference or graph
    if mode == "plain" or not options.lowering:
        return Program(graph, reference, residuals)
    mapped = maps_by_index(graph, options.choose_map) if mode == "lowered" and options.choose_map else graph
    fused = fuse_slices(mapped, options.choose_sum if mode == "lowered" else None)
    return Program(convolutions.lower(fused, options.chooser, options.transform), reference, residuals)


def _is_equal(program: Program, graph: Graph, parts: Function) -> bool:
    """Return whether the program of a graph, with the state as it is now, computes what its parts do."""
    state = read_all(graph.state)
    shapes = [node.meta["val"] for node in graph.inputs]
    return selfcheck.alike(lambda leaves: program.run(*state, *leaves), parts, shapes)


def in_sweeps(
    derivation: Derivation, graphs: Graphs, options: Options, mode: str, count: int, moving: tuple[int, ...],
    chosen: tuple[int, ...],
) -> InSweeps | None:  # fmt: skip
    """Return the programs for the chosen gradients in the state by two sweeps, None where the parts are to run."""
    if graphs.adjoint.of_state is None or graphs.linear is not graphs.forward:
        return None
    found = sweeps(graphs.forward, graphs.adjoint.graph, graphs.adjoint.of_state, count, moving, chosen)
    if found is None:
        return None
    forth, back = (program_of(graph, options=options, mode=mode) for graph in (found.forth, found.back))
    for program in (forth, back) if mode == "compiled" else ():
        program.compile(options.options)
    m, of_state = len(graphs.forward.inputs), graphs.adjoint.of_state.function
    made = InSweeps(forth, back, found.end.function, found.given, found.sums, len(graphs.adjoint.graph.outputs))
    state = read_all(derivation.state)

    def at_once(leaves: Tensors) -> Tensors:
        x, v, moved = leaves[:m], leaves[m:], tuple(state[i] for i in moving)
        run = Together(made, state, tuple((i, j) for j, i in enumerate(moving)), count)
        inputs, of_inputs = x[count:], tuple(map(torch.empty_like, x[count:]))
        u, residuals = run.forth(x[:count], moved, inputs, 0)
        of_u, gradients = run.back(v[:count], moved, residuals, inputs, v[count:], of_inputs)
        return (*u, *of_u, *of_inputs, *gradients, *run.ends())

    def parts(leaves: Tensors) -> Tensors:
        found = of_state(*state, *leaves)
        last = [found[i] for i in chosen if i in moving] + [found[i] for i in chosen if i not in moving]
        u = derivation.function("function")(leaves[:m])[:count]
        return (*u, *derivation.function("adjoint")(leaves[m:]), *last)

    shapes = [node.meta["val"] for node in (*graphs.forward.inputs, *graphs.adjoint.graph.inputs)]
    return made if selfcheck.alike(at_once, parts, shapes) else None


def once(build: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function that keeps its results, and is called in one thread at a time."""
    found: dict[Any, Any] = {}

    def get(*key: Any) -> Any:
        if key not in found:
            with BUILDING:
                if key not in found:  # another thread may have been here
                    found[key] = build(*key)
        return found[key]

    return get


def gradient(
    derivation: Derivation, graphs: Graphs, domain: Space, options: Options, mode: str, weighted: bool, residual: bool
) -> Program | None:
    """Return the program of the least-squares gradient, None where it is not what the parts compute."""
    graph = compose.residual_and_gradient(graphs.forward, graphs.adjoint.graph, weighted=weighted, residual=residual)
    program = program_of(graph, options=options, mode=mode)
    if mode == "compiled":
        program.compile(options.options)
    elif mode == "lowered":
        program = Program(convolutions.joined(program.graph), graph)

    def parts(leaves: Tensors) -> Tensors:
        m, k = len(graphs.forward.inputs), len(graphs.forward.outputs)
        images = derivation.function("function")(leaves[:m])
        apart = tuple(a - b for a, b in zip(images, leaves[m : m + k], strict=True))
        cotangents = tuple(w * r for w, r in zip(leaves[m + k :], apart, strict=True)) if weighted else apart
        return (*(apart if residual else ()), *derivation.function("adjoint")(cotangents))

    return program if domain.every(_is_equal(program, graph, parts)) else None


def gram(
    derivation: Derivation, graphs: Graphs, spaces: tuple[Space, Space], options: Options, mode: str, swapped: bool,
    weighted: bool,
) -> Gram | None:  # fmt: skip
    """Return ``AᴴWA`` (``swapped``: ``AWAᴴ``) as one simplified program, None where nothing is simplified or equal."""
    served = mode == "lowered" or options.for_gram
    if not options.lowering or not served or spaces[0].is_sharded or graphs.value is not None:
        return None  # at a point, the two maps share what is computed once
    names = ("adjoint", "linear") if swapped else ("linear", "adjoint")
    first, second = (graphs.linear if name == "linear" else graphs.adjoint.graph for name in names)
    count = len(first.inputs)
    whole = compose.gram(first, second, weighted=weighted)
    graph, said = simplified(whole, (*RULES, *gram_indices.RULES, *gram_real.RULES), count)
    graph = own_outputs(graph)
    if said or options.for_gram:
        has_kernels = any("convolution" in op_name(node.target) for node in graph.body.nodes)
        lowered = program_of(graph, options=options, mode="lowered").graph if said or has_kernels else graph
    else:
        kernels = (derivation.programs[name][0].graph for name in names)
        lowered = compose.gram(*kernels, weighted=weighted)
    lowered, more = simplified(lowered, gram_kernels.RULES, count)
    if not said and not more:
        return None
    program = Program(lowered, whole)

    def parts(leaves: Tensors) -> Tensors:
        images = derivation.function(names[0])(leaves[:count])
        weighed = tuple(w * r for w, r in zip(leaves[count:], images, strict=True)) if weighted else images
        return derivation.function(names[1])(weighed)

    return Gram(program, (*said, *more)) if spaces[0].every(_is_equal(program, graph, parts)) else None


def multiplier(
    derivation: Derivation, graphs: Graphs, domain: Space, options: Options, mode: str
) -> Callable[[Tensors], Tensor | None]:
    """Return the function of the state to what the adjoint multiplies spectra with, if that is all that it does."""

    @functools.cache
    def find() -> Callable[..., Any] | None:
        if not options.lowering or mode not in {"lowered", "compiled"} or domain.is_sharded:
            return None
        adjoint, forward = (
            convolutions.lower(fuse_slices(graph), transformed) for graph in (graphs.adjoint.graph, graphs.linear)
        )
        node = convolutions.multiplier(adjoint)
        if node is None or convolutions.multiplier(forward) is None:
            return None
        program = Program(adjoint, graphs.adjoint.graph)
        is_equal = _is_equal(program, adjoint, derivation.function("adjoint"))
        return value_of_state(adjoint, node) if is_equal else None

    def multiplier(state: Tensors) -> Tensor | None:
        found = find()
        return None if found is None else found(*state)[0]

    return multiplier
