"""Parts of a graph that act along one dimension, and do the same at each place of the others.

A dimension *passes* a node where each row of the result along it is computed from that row of what depends on the
input: the rules that compute rows of a result (``row_rules``) say so. They propose; the matrix that is composed of a
part proves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import reached
from adjointlab.transpose.graph.ops import has_tag, packet_of
from adjointlab.transpose.passes import row_products  # noqa: F401  # registers rules
from adjointlab.transpose.passes.row_rules import RULES, leaves_of, pointwise

Dims = tuple[int, ...]
T = TypeVar("T")


def along_one(
    nodes: list[fx.Node], seeds: set[fx.Node], dependent: set[fx.Node], accept: Callable[[list[fx.Node]], T | None]
) -> list[T]:
    """Return parts that are accepted: nodes, seeds among them, that compute one value from another along one dimension.

    No two have a node in common.
    """
    passed = functools.cache(lambda node, dim: _passed(node, dim, dependent))
    order = {node: i for i, node in enumerate(nodes)}
    found = list[T]()
    for source in dict.fromkeys(o for node in nodes for o in node.all_input_nodes if o in dependent):
        value = source.meta["val"]
        long = [d for d, n in enumerate(value.shape) if n > 1] if isinstance(value, Tensor) else []
        if len(long) < 2:
            continue
        grown = [_grown(source, tuple(d for d in long if d != dim), order, dependent, passed) for dim in long]
        group = max(grown, key=len)
        for end in reversed(group if not seeds.isdisjoint(group) else []):
            part = _before(end, group)
            one = accept(part)
            if one is not None:
                found.append(one)
                for node in part:
                    del order[node]
                break
    return found


def _before(end: fx.Node, group: list[fx.Node]) -> list[fx.Node]:
    """Return the nodes of a group that a node of it is computed from, and itself."""
    every = set(group)
    inside = reached([end], lambda node: [n for n in node.all_input_nodes if n in every])
    return [node for node in group if node in inside]


def _grown(
    source: fx.Node, dims: Dims, order: dict[fx.Node, int], dependent: set[fx.Node],
    passed: Callable[[fx.Node, int], dict[fx.Node, int]],
) -> list[fx.Node]:  # fmt: skip
    """Return the nodes that depend on the input through a value alone, some dimensions of which pass them."""
    at, pending = {source: dims}, {node for node in source.users if node in order}
    while pending:
        node = min(pending, key=order.__getitem__)  # what it reads is decided
        pending.remove(node)
        operands = [n for n in node.all_input_nodes if n in dependent]
        if all(n in at for n in operands) and isinstance(node.meta["val"], Tensor):
            places = [tuple(passed(node, d).get(n) for n in operands) for d in range(node.meta["val"].ndim)]
            wanted = list(zip(*[at[n] for n in operands], strict=True))
            if set(wanted) <= set(places):
                at[node] = tuple(map(places.index, wanted))
                pending.update(user for user in node.users if user in order)
    return list(at)[1:]


def _passed(node: fx.Node, dim: int, dependent: set[fx.Node]) -> dict[fx.Node, int]:
    """Return which dimension of each operand a dimension of a value is, empty where it is none, or is acted along."""
    value = node.meta["val"]
    rule = RULES.get(packet_of(node), pointwise if has_tag(node.target, torch.Tag.pointwise) else None)
    n = value.shape[dim]
    rows = tuple(sorted({1, n // 2, n - 1}))  # some that would be others in a part, or in another order
    plan = rule(node, dim, rows) if rule is not None and n > 1 else None
    found = dict[fx.Node, int]()
    for leaf in leaves_of(plan):
        if isinstance(leaf, fx.Node):
            if leaf in dependent:
                return {}
        elif leaf.node in dependent:
            same = leaf.rows == rows and leaf.node.meta["val"].shape[leaf.dim] == n
            if not same or found.setdefault(leaf.node, leaf.dim) != leaf.dim:
                return {}
    return found
