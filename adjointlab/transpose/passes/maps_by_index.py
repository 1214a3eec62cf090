"""Operations that read or add by index, as products with sparse matrices.

A *region* is a part of a graph, connected by values that depend on the input, whose coefficients do not. It becomes
one sparse matrix, which is made again when the state that it depends on changes. Interpolations and pools become
products with one small matrix for each dimension.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from adjointlab.modules import read_all
from adjointlab.numerics import same
from adjointlab.transpose.graph.edit import clean, dependents, known, rewritten, zeros
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import op_name, packet_of
from adjointlab.transpose.kernels import separable, sparse_map
from adjointlab.transpose.kernels.select import MapChooser, Run
from adjointlab.transpose.passes.along import along_one
from adjointlab.transpose.passes.partition import HasNoPiecesError, extract, roots_of, value_of_state
from adjointlab.transpose.passes.rows import NotByIndexError, TooLargeError
from adjointlab.transpose.passes.sparse_rows import RULES, Sparse

aten = torch.ops.aten

# Operations for whose sake a region is made a matrix: the others cost a pass over memory by themselves.
_BY_INDEX = {
    aten.grid_sampler_2d, aten.grid_sampler_3d, aten.grid_sampler_2d_backward, aten.grid_sampler_3d_backward,
    aten.index, aten.gather, aten.index_put, aten.scatter_add, aten.index_add, aten.index_select, aten.take,
    aten.embedding, aten.embedding_dense_backward, aten.im2col, aten.col2im,
}  # fmt: skip
_SAMPLED_BACK = {aten.grid_sampler_2d_backward, aten.grid_sampler_3d_backward}
_MANY = 1 << 16  # entries that are read where they are: to compare them at each call takes longer
_LONG = 4096  # terms of a sum, which a product adds one by one
_DTYPES = {torch.float32, torch.float64, torch.complex64, torch.complex128}


class Batch(NamedTuple):
    """The leading or trailing dimensions for each place of which a region does the same."""

    dims: int
    trails: bool
    ends: bool  # whether they are the last of the result


_ALONE = Batch(0, trails=False, ends=False)


@dataclass(frozen=True)
class Region:
    """Nodes that compute one value from one that depends on the input and others that do not."""

    nodes: list[fx.Node]
    source: fx.Node
    coefficients: list[fx.Node]
    result: fx.Node
    is_naive: bool = True  # whether long sums are to stay PyTorch's: those of sparse matrices are no better

    @property
    def name(self) -> str:
        """The names of the operations that numbers are read or added by."""
        return ", ".join(dict.fromkeys(op_name(n.target) for n in self.nodes if packet_of(n) in _BY_INDEX))

    def function(self, graph: Graph) -> Callable[..., Any]:
        """Return the region as a function ``(source, *coefficients) → result``."""
        run = extract(graph, [self.source, *self.coefficients], [self.result])
        return lambda *tensors: run(*tensors)[0]


def maps_by_index(
    graph: Graph, choose: MapChooser, most_entries: Callable[[Tensor], int] = sparse_map.most_entries
) -> Graph:
    """Return an equal graph in which operations by index are products with sparse matrices, where these are faster."""
    shaped = {aten.new_zeros, aten.zeros_like}  # like what is read for its shape only
    mapped = rewritten(graph, lambda body, node: zeros(body, node.meta["val"]) if packet_of(node) in shaped else None)
    dependent = dependents(mapped.inputs)
    for node in list(mapped.body.nodes):
        if node in dependent and packet_of(node) in separable.SEPARABLE and _suits(node):
            _factored(mapped, node, choose, most_entries)
    clean(mapped.body)  # what was replaced is no part of a region
    along = parts(mapped)
    for region in reversed(along):  # what a later one reads is still there
        _mapped(mapped, region, choose, most_entries)
    clean(mapped.body)
    for region in regions(mapped):
        if region not in along:
            _mapped(mapped, region, choose, most_entries)
    clean(mapped.body)
    return mapped


def _suits(node: fx.Node) -> bool:
    """Return whether a node's value is one tensor of a dtype that there are products for, and has entries."""
    value: Any = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in _DTYPES and value.numel() > 0


def _random(value: Tensor) -> Tensor:
    generator = torch.Generator(value.device).manual_seed(0)
    return torch.randn(value.shape, dtype=value.dtype, device=value.device, generator=generator)


def _factored(graph: Graph, node: fx.Node, choose: MapChooser, most_entries: Callable[[Tensor], int]) -> None:
    """Replace an interpolation or a pool by products along its dimensions, where these are faster."""
    source, target = node.args[0], node.meta["val"]
    if node.kwargs or not isinstance(source, fx.Node) or not _suits(source):
        return
    value = source.meta["val"]
    if target.device.type == "meta" or value.numel() + target.numel() > most_entries(value):
        return
    shaped = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args[1:]]
    rest = _real(shaped)
    x = _random(value)

    def ways() -> dict[Run, Callable[[], object]]:
        parts = separable.factors(packet_of(node), value, shaped)
        found = separable.ways(parts, value.shape, target.shape) if parts else []
        return {run: functools.partial(run, x) for run in found}

    with torch.no_grad():
        run = choose(lambda: node.target(x, *rest), ways, x.device, lambda: None)  # type: ignore[operator]
    if run is not None:
        account = f"{run.__name__}, a small matrix along each dimension, for {op_name(node.target)}"
        _put(graph, node, run, source, account=account)


def _real(args: Sequence[Any]) -> list[Any]:
    """Return arguments with zeros for the operand of which a transpose reads the shape only."""
    return [torch.zeros((), dtype=a.dtype, device=a.device).expand(a.shape) if isinstance(a, Tensor) else a
            for a in args]  # fmt: skip


def _put(graph: Graph, node: fx.Node, run: Run, *args: fx.Node, account: str, entries: int = 0) -> None:
    """Put a call in the place of a node; ``entries`` are those that are multiplied, where that is known."""
    with graph.body.inserting_before(node):
        product = known(graph.body.call_function(run, args), node.meta["val"])
    product.meta.update({"account": account} | ({"entries": entries} if entries else {}))
    node.replace_all_uses_with(product)


def _mapped(graph: Graph, region: Region, choose: MapChooser, most_entries: Callable[[Tensor], int]) -> None:
    """Replace a region by a product with its matrix, where that is faster."""
    value, target = region.source.meta["val"], region.result.meta["val"]
    if value.device.type == "meta":
        return
    state, watched = read_all(graph.state), _watched(graph, region)
    own = sum(t.numel() for t, node in zip(state, graph.placeholders, strict=False) if node in watched)
    limit = max(most_entries(value), 2 * own)
    if value.numel() + target.numel() > limit:
        said = f"its input and result have more than {limit:,} entries"
        region.result.meta["account"] = f"native, for {region.name}: {said}"
        return
    private = {n for n, source in zip(graph.placeholders, graph.state, strict=False) if source.is_private}
    region = replace(region, is_naive=watched.isdisjoint(private))
    function = region.function(graph)
    with torch.no_grad():
        values = tuple(value_of_state(graph, node)(*state)[0] for node in region.coefficients)
    x, batch, said = _random(value), _ALONE, "not clearly faster than PyTorch's own"
    ready: list[Any] = []
    read: int | None = None  # the coefficient that is the entries of the matrix, in their order

    def ways() -> dict[Run, Callable[[], object]]:
        nonlocal batch, said, read
        try:
            batch, matrix = _made(function, region, values, limit)
        except NotByIndexError as error:
            said = str(error)
            return {}
        read = next((i for i, v in enumerate(values) if _is_read(matrix, v)), None)
        pairs = zip(values, region.coefficients, strict=True)
        before = [v if n in private else v.clone() for v, n in _without(read, pairs)]
        ready.append((before, matrix if read is None else sparse_map.without_entries(matrix)))

        count = value.numel() // matrix.shape[1]
        found = sparse_map.ways(target.shape, count, trails=batch.trails, ends=batch.ends)
        return {run: functools.partial(run, x, matrix) for run in found}

    with torch.no_grad():
        run = choose(
            lambda: function(x, *values), ways, x.device, lambda: _are_same(_without(read, values), ready[0][0])
        )
    if run is None:
        if ready or "memory" in said:
            region.result.meta["account"] = f"native, for {region.name}: a sparse map is {said}"
        return
    account = f"{_described(ready[0][1])}, for {region.name}"

    def make(*given: Tensor) -> Tensor:
        if read is None:
            return _matrix(function, region, given, batch, limit)
        stand_in = torch.ones_like(values[read])
        matrix = _matrix(function, region, (*given[:read], stand_in, *given[read:]), batch, limit)
        if not _is_read(matrix, stand_in):
            raise NotByIndexError("entries are in another order")
        return sparse_map.without_entries(matrix)

    with graph.body.inserting_before(region.result):
        coefficients = tuple(_without(read, region.coefficients))
        kept = known(graph.body.call_function(_prepack(make, ready), coefficients), target)
        if read is not None:
            kept = known(graph.body.call_function(sparse_map.with_entries, (kept, region.coefficients[read])), target)
    entries = ready[0][1].values().numel() * (value.numel() // ready[0][1].shape[1])
    _put(graph, region.result, run, region.source, kept, account=account, entries=entries)


def _is_read(matrix: Tensor, coefficient: Tensor) -> bool:
    """Return whether the entries of a matrix are those of a coefficient where they are, and worth to be left there."""
    entries = matrix.values()
    is_same = entries.data_ptr() == coefficient.data_ptr() and entries.numel() == coefficient.numel()
    return is_same and entries.dtype is coefficient.dtype and entries.numel() > _MANY


def _without(i: int | None, items: Iterable[Any]) -> list[Any]:
    return [item for j, item in enumerate(items) if j != i]


def _watched(graph: Graph, region: Region) -> set[fx.Node]:
    """Return the inputs that the coefficients of a region depend on."""
    roots = roots_of(graph)
    return {root for node in region.coefficients for root in roots[node]}


def _described(matrix: Tensor) -> str:
    (rows, columns), entries = matrix.shape, matrix.values().numel()
    size = entries * (matrix.dtype.itemsize + 4) / 1e6
    return f"sparse map {rows:,} × {columns:,} with {entries:,} entries ({size:.1f} MB)"


def _prepack(make: Callable[..., Tensor], ready: list[Any]) -> Callable[..., Tensor]:
    """Return the function of coefficients to their matrix: at first, of those that the choice was made with."""

    def prepack_sparse_map(*values: Tensor) -> Tensor:
        made = ready[:]
        ready.clear()
        for before, matrix in made:
            if _are_same(values, before):
                return matrix  # type: ignore[no-any-return]
        try:
            return make(*values)
        except NotByIndexError as error:  # what was the same along the batch, say, is not any more
            raise HasNoPiecesError(str(error)) from error

    prepack_sparse_map.is_dear = True  # type: ignore[attr-defined]
    return prepack_sparse_map


def _are_same(values: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
    return all(a is b or same(a, b) for a, b in zip(values, before, strict=True))


def _made(function: Any, region: Region, values: Sequence[Tensor], limit: int) -> tuple[Batch, Tensor]:
    """Return which dimensions a region leaves alone, and its matrix for each place of these."""
    for batch in _shared(region.source.meta["val"].shape, region.result.meta["val"].shape):
        try:
            return batch, _matrix(function, region, values, batch, limit)
        except TooLargeError:
            raise
        except NotByIndexError:
            continue
    return _ALONE, _matrix(function, region, values, _ALONE, limit)


def _shared(source: Sequence[int], result: Sequence[int]) -> list[Batch]:
    """Return the batches that a region may have, the largest first; dimensions of size one change nothing."""
    found = []
    most = min(len(source), len(result)) - (len(source) == len(result))  # it is not all batch
    for trails, ends in ((False, False), (True, True), (False, True), (True, False)):
        for k in range(most, 0, -1):
            sides = [
                shape[len(shape) - k :] if last else shape[:k] for shape, last in ((source, trails), (result, ends))
            ]
            if sides[0] == sides[1] and sides[0][0 if trails else -1] > 1:
                found.append(Batch(k, trails, ends))
    return found


def _matrix(function: Any, region: Region, values: Sequence[Tensor], batch: Batch, limit: int) -> Tensor:
    x = region.source.meta["val"]
    with torch.no_grad():
        like = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        one = Sparse.identity(like, batch.dims, limit, trails=batch.trails)
        try:
            found = function(one, *values)
        # Torch's own of an operation with arguments that it does not take from such a tensor.
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise NotByIndexError(f"not composed ({type(error).__name__}: {error})") from error
        if not isinstance(found, Sparse) or found.trails is not batch.ends:
            raise NotByIndexError("not a function of the input for each place of the batch")
        rows = found.rows.smaller(one.core)
        if region.is_naive and bool((rows.counts > _LONG).any()):
            raise NotByIndexError(f"less accurate: sums of more than {_LONG:,} terms")
    entries = rows.value.clone() if len(rows.value) <= _MANY else rows.value  # which may be a coefficient
    return sparse_map.csr(rows.start, rows.column, entries, one.core)


def parts(graph: Graph) -> list[Region]:
    """Return the parts of a graph that act by index along one dimension."""
    dependent = dependents(graph.inputs)
    nodes = [node for node in graph.body.nodes if node in dependent and _is_allowed(node)]
    seeds = {node for node in nodes if packet_of(node) in _BY_INDEX}
    return along_one(nodes, seeds, dependent, lambda group: _region(group, dependent)) if seeds else []


def regions(graph: Graph) -> list[Region]:
    """Return the largest regions of a graph that may be maps by index.

    Where parts of several inputs are added, these are regions of their own.
    """
    dependent = dependents(graph.inputs)
    nodes = [node for node in graph.body.nodes if node in dependent and _is_allowed(node)]
    found: list[Region | None] = []
    for group in _connected(nodes):
        whole = _region(group, dependent)
        parts = [group] if whole is not None else _connected([n for n in group if not _adds(n, dependent)])
        found += [whole] if whole is not None else [_region(part, dependent) for part in parts]
    return [region for region in found if region is not None]


def _connected(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Return groups of nodes that read one another, in their order, each of numbers of one dtype."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        group = [node]
        for operand in node.all_input_nodes:
            if operand in groups and groups[operand] is not group and _dtype(operand) is _dtype(node):
                group = [*groups[operand], *group]
                for each in group:
                    groups[each] = group
        for each in group:
            groups[each] = group
    order = {node: i for i, node in enumerate(nodes)}
    return [sorted(group, key=order.__getitem__) for group in {id(group): group for group in groups.values()}.values()]


def _region(group: list[fx.Node], dependent: set[fx.Node]) -> Region | None:
    inside = set(group)
    operands = dict.fromkeys(n for node in group for n in node.all_input_nodes if n not in inside)
    sources = [n for n in operands if n in dependent]
    exits = [node for node in group if any(user not in inside for user in node.users)]
    if len(sources) != 1 or len(exits) != 1 or _BY_INDEX.isdisjoint(map(packet_of, group)):
        return None
    fits = _suits(sources[0]) and _dtype(sources[0]) is _dtype(exits[0])
    return Region(group, sources[0], [n for n in operands if n not in dependent], exits[0]) if fits else None


def _dtype(node: fx.Node) -> torch.dtype:
    value = node.meta["val"]
    values = value if isinstance(value, (list, tuple)) else [value]
    return next(v.dtype for v in values if isinstance(v, Tensor))


def _adds(node: fx.Node, dependent: set[fx.Node]) -> bool:
    return packet_of(node) in {aten.add, aten.sub} and dependent.issuperset(node.args[:2])


def _is_allowed(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        several, i = node.args
        return bool(i == 0 and packet_of(several) in _SAMPLED_BACK and _suits(node))  # type: ignore[arg-type]
    if packet_of(node) in _SAMPLED_BACK:
        return len(node.users) == 1
    return bool(packet_of(node) in RULES or packet_of(node) in _BY_INDEX) and _suits(node)
