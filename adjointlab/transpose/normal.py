"""Normal equations of a convolution: ``Aᴴ(Ax − y)`` as ``(AᴴA)x − Aᴴy``, with ``AᴴA`` as one convolution.

``Aᴴy`` is kept while y is the same, so that a gradient costs about one convolution, whose channels are those of x. Its
kernel is the autocorrelation of A's, its transfer function ``|F k|²``; where this embeds a Toeplitz matrix in a
circulant one it is known as the Toeplitz method.

A convolution that is padded with zeros gives the outputs of an image alone on the plane, but for those *outside* of
what the padding leaves: in one dimension, up to q places before the first output and after the last, that read the
first and the last q inputs. The outputs outside in any dimension are those outside in one, less those outside in two,
and so on: ``AᴴA = K − Σ ±R_S`` over all sets S of dimensions. ``R_S`` sees strips, edges or corners of the image only,
each side by itself: along S it is a matrix of q × q for each channel, along the other dimensions a convolution.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from adjointlab.transpose import kernels
from adjointlab.transpose.graph import Graph, call, clean, part
from adjointlab.transpose.site import Ints, spectra_meet

aten = torch.ops.aten


def by_autocorrelation(graph: Graph) -> Graph | None:
    """Return an equal graph with ``Aᴴ(Ax − y)`` as ``(AᴴA)x − Aᴴy`` for convolutions A, or None if there is none.

    The transposed convolutions in it must be written as such.
    """
    changed = part(graph, graph.outputs)
    nodes, found = changed.body, False
    for node in list(nodes.nodes):
        inner, y = _residual(node, aten.convolution.default)
        if inner is not None and _transposes(node, inner):
            x, weight, bias, _, padding, *_, groups = inner.args
            with nodes.inserting_before(node):
                if bias is not None:
                    y = call(nodes, aten.sub.Tensor, y, call(nodes, aten.view.default, bias, [-1, *[1] * len(padding)]))
                back = call(nodes, node.target, y, *node.args[1:])
                whole = _gram(nodes, x, weight, tuple(padding), groups)
                node.replace_all_uses_with(call(nodes, aten.sub.Tensor, whole, back))
            found = True
    clean(nodes)
    return changed if found else None


def by_spectra(graph: Graph) -> Graph | None:
    """Return an equal graph with ``Aᴴ(Ax − y)`` as ``(AᴴA)x − Aᴴy`` for cyclic convolutions A, or None without any.

    They must be written as products of transforms.
    """
    changed = part(graph, graph.outputs)
    nodes, found = changed.body, False
    for node in list(nodes.nodes):
        inner, y = _residual(node, kernels.fft)
        if inner is None:
            continue
        (x, first, offset, source), (_, second, bias, target) = inner.args, node.args
        if offset is None and bias is None and spectra_meet(source, target):
            with nodes.inserting_before(node):
                square = _like(second, nodes.call_function(composed, (second, first)))
                site = target._replace(input_shape=source.input_shape)
                whole = _like(node, nodes.call_function(kernels.fft, (x, square, None, site)))
                back = _like(node, nodes.call_function(kernels.fft, (y, *node.args[1:])))
                node.replace_all_uses_with(call(nodes, aten.sub.Tensor, whole, back))
            found = True
    clean(nodes)
    return changed if found else None


def _like(other: fx.Node, node: fx.Node) -> fx.Node:
    node.meta["val"] = other.meta["val"]
    return node


def _residual(node: Any, op: Any) -> tuple[Any, Any]:
    """Return ``A x`` and y where a node of a kind reads ``Ax − y``, Ax is of this kind, and no one else reads them."""
    difference: Any = node.args[0] if node.target is op else None
    if getattr(difference, "target", None) is not aten.sub.Tensor or difference.kwargs:
        return None, None  # or it may have a factor
    inner, y = difference.args
    alone = isinstance(y, fx.Node) and inner.target is op and len(difference.users) == len(inner.users) == 1
    return (inner, y) if alone and inner.meta["val"].shape == y.meta["val"].shape else (None, None)


def _transposes(node: Any, inner: Any) -> bool:
    """Return whether a convolution is the transpose of another, and one whose ``AᴴA`` is a convolution; real both."""
    (x, *first), (_, *second) = inner.args, node.args
    weight, _, stride, padding, dilation, transposed, _, groups = first
    adjoint = [weight, None, stride, padding, dilation, True, [0] * len(padding), groups]
    steps = all(n == 1 for n in (*stride, *dilation))
    if transposed or second != adjoint or not steps or not x.meta["val"].is_floating_point():
        return False
    return _borders_fit(x.meta["val"].shape, weight.meta["val"].shape[2:], padding, inner.meta["val"].numel())


def _borders_fit(image: Ints, kernel: Ints, padding: Ints, most: int) -> bool:
    """Return whether opposite strips do not overlap, and what they read is less than is saved."""
    cut, sizes = _cut(kernel, padding), image[2:]
    read = [
        2 * q * math.prod(image) // n * math.prod(2 * k - 1 for j, k in enumerate(kernel) if j != i)
        for i, (q, n) in enumerate(zip(cut, sizes, strict=True))
    ]
    return all(n >= 2 * q for n, q in zip(sizes, cut, strict=True)) and sum(read) <= most


def _cut(kernel: Ints, padding: Ints) -> Ints:
    """Return how many outputs the padding leaves out on each side."""
    return tuple(max(0, k - 1 - p) for k, p in zip(kernel, padding, strict=True))


def _gram(nodes: fx.Graph, x: fx.Node, weight: fx.Node, padding: Ints, groups: int) -> fx.Node:
    """Add the nodes of ``AᴴA x``."""
    kernel = tuple(weight.meta["val"].shape[2:])
    cut, ones, zeros = _cut(kernel, padding), [1] * len(kernel), [0] * len(kernel)
    around = [k - 1 for k in kernel]
    spread = call(nodes, autocorrelation, weight, groups)
    whole = call(nodes, aten.convolution.default, x, spread, None, ones, around, ones, False, zeros, groups)
    dims = [n for n, q in enumerate(cut) if q]
    for count in range(1, len(dims) + 1):
        for along in itertools.combinations(dims, count):
            matrices = call(nodes, border, weight, groups, padding, along)
            whole = call(nodes, less_border, whole, x, matrices, kernel, cut, along)
    return whole


def autocorrelation(weight: Tensor, groups: int) -> Tensor:
    """Return ``K[c, c', u] = Σ w[o, c, j] w[o, c', j + u − (k − 1)]``: that of ``AᴴA``, c and c' in the same group."""
    ones, around = [1] * (weight.ndim - 2), [k - 1 for k in weight.shape[2:]]
    apart = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # (C, C_out / groups, …)
    found = torch.convolution(weight.transpose(0, 1), apart, None, ones, around, ones, False, [0] * len(ones), groups)
    return found.transpose(0, 1).contiguous()


def border(weight: Tensor, groups: int, padding: Ints, along: Ints) -> Tensor:
    """Return ``R_S`` as matrices, of channels by channels and taps: for all sides along S, and groups within."""
    matrices = []
    for sides in itertools.product((False, True), repeat=len(along)):
        kernel = weight
        for gone, (dim, last) in enumerate(zip(along, sides, strict=True)):
            kernel = _outside(kernel, 2 + dim - gone, padding[dim], last=last)
        found = autocorrelation(kernel if kernel.ndim > 2 else kernel[..., None], groups)
        matrices.append(found.unflatten(0, (groups, -1)).flatten(2))
    return torch.cat(matrices)


def _outside(weight: Tensor, dim: int, padding: int, *, last: bool) -> Tensor:
    """Return the kernel of outputs outside in a dimension, which are channels, as are the inputs that these read."""
    q = weight.shape[dim] - 1 - padding
    place, entry = torch.arange(q)[:, None], torch.arange(q)
    taps = entry - place if last else entry + 1 + place + padding  # both counted from the border
    padded = F.pad(weight.movedim(dim, -1), (q, q))[..., taps + q]
    return padded.movedim((-2, -1), (1, 3)).flatten(0, 1).flatten(1, 2)


def less_border(whole: Tensor, x: Tensor, matrices: Tensor, kernel: Ints, cut: Ints, along: Ints) -> Tensor:
    """Return ``whole ∓ R_S x``, in the memory of ``whole``."""
    rest = [n for n in range(len(kernel)) if n not in along]
    around = [kernel[n] - 1 for n in reversed(rest) for _ in range(2)]
    windows = aten.constant_pad_nd.default(_sides(x, cut, along), around)
    first = windows.ndim - len(rest)
    for place, n in enumerate(rest, first):
        windows = windows.unfold(place, 2 * kernel[n] - 1, 1)
    if rest:  # taps are summed over, as channels are
        windows = windows.movedim(tuple(range(-len(rest), 0)), tuple(range(first, first + len(rest))))
    count, _, columns = matrices.shape
    found = matrices @ windows.reshape(x.shape[0], count, columns, -1)
    target = _sides(whole, cut, along)
    target.add_(found.view(target.shape), alpha=(-1) ** len(along))
    return whole


def _sides(image: Tensor, cut: Ints, along: Ints) -> Tensor:
    """Return a view of all strips, edges or corners along S, of shape ``(batch, *sides, C, *within, *others)``."""
    sizes, steps = image.shape[2:], image.stride()[2:]
    others = [n for n in range(len(sizes)) if n not in along]
    shape = [image.shape[0], *[2] * len(along), image.shape[1], *[cut[n] for n in along], *[sizes[n] for n in others]]
    apart = [(sizes[n] - cut[n]) * steps[n] for n in along]
    strides = [image.stride(0), *apart, image.stride(1), *[steps[n] for n in along], *[steps[n] for n in others]]
    return image.as_strided(shape, strides, image.storage_offset())


def composed(second: Tensor, first: Tensor) -> Tensor:
    """Return the transform of one product of transforms after another."""
    found: Tensor = torch.einsum("goi...,gij...->goj...", second, first)
    return found


__all__ = ["autocorrelation", "border", "by_autocorrelation", "by_spectra", "composed", "less_border"]
