"""All that a function depends on besides its argument: the tensors of its *state*, and *guards* on the rest.

PyTorch's own front end comes first. It reads the function's code, so that it knows every tensor, attribute, global and
container that the function reads, and says in a microsecond or two whether one of them has changed. Where it refuses
(sparse tensors, numbers read from tensors, code that it does not know), the function is run on tensors without values.
Then less is known: tensors are read afresh from the modules that hold them, and of Python state only what these modules
hold is watched.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adjointlab import compat
from adjointlab.modules import Source, Watch, attributes_kept, sources_named, sources_of
from adjointlab.space import Space, TensorSpec
from adjointlab.space.selection import Selection
from adjointlab.transpose.frontend.selected import Selected
from adjointlab.transpose.frontend.vjp import PullBack, Tensors, applied, first_line, flatten_outputs
from adjointlab.tree import tree_flatten


@dataclass(frozen=True)
class Capture:
    """A function of leaves that can be traced, with its state and its guards."""

    function: Callable[[Tensors, Tensors], Tensors]  # (values of the state, leaves) → leaves
    specs: tuple[TensorSpec, ...]  # of the leaves
    state: tuple[Source, ...]  # the tensors that it is known to read; others show while it is traced
    sources: dict[int, Source]  # where tensors that show later are read from, by their ids
    holds: Callable[[], bool]  # whether all that it depends on, besides values of the state, is as it was
    partly: str = ""  # why PyTorch's front end refused it, so that Python state is watched in part only
    is_stateful: Callable[[], bool] = lambda: False  # whether each call changes what the next one depends on
    point: tuple[Source, ...] = ()  # where the function is linearized, if its pull-back is what is asked for
    selections: tuple[Selection, ...] = ()  # of the result, one after the other, if rows of it are what is asked for


def _flat(*leaves: Tensor) -> Tensors:
    # Its globals are its own: what it calls is found there by torch.compile, and by no one else. Of leaves it sees
    # views, which may be written to in place, and are no attributes of an argument to be guarded.
    x = unflatten([leaf.view_as(leaf) for leaf in leaves])  # type: ignore[name-defined] # noqa: F821
    output = function(*x, **kwargs) if type(x) is tuple else function(x, **kwargs)  # type: ignore[name-defined] # noqa: F821
    return (output,) if isinstance(output, Tensor) else tuple(tree_flatten(output)[0])


def capture(
    function: Callable[..., Any], kwargs: dict[str, Any], domain: Space, modules: tuple[nn.Module, ...],
    call: Callable[[], Any] = lambda: None,
) -> Capture:  # fmt: skip
    """Find all that a function on a domain depends on; ``call`` runs it once for real, as PyTorch's front end does."""
    if isinstance(function, PullBack):
        return replace(
            capture(function.function, function.kwargs, function.domain, modules, call), point=function.sources
        )
    if isinstance(function, Selected):
        whole = capture(function.__wrapped__, kwargs, domain, modules, call)
        return replace(whole, selections=(*whole.selections, function.selection))
    try:
        with attributes_kept(modules):
            captured = _by_compiler(function, kwargs, domain)
            is_stateful = not captured.holds() and _changes(modules, call)
        if captured.holds():
            return replace(captured, is_stateful=lambda: is_stateful)
        reason, is_stateful = "a call changes what the next one does", True
    except compat.RefusedError as error:
        reason, is_stateful = str(error), False
    # PyTorch's front end may raise anything on code that it does not know; the function has run before, and is fine.
    except Exception as error:
        reason, is_stateful = f"{type(error).__name__}: {first_line(error)}", False

    def run(_: Tensors, leaves: Tensors) -> Tensors:
        x = domain.unflatten([leaf.view_as(leaf) for leaf in leaves])
        return flatten_outputs(applied(function, x, kwargs))[0]

    def changes() -> bool:  # for what can be traced only: code that cannot may take long
        with attributes_kept(modules):
            return is_stateful or (_changes(modules, call) and _changes(modules, call))

    sources = {**sources_named(function), **sources_of(modules)}
    return Capture(run, domain.specs, (), sources, Watch(modules, function).holds, reason, changes)


def _changes(modules: tuple[nn.Module, ...], call: Callable[[], Any]) -> bool:
    """Return whether a call changes what modules hold: the first may, to fill a cache, where the second does not."""
    watch = Watch(modules)
    call()
    return not watch.holds()


def _by_compiler(function: Callable[..., Any], kwargs: dict[str, Any], domain: Space) -> Capture:
    if domain.is_sharded or not compat.plain():
        raise compat.RefusedError(
            "communication is traced as it runs" if domain.is_sharded else "a transform is under way"
        )
    scope = {
        "__builtins__": __builtins__, "Tensor": Tensor, "function": function, "kwargs": kwargs,
        "tree_flatten": tree_flatten, "unflatten": domain.unflatten,
    }  # fmt: skip
    flat = types.FunctionType(_flat.__code__.replace(co_name="captured"), scope, "captured")
    examples = [torch.zeros(s.shape, dtype=s.dtype, device=s.device).requires_grad_() for s in domain.specs]
    found = compat.captured(flat, examples, scope)
    state = tuple(Source(reader, _name(reader.__name__, function)) for reader in found.readers if callable(reader))

    def run(values: Tensors, leaves: Tensors) -> Tensors:
        rest = iter(values)
        inputs = [next(rest) if callable(reader) else leaves[reader] for reader in found.readers]
        outputs = found.module(*inputs)
        return tuple(outputs[i] if i >= 0 else inputs[-1 - i] for i in found.results)

    return Capture(run, domain.specs, state, {}, found.holds)


def _name(expression: str, function: Callable[..., Any]) -> str:
    """Return the name of a tensor as a person would write it: ``0.weight`` of a module's first part, say."""
    for index, name in enumerate(getattr(getattr(function, "__code__", None), "co_freevars", ())):
        expression = expression.replace(f"G['function'].__closure__[{index}].cell_contents", name)
    expression = re.sub(r"_(parameters|buffers|modules)\['(\w+)'\]", r"\2", expression)
    return re.sub(r"^G\['\w+'\]", "", expression).strip(".") or "a tensor"
