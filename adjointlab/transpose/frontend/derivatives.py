"""Derivatives that torch lacks: of backwards, which are linear in their cotangents, so that transposes are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.ir import Graph

aten = torch.ops.aten


def _sampling(forward: Any, backward: Any) -> Callable[..., tuple[Tensor | None, Tensor | None]]:
    """Return the backward of ``grid_sample`` with a derivative in its cotangents."""

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(v: Tensor, image: Tensor, grid: Tensor, options: Any, mask: Any) -> Any:
            return backward(v, image, grid, *options, mask)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs[1:3])
            ctx.options, ctx.mask = inputs[3:]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, of_image: Any, of_grid: Any) -> Any:
            image, grid = ctx.saved_tensors
            found = None
            if ctx.mask[0] and of_image is not None:  # it is linear in the image
                found = forward(of_image, grid, *ctx.options)
            if ctx.mask[1] and of_grid is not None:  # at each place of the grid, the slopes of each channel there
                ones = image.new_ones((image.shape[0], 1, *grid.shape[1:-1]))
                slopes = [
                    backward(ones, channel, grid, *ctx.options, [False, True])[1] for channel in image.split(1, 1)
                ]
                moved = (torch.stack(slopes, 1) * of_grid.unsqueeze(1)).sum(-1)
                found = moved if found is None else found + moved
            return found, None, None, None, None

    def call(v: Tensor, image: Tensor, grid: Tensor, *rest: Any) -> tuple[Tensor | None, Tensor | None]:
        *options, mask = rest
        return Backward.apply(v, image, grid, tuple(options), mask)  # type: ignore[no-any-return, no-untyped-call]

    return call


_KNOWN = {
    aten.grid_sampler_2d_backward.default: _sampling(aten.grid_sampler_2d, aten.grid_sampler_2d_backward),
    aten.grid_sampler_3d_backward.default: _sampling(aten.grid_sampler_3d, aten.grid_sampler_3d_backward),
}


def differentiable(graph: Graph) -> Graph:
    """Return an equal graph of which autograd knows the derivative in the inputs, if not that of the derivative."""
    if all(node.target not in _KNOWN for node in graph.body.nodes):
        return graph
    body, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    body.output(body.graph_copy(graph.body, copies))
    for node in body.nodes:
        if node.target in _KNOWN:
            node.target = _KNOWN[node.target]
    return Graph(body, graph.state, graph.specialized)
