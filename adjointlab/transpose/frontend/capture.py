"""What a function depends on besides its argument: the tensors, modules and plain values that it can reach.

A function may be a module, a bound method, a closure, a partial or any callable object. What it reaches is found by
walking attributes, closure cells, defaults, classes and the globals that its code names. Tensors become *sources*, read
afresh before every call (so that updates and assignments are seen). Everything else becomes *guards*: a traced program
has it baked in, and is out of date once a plain value differs, an object is another one, or a container has another
length.
"""

from __future__ import annotations

import collections
import functools
import itertools
import operator
import random
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from adjointlab.errors import SpaceMismatchError

_PLAIN = (bool, int, float, complex, str, bytes, type(None), range, torch.dtype, torch.device, torch.Size)
_LIBRARY = frozenset({"torch", "numpy", "builtins", "collections", "functools", "typing", "math", "adjointlab"})
_NAMESPACES = (dict, types.MappingProxyType)
_MOST = 100_000  # things that are looked at; a function that reaches more is not known any better for it
_MANY = 1 << 14  # entries from which on it pays to compare memory rather than tensors


class _Cell:
    """A closure cell seen as a container of one item, like the dicts that hold everything else."""

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def __getitem__(self, key: Any) -> Any:
        return self.cell.cell_contents


class _Slots:
    """The slots of an object seen as a container."""

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def __getitem__(self, key: str) -> Any:
        return getattr(self.owner, key)


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
    guards: tuple[tuple[Any, Any, Any], ...]  # container, key, and the value that was there
    empty: tuple[Any, ...]  # containers that held nothing
    lengths: tuple[tuple[Any, int], ...]  # of the others, but for namespaces
    copies: tuple[tuple[Any, Any], ...]  # arrays and sets, with what was in them
    containers: tuple[Any, ...]
    caches: tuple[Any, ...]  # of functions: cleared after a trace, so that no fake tensor stays
    functions: tuple[types.FunctionType, ...]
    parts: tuple[Any, ...]  # their code and defaults, which reloading changes in place
    namespaces: tuple[tuple[Any, Any, list[Any], list[Any]], ...]  # dicts, views of their values, keys and values
    others: tuple[tuple[Any, Any, Any], ...]  # the guards outside of these
    objects: tuple[Any, ...]
    types: list[type]  # of the objects: a class can be assigned

    def tensors(self) -> list[Tensor]:
        """Return the current tensors, one for each source."""
        return [source.container[source.key] for source in self.sources]

    def changed(self) -> bool:
        """Return whether anything but the tensors differs from when it was captured."""
        if any(self.empty):  # this runs at every call: loops are left to C where they can be
            return True
        if self.lengths and any(len(container) != length for container, length in self.lengths):
            return True
        guards = self.others
        for namespace, now, keys, values in self.namespaces:  # most often, every value is the very object that it was
            if list(namespace) != keys:  # the order may matter, too
                return True
            if not all(map(_is, now, values)):
                guards = self.guards
        if guards and any(map(_differs, guards)):
            return True
        if list(map(type, self.objects)) != self.types:
            return True
        if self.functions and not all(map(_is, _parts(self.functions), self.parts)):
            return True
        return bool(self.copies) and any(itertools.starmap(_unequal, self.copies))

    @contextmanager
    def preserved(self) -> Iterator[list[str]]:
        """Run a block without lasting effect on tensors, containers or random numbers; yield what it tried to change.

        Values of tensors are compared, since version counters miss the running statistics of batch normalisation.
        """
        tensors = self.tensors()
        values = [t.detach().clone() for t in tensors]
        before = [container.copy() for container in self.containers]
        states = _random_states()  # not ours
        changes: list[str] = []
        try:
            yield changes
        finally:
            for cache in self.caches:
                cache.cache_clear()
            for container, old in zip(self.containers, before, strict=True):
                _restore(container, old)
            for source, tensor, value in zip(self.sources, tensors, values, strict=True):
                if not same(tensor, value):
                    changes.append(source.name)
                    with torch.no_grad():
                        tensor.copy_(value)
            if not _equal_states(_random_states(), states):
                changes.append("the random number generator")
                _set_random_states(states)


RandomStates = tuple[list[Tensor], Any, Any]  # of torch, for the CPU and each CUDA device in use, of NumPy, of Python


def _random_states() -> RandomStates:
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.random.get_rng_state(), *on_cuda], np.random.get_state(), random.getstate()


def _set_random_states(states: RandomStates) -> None:
    (on_cpu, *on_cuda), of_numpy, of_python = states
    torch.random.set_rng_state(on_cpu)
    torch.cuda.set_rng_state_all(on_cuda)
    np.random.set_state(of_numpy)
    random.setstate(of_python)


def _equal_states(now: RandomStates, before: RandomStates) -> bool:
    pairs = itertools.chain(zip(now[0], before[0], strict=True), zip(now[1], before[1], strict=True))
    return all(itertools.starmap(np.array_equal, pairs)) and bool(now[2] == before[2])


def _restore(container: Any, old: Any) -> None:
    if isinstance(container, dict):
        if container.keys() != old.keys() or any(container[key] is not old[key] for key in old):
            container.clear()
            container.update(old)
    elif isinstance(container, (list, collections.deque)):
        if len(container) != len(old) or any(a is not b for a, b in zip(container, old, strict=True)):
            container.clear()
            container.extend(old)
    elif container != old:
        container.clear()
        container.update(old)


def _differs(guard: tuple[Any, Any, Any]) -> bool:
    container, key, value = guard
    try:
        now = container[key]
    except (KeyError, IndexError, ValueError, AttributeError):  # an attribute, item or cell was deleted
        return True
    return now is not value and not (isinstance(value, _PLAIN) and type(now) is type(value) and bool(now == value))


_PARTS = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")


_is = operator.is_


def _parts(functions: tuple[types.FunctionType, ...]) -> Iterator[Any]:
    return itertools.chain.from_iterable(map(_PARTS, functions))


def _unequal(now: Any, before: Any) -> bool:
    if isinstance(now, np.ndarray):
        return not np.array_equal(now, before, equal_nan=now.dtype.kind in "fc")
    return bool(now != before)


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, NaN being equal to NaN; of large ones, whether they are bit for bit.

    ``b`` may be a copy on the CPU: to fetch a small tensor takes half as long as to have an accelerator compare it.
    """
    if b.is_cpu and not a.is_cpu:
        a = a.cpu()
    if a.dtype is not b.dtype:
        return False
    if a.layout is torch.strided and a.numel() < _MANY and torch.equal(a, b):
        return True  # most often, and at every call: before all that takes longer to ask
    if a.shape != b.shape:
        return False
    if a.layout is not torch.strided:
        return a is b or bool((a.to_dense() == b.to_dense()).all())
    if a.numel() >= _MANY and _is_plain(a) and _is_plain(b):
        return np.array_equal(_words(a), _words(b))  # three times as fast as torch.equal
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is made of whole words of memory, and nothing else."""
    start, size = tensor.storage_offset() * tensor.itemsize, tensor.numel() * tensor.itemsize
    lazy = tensor.is_conj() or tensor.is_neg() or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return tensor.device.type == "cpu" and tensor.is_contiguous() and start % 8 == size % 8 == 0 and not lazy


def _words(tensor: Tensor) -> Any:
    return tensor.detach().view(-1).view(torch.int64).numpy()


def capture(function: Callable[..., Any], kwargs: Any = None) -> Capture:
    """Return what ``function`` and its fixed ``kwargs`` depend on besides the argument."""
    walk = _Walk()
    walk.visit(function, (function,), 0, "")
    walk.visit(kwargs, (kwargs,), 0, "kwargs")
    guards = [guard for guard in walk.guards if not isinstance(guard[0], tuple)]  # which cannot change
    whole = {id(c): c for c, length in walk.lengths if length and isinstance(c, _NAMESPACES)}
    sets = [now for now, _ in walk.copies if isinstance(now, set) and not now]
    return Capture(
        tuple(walk.modules), tuple(walk.sources), tuple(guards),
        (*[container for container, length in walk.lengths if not length], *sets),
        tuple(pair for pair in walk.lengths if pair[1] and id(pair[0]) not in whole),
        tuple(pair for pair in walk.copies if not any(pair[0] is empty for empty in sets)),
        tuple(walk.containers), tuple(walk.caches), tuple(walk.functions), tuple(_parts(tuple(walk.functions))),
        tuple((c, c.values(), list(c), list(c.values())) for c in whole.values()),
        tuple(guard for guard in guards if id(guard[0]) not in whole),
        tuple(walk.objects), list(map(type, walk.objects)),
    )  # fmt: skip


class _Walk:
    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.sources: list[Source] = []
        self.guards: list[tuple[Any, Any, Any]] = []
        self.lengths: list[tuple[Any, int]] = []
        self.copies: list[tuple[Any, Any]] = []
        self.containers: list[Any] = []
        self.caches: list[Any] = []
        self.functions: list[types.FunctionType] = []
        self.objects: list[Any] = []
        self._seen: dict[int, Any] = {}  # ids, with the objects kept alive so that ids stay theirs

    def visit(self, value: Any, container: Any, key: Any, name: str) -> None:
        if isinstance(value, _PLAIN):
            self.guards.append((container, key, value))
            return
        new = id(value) not in self._seen
        # A tensor is read where it was found first; where it is found again, it must go on being that one.
        if not (isinstance(value, Tensor) and new) and not isinstance(value, types.ModuleType):
            self.guards.append((container, key, value))
        if not new or isinstance(value, types.ModuleType) or len(self._seen) > _MOST:
            return
        self._seen[id(value)] = value
        if is_lazy(value):
            raise SpaceMismatchError(
                f"expected a module whose parameters have shapes, but {name} of a lazy module has none yet: run the "
                "module once before"
            )
        if isinstance(value, Tensor):
            self.sources.append(Source(container, key, name or "a tensor"))
        elif isinstance(value, nn.Module):
            self._module(value, name)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.visit(part, (part,), 0, name)
        elif isinstance(value, types.MethodType):
            self.visit(value.__self__, (value.__self__,), 0, name)
            self.visit(value.__func__, (value.__func__,), 0, name)
        elif isinstance(value, types.FunctionType):
            self._function(value, name)
        elif isinstance(value, np.ndarray):
            self.copies.append((value, value.copy()))
        elif isinstance(value, (set, frozenset)):
            self.copies.append((value, value.copy()))
            if isinstance(value, set):
                self.containers.append(value)
        elif isinstance(value, functools._lru_cache_wrapper):
            self.caches.append(value)
            self.visit(value.__wrapped__, (value.__wrapped__,), 0, name)
        elif isinstance(value, (list, tuple, collections.deque)):
            self._items(value, list(enumerate(value)), name)
        elif isinstance(value, dict):
            self._items(value, list(value.items()), name)
        elif not isinstance(value, type) and not _of_library(type(value)):
            self._object(value, name)

    def _items(self, container: Any, items: list[tuple[Any, Any]], name: str) -> None:
        if not isinstance(container, tuple):
            self.lengths.append((container, len(container)))
            self.containers.append(container)
        for key, item in items:
            self.visit(item, container, key, f"{name}[{key!r}]")

    def _object(self, value: Any, name: str) -> None:
        self.objects.append(value)
        self._class(type(value), name)
        if hasattr(value, "__dict__"):
            self._namespace(vars(value), name)
        for cls in type(value).__mro__:
            for slot in getattr(cls, "__slots__", ()):
                if isinstance(slot, str) and hasattr(value, slot) and not slot.startswith("__"):
                    self.visit(getattr(value, slot), _Slots(value), slot, f"{name}.{slot}")

    def _class(self, cls: type, name: str) -> None:
        """Visit what methods read besides the object: globals, and attributes of the class."""
        for base in cls.__mro__:
            if _of_library(base) or id(base) in self._seen:
                continue
            self._seen[id(base)] = base
            namespace = vars(base)
            self.lengths.append((namespace, len(namespace)))
            for key, item in list(namespace.items()):
                if callable(item) or isinstance(item, (staticmethod, classmethod, property)):
                    self.guards.append((namespace, key, item))
                if isinstance(item, (staticmethod, classmethod)):
                    item = item.__func__  # noqa: PLW2901
                elif isinstance(item, property):
                    item = item.fget  # noqa: PLW2901
                if isinstance(item, types.FunctionType):
                    self._function(item, name)
                elif not key.startswith("__") and isinstance(item, (*_PLAIN, Tensor, list, tuple, dict, np.ndarray)):
                    self.visit(item, namespace, key, f"{name}.{key}".lstrip("."))

    def _namespace(self, namespace: dict[str, Any], name: str) -> None:
        self.lengths.append((namespace, len(namespace)))
        self.containers.append(namespace)
        for key, item in list(namespace.items()):
            self.visit(item, namespace, key, f"{name}.{key}".lstrip("."))

    def _module(self, module: nn.Module, name: str) -> None:
        self.modules.append(module)
        for path, part in module.named_modules(prefix=name):
            self._seen[id(part)] = part
            self.objects.append(part)
            for tensors in (part._parameters, part._buffers):
                if isinstance(tensors, dict):  # a scripted module has something else
                    self._namespace(tensors, path)
            if getattr(type(part), "derived_operator", False):
                self._operator(part)
                continue
            self._class(type(part), path)
            for key, item in list(vars(part).items()):
                if key == "_modules":
                    self.lengths.append((item, len(item)))
                    self.guards.extend((item, child, inner) for child, inner in item.items())
                elif key not in ("_parameters", "_buffers"):
                    self.visit(item, vars(part), key, f"{path}.{key}".lstrip("."))
            self.lengths.append((vars(part), len(vars(part))))
            self.containers.append(vars(part))

    def _operator(self, part: Any) -> None:
        """Take over what a linear operator captured; the rest of it is ours."""
        source = part.source
        if source is not None:
            inner = source.captured
            self.sources.extend(s for s in inner.sources if id(s.read()) not in self._seen)
            self._seen.update({id(s.read()): s.read() for s in inner.sources})
            self.guards.extend(inner.guards)
            self.lengths.extend(inner.lengths)
            self.lengths.extend((namespace, len(keys)) for namespace, _, keys, _ in inner.namespaces)
            self.lengths.extend((empty, 0) for empty in inner.empty if not isinstance(empty, set))
            self.copies.extend((empty, set()) for empty in inner.empty if isinstance(empty, set))
            self.copies.extend(inner.copies)
            self.containers.extend(inner.containers)
            self.caches.extend(inner.caches)
            self.functions.extend(inner.functions)
            self.objects.extend(inner.objects)

    def _function(self, function: types.FunctionType, name: str) -> None:
        if function.__module__ and function.__module__.split(".")[0] in _LIBRARY:
            return
        self.functions.append(function)
        for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # a cell that is not filled yet
                continue
            if variable != "__class__":
                self.visit(content, _Cell(cell), None, variable)
        self.visit(function.__defaults__, [function.__defaults__], 0, name)
        self.visit(function.__kwdefaults__, [function.__kwdefaults__], 0, name)
        names = _names(function.__code__)
        for variable in names:
            content = function.__globals__.get(variable)
            if isinstance(content, types.ModuleType) and content.__name__.split(".")[0] not in _LIBRARY:
                for key in names & vars(content).keys():  # config.scale
                    if isinstance(vars(content)[key], (*_PLAIN, Tensor)):
                        self.visit(vars(content)[key], vars(content), key, f"{variable}.{key}")
            # Functions of other files are other people's code; one of the same file may be a part of this one.
            foreign = isinstance(content, types.FunctionType) and content.__globals__ is not function.__globals__
            if variable in function.__globals__ and not foreign and not isinstance(content, (type, types.ModuleType)):
                self.visit(content, function.__globals__, variable, variable)


def _of_library(cls: type) -> bool:
    return cls.__module__.split(".")[0] in _LIBRARY


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names
