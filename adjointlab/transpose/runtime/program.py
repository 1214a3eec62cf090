"""A graph made callable: its parts, with what is kept of them between calls."""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from adjointlab import compat
from adjointlab.modules import Source
from adjointlab.numerics import parts_of, same
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.passes.in_row import InRow, in_row
from adjointlab.transpose.passes.partition import HasNoPiecesError, hoisted, partition
from adjointlab.transpose.passes.stencils import stencils
from adjointlab.transpose.runtime.row import Row

Tensors = tuple[Tensor, ...]
_SMALL = 1 << 16  # entries that are sent to the CPU to be compared
_WORTH = 32  # calls that pay for a sparse matrix
_MOST_REMADE = 2  # in a row, each for fewer calls

Call = Callable[[Tensors, Tensors, Tensors], Tensors]  # (carried, other arguments, places) → next carried
Prepack = Callable[[Tensors, Tensors], Tensors]  # of the state and inputs, and constants


def canonical(tensor: Tensor) -> Tensor:
    """Return the tensor as it was traced: contiguous, without lazy conjugation or negation."""
    if tensor.is_complex():
        tensor = tensor.resolve_conj()
    return tensor.resolve_neg().contiguous()


aten = torch.ops.aten
_OF_STORAGE = {aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default}


def of_storage(graph: Graph) -> bool:
    """Return whether a graph reads tensors by places in their memory, and not by indices."""
    return any(node.target in _OF_STORAGE for node in graph.body.nodes)


def at_start(tensor: Tensor) -> Tensor:
    """Return the tensor at the start of its memory, which is where a traced one was."""
    return tensor.clone() if compat.plain() and tensor.storage_offset() else tensor


def as_traced(tensor: Tensor, *, of_storage: bool) -> Tensor:
    """Return the tensor as it was traced, which it mostly is."""
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        tensor = canonical(tensor)
    return at_start(tensor) if of_storage else tensor


class Program:
    """A callable ``(*state, *inputs) → outputs`` that equals its graph.

    ``reference`` is an equal graph of differentiable ATen operations alone: transforms and compilers get to see that.
    """

    def __init__(self, graph: Graph, reference: Graph, residuals: Residuals | None = None) -> None:
        self.graph = graph
        self.whole = reference.function
        self._residuals: Callable[[Tensors], Tensors] | None = residuals
        self._n_state = len(reference.state)
        parts = partition(graph)
        self._make_constants, self._main = parts.constants, parts.main
        private = frozenset(i for i, source in enumerate(graph.state) if source.is_private)
        self._prepacks = tuple(_kept(p.function, p.watched, private, dear=p.is_dear) for p in parts.prepacks)
        self._constants: Tensors | None = None
        self._compile: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
        self._hoisted: dict[tuple[int, ...], tuple[Callable[..., Any], Callable[..., Any]]] = {}  # by what moves
        self._in_row: dict[Any, InRow] = {}
        self._binds = True  # whether calls in a row are bound to memory
        self._reads_state = False  # whether the main part does so by itself

    def __call__(self, *tensors: Tensor) -> Tensors:
        """Return the outputs, under whatever transform or trace is under way."""
        return self.run(*tensors) if compat.plain() else tuple(self.whole(*tensors))

    def run(self, *tensors: Tensor) -> Tensors:
        """Return the outputs for real tensors, without recording of gradients."""
        try:
            given = tensors if self._residuals is None else self._extended(tensors, self._residuals)
            ready = self.prepared(given)
        except HasNoPiecesError:
            return tuple(self.whole(*tensors))
        return self._main(*given, *ready)  # type: ignore[no-any-return]

    def run_if_prepared(self, *tensors: Tensor) -> Tensors | None:
        """Return the outputs, None where what is kept between calls cannot be made of the state as it is."""
        ready = self._ready(tensors)
        return None if ready is None else self._main(*tensors, *ready)

    def is_prepared(self, state: Tensors) -> bool:
        """Return whether what is kept between calls can be made of a state."""
        return self._ready(state) is not None

    def _ready(self, tensors: Tensors) -> Tensors | None:
        try:
            return self.prepared(tensors)
        except HasNoPiecesError:
            return None

    def _extended(self, tensors: Tensors, residuals: Callable[[Tensors], Tensors]) -> Tensors:
        """Return tensors with residuals after the state."""
        state = tensors[: self._n_state]
        return (*state, *residuals(state), *tensors[self._n_state :])

    def prepared(self, tensors: Tensors) -> Tensors:
        """Compute all that depends on the state alone, which is the first of ``tensors``."""
        if self._constants is None:
            with torch.no_grad():
                self._constants = tuple(self._make_constants()) if self._make_constants else ()
        ready = self._constants
        for prepack in self._prepacks:
            ready = (*ready, *prepack(tensors, self._constants))
        return ready

    def kept(self) -> int:
        """Return how many bytes are kept between calls: constants, prepacked state, and copies to compare with."""
        tensors = [*(self._constants or ()), *(t for prepack in self._prepacks for t in prepack.kept())]  # type: ignore[attr-defined]
        tensors += [matrix for node in self.graph.body.nodes for matrix in getattr(node.target, "kept", ())]
        memory = [part.untyped_storage() for tensor in tensors for part in parts_of(tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in memory}.values())

    def frozen(self, state: Tensors) -> Program:
        """Return the program for a state that does not change, which no call compares."""
        found = copy.copy(self)
        try:
            if self._residuals is not None:
                residuals = self._residuals(state)
                state, found._residuals = (*state, *residuals), lambda _: residuals
            found._constants, found._prepacks = self.prepared(state), ()
        except HasNoPiecesError:
            found._constants, found._prepacks, found._main, found._residuals = (), (), self.whole, None
        return found

    def each(self, state: Tensors, moving: tuple[int, ...] = ()) -> Callable[[Tensors, Tensors], Tensors]:
        """Return ``(moved, inputs) → outputs`` for calls in a row with one state, but for what moves in it.

        The part that depends on the state alone is computed now. Results may share memory with inputs.
        """
        if self._reads_state:
            return self._whole_each(state, moving)
        if moving not in self._hoisted:
            once, main = hoisted(self.graph, frozenset(moving))
            self._hoisted[moving] = once, main if self._compile is None else self._compile(main)
        once, main = self._hoisted[moving]
        try:
            ready = once(*state)
        except HasNoPiecesError:
            return self._whole_each(state, moving)
        if not moving:
            return lambda _, inputs: main(*state, *inputs, *ready)
        return lambda moved, inputs: main(*_replaced(state, moving, moved), *inputs, *ready)

    def row(
        self, state: Tensors, moving: tuple[int, ...], carried: tuple[tuple[int, int], ...], kept: tuple[int, ...] = ()
    ) -> Call:
        """Return ``(carried inputs, other arguments, places) → next carried inputs`` for calls in a row with one state.

        Other arguments are what moves in the state, and the other inputs; other outputs are written to places, and
        inputs that are ``kept`` after them. ``carried`` are positions of outputs, and those of inputs that they are
        next. Calls write to what they returned before, but for the last time.
        """
        key = moving, carried, kept
        graph = self.graph if self._compile is None else self._stencils
        if self._binds and not self._reads_state and graph is not None and not of_storage(graph):
            if key not in self._in_row:
                self._in_row[key] = in_row(graph, *key, self._compile)
            with contextlib.suppress(HasNoPiecesError):
                return Row(self._in_row[key], state, moving)
        return self._row_of_calls(self.each(state, moving), len(moving), carried, kept)

    @functools.cached_property
    def _stencils(self) -> Graph | None:
        return stencils(self.graph)

    def unbind(self) -> None:
        """Make calls in a row as all others are made."""
        self._binds = False

    def _row_of_calls(
        self, run: Callable[[Tensors, Tensors], Tensors], moving: int, carried: tuple[tuple[int, int], ...],
        kept: tuple[int, ...],
    ) -> Call:  # fmt: skip
        to, of = dict(carried), {i: j for j, (_, i) in enumerate(carried)}
        positions, reads = range(len(self.graph.inputs)), of_storage(self.graph)

        def call(carry: Tensors, given: Tensors, places: Tensors) -> Tensors:
            rest = iter(given[moving:])
            inputs = tuple([as_traced(carry[of[i]], of_storage=reads) if i in of else next(rest) for i in positions])
            found = run(given[:moving], inputs)
            others = [t for i, t in enumerate(found) if i not in to] + [inputs[i] for i in kept]
            for result, place in zip(others, places, strict=True):  # at once: it may be a view of a whole state
                place.copy_(result)
            return tuple([found[i] for i, _ in carried])

        return call

    def _whole_each(self, state: Tensors, moving: tuple[int, ...]) -> Callable[[Tensors, Tensors], Tensors]:
        return lambda moved, inputs: tuple(self.whole(*_replaced(state, moving, moved), *inputs))

    def compile(self, options: dict[str, Any]) -> None:
        """Put the main part through ``torch.compile`` as one region: a break in it is an error, to fall back from."""
        self._compile = functools.partial(_compiled, options={"fullgraph": True, **options})
        self._main = self._compile(self._main)

    def replace(self, function: Callable[..., Any], n_state: int) -> None:
        """Run an equal function of the inputs alone, which reads the state by itself."""
        self._constants, self._prepacks, self._reads_state = (), (), True
        self._main = lambda *tensors: function(*tensors[n_state:])


def _replaced(tensors: Tensors, positions: Sequence[int], values: Tensors) -> Tensors:
    """Return tensors with others at some positions."""
    found = list(tensors)
    for position, value in zip(positions, values, strict=True):
        found[position] = value
    return tuple(found)


class Residuals:
    """``state → residuals``: what is computed once for each point, that is for each state whose private tensors differ.

    ``program`` computes the ``count`` leaves of ``f(x₀)`` before the residuals; ``reference`` is the graph of f itself.
    """

    def __init__(self, program: Program, state: Sequence[Source], count: int, reference: Graph) -> None:
        self._program, self._count, self._reference = program, count, reference
        self._private = [i for i, source in enumerate(state) if source.is_private]
        self._others = [i for i, source in enumerate(state) if not source.is_private]
        self._seen: list[Tensor] | None = None  # copies of the others, one for all points
        self._kept = WeakIdKeyDictionary()  # by a tensor of the point, as long as that lives

    def _of(self, state: Tensors) -> Tensors:
        if is_captured(state[0]):
            return self._program.run(*state)
        point, seen = [state[i] for i in self._private], self._seen
        if seen is None or not self._is_same(seen, state):
            seen = self._seen = [_copy(state[i]) for i in self._others]  # before the rest: a thread may change them
        found = self._kept.get(point[-1])
        if found is not None and found[0] is seen and all(ref() is t for ref, t in zip(found[1], point, strict=True)):
            return found[2]  # type: ignore[no-any-return]
        with torch.inference_mode(False), torch.no_grad():
            outputs = tuple(self._program.run(*state))
        if self._is_same(seen, state):
            self._kept[point[-1]] = seen, list(map(weakref.ref, point)), outputs
        return outputs

    def _is_same(self, seen: list[Tensor], state: Tensors) -> bool:
        return all(same(state[i], copy) for i, copy in zip(self._others, seen, strict=True))

    def forget(self) -> None:
        """Free what was computed."""
        self._kept.clear()

    def __call__(self, state: Tensors) -> Tensors:
        """Return the residuals."""
        return self._of(state)[self._count :]

    def value(self, state: Tensors) -> Tensors:
        """Return the leaves of ``f(x₀)``, with a derivative where one may be asked for."""
        if compat.plain() and not compat.differentiated(state):
            return self._of(state)[: self._count]
        return tuple(self._reference.function(*state))


def _kept(function: Callable[..., Any], watched: tuple[int, ...], private: frozenset[int], *, dear: bool) -> Prepack:
    """Return a function that keeps its last results, and returns them while the watched tensors are the same.

    Where these change at nearly every call, ``dear`` results are not made: the function raises ``HasNoPiecesError``,
    until the tensors have been the same for a while.
    """
    last: tuple[list[tuple[int, Any]], tuple[Tensor, ...] | None] | None = None
    served, remade = 0, 0

    def call(tensors: tuple[Tensor, ...], constants: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal last, served, remade
        if is_captured(tensors[watched[0]]):  # no value can be asked for, and what is made belongs to the CUDA graph
            if dear:
                raise HasNoPiecesError("a CUDA graph is recorded")
            return tuple(function(*[tensors[i] for i in watched], *constants))
        if last is not None:
            before, outputs = last  # both at once: another thread may be in here
            if is_same(before, tensors):
                served += 1
                if outputs is not None:
                    return outputs
                if served < _WORTH:
                    raise HasNoPiecesError("what they are made of has changed again and again")
            else:
                remade, served = (remade + 1 if served < _WORTH else 0), 0
        # Before anything is made: another thread may change the state meanwhile.
        copies = [(i, weakref.ref(t) if i in private else _copy(t)) for i in watched for t in [tensors[i]]]
        if dear and remade > _MOST_REMADE and served < _WORTH:
            last = copies, None
            raise HasNoPiecesError("what they are made of changes again and again")
        with torch.inference_mode(False), torch.no_grad():
            try:
                outputs = tuple(function(*[tensors[i] for i in watched], *constants))
            except HasNoPiecesError:
                last = copies, None
                raise
        last = (copies, outputs) if is_same(copies, tensors) else None
        return outputs

    def kept() -> list[Tensor]:
        return [] if last is None else [*(copy for i, copy in last[0] if i not in private), *(last[1] or ())]

    def is_same(before: list[tuple[int, Any]], tensors: tuple[Tensor, ...]) -> bool:
        return all(tensors[i] is known() if i in private else same(tensors[i], known) for i, known in before)

    call.kept = kept  # type: ignore[attr-defined]
    return call


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy to compare with: small ones on the CPU, as an accelerator takes longer to compare than to send."""
    small = tensor.numel() <= _SMALL
    return tensor.detach().to("cpu", copy=True) if small else tensor.detach().clone()


def is_captured(tensor: Tensor) -> bool:
    """Return whether what is computed from a tensor now is recorded for a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Return the function through ``torch.compile``, for arguments that are alike in every call.

    PyTorch's own backend compiles ahead of time, at the first call: that leaves out the look-up and the guards of every
    later one, which cost more than the adjoint of a small image. Spaces, and the guards of a derivation, have seen to
    what they guard.
    """
    lazy: Any = torch.compile(function, **options)
    is_own = options.get("backend", "inductor") == "inductor" and options["fullgraph"]
    if not is_own or not hasattr(lazy, "aot_compile"):  # before torch 2.11, there is no ahead of time
        return lazy  # type: ignore[no-any-return]
    compiled: Any = None

    def run(*tensors: Tensor) -> Any:
        nonlocal compiled
        if compiled is None:
            ahead = lazy.aot_compile((tensors, {}))
            ahead.disable_guard_check()
            compiled = ahead  # now that it is whole: another thread may be in here
        return compiled(*tensors)

    return run
