"""Tables of ATen operations: which are views, which read no values, which hide values from autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def op_name(target: Any) -> str:
    """Return the short name of an op, such as ``convolution_backward``."""
    packet = getattr(target, "overloadpacket", None)
    return str(packet).removeprefix("aten.") if packet is not None else getattr(target, "__name__", str(target))


def packet_of(node: fx.Node) -> Any:
    """Return the op of a node, whatever its overload; for what is no op, the target itself."""
    return getattr(node.target, "overloadpacket", node.target)


def has_tag(target: Any, tag: torch.Tag) -> bool:
    """Return whether PyTorch says of an op that it is pointwise, or random, say."""
    return tag in getattr(target, "tags", ())


def uncopied(node: Any) -> Any:
    """Return what a node is a plain copy of; any other node itself."""
    is_copy = node.target is aten.clone.default and not node.kwargs
    return node.args[0] if is_copy else node


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by name, in the order of the op's schema; none for what is no op."""
    names = [argument.name for argument in getattr(getattr(node.target, "_schema", None), "arguments", ())]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def window(shape: Sequence[int], dim: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> tuple[int, ...]:
    """Return the dimension, and the first entry, the end and the step of a slice, from the arguments of its call."""
    return dim % len(shape), *slice(start, stop, step).indices(shape[dim])


def is_mutable(target: Any) -> bool:
    """Return whether an op writes to one of its arguments."""
    return bool(getattr(getattr(target, "_schema", None), "is_mutable", False))


VIEWS = {
    aten.view, aten.transpose, aten.permute, aten.t, aten.expand, aten.squeeze, aten.unsqueeze, aten.slice, aten.select,
    aten._conj, aten.alias, aten.detach, aten.as_strided, aten.view_as_real, aten.view_as_complex, aten.unfold,
    aten.diagonal, aten._unsafe_view, aten.reshape, aten._neg_view,
}  # fmt: skip

# Ops that read the metadata of their first operand only.
LIKE = {
    aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like,
    aten.new_zeros, aten.new_ones, aten.new_empty, aten.new_full, aten.new_empty_strided, aten.fill, aten.zero,
}  # fmt: skip
# Operations that raise, and return nothing.
CHECKS = {aten._linalg_check_errors.default, aten._assert_async.default, aten._assert_async.msg}

# Operations whose derivative is that of a part of the result, or zero, at every input.
STEPS = {
    aten.detach, aten.floor, aten.ceil, aten.round, aten.trunc, aten.frac, aten.fmod, aten.remainder,
    aten.floor_divide, aten.sign, aten.sgn, aten.nextafter,
}  # fmt: skip
