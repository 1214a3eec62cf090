"""Rewrite the convolutions of a graph to the fastest equal kernels; what depends on weights becomes prologue."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.ir import Graph, call, clean, part
from adjointlab.transpose.kernels import registry as kernels
from adjointlab.transpose.kernels import slabs
from adjointlab.transpose.kernels.convolution import Site, sized, smooth, spectra_meet
from adjointlab.transpose.passes.fuse_slices import circular

aten = torch.ops.aten


def lower(
    graph: Graph, choose: Callable[[Site], str], transform: Callable[[Site], bool] = lambda _: False
) -> tuple[Graph, tuple[str, ...]]:
    """Return an equal graph with a chosen kernel for each convolution, and a line on each choice.

    ``transform`` says whether a gradient in a kernel is to be a product of transforms.
    """
    lowered = part(graph, graph.outputs)
    _separate(lowered.body)
    _backward_as_transposed(lowered)
    lines = _gradients_in_kernels(lowered.body, transform)
    for node in list(lowered.body.nodes):
        if node.target is aten.convolution.default:
            site = _site(node)
            name = choose(site)
            first, last = node, node
            if name == "fft":
                first, last, site = _cyclic(node, site)
            lines.append(_describe(name, site))
            if name != "native":
                _replace(lowered.body, node, (first.args[0], last), name, site)
    clean(lowered.body)
    return lowered, tuple(lines)


def joined(graph: Graph) -> Graph | None:
    """Return an equal graph in which ``B(Ax − y)`` with two products of transforms is one, or None without any."""

    def join(inner: fx.Node, y: fx.Node, node: fx.Node) -> Any:
        if inner.target is not kernels.fft or node.target is not kernels.fft:
            return None
        (x, first, _, site), (_, second, _, to) = inner.args, node.args
        assert isinstance(site, Site)
        assert isinstance(to, Site)
        return (kernels.gradient, (x, y, first, second, (site, to))) if spectra_meet(site, to) else None

    return _with_joined(graph, join)


def in_slabs(graph: Graph) -> Graph | None:
    """Return an equal graph in which ``B(Ax − y)`` of a volume is computed slab by slab, or None without any."""

    def join(inner: fx.Node, y: fx.Node, node: fx.Node) -> Any:
        if kernels.fft in {inner.target, node.target}:
            return None
        (first, site), (second, to) = _origin(inner), _origin(node)
        if not slabs.suited(site, to):
            return None
        with y.graph.inserting_before(node):
            a = y.graph.call_function(slabs.gathering, (first, site))
            b = y.graph.call_function(slabs.scattering, (second, site))
        a.meta["val"], b.meta["val"] = first.meta["val"], second.meta["val"]  # tensors: their sizes are not read
        return slabs.gradient, (inner.args[0], y, a, b, site)

    return _with_joined(graph, join)


def _with_joined(graph: Graph, join: Callable[[fx.Node, fx.Node, fx.Node], Any]) -> Graph | None:
    """Return an equal graph with one call for each ``Ax``, y and ``B(Ax − y)`` that can be joined, None without any.

    A and B are convolutions without a bias, and of ``Ax`` and the difference nothing else is used.
    """
    lowered = part(graph, graph.outputs)
    found = False
    for node in list(lowered.body.nodes):
        if not _convolves(node):
            continue
        difference = node.args[0]
        if difference.target is not aten.sub.Tensor or difference.kwargs:  # which may be a factor
            continue
        inner, y = difference.args
        if not isinstance(y, fx.Node) or not _convolves(inner):
            continue
        alone = len(difference.users) == len(inner.users) == 1
        call = join(inner, y, node) if alone and inner.meta["val"].shape == y.meta["val"].shape else None
        if call is not None:
            with lowered.body.inserting_before(node):
                whole = lowered.body.call_function(*call)
            whole.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(whole)
            found = True
    clean(lowered.body)
    return lowered if found else None


def _convolves(node: fx.Node) -> bool:
    """Return whether a node is a convolution without a bias, by whatever kernel."""
    return (node.target is aten.convolution.default or node.target in _LOWERED) and node.args[2] is None


_LOWERED = set(kernels.KERNELS.values())


def _origin(node: fx.Node) -> tuple[fx.Node, Site]:
    """Return the weight of a convolution, and its site."""
    if node.target is aten.convolution.default:
        return node.args[1], _site(node)  # type: ignore[return-value]
    _, prepared, _, site = node.args
    return prepared.args[0], site  # type: ignore[return-value, union-attr]


def multiplier(graph: Graph) -> fx.Node | None:
    """Return the node of ``K`` where all that a graph computes is ``v ↦ F⁻¹(K ⊙ F v)``, each channel by itself."""
    (node, *others), given = graph.outputs, graph.inputs
    if others or node.target is not kernels.fft:
        return None
    v, transform, bias, site = node.args
    assert isinstance(site, Site)
    assert isinstance(transform, fx.Node)
    alone = site.input_shape[0] == site.output_shape[0] == site.groups
    cyclic = site.input_shape[1:] == site.output_shape[1:] == site.fft_size and all(s == 1 for s in site.stride)
    return transform if [v] == given and bias is None and alone and cyclic else None


def _cyclic(node: fx.Node, site: Site) -> tuple[fx.Node, fx.Node, Site]:
    """Return the first and last node of what one product of transforms computes, and the site of it all.

    A convolution of a circularly padded image is cyclic: the transform does by itself what the padding did, on an image
    of the size before. So is the transpose, whose result is folded back.
    """
    alone = site.transposed and len(node.users) == 1 and node.args[2] is None
    around = next(iter(node.users)) if alone else node.args[0]
    shifts = None
    if alone or not site.transposed:
        assert isinstance(around, fx.Node)
        shifts = circular(around, inverse=site.transposed)
    if shifts is None or any(shifts[:2]) or any(site.padding):
        return node, node, site
    first, last = (node, around) if site.transposed else (around, node)
    source, result = first.all_input_nodes[0].meta["val"], last.meta["val"]  # type: ignore[union-attr]
    whole = site._replace(
        input_shape=tuple(source.shape[1:]), output_shape=tuple(result.shape[1:]), padding=shifts[2:],
        fft_size=tuple((result if site.transposed else source).shape[2:]),
    )  # fmt: skip
    strided = (source if site.transposed else result).shape[2:]
    fits = all(
        smooth(n) and (m - 1) * s < n and e <= n
        for n, m, s, e in zip(whole.fft_size, strided, site.stride, site.extent, strict=True)
    )
    return (first, last, whole) if fits else (node, node, site)  # type: ignore[return-value]


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


def _gradients_in_kernels(nodes: fx.Graph, transform: Callable[[Site], bool]) -> list[str]:
    """Write gradients in a kernel as the convolutions that they are, of the input with the cotangent, where wanted.

    Channels take the place of the batch, stride and dilation that of each other.
    """
    lines = []
    for node in list(nodes.nodes):
        if node.target is not aten.convolution_backward.default or node.args[10] != [False, True, False]:
            continue
        v, x, weight, _, stride, padding, dilation, transposed, _, groups, _ = node.args
        source, cotangent, kernel = (n.meta["val"].transpose(0, 1) for n in (x, v, weight))
        if transposed or groups != 1 or source.dtype.is_complex:
            continue
        site = _sited(source, kernel, cotangent.shape[2:], (dilation, padding, stride), False, [0], 1)
        if not transform(site):
            continue
        (item,) = node.users
        with nodes.inserting_before(node):
            swapped = call(nodes, aten.transpose.int, x, 0, 1), call(nodes, aten.transpose.int, v, 0, 1)
            spectrum = nodes.call_function(kernels.spectrum, (swapped[1], site))
            product = nodes.call_function(kernels.fft, (swapped[0], spectrum, None, site))
            spectrum.meta["val"], product.meta["val"] = cotangent, kernel
            found = call(nodes, aten.transpose.int, product, 0, 1)
            found = call(nodes, aten.clone.default, found, memory_format=torch.contiguous_format)
        item.replace_all_uses_with(found)
        lines.append(f"fft of size {_by(site.fft_size)}, for the gradient in a {_by(kernel.shape[2:])} kernel")
    clean(nodes)
    return lines


def _full(value: Any, length: int) -> list[int]:
    return list(value) * length if len(value) == 1 else list(value)


def _site(node: fx.Node) -> Site:
    x, weight, _, stride, padding, dilation, transposed, output_padding, groups = node.args
    source, kernel, result = (n.meta["val"] for n in (x, weight, node))  # type: ignore[union-attr]
    return _sited(source, result, kernel.shape[2:], (stride, padding, dilation), transposed, output_padding, groups)


def _sited(source: Tensor, result: Tensor, kernel: Any, settings: Any, transposed: Any, rest: Any, groups: Any) -> Site:
    """Return the site of a convolution with the given stride, padding and dilation, one number for all or each."""
    stride, padding, dilation, rest = (tuple(_full(value, len(kernel))) for value in (*settings, rest))
    shapes = source.shape[0], tuple(source.shape[1:]), tuple(result.shape[1:]), tuple(kernel)
    return sized(Site(*shapes, stride, padding, dilation, bool(transposed), rest, groups, source.dtype, source.device))


def _replace(nodes: fx.Graph, node: fx.Node, ends: tuple[Any, fx.Node], name: str, site: Site) -> None:
    """Put a kernel in place of a convolution, or of all from the source to the result at its ends."""
    (source, last), (weight, bias) = ends, node.args[1:3]
    x = source[0] if isinstance(source, list) else source  # of a sum of pieces, the only one
    with nodes.inserting_before(last):
        prepared = nodes.call_function(kernels.PREPARE[name], (weight, site))
        prepared.meta["val"] = weight.meta["val"]  # type: ignore[union-attr]  # a tensor: its size is not read
        call = nodes.call_function(kernels.KERNELS[name], (x, prepared, bias, site))
    call.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(call)


def _describe(name: str, site: Site) -> str:
    kind = "transposed convolution" if site.transposed else "convolution"
    c_in, c_out = site.input_shape[0], site.output_shape[0]
    details = {"fft": f" of size {_by(site.fft_size)}", "polyphase": f" in {math.prod(site.phases)} phases"}
    return f"{name}{details.get(name, '')}, for the {kind} {c_in}→{c_out} with a {_by(site.kernel)} kernel"


def _by(sizes: Iterable[int]) -> str:
    return "×".join(map(str, sizes))


__all__ = ["in_slabs", "joined", "lower", "multiplier"]
