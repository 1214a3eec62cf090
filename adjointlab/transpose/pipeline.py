"""The whole way from a function to its adjoint, on one screen.

1. *capture*: what the function depends on (``frontend/capture``).
2. *trace*: its forward as a graph, then the vector-Jacobian product of that (``frontend/trace``).
3. *passes*: the plain form, outputs of their own, the forward dropped (``passes/``).
4. *judge*: what still reads the input, and what hides it.
5. *passes*: slices fused, a kernel chosen for each convolution (``lowered``).
6. *programs*: constants, prepacked state, the rest; A and Aᴴ as each other's derivative (``runtime/``).
7. *self-check*: the first that holds of compiled, lowered, plain, eager (``selfcheck``).

The eighth step, the way of every call, is ``dispatch``.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from adjointlab.errors import NotDifferentiableError
from adjointlab.linked import Linked
from adjointlab.progress import step
from adjointlab.space import Space
from adjointlab.transpose import lowered, selfcheck
from adjointlab.transpose.explanation import Account, Explanation
from adjointlab.transpose.frontend.capture import Capture
from adjointlab.transpose.frontend.trace import hides, trace_forward, trace_pull_back, trace_vjp
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import CHECKS
from adjointlab.transpose.lowered import Compiled, Graphs
from adjointlab.transpose.options import Options
from adjointlab.transpose.passes.at_point import at_point
from adjointlab.transpose.passes.compose import adds_state, linear_part
from adjointlab.transpose.passes.drop_forward import Adjoint, choices_named, cut_off, drop_forward, ops
from adjointlab.transpose.passes.normalise import normalise
from adjointlab.transpose.passes.own_outputs import own_outputs
from adjointlab.transpose.passes.restrict import restrict
from adjointlab.transpose.runtime import autodiff
from adjointlab.transpose.runtime.derivation import Derivation, metadata_of
from adjointlab.transpose.runtime.eager import Eager
from adjointlab.transpose.runtime.program import Program, Residuals, of_storage
from adjointlab.transpose.selfcheck import Candidate, Sketch


def graphs_of(captured: Capture, domain: Space, options: Options) -> Graphs:
    """Return the graphs of a function that was captured: steps 2 to 4."""
    n = len(domain.specs)
    traced = trace_forward(captured, options.seconds)
    plain, whole = normalise(traced, detached=options.derivative != "forward"), tuple[str, ...]()
    for selection in captured.selections:
        plain, found = restrict(plain, selection)
        whole = tuple(dict.fromkeys((*whole, *found)))
    forward, value = own_outputs(plain), None
    if captured.point:
        pull_back = normalise(trace_pull_back(forward, captured.point, options.seconds), detached=False)
        forward, value = own_outputs(pull_back), forward
    linear = linear_part(forward) if options.affine else forward

    def adjoint_of(graph: Graph) -> Adjoint:
        traced = trace_vjp(graph, options.seconds, apart=captured.point)  # of which gradients are of the second order
        found = drop_forward(normalise(traced, detached=False), n)
        of_state = None if found.of_state is None else own_outputs(found.of_state)
        return replace(found, graph=own_outputs(found.graph), of_state=of_state)

    adjoint = adjoint_of(linear)
    apart = linear is not forward and adjoint.of_state is not None
    of_state = adjoint_of(forward).of_state if apart else adjoint.of_state
    explanation = Explanation(
        "traced", options.requested, readers=choices_named(adjoint.readers, forward), ops_before=adjoint.ops_before,
        cut=cut_off(forward), whole=whole, hidden=hides(captured), partly=captured.partly,
    )  # fmt: skip
    has_checks = any(node.target in CHECKS for node in traced.body.nodes)
    return Graphs(forward, linear, adjoint, of_state, captured.holds, explanation, value, has_checks)


def derive(graphs: Graphs, eager: Eager, spaces: tuple[Space, Space], options: Options, seen: Sketch | None,
           compiled: Compiled | None = None) -> Derivation:  # fmt: skip
    """Return the fastest programs of some graphs that pass the self-check, or the eager functions: steps 5 to 7.

    ``seen`` is what the function made of a random x, None where nothing is to be checked; ``compiled`` returns
    functions of leaves that are compiled for all sizes at once, where sizes are free.
    """
    reasons: list[str] = []
    explanation = graphs.explanation
    for mode in options.modes:
        step(0)
        derivation = assemble(graphs, spaces, options, mode, explanation, compiled)
        if seen is None:
            return derivation
        function, linear, adjoint = map(derivation.function, ("function", "linear", "adjoint"))
        candidate = Candidate(function, linear, adjoint, *spaces)
        said = selfcheck.disagreement(
            candidate, seen, eager.called, affine=options.affine, compiled=mode == "compiled", tol=options.tol
        )
        if not said and explanation.hidden:
            if graphs.value is None:
                said, explanation = _against_autograd(candidate, derivation, eager, options)
            else:  # of a pull-back, which was compared with autograd's own
                said = _of_gradients(candidate, derivation, eager)
        if not said:
            gap = explanation.autograd_gap
            found = replace(derivation.explanation, reason="; ".join(reasons), autograd_gap=gap)
            return replace(derivation, explanation=found, checked=True)
        reasons.append(f"{mode}: {said}")
    return eager_derivation(eager, options, "; ".join(reasons), explanation)


def _against_autograd(
    candidate: Candidate, derivation: Derivation, eager: Eager, options: Options
) -> tuple[str, Explanation]:
    """Return how a derivation that passed differs from autograd's, where the function has a derivative of its own."""
    explanation = derivation.explanation
    try:
        gap, agree = selfcheck.autograd_gap(candidate, eager.adjoint)
    except NotDifferentiableError as error:
        said = "" if options.derivative == "forward" else str(error)
        return ("" if candidate.domain.every(not said) else said or "it is so on another process"), explanation
    explanation = replace(explanation, autograd_gap=None if candidate.domain.every(agree) else gap)
    if options.derivative == "forward":
        return "", explanation
    if not candidate.domain.every(agree):
        return f"autograd's own adjoint differs from that of the forward's operations by {gap:.1e}", explanation
    return _of_gradients(candidate, derivation, eager), explanation


def _of_gradients(candidate: Candidate, derivation: Derivation, eager: Eager) -> str:
    """Return how gradients in the state differ from autograd's own, or nothing where they do not."""
    wanted = [(source.name, tensor) for source in derivation.state if (tensor := source.read()).requires_grad]
    said = selfcheck.gradient_disagreement(candidate, eager.flat, wanted) if wanted else ""
    return "" if candidate.domain.every(not said) else said or "gradients differ on another process"


def eager_derivation(eager: Eager, options: Options, reason: str, known: Explanation | None = None) -> Derivation:
    """Return the user's function and its eager adjoint, for a reason; ``known`` is what its graphs say of it."""
    explanation = replace(
        known or Explanation("eager", options.requested), engine="eager", reason=reason, ops_before=Counter(),
        ops_after=Counter(), programs=None, partly="",
    )  # fmt: skip

    def functions(eager: Eager) -> dict[str, Linked]:
        linear = eager.linear if options.affine else eager.flat
        back = Linked(eager.adjoint, lambda x: forth(x))  # noqa: PLW0108  # the two refer to each other
        forth = Linked(linear, back)
        return {"function": Linked(eager.flat, back), "linear": forth, "adjoint": back}

    return Derivation(explanation, functions(eager), user=eager, functions=functions)


def assemble(
    graphs: Graphs, spaces: tuple[Space, Space], options: Options, mode: str, explanation: Explanation,
    compiled: Compiled | None = None,
) -> Derivation:  # fmt: skip
    """Return the programs of some graphs, run in one of the modes, as they are before the self-check."""
    program = functools.partial(lowered.program_of, options=options, mode=mode)
    forward, state, n = graphs.forward, graphs.forward.state, len(graphs.forward.state)
    programs, residuals = _programs(graphs, program)
    if mode == "compiled":
        for name, each in programs.items() if compiled is not None else ():
            each.replace(compiled()[name], n)  # type: ignore[misc]
        for each in set(programs.values()) if compiled is None else ():
            each.compile(options.options)
    of_linear, of_function = (None if g is None else program(g) for g in (graphs.adjoint.of_state, graphs.of_state))
    run_linear, run_adjoint = autodiff.pair(programs["linear"], programs["adjoint"], n, of_linear)
    run = run_linear
    if graphs.linear is not graphs.forward:
        run = autodiff.affine(programs["function"], run_linear, run_adjoint, programs["adjoint"].whole, n, of_function)
    linked = {"function": run, "linear": run_linear, "adjoint": run_adjoint}
    is_lowered = options.lowering and mode != "plain"
    of_a, of_adjoint = (Account(programs[k].graph, is_lowered, programs[k].kept) for k in ("linear", "adjoint"))
    explanation = replace(
        explanation, engine="compiled" if mode == "compiled" else "traced", ops_after=ops(of_adjoint.graph),
        programs=(of_a, of_adjoint),
    )  # fmt: skip
    way = "" if compiled is not None else mode  # what is compiled for all sizes has no graph of one size
    derivation = Derivation(
        explanation, {}, {name: (programs[name], linked[name]) for name in programs}, graphs.holds, state,
        tuple(metadata_of(source.read()) for source in state), graphs.forward.specialized, graphs.mapping(),
        of_storage=any(map(of_storage, graphs.mapping().values())),
        is_doubtful=bool(graphs.adjoint.readers) or (residuals is None and not options.affine and adds_state(forward)),
        residuals=residuals, has_checks=graphs.has_checks,
    )  # fmt: skip
    return replace(
        derivation,
        gradient=lowered.once(functools.partial(lowered.gradient, derivation, graphs, spaces[0], options, way)),
        gram=lowered.once(functools.partial(lowered.gram, derivation, graphs, spaces, options, way)),
        in_sweeps=lowered.once(functools.partial(lowered.in_sweeps, derivation, graphs, options, mode)),
        multiplier=lowered.multiplier(derivation, graphs, spaces[0], options, way),
    )


def _programs(graphs: Graphs, program: Callable[..., Program]) -> tuple[dict[str, Program], Residuals | None]:
    """Return the programs of what can be called, by name, and what those at a point have in common."""
    forward, adjoint = graphs.forward, graphs.adjoint.graph
    rest, residuals = (forward, adjoint), None
    if graphs.value is not None:
        parts = at_point(graphs.value, forward, adjoint)
        rest = parts.rest
        residuals = Residuals(program(parts.once), forward.state, len(graphs.value.outputs), graphs.value)
    function = program(rest[0], forward, residuals)
    linear = function if graphs.linear is forward else program(graphs.linear)
    return {"function": function, "adjoint": program(rest[1], adjoint, residuals), "linear": linear}, residuals
