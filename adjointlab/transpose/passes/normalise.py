"""The plain form of a functional graph: what tracing leaves behind is written as a person would write it."""

from __future__ import annotations

import torch
from torch import fx

from adjointlab.transpose.graph.edit import call, clean, copied, zeros
from adjointlab.transpose.graph.ir import Graph

aten = torch.ops.aten


def normalise(whole: Graph, *, detached: bool = True) -> Graph:
    """Return an equal functional graph in its plain form: no write-backs as copies, no clones, no dead code.

    Without ``detached``, ``detach`` goes as well. It computes nothing, but autograd sees it.
    """
    whole = copied(whole)
    graph = whole.body
    for node in list(graph.nodes):
        if node.target is aten.copy.default:  # copy(dst, src) has the values of src and the metadata of dst
            target, source = node.args[0].meta["val"], node.args[1]
            with graph.inserting_before(node):
                value = source
                if source.meta["val"].dtype != target.dtype:
                    value = call(graph, aten._to_copy.default, value, dtype=target.dtype)
                if value.meta["val"].shape != target.shape:
                    value = call(graph, aten.expand.default, value, list(target.shape))
            node.replace_all_uses_with(value)
        elif node.target is aten.zero.default:  # which autograd does not differentiate where numbers are complex
            with graph.inserting_before(node):
                node.replace_all_uses_with(zeros(graph, node.meta["val"]))
        elif node.target in _SCATTERS and node.meta["val"].is_complex():
            _scatter_as_cat(graph, node)
        elif (
            node.target is aten.lift_fresh_copy.default
            or (node.target is aten.clone.default and not node.kwargs and node.args[0].op == "placeholder")
            or (node.target is aten.view.default and node.args[0].meta["val"].shape == node.meta["val"].shape)
            or node.target is aten.alias.default
            or (not detached and node.target is aten.detach.default)
        ):
            node.replace_all_uses_with(node.args[0])
    clean(graph)
    return whole


_SCATTERS = {aten.slice_scatter.default, aten.select_scatter.default}


def _scatter_as_cat(graph: fx.Graph, node: fx.Node) -> None:
    """Write a scatter of complex numbers, which autograd does not differentiate, as base before, source, base after."""
    base, source, dim, *window = [*node.args, *[None] * 5][:6]
    shape = node.meta["val"].shape
    dim = (dim or 0) % len(shape)  # type: ignore[operator]
    with graph.inserting_before(node):
        if node.target is aten.select_scatter.default:
            start = window[0] % shape[dim]
            stop = start + 1
            source = call(graph, aten.unsqueeze.default, source, dim)
        else:
            if window[2] not in (None, 1):
                pairs = [call(graph, aten.view_as_real.default, part) for part in (base, source)]
                scattered = call(graph, aten.slice_scatter.default, *pairs, dim, *window)
                node.replace_all_uses_with(call(graph, aten.view_as_complex.default, scattered))
                return
            start, stop, _ = slice(window[0], window[1]).indices(shape[dim])
        parts = [source]
        if start > 0:
            parts.insert(0, call(graph, aten.slice.Tensor, base, dim, 0, start))
        if stop < shape[dim]:
            parts.append(call(graph, aten.slice.Tensor, base, dim, stop, shape[dim]))
        whole = call(graph, aten.cat.default, parts, dim)
    node.replace_all_uses_with(whole)
