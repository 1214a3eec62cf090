"""A map as one graph of PyTorch's own operations, with the kernels that were chosen, for one size or for all.

The map is run once under a trace, with its programs as they are. Of free sizes, it is traced at two of each: whatever
differs between the graphs is a number that follows from the sizes, ``Σ c_S Π_{i∈S} bᵢ``.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab import compat
from adjointlab.errors import NotExportableError
from adjointlab.numerics import same
from adjointlab.transpose.dispatch import STAND_IN, Transposition
from adjointlab.transpose.frontend.vjp import Tensors
from adjointlab.transpose.graph.ir import compiled
from adjointlab.transpose.graph.ops import VIEWS, is_mutable, packet_of
from adjointlab.transpose.kernels.select import MapChooser, Run, Timed
from adjointlab.transpose.runtime.derivation import Derivation
from adjointlab.transpose.stand_ins import StandingIn

aten = torch.ops.aten
SIZES = (2, 3)  # at which a map is traced: much code treats a size of one in a way of its own

# -- the programs that are traced --------------------------------------------------------------------------------------


class Fixed:
    """Derivations with the state as it is now, by source and size; with ``is_free``, the same programs at all sizes."""

    def __init__(self, *, is_free: bool) -> None:
        self._is_free = is_free
        self._known: dict[tuple[Transposition, tuple[int, ...]], tuple[Derivation, Tensors]] = {}
        self._chosen: dict[Transposition, list[str | None]] = {}

    def __call__(self, source: Transposition, batch: tuple[int, ...]) -> tuple[Derivation, Tensors]:
        """Return the derivation of a source for a size, and its state."""
        if (source, batch) not in self._known:
            token = STAND_IN.set(None)
            try:
                found = source.fixed(batch, self._rule(source, source.options.choose_map) if self._is_free else None)
            finally:
                STAND_IN.reset(token)
            if found[0].user is not None:
                why = found[0].explanation.reason
                remedy = "build it with engine='auto'" if source.options.requested == "eager" else "see A.explain()"
                raise NotExportableError(
                    f"expected a map with a graph, got one that runs Python code of its own ({why}): {remedy}"
                )
            self._known[source, batch] = found
        return self._known[source, batch]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have operators run these programs within a block."""
        token = STAND_IN.set(self)
        try:
            with torch.no_grad():
                yield
        finally:
            STAND_IN.reset(token)

    def _rule(self, source: Transposition, rule: MapChooser | None) -> MapChooser:
        """Return a rule for maps by index that chooses at the first size, and the same ways at all others."""
        first = source not in self._chosen
        chosen = self._chosen.setdefault(source, [])
        rest = iter(chosen)

        def choose(
            native: Timed, others: Callable[[], dict[Run, Timed]], device: torch.device, beside: Timed
        ) -> Run | None:
            if first:
                fitting = lambda: {run: timed for run, timed in others().items() if not _is_loop(run)}  # noqa: E731
                found = None if rule is None else rule(native, fitting, device, beside)
                chosen.append(None if found is None else found.__name__)
                return found
            name = next(rest, None)
            return None if name is None else next((run for run in others() if run.__name__ == name), None)

        return choose


def _is_loop(run: Run) -> bool:
    return run.__name__.endswith("_each")


# -- graphs ------------------------------------------------------------------------------------------------------------


def traced(function: Callable[[Tensors], Tensors], leaves: Tensors, fixed: Fixed) -> fx.GraphModule:
    """Return a function of leaves as a graph, for tensors of their sizes, with its constants."""

    def run(*given: Tensor) -> Tensors:
        with StandingIn():  # type: ignore[no-untyped-call]
            return tuple(function(given))

    with fixed.in_use(), compat.sources_forgotten():
        function(leaves)  # what is derived at a first call is no part of a trace
        try:
            found: fx.GraphModule = compat.make_fx(run)(*leaves)
        except RuntimeError as error:  # as of a function that is not PyTorch's, or that reads numbers off tensors
            raise NotExportableError(
                f"expected a map that can be traced, but: {str(error).strip().splitlines()[0]}"
            ) from error
    depend = _dependent(found.graph)
    _fold(found, depend)
    _with_tensors(found)
    if found.graph.output_node() not in depend:
        raise NotExportableError(
            "expected a map that computes with PyTorch's operations, got one whose result does not come from its "
            "input by any of them: it is a constant, or goes through NumPy or another library"
        )
    return found


def _dependent(graph: fx.Graph) -> set[fx.Node]:
    """Return the inputs of a graph, and what is computed from them: memory that is written to, too."""
    depend, memory = set[fx.Node](), set[fx.Node]()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in depend or _owner(n) in memory for n in node.all_input_nodes):
            depend.add(node)
            if is_mutable(node.target):
                memory.add(_owner(node.args[0]))
    return depend | memory


def _owner(node: Any) -> fx.Node:
    """Return the node whose memory a node shows."""
    while isinstance(node.args[0] if node.args else None, fx.Node) and _shows(node):
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def _shows(node: fx.Node) -> bool:
    return is_mutable(node.target) or packet_of(node) in VIEWS


def _fold(module: fx.GraphModule, depend: set[fx.Node]) -> None:
    """Compute what constants alone give, where that takes no more memory than they do; drop what nothing reads."""
    graph, values = module.graph, dict[fx.Node, Any]()
    written = {_owner(node.args[0]) for node in graph.nodes if is_mutable(node.target)}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            values[node] = getattr(module, str(node.target))
        given = node.all_input_nodes
        if node.op != "call_function" or not given or not all(n in values for n in given) or node in depend:
            continue
        if _owner(node) in written:
            continue
        if is_mutable(node.target) or not hasattr(node.target, "_schema"):  # an item of several results
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        found = node.target(*args, **kwargs)
        if isinstance(found, Tensor) and found.numel() <= sum(values[n].numel() for n in given):
            values[node] = found
            name = f"_folded_{len(values)}"
            setattr(module, name, found)
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.create_node("get_attr", name))
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in {"call_function", "get_attr"} and not is_mutable(node.target):
            graph.erase_node(node)


def _with_tensors(module: fx.GraphModule) -> None:
    """Have complex factors be tensors: files of torch 2.6 have no place for complex numbers."""
    products = {aten.mul.Scalar, aten.mul.Tensor}
    for node in list(module.graph.nodes):
        if node.target in products and isinstance(node.args[1], complex):
            name = f"_factor_{node.name}"
            setattr(
                module, name, torch.tensor(node.args[1], dtype=node.meta["val"].dtype, device=node.meta["val"].device)
            )
            with module.graph.inserting_before(node):
                factor = module.graph.create_node("get_attr", name)
            node.target, node.args = aten.mul.Tensor, (node.args[0], factor)


def reads_memory(module: fx.GraphModule) -> bool:
    """Return whether a graph reads tensors by places in their memory, and not by indices."""
    return any(packet_of(node) is aten.as_strided for node in module.graph.nodes)


def corners(k: int) -> list[tuple[int, ...]]:
    """Return the sizes of k free dimensions at which a map is traced."""
    return list(itertools.product(SIZES, repeat=k))


def lifted(module: fx.GraphModule) -> tuple[Callable[..., Tensors], list[Tensor]]:
    """Return a graph as a function of its constants and inputs, and the constants."""
    made = fx.Graph()
    nodes = [node for node in module.graph.nodes if node.op == "get_attr"]
    copies = {node: made.placeholder(node.name) for node in nodes}
    for node in module.graph.nodes:
        if node not in copies:
            copies[node] = made.node_copy(node, copies.__getitem__)
    return compiled(made), [_alone(getattr(module, str(node.target)).detach()) for node in nodes]


def _alone(tensor: Tensor) -> Tensor:
    """Return a tensor that is all of its memory, in the usual order: files have whole tensors."""
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def unified(modules: Sequence[fx.GraphModule], k: int) -> fx.GraphModule:
    """Return the graphs of a map at the :func:`corners` of k free dimensions as one for all sizes of these."""
    graphs = [module.graph for module in modules]
    if len({len(graph.nodes) for graph in graphs}) > 1:
        raise NotExportableError(f"{_FREE}, got other operations at another size: {_ONE_EACH}")
    made, root = fx.Graph(), torch.nn.Module()
    copies: dict[Any, Any] = {}  # of the nodes of all graphs
    sizes: list[Any] = []
    for nodes in zip(*[graph.nodes for graph in graphs], strict=True):
        node = nodes[0]
        if len({(n.op, n.target if n.op == "call_function" else n.op) for n in nodes}) > 1:
            raise NotExportableError(f"{_FREE}, got other operations at another size: {_ONE_EACH}")
        if node.op != "placeholder" and not sizes:
            source = next(iter(made.nodes))
            sizes += [made.call_function(aten.sym_size.int, (source, dim)) for dim in range(k)]
        if node.op == "get_attr":
            values = [getattr(module, n.target) for module, n in zip(modules, nodes, strict=True)]
            held = made.get_attr(node.target)
            shape = [_merged(made, sizes, copies, each) for each in zip(*[v.shape for v in values], strict=True)]
            root.register_buffer(node.target, _common(values))
            if values[0].shape != values[-1].shape:
                held = made.call_function(aten.expand.default, (held, shape))
            copies |= dict.fromkeys(nodes, held)
            continue
        args, kwargs = (_merged(made, sizes, copies, parts) for parts in zip(*[(n.args, n.kwargs) for n in nodes],
                                                                             strict=True))  # fmt: skip
        copies |= dict.fromkeys(nodes, made.create_node(node.op, node.target, args, kwargs, node.name))
    made.lint()
    return fx.GraphModule(root, made)


_FREE = "expected a map that does the same for every batch size"
_ONE_EACH = "export one program for each size, without batch="


def _common(values: Sequence[Tensor]) -> Tensor:
    """Return a constant of all sizes, with one entry where it has as many as there are, all of them equal."""
    first = values[0]
    free = [d for d in range(first.ndim) if any(v.shape[d] != first.shape[d] for v in values)]
    found = [functools.reduce(lambda v, d: v.narrow(d, 0, 1), free, value) for value in values]
    repeated = all(same(one.expand_as(value).contiguous(), value) for one, value in zip(found, values, strict=True))
    if not repeated or not all(same(one, found[0]) for one in found[1:]):
        raise NotExportableError(f"{_FREE}, but it keeps a tensor for each of them: {_ONE_EACH}")
    return found[0]


def _merged(graph: fx.Graph, sizes: list[Any], copies: dict[Any, Any], parts: Sequence[Any]) -> Any:
    """Return the arguments of one node at all corners as arguments for all sizes."""
    part = parts[0]
    if isinstance(part, fx.Node) and len({copies.get(each) for each in parts}) == 1:
        return copies[part]
    if isinstance(part, (list, tuple)) and all(len(each) == len(part) for each in parts):
        return type(part)([_merged(graph, sizes, copies, each) for each in zip(*parts, strict=True)])
    if isinstance(part, dict):
        return {key: _merged(graph, sizes, copies, [each[key] for each in parts]) for key in part}
    if all(type(each) is type(part) and each == part for each in parts):
        return part
    if all(type(each) is int for each in parts):
        return _number(graph, sizes, list(parts))
    raise NotExportableError(f"{_FREE}, got {part} at one size and {parts[-1]} at another: {_ONE_EACH}")


def _number(graph: fx.Graph, sizes: list[Any], values: list[int]) -> Any:
    """Return a number that is linear in each size, given at the corners, as a number or a node."""
    if len(set(values)) == 1:
        return values[0]
    half = len(values) // 2
    low, high = SIZES
    slope = [(b - a) // (high - low) for a, b in zip(values[:half], values[half:], strict=True)]
    start = [a - low * s for a, s in zip(values[:half], slope, strict=True)]
    at, by = _number(graph, sizes[1:], start), _number(graph, sizes[1:], slope)
    term = sizes[0] if by == 1 else 0 if by == 0 else graph.call_function(operator.mul, (sizes[0], by))
    return term if at == 0 else at if term == 0 else graph.call_function(operator.add, (term, at))
