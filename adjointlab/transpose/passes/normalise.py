"""The plain form of a functional graph: what tracing leaves behind is written as a person would write it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from adjointlab.transpose.graph.edit import call, rewritten, zeros
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import window

aten = torch.ops.aten


def normalise(whole: Graph, *, detached: bool = True) -> Graph:
    """Return an equal functional graph in its plain form: no write-backs as copies, no clones, no dead code.

    Without ``detached``, ``detach`` goes as well. It computes nothing, but autograd sees it.
    """
    identities = {aten.lift_fresh_copy.default, aten.alias.default, *(() if detached else (aten.detach.default,))}

    def rule(graph: fx.Graph, node: Any) -> fx.Node | None:
        target, args, value = node.target, node.args, node.meta.get("val")
        if target is aten.copy.default:
            return _copied(graph, *args[:2])
        if target is aten.zero.default:  # which autograd does not differentiate where numbers are complex
            return zeros(graph, value)
        if target in _SCATTERS and value.is_complex():
            return _scatter_as_cat(graph, node)
        is_copy = target is aten.clone.default and not node.kwargs and args[0].op == "placeholder"
        is_same = target is aten.view.default and args[0].meta["val"].shape == value.shape
        return args[0] if target in identities or is_copy or is_same else None

    return rewritten(whole, rule)


def _copied(graph: fx.Graph, target: fx.Node, source: fx.Node) -> fx.Node:
    """Return a node with the values of a source and the metadata of a target."""
    value = target.meta["val"]
    if source.meta["val"].dtype != value.dtype:
        source = call(graph, aten._to_copy.default, source, dtype=value.dtype)
    if source.meta["val"].shape != value.shape:
        source = call(graph, aten.expand.default, source, list(value.shape))
    return source


_SCATTERS = {aten.slice_scatter.default, aten.select_scatter.default}


def _scatter_as_cat(graph: fx.Graph, node: Any) -> fx.Node:
    """Write a scatter of complex numbers, which autograd does not differentiate, as base before, source, base after."""
    base, source, *where = node.args
    shape = node.meta["val"].shape
    if node.target is aten.select_scatter.default:
        dim, start = where[0] % len(shape), where[1] % shape[where[0]]
        stop = start + 1
        source = call(graph, aten.unsqueeze.default, source, dim)
    else:
        dim, start, stop, step = window(shape, *where)
        if step != 1:
            pairs = [call(graph, aten.view_as_real.default, part) for part in (base, source)]
            scattered = call(graph, aten.slice_scatter.default, *pairs, dim, start, stop, step)
            return call(graph, aten.view_as_complex.default, scattered)
    before, after = (
        [call(graph, aten.slice.Tensor, base, dim, a, b)] if a < b else [] for a, b in ((0, start), (stop, shape[dim]))
    )
    return call(graph, aten.cat.default, [*before, source, *after], dim)
