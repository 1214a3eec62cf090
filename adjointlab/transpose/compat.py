"""PyTorch's private interfaces, all in one place, each with what is done where a version of torch lacks it."""

from __future__ import annotations

import contextlib
import linecache
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._python_dispatch import _disable_current_modes

# -- where the code at hand runs --------------------------------------------------------------------------------------


def plain() -> bool:
    """Return whether code runs eagerly on real tensors: no transform, no tracing, no compilation is under way."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_transformed() -> bool:
    """Return whether a transform of ``torch.func`` is under way."""
    return torch._C._are_functorch_transforms_active()


def is_dispatched() -> bool:
    """Return whether a ``TorchDispatchMode`` is under way, under which no value of a tensor can be asked for."""
    return torch._C._len_torch_dispatch_stack() > 0


def is_forward_mode() -> bool:
    """Return whether forward-mode differentiation is under way."""
    return forward_ad._current_level >= 0


def is_nested_forward_mode() -> bool:
    """Return whether one ``torch.func.jvp`` runs inside of another."""
    if not torch._C._are_functorch_transforms_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1


def is_wrapped(tensor: Tensor) -> bool:
    """Return whether a tensor stands for another inside of a transform of ``torch.func``."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def differentiated(tensors: Sequence[Tensor]) -> bool:
    """Return whether derivatives through a function of ``tensors`` may be asked for."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# -- torch.compile's front end ----------------------------------------------------------------------------------------

# Guards on how the call is made, not on what the function depends on: the caller sees to these. A tensor of the state
# is compared by the caller too, who has to read it anyway.
_OF_THE_CALL = frozenset({
    "AUTOGRAD_SAVED_TENSORS_HOOKS", "DEFAULT_DEVICE", "DETERMINISTIC_ALGORITHMS", "FSDP_TRAINING_STATE",
    "FUNCTORCH_STACK_MATCH", "GLOBAL_STATE", "GRAD_MODE", "SHAPE_ENV", "TENSOR_MATCH", "TORCH_FUNCTION_STATE",
})  # fmt: skip


_LOGS = ("torch._subclasses.fake_tensor", "torch._guards", "torch._dynamo")


class RefusedError(Exception):
    """PyTorch's front end has no graph of a function; the message is its reason."""


def captured(
    function: Any, arguments: Sequence[Tensor], scope: dict[str, Any]
) -> tuple[Any, list[Callable[[], Any]], Sequence[Any], Callable[[], bool]]:
    """Return what ``torch.compile`` makes of a function of tensors, as one graph.

    Parameters
    ----------
    function : function
        With ``scope`` as its globals, and a code object of its own: its compiled forms are kept with that.
    arguments : sequence of Tensor
        What it is called with.
    scope : dict
        Its globals.

    Returns
    -------
    tuple
        The graph module; for each of its inputs a function that reads it, or the number of the argument; for each
        result of the function the number of an output or, counted from −1 down, of an input of the graph; and
        a function that says whether all that the graph has built in is as it was.
    """
    found: dict[str, Any] = {}

    def backend(module: Any, _: Any) -> Callable[..., Any]:
        context = torch._guards.TracingContext.get()
        guards = context.guards_context.dynamo_guards
        kept = type(guards.inner)(g for g in guards.inner if g.create_fn_name() not in _OF_THE_CALL)
        guards.inner = kept
        # To check the guards and to time that, which flushes the caches of the processor, is left out.
        dynamo.symbolic_convert.InstructionTranslator.current_tx().output.skip_guards_check = True
        found.update(module=module, mode=context.fake_mode, names=[guard.name for guard in kept])

        def run(*given: Any) -> Any:  # for real: what a forward keeps for later, as it may, are tensors with values
            with torch.no_grad():
                outputs = module(*given)
            found.update(inputs=given, outputs=outputs)
            return outputs

        return run

    compile_, dynamo = torch.compile, cast(Any, torch._dynamo)
    # Hooks on the parts of a module are guarded too, which torch.compile leaves out unless it is told.
    with quiet(), torch.enable_grad(), dynamo.config.patch(skip_nnmodule_hook_guards=False):
        results = cast(Any, compile_)(function, backend=backend, fullgraph=True, dynamic=False)(*arguments)
    if "outputs" not in found:
        raise RefusedError("torch.compile is turned off, or has nothing to compile")
    (entry,) = dynamo.eval_frame._debug_get_cache_entry_list(function.__code__)
    check, where = entry.guard_manager.root.check, {"leaves": tuple(torch.zeros(()).expand(a.shape) for a in arguments)}
    names = {**dynamo.guards._get_closure_vars(), "G": scope, "L": where}
    placeholders = [node for node in found["module"].graph.nodes if node.op == "placeholder"]
    readers: list[Any] = []
    for node, value in zip(placeholders, found["inputs"], strict=True):
        number = next((i for i, argument in enumerate(arguments) if value is argument), None)
        if number is not None:
            readers.append(number)
        elif not isinstance(value, Tensor):
            raise RefusedError(f"it reads a {type(value).__name__} that changes")
        else:
            readers.append(_reader(node._dynamo_source, names, value))
    origins = {id(t): -1 - i for i, t in enumerate(found["inputs"])} | {
        id(t): i for i, t in enumerate(found["outputs"])
    }
    if any(id(result) not in origins for result in results):
        raise RefusedError("it returns a tensor that its graph does not have")
    # Guards tell objects by their addresses: none may be given to another object while the guards are in use. So they
    # are kept alive here, and torch.compile need not wait for their end, which for functions of torch never comes.
    alive = [_value(name, names) for name in found["names"]]
    _detach_finalizers(entry.guard_manager)
    del entry
    # The compiled form is not called again, and would live for ever. The guards go on reading globals that it added.
    added = dict(scope)
    dynamo.eval_frame.reset_code(function.__code__)
    scope.update(added)

    def holds(_alive: Any = (alive, function)) -> bool:
        return bool(check(where))

    module, results = found["module"], [origins[id(result)] for result in results]
    # Tensors without values, whose mode has weak references to the user's, which keep torch from swapping these.
    for node in module.graph.nodes:
        node.meta.clear()
    found["mode"].shape_env.tracked_fakes.clear()
    found.clear()  # what the compiled form goes on holding
    return module, readers, results, holds


def _detach_finalizers(guard_manager: Any) -> None:
    """Detach what waits for the end of guarded objects: it would keep every graph that was ever captured in memory."""
    for finalizer in list(getattr(weakref.finalize, "_registry", ())):
        alive = finalizer.peek()
        owner = getattr(getattr(alive[1], "func", None), "__self__", None) if alive else None
        if owner is not None and getattr(owner, "guard_manager", None) is guard_manager:
            finalizer.detach()


def _reader(source: Any, names: dict[str, Any], value: Tensor) -> Callable[[], Any]:
    """Return a function that reads an input of a graph from where PyTorch's front end found it."""
    name = source.name if isinstance(source.name, str) else source.name()
    try:
        read: Callable[[], Any] = eval(f"lambda: {name}", names)  # an expression made by torch.compile
        same = read() is value or (isinstance(read(), Tensor) and read().data_ptr() == value.data_ptr())
    except (SyntaxError, NameError, KeyError, AttributeError, IndexError, TypeError) as error:
        raise RefusedError(f"it reads {name}, which cannot be read again ({error})") from error
    if not same:
        raise RefusedError(f"it reads {name}, which is made anew whenever it is read")
    read.__name__ = name
    return read


def _value(name: Any, names: dict[str, Any]) -> Any:
    try:
        return eval(name if isinstance(name, str) else name(), names)  # an expression made by torch.compile
    except Exception:  # names of guards that are no expressions: nothing to keep alive
        return None


@contextlib.contextmanager
def sources_forgotten() -> Iterator[None]:
    """Drop the sources of graph modules that are made in a block: torch.fx keeps them for ever, for tracebacks."""
    kept: dict[str, Any] = getattr(getattr(fx.graph_module, "_loader", None), "eval_cache", {})
    before = len(kept)
    try:
        yield
    finally:
        for name in list(kept)[before:]:
            del kept[name]
            linecache.cache.pop(name, None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging what it cannot trace: the reason goes into the explanation, and is no error."""
    logs = [logging.getLogger(name) for name in _LOGS]
    before = [log.disabled for log in logs]
    for log in logs:
        log.disabled = True
    try:
        yield
    finally:
        for log, disabled in zip(logs, before, strict=True):
            log.disabled = disabled


__all__ = [
    "FakeTensor", "FakeTensorMode", "RefusedError", "_disable_current_modes", "captured", "differentiated",
    "get_proxy_mode", "is_dispatched", "is_forward_mode", "is_nested_forward_mode", "is_transformed", "is_wrapped",
    "make_fx", "plain", "quiet", "sources_forgotten",
]  # fmt: skip
