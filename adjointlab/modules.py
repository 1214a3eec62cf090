"""The modules that a function reaches, the tensors that they hold, and whether they are as they were.

This is what is known of a function where PyTorch's own front end refuses it. Of Python state it sees what modules hold:
``training``, plain attributes, submodules. All else is taken to be as it was when the operator was built.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from adjointlab.errors import SpaceMismatchError
from adjointlab.numerics import same

_MOST_NAMED = 64  # entries of a container that a function names, of which each is looked at
_PLAIN = (bool, int, float, complex, str, bytes, type(None), range, torch.dtype, torch.device, torch.Size)
_TENSORS = ("_parameters", "_buffers")
_DEPTH = 4  # of containers and objects that are opened: what lies deeper is not a part of a function


@dataclass(frozen=True)
class Source:
    """Where a tensor of the state is read from, under a name for messages."""

    read: Callable[[], Tensor]
    name: str
    is_private: bool = False  # whether nobody else has it: it has the same values while it is the same tensor
    # Of one that follows a parameter to where that is replaced: where it was read from, and the parameter.
    origin: tuple[Source, Tensor] | None = field(default=None, compare=False)


def read_all(sources: Iterable[Source]) -> tuple[Tensor, ...]:
    """Return the tensors of sources, as they are now."""
    return tuple([source.read() for source in sources])


def modules_of(function: Any, kwargs: Any = None) -> tuple[nn.Module, ...]:
    """Return the outermost modules that a function is, is a method of, closes over, or names as a global."""
    found: dict[int, nn.Module] = {}
    seen: dict[int, Any] = {}

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, (*_PLAIN, Tensor, types.ModuleType, type)) or id(value) in seen:
            return
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            found[id(value)] = value
            for inner in vars(value).values() if depth else ():  # a method of a module's helper, say
                visit(inner, depth - 1) if isinstance(inner, (list, tuple, dict)) else None
            return
        for part in _parts(value) if depth else ():
            visit(part, depth - 1)

    visit(function, _DEPTH)
    visit(kwargs, _DEPTH)
    inner = {id(part) for module in found.values() for part in module.modules() if part is not module}
    return tuple(module for key, module in found.items() if key not in inner)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        modules = [item for item in named if isinstance(item, nn.Module)]
        return [*cells, *modules, value.__defaults__, value.__kwdefaults__, getattr(value, "__wrapped__", None)]
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    return list(getattr(value, "__dict__", {}).values())


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a cell that is not filled yet
        return False


def has_guards(function: Any, modules: tuple[nn.Module, ...]) -> bool:
    """Return whether a part of a function has guards of ``torch.compile``: it is compiled, or an operator."""
    named = [read() for read in _named(function).values()]
    inner = [item for value in named for item in _inner(value).values()]
    parts = (part for module in modules for part in module.modules())
    compiled = any(hasattr(p, "_torchdynamo_orig_callable") or "_orig_mod" in getattr(p, "_modules", ())
                   for p in (function, *named, *inner, *parts))  # fmt: skip
    return compiled or bool(sources_inside(modules))


def sources_inside(modules: tuple[nn.Module, ...]) -> list[Any]:
    """Return the derivations of the operators that modules are or contain."""
    parts = (part for module in modules for part in module.modules())
    found = (getattr(part, "source", None) for part in parts if type(part).__module__.startswith("adjointlab."))
    return list({id(source): source for source in found if source is not None}.values())


def require_shapes(modules: tuple[nn.Module, ...]) -> None:
    """Raise on a lazy module, whose parameters have no shapes yet."""
    for module in modules:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if is_lazy(tensor):
                raise SpaceMismatchError(
                    f"expected a module whose parameters have shapes, but {name} of a lazy module has none yet: run "
                    "the module once before"
                )


def sources_of(modules: tuple[nn.Module, ...]) -> dict[int, Source]:
    """Return where tensors of modules are read from: parameters, buffers, and attributes that are or hold tensors."""
    found: dict[int, Source] = {}

    def add(container: Any, key: Any, name: str, depth: int = 2) -> None:
        item = container[key]
        if isinstance(item, Tensor):
            read: Any = functools.partial(operator.getitem, container, key)
            found.setdefault(id(item), Source(read, name))
        elif depth and isinstance(item, (list, tuple)):
            for index in range(len(item)):
                add(item, index, f"{name}[{index}]", depth - 1)
        elif depth and type(item) is dict:
            for inner in item:
                add(item, inner, f"{name}[{inner!r}]", depth - 1)

    for module in modules:
        for path, part in module.named_modules():
            for tensors in (*(getattr(part, name) for name in _TENSORS), vars(part)):
                for key in tuple(tensors.keys()):  # those of a scripted module are no dictionary
                    if key not in (*_TENSORS, "_modules"):
                        add(tensors, key, f"{path}.{key}".lstrip("."))
    return found


def sources_named(function: Any) -> dict[int, Source]:
    """Return where a function finds the tensors that it names: in its closure and globals, and one step further."""
    found: dict[int, Source] = {}
    for name, read in _named(function).items():
        value = read()
        if isinstance(value, Tensor):
            found.setdefault(id(value), Source(read, name))
        for key, item in _inner(value).items():
            if isinstance(item, Tensor):
                found.setdefault(id(item), Source(functools.partial(_within, read, key), f"{name}[{key!r}]"))
    return found


def _named(function: Any) -> dict[str, Callable[[], Any]]:
    """Return a reader for each object that a function, or a function that it names, finds by name."""
    found: dict[str, Callable[[], Any]] = {}
    pending, seen = [function], set[int]()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, functools.partial):
            pending.append(value.func)
            found[f"arguments {len(seen)}"] = functools.partial(_arguments, value)
        elif not isinstance(value, types.FunctionType) and "__wrapped__" in getattr(value, "__dict__", {}):
            pending.append(value.__wrapped__)
        elif isinstance(value, types.MethodType):
            pending.append(value.__func__)
            found[f"self {len(seen)}"] = functools.partial(getattr, value, "__self__")
        elif isinstance(value, types.FunctionType):
            cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
            readers: dict[str, Callable[[], Any]] = {
                name: functools.partial(getattr, cell, "cell_contents")
                for name, cell in cells.items() if _is_filled(cell)
            }  # fmt: skip
            for name in _names(value.__code__) & value.__globals__.keys():
                readers[name] = functools.partial(operator.getitem, value.__globals__, name)
            for name, read in readers.items():
                pending.append(read())
                if not isinstance(read(), (nn.Module, type, types.ModuleType)):
                    found[f"{value.__qualname__}: {name}" if name in found else name] = read
    return found


def _within(read: Callable[[], Any], key: Any) -> Any:
    return _inner(read())[key]


def _arguments(value: functools.partial[Any]) -> list[Any]:
    return [*value.args, *value.keywords.values()]


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*inner)


def _inner(value: Any) -> dict[Any, Any]:
    """Return the entries of a list, a dictionary or a plain object, by their keys."""
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if isinstance(value, (Tensor, nn.Module, type, types.ModuleType, types.FunctionType)):
        return {}
    return value if isinstance(value, dict) else getattr(value, "__dict__", {})


class Watch:
    """Whether modules, and what a function names, hold what they held, apart from the values of tensors."""

    def __init__(self, modules: tuple[nn.Module, ...], function: Any = None) -> None:
        self._parts = [part for module in modules for part in module.modules()]
        self._named = _named(function)
        self._before = self._now()

    def holds(self) -> bool:
        """Return whether they do."""
        return self._now() == self._before

    def _now(self) -> list[Any]:
        named = [read() for read in self._named.values()]
        return [*map(_held, self._parts), *map(_brief, named)]


def _held(part: nn.Module) -> dict[str, Any]:
    held: dict[str, Any] = {"": type(part)}
    for key, item in vars(part).items():
        if key == "_modules":
            held[key] = [(name, _Same(inner)) for name, inner in item.items()]
        elif key in _TENSORS:
            held[key] = tuple(item.keys())
        else:
            held[key] = _plain(item)
    return held


def _brief(value: Any) -> Any:
    """Return the same for an object that a function names; a large container is told by its identity alone."""
    if isinstance(value, (list, tuple, dict)):
        items = list(itertools.islice(value.values() if isinstance(value, dict) else value, _MOST_NAMED + 1))
        if len(items) > _MOST_NAMED:
            return _Same(value)
        return [type(value), list(value) if isinstance(value, dict) else None, *map(_plain, items)]
    return [_plain(value), *([] if isinstance(value, _PLAIN) else [_brief(_inner(value))])]


def _plain(value: Any) -> Any:
    """Return a value that equals this one later if it is unchanged: a copy of a container, else the object itself."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return [type(value), *map(_plain, value)]
    if isinstance(value, dict):
        return [type(value), *((key, _plain(item)) for key, item in value.items())]
    if isinstance(value, (set, frozenset)):
        return [type(value), sorted(map(repr, value))]
    return Tensor if isinstance(value, Tensor) else _Same(value)


class _Same:
    """An object that is equal to itself alone."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


@contextmanager
def attributes_kept(modules: tuple[nn.Module, ...]) -> Iterator[None]:
    """Put back what modules hold, after a block in which they may be given tensors that have no values."""
    parts = [vars(part) for module in modules for part in module.modules()]
    inner = [item for part in parts for item in part.values() if isinstance(item, (dict, list, set))]
    before = [(container, copy.copy(container)) for container in (*parts, *inner)]
    try:
        yield
    finally:
        for container, old in before:
            _restore(container, old)


def _restore(container: Any, old: Any) -> None:
    now, then = (
        [part for pair in c.items() for part in pair] if isinstance(c, dict) else [*c] for c in (container, old)
    )
    if len(now) != len(then) or any(a is not b for a, b in zip(now, then, strict=True)):
        container.clear()
        container.extend(old) if isinstance(container, list) else container.update(old)


@contextmanager
def buffers_kept(modules: tuple[nn.Module, ...]) -> Iterator[list[str]]:
    """Put back the values of buffers after a block; yield the names of those that it had changed.

    Values are compared, since version counters miss the running statistics of batch normalisation.
    """
    held = [(name, tensor) for module in modules for name, tensor in module.named_buffers()]
    before = [tensor.detach().clone() for _, tensor in held]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for (name, tensor), value in zip(held, before, strict=True):
            if tensor.layout is torch.strided and not same(tensor, value):
                changed.append(name)
                with torch.no_grad():
                    tensor.copy_(value)


# -- parameters that a function closes over: an operator registers them, where others may replace them --------------


@dataclass(frozen=True)
class Registered:
    """A parameter under a name in modules, each of which may hold another there by now."""

    parameter: Tensor
    name: str
    holders: tuple[weakref.ref[nn.Module], ...]  # which hold the reader of this

    def now(self) -> Tensor:
        """Return the tensor that replaces the parameter, the parameter itself where none does."""
        alive = [module for holder in self.holders if (module := holder()) is not None]
        held = [module._parameters[self.name] for module in alive]
        return next((other for other in held if other is not None and other is not self.parameter), self.parameter)

    def read(self, source: Source) -> Tensor:
        """Read a tensor that was this parameter."""
        tensor = source.read()
        return self.now() if tensor is self.parameter else tensor


def followed(state: tuple[Source, ...], registered: Mapping[int, Registered]) -> tuple[Source, ...]:
    """Return sources that read parameters from where they are registered; ``registered`` is by their ids."""
    found = [(source, registered.get(id(source.read()))) for source in state]
    return tuple(_following(source, by) if by else source for source, by in found)


def _following(source: Source, by: Registered) -> Source:
    if source.origin is not None:  # it is followed already, for an operator that this one was made from
        source, parameter = source.origin
        by = replace(by, parameter=parameter)
    return replace(source, read=functools.partial(by.read, source), origin=(source, by.parameter))


def require_own(registered: Mapping[int, Registered]) -> None:
    """Raise if a parameter was replaced, which a function that runs itself cannot see."""
    for each in registered.values():
        if each.now() is not each.parameter:
            raise SpaceMismatchError(
                f"expected {each.name} to be the tensor that the function closes over, but it was replaced, which a "
                "function that is not traced cannot see: change its values in place, with copy_"
            )


class Entries(nn.Module):
    """Tensors as parameters and buffers of a module: parameters stay parameters."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__()
        self.count = len(leaves)
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, nn.Parameter):
                self.register_parameter(f"entries_{index}", leaf)
            else:
                self.register_buffer(f"entries_{index}", leaf)

    def leaves(self) -> tuple[Tensor, ...]:
        """Return the tensors."""
        return tuple([getattr(self, f"entries_{index}") for index in range(self.count)])
