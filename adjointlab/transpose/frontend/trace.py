"""From a function to graphs of ATen operations: its forward, and from that the vector-Jacobian product.

Both are made with *fake* tensors, which have shapes and no values. A graph has no side effects, allocates nothing when
it is made, and takes ``(*state, *inputs)``. The forward's is functional; the cotangents are inputs of the second too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from adjointlab import compat
from adjointlab.modules import Source, read_all
from adjointlab.transpose.frontend import torchscript
from adjointlab.transpose.frontend.capture import Capture
from adjointlab.transpose.frontend.derivatives import differentiable
from adjointlab.transpose.frontend.sparse import SparseMatrices
from adjointlab.transpose.frontend.values import Memory, UntraceableError, Values
from adjointlab.transpose.frontend.vjp import Tensors, first_line, nodes_of, vjp_by_func, vjp_by_grad
from adjointlab.transpose.graph.edit import part
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import has_tag, is_mutable, op_name

aten = torch.ops.aten


def _make(
    function: Callable[..., Any], arguments: Sequence[Tensor], values: Values, sources: dict[int, Source] | None = None
) -> fx.GraphModule:
    matrices = SparseMatrices({} if sources is None else sources)

    def watched(*tensors: Tensor) -> Any:
        with Memory(values, matrices), values:
            return function(*tensors)

    try:
        with compat.quiet(), compat.scripts_run(torchscript.run):
            module = compat.make_fx(
                watched, tracing_mode="fake", _allow_non_fake_inputs=True, _error_on_data_dependent_ops=False
            )(*arguments)
    except UntraceableError:
        raise
    # Third-party forwards can fail in any way on fake tensors (numpy inside, a missing fake kernel): every one of
    # these means that there is no graph; the function itself has already run on real tensors.
    except Exception as error:
        raise UntraceableError(f"{type(error).__name__}: {first_line(error)}") from error
    return module


def _faked(tensors: Sequence[Tensor], fake: Any) -> list[Tensor]:
    with fake:
        return [_empty_like(tensor) for tensor in tensors]


def _empty_like(tensor: Tensor) -> Tensor:
    if compat.is_wrapped(tensor):
        raise UntraceableError("it holds a tensor that was made inside of a transform of torch.func")
    if tensor.layout != torch.strided:
        raise UntraceableError(f"it holds a tensor of layout {tensor.layout}")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def trace_forward(captured: Capture, seconds: float = math.inf) -> Graph:
    """Return the functional graph of a function, with what it depends on as state."""
    fake = compat.FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        inputs = [torch.empty(spec.shape, dtype=spec.dtype, device=spec.device) for spec in captured.specs]
    real = read_all(captured.state)
    known, n, values = _faked(real, fake), len(real), Values(real, seconds)
    sources = {**captured.sources, **{id(t): source for t, source in zip(real, captured.state, strict=True)}}
    # Looked up now: a forward may replace what its modules hold while it is traced.
    by_memory = {_memory(source.read()): source for source in captured.sources.values()}
    module = _make(lambda *tensors: captured.function(tensors[:n], tensors[n:]), [*known, *inputs], values, sources)
    state = (*captured.state, *_lift(module, n, {**by_memory, **sources}))
    specialized = tuple((sources.get(key) or constant(t), t.clone()) for key, t in values.read.items())
    _raise_if_random(module)
    module = _functionalised(module, len(state))
    _raise_if_stateful(module, state)
    return Graph(module.graph, state, specialized)


def hides(captured: Capture) -> tuple[str, ...]:
    """Return the names of what hides values from autograd, or has a backward of its own: there, autograd may be wrong.

    A graph of operations does not show them: it is of what they compute.
    """
    fake, mode = compat.FakeTensorMode(allow_non_fake_inputs=True), _Hiding()
    real = read_all(captured.state)
    state = _faked(real, fake)
    for tensor, like in zip(state, real, strict=True):
        tensor.requires_grad_(like.requires_grad)
    try:
        with compat.quiet(), compat.scripts_run(torchscript.run), fake, torch.enable_grad():
            leaves = [torch.empty(s.shape, dtype=s.dtype, device=s.device, requires_grad=True) for s in captured.specs]
            values = Values()
            with Memory(values, SparseMatrices(dict(captured.sources))), mode:
                outputs = captured.function(tuple(state), tuple(leaves))
    except Exception as error:  # as for a trace: there is nothing to be known
        return (f"an operation without a derivative ({first_line(error)})",)
    found = dict.fromkeys(mode.met)
    if any(out.grad_fn is None for out in outputs):
        found["an output that autograd does not see"] = None
    for node in nodes_of(outputs):
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found[f"a custom backward ({type(node).__name__.removesuffix('Backward')})"] = None
    return tuple(found)


class _Hiding(TorchFunctionMode):
    """Notes what is hidden from autograd by name."""

    def __init__(self) -> None:
        super().__init__()
        self.met: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _HIDING:
            self.met.append(_HIDING[func])
        elif compat.turns_gradients_off(func, args):
            self.met.append("torch.no_grad()")
        return func(*args, **(kwargs or {}))


_HIDING: dict[Any, str] = {
    Tensor.detach: ".detach()", Tensor.detach_: ".detach_()", torch.detach: "torch.detach()",
    Tensor.data.__get__: ".data",  # type: ignore[attr-defined]
}  # fmt: skip


def constant(tensor: Tensor) -> Source:
    """Return the source of a tensor that nothing but the function holds."""
    return Source(lambda: tensor, "a constant")


def trace_vjp(forward: Graph, seconds: float = math.inf, *, apart: tuple[Source, ...] = ()) -> Graph:
    """Return the graph ``(*state, *primals, *cotangents) → (*Aᴴ cotangents, *gradients)`` of the forward's VJP.

    Gradients are those in the state, None for what requires none or is ``apart``, and for all of it where one cannot be
    traced.
    """
    n_state, n_inputs = len(forward.state), len(forward.inputs)
    examples = [node.meta["val"] for node in forward.placeholders]
    fake = examples[-1].fake_mode
    with fake:
        cotangents = [torch.empty_like(node.meta["val"]) for node in forward.outputs]
    arguments = _faked(examples, fake)

    def pull_back(vjp: Any, wanted: list[int]) -> Callable[..., Any]:
        def run(*tensors: Tensor) -> tuple[Tensor | None, ...]:
            state, rest = list(tensors[:n_state]), tensors[n_state:]
            run_forward = (forward if wanted else differentiable(forward)).function  # once, or again and again

            def function(leaves: Tensors) -> Tensors:
                for index, leaf in zip(wanted, leaves[n_inputs:], strict=True):
                    state[index] = leaf
                return tuple(run_forward(*state, *leaves[:n_inputs]))

            primals = (*rest[:n_inputs], *[state[index] for index in wanted])
            found = vjp(function, primals, rest[n_inputs:])
            gradients = dict(zip(wanted, found[n_inputs:], strict=True))
            return (*found[:n_inputs], *map(gradients.get, range(n_state)))

        return run

    learned = [i for i, source in enumerate(forward.state) if source not in apart and source.read().requires_grad]
    tries = [(vjp_by_func, learned), *([(vjp_by_func, [])] if learned else []), (vjp_by_grad, [])]
    for vjp, wanted in tries:
        try:
            module = _make(pull_back(vjp, wanted), [*arguments, *cotangents], Values(seconds=seconds))
            break
        except UntraceableError as error:
            refusal = error
    else:
        raise refusal
    module = _functionalised(module, len(arguments) + len(cotangents))
    return Graph(module.graph, forward.state, forward.specialized)


def trace_pull_back(forward: Graph, point: tuple[Source, ...], seconds: float = math.inf) -> Graph:
    """Return the graph ``(*state, *cotangents) → J(x₀)ᴴ cotangents`` of a forward, with ``x₀`` in the state."""
    whole = trace_vjp(forward, seconds, apart=forward.state)
    found = part(whole, whole.outputs[: len(point)])
    return Graph(found.body, (*forward.state, *point), found.specialized)


def _lift(module: fx.GraphModule, n_known: int, sources: dict[Any, Source]) -> tuple[Source, ...]:
    """Turn constants of the graph into inputs, between the state that is known and the rest; return their sources."""
    graph = module.graph
    state: list[Source] = []
    lifted: dict[int, fx.Node] = {}
    first = [node for node in graph.nodes if node.op == "placeholder"][n_known]
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = getattr(module, node.target)
        if not isinstance(tensor, Tensor):  # a generator of random numbers, say
            raise UntraceableError(f"it depends on a {type(tensor).__name__}, which is no tensor")
        if isinstance(tensor, compat.FakeTensor):
            raise UntraceableError("a part of it runs where no trace sees it: in another thread, say")
        source = sources.get(id(tensor)) or sources.get(_memory(tensor))
        key = id(source or tensor)
        if key not in lifted:
            with graph.inserting_before(first):
                lifted[key] = graph.placeholder(f"state_{len(state)}")
            (lifted[key].meta["val"],) = _faked([tensor], first.meta["val"].fake_mode)
            state.append(source or constant(tensor))
        node.replace_all_uses_with(lifted[key])
        graph.erase_node(node)
    module.recompile()
    return tuple(state)


def _memory(tensor: Tensor) -> Any:
    if compat.is_wrapped(tensor) or tensor.layout != torch.strided:
        return id(tensor)
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_conj())


def _functionalised(module: fx.GraphModule, first_input: int) -> fx.GraphModule:
    if not any(is_mutable(node.target) for node in module.graph.nodes):
        return module

    # Inputs are cloned, so that writing to them is no side effect; the state is not, so that it shows as one.
    def run(*tensors: Tensor) -> Any:
        return module(*tensors[:first_input], *(t.clone() for t in tensors[first_input:]))

    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    fakes = _faked(values, values[-1].fake_mode)
    return _make(torch.func.functionalize(run, remove="mutations"), fakes, Values())


def _raise_if_random(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if has_tag(node.target, torch.Tag.nondeterministic_seeded):
            raise UntraceableError(f"random: {op_name(node.target)} draws random numbers")


def _raise_if_stateful(module: fx.GraphModule, state: tuple[Source, ...]) -> None:
    names = dict(zip([n for n in module.graph.nodes if n.op == "placeholder"], state, strict=False))
    for node in module.graph.nodes:
        if is_mutable(node.target):
            written = names.get(node.args[0])
            what = written.name if written else "a tensor"
            raise UntraceableError(f"stateful: {op_name(node.target)} writes to {what} at every call")
