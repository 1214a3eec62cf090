"""A graph for many calls in a row: memory is taken, and views of it are made, once for all of them.

An operation costs about a microsecond to be called, as much as some thousand entries take; so does each view, and each
result in new memory. What a graph reads and writes at the same places in every call is therefore *bound* before:
views of these are made once, and results are written there. What is left to a call are the operations themselves.

With a compiler, those on whole images are left to it as one function, or as few as others come in between.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import dependents, known, reached
from adjointlab.transpose.graph.ir import Graph, compiled
from adjointlab.transpose.graph.ops import VIEWS, has_tag, packet_of, uncopied
from adjointlab.transpose.passes.fuse_slices import accumulate
from adjointlab.transpose.passes.partition import builtin, extract, shared
from adjointlab.transpose.passes.stencils import moved

aten = torch.ops.aten
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
Margins = dict[
    Any, tuple[tuple[int, int], ...]
]  # by shape, dtype and device: the zeros around memory, in each dimension

# Operations that write a result to memory that is given, and are no slower for that.
_WRITING: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add, aten.sub.Tensor: torch.sub, aten.mul.Tensor: torch.mul, aten.div.Tensor: torch.div,
    aten.neg.default: torch.neg, aten.mm.default: torch.mm, aten.bmm.default: torch.bmm, aten.mv.default: torch.mv,
    aten.addcmul.default: torch.addcmul, aten.cat.default: torch.cat,
}  # fmt: skip
_UPDATES = {aten.add.Tensor, aten.sub.Tensor, aten.addcmul.default}  # which may write to their first operand
_LINE = 64  # bytes
_BY_STRIDES = {aten.view, aten._unsafe_view, aten.reshape}  # views of memory without gaps, and of some other
_VIEWS = VIEWS - _BY_STRIDES - {aten.as_strided, aten.view_as_complex}


@dataclass(frozen=True)
class InRow:
    """A graph for calls in a row. Some outputs of each are inputs of the next: they are *carried*.

    ``rooms`` are fake tensors of the memory that calls write to; ``after`` says of each carried output in which room it
    is, or, by −1 − i, that it is the i-th of the carried inputs. All memory of the kind of one with ``margins`` has
    these; ``moved`` are those of the state that stays and the pieces that are bound with theirs.
    """

    once: Callable[..., Any]  # (*state) → pieces
    bind: Callable[..., Any]  # (*state that stays, *pieces, *carried inputs, *rooms) → what is bound
    run: Callable[..., Any]  # (*state that moves, *other inputs, *places of other outputs, *what is bound) → ()
    rooms: tuple[Tensor, ...]
    after: tuple[int, ...]
    margins: Margins
    moved: tuple[bool, ...]


def in_row(
    graph: Graph, moving: Sequence[int], carried: Sequence[tuple[int, int]], kept: Sequence[int] = (),
    compiler: Compile | None = None,
) -> InRow:  # fmt: skip
    """Return a graph for calls in a row.

    ``moving`` are positions of state that is another tensor at each call; ``carried`` are those of an output and of the
    input that it is next; ``kept`` are those of inputs to be copied to places after those of other outputs. With a
    compiler, the graph is one that ``stencils`` returned.
    """
    state, inputs = graph.placeholders[: len(graph.state)], graph.inputs
    mobile = [state[i] for i in moving]
    shifts = [node for node in graph.body.nodes if node.target is moved]
    varying = dependents([*inputs, *mobile, *shifts])
    outputs = [uncopied(node) for node in graph.outputs]
    alone = [node for node in outputs if node.op == "call_function" and node not in varying]
    pieces = list(dict.fromkeys([*shared(graph, varying), *alone]))
    others = [node for i, node in enumerate(outputs) if i not in dict(carried)] + [inputs[i] for i in kept]
    fixed, before = [*(node for node in state if node not in mobile), *pieces], [inputs[i] for _, i in carried]
    bound = [node for node in shifts if node.args[0] in [*fixed, *before]]
    builder = _Builder([outputs[i] for i, _ in carried], before, others, margins(bound))
    builder.given(fixed, [*mobile, *inputs], {node.args[0] for node in bound})
    needed = reached([*outputs, *others], lambda node: node.all_input_nodes) & varying
    order = [node for node in graph.body.nodes if node.op == "call_function" and node in needed]
    for one_by_one, fused in _stages(order, set(bound)) if compiler else [(order, [])]:
        for node in one_by_one:
            builder.add(node)
        if fused:
            builder.fuse(fused, compiler)
    return builder.built(extract(graph, state, pieces))


def kind(memory: Any) -> tuple[Any, ...]:
    """Return the shape, dtype and device: memory of one kind may replace other memory of it."""
    return tuple(memory.shape), memory.dtype, memory.device


def inside(like: Tensor, margins: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    """Return where something is in memory with margins."""
    return tuple([slice(low, low + n) for (low, _), n in zip(margins, like.shape, strict=True)])


def margins(shifts: Sequence[Any]) -> Margins:
    """Return the margins with which moved sources are views of memory."""
    found: Margins = {}
    for node in shifts:
        source, pads = node.args[0].meta["val"], node.args[1]
        sides = [*zip(pads[-2::-2], pads[::-2], strict=True)]
        known = found.get(kind(source), ((0, 0),) * source.ndim)
        found[kind(source)] = tuple((max(a, c), max(b, d)) for (a, b), (c, d) in zip(known, sides, strict=True))
    return {memory: _aligned(sides, *memory[:2]) for memory, sides in found.items()}


def _aligned(sides: tuple[tuple[int, int], ...], shape: Sequence[int], dtype: torch.dtype) -> tuple[Any, ...]:
    """Return margins that have rows begin, as memory does, where a line of the cache begins, unless rows are short."""
    n, line, (low, high) = shape[-1], max(1, _LINE // dtype.itemsize), sides[-1]
    low = -(-low // line) * line
    return (*sides[:-1], (low, high + -(low + n + high) % line)) if n >= line else sides


def _stages(order: list[fx.Node], bound: set[fx.Node]) -> Iterator[tuple[list[fx.Node], list[fx.Node]]]:
    """Return calls in an order to run them in: some one by one, and some to be fused, again and again."""
    whole = [n for n in order if n not in bound and (n.target is moved or has_tag(n.target, torch.Tag.pointwise))]
    most = max((n.meta["val"].numel() for n in whole), default=0)
    fused = {n for n in whole if 4 * n.meta["val"].numel() >= most}  # to compute fewer takes no longer than to call
    stages: dict[fx.Node, int] = defaultdict(int)
    for node in order:
        stages[node] = max((stages[n] + (n in fused and node not in fused) for n in node.all_input_nodes), default=0)
    for stage in range(max(stages.values(), default=0) + 1):
        now = [node for node in order if stages[node] == stage]
        yield [node for node in now if node not in fused], [node for node in now if node in fused]


class _Builder:
    """Writes a graph as two: ``_bind`` has what is in the same memory at each call, ``_run`` all else."""

    def __init__(self, outputs: list[Any], inputs: list[fx.Node], others: list[Any], margins: Margins) -> None:
        self._outputs, self._inputs, self._others, self._margins = outputs, inputs, others, margins
        self._bind, self._run = fx.Graph(), fx.Graph()
        self._images: dict[fx.Node, fx.Node] = {}  # of nodes, in one of the two
        self._bound: dict[fx.Node, fx.Node] = {}  # from those in _bind that _run reads to what it reads
        self._rooms: list[Tensor] = []
        self._whole: set[fx.Node] = set()  # in _bind: whole memory without gaps
        self._after: dict[int, int] = {}
        self._places: list[fx.Node] = []
        self._written: set[int] = set()  # places that a result is written to by itself
        self._around: dict[fx.Node, fx.Node] = {}  # from nodes to their memory with its margins
        self._moved: tuple[bool, ...] = ()

    def given(self, fixed: list[fx.Node], free: list[fx.Node], moved: set[Any]) -> None:
        """Add what is given once, and what is given to each call; of the first, some are moved."""
        self._moved = tuple([node in moved for node in fixed])
        for node in [*fixed, *self._inputs]:
            self._images[node] = memory = known(self._bind.placeholder(node.name), node.meta["val"])
            if node in self._inputs or node in moved:
                self._around[node] = memory
                self._images[node] = self._inside(memory)
        self._whole.update(self._images[node] for node in self._inputs if kind(node.meta["val"]) not in self._margins)
        for node in free:
            if node not in self._images:
                self._images[node] = known(self._run.placeholder(node.name), node.meta["val"])
        self._places = [self._run.placeholder(f"place_{i}") for i in range(len(self._others))]

    def add(self, node: fx.Node) -> None:
        """Add a call of the graph."""
        source = self._images.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        is_fixed, packet = source is not None and source.graph is self._bind, packet_of(node)
        if node.target is moved and node.args[0] in self._around:
            self._images[node] = self._beside(*node.args[:2])  # type: ignore[arg-type]
        elif node.target is accumulate:
            self._images[node] = room = self._images.get(node) or self._room(node)
            self._sum(room, node.meta["val"], node.args)
        elif is_fixed and (packet in _VIEWS or (packet in _BY_STRIDES and source in self._whole)):
            self._images[node] = self._bind.node_copy(node, self._images.__getitem__)
        elif node.target in _WRITING and isinstance(node.args[0], (fx.Node, list)):
            self._images[node] = room = self._room(node)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._read(self._images[n]))
            self._run.call_function(_WRITING[node.target], args, {**kwargs, "out": self._read(room)})
        else:
            self._images[node] = builtin(self._run.node_copy(node, lambda n: self._read(self._images[n])))

    def fuse(self, nodes: list[fx.Node], compiler: Any) -> None:
        """Add calls of the graph as one function."""
        reads = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in nodes))
        results = [n for n in nodes if n in self._outputs or n in self._others or any(u not in nodes for u in n.users)]
        rooms = [self._room_of_fused(node, nodes) for node in results]
        part, images = fx.Graph(), [self._images[node] for node in reads]
        given = {image: part.placeholder(f"given_{i}") for i, image in enumerate(dict.fromkeys([*images, *rooms]))}
        copies = {node: given[image] for node, image in zip(reads, images, strict=True)}
        for node in nodes:
            copies[node] = part.node_copy(node, copies.__getitem__)
        for node, room in zip(results, rooms, strict=True):
            part.call_method("copy_", (given[room], copies[node]))
            self._images[node] = room
        part.output(())
        self._run.call_function(compiler(compiled(part)), tuple([self._read(image) for image in given]))

    def built(self, once: Callable[..., Any]) -> InRow:
        """Return the two as functions."""
        for i, node in enumerate(self._outputs):
            if node in self._inputs:
                self._after[i] = -1 - self._inputs.index(node)
            elif i not in self._after:
                self._after[i] = len(self._rooms)
                self._copy(self._images[node], self._new(node.meta["val"]))
        for i, (node, place) in enumerate(zip(self._others, self._places, strict=True)):
            if i not in self._written:
                self._copy(self._images[node], place)
        self._bind.output(tuple(self._bound))
        self._run.output(())
        after = tuple([self._after[i] for i in range(len(self._outputs))])
        return InRow(
            once, compiled(self._bind), compiled(self._run), tuple(self._rooms), after, self._margins, self._moved
        )

    def _room_of_fused(self, node: fx.Node, nodes: list[fx.Node]) -> fx.Node:
        """Return where a result of fused calls is to be written: what none but they read, where it is carried on."""
        user: Any = next(iter(node.users), node)
        if len(node.users) == 1 and user.target is accumulate and user.args[0][0] is node:  # which adds other pieces
            whole = tuple([slice(0, n) for n in node.meta["val"].shape])
            if (user.args[0].count(node), *user.args[1][0]) == (1, 0, 1, whole, whole, True):
                self._images[user] = self._room_of_fused(user, nodes)
                return self._images[user]
        own = self._outputs.index(node) if node in self._outputs else -1
        for i, before in enumerate(self._inputs) if own >= 0 else ():
            is_read = before in [*self._outputs, *self._others] or not set(nodes).issuperset(before.users)
            is_others = i != own and before in self._outputs[i].all_input_nodes  # which is added to it, say
            is_taken = -1 - i in self._after.values()
            if not (is_read or is_others or is_taken) and kind(before.meta["val"]) == kind(node.meta["val"]):
                self._after[own] = -1 - i
                return self._images[before]
        return self._room(node)

    def _room(self, node: fx.Node) -> fx.Node:
        """Return where the result of a call is to be written."""
        if self._is_update(node):
            at = self._outputs.index(node)
            self._after[at] = -1 - at
            return self._images[self._inputs[at]]
        if node in self._outputs:
            self._after[self._outputs.index(node)] = len(self._rooms)
        elif self._others.count(node) == 1 and all(_is_end(user) for user in node.users):
            at = self._others.index(node)
            self._written.add(at)
            return self._places[at]
        return self._new(node.meta["val"])

    def _is_update(self, node: fx.Node) -> bool:
        """Return whether a call adds to what is carried, and alone reads it, and is what is carried next."""
        if node.target not in _UPDATES or node not in self._outputs:
            return False
        at = self._outputs.index(node)
        before, first = self._inputs[at], node.args[0]
        passed = [output for output in self._outputs if output in self._inputs]
        return (
            first is before and len(before.users) == 1 and before not in [*node.args[1:], *self._others]
            and -1 - at not in self._after.values()
            and all(getattr(before.meta["val"], of) == getattr(node.meta["val"], of) for of in ("shape", "dtype"))
            and len(set(passed)) == len(passed)
        )  # fmt: skip

    def _new(self, value: Tensor) -> fx.Node:
        room = known(self._bind.placeholder(f"room_{len(self._rooms)}"), value)
        self._rooms.append(value)
        if kind(value) not in self._margins:
            self._whole.add(room)
        return self._inside(room)

    def _inside(self, memory: fx.Node) -> fx.Node:
        """Return memory without its margins."""
        value = memory.meta["val"]
        found = self._margins.get(kind(value))
        return memory if found is None else memory.graph.call_function(operator.getitem, (memory, inside(value, found)))

    def _beside(self, source: fx.Node, pads: Sequence[int]) -> fx.Node:
        """Return a source moved, as a view of its memory with margins."""
        value: Tensor = source.meta["val"]
        sides = zip(self._margins[kind(value)], value.shape, pads[-2::-2], pads[::-2], strict=True)
        index = tuple([slice(low - a, low + n + b) for (low, _), n, a, b in sides])
        return self._bind.call_function(operator.getitem, (self._around[source], index))

    def _read(self, image: fx.Node) -> fx.Node:
        """Return what ``_run`` reads for a node of either."""
        if image.graph is self._run:
            return image
        if image not in self._bound:
            self._bound[image] = self._run.placeholder(f"bound_{len(self._bound)}")
        return self._bound[image]

    def _copy(self, image: fx.Node, to: fx.Node) -> None:
        self._run.call_method("copy_", (self._read(to), self._read(image)))

    def _view(self, image: fx.Node, index: tuple[slice | int, ...], shape: Sequence[int]) -> fx.Node:
        """Return a rectangle of something, as ``_run`` reads it."""
        if list(index) != [slice(0, n) for n in shape]:
            image = image.graph.call_function(operator.getitem, (image, index))
        return self._read(image)

    def _sum(self, room: fx.Node, value: Tensor, arguments: Any) -> None:
        """Add what ``accumulate`` does."""
        sources, layout, shape, bare = arguments
        whole = tuple([slice(0, n) for n in shape])
        dtypes = [node.meta["val"].dtype for node in sources]
        full = [piece for piece in layout if piece[3] == whole and dtypes[piece[0]] == value.dtype]
        first = next((piece for piece in full if piece[1] == 1), None)
        second = next((piece for piece in full if piece is not first), None)

        def parts(piece: Any) -> tuple[fx.Node, fx.Node]:
            number, _, read, write, _ = piece
            source = sources[number]
            return self._view(self._images[source], read, source.meta["val"].shape), self._view(room, write, shape)

        if layout and self._images[sources[0]] is room:  # which has the first piece already
            layout = layout[1:]
        elif first is not None and second is not None:  # at once, which saves a pass
            (one, target), (other, _) = parts(first), parts(second)
            self._run.call_function(torch.add, (one, other), {"alpha": second[1], "out": target})
            layout = [(*piece[:4], False) for piece in layout if piece is not first and piece is not second]
        else:
            for place in bare:
                self._run.call_method("zero_", (self._view(room, place, shape),))
        for piece in layout:
            part, target = parts(piece)
            if not piece[4]:
                self._run.call_method("add_", (target, part), {} if piece[1] == 1 else {"alpha": piece[1]})
            elif piece[1] == 1:
                self._run.call_method("copy_", (target, part))
            else:
                self._run.call_function(torch.mul, (part, piece[1]), {"out": target})


def _is_end(node: fx.Node) -> bool:
    """Return whether a node is where a graph ends, or a copy for that alone."""
    return node.op == "output" or (uncopied(node) is not node and all(user.op == "output" for user in node.users))
