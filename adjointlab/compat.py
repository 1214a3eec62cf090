"""PyTorch's private interfaces, all in one place, each with what is done where a version of torch lacks it."""

from __future__ import annotations

import contextlib
import linecache
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._compile import _disable_dynamo
from torch._decomp import decomposition_table
from torch._functorch import pyfunctorch
from torch._functorch.utils import enable_single_level_autograd_function as single_level_functions
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# -- where the code at hand runs --------------------------------------------------------------------------------------


def plain() -> bool:
    """Return whether code runs eagerly on real tensors: no transform, no tracing, no compilation is under way."""
    return not (is_traced() or torch._C._are_functorch_transforms_active())


def is_traced() -> bool:
    """Return whether code is compiled, or runs under a mode that sees every operation, as tracing does."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def refuse_tracing() -> None:
    """Raise where operations are recorded by ``make_fx``, for which what they do not see is a constant."""
    if torch._C._len_torch_dispatch_stack() > 0 and get_proxy_mode() is not None:
        raise RuntimeError(
            "expected a call, got a trace by make_fx: it cannot see into a function from outside of PyTorch, and would "
            "take its result for a constant"
        )


@_disable_dynamo
def uncompiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the same function, run outside of the graph that is being compiled, which ends there."""
    return function(*arguments)


@contextlib.contextmanager
def outside_transforms() -> Iterator[None]:
    """Leave the transforms of ``torch.func`` and forward mode within a block, which has nothing to do with them."""
    level, forward_ad._current_level = forward_ad._current_level, -1
    try:
        with pyfunctorch.temporarily_clear_interpreter_stack():
            yield
    finally:
        forward_ad._current_level = level


def is_transformed() -> bool:
    """Return whether a transform of ``torch.func`` is under way."""
    return torch._C._are_functorch_transforms_active()


def is_forward_mode() -> bool:
    """Return whether forward-mode differentiation is under way."""
    return forward_ad._current_level >= 0


def is_nested_forward_mode() -> bool:
    """Return whether one ``torch.func.jvp`` runs inside of another."""
    if not is_transformed():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1


def is_wrapped(tensor: Tensor) -> bool:
    """Return whether a tensor stands for another inside of a transform of ``torch.func``."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def without_functorch(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Turn ``torch.func`` off, for operations on a tensor that is no part of a transform."""
    return contextlib.nullcontext() if is_wrapped(tensor) else torch._C._DisableFuncTorch()


def differentiated(tensors: Sequence[Tensor]) -> bool:
    """Return whether derivatives through a function of ``tensors`` may be asked for."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def without_subclass(value: Any) -> Any:
    """Return a tensor of a subclass that only adds methods as a plain one, anything else as it is."""
    kind = type(value)
    if kind is Tensor or not isinstance(value, Tensor) or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return value
    own: Any = Tensor.__torch_function__
    if getattr(kind.__torch_function__, "__func__", None) is not own.__func__:
        return value
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


# -- operations -------------------------------------------------------------------------------------------------------


def decomposition(op: Any) -> Callable[..., Any] | None:
    """Return an operation as a function that calls others, None where it is not made of others."""
    found: Callable[..., Any] | None = decomposition_table.get(op)
    return found or (op.decompose if op._can_decompose() else None)


def below_autograd(op: Any, keys: Any, *args: Any) -> Tensor:
    """Return the result of an operation below autograd, for which the caller provides the derivative."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *args)  # type: ignore[no-any-return]


def takes_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> bool:
    """Return whether PyTorch's own convolution is oneDNN's; ``settings`` are those of ``torch.convolution``."""
    found = torch._C._select_conv_backend(x, weight, bias, *settings)
    return bool(found == torch._C._ConvBackend.Mkldnn)  # type: ignore[attr-defined]


def turns_gradients_off(function: Any, args: Sequence[Any]) -> bool:
    """Return whether a call, as modes see it, is the beginning of ``torch.no_grad()``."""
    return function is torch._C._set_grad_enabled and not args[0]


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


@dataclass(frozen=True)
class Captured:
    """A function of tensors as one graph."""

    module: Any
    readers: list[Any]  # for each input of the graph a function that reads it, or the number of the argument
    results: list[int]  # for each result the number of an output or, counted from −1 down, of an input of the graph
    holds: Callable[[], bool]  # whether all that the graph has built in is as it was


def captured(function: Any, arguments: Sequence[Tensor], scope: dict[str, Any]) -> Captured:
    """Return ``torch.compile``'s one graph of a function of tensors.

    ``scope`` are its globals. It has a code object of its own, since its compiled forms are kept with that.
    """
    results, seen = _run_once(function, arguments)
    dynamo: Any = torch._dynamo
    (entry,) = dynamo.eval_frame._debug_get_cache_entry_list(function.__code__)
    check, where = entry.guard_manager.root.check, {"leaves": tuple(torch.zeros(()).expand(a.shape) for a in arguments)}
    names = {**dynamo.guards._get_closure_vars(), "G": scope, "L": where}
    module, inputs = seen["module"], seen["inputs"]
    sources = [node._dynamo_source for node in module.graph.nodes if node.op == "placeholder"]
    readers = [_reader(source, names, value, arguments) for source, value in zip(sources, inputs, strict=True)]
    origins = {id(t): -1 - i for i, t in enumerate(inputs)} | {id(t): i for i, t in enumerate(seen["outputs"])}
    if any(id(result) not in origins for result in results):
        raise RefusedError("it returns a tensor that its graph does not have")
    # Guards tell objects by their addresses: none may be given to another object while the guards are in use. So they
    # are kept alive here, and torch.compile need not wait for their end, which for functions of torch never comes.
    alive = [_value(name, names) for name in seen["guards"]]
    _detach_finalizers(entry.guard_manager)
    del entry
    # The compiled form is not called again, and would live for ever. The guards go on reading globals that it added.
    added = dict(scope)
    dynamo.eval_frame.reset_code(function.__code__)
    scope.update(added)

    with torch.no_grad():
        is_of_modes = not check(where)  # torch 2.6 guards those of the call with all else
    modes = _function_modes()

    def holds(_alive: Any = (alive, function)) -> bool:
        if is_of_modes:
            with torch.enable_grad(), _under(modes):
                return bool(check(where))
        return bool(check(where))

    numbers = [origins[id(result)] for result in results]
    # Tensors without values, whose mode has weak references to the user's, which keep torch from swapping these.
    for node in module.graph.nodes:
        node.meta.clear()
    seen["mode"].shape_env.tracked_fakes.clear()
    seen.clear()  # what the compiled form goes on holding
    return Captured(module, readers, numbers, holds)


def _run_once(function: Any, arguments: Sequence[Tensor]) -> tuple[Sequence[Any], dict[str, Any]]:
    """Run a function as ``torch.compile`` sees it; return its results, and the graph with what that was given."""
    seen: dict[str, Any] = {}

    def backend(module: Any, _: Any) -> Callable[..., Any]:
        context = torch._guards.TracingContext.get()
        guards = context.guards_context.dynamo_guards
        guards.inner = type(guards.inner)(g for g in guards.inner if g.inner_create_fn().__name__ not in _OF_THE_CALL)
        # To check the guards and to time that, which flushes the caches of the processor, is left out.
        dynamo.symbolic_convert.InstructionTranslator.current_tx().output.skip_guards_check = True
        seen.update(module=module, mode=context.fake_mode, guards=[guard.name for guard in guards.inner])

        def run(*given: Any) -> Any:  # for real: what a forward keeps for later, as it may, are tensors with values
            with torch.no_grad():
                outputs = module(*given)
            seen.update(inputs=given, outputs=outputs)
            return outputs

        return run

    compile_: Any = torch.compile
    dynamo: Any = torch._dynamo  # imported by its first use
    # Hooks on the parts of a module are guarded too, which torch.compile leaves out unless it is told.
    # Numbers stay numbers: a float that was another one in an earlier capture is a tensor by default in torch 2.6.
    options = {"skip_nnmodule_hook_guards": False, "specialize_float": True}
    with quiet(), torch.enable_grad(), dynamo.config.patch(options):
        results = compile_(function, backend=backend, fullgraph=True, dynamic=False)(*arguments)
    if "outputs" not in seen:
        raise RefusedError("torch.compile is turned off, or has nothing to compile")
    return results, seen


def _detach_finalizers(guard_manager: Any) -> None:
    """Detach what waits for the end of guarded objects: it would keep every graph that was ever captured in memory."""
    for finalizer in list(getattr(weakref.finalize, "_registry", ())):
        alive = finalizer.peek()
        owner = getattr(getattr(alive[1], "func", None), "__self__", None) if alive else None
        if owner is not None and getattr(owner, "guard_manager", None) is guard_manager:
            finalizer.detach()


def _function_modes() -> list[Any]:
    """Return the modes that are entered and see functions of torch, the outermost first."""
    return [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]


@contextlib.contextmanager
def _under(modes: Sequence[Any]) -> Iterator[None]:
    """Have these modes entered in a block, and no others."""
    before = _function_modes()
    try:
        _enter(modes)
        yield
    finally:
        _enter(before)


def _enter(modes: Sequence[Any]) -> None:
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


# Of an expression that torch.compile made: it is none, or what it reads is there no more.
_UNREADABLE = (SyntaxError, NameError, AttributeError, LookupError, TypeError, ValueError)


def _reader(source: Any, names: dict[str, Any], value: Any, arguments: Sequence[Tensor]) -> Any:
    """Return the number of the argument that an input of a graph is, or a function that reads it from its source."""
    for number, argument in enumerate(arguments):
        if value is argument:
            return number
    if not isinstance(value, Tensor):
        raise RefusedError(f"it reads a {type(value).__name__} that changes")
    if value.layout is not torch.strided:
        raise RefusedError(f"it reads a tensor of layout {value.layout}")
    name = source.name if isinstance(source.name, str) else source.name()
    try:
        read: Callable[[], Any] = eval(f"lambda: {name}", names)  # an expression made by torch.compile
        same = read() is value or (isinstance(read(), Tensor) and read().data_ptr() == value.data_ptr())
    except _UNREADABLE as error:
        raise RefusedError(f"it reads {name}, which cannot be read again ({error})") from error
    if not same:
        raise RefusedError(f"it reads {name}, which is made anew whenever it is read")
    read.__name__ = name
    return read


def _value(name: Any, names: dict[str, Any]) -> Any:
    """Return the object that a guard is on, None where its name is no expression: there is nothing to keep alive."""
    try:
        return eval(name if isinstance(name, str) else name(), names)  # an expression made by torch.compile
    except _UNREADABLE:
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
def scripts_run(run: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Run TorchScript by a function of ours in a trace: its interpreter would read values, and end the process."""
    kinds = (torch._C.ScriptFunction, torch._C.ScriptMethod)
    originals = [vars(kind)["__call__"] for kind in kinds]

    def guarded(original: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if torch._C._len_torch_dispatch_stack() and torch._guards.detect_fake_mode() is not None:
                return run(self, args, kwargs)
            return original.__get__(self)(*args, **kwargs)

        return call

    try:
        for kind, original in zip(kinds, originals, strict=True):
            kind.__call__ = guarded(original)  # type: ignore[method-assign]
        yield
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.__call__ = original  # type: ignore[method-assign]


def inlined(graph: Any) -> Any:
    """Return a graph of TorchScript in which calls of functions are replaced by what these do."""
    found = graph.copy()
    torch._C._jit_pass_inline(found)
    return found


def scripted_operation(schema: str, inputs: Sequence[Any]) -> Any:
    """Return the result of an operation as TorchScript writes it: by its schema, and arguments in their order."""
    known = torch._C.parse_schema(schema)
    space, name = known.name.split("::")
    packet = getattr(getattr(torch.ops, space), name)
    pairs = list(zip(known.arguments, inputs, strict=True))
    written = [value for a, value in pairs if a.alias_info and a.alias_info.is_write]
    if not all(isinstance(value, Tensor) for value in written):  # a copy would be written to
        raise RefusedError(f"it calls TorchScript with {known.name} of a list")
    named = {a.name: value for a, value in pairs if a.kwarg_only}
    given = inputs[: len(inputs) - len(named)]
    return getattr(packet, known.overload_name or "default")(*given, **named)


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
    "FakeTensor", "FakeTensorMode", "RefusedError", "SingleLevelFunction", "TorchDispatchMode",
    "_disable_current_modes", "below_autograd", "captured", "decomposition", "differentiated", "get_proxy_mode",
    "inlined", "is_forward_mode", "is_nested_forward_mode", "is_transformed", "is_wrapped", "make_fx", "plain",
    "pytree", "quiet", "scripted_operation", "scripts_run", "single_level_functions", "sources_forgotten",
    "takes_onednn", "turns_gradients_off", "without_functorch", "without_subclass",
]  # fmt: skip
