"""From the graph of a function to that of some rows of its result: what the other rows need is not computed.

The selection of the result is moved towards the inputs and the state, from each operation to its operands, by a table
of rules (``row_rules``, ``row_products``). Where there is no rule, a value is computed whole, and rows of it selected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from adjointlab import compat
from adjointlab.modules import Source
from adjointlab.space.selection import Rows, Selection, window
from adjointlab.transpose.graph.edit import clean, copied, dependents, known
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import has_tag, op_name, packet_of
from adjointlab.transpose.passes.row_products import added_by_index
from adjointlab.transpose.passes.row_rules import RULES, SELECT, Call, Numbers, Plan, Want, leaves_of, pointwise

aten = torch.ops.aten
Key = tuple[int, Rows]  # a dimension, and rows along it


def restrict(graph: Graph, selection: Selection) -> tuple[Graph, tuple[str, ...]]:
    """Return the graph of some rows of the one result, and the names of operations that are computed whole."""
    graph = copied(graph)
    plans, (result,) = _Plans(graph), graph.outputs
    assert result is not None
    plans.wanted[result] = {(selection.dim, selection.rows): None}
    plans.make()
    emission = _Emission(graph, plans)
    for node in list(graph.body.nodes):
        for key in plans.wanted.get(node, ()):
            emission.add(node, key)
    found = emission.made[result, (selection.dim, selection.rows)]
    if selection.drops:
        found = emission.called(aten.squeeze.dim, found, selection.dim)
    graph.body.output_node().update_arg(0, (found,))
    free = dependents(graph.inputs)  # what depends on the state alone may be whole: it is kept
    whole = dict.fromkeys(op_name(node.target) for node in plans.stops if node in free)
    clean(graph.body)
    return Graph(graph.body, emission.state, (*graph.specialized, *emission.specialized)), tuple(whole)


class _Plans:
    """Which rows of which values are wanted, and how each is computed: by a plan, or (None) from the whole value."""

    def __init__(self, graph: Graph) -> None:
        self.wanted: dict[fx.Node, dict[Key, Plan | None]] = {}
        self.stops: list[fx.Node] = []
        self._nodes = list(graph.body.nodes)[-2::-1]
        self._whole = set[fx.Node]()
        self._state = dict(zip(graph.placeholders, graph.state, strict=False))

    def make(self) -> None:
        """Find the plans of all values, the last first: then all that is wanted of a value is known."""
        for node in self._nodes:
            keys = self.wanted.get(node, {})
            if node.op != "call_function" or not (keys or node in self._whole):
                continue
            if node not in self._whole:
                self._plan(node, keys)
            if node in self._whole:
                self._whole.update(node.all_input_nodes)
                self.stops += [node] if keys else []

    def _plan(self, node: fx.Node, keys: dict[Key, Plan | None]) -> None:
        found = {key: self._of(node, key) for key in keys}
        size = node.meta["val"].shape
        if None in found.values() or sum(len(rows) / size[dim] for dim, rows in keys) > 1:
            self._whole.add(node)
            return
        keys.update(found)
        for leaf in (leaf for plan in found.values() for leaf in leaves_of(plan)):
            if isinstance(leaf, Want):
                self.wanted.setdefault(leaf.node, {})[leaf.dim, leaf.rows] = None
            else:
                self._whole.add(leaf)

    def _of(self, node: fx.Node, key: Key) -> Plan | None:
        packet = packet_of(node)
        if packet is aten.index_add:
            return added_by_index(node, *key, self._values)
        if packet in RULES:
            return RULES[packet](node, *key)
        is_pointwise = has_tag(node.target, torch.Tag.pointwise) and isinstance(node.meta["val"], Tensor)
        return pointwise(node, *key) if is_pointwise else None

    def _values(self, node: fx.Node) -> tuple[Source, Tensor] | None:
        source = self._state.get(node)
        return None if source is None else (source, source.read())


class _Emission:
    """New nodes at the end of a graph, for the rows that are wanted of its values."""

    def __init__(self, graph: Graph, plans: _Plans) -> None:
        self.state, self.specialized = graph.state, list[tuple[Source, Tensor]]()
        self.made: dict[tuple[fx.Node, Key], fx.Node] = {}
        self._body, self._wanted = graph.body, plans.wanted
        self._sources = dict(zip(graph.placeholders, graph.state, strict=False))
        self._first, self._end = graph.inputs[0], graph.body.output_node()
        self._fake = self._first.meta["val"].fake_mode
        self._indices: dict[tuple[Rows, torch.device], fx.Node] = {}

    def add(self, node: fx.Node, key: Key) -> None:
        """Add what computes some rows of a value."""
        plan, source = self._wanted[node][key], self._sources.get(node)
        if plan is not None:
            self.made[node, key] = self._built(plan)
        elif source is not None and _is_fixed(source):
            self.made[node, key] = self._state(_part(source, *key))
        else:
            self.made[node, key] = self._selected(node, *key)

    def _built(self, plan: Any) -> Any:
        """Return a plan with nodes in place of its wants and calls."""
        if isinstance(plan, Want):
            return self.made[plan.node, (plan.dim, plan.rows)]
        if isinstance(plan, Numbers):
            self.specialized.append((plan.source, plan.read))
            return self._index(plan.rows, plan.read.device)
        if isinstance(plan, Call):
            args = [self._built(arg) for arg in plan.args]
            options = {name: self._built(value) for name, value in plan.kwargs.items()}
            return self._selected(*args) if plan.target is SELECT else self.called(plan.target, *args, **options)
        return type(plan)(map(self._built, plan)) if isinstance(plan, (list, tuple)) else plan

    def called(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call; what is viewed in another shape is contiguous, as whole values may be, and rows need not be."""
        if target in {aten.view.default, aten._unsafe_view.default} and not args[0].meta["val"].is_contiguous():
            args = self.called(aten.clone.default, args[0], memory_format=torch.contiguous_format), *args[1:]
        values, options = fx.map_arg((args, kwargs), lambda arg: arg.meta["val"])
        with self._fake:
            value = target(*values, **options)
        with self._body.inserting_before(self._end):
            return known(self._body.call_function(target, args, kwargs), value)

    def _selected(self, node: fx.Node, dim: int, rows: Rows) -> fx.Node:
        few = window(rows)
        if few is not None:
            return self.called(aten.slice.Tensor, node, dim, *few)
        return self.called(aten.index_select.default, node, dim, self._index(rows, node.meta["val"].device))

    def _index(self, rows: Rows, device: torch.device) -> fx.Node:
        if (rows, device) not in self._indices:
            index = torch.tensor(rows, device=device)
            self._indices[rows, device] = self._state(Source(lambda: index, "rows", is_private=True))
        return self._indices[rows, device]

    def _state(self, source: Source) -> fx.Node:
        """Add a tensor to the state."""
        value = source.read()
        with self._fake:
            fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        with self._body.inserting_before(self._first):
            node = known(self._body.placeholder(f"rows_{len(self.state)}"), fake)
        self.state = (*self.state, source)
        return node


def _is_fixed(source: Source) -> bool:
    """Return whether nobody asks for gradients in a tensor of the state: a part of it is then a state by itself."""
    value = source.read()
    return not value.requires_grad and not isinstance(value, nn.Parameter)


def _part(source: Source, dim: int, rows: Rows) -> Source:
    """Return where rows of a tensor of the state are read: the same tensor for as long as that is right.

    Evenly spaced rows are a view, which shows what is written to the whole, also through ``.data``. It stays until the
    whole is another tensor, or has other memory. Copied rows stay where nobody but the engine has the whole.
    """
    take = Selection(dim, rows, source.read().shape[dim])
    is_view = window(rows) is not None
    last: tuple[Tensor, int, Tensor] | None = None  # the whole, where it lies in memory, and rows of it

    def read() -> Tensor:
        nonlocal last
        whole, before = source.read(), last
        if not (source.is_private or is_view) or torch.compiler.is_compiling():
            return take(whole)
        # The view keeps the memory of the whole alive: no other tensor gets that meanwhile.
        if before is not None and before[0] is whole and (source.is_private or before[1] == whole.data_ptr()):
            return before[2]
        found = take(whole)
        if compat.plain() and type(whole) is Tensor:
            last = whole, whole.data_ptr(), found
        return found

    return Source(read, f"{take} of {source.name}", source.is_private)
