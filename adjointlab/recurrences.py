"""Recurrences: ``u_{t+1}, o_t = S(u_t, i_t)`` for t = 0, …, T − 1, whose adjoint runs backwards in time."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adjointlab.compat import pytree
from adjointlab.derive import modules_named, require_linear
from adjointlab.errors import NotDifferentiableError, NotLinearError, SpaceMismatchError
from adjointlab.linearity import like_parameters, require_map
from adjointlab.modules import Entries, buffers_kept
from adjointlab.notation import Notation, name_of, outline
from adjointlab.numerics import UNITS, allowance, eps_of, norm
from adjointlab.operators import LinearOperator, derived
from adjointlab.slots import Slots
from adjointlab.space import Space
from adjointlab.space.algebra import require_whole
from adjointlab.space.codomain import space_of
from adjointlab.space.spec import describe
from adjointlab.transpose import Eager, Options, Transposition
from adjointlab.transpose.loop import Loop
from adjointlab.tree import SINGLE, Structure, tree_flatten
from adjointlab.weighted import in_spaces


def recurrence(
    step: Callable[..., Any],
    state: Any,
    *,
    steps: int | None = None,
    inputs: Any = None,
    outputs: bool | None = None,
    xs: Any = None,
    initial: bool | None = None,
    learn_initial: bool | None = None,
    final: bool | None = None,
    inverse: Callable[..., Any] | None = None,
    batch_dims: int = 0,
    engine: str = "auto",
    check: bool = True,
) -> LinearOperator[Any, Any]:
    r"""Return the operator of ``u_{t+1}, o_t = S(u_t, i_t)`` for t = 0, …, T − 1; its adjoint runs backwards in time.

    ``(λ_t, ī_t) = Sᴴ(λ_{t+1}, ō_t)`` for t = T − 1, …, 0: neither A nor ``A.H`` stores a state. The step is derived and
    checked once. Gradients in its parameters take two sweeps, with the states of ``2√T`` steps in memory.

    Parameters
    ----------
    step : nn.Module or callable
        The linear step S, from a state, and an input if there are any, to a state, or to a pair of state and output.
        Each of them is a tensor or a pytree of tensors.
    state : Tensor, tuple of int, TensorSpec, Space or pytree of these
        An example of the state ``u₀``, or its shape. A space may have a weight; so may that of the inputs.
    steps : int, optional
        The number of steps T, which may be left out where ``inputs`` or ``xs`` show it.
    inputs : Tensor, tuple of int, TensorSpec, Space or pytree of these, optional
        An example of the inputs of all steps, or its shape: T entries ``i_t`` in the first dimension of each leaf.
    outputs : bool, optional
        Whether the operator returns what each step returns beside the state, stacked as inputs are; by default, it does
        where there is something to return.
    xs : pytree of tensors, optional
        T entries ``x_t`` in the first dimension of each leaf, as further arguments of the steps that are no part of the
        domain: ``step(u, i, x)``. Steps are linear in u and i for each of them.
    initial : bool, optional
        Whether the initial state is a part of the domain: that is then pairs ``(state, inputs)``. By default, it is
        where there are no inputs, and the state is zero at first where there are.
    learn_initial : bool, optional
        Another name of ``initial``, for problems in which the initial state is sought.
    final : bool, optional
        Whether the final state is a part of the codomain: that is then pairs ``(state, outputs)``. By default, it is
        where there are no outputs.
    inverse : callable, optional
        The step undone: it returns ``u_t`` of ``u_{t+1}`` and of what else the step is given, ``inverse(u, i, x)``.
        Gradients in the step's parameters then compute the states from the last one backwards, and keep that and one to
        compare with. Rounding grows on the way: that states come back, to half of the digits of the largest one, is
        checked at each of these gradients.
    batch_dims : int
        The first ``batch_dims`` dimensions of every leaf may change size from call to call. Times are counted by the
        dimension after them.
    engine : {"auto", "eager", "traced", "compiled"}
        How the step runs, as in :func:`adjointlab.linear_operator`.
    check : bool
        Whether to check that the step is linear, and that its derived adjoint is its own.

    Returns
    -------
    LinearOperator
        From initial state, inputs, or both, to final state, outputs, or both.

    Raises
    ------
    NotLinearError
        If the step is not linear.
    NotDifferentiableError
        If autograd's derivative of the step is not the step's own, or the inverse does not undo the step.
    SpaceMismatchError
        If the step returns no state like the one it is given, the numbers of steps differ, or there is nothing in the
        domain or codomain.

    Examples
    --------
    >>> import torch
    >>> A = recurrence(lambda u, i: (0.5 * u + i, u), torch.zeros(()), inputs=(4,))
    >>> A(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    tensor([0.0000, 1.0000, 0.5000, 0.2500])
    >>> A.H(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    tensor([0.2500, 0.5000, 1.0000, 0.0000])
    """
    require_map(step)
    if learn_initial is not None:
        if initial is not None:
            raise SpaceMismatchError("expected one of initial and learn_initial, got both: they are the same")
        initial = learn_initial
    series, structure = tree_flatten(xs) if xs is not None else ([], SINGLE)
    _require_series(series)
    _require_arguments(step, ["u", *(["i"] if inputs is not None else []), *(["x"] if series else [])])
    where = like_parameters(step, state, batch_dims)
    given = None if inputs is None else like_parameters(step, inputs, batch_dims)
    for space in (where, *([] if given is None else [given])):
        require_whole(space, "al.recurrence")
    if given is not None and initial is None:
        _require_zero(state)
    choices = {"outputs": outputs, "final": final, "initial": given is None if initial is None else initial}
    count = _count(steps, given, series)
    return _built(_Plan(step, where, given, count, series, structure, choices, engine, check, inverse))


@dataclass(frozen=True, eq=False)
class _Plan:
    """The parts of a recurrence: the step, its state, the inputs of all steps, and the series that it reads."""

    step: Callable[..., Any]
    state: Space
    inputs: Space | None
    steps: int
    series: list[Tensor]
    structure: Structure
    choices: dict[str, bool | None]
    engine: str
    check: bool
    inverse: Callable[..., Any] | None

    def again(self, loop: Loop) -> tuple[Any, ...]:
        """Return a function and its arguments that make the same operator, with its spaces and series of now."""
        n, specs, entries = len(self.state.specs), loop.source.domain.specs, loop.series.leaves()
        state = replace(self.state.plain, specs=specs[:n])
        inputs = None if self.inputs is None else _stacked(replace(_entry(self.inputs), specs=specs[n:]), self.steps)
        xs = self.structure.unflatten(entries) if entries else None
        options = {"batch_dims": self.state.batch_dims, "engine": loop.source.options.requested, "check": self.check}
        options |= {"steps": self.steps, "inverse": self.inverse, **self.choices}
        return _rebuild, (self.step, state, inputs, xs, options)


def _built(plan: _Plan) -> LinearOperator[Any, Any]:
    """Return the operator of a plan: the step is derived here."""
    k, parts = plan.state.batch_dims, (plan.state.plain, *([] if plan.inputs is None else [_entry(plan.inputs)]))
    slots, entries = Slots(plan.step, plan.series, plan.structure), Entries(plan.series)
    function, has_outputs = _arranged(
        slots if plan.series else plan.step, plan.state, Space.of(parts, batch_dims=k), plan.choices["outputs"]
    )
    source = Transposition(
        function, Space.of(parts, batch_dims=k), options=Options(plan.engine, check=plan.check), judge=require_linear
    )
    outputs = None
    if has_outputs:
        outputs = _stacked(Space.of(source.codomain.unflatten(source.codomain.specs)[1], batch_dims=k), plan.steps)
    initial, final = bool(plan.choices["initial"]), plan.choices["final"]
    final = not has_outputs if final is None else final
    domain = _pair(plan.state if initial else None, plan.inputs, "domain", "initial=True, or inputs")
    codomain = _pair(
        plan.state if final else None, outputs, "codomain", "final=True, or a step that returns u and an output"
    )
    loop = Loop(source, plan.steps, len(plan.state.specs), slots, entries, initial=initial, final=final)
    if plan.check and (said := loop.differs()):
        raise NotLinearError(f"expected a step that is linear for each x of xs, but {said}")
    sources = [(plan.step, source)]  # a step may be its own inverse
    if plan.inverse is not None:
        loop.inverse = _inverse(plan, entries, source)
        _require_inverse(loop, plan.check)
        sources.append((plan.inverse, loop.inverse.source))
    of_steps = []
    for i, (function, each) in enumerate(sources):
        recipe = functools.partial(_recipe_of_part, lambda: whole, i)
        notation = Notation(meaning=name_of(function))
        of_steps.append(LinearOperator.of_source(each, recipe, modules_named(each), notation=notation))
    whole: LinearOperator[Any, Any] = derived(
        lambda x: codomain.unflatten(loop(_leaves(domain, x), loop.forwards)),
        lambda v: domain.unflatten(loop(_leaves(codomain, v), loop.backwards)),
        domain.plain, codomain.plain, lambda: plan.again(loop), *of_steps, *([entries] if plan.series else []),
        notation=Notation(f"recurrence({{}}, steps={plan.steps})"),
    )  # fmt: skip
    return in_spaces(whole, domain, codomain)


def _leaves(space: Space, x: Any) -> tuple[Tensor, ...]:
    """Return the leaves of an element that was checked."""
    return tuple(space.structure.leaves(x) or ())


def _rebuild(step: Any, state: Space, inputs: Space | None, xs: Any, options: dict[str, Any]) -> LinearOperator:
    return recurrence(step, state, inputs=inputs, xs=xs, **options)


def _recipe_of_part(whole: Callable[[], LinearOperator], index: int) -> tuple[Any, ...]:
    return _part_of, (whole(), index)


def _part_of(operator: LinearOperator, index: int) -> LinearOperator:
    return operator.parts[index]


def _inverse(plan: _Plan, entries: Entries, step: Transposition) -> Loop:
    """Return the inverse of the step as a loop of its own, of which the steps forwards are those back in time."""
    slots = Slots(plan.inverse, plan.series, plan.structure)  # type: ignore[arg-type]
    function, _ = _arranged(slots if plan.series else plan.inverse, plan.state, step.domain, outputs=False)
    source = Transposition(function, step.domain, options=step.options, judge=require_linear)
    return Loop(source, plan.steps, len(plan.state.specs), slots, entries, initial=True, final=True)


@torch.no_grad()
def _require_inverse(loop: Loop, check: bool) -> None:
    """Raise if an inverse does not undo the step, in the first, the last and one step between them."""
    domain, n = loop.source.domain, loop.count
    assert loop.inverse is not None
    (run, state), (back, own) = (each.run(domain.batch_shape) for each in (loop, loop.inverse))
    if not run.derivation.programs or not back.derivation.programs:
        raise NotDifferentiableError(
            "expected a step and an inverse that can be traced, as gradients by the inverse go through both programs, "
            "got one that is left to autograd: leave inverse= out; explain() of the operator without it says why"
        )
    x = domain.leaves(domain.randn(torch.Generator().manual_seed(0)))
    for t in sorted({0, loop.steps // 2, loop.steps - 1}) if check and loop.steps else ():
        moved = run.at_times(loop.series.leaves(), 0, range(t, t + 1))[0]
        u = run.tracked("function", state, moved, x)[:n]
        found = back.tracked("function", own, moved, (*u, *x[n:]))
        gap = norm(tuple(a - b for a, b in zip(found, x[:n], strict=True))) / norm(x[:n])
        if not gap <= allowance(UNITS, eps_of(x)):
            raise NotDifferentiableError(
                f"expected an inverse that undoes the step to rounding, but at step {t} the state that it returns is "
                f"off by {gap:.1e} of its norm: it has to return u of the next state and what else the step is given"
            )


# -- what is given ----------------------------------------------------------------------------------------------------


def _require_series(series: list[Any]) -> None:
    for leaf in series:
        if not isinstance(leaf, Tensor) or not leaf.ndim or not len(leaf):
            raise SpaceMismatchError(
                f"expected xs to be tensors with an entry for each step in the first dimension, got {describe(leaf)}: "
                "what is the same at all steps, the step can read by itself"
            )


def _require_arguments(step: Any, given: list[str]) -> None:
    """Raise where a step does not take the arguments that it will be given, as far as its signature tells."""
    try:
        signature = inspect.signature(step.forward if isinstance(step, nn.Module) else step)
    except (TypeError, ValueError):  # a builtin has none
        return
    try:
        signature.bind(*given)
    except TypeError as error:
        raise SpaceMismatchError(
            f"expected a step that takes ({', '.join(given)}), but its signature says {error}: inputs= adds one "
            "with an entry for each step, and xs= another for what changes from step to step"
        ) from error


def _count(steps: Any, inputs: Space | None, series: list[Tensor]) -> int:
    """Return the number of steps, on which all that is given has to agree."""
    k = inputs.batch_dims if inputs is not None else 0
    if inputs is not None and any(len(spec.shape) <= k for spec in inputs.specs):
        raise SpaceMismatchError(
            f"expected inputs with an entry for each step in dimension {k} of each leaf, got {inputs}: stack them there"
        )
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 0):
        raise SpaceMismatchError(f"expected steps to be an integer of 0 or more, got {steps!r}")
    shown = [] if inputs is None else [("inputs", spec.shape[k]) for spec in inputs.specs]
    shown += [("xs", len(leaf)) for leaf in series] + ([] if steps is None else [("steps", steps)])
    if not shown:
        raise SpaceMismatchError(
            "expected the number of steps, got none: pass steps=, or inputs with an entry for each"
        )
    if len({number for _, number in shown}) > 1:
        said = ", ".join(f"{number} in {name}" for name, number in shown)
        raise SpaceMismatchError(f"expected one number of steps, got {said}: give each an entry for each step")
    return shown[0][1]


def _require_zero(state: Any) -> None:
    """Raise where an initial state is given whose values would be ignored."""
    if any(isinstance(leaf, Tensor) and bool(leaf.detach().any()) for leaf in tree_flatten(state)[0]):
        raise SpaceMismatchError(
            "expected a state of zeros beside inputs, got one with other values, which the operator would ignore: pass "
            "initial=True to have the initial state in the domain, or initial=False, or a state of zeros"
        )


def _entry(stacked: Space) -> Space:
    """Return the space of what is given at one step, without a weight."""
    k = stacked.batch_dims
    specs = tuple([replace(s, shape=(*s.shape[:k], *s.shape[k + 1 :])) for s in stacked.specs])
    return replace(stacked, specs=specs, weight=None)


def _stacked(space: Space, steps: int) -> Space:
    """Return the space of an element for each step: the inverse of :func:`_entry`."""
    k = space.batch_dims
    return replace(space, specs=tuple([replace(s, shape=(*s.shape[:k], steps, *s.shape[k:])) for s in space.specs]))


def _pair(state: Space | None, rest: Space | None, name: str, remedy: str) -> Space:
    found = [space for space in (state, rest) if space is not None]
    if not found:
        raise SpaceMismatchError(f"expected something in the {name} of a recurrence, got nothing: choose {remedy}")
    return found[0] if len(found) == 1 else Space.of(tuple(found), batch_dims=found[0].batch_dims)


# -- the step ---------------------------------------------------------------------------------------------------------


def _arranged(step: Any, state: Space, domain: Space, outputs: bool | None) -> tuple[Callable[..., Any], bool]:
    """Return the step as a function to ``(state, output)``, or to a state alone, and whether it has outputs."""
    eager = Eager(step, {}, domain)
    x = domain.randn(torch.Generator().manual_seed(0))
    with domain.without_autocast(), buffers_kept(eager.modules):
        found = eager.called(domain.leaves(x))
    result = (eager.structure or SINGLE).unflatten(found)
    is_alone = _order(result, state) is not None
    is_pair = not is_alone and isinstance(result, tuple) and len(result) == 2
    order = _order(result[0] if is_pair else result, state)
    if order is None:
        raise SpaceMismatchError(
            f"expected the step to return a state in {state}, as the one that it is given, or a pair of state and "
            f"output, got {outline(space_of(found, eager.structure, domain, None))}: return the next state first"
        )
    has_outputs = is_pair and bool(tree_flatten(result[1])[0])
    if outputs and not has_outputs:
        raise SpaceMismatchError(
            "expected the step to return a pair of state and output, got a state alone: return u, o"
        )
    if (is_alone or (has_outputs and outputs is not False)) and order == sorted(order):
        return step, has_outputs
    is_kept = has_outputs and outputs is not False

    def arranged(*given: Any) -> Any:
        found = step(*given)
        u = found[0] if is_pair else found
        if order != sorted(order):
            leaves = pytree.tree_leaves(u)
            u = pytree.tree_unflatten([leaves[i] for i in order], state.structure.spec)
        return (u, found[1]) if is_kept else u

    return arranged, is_kept


def _order(element: Any, space: Space) -> list[int] | None:
    """Return where the leaves of an element of a space are among its own; None for what is none of the space."""
    try:
        space.check(element)
    except SpaceMismatchError:
        return None
    leaves, structure = tree_flatten(element)
    return space.structure.leaves(structure.unflatten(range(len(leaves))))
