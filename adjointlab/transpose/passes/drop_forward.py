"""From the graph of a VJP to the adjoint: cut loose what reads the primal for its shape only, drop the forward.

The VJP is that in the input and in the state; each part is a graph by itself.

The value of the primal is *demanded* by an output if some chain of ops leads from the one to the other on which every
op reads the value of its operand, not only its metadata. If nothing demands it, the Jacobian is the same at every
primal: the map is affine. That is a proof as far as autograd tells the truth about derivatives.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from adjointlab.transpose.graph.edit import call, clean, dependents, part, reached, zeros
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import LIKE, STEPS, op_name, packet_of

aten = torch.ops.aten

# Operations that read their second operand for shape, dtype and device only, whatever their other arguments.
_SHAPE_OF_SECOND = {
    aten.reflection_pad1d_backward, aten.reflection_pad2d_backward, aten.reflection_pad3d_backward,
    aten.replication_pad1d_backward, aten.replication_pad2d_backward, aten.replication_pad3d_backward,
    aten.avg_pool2d_backward, aten.avg_pool3d_backward,
    aten._adaptive_avg_pool2d_backward, aten._adaptive_avg_pool3d_backward,
}  # fmt: skip


def _shape_only(node: Any) -> tuple[int, ...]:
    """Return the positions of operands whose values ``node`` does not read."""
    packet, args = packet_of(node), node.args
    if packet in LIKE:
        return (0,)
    if (saved := _saved_statistics(node)) is not None:
        return (1,) if saved else (1, 5, 6)
    is_linear = (
        packet in _SHAPE_OF_SECOND
        or (packet is aten.convolution_backward and args[10] == [True, False, False])
        or (packet in {aten.grid_sampler_2d_backward, aten.grid_sampler_3d_backward} and not args[6][1])
    )
    return (1,) if is_linear else ()


@dataclass(frozen=True)
class Adjoint:
    """The adjoint as a graph, and how it was found."""

    graph: Graph  # (*state, *cotangents) → Aᴴ cotangents, with no forward in it
    of_state: Graph | None  # (*state, *primals, *cotangents) → gradients in the state, None for each that is not known
    readers: tuple[str, ...]  # operations that still read the primal; if there are none, the map is affine by proof
    ops_before: Counter[str]  # of the vector-Jacobian product


def drop_forward(whole: Graph, n_primals: int) -> Adjoint:
    """Return the adjoint without its forward, and the gradients in the state with what they need of it."""
    outputs = whole.outputs
    vjp, of_state = part(whole, outputs[:n_primals]), None
    if any(node is not None for node in outputs[n_primals:]):
        of_state = part(whole, outputs[n_primals:])
    graph, before = vjp.body, ops(vjp)
    primals = vjp.inputs[:n_primals]
    for node in list(graph.nodes):
        _take_running_statistics(graph, node)
    tainted, cotangents = dependents(primals), dependents(vjp.inputs[n_primals:])
    demanded = reached([node for node in vjp.outputs if node is not None], _values_read)
    reads = set[fx.Node]() if demanded.isdisjoint(primals) else tainted - cotangents
    readers = dict.fromkeys(
        op_name(node.target)
        for node in graph.nodes
        if node in demanded and node in cotangents and not reads.isdisjoint(_values_read(node))
    )
    for node in graph.nodes:
        for position in _shape_only(node) if node in demanded else ():
            if node.args[position] in tainted:
                node.update_arg(position, _stand_in(graph, node, node.args[position]))
    # A linear map has one Jacobian. Where its graph reads the primal all the same, it is evaluated at zero.
    for primal in primals:
        with graph.inserting_after(primal):
            primal.replace_all_uses_with(zeros(graph, primal.meta["val"]))
    clean(graph)
    for primal in primals:
        graph.erase_node(primal)
    return Adjoint(vjp, of_state, tuple(readers), before)


# Their derivatives choose between numbers, by "where".
_CHOICES = {"clamp", "clamp_min", "clamp_max", "hardtanh", "hardshrink", "maximum", "minimum", "fmax", "fmin"}


def choices_named(readers: tuple[str, ...], forward: Graph) -> tuple[str, ...]:
    """Return readers with the operation of the forward, as its user wrote it, for what its derivative chooses by."""
    written = [op_name(node.target) for node in forward.body.nodes if node.op == "call_function"]
    chosen = () if "where" in written else tuple(name for name in written if name in _CHOICES)
    return tuple(dict.fromkeys(name for reader in readers for name in ((reader == "where" and chosen) or (reader,))))


def ops(graph: Graph) -> Counter[str]:
    """Count the ops of a graph by name; what only stands for a shape is none."""
    return Counter(
        op_name(n.target)
        for n in graph.body.nodes
        if n.op == "call_function" and op_name(n.target) != "getitem" and "stands_for" not in n.meta
    )


def _values_read(node: fx.Node) -> list[fx.Node]:
    """Return the operands whose values a node reads, not only their shapes."""
    skipped, read = _shape_only(node), list[fx.Node]()
    values = [argument for position, argument in enumerate(node.args) if position not in skipped]
    fx.map_arg((values, node.kwargs), read.append)
    return read


def _take_running_statistics(graph: fx.Graph, node: fx.Node) -> None:
    """Have a batch norm in evaluation read the running statistics themselves, not what the forward saved of them."""
    if _saved_statistics(node):
        mean, variance = node.args[3:5]
        with graph.inserting_before(node):
            moved = call(graph, aten.add.Tensor, variance, node.args[8])
            inverse = call(graph, aten.rsqrt.default, moved)
        node.update_arg(5, mean)
        node.update_arg(6, inverse)


def _saved_statistics(node: fx.Node) -> int | None:
    """Return how many statistics the derivative in x of a batch norm in evaluation reads; None for any other node."""
    packet = packet_of(node)
    if packet is not aten.native_batch_norm_backward or node.args[7] or node.args[9] != [True, False, False]:
        return None
    saved = node.args[5]  # by kernels for CUDA: what those for the CPU save is empty, and not read
    return saved.meta["val"].numel() if isinstance(saved, fx.Node) else 0


def _stand_in(graph: fx.Graph, before: fx.Node, operand: Any) -> fx.Node:
    """Return a zero of the operand's shape that takes the memory of one number."""
    value = operand.meta["val"]
    with graph.inserting_before(before):
        zero = zeros(graph, value.new_empty(()))
        shaped = call(graph, aten.expand.default, zero, list(value.shape))
    zero.meta["stands_for"] = shaped.meta["stands_for"] = tuple(value.shape)
    return shaped


def cut_off(graph: Graph) -> str:
    """Return the name of an op that cuts a value of the input off from autograd, if there is one.

    That is one whose result is no floating-point number, or whose derivative is that of a part of it, at every input.
    """
    seen = set(graph.inputs)
    for node in graph.body.nodes:
        packet = packet_of(node)
        if packet in LIKE or not any(operand in seen for operand in node.all_input_nodes):
            continue
        value = node.meta.get("val")
        discrete = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
        if discrete or packet in STEPS or node.kwargs.get("rounding_mode"):
            return op_name(node.target)
        seen.add(node)
    return ""
