"""Rewrite the convolutions of a graph to the fastest equal kernels; what depends on weights becomes prologue."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import call, clean, copied
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.kernels import fft
from adjointlab.transpose.kernels.convolution import ConvSpec, sized, smooth, spectra_meet
from adjointlab.transpose.kernels.registry import FFT, NATIVE, Kernel, bound
from adjointlab.transpose.kernels.select import Chooser
from adjointlab.transpose.passes.fuse_slices import circular

aten = torch.ops.aten


def lower(graph: Graph, choose: Chooser, transform: Callable[[ConvSpec], bool] = lambda _: False) -> Graph:
    """Return an equal graph with a chosen kernel for each convolution.

    ``transform`` says whether a gradient in a kernel is to be a product of transforms.
    """
    lowered = copied(graph)
    _separate(lowered.body)
    _backward_as_transposed(lowered)
    _gradients_in_kernels(lowered.body, transform)
    for node in list(lowered.body.nodes):
        if _is_convolution(node):
            spec = _spec(node)
            kernel = choose(spec)
            first, last = node, node
            if kernel is FFT:
                first, last, spec = _cyclic(node, spec)
            if kernel.name != "native":
                _replace(lowered.body, node, (first.args[0], last), kernel, spec)
    clean(lowered.body)
    return lowered


def joined(graph: Graph) -> Graph:
    """Return an equal graph in which ``B(Ax − y)`` with two products of transforms is one: spectra are subtracted.

    A and B have no bias, and of ``Ax`` and the difference nothing else is used. That saves a transform of four.
    """
    whole = copied(graph)
    for node in list(whole.body.nodes):
        second = _product(node)
        if second is None:
            continue
        difference: Any = node.args[0]
        if difference.target is not aten.sub.Tensor or difference.kwargs:  # which may be a factor
            continue
        inner, y = difference.args
        first = _product(inner)
        if first is None or not isinstance(y, fx.Node) or len(difference.users) != 1 or len(inner.users) != 1:
            continue
        if inner.meta["val"].shape != y.meta["val"].shape or not spectra_meet(first, second):
            continue
        with whole.body.inserting_before(node):
            run = fft.gradient((first, second))
            join = whole.body.call_function(run, (inner.args[0], y, inner.args[1], node.args[1]))
        join.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(join)
    clean(whole.body)
    return whole


def _product(node: Any) -> ConvSpec | None:
    """Return the spec of a product of transforms without a bias, None for any other node."""
    found = bound(node.target) if isinstance(node, fx.Node) else None
    return found[1] if found is not None and found[0] is FFT and node.args[2] is None else None


def multiplier(graph: Graph) -> fx.Node | None:
    """Return the node of ``K`` where all that a graph computes is ``v ↦ F⁻¹(K ⊙ F v)``, each channel by itself."""
    (node, *others), given = graph.outputs, graph.inputs
    spec = _product(node)
    if others or spec is None or [node.args[0]] != given:
        return None
    alone = spec.input_shape[0] == spec.output_shape[0] == spec.groups
    cyclic = spec.input_shape[1:] == spec.output_shape[1:] == spec.fft_size and all(s == 1 for s in spec.stride)
    return node.args[1] if alone and cyclic else None  # type: ignore[return-value]


def _cyclic(node: fx.Node, spec: ConvSpec) -> tuple[fx.Node, fx.Node, ConvSpec]:
    """Return the first and last node of what one product of transforms computes, and the spec of it all.

    A convolution of a circularly padded image is cyclic: the transform does by itself what the padding did, on an image
    of the size before. So is the transpose, whose result is folded back.
    """
    alone = spec.transposed and len(node.users) == 1 and node.args[2] is None
    around = next(iter(node.users)) if alone else node.args[0]
    shifts = None
    if alone or not spec.transposed:
        assert isinstance(around, fx.Node)
        shifts = circular(around, inverse=spec.transposed)
    if shifts is None or any(shifts[:2]) or any(spec.padding):
        return node, node, spec
    first, last = (node, around) if spec.transposed else (around, node)
    source, result = first.all_input_nodes[0].meta["val"], last.meta["val"]  # type: ignore[union-attr]
    whole = spec._replace(
        input_shape=tuple(source.shape[1:]), output_shape=tuple(result.shape[1:]), padding=shifts[2:],
        fft_size=tuple((result if spec.transposed else source).shape[2:]),
    )  # fmt: skip
    strided = (source if spec.transposed else result).shape[2:]
    fits = all(
        smooth(n) and (m - 1) * s < n and e <= n
        for n, m, s, e in zip(whole.fft_size, strided, spec.stride, spec.extent, strict=True)
    )
    return (first, last, whole) if fits else (node, node, spec)  # type: ignore[return-value]


def _backward_as_transposed(graph: Graph) -> None:
    """Write each input gradient of a convolution as the transposed convolution that it is."""
    nodes = graph.body
    for node in list(nodes.nodes):
        if node.target is not aten.convolution_backward.default or node.args[10] != [True, False, False]:
            continue
        v, x, weight, _, stride, padding, dilation, transposed, _, groups, _ = node.args
        if x.meta["val"].dtype.is_complex:  # native complex kernels come apart into real ones: left as they are
            continue
        spatial, out = x.meta["val"].shape[2:], v.meta["val"].shape[2:]
        kernel = weight.meta["val"].shape[2:]
        stride, padding, dilation = (_full(value, len(kernel)) for value in (stride, padding, dilation))
        settings = list(zip(spatial, out, stride, padding, dilation, kernel, strict=True))
        rest = [0 if transposed else n - ((m - 1) * s - 2 * p + d * (k - 1) + 1) for n, m, s, p, d, k in settings]
        if transposed and any(m - ((n - 1) * s - 2 * p + d * (k - 1) + 1) >= s for n, m, s, p, d, k in settings):
            continue  # an output padding of a stride or more: the plain convolution would have more outputs
        (item,) = node.users
        with nodes.inserting_before(node):
            call = nodes.call_function(
                aten.convolution.default, (v, weight, None, stride, padding, dilation, not transposed, rest, groups)
            )
        call.meta["val"] = item.meta["val"]
        item.replace_all_uses_with(call)
    clean(nodes)


def _separate(nodes: fx.Graph) -> None:
    """Have each gradient of a convolution computed by itself: only so does each get the kernel that suits it."""
    for node in list(nodes.nodes):
        if node.target is aten.convolution_backward.default and len(node.users) > 1:
            for item in list(node.users):
                mask = [index == item.args[1] for index in range(3)]
                with nodes.inserting_before(item):
                    alone = nodes.call_function(node.target, (*node.args[:-1], mask))
                alone.meta["val"] = node.meta["val"]
                item.update_arg(0, alone)
            nodes.erase_node(node)


def _gradients_in_kernels(nodes: fx.Graph, transform: Callable[[ConvSpec], bool]) -> None:
    """Write gradients in a kernel as the convolutions that they are, of the input with the cotangent, where wanted.

    Channels take the place of the batch, stride and dilation that of each other.
    """
    for node in list(nodes.nodes):
        if node.target is not aten.convolution_backward.default or node.args[10] != [False, True, False]:
            continue
        v, x, weight, _, stride, padding, dilation, transposed, _, groups, _ = node.args
        source, cotangent, kernel = (n.meta["val"].transpose(0, 1) for n in (x, v, weight))
        if transposed or groups != 1 or source.dtype.is_complex:
            continue
        spec = _spec_of(source, kernel, cotangent.shape[2:], (dilation, padding, stride), False, [0], 1)
        if not transform(spec):
            continue
        (item,) = node.users
        with nodes.inserting_before(node):
            swapped = call(nodes, aten.transpose.int, x, 0, 1), call(nodes, aten.transpose.int, v, 0, 1)
            transformed = nodes.call_function(FFT.bind_prepack(spec), (swapped[1],))
            product = nodes.call_function(FFT.bind(spec), (swapped[0], transformed, None))
            transformed.meta["val"], product.meta["val"] = cotangent, kernel
            found = call(nodes, aten.transpose.int, product, 0, 1)
            found = call(nodes, aten.clone.default, found, memory_format=torch.contiguous_format)
        item.replace_all_uses_with(found)
    clean(nodes)


def _full(value: Any, length: int) -> list[int]:
    return list(value) * length if len(value) == 1 else list(value)


def _spec(node: fx.Node) -> ConvSpec:
    x, weight, _, stride, padding, dilation, transposed, output_padding, groups = node.args
    source, kernel, result = (n.meta["val"] for n in (x, weight, node))  # type: ignore[union-attr]
    return _spec_of(source, result, kernel.shape[2:], (stride, padding, dilation), transposed, output_padding, groups)


def _spec_of(
    source: Tensor, result: Tensor, kernel: Any, settings: Any, transposed: Any, rest: Any, groups: Any
) -> ConvSpec:
    """Return the spec of a convolution with the given stride, padding and dilation, one number for all or each."""
    stride, padding, dilation, rest = (tuple(_full(value, len(kernel))) for value in (*settings, rest))
    shapes = source.shape[0], tuple(source.shape[1:]), tuple(result.shape[1:]), tuple(kernel)
    return sized(
        ConvSpec(*shapes, stride, padding, dilation, bool(transposed), rest, groups, source.dtype, source.device)
    )


def _replace(nodes: fx.Graph, node: fx.Node, ends: tuple[Any, fx.Node], kernel: Kernel, spec: ConvSpec) -> None:
    """Put a kernel in place of a convolution, or of all from the source to the result at its ends."""
    (source, last), (weight, bias) = ends, node.args[1:3]
    x = source[0] if isinstance(source, list) else source  # of a sum of pieces, the only one
    with nodes.inserting_before(last):
        prepacked = weight
        if kernel.prepack is not None:
            prepacked = nodes.call_function(kernel.bind_prepack(spec), (weight,))
            prepacked.meta["val"] = weight.meta["val"]  # type: ignore[union-attr]  # a tensor: its size is not read
        call = nodes.call_function(kernel.bind(spec), (x, prepacked, bias))
    call.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(call)


def kernels_of(graph: Graph) -> tuple[str, ...]:
    """Return a line on each convolution of a graph: its kernel, and what it computes."""
    found = [bound(n.target) or (NATIVE, _spec(n)) for n in graph.body.nodes if bound(n.target) or _is_convolution(n)]
    return tuple(dict.fromkeys(_describe(*each) for each in found))


def _is_convolution(node: fx.Node) -> bool:
    return node.target is aten.convolution.default


def _describe(kernel: Kernel, spec: ConvSpec) -> str:
    kind = "transposed convolution" if spec.transposed else "convolution"
    channels = f"{spec.input_shape[0]}→{spec.output_shape[0]}"
    size, length = ("×".join(map(str, sizes)) for sizes in (spec.kernel, spec.fft_size))
    details = {"fft": f" of size {length}", "polyphase": f" in {math.prod(spec.phases)} phases"}
    return f"{kernel.name}{details.get(kernel.name, '')}, for the {kind} {channels} with a {size} kernel"
