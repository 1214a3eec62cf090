"""The expected cost of a call of a program: arithmetic operations, and bytes that are read and written."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.compat import pytree
from adjointlab.transpose.graph.edit import dependents
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import VIEWS, packet_of
from adjointlab.transpose.kernels.convolution import ConvSpec, window
from adjointlab.transpose.kernels.registry import FFT, POLYPHASE, bound

aten = torch.ops.aten
_FREE = {*VIEWS, operator.getitem}
_TRANSFORMS = {aten._fft_c2c, aten._fft_r2c, aten._fft_c2r}


def cost(graph: Graph) -> tuple[int, int]:
    """Return the arithmetic operations and the bytes of a call, as far as the input is concerned, by count."""
    work = moved = 0
    after_input = dependents(graph.inputs)
    for node in graph.body.nodes:
        if node.op != "call_function" or node not in after_input or packet_of(node) in _FREE:
            continue
        work += _work(node)
        moved += sum(_bytes(each) for each in {*node.all_input_nodes, node} if "stands_for" not in each.meta)
    return work, moved


def _tensors(node: fx.Node) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def _bytes(node: fx.Node) -> int:
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in _tensors(node))


def _work(node: fx.Node) -> int:
    """Return the operations of a node; one for each entry of its result where nothing more is known."""
    found = bound(node.target)
    if found is not None:
        return _of_convolution(*found)
    if "entries" in node.meta:
        return int(2 * node.meta["entries"])
    packet, results = packet_of(node), _tensors(node)
    if packet in _TRANSFORMS:
        (result,), (operand, *_) = results, _tensors(node.all_input_nodes[0])
        size = max(result.numel(), operand.numel())
        dims: Any = node.args[1]
        points = math.prod(max(result.shape[d], operand.shape[d]) for d in dims)
        return int((5 if packet is aten._fft_c2c else 2.5) * size * math.log2(max(2, points)))
    if packet is aten.mv:
        return 2 * _tensors(node.all_input_nodes[0])[0].numel()
    known = _formulas().get(packet)
    if known is not None:
        values, options = fx.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
        return int(known(*values, **options, out_val=node.meta["val"]))
    return sum(result.numel() for result in results)


def _formulas() -> Any:
    from torch.utils.flop_counter import flop_registry  # which only those who ask for the cost are to wait for

    return flop_registry


def _of_convolution(kernel: Any, spec: ConvSpec) -> int:
    if kernel is FFT:
        size = math.prod(spec.fft_size)
        channels = spec.input_shape[0], spec.output_shape[0]
        transforms = 2.5 * sum(channels) * spec.batch * size * math.log2(max(2, size))
        return int(transforms + 4 * math.prod(channels) // spec.groups * spec.batch * size)
    if kernel is POLYPHASE:
        return 2 * spec.batch * math.prod(spec.output_shape) * spec.input_shape[0] * math.prod(window(spec))
    return 2 * spec.macs
