"""Rewrite the convolutions of a graph to the fastest equal kernels; what depends on weights becomes prologue."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import call, clean, known, rewritten
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.kernels import fft
from adjointlab.transpose.kernels.convolution import ConvSpec, each_of, sized, smooth, spectra_meet
from adjointlab.transpose.kernels.registry import FFT, NATIVE, Kernel, bound
from adjointlab.transpose.kernels.select import Chooser
from adjointlab.transpose.passes.fuse_slices import circular

aten = torch.ops.aten


def lower(graph: Graph, choose: Chooser, transform: Callable[[ConvSpec], bool] = lambda _: False) -> Graph:
    """Return an equal graph with a chosen kernel for each convolution.

    ``transform`` says whether a gradient in a kernel is to be a product of transforms.
    """
    lowered = rewritten(graph, functools.partial(_gradient, transform=transform))
    for node in list(lowered.body.nodes):
        if node.target is aten.convolution.default:
            source, last, spec = node.args[0], node, _spec_of(node)
            cyclic = _cyclic(node, spec)
            # A transform needs no margin for circular padding: the chooser is told the size that it would have.
            kernel = choose(spec._replace(fft_size=cyclic[2].fft_size))
            if kernel is FFT:
                source, last, spec = cyclic
            if kernel.name != "native":
                with lowered.body.inserting_before(node):
                    found = _computed(lowered.body, kernel, spec, (source, *node.args[1:3]), last.meta["val"])
                last.replace_all_uses_with(found)
    clean(lowered.body)
    return lowered


def joined(graph: Graph) -> Graph:
    """Return an equal graph in which ``B(Ax − y)`` with two products of transforms is one: spectra are subtracted.

    A and B have no bias, and of ``Ax`` and the difference nothing else is used. That saves a transform of four.
    """

    def rule(nodes: fx.Graph, node: Any) -> fx.Node | None:
        second = transform_product(node)
        if second is None or node.args[0].target is not aten.sub.Tensor or node.args[0].kwargs:  # which may be a factor
            return None
        difference, b = node.args[:2]
        inner, y = difference.args
        first = transform_product(inner)
        if first is None or not isinstance(y, fx.Node) or len(difference.users) != 1 or len(inner.users) != 1:
            return None
        if inner.meta["val"].shape != y.meta["val"].shape or not spectra_meet(first, second):
            return None
        run = fft.gradient((first, second))
        return known(nodes.call_function(run, (inner.args[0], y, inner.args[1], b)), node.meta["val"])

    return rewritten(graph, rule)


def transform_product(node: Any) -> ConvSpec | None:
    """Return the spec of a product of transforms without a bias, None for any other node."""
    found = bound(node.target) if isinstance(node, fx.Node) else None
    return found[1] if found is not None and found[0] is FFT and node.args[2] is None else None


def multiplier(graph: Graph) -> fx.Node | None:
    """Return the node of ``K`` where all that a graph computes is ``v ↦ F⁻¹(K ⊙ F v)``, each channel by itself."""
    (node, *others), given = graph.outputs, graph.inputs
    spec = transform_product(node)
    if others or spec is None or [node.args[0]] != given:
        return None
    alone = spec.input_shape[0] == spec.output_shape[0] == spec.groups
    cyclic = spec.input_shape[1:] == spec.output_shape[1:] == spec.fft_size and all(s == 1 for s in spec.stride)
    return node.args[1] if alone and cyclic else None  # type: ignore[return-value]


def _cyclic(node: fx.Node, spec: ConvSpec) -> tuple[Any, fx.Node, ConvSpec]:
    """Return the source, last node and spec of a product of transforms, which does circular padding by itself."""
    itself = node.args[0], node, spec
    source, last, _ = itself
    around: Any = source
    if spec.transposed:  # whose result is folded back
        around = next(iter(node.users)) if len(node.users) == 1 and node.args[2] is None else node
    shifts = circular(around, inverse=spec.transposed)
    if shifts is None or any(shifts[:2]) or any(spec.padding):
        return itself
    if spec.transposed:
        last = around
    else:
        (source,) = around.args[0]
    shapes = [tuple(n.meta["val"].shape[1:]) for n in (source, last)]  # type: ignore[union-attr]
    whole = spec._replace(input_shape=shapes[0], output_shape=shapes[1], padding=shifts[2:])
    sizes = zip(*whole.sides, spec.stride, spec.extent, strict=True)
    fits = all(smooth(n) and (m - 1) * s < n and e <= n for n, m, s, e in sizes)
    return (source, last, whole._replace(fft_size=whole.sides[0])) if fits else itself


def _gradient(nodes: fx.Graph, item: Any, *, transform: Callable[[ConvSpec], bool]) -> fx.Node | None:
    """Return a gradient of a convolution as one itself, with a kernel that suits it, or have it computed alone."""
    if item.target is not operator.getitem or item.args[0].target is not aten.convolution_backward.default:
        return None
    (node, index), found = item.args, None
    if index == 2:  # of the bias: PyTorch would compute that in the kernel beside it
        cotangent: Any = node.args[0]
        return call(nodes, aten.sum.dim_IntList, cotangent, [0, *range(2, cotangent.meta["val"].ndim)])
    if not item.meta["val"].dtype.is_complex:  # native complex kernels come apart into real ones: left as they are
        if index == 0:
            found = _gradient_in_input(nodes, node)
        elif index == 1:
            found = _gradient_in_kernel(nodes, node, transform)
    mask = [each == index for each in range(3)]
    if found is None and node.args[-1] != mask:
        item.update_arg(0, call(nodes, node.target, *node.args[:-1], mask))
    return found


def _gradient_in_input(nodes: fx.Graph, node: Any) -> fx.Node | None:
    """Return the input gradient of a convolution as the transposed convolution that it is."""
    v, x, weight, _, *settings, transposed, _, groups, _ = node.args
    small, large, kernel = (n.meta["val"].shape[2:] for n in ((x, v, weight) if transposed else (v, x, weight)))
    settings = [each_of(value, len(kernel)) for value in settings]
    rest = [
        n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
        for m, n, k, s, p, d in zip(small, large, kernel, *settings, strict=True)
    ]
    if transposed:
        if any(r >= s for r, s in zip(rest, settings[0], strict=True)):
            return None  # an output padding of a stride or more: the plain convolution would have more outputs
        rest = [0] * len(rest)
    return call(nodes, aten.convolution.default, v, weight, None, *settings, not transposed, rest, groups)


def _gradient_in_kernel(nodes: fx.Graph, node: Any, transform: Callable[[ConvSpec], bool]) -> fx.Node | None:
    """Return the gradient in a kernel as the convolution that it is, of the input with the cotangent, where wanted."""
    # Channels take the place of the batch, stride and dilation that of each other.
    v, x, weight, _, stride, padding, dilation, transposed, _, groups, _ = node.args
    source, cotangent, kernel = (n.meta["val"].transpose(0, 1) for n in (x, v, weight))
    spec = _spec(source, cotangent, kernel, dilation, padding, stride, False, [0], 1)
    if transposed or groups != 1 or not transform(spec):
        return None
    swapped = [call(nodes, aten.transpose.int, n, 0, 1) for n in (x, v)]
    found = call(nodes, aten.transpose.int, _computed(nodes, FFT, spec, (*swapped, None), kernel), 0, 1)
    return call(nodes, aten.clone.default, found, memory_format=torch.contiguous_format)


def _computed(nodes: fx.Graph, kernel: Kernel, spec: ConvSpec, operands: Any, value: Tensor) -> fx.Node:
    """Add a call of a kernel, which reads what is prepacked from the weight."""
    x, weight, bias = operands
    if kernel.prepack is not None:  # to a tensor whose size is not read
        weight = known(nodes.call_function(kernel.bind_prepack(spec), (weight,)), weight.meta["val"])
    return known(nodes.call_function(kernel.bind(spec), (x, weight, bias)), value)


def _spec_of(node: fx.Node) -> ConvSpec:
    x, weight, _, *settings = node.args
    return _spec(*(n.meta["val"] for n in (x, weight, node)), *settings)  # type: ignore[union-attr]


def _spec(
    x: Tensor, weight: Tensor, y: Tensor, stride: Any, padding: Any, dilation: Any, transposed: Any, rest: Any,
    groups: Any,
) -> ConvSpec:  # fmt: skip
    """Return the spec of a convolution: settings are one number for all dimensions or each."""
    kernel = tuple(weight.shape[2:])
    stride, padding, dilation, rest = (tuple(each_of(n, len(kernel))) for n in (stride, padding, dilation, rest))
    shapes = x.shape[0], tuple(x.shape[1:]), tuple(y.shape[1:]), kernel
    return sized(ConvSpec(*shapes, stride, padding, dilation, bool(transposed), rest, groups, x.dtype, x.device))


def kernels_of(graph: Graph) -> tuple[str, ...]:
    """Return a line on each convolution and map by index of a graph: its kernel, and what it computes."""
    native = aten.convolution.default
    found = [(NATIVE, _spec_of(n)) if n.target is native else bound(n.target) for n in graph.body.nodes]
    maps = [node.meta["account"] for node in graph.body.nodes if "account" in node.meta]
    return tuple(dict.fromkeys([*(_describe(*each) for each in found if each is not None), *maps]))


def _describe(kernel: Kernel, spec: ConvSpec) -> str:
    kind = "transposed convolution" if spec.transposed else "convolution"
    channels = f"{spec.input_shape[0]}→{spec.output_shape[0]}"
    size, length = ("×".join(map(str, sizes)) for sizes in (spec.kernel, spec.fft_size))
    words = {
        "native": "native, PyTorch's own",
        "flipped": "flipped, a plain convolution with the flipped kernel",
        "tapped": "tapped, a sum of shifted images",
        "polyphase": f"polyphase, {math.prod(spec.phases)} outputs at a time",
        "fft": f"fft of size {length}, a product of Fourier transforms",
    }
    return f"{words[kernel.name]}, for the {kind} {channels} with a {size} kernel"
