"""A graph made callable: what depends on no input is computed once, and again when what it depends on changes.

The nodes fall into three parts. *Constants* (sampling grids, windows) depend on nothing and are computed at the first
call. *Prologues* (flipped kernels, a kernel's transform) depend on the state only, each on some tensors of it; they are
kept while these have the same values. Values are compared, not version counters: ``weight.data.mul_(2)`` leaves no
other trace. So only a small state is worth it; a large one is read in the *main* part, at every call. So is what
an accelerator makes faster than it answers (``kernels.is_kept``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad

from adjointlab.transpose.frontend.capture import same
from adjointlab.transpose.graph.ir import VIEWS, Graph, compiled
from adjointlab.transpose.kernels import slabs
from adjointlab.transpose.kernels.registry import KERNELS, gradient, is_kept

aten = torch.ops.aten

_SMALL = 1 << 16  # entries of state that are compared at each call, some ten microseconds' worth

# Ops that cost as much to keep as to make: they stay where they are used, as views do.
_FACTORIES = {
    aten.zeros, aten.ones, aten.full, aten.empty, aten.empty_strided, aten.new_zeros, aten.new_ones, aten.new_empty,
    aten.new_full, aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.scalar_tensor,
}  # fmt: skip


def _as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.contiguous())


# The same functions by a door that costs half as much: calls through torch.ops parse their arguments in Python. And
# views that copy where they must: real results need not have the strides that fake ones had.
_BUILTIN: dict[Any, Callable[..., Any]] = {
    aten.convolution.default: torch.convolution,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.transpose.int: torch.transpose,
    aten.permute.default: torch.permute,
    aten.select.int: torch.select,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.cat.default: torch.cat,
    aten._conj.default: torch.conj,
    aten.view_as_real.default: torch.view_as_real,
    aten.view_as_complex.default: _as_complex,
    aten.view.default: torch.reshape,
    aten._unsafe_view.default: torch.reshape,
    aten.slice_scatter.default: torch.slice_scatter,
    aten.constant_pad_nd.default: torch.constant_pad_nd,
    aten.mm.default: torch.mm,
    aten.bmm.default: torch.bmm,
}


_SITED: set[Any] = {*KERNELS.values(), gradient, slabs.gradient}
_FRESH = {torch.convolution, *_SITED}
_IN_PLACE = {torch.add: torch.Tensor.add_, torch.sub: torch.Tensor.sub_, torch.mul: torch.Tensor.mul_}


def plain() -> bool:
    """Return whether code runs eagerly on real tensors: no transform, no tracing, no compilation is under way."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def differentiated(tensors: tuple[Tensor, ...]) -> bool:
    """Return whether derivatives through a function of ``tensors`` may be asked for."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def canonical(tensor: Tensor) -> Tensor:
    """Return the tensor as it was traced: contiguous, without lazy conjugation or negation."""
    if tensor.is_complex():
        tensor = tensor.resolve_conj()
    return tensor.resolve_neg().contiguous()


Prologue = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]  # of tensors and constants


class Program:
    """A callable ``(*state, *inputs) → tuple of outputs`` that equals its graph.

    ``reference`` is an equal graph of differentiable ATen ops alone: what transforms and other compilers get to see.
    """

    def __init__(self, graph: Graph, reference: Graph) -> None:
        self.graph = graph
        self.whole = reference.function
        self._split = _split(graph)
        self._constants: tuple[Tensor, ...] | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, under whatever transform or trace is under way."""
        return self.run(*tensors) if plain() else tuple(self.whole(*tensors))

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs for real tensors, without recording of gradients."""
        constants, prologues, main = self._split
        if self._constants is None:
            with torch.no_grad():
                self._constants = constants() if constants else ()
        prepared: list[Tensor] = []
        for prologue in prologues:
            prepared += prologue(tensors, self._constants)
        return main(*tensors, *self._constants, *prepared)  # type: ignore[no-any-return]

    @property
    def ready(self) -> Callable[..., tuple[Tensor, ...]]:
        """``run`` of a program that has run: its main part alone, where that is all there is to run."""
        constants, prologues, main = self._split
        return self.run if constants or prologues else main

    def compile(self, options: dict[str, Any]) -> None:
        """Put the main part through ``torch.compile`` as one region: a break in it is an error, to fall back from."""
        constants, prologues, main = self._split
        self._split = (constants, prologues, _compiled(main, {"fullgraph": True, **options}))

    def replace(self, function: Callable[..., Any], n_state: int) -> None:
        """Run an equal function of the inputs alone, which reads the state by itself."""
        self._split = (None, (), lambda *tensors: function(*tensors[n_state:]))


def _kept(function: Callable[..., Any], watched: list[int]) -> Prologue:
    """Return a function of the watched ones of tensors that returns its last results while these are the same."""
    last: tuple[list[tuple[int, Tensor]], tuple[Tensor, ...]] | None = None

    def call(tensors: tuple[Tensor, ...], constants: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal last
        if _is_captured(tensors[watched[0]]):  # no value can be asked for, and what is made belongs to the CUDA graph
            return tuple(function(*[tensors[i] for i in watched], *constants))
        if last is not None:
            before, outputs = last  # both at once: another thread may be in here
            for i, tensor in before:
                if not same(tensors[i], tensor):
                    break
            else:
                return outputs
        with torch.no_grad():
            outputs = tuple(function(*[tensors[i] for i in watched], *constants))
            # The copies wait for what was made as well: a call on another stream of CUDA may be the next to use it.
            last = [(i, tensors[i].detach().to("cpu", copy=True)) for i in watched], outputs
        return outputs

    return call


def _is_captured(tensor: Tensor) -> bool:
    """Return whether what is computed from a tensor now is recorded for a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Return the function through ``torch.compile``, for arguments that are alike in every call.

    PyTorch's own backend compiles ahead of time, at the first call: that leaves out the look-up and the guards of every
    later one, which cost more than the adjoint of a small image. What they guard, spaces and ``Derived.stale`` have
    seen to.
    """
    lazy: Any = torch.compile(function, **options)
    if options.get("backend", "inductor") != "inductor" or not options["fullgraph"]:
        return lazy  # type: ignore[no-any-return]
    compiled: Any = None

    def run(*tensors: Tensor) -> Any:
        nonlocal compiled
        if compiled is None:
            ahead = lazy.aot_compile((tensors, {}))
            ahead.disable_guard_check()
            compiled = ahead  # now that it is whole: another thread may be in here
        return compiled(*tensors)

    return run


Split = tuple[Callable[..., Any] | None, tuple[Prologue, ...], Callable[..., Any]]


def _split(graph: Graph) -> Split:
    """Return the parts of the graph: constants if any, prologues, and the main one."""
    placeholders = graph.placeholders
    level = _levels(graph)
    results = set(graph.outputs)  # never kept: the caller may write to them
    keep = [
        n for n in graph.body.nodes
        if n.op == "call_function" and level[n] < 2 and n not in results and not _stays(n)
    ]  # fmt: skip
    roots = {n: frozenset(_roots(n, placeholders)) for n in keep}
    small = {
        n for n in keep
        if level[n] == 0 or (sum(placeholders[i].meta["val"].numel() for i in roots[n]) <= _SMALL
        and all(is_kept(n.target, placeholders[i].meta["val"].device) for i in roots[n]))
    }  # fmt: skip
    # Only what the rest uses is kept; tuples of tensors (of convolution_backward, say) through their items.
    frontier = [n for n in keep if n in small and isinstance(n.meta.get("val"), Tensor) and _leaves(n, small)]
    constants = [n for n in frontier if level[n] == 0]
    apart: dict[frozenset[int], list[fx.Node]] = {}  # by what they depend on: each is recomputed for that only
    for n in frontier:
        if level[n] == 1:
            apart.setdefault(roots[n], []).append(n)
    # A constant that only a prologue uses is an input of that as well.
    inner = [n for n in keep if level[n] == 0 and n not in constants and isinstance(n.meta.get("val"), Tensor)]
    known = constants + [n for n in inner if any(level[user] == 1 for user in n.users)]
    prologues = []
    for watched, nodes in apart.items():
        inputs = sorted(watched)
        function = _extract(graph, [*[placeholders[i] for i in inputs], *known], nodes)
        prologues.append(_kept(function, inputs))
    ready = [*known, *[n for nodes in apart.values() for n in nodes]]
    main = _extract(graph, [*placeholders, *ready], graph.outputs)
    return _extract(graph, [], known) if known else None, tuple(prologues), main


def _levels(graph: Graph) -> dict[fx.Node, int]:
    """Return 0 for nodes that depend on nothing, 1 for those that depend on state only, 2 for the rest."""
    inputs = set(graph.inputs)
    level: dict[fx.Node, int] = {}
    for node in graph.body.nodes:
        if node.op == "placeholder":
            level[node] = 2 if node in inputs else 1
        else:
            level[node] = max((level[operand] for operand in node.all_input_nodes), default=0)
    return level


def _stays(node: fx.Node) -> bool:
    """Return whether a node is not worth keeping: a factory, or a view or pointwise op of what is not kept.

    A pointwise op of the state costs about what it costs to see that the state is the same.
    """
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _FACTORIES:
        return bool(node.meta["val"].numel() > 1)
    cheap = packet in VIEWS or torch.Tag.pointwise in getattr(node.target, "tags", ()) or packet is aten.clone
    inputs = node.all_input_nodes
    return cheap and bool(inputs) and all(n.op == "placeholder" or _stays(n) for n in inputs)


def _roots(node: fx.Node, placeholders: list[fx.Node]) -> set[int]:
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in seen:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return {i for i, placeholder in enumerate(placeholders) if placeholder in seen}


def _leaves(node: fx.Node, kept: set[fx.Node]) -> bool:
    return any(user not in kept for user in node.users)


def _extract(graph: Graph, inputs: list[fx.Node], outputs: list[Any]) -> Callable[..., Any]:
    """Return the part of the graph that computes ``outputs`` from ``inputs`` as a function."""
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = part.placeholder(node.name)
        copies[node].meta = node.meta
    needed: set[fx.Node] = set()
    pending = [n for n in outputs if isinstance(n, fx.Node)]
    while pending:
        node = pending.pop()
        if node not in needed and node not in copies:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    for node in graph.body.nodes:
        if node in needed:
            copies[node] = part.node_copy(node, copies.__getitem__)
            if node.args and isinstance(node.args[0], (fx.Node, list)):  # they take no number for a tensor
                copies[node].target = _BUILTIN.get(node.target, node.target)
    part.output(tuple(copies[n] if isinstance(n, fx.Node) else n for n in outputs))
    _in_place(part)
    for node in part.nodes:
        if node.target in _SITED:  # after this, it is no more to be told by its name
            *tensors, site = node.args
            node.target, node.args = node.target(site), tuple(tensors)
    part.lint()
    return compiled(part)


def _in_place(part: fx.Graph) -> None:
    """Have sums and products written to the result of a convolution that nothing else reads.

    Fresh memory costs more than the arithmetic: the system has to map and to clear it.
    """
    own: set[fx.Node] = set()  # results in memory that nothing else looks at
    for node in part.nodes:
        if node.target in _FRESH:
            own.add(node)
        elif node.target in _IN_PLACE and len(node.args) == 2 and not node.kwargs:
            first, second = (operand.meta.get("val") if isinstance(operand, fx.Node) else None for operand in node.args)
            if first is not None and second is not None and node.args[0] in own and len(node.args[0].users) == 1:
                result = node.meta["val"]
                if first.shape == result.shape and first.dtype == second.dtype == result.dtype:
                    node.target = _IN_PLACE[node.target]
                    own.add(node)


def of_state(graph: Graph, node: fx.Node) -> Callable[..., Any]:
    """Return the value of a node that depends on nothing but the state, as a function of that."""
    return _extract(graph, graph.placeholders[: len(graph.state)], [node])
