"""TorchScript, run operation by operation: its own interpreter reads values, which tensors in a trace do not have.

Operations on tensors go through PyTorch's dispatcher, where a trace sees them; what TorchScript does with numbers and
lists is done by Python.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from adjointlab import compat
from adjointlab.compat import RefusedError

_MOST_STEPS = 100_000  # of loops, so that one that never ends is refused


def run(script: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of a scripted function or method."""
    owner = getattr(script, "owner", None)
    given = list(args) if owner is None else [owner, *args]
    for argument in script.schema.arguments[len(given) :]:
        if argument.name not in kwargs and not argument.has_default_value():
            raise TypeError(f"expected an argument {argument.name} of {script.name}")
        given.append(kwargs.get(argument.name, argument.default_value))
    return _called(script.inlined_graph, given)


def _called(graph: Any, given: list[Any]) -> Any:
    values = dict(zip((v.debugName() for v in graph.inputs()), given, strict=True))
    found = _run(graph.nodes(), graph.outputs(), values)
    return found[0] if len(found) == 1 else tuple(found)


def _run(nodes: Iterable[Any], results: Iterable[Any], values: dict[str, Any]) -> list[Any]:
    for node in nodes:
        outputs = [value.debugName() for value in node.outputs()]
        values.update(zip(outputs, _step(node, values), strict=True))
    return [values[value.debugName()] for value in results]


def _step(node: Any, values: dict[str, Any]) -> list[Any]:
    kind, inputs = node.kind(), [values[value.debugName()] for value in node.inputs()]
    if kind == "prim::Constant":
        return [next(node.outputs()).toIValue()]
    if kind == "prim::GetAttr":
        return [inputs[0].getattr(node.s("name"))]
    if kind == "prim::If":
        first, second = node.blocks()
        block = first if _number(inputs[0]) else second
        return _run(block.nodes(), block.outputs(), values)
    if kind == "prim::Loop":
        (block,) = node.blocks()
        return _loop(block, inputs, values)
    if kind == "prim::fork":  # a thread of its own, which is waited for below
        part = compat.inlined(node.g("Subgraph"))
        found = _run(
            part.nodes(), part.outputs(), dict(zip((v.debugName() for v in part.inputs()), inputs, strict=True))
        )
        return [found[0] if len(found) == 1 else tuple(found)]
    if kind in {"prim::TupleUnpack", "prim::ListUnpack"}:
        return list(inputs[0])
    if kind in _PLAIN:
        return [_PLAIN[kind](*inputs)][: node.outputsSize()]
    if kind == "prim::DictConstruct":
        return [dict(zip(inputs[::2], inputs[1::2], strict=True))]
    if kind in {"prim::RaiseException", "prim::SetAttr"} or node.schema() == "(no schema)":
        raise RefusedError(f"it calls TorchScript with {kind}, which is not traced")
    if kind in _OF_PYTHON and not isinstance(inputs[0], Tensor):
        return [_OF_PYTHON[kind](*inputs)][: node.outputsSize()]
    found = compat.scripted_operation(node.schema(), inputs)
    return list(found) if node.outputsSize() > 1 else [found][: node.outputsSize()]


def _loop(block: Any, inputs: list[Any], values: dict[str, Any]) -> list[Any]:
    most, goes_on, *carried = inputs
    names, step = [value.debugName() for value in block.inputs()], 0
    while step < most and _number(goes_on):
        if step == _MOST_STEPS:
            raise RefusedError(f"it calls TorchScript with a loop of more than {_MOST_STEPS:,} steps")
        values.update(zip(names, [step, *carried], strict=True))
        goes_on, *carried = _run(block.nodes(), block.outputs(), values)
        step += 1
    return carried


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _converted(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda value, *_: kind(_number(value))


def _appended(items: list[Any], item: Any) -> list[Any]:
    items.append(item)
    return items


# TorchScript writes a dtype as its number.
_DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
    torch.complex32, torch.complex64, torch.complex128, torch.bool, None, None, None, torch.bfloat16,
)  # fmt: skip


def _tensor(data: Any, dtype: int | None, device: Any, requires_grad: bool) -> Tensor:
    kind = None if dtype is None else _DTYPES[dtype]
    return torch.tensor(data, dtype=kind, device=device, requires_grad=requires_grad)


_PLAIN: dict[str, Callable[..., Any]] = {
    "prim::ListConstruct": lambda *items: list(items),
    "prim::TupleConstruct": lambda *items: items,
    "prim::TupleIndex": operator.getitem,
    "prim::NumToTensor": lambda number: number,  # a trace's way to write a size, which is a number again below
    "prim::unchecked_cast": lambda value: value,
    "prim::Uninitialized": lambda: None,
    "prim::Print": lambda *_: None,
    "prim::device": lambda tensor: tensor.device,
    "prim::dtype": lambda tensor: _DTYPES.index(tensor.dtype),
    "prim::min": min,
    "prim::max": max,
    "aten::warn": lambda *_: None,
    "aten::Int": _converted(int),
    "aten::Float": _converted(float),
    "aten::Bool": _converted(bool),
    "aten::IntImplicit": _converted(int),
    "aten::FloatImplicit": _converted(float),
    "aten::ScalarImplicit": _number,
    "aten::item": _number,
    "aten::__is__": operator.is_,
    "aten::__isnot__": operator.is_not,
    "aten::__not__": operator.not_,
    "aten::__getitem__": operator.getitem,
    "aten::append": _appended,
    "aten::_set_item": operator.setitem,
    "aten::keys": list,
    "aten::values": lambda known: list(known.values()),
    "aten::items": lambda known: list(known.items()),
    "aten::__contains__": operator.contains,
    "aten::wait": lambda value: value,
    "aten::str": str,
    "aten::format": str.format,
    "aten::len": len,
    "aten::list": list,
}
# Of numbers, strings and lists of any kind; of tensors, they are PyTorch's.
_OF_PYTHON: dict[str, Callable[..., Any]] = {
    "aten::add": operator.add, "aten::sub": operator.sub, "aten::mul": operator.mul, "aten::div": operator.truediv,
    "aten::floordiv": operator.floordiv, "aten::remainder": operator.mod, "aten::pow": operator.pow,
    "aten::neg": operator.neg, "aten::eq": operator.eq, "aten::ne": operator.ne, "aten::lt": operator.lt,
    "aten::le": operator.le, "aten::gt": operator.gt, "aten::ge": operator.ge,
    "aten::add_": operator.iadd, "aten::extend": lambda items, more: items.extend(more),
    "aten::insert": lambda items, *where: items.insert(*where), "aten::pop": lambda items, *where: items.pop(*where),
    "aten::slice": lambda items, *where: items[slice(*where)], "aten::tensor": _tensor,
}  # fmt: skip
