"""What a function depends on besides its argument: the tensors, modules and plain values that it can reach.

A function may be a module, a bound method, a closure, a partial or any callable object. What it reaches is found by
walking attributes, closure cells, defaults and the globals that its code names. Tensors become *sources*, read afresh
before every call (so that updates and assignments are seen); plain values become *guards*: a traced program has them
baked in, and is out of date once one differs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
# What every nn.Module has: bookkeeping such as hooks, not the user's state.
_MODULE_NAMES = frozenset(vars(nn.Module())) - {"training"}
_LIBRARY = frozenset({"torch", "numpy", "builtins", "collections", "functools", "typing", "math"})


class _Cell:
    """A closure cell seen as a container of one item, like the dicts that hold everything else."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def __getitem__(self, key: Any) -> Any:
        return self.cell.cell_contents


@dataclass(frozen=True)
class Source:
    """Where a tensor is found: ``container[key]``, under a name for messages."""

    container: Any
    key: Any
    name: str

    def read(self) -> Any:
        """Return what is there now."""
        return self.container[self.key]


@dataclass(frozen=True)
class Capture:
    """All that a function depends on besides its argument."""

    modules: tuple[nn.Module, ...]
    sources: tuple[Source, ...]
    guards: tuple[tuple[Any, Any, Any], ...]
    namespaces: tuple[dict[str, Any], ...]

    def tensors(self) -> list[Tensor]:
        """Return the current tensors, one for each source."""
        return [source.container[source.key] for source in self.sources]

    def changed(self) -> bool:
        """Return whether a plain value differs from when it was captured."""
        try:
            for container, key, value in self.guards:
                now = container[key]
                if now is not value and (type(now) is not type(value) or now != value):
                    return True
        except (KeyError, IndexError, ValueError):  # an attribute, item or cell was deleted
            return True
        return False

    @contextmanager
    def preserved(self) -> Iterator[list[str]]:
        """Run a block without lasting effect on tensors, attributes or random numbers; yield what it tried to change.

        Values of tensors are compared, since version counters miss the running statistics of batch normalisation.
        """
        tensors = self.tensors()
        values = [t.detach().clone() for t in tensors]
        names = [dict(namespace) for namespace in self.namespaces]
        random = torch.random.get_rng_state()
        changes: list[str] = []
        try:
            yield changes
        finally:
            for namespace, before in zip(self.namespaces, names, strict=True):
                if namespace.keys() != before.keys() or any(namespace[k] is not before[k] for k in before):
                    namespace.clear()
                    namespace.update(before)
            for source, tensor, value in zip(self.sources, tensors, values, strict=True):
                if not same(tensor, value):
                    changes.append(source.name)
                    with torch.no_grad():
                        tensor.copy_(value)
            if not torch.equal(torch.random.get_rng_state(), random):
                changes.append("the random number generator")
                torch.random.set_rng_state(random)


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal bit for bit, NaN being equal to NaN."""
    if a.layout != torch.strided:
        return a is b or bool((a.to_dense() == b.to_dense()).all())
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def capture(function: Callable[..., Any], kwargs: Any = None) -> Capture:
    """Return what ``function`` and its fixed ``kwargs`` depend on besides the argument."""
    walk = _Walk()
    walk.visit(function, [function], 0, "")
    walk.visit(kwargs, [kwargs], 0, "kwargs")
    return Capture(tuple(walk.modules), tuple(walk.sources), tuple(walk.guards), tuple(walk.namespaces))


class _Walk:
    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.sources: list[Source] = []
        self.guards: list[tuple[Any, Any, Any]] = []
        self.namespaces: list[dict[str, Any]] = []
        self._seen: dict[int, Any] = {}  # ids, with the objects kept alive so that ids stay theirs
        self._depth = 0

    def visit(self, value: Any, container: Any, key: Any, name: str) -> None:
        if isinstance(value, _PLAIN):
            self.guards.append((container, key, value))
            return
        if id(value) in self._seen or isinstance(value, (type, types.ModuleType)):
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self.sources.append(Source(container, key, name or "a tensor"))
        elif isinstance(value, nn.Module):
            self._module(value, name)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.visit(part, [part], 0, name)
        elif isinstance(value, types.MethodType):
            self.visit(value.__self__, [value.__self__], 0, name)
            self.visit(value.__func__, [value.__func__], 0, name)
        elif isinstance(value, types.FunctionType):
            self._function(value, name)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                self.visit(item, value, index, f"{name}[{index}]")
        elif isinstance(value, dict):
            for item_key, item in list(value.items()):
                self.visit(item, value, item_key, f"{name}[{item_key!r}]")
        elif hasattr(value, "__dict__") and type(value).__module__.split(".")[0] not in _LIBRARY:
            self._namespace(vars(value), name)

    def _namespace(self, namespace: dict[str, Any], name: str, skip: frozenset[str] = frozenset()) -> None:
        self.namespaces.append(namespace)
        for key, item in list(namespace.items()):
            if key not in skip:
                self.visit(item, namespace, key, f"{name}.{key}".lstrip("."))

    def _module(self, module: nn.Module, name: str) -> None:
        self.modules.append(module)
        for path, part in module.named_modules(prefix=name):
            self._seen[id(part)] = part
            for tensors in (part._parameters, part._buffers):
                self.namespaces.append(tensors)
                for key, tensor in tensors.items():
                    if tensor is not None:
                        self.visit(tensor, tensors, key, f"{path}.{key}".lstrip("."))
            # A linear operator reaches its own function through its registered parts: what else it holds is ours.
            inner = frozenset(vars(part)) - {"training"} if hasattr(part, "codomain") else _MODULE_NAMES
            self._namespace(vars(part), path, inner)

    def _function(self, function: types.FunctionType, name: str) -> None:
        if function.__module__ and function.__module__.split(".")[0] in _LIBRARY:
            return
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # a cell that is not filled yet
                continue
            self.visit(content, _Cell(cell), None, variable)
        self.visit(function.__defaults__, [function.__defaults__], 0, name)
        self.visit(function.__kwdefaults__, [function.__kwdefaults__], 0, name)
        for variable in _names(function.__code__):
            content = function.__globals__.get(variable)
            # Other globals are other people's code; a function of the same file may be a part of this one.
            if isinstance(content, (Tensor, nn.Module, bool, int, float, complex, list, tuple, dict)) or (
                isinstance(content, types.FunctionType) and content.__globals__ is function.__globals__
            ):
                self.visit(content, function.__globals__, variable, variable)


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names
