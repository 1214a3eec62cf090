"""How rows of a result are computed from rows of the operands: a table of rules, one for each kind of operation.

A rule takes a node, a dimension of its value and the rows along it that are wanted. It returns a *plan*: the call that
computes them, with ``Want`` in place of each operand of which rows suffice. Rows may come in any order, and several
times. Where a rule returns None, or there is none, the value is computed whole.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.modules import Source
from adjointlab.space.selection import Rows
from adjointlab.transpose.graph.ops import LIKE, arguments, op_name, packet_of, window

aten = torch.ops.aten


@dataclass(frozen=True)
class Want:
    """Rows of a value along a dimension."""

    node: fx.Node
    dim: int
    rows: Rows


@dataclass(frozen=True)
class Call:
    """A call, with wants and other calls among its arguments."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Numbers:
    """Integers as a tensor; ``read`` is what a tensor of the state held as they were made from it."""

    rows: Rows
    source: Source
    read: Tensor


SELECT = "select rows"  # the target of a call that takes rows of a value: (value, dim, rows)
Plan = Want | Call | fx.Node
Values = Callable[[Any], "tuple[Source, Tensor] | None"]  # of a node of the state: where it is read, and what it holds
Rule = Callable[[Any, int, Rows], "Plan | None"]
RULES: dict[Any, Rule] = {}


def leaves_of(value: Any) -> Iterator[Want | fx.Node]:
    """Yield the values that a plan reads."""
    if isinstance(value, (Want, fx.Node)):
        yield value
    parts = value if isinstance(value, (list, tuple)) else ()
    for part in (*value.args, *value.kwargs.values()) if isinstance(value, Call) else parts:
        yield from leaves_of(part)


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule of some operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a value."""
    return tuple(node.meta["val"].shape)


def want(node: Any, dim: int, rows: Sequence[int]) -> Any:
    """Return a want for rows of a value; the value itself where these are all of it."""
    rows = tuple(rows)
    return node if rows == tuple(range(shape(node)[dim])) else Want(node, dim, rows)


def same(node: Any, dim: int, rows: Rows, *, at: int | None = None) -> Call:
    """Return the same call on rows of the first operand."""
    return Call(node.target, (want(node.args[0], dim if at is None else at, rows), *node.args[1:]), node.kwargs)


def replaced(items: Sequence[Any], at: int, item: Any) -> list[Any]:
    """Return a list with another item at one place."""
    return [*items[:at], item, *items[at + 1 :]]


def broadcast(operand: Any, result: tuple[int, ...], dim: int, rows: Rows) -> Any:
    """Return the rows of an operand that is broadcast to the shape of a result; the whole of it where it has one."""
    at = dim - len(result) + operand.meta["val"].ndim
    return want(operand, at, rows) if at >= 0 and shape(operand)[at] == result[dim] else operand


def pointwise(node: Any, dim: int, rows: Rows) -> Plan:
    """Return the plan of an operation that does the same at each place, on operands that are broadcast."""
    result = shape(node)

    def visit(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return broadcast(value, result, dim, rows)
        return type(value)(map(visit, value)) if isinstance(value, (list, tuple)) else value

    args, kwargs = tuple(map(visit, node.args)), {name: visit(value) for name, value in node.kwargs.items()}
    return Call(node.target, args, kwargs)


for _target in (aten._conj, aten._neg_view, aten.detach, aten.alias, aten.clone, aten._to_copy, aten.copy, aten.complex,
                aten.masked_fill, aten.where, aten.lift_fresh_copy):  # fmt: skip
    RULES[_target] = pointwise


@rule(aten.view_as_complex)
def _view_as_complex(node: Any, dim: int, rows: Rows) -> Plan:
    return same(node, dim, rows)


@rule(aten.view_as_real)
def _view_as_real(node: Any, dim: int, rows: Rows) -> Plan | None:
    return same(node, dim, rows) if dim < len(shape(node)) - 1 else None


# ------------------------------------------------------------------------------------------ factories


@rule(*LIKE - {aten.fill, aten.zero}, aten.zeros, aten.ones, aten.full, aten.empty)
def _filled(node: Any, dim: int, rows: Rows) -> Plan | None:
    name = op_name(node.target).removeprefix("new_").removesuffix("_like")
    given = arguments(node).get("fill_value")
    fill = {"zeros": 0, "ones": 1, "empty": 0}.get(name, given if name == "full" else None)
    if fill is None or isinstance(fill, fx.Node):
        return None
    value = node.meta["val"]
    size = replaced(shape(node), dim, len(rows))
    return Call(aten.full.default, (size, fill), {"dtype": value.dtype, "device": value.device})


# ------------------------------------------------------------------------------------------ views


@rule(aten.unsqueeze)
def _unsqueeze(node: Any, dim: int, rows: Rows) -> Plan | None:
    new = node.args[1] % len(shape(node))
    return None if dim == new else same(node, dim, rows, at=dim - (dim > new))


@rule(aten.squeeze)
def _squeeze(node: Any, dim: int, rows: Rows) -> Plan:
    size = shape(node.args[0])
    given = node.args[1] if len(node.args) > 1 else range(len(size))
    given = [given] if isinstance(given, int) else given
    gone = {d % len(size) for d in given if size[d] == 1}
    at = [d for d in range(len(size)) if d not in gone][dim]
    return Call(aten.squeeze.dims, (want(node.args[0], at, rows), sorted(gone)))


@rule(aten.permute)
def _permute(node: Any, dim: int, rows: Rows) -> Plan:
    return same(node, dim, rows, at=node.args[1][dim] % len(shape(node)))


@rule(aten.transpose, aten.t)
def _transpose(node: Any, dim: int, rows: Rows) -> Plan:
    n = len(shape(node))
    a, b = [d % n for d in node.args[1:]] or (0, n - 1)
    return same(node, dim, rows, at={a: b, b: a}.get(dim, dim))


@rule(aten.select)
def _select(node: Any, dim: int, rows: Rows) -> Plan:
    gone = node.args[1] % len(shape(node.args[0]))
    return same(node, dim, rows, at=dim + (dim >= gone))


@rule(aten.slice)
def _slice(node: Any, dim: int, rows: Rows) -> Plan:
    x, *where = node.args
    along, *taken = window(shape(x), *where)
    if along != dim:
        return same(node, dim, rows)
    return want(x, dim, [range(*taken)[row] for row in rows])  # type: ignore[no-any-return]


@rule(aten.expand)
def _expand(node: Any, dim: int, rows: Rows) -> Plan:
    size = replaced(shape(node), dim, len(rows))
    return Call(node.target, (broadcast(node.args[0], shape(node), dim, rows), size))


@rule(aten.repeat)
def _repeat(node: Any, dim: int, rows: Rows) -> Plan:
    x, times = node.args
    at = dim - len(times) + len(shape(x))
    if at < 0:
        return Call(node.target, (x, replaced(times, dim, len(rows))))
    return Call(node.target, (want(x, at, [row % shape(x)[at] for row in rows]), replaced(times, dim, 1)))


@rule(aten.unfold)
def _unfold(node: Any, dim: int, rows: Rows) -> Plan | None:
    n = len(shape(node)) - 1
    return None if dim in {node.args[1] % n, n} else same(node, dim, rows)


@rule(aten.view, aten._unsafe_view, aten.reshape)
def _view(node: Any, dim: int, rows: Rows) -> Plan | None:
    x, before, after = node.args[0], shape(node.args[0]), shape(node)
    if 0 in before:
        return None
    sources, results = _group(before, after, dim)
    outer = math.prod(after[results.start : dim])
    inner = math.prod(after[dim + 1 : results.stop])
    long = [d for d in sources if before[d] > 1]
    size = replaced(after, dim, len(rows))
    if len(long) == 1:  # one dimension that was cut in several
        at = [(o * after[dim] + row) * inner + i for o in range(outer) for row in rows for i in range(inner)]
        return Call(aten.view.default, (want(x, long[0], at), size))
    if outer > 1 or not long:
        return None
    block = math.prod(before[long[0] + 1 : sources.stop])  # entries of a row of the first dimension
    if inner % block == 0:
        each = inner // block
        return Call(aten.view.default, (want(x, long[0], [row * each + i for row in rows for i in range(each)]), size))
    if block % inner:
        return None
    each = block // inner  # rows that are wanted lie in rows of the operand, which have so many
    lie_in = sorted({row // each for row in rows})
    place = {row: i for i, row in enumerate(lie_in)}
    covered = Call(aten.view.default, (want(x, long[0], lie_in), replaced(after, dim, len(lie_in) * each)))
    at = [place[row // each] * each + row % each for row in rows]
    return chosen(covered, dim, at, len(lie_in) * each)  # type: ignore[no-any-return]


def chosen(value: Any, dim: int, at: Sequence[int], size: int) -> Any:
    """Return the rows of a value that a plan computes."""
    return value if tuple(at) == tuple(range(size)) else Call(SELECT, (value, dim, tuple(at)))


def _group(before: tuple[int, ...], after: tuple[int, ...], dim: int) -> tuple[range, range]:
    """Return the dimensions, one after the other, that a dimension of a view shares its entries with: before, after."""
    i = j = 0
    while True:
        first, m, n = (i, j), 1, after[j]
        j += 1
        while m != n:
            if m < n:
                m, i = m * before[i], i + 1
            else:
                n, j = n * after[j], j + 1
        if dim < j:
            return range(first[0], i), range(first[1], j)


# ------------------------------------------------------------------------------------------ what is put side by side


def _gathered(dim: int, pieces: Sequence[tuple[int, int]], part: Callable[[int, list[int]], Any]) -> Any:
    """Return rows that lie in several values, ``(value, row)`` each; ``part`` returns rows of one of them."""
    order = {which: [row for w, row in pieces if w == which] for which, _ in pieces}
    found = [part(which, rows) for which, rows in order.items()]
    if len(found) == 1:
        return found[0]
    places = [i for which in order for i, (w, _) in enumerate(pieces) if w == which]
    at = sorted(range(len(places)), key=places.__getitem__)
    return chosen(Call(aten.cat.default, (found, dim)), dim, at, len(at))


@rule(aten.cat)
def _cat(node: Any, dim: int, rows: Rows) -> Plan:
    parts, along = node.args[0], (node.args[1] if len(node.args) > 1 else 0) % len(shape(node))
    parts = [part for part in parts if part.meta["val"].ndim == len(shape(node))]  # empty vectors are let pass
    if along != dim:
        return Call(node.target, ([want(part, dim, rows) for part in parts], along))
    place = [(which, row) for which, part in enumerate(parts) for row in range(shape(part)[dim])]
    return _gathered(dim, [place[row] for row in rows], lambda i, at: want(parts[i], dim, at))  # type: ignore[no-any-return]


@rule(aten.stack)
def _stack(node: Any, dim: int, rows: Rows) -> Plan:
    parts, along = node.args[0], (node.args[1] if len(node.args) > 1 else 0) % len(shape(node))
    if along == dim:
        return Call(node.target, ([parts[row] for row in rows], dim))
    return Call(node.target, ([want(part, dim - (dim > along), rows) for part in parts], along))


@rule(aten.slice_scatter)
def _slice_scatter(node: Any, dim: int, rows: Rows) -> Plan:
    base, source, *where = node.args
    along, *taken = window(shape(node), *where)
    if along != dim:
        return Call(node.target, (want(base, dim, rows), want(source, dim, rows), *where))
    written = {row: i for i, row in enumerate(range(*taken))}
    pieces = [(1, written[row]) if row in written else (0, row) for row in rows]
    return _gathered(dim, pieces, lambda i, at: want((base, source)[i], dim, at))  # type: ignore[no-any-return]


@rule(aten.select_scatter)
def _select_scatter(node: Any, dim: int, rows: Rows) -> Plan:
    base, source, along, index = node.args
    along, index = along % len(shape(node)), index % shape(node)[along]
    if along != dim:
        return Call(node.target, (want(base, dim, rows), want(source, dim - (dim > along), rows), along, index))

    def part(which: int, at: list[int]) -> Any:
        if which == 0:
            return want(base, dim, at)
        return Call(
            aten.expand.default, (Call(aten.unsqueeze.default, (source, dim)), replaced(shape(node), dim, len(at)))
        )

    return _gathered(dim, [(int(row == index), row) for row in rows], part)  # type: ignore[no-any-return]


@rule(operator.getitem)
def _getitem(node: Any, dim: int, rows: Rows) -> Plan | None:
    """Rows of one of several results."""
    parent, which = node.args
    packet = packet_of(parent)
    if packet in {aten.split, aten.split_with_sizes, aten.unbind}:
        x, size = parent.args[0], shape(parent.args[0])
        at = 1 if packet is aten.unbind else 2
        along = (parent.args[at] if len(parent.args) > at else 0) % len(size)
        if packet is aten.unbind:
            return Call(aten.select.int, (want(x, dim + (dim >= along), rows), along, which))
        start = sum(shape_[along] for shape_ in (v.shape for v in parent.meta["val"][:which]))
        if along == dim:
            return want(x, dim, [start + row for row in rows])  # type: ignore[no-any-return]
        return Call(aten.slice.Tensor, (want(x, dim, rows), along, start, start + shape(node)[along]))
    evaluates = packet is aten.native_batch_norm and not arguments(parent)["training"]
    if which == 0 and (evaluates or packet is aten._native_batch_norm_legit_no_training):
        x, *channels = parent.args[:5]
        if dim == 1:
            channels = [c if c is None else want(c, 0, rows) for c in channels]
        return Call(operator.getitem, (Call(parent.target, (want(x, dim, rows), *channels, *parent.args[5:])), 0))
    return None
