"""A linear (or affine) function between two spaces with its derived adjoint: the one thing this package makes.

For every size of the free leading dimensions there is one :class:`Derived`: the eager reference, or programs that were
compared with it once on random data. It is made again when what it depends on has changed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from adjointlab.errors import NotLinearError, SpaceMismatchError
from adjointlab.space import Space
from adjointlab.transpose.explanation import Account
from adjointlab.transpose.frontend.capture import Capture, capture
from adjointlab.transpose.frontend.outputs import require_outputs, space_of
from adjointlab.transpose.frontend.trace import ReadsInputError, UntraceableError, trace_forward, trace_vjp
from adjointlab.transpose.graph.ir import Graph, own_outputs
from adjointlab.transpose.passes.drop_forward import Pruned, prune
from adjointlab.transpose.pipeline import Choices, Way, assemble, waiting
from adjointlab.transpose.runtime.derived import Derived, Shortcut, Tensors, shortcut
from adjointlab.transpose.runtime.program import Program, canonical, differentiated, plain
from adjointlab.transpose.runtime.reference import Reference
from adjointlab.transpose.sample import Sample
from adjointlab.transpose.selfcheck import Maps, disagreement
from adjointlab.tree import SINGLE

P = ParamSpec("P")
R = TypeVar("R")

ENGINES = ("auto", "eager", "traced", "compiled")
_MOST_REBUILDS = 8  # a function whose plain attributes change at every call is not worth tracing again and again


_BUILDING = threading.RLock()
_is_compiling = torch.compiler.is_compiling  # what changes from call to call, torch.compile must not look at


Method = Callable[Concatenate["Transposition", P], R]


def _alone(method: Method[P, R]) -> Method[P, R]:
    """Return a method that one thread runs at a time: tracing replaces functions of torch for a while.

    Nor is there autocast: what a function is derives from its own dtypes.
    """

    @functools.wraps(method)
    def locked(self: Transposition, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with _BUILDING, self.domain.without_autocast():
            return method(self, *args, **kwargs)

    return locked


class Transposition:
    """``f`` between two spaces and ``v ↦ f'ᴴ v``, by the engine asked for or, where it cannot serve, by eager."""

    def __init__(
        self,
        function: Callable[..., Any],
        domain: Space,
        kwargs: dict[str, Any] | None = None,
        engine: str = "auto",
        *,
        affine: bool = False,
        lowering: bool = True,
        autotune: bool = False,
        options: dict[str, Any] | None = None,
        codomain: Space | None = None,
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"expected engine to be one of {', '.join(ENGINES)}, got {engine!r}")
        self.callable = function
        self.kwargs = dict(kwargs or {})
        self.choices = Choices(engine, affine, lowering, autotune, dict(options or {}))
        self._target = codomain  # where results live, which the results of one of several processes do not show
        self._rebuilds = 0
        self.rebase(domain)

    def rebase(self, domain: Space) -> None:
        """Derive afresh, on another domain."""
        self.domain = domain
        self._begin()

    @_alone
    def _begin(self) -> None:
        domain = self.domain
        self.captured: Capture = capture(self.callable, self.kwargs)
        self._derived: dict[tuple[int, ...], Derived] = {}
        self._shortcuts: dict[str, Shortcut] = {}
        self._verified: set[tuple[int, ...]] = set()
        self.reference = Reference(self.callable, self.kwargs, domain)
        self._dynamic: tuple[Any, Any, Any] | None = None
        self.untraceable: UntraceableError | None = None
        derived = self._derive(domain.batch_shape)
        self._derived[domain.batch_shape] = derived
        self.codomain = self._codomain(derived)

    @_alone
    def switch(self, engine: str, *, autotune: bool = False, options: dict[str, Any] | None = None) -> None:
        """Change the engine in place, and check it now."""
        self.choices = replace(self.choices, requested=engine, autotune=autotune, options=dict(options or {}))
        for batch in list(self._derived):
            graphs = self._derived[batch].graphs
            if graphs is None or engine == "eager":
                self._derived[batch] = self._derive(batch)
            self._verify(batch)
        self._shortcuts = {}

    # -- what is called ----------------------------------------------------------------------------------------------

    @property
    def function(self) -> Callable[[Any], Any]:
        """``x ↦ f(x)``."""
        return functools.partial(self._call, "function")

    @property
    def linear(self) -> Callable[[Any], Any]:
        """``x ↦ f(x) − f(0)``."""
        return functools.partial(self._call, "linear")

    @property
    def adjoint(self) -> Callable[[Any], Any]:
        """``v ↦ f'ᴴ v``."""
        return functools.partial(self._call, "adjoint")

    def _call(self, name: str, x: Any) -> Any:
        soon = None if _is_compiling() else self._shortcuts.get(name)
        found = None if soon is None else soon(x)
        if found is not None:
            return found[0]
        if self.domain.is_autocast:  # spaces have dtypes, and keep them
            with self.domain.without_autocast():
                return self._call(name, x)
        source, target = (self.codomain, self.domain) if name == "adjoint" else (self.domain, self.codomain)
        shortcuts, leaves = self._shortcuts, source.leaves(x)
        derived = self._current(leaves)
        y = target.unflatten(getattr(derived, name)(leaves))
        if derived.programs and isinstance(y, Tensor):
            _keep(shortcuts, name, derived, derived.programs[name], x)
        return y

    def residual_and_gradient(self, x: Any, y: Any, weight: Any, *, residual: bool) -> tuple[Any, Any] | None:
        """Return ``f(x) − y`` if asked for, and ``f'ᴴ w ⊙ (f(x) − y)``, from one graph; None where none is to run."""
        name, elements = ("gradient", (x, y)) if weight is None else ("weighted gradient", (x, y, weight))
        name += " and residual" if residual else ""
        soon = None if _is_compiling() else self._shortcuts.get(name)
        outputs = None if soon is None else soon(*elements)
        if outputs is None and self.domain.is_autocast:
            with self.domain.without_autocast():
                return self.residual_and_gradient(x, y, weight, residual=residual)
        if outputs is None:
            shortcuts, spaces = self._shortcuts, (self.domain, self.codomain, self.codomain)
            given = [space.leaves(element) for space, element in zip(spaces, elements, strict=False)]
            leaves = tuple(t for part in given for t in part)
            k = self.domain.batch_dims
            if any(t.shape[:k] != leaves[0].shape[:k] for t in leaves):
                return None  # for the parts to refuse, one after the other
            derived = self._current(given[0])
            state = tuple(source.read() for source in derived.state)
            if derived.fused is None or not plain() or differentiated((*leaves, *state)):
                return None
            program = derived.fused(weight is not None, residual)
            if program is None:
                return None
            outputs = program.run(*state, *map(canonical, leaves))
            _keep(shortcuts, name, derived, program, *elements)
        n = len(self.codomain.specs) if residual else 0
        return self.codomain.unflatten(outputs[:n]) if residual else None, self.domain.unflatten(outputs[n:])

    @_alone
    def adjoint_multiplier(self) -> Tensor | None:
        """Return ``K`` with ``f'ᴴ v = F⁻¹(K ⊙ F v)`` where that is how ``f'ᴴ`` is computed, else None."""
        multiplier = self._refreshed(self.domain.batch_shape).multiplier
        single = self.domain.structure is SINGLE and self.codomain.structure is SINGLE
        return multiplier() if multiplier and single and not self.domain.is_sharded else None

    @property
    def account(self) -> Account:
        """How the nominal size is served."""
        account = self._derived[self.domain.batch_shape].account
        return replace(account, path=self.reference.path) if account.engine == "eager" else account

    def verify(self) -> Sample | None:
        """Compare the programs of the nominal size with eager, and return the random data on which they agree."""
        return self._verify(self.domain.batch_shape)

    def _current(self, leaves: Tensors) -> Derived:
        k = self.domain.batch_dims
        batch = tuple(leaves[0].shape[:k]) if k else ()
        derived = self._derived.get(batch)
        if not plain():
            if _is_compiling():
                return self._eager("torch.compile met a size that was not seen before") if derived is None else derived
            if derived is not None and batch in self._verified:
                # Under a trace of other people's making, no value of a tensor can be asked for.
                traced = torch._C._len_torch_dispatch_stack() > 0
                if not (derived.captured.changed() if traced else derived.stale()):
                    return derived
            return self._eager("it is first met, or has changed, inside of a transform")
        if derived is not None and batch in self._verified and not derived.stale():
            return derived
        return self._refreshed(batch)

    @_alone
    def _refreshed(self, batch: tuple[int, ...]) -> Derived:
        derived = self._derived.get(batch)
        if derived is None and not self.captured.changed():
            self._derived[batch] = self._derive(batch)
        elif derived is None:
            self._rederive(batch, self.account)
        elif derived.stale():
            self._rederive(batch, derived.account)
        if batch not in self._verified:
            self._verify(batch)
        return self._derived[batch]

    def _rederive(self, batch: tuple[int, ...], before: Account) -> None:
        """Derive from a function that has changed; where that is refused, it is refused again at the next call."""
        outdated = self.captured
        self.captured = capture(self.callable, self.kwargs)
        try:
            derived = self._derive(batch)
            if derived.graphs is not None:
                require_outputs(derived.outputs, self.codomain)
            self._require_still_linear(before, derived.account)
        except (NotLinearError, SpaceMismatchError):
            self.captured = outdated
            raise
        self._rebuilds += 1
        self._derived, self._shortcuts = {batch: derived}, {}
        self._verified.clear()

    def _require_still_linear(self, before: Account, now: Account) -> None:
        """Raise where a function that was affine by proof has changed into one that is not."""
        if not before.independent:
            return
        why = str(self.untraceable) if self.untraceable is not None else ""
        if now.readers or why.startswith(("random", "stateful")) or isinstance(self.untraceable, ReadsInputError):
            why = why or f"its derivative reads the input in {', '.join(now.readers or ())}"
            raise NotLinearError(
                f"expected the map that was checked, but it has changed and is not linear any more: {why}; undo the "
                "change (.eval()?)"
            )

    # -- how it is made ----------------------------------------------------------------------------------------------

    def _derive(self, batch: tuple[int, ...]) -> Derived:
        self.untraceable = None
        if self.choices.requested == "eager":
            return self._eager("it was asked for")
        if self._rebuilds > _MOST_REBUILDS:
            return self._eager("the function's plain attributes change from call to call")
        specs = self.domain.with_batch(batch).specs
        try:
            forward = trace_forward(self.reference.flat, specs, self.captured)
            own_outputs(forward)
            pruned = prune(trace_vjp(forward), len(specs))
            own_outputs(pruned.graph)
            if pruned.of_state is not None:
                own_outputs(pruned.of_state)
        except UntraceableError as error:
            self.untraceable = error
        if not self.domain.every(self.untraceable is None):
            self.untraceable = self.untraceable or UntraceableError("it is so on another process")
            return self._eager(f"the function cannot be traced: {self.untraceable}")
        return waiting(self._eager(""), forward, pruned, self.choices)

    def _eager(self, reason: str) -> Derived:
        account = Account("eager", self.choices.requested, reason)
        linear = self.reference.offset_free if self.choices.affine else self.reference.flat
        return Derived(self.reference.flat, linear, self.reference.adjoint, account, self.captured)

    def _programs(self, forward: Graph, pruned: Pruned, mode: str, reason: str) -> Derived:
        dynamic = self._dynamically() if mode == "compiled" and self.domain.batch_dims else None
        return assemble(forward, pruned, self.captured, self.domain, self.choices, Way(mode, reason, dynamic))

    def _dynamically(self) -> tuple[Any, Any, Any]:
        """Return the eager functions of leaves through ``torch.compile``, with dynamic shapes."""
        if self._dynamic is None:
            options = {"dynamic": True, **self.choices.options}

            def flat(*leaves: Tensor) -> Tensors:
                return self.reference.flat(leaves)

            def offset_free(*leaves: Tensor) -> Tensors:
                return self.reference.offset_free(leaves)

            def pull_back(*cotangents: Tensor) -> Tensors:
                return self.reference.adjoint(cotangents)

            compiled = functools.partial(torch.compile, **options)
            self._dynamic = compiled(flat), compiled(offset_free), compiled(pull_back)
        return self._dynamic

    def _codomain(self, derived: Derived) -> Space:
        """Return the space of outputs: from the graph, or from the function itself at zero where there is none."""
        outputs = self._run_once() if derived.graphs is None else derived.outputs
        return space_of(outputs, self.reference.structure, self.domain, self._target)

    def _run_once(self) -> Tensors:
        with self.captured.preserved(), torch.no_grad():
            outputs = self.reference.called(self.domain.leaves(self.domain.zeros()))
        return outputs

    def _verify(self, batch: tuple[int, ...]) -> Sample | None:
        sample = self._settle(batch)
        self._verified.add(batch)  # only now: what raises on the way is verified at the next call
        return sample

    def _settle(self, batch: tuple[int, ...]) -> Sample | None:
        """Choose the fastest way to run the graphs that agrees with the eager reference on random data."""
        graphs = self._derived[batch].graphs
        if graphs is None:
            return None
        reasons: list[str] = []
        learned = tuple(tensor for tensor in (source.read() for source in graphs[0].state) if tensor.requires_grad)
        if not self.domain.every(bool(learned)):
            learned = ()
        with self.captured.preserved() as changes, torch.no_grad():
            x, v = self._random(batch)
            sample = self.reference.quick_sample(x, v, learned) or self.reference.sample(x, v, learned)
        unchanged = self.domain.every(not changes)
        if not unchanged:
            reasons.append(f"stateful: the forward changes {', '.join(changes) or 'something on another process'}")
        reference = Maps(self.reference.flat, self.reference.adjoint, self.domain, self.codomain)
        for mode in self.choices.modes if unchanged else []:
            derived = self._programs(*graphs, mode, "; ".join(reasons))
            candidate = Maps(derived.function, derived.adjoint, self.domain, self.codomain)
            compare = functools.partial(
                disagreement, reference, candidate, captured=self.captured, state=derived.state,
                compiled=mode == "compiled",
            )  # fmt: skip
            said = compare(sample)
            if said and sample.quick:
                with self.captured.preserved(), torch.no_grad():
                    sample = self.reference.sample(x, v, learned)
                said = compare(sample)
            if not said:
                self._derived[batch] = derived
                return sample
            reasons.append(f"{mode}: {said}")
        self._derived[batch] = self._eager("; ".join(reasons))
        return None

    def _random(self, batch: tuple[int, ...]) -> tuple[Tensors, Tensors]:
        """Return random x and v."""
        generator = torch.Generator().manual_seed(20)
        domain, codomain = self.domain.with_batch(batch), self.codomain.with_batch(batch)
        return domain.leaves(domain.randn(generator)), codomain.leaves(codomain.randn(generator))


def _keep(shortcuts: dict[str, Shortcut], name: str, derived: Derived, program: Program, *elements: Any) -> None:
    """Have the next call take the shorter way.

    ``shortcuts`` are those of the time before the call: what another thread has derived since has others.
    """
    if not _is_compiling() and all(isinstance(x, Tensor) for x in elements):
        found = shortcut(program.ready, derived, elements)
        if found is not None:
            shortcuts[name] = found


__all__ = ["ENGINES", "Transposition"]
