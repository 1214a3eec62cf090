"""Values of tensors while a function is traced: reads of them, branches and loops that depend on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from adjointlab import compat
from adjointlab.progress import step
from adjointlab.transpose.frontend.budget import ADVICE, deadline, excess
from adjointlab.transpose.frontend.sparse import SparseMatrices, multiplied
from adjointlab.transpose.graph.ops import has_tag, is_mutable, op_name

aten = torch.ops.aten


class UntraceableError(Exception):
    """The function cannot be traced; the message is the reason. Internal: the engine falls back to eager."""


class ReadsInputError(UntraceableError):
    """The function turned a value of its input into a Python number, so that its graph is not the function."""


class Values(compat.TorchDispatchMode):
    """Answer reads of values (``.item()``, ``bool(t)``, ``mask.nonzero()``) from real tensors; refuse the input's.

    A value that is read that way is part of the graph from then on: ``read`` keeps the tensors, so that the graph can
    be found out of date.
    """

    def __init__(self, state: Sequence[Tensor] = (), seconds: float = math.inf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds, self.calls, self.is_over = seconds, 0, deadline(seconds)
        self.state = state  # the real tensors that the first inputs of the graph stand for
        self.read: dict[int, Tensor] = {}
        self.seeded: list[torch.Generator] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        step()
        self.calls += 1
        if said := self.is_over():
            raise UntraceableError(said)
        kwargs = kwargs or {}
        if func in _INDEXED and any(_is_mask(index) for index in args[1]):
            return func(args[0], self._positions(args[1]), *args[2:], **kwargs)
        if func is aten.masked_select.default:
            x, mask = torch.broadcast_tensors(*args)
            return aten.index.Tensor(x, self._positions([mask]))
        if _is_of_values(func, args, kwargs):
            self._require_seeded((*args, *kwargs.values()))
            try:
                return self._real(func, args, kwargs)
            except ReadsInputError:  # a fake one may do: there may be a number of entries that is known
                return func(*args, **kwargs)
        if not has_tag(func, torch.Tag.data_dependent_output) and func not in _READERS:
            return func(*args, **kwargs)
        return self._real(func, args, kwargs)

    def _require_seeded(self, args: Sequence[Any]) -> None:
        """Raise unless generators are as they were seeded, or were so when the trace met them first."""
        for generator in args:
            if isinstance(generator, torch.Generator) and generator not in self.seeded:
                fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
                if not torch.equal(fresh.get_state(), generator.get_state()):
                    raise UntraceableError("random: it draws from a generator that no call seeds")
                self.seeded.append(generator)

    def _real(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = op_name(func)
        real = compat.pytree.tree_map(lambda arg: self.value(arg, name) if isinstance(arg, Tensor) else arg, args)
        with compat._disable_current_modes():
            return func(*real, **kwargs)

    def value(self, tensor: Tensor, reader: str) -> Tensor:
        """Return the real tensor that a traced one stands for, if that depends on constants only."""
        tracer = compat.get_proxy_mode().tracer  # type: ignore[union-attr]
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
                with compat._disable_current_modes():
                    found.extend(mask.nonzero().unbind(1))
            else:
                found.append(index)
        return found

    def _evaluate(self, node: fx.Node, tracer: Any, values: dict[fx.Node, Any], reader: str) -> Any:
        if node in values:
            return values[node]
        if node.op == "placeholder":
            position = [n for n in node.graph.nodes if n.op == "placeholder"].index(node)
            if position < len(self.state):
                self.read[id(self.state[position])] = self.state[position]
                return self.state[position]
            raise ReadsInputError(f"{reader} turns a value of the input into a Python number")
        if node.op == "get_attr":
            held = values[node] = getattr(tracer.root, str(node.target))
            self.read[id(held)] = held
            return held
        if is_mutable(node.target):
            raise UntraceableError(f"a number is read from a tensor that {op_name(node.target)} changed in place")
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: self._evaluate(arg, tracer, values, reader))
        with compat._disable_current_modes(), torch.no_grad():
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values[node]


def _is_of_values(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation has results that only values tell: entries that are counted, or drawn by a seed."""
    if has_tag(func, torch.Tag.dynamic_output_shape) and func not in _READERS | _INDEXED:
        return True
    return any(isinstance(arg, torch.Generator) for arg in (*args, *kwargs.values())) and not is_mutable(func)


@torch.ops.higher_order.cond.py_impl(Values)
def _branch(mode: Values, flag: Any, first: Callable[..., Any], second: Callable[..., Any], operands: Any) -> Any:
    with mode:
        chosen = first if bool(mode.value(flag, "cond")) else second
        return chosen(*operands)


@torch.ops.higher_order.scan.py_impl(Values)
def _scan(mode: Values, step: Callable[..., Any], state: Any, xs: Any, *rest: Any) -> Any:
    if len(rest) != 1:
        raise UntraceableError(f"it calls torch's scan, which is not traced in this version of PyTorch: {ADVICE}")
    with mode:
        results = []
        for t in range(len(xs[0])):  # as a loop in Python does
            calls = mode.calls
            found = step(*state, *[x[t] for x in xs], *rest[0])
            if said := excess((mode.calls - calls) * (len(xs[0]) - t), mode.seconds):
                raise UntraceableError(f"{said}; {ADVICE}")
            state = found[: len(state)]
            results.append(found[len(state) :])
        return [*state, *map(torch.stack, zip(*results, strict=True))]


_READERS = {aten.is_nonzero.default, aten.nonzero.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
_MEMORY = {Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.__dlpack__, Tensor.data_ptr, Tensor.untyped_storage}


class Memory(TorchFunctionMode):
    """The same for what reads a tensor's memory past the dispatcher: ``.numpy()``, ``.tolist()``."""

    def __init__(self, values: Values, matrices: SparseMatrices) -> None:
        super().__init__()
        self.values, self.matrices = values, matrices

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args = compat.pytree.tree_map(compat.without_subclass, args)
        if func in _MEMORY:
            real = self.values.value(args[0], func.__name__)
            with compat._disable_current_modes():
                return func(real, *args[1:], **(kwargs or {}))
        product = multiplied(func, args, self.matrices)
        return func(*args, **(kwargs or {})) if product is NotImplemented else product


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
