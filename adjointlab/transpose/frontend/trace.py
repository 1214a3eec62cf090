"""From a function to a graph: ATen ops under fake tensors, what the function captured lifted to inputs.

A graph has no side effects, allocates nothing when it is made, and takes ``(*state, *inputs)``. Two graphs are made:
the *forward* graph, functional, and from it the *VJP* graph of that, whose cotangents are inputs too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch import make_fx
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from adjointlab.space import TensorSpec
from adjointlab.transpose.frontend.capture import Capture, Source
from adjointlab.transpose.frontend.vjp import Function, Tensors, first_line, vjp_by_func, vjp_by_grad
from adjointlab.transpose.graph.ir import Graph, call, clean, is_mutable, op_name

aten = torch.ops.aten


class UntraceableError(Exception):
    """The function cannot be traced; the message is the reason. Internal: the engine falls back to eager."""


class ReadsInputError(UntraceableError):
    """The function turned a value of its input into a Python number, so that its graph is not the function."""


class _Values(TorchDispatchMode):
    """Answer reads of values (``.item()``, ``bool(t)``, ``mask.nonzero()``) from real tensors; refuse the input's.

    What is read that way is part of the graph from then on: ``read`` keeps the tensors, so that the graph can be found
    out of date.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _INDEXED and any(_is_mask(index) for index in args[1]):
            return func(args[0], self._positions(args[1]), *args[2:], **kwargs)
        if func is aten.masked_select.default:
            x, mask = torch.broadcast_tensors(*args)
            return aten.index.Tensor(x, self._positions([mask]))
        reads = torch.Tag.data_dependent_output in func.tags or func in _READERS
        if not reads:
            return func(*args, **kwargs)
        real = [self.value(arg, op_name(func)) if isinstance(arg, Tensor) else arg for arg in args]
        with _disable_current_modes():
            return func(*real, **kwargs)

    def value(self, tensor: Tensor, reader: str) -> Tensor:
        """Return the real tensor that a traced one stands for, if that depends on constants only."""
        tracer = get_proxy_mode().tracer  # type: ignore[union-attr]
        tracked = tracer.tensor_tracker.get(tensor)
        if tracked is None:
            self.read[id(tensor)] = tensor
            return tensor
        return self._evaluate(tracked.proxy.node, tracer, {}, reader)  # type: ignore[no-any-return]

    def _positions(self, indices: list[Any]) -> list[Any]:
        """Return indices with masks as positions: how many there are must be known while tracing."""
        found: list[Any] = []
        for index in indices:
            if _is_mask(index):
                mask = self.value(index, "index by a mask")
                with _disable_current_modes():
                    found.extend(mask.nonzero().unbind(1))
            else:
                found.append(index)
        return found

    def _evaluate(self, node: fx.Node, tracer: Any, values: dict[fx.Node, Any], reader: str) -> Any:
        if node in values:
            return values[node]
        if node.op == "placeholder":
            raise ReadsInputError(f"{reader} turns a value of the input into a Python number")
        if node.op == "get_attr":
            values[node] = getattr(tracer.root, str(node.target))
            self.read[id(values[node])] = values[node]
            return values[node]
        if is_mutable(node.target):
            raise UntraceableError(f"a number is read from a tensor that {op_name(node.target)} changed in place")
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: self._evaluate(arg, tracer, values, reader))
        with _disable_current_modes(), torch.no_grad():
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values[node]


_READERS = {aten.is_nonzero.default, aten.nonzero.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
_MEMORY = {
    Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__dlpack__, Tensor.data_ptr, Tensor.untyped_storage,
}  # fmt: skip


class _Memory(TorchFunctionMode):
    """The same for what reads a tensor's memory past the dispatcher: ``.numpy()``, ``.tolist()``."""

    def __init__(self, values: _Values) -> None:
        super().__init__()
        self.values = values

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _MEMORY:
            real = self.values.value(args[0], func.__name__)
            with _disable_current_modes():
                return func(real, *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _make(function: Callable[..., Any], arguments: Sequence[Tensor], values: _Values) -> fx.GraphModule:
    def watched(*tensors: Tensor) -> Any:
        with _Memory(values), values:
            return function(*tensors)

    # A forward that cannot take fake tensors is no error of ours to log: the reason goes into the account.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    silent = log.disabled
    log.disabled = True
    try:
        module = make_fx(
            watched,
            tracing_mode="fake",
            _allow_non_fake_inputs=True,
            _error_on_data_dependent_ops=False,
        )(*arguments)
    except UntraceableError:
        raise
    # Third-party forwards can fail in any way on fake tensors (numpy inside, a missing fake kernel): every one of
    # these means that there is no graph; the function itself has already run on real tensors.
    except Exception as error:
        raise UntraceableError(f"{type(error).__name__}: {first_line(error)}") from error
    finally:
        log.disabled = silent
    return module  # type: ignore[no-any-return]


def trace_forward(function: Function, specs: Sequence[TensorSpec], captured: Capture) -> Graph:
    """Return the functional graph of ``function`` on tensors like ``specs``, with what it captured as state.

    Raises
    ------
    UntraceableError
        If there is no such graph; ``ReadsInputError`` if it would depend on the values of the input.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        inputs = [torch.empty(spec.shape, dtype=spec.dtype, device=spec.device) for spec in specs]
    values = _Values()
    with captured.preserved():
        module = _make(lambda *leaves: function(leaves), inputs, values)
    state = _lift(module, captured)
    sources = {id(source.read()): source for source in captured.sources}
    baked = tuple((sources.get(key, Source([t], 0, "a constant")), t.clone()) for key, t in values.read.items())
    _raise_if_random(module)
    if any(is_mutable(node.target) for node in module.graph.nodes):
        module = _functionalise(module, _fakes(module, fake), len(state))
    _raise_if_stateful(module, state)
    _normalise(module.graph)
    return Graph(module.graph, state, baked)


def trace_vjp(forward: Graph) -> Graph:
    """Return the graph ``(*state, *primals, *cotangents) → (*Aᴴ cotangents, *gradients)`` of the forward's VJP.

    Gradients are those in the state, None for what requires none, and for all of it where one cannot be traced.

    Raises
    ------
    UntraceableError
        If an op of the forward has no derivative that can be traced.
    """
    n_state, n_inputs = len(forward.state), len(forward.inputs)
    examples = [node.meta["val"] for node in forward.placeholders]
    fake = examples[-1].fake_mode
    with fake:
        cotangents = [torch.empty_like(node.meta["val"]) for node in forward.outputs]
        arguments = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in examples]

    def pull_back(vjp: Any, wanted: list[int]) -> Callable[..., Any]:
        def run(*tensors: Tensor) -> tuple[Tensor | None, ...]:
            state, rest = list(tensors[:n_state]), tensors[n_state:]

            def function(leaves: Tensors) -> Tensors:
                for index, leaf in zip(wanted, leaves[n_inputs:], strict=True):
                    state[index] = leaf
                return tuple(forward.function(*state, *leaves[:n_inputs]))

            primals = (*rest[:n_inputs], *[state[index] for index in wanted])
            found = vjp(function, primals, rest[n_inputs:])
            gradients = dict(zip(wanted, found[n_inputs:], strict=True))
            return (*found[:n_inputs], *map(gradients.get, range(n_state)))

        return run

    learned = [index for index, source in enumerate(forward.state) if source.read().requires_grad]
    tries = [(vjp_by_func, learned), *([(vjp_by_func, [])] if learned else []), (vjp_by_grad, [])]
    for vjp, wanted in tries:
        try:
            module = _make(pull_back(vjp, wanted), [*arguments, *cotangents], _Values())
            break
        except UntraceableError as error:
            refusal = error
    else:
        raise refusal
    if any(is_mutable(node.target) for node in module.graph.nodes):
        module = _functionalise(module, [*arguments, *cotangents], len(arguments) + len(cotangents))
    _normalise(module.graph)
    _skip(module.graph, {aten.detach.default, aten.alias.default})
    return Graph(module.graph, forward.state, forward.baked)


def _fakes(module: fx.GraphModule, fake: FakeTensorMode) -> list[Tensor]:
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    with fake:
        return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in values]


def _lift(module: fx.GraphModule, captured: Capture) -> tuple[Source, ...]:
    """Turn constants of the graph into leading inputs, and return where each is found from now on."""
    graph = module.graph
    by_id = {id(source.read()): source for source in captured.sources}
    by_memory = {_memory(source.read()): source for source in captured.sources}
    state: list[Source] = []
    lifted: dict[int, fx.Node] = {}
    first = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(module, node.target)
        if not isinstance(tensor, Tensor):  # a generator of random numbers, say
            raise UntraceableError(f"it depends on a {type(tensor).__name__}, which is no tensor")
        source = by_id.get(id(tensor)) or by_memory.get(_memory(tensor)) or Source([tensor], 0, "a constant")
        key = id(source)
        if source.name == "a constant" and not isinstance(source.container, dict):
            key = id(tensor)
        if key not in lifted:
            with graph.inserting_before(first):
                lifted[key] = graph.placeholder(f"state_{len(state)}")
            lifted[key].meta["val"] = _fake_like(tensor, module)
            state.append(source)
        node.replace_all_uses_with(lifted[key])
        graph.erase_node(node)
    module.recompile()
    return tuple(state)


def _fake_like(tensor: Tensor, module: fx.GraphModule) -> Tensor:
    if tensor.layout != torch.strided:
        raise UntraceableError(f"it holds a tensor of layout {tensor.layout}")
    mode = next(n.meta["val"].fake_mode for n in module.graph.nodes if isinstance(n.meta.get("val"), Tensor))
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _memory(tensor: Tensor) -> Any:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise UntraceableError("it holds a tensor that was made inside of a transform of torch.func")
    if tensor.layout != torch.strided:
        return id(tensor)
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_conj())


def _functionalise(module: fx.GraphModule, arguments: Sequence[Tensor], first_input: int) -> fx.GraphModule:
    # Inputs are cloned, so that writing to them is no side effect; the state is not, so that it shows as one.
    def run(*tensors: Tensor) -> Any:
        return module(*tensors[:first_input], *(t.clone() for t in tensors[first_input:]))

    return _make(torch.func.functionalize(run, remove="mutations"), arguments, _Values())


def _raise_if_random(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise UntraceableError(f"random: {op_name(node.target)} draws random numbers")


def _raise_if_stateful(module: fx.GraphModule, state: tuple[Source, ...]) -> None:
    names = dict(zip([n for n in module.graph.nodes if n.op == "placeholder"], state, strict=False))
    for node in module.graph.nodes:
        if is_mutable(node.target):
            written = names.get(node.args[0])
            what = written.name if written else "a tensor"
            raise UntraceableError(f"stateful: {op_name(node.target)} writes to {what} at every call")


def _normalise(graph: fx.Graph) -> None:
    """Give a functional graph its plain form: no write-backs as copies, no clones, no dead code."""
    for node in list(graph.nodes):
        if node.target is aten.copy.default:  # copy(dst, src) has the values of src and the metadata of dst
            target, source = node.args[0].meta["val"], node.args[1]
            with graph.inserting_before(node):
                value = source
                if source.meta["val"].dtype != target.dtype:
                    value = call(graph, aten._to_copy.default, value, dtype=target.dtype)
                if value.meta["val"].shape != target.shape:
                    value = call(graph, aten.expand.default, value, list(target.shape))
            node.replace_all_uses_with(value)
        elif node.target in _SCATTERS and node.meta["val"].is_complex():
            _scatter_as_cat(graph, node)
        elif node.target is aten.lift_fresh_copy.default or (
            node.target is aten.clone.default and not node.kwargs and node.args[0].op == "placeholder"
        ):
            node.replace_all_uses_with(node.args[0])
    clean(graph)


_SCATTERS = {aten.slice_scatter.default, aten.select_scatter.default}


def _scatter_as_cat(graph: fx.Graph, node: fx.Node) -> None:
    """Write a scatter of complex numbers, which autograd does not differentiate, as base before, source, base after."""
    base, source, dim, *window = [*node.args, *[None] * 5][:6]
    shape = node.meta["val"].shape
    dim = (dim or 0) % len(shape)  # type: ignore[operator]
    with graph.inserting_before(node):
        if node.target is aten.select_scatter.default:
            start = window[0] % shape[dim]
            stop = start + 1
            source = call(graph, aten.unsqueeze.default, source, dim)
        else:
            if window[2] not in (None, 1):
                pairs = [call(graph, aten.view_as_real.default, part) for part in (base, source)]
                scattered = call(graph, aten.slice_scatter.default, *pairs, dim, *window)
                node.replace_all_uses_with(call(graph, aten.view_as_complex.default, scattered))
                return
            start, stop, _ = slice(window[0], window[1]).indices(shape[dim])
        parts = [source]
        if start > 0:
            parts.insert(0, call(graph, aten.slice.Tensor, base, dim, 0, start))
        if stop < shape[dim]:
            parts.append(call(graph, aten.slice.Tensor, base, dim, stop, shape[dim]))
        whole = call(graph, aten.cat.default, parts, dim)
    node.replace_all_uses_with(whole)


def _skip(graph: fx.Graph, targets: set[Any]) -> None:
    for node in list(graph.nodes):
        if node.target in targets:
            node.replace_all_uses_with(node.args[0])
    clean(graph)


__all__ = ["ReadsInputError", "UntraceableError", "trace_forward", "trace_vjp"]
