"""The matrix of a whole graph, entry by entry: what is linear by index, convolutions and products with matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adjointlab.transpose.graph.edit import rewritten, zeros
from adjointlab.transpose.graph.ir import Graph, compiled
from adjointlab.transpose.graph.ops import packet_of
from adjointlab.transpose.passes.rows import NotByIndexError, Rows, TooLargeError
from adjointlab.transpose.passes.sparse_rows import Sparse, common, numbers

aten = torch.ops.aten


def entries(graph: Graph, state: Sequence[Tensor], like: Tensor, batch_dims: int, most: int) -> list[Rows]:
    """Return the matrices from the one input of a graph to its outputs, the same for each place of the batch.

    Raises ``NotByIndexError`` where there are none, or more entries than ``most``.
    """
    # A tensor that is made empty is written to before it is read: zeros serve as well.
    spelt = rewritten(graph, lambda body, node: zeros(body, node.meta["val"]) if packet_of(node) in _EMPTY else None)
    for node in spelt.body.nodes:
        node.target = _RULES.get(packet_of(node), node.target)
    with torch.no_grad():
        outputs = compiled(spelt.body)(*state, Sparse.identity(like, batch_dims, most))
    return [_matrix(output, like, batch_dims, most) for output in outputs]


def _matrix(output: Any, like: Tensor, batch_dims: int, most: int) -> Rows:
    if isinstance(output, Sparse) and not (batch_dims and output.trails):
        return output.rows
    if isinstance(output, Sparse) or output.count_nonzero():
        raise NotByIndexError("an output is no function of the input by index")
    count = output.numel() // math.prod(output.shape[:batch_dims])
    none = like.new_zeros(0)
    return Rows(torch.zeros(count + 1, dtype=torch.int64, device=like.device), none.to(torch.int32), none, most)


def _convolution(x: Any, weight: Any, bias: Any, *settings: Any) -> Any:
    """Return a convolution as windows, products and sums."""
    if not isinstance(x, Sparse):
        return aten.convolution(x, weight, bias, *settings)
    stride, padding, dilation, transposed, _, groups = settings
    if isinstance(weight, Sparse) or bias is not None or len(x.batch) > 1:
        raise NotByIndexError("the input is a kernel, or channels are a batch")
    if transposed:
        return _transposed(x, weight, settings)
    d, (n, channels), lengths = weight.ndim - 2, x.shape[:2], weight.shape[2:]
    at = numbers(x.shape, x.batch, x.core, x.device, trails=x.trails)
    at = aten.constant_pad_nd(at, [p for size in reversed(padding) for p in (size, size)])
    for dim in range(d):
        at = at.unfold(2 + dim, (lengths[dim] - 1) * dilation[dim] + 1, stride[dim])[..., :: dilation[dim]]
    places, each = at.shape[2 : 2 + d], channels // groups
    _require(math.prod(places) * weight.numel() * n // math.prod(x.batch), x.rows.most)
    at = at.reshape(n, groups, 1, each, *at.shape[2:]).movedim(3, 3 + d)
    at = at.expand(n, groups, len(weight) // groups, *at.shape[3:])
    first, trails = common(at, x, x.core)
    if trails:
        raise NotByIndexError("a convolution of parts of an image")
    core = at.shape[len(x.batch) :]
    kernels = weight.reshape(1, groups, -1, *[1] * d, each, *lengths).expand(at.shape)
    kernels = kernels[(0,) * len(x.batch)].expand(core).reshape(-1)
    rows = x.rows.take(first - 1).scaled(kernels).merged(each * math.prod(lengths))
    return x.like(rows, (n, weight.shape[0], *places))


def _transposed(x: Sparse, weight: Tensor, settings: Sequence[Any]) -> Sparse:
    """Return a transposed convolution: the transpose of the one from its results."""
    if x.trails:
        raise NotByIndexError("a convolution of parts of an image")
    stride, padding, dilation, _, extra, groups = settings
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, extra, strict=True)
    lengths = [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, s, p, d, e in sizes]
    shape = (x.shape[0], weight.shape[1] * groups, *lengths)
    one = Sparse.identity(torch.empty(shape, dtype=x.dtype, device=x.device), len(x.batch), x.rows.most)
    there = _convolution(one, weight, None, stride, padding, dilation, False, extra, groups)
    return x.like(there.rows.transposed(one.core).applied(x.rows), shape)


def _product(a: Any, b: Any) -> Any:
    """Return a product of two matrices, or of a matrix and a vector, as products of numbers and their sums."""
    if not (isinstance(a, Sparse) or isinstance(b, Sparse)):
        return a @ b
    if isinstance(a, Sparse) and isinstance(b, Sparse):
        raise NotByIndexError("a product of two values of the input")
    if any(t.layout is not torch.strided for t in (a, b)):
        raise NotByIndexError("a sparse matrix with a layout")
    if b.ndim == 1:
        _require(a.numel(), (b if isinstance(b, Sparse) else a).rows.most)
        return (a * b).sum([-1])
    _require(a.numel() * b.shape[-1], (b if isinstance(b, Sparse) else a).rows.most)
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum([-2])


def _require(entries: int, most: int) -> None:
    if entries > most:
        raise TooLargeError(f"too large for memory: {entries:,} entries")


_EMPTY = {aten.empty, aten.new_empty, aten.empty_like, aten.new_zeros, aten.zeros_like}
_RULES: dict[Any, Callable[..., Any]] = {
    aten.convolution: _convolution,
    **dict.fromkeys((aten.mm, aten.mv, aten.bmm), _product),
}
