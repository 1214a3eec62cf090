"""The derivations of a function for the sizes that are met: each is made, judged and kept until it is out of date.

For every size of the free leading dimensions there are one or more *derivations*, each for one state of all that the
function depends on besides tensors. A call takes the first whose guards hold. Where there is none, one is derived.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from adjointlab import compat, modules
from adjointlab.errors import NotLinearError, SpaceMismatchError
from adjointlab.numerics import same
from adjointlab.progress import expect, progress_of, step
from adjointlab.space import Space
from adjointlab.space.algebra import moved
from adjointlab.space.codomain import require_outputs, space_of
from adjointlab.transpose import pipeline
from adjointlab.transpose.frontend.budget import CAPTURING, TRACING, counted, excess, repeats
from adjointlab.transpose.frontend.capture import capture
from adjointlab.transpose.frontend.values import UntraceableError
from adjointlab.transpose.frontend.vjp import Tensors
from adjointlab.transpose.kernels.select import MapChooser, remembered
from adjointlab.transpose.lowered import BUILDING
from adjointlab.transpose.options import Options
from adjointlab.transpose.runtime.derivation import Derivation
from adjointlab.transpose.runtime.eager import Eager
from adjointlab.transpose.runtime.program import is_captured
from adjointlab.transpose.selfcheck import Pair, Sketch

_MOST_SIZES = 16  # of the free dimensions, whose derivations are kept
_MOST_STATES = 4  # of one size: train() and eval() in turn, say
_MOST_REBUILDS = 8  # in a row, each for few calls: deriving again and again is slower than eager
_WORTH = 64  # calls that pay for a derivation

_is_compiling = torch.compiler.is_compiling

# A function that gives the derivation and state of a source for a size instead, in this thread: an export has one.
STAND_IN: ContextVar[Callable[[Any, tuple[int, ...]], tuple[Derivation, Tensors]] | None]
STAND_IN = ContextVar("STAND_IN", default=None)


class Derivations:
    """``f`` between two spaces with its derivations, by the engine asked for or, where it cannot serve, by eager.

    ``judge`` is called with a derivation and its domain before it is used; it raises where the function is not linear.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        domain: Space,
        kwargs: dict[str, Any] | None = None,
        options: Options | None = None,
        *,
        codomain: Space | None = None,
        judge: Callable[[Any, Derivation, Space, Sketch | None], None] | None = None,
    ) -> None:
        self.callable, self.kwargs = function, dict(kwargs or {})
        self.options = options or Options()
        self._judge = judge
        self.made = 0  # how often it was derived afresh
        self._target = codomain  # where results live, which the results of one of several processes do not show
        self._derivations: OrderedDict[tuple[int, ...], list[Derivation]] = OrderedDict()
        self._registered: dict[int, modules.Registered] = {}  # parameters of a closure, by their ids
        self.domain = domain
        self.refresh()

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Derive afresh where a function moves the domain to another dtype or device."""
        before, self.domain = self.domain, moved(self.domain, fn)
        if self.domain.specs != before.specs:
            self.refresh()

    def refresh(self) -> None:
        """Derive afresh from the function as it is now."""
        with self._alone():
            self.modules: tuple[nn.Module, ...] = modules.modules_of(self.callable, self.kwargs)
            modules.require_shapes(self.modules)
            self.eager = Eager(self.callable, self.kwargs, self.domain)
            self._codomain: Space | None = None
            self.untraceable: UntraceableError | None = None
            self._frozen: dict[tuple[int, ...], tuple[Derivation, Tensors]] | None = None
            self._rebuilds, self._served, self._operations, self._repeats = 0, 0, 0, ""
            self._restart()

    def switch(self, engine: str, *, autotune: bool = False, options: dict[str, Any] | None = None) -> None:
        """Change the engine in place, and check it now."""
        with self._alone():
            self.options = replace(self.options, requested=engine, autotune=autotune, options=dict(options or {}))
            self._restart()

    def _restart(self) -> None:
        self.made += 1
        self._chooser = remembered(self.options.chooser)
        self._listings: set[Any] = set()  # of programs that were checked: at another size they are the same
        # Copies of the state that derivations were judged with, where that matters.
        self._judged: WeakKeyDictionary[Derivation, Tensors] = WeakKeyDictionary()
        self._compiled: dict[str, Callable[..., Tensors]] | None = None
        derivation = self._derived(self.domain.batch_shape)
        self._derivations = OrderedDict({self.domain.batch_shape: [derivation]})

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Build in one thread at a time, without autocast: a function derives from its own dtypes."""
        name = type(self.callable).__name__ if isinstance(self.callable, nn.Module) else "a function"
        shown = progress_of(f"adjoint of {name}", self.options.progress)
        with BUILDING, self.domain.without_autocast(), compat.sources_forgotten(), shown:
            yield

    def follow(self, parameter: Tensor, name: str, holders: tuple[nn.Module, ...]) -> None:
        """Read a parameter that the function closes over from modules, by name, once they hold another there."""
        self._registered = {**self._registered}
        self._registered[id(parameter)] = modules.Registered(parameter, name, tuple(map(weakref.ref, holders)))
        for batch, known in self._derivations.items():
            self._derivations[batch] = [self._followed(derivation) for derivation in known]

    def _followed(self, derivation: Derivation) -> Derivation:
        followed = modules.followed(derivation.state, self._registered) if self._registered else derivation.state
        return replace(derivation, state=followed)

    @property
    def codomain(self) -> Space:
        """Where ``f(x)`` lives, as the function's first result showed."""
        assert self._codomain is not None
        return self._codomain

    @property
    def nominal(self) -> Derivation:
        """The derivation for the nominal size, as it was last used."""
        return self._derivations[self.domain.batch_shape][0]

    def tensors(self) -> list[Tensor]:
        """Return the tensors that the function is known to read."""
        return list(modules.read_all(self.nominal.state))

    def current(self) -> list[Derivation]:
        """Return the derivations of all sizes, up to date."""
        return [self._at(batch)[0] for batch in list(self._derivations)]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Take what the function depends on as it is now, within a block."""
        before = self._frozen
        self._frozen = {} if before is None else before
        try:
            yield
        finally:
            self._frozen = before

    # -- which of them serves ------------------------------------------------------------------------------------------

    def _at(self, batch: tuple[int, ...]) -> tuple[Derivation, Tensors]:
        """Return the derivation for a size that is up to date, and the values of its state."""
        if _is_compiling():  # torch.compile guards what it has seen, by itself
            known = self._derivations.get(batch)
            if known is None:
                return self._eager("torch.compile met a size that was not seen before"), ()
            return known[0], modules.read_all(known[0].state)
        if (stand_in := STAND_IN.get()) is not None:
            return stand_in(self, batch)
        frozen = self._frozen
        if frozen is not None and batch in frozen:
            return frozen[batch]
        known = self._derivations.get(batch, [])
        for derivation in known:
            state = derivation.state_now()
            if state is not None:
                if derivation is not known[0]:  # the first is what torch.compile takes
                    self._derivations[batch] = [derivation, *(other for other in known if other is not derivation)]
                self._served += 1
                if compat.plain() and not self._is_judged(derivation, state):
                    self._judge_again(derivation, state, batch)
                if frozen is not None:
                    frozen[batch] = derivation.frozen(state), state
                    return frozen[batch]
                return derivation, state
        if not compat.plain():
            return self._eager("it is first met, or has changed, inside of a transform"), ()
        with self._alone():
            return self._refreshed(batch)

    def _judge_again(self, derivation: Derivation, state: Tensors, batch: tuple[int, ...]) -> None:
        """Raise if a map that is linear for some values of its state only is not so for those it has now."""
        assert self._judge is not None
        if derivation.user is not None:
            derivation.user.keep(None)  # of another state
        try:
            with self._alone():
                self._judge(self, derivation, self.domain.with_batch(batch), None)
                self._remember(derivation, state)
        except NotLinearError as error:
            raise error.of_change() from error

    def _is_judged(self, derivation: Derivation, state: Tensors | None) -> bool:
        """Return whether a derivation is up to date, and was judged with the values that its state has now.

        Values are compared, since a change through ``.data`` leaves the version of a tensor as it was.
        """
        if state is None or not self._is_watched(derivation) or any(map(is_captured, state)):
            return state is not None
        judged = self._judged.get(derivation)
        return judged is not None and all(map(same, state, judged))

    def _is_watched(self, derivation: Derivation) -> bool:
        return derivation.is_doubtful and self._judge is not None and self.options.check

    def _remember(self, derivation: Derivation, state: Tensors) -> None:
        """Keep a copy of the values that a derivation was judged with; one copy serves all sizes."""
        equal = (kept for kept in self._judged.values() if len(kept) == len(state) and all(map(same, state, kept)))
        self._judged[derivation] = next(equal, ()) or tuple(t.detach().clone().cpu() for t in state)

    def _refreshed(self, batch: tuple[int, ...]) -> tuple[Derivation, Tensors]:
        known = self._derivations.get(batch, [])
        for derivation in known:  # another thread may have been here
            state = derivation.state_now()
            if state is not None:
                return derivation, state
        if known:  # one that has served for a while was worth its making
            self._rebuilds, self._served = (self._rebuilds + 1 if self._served < _WORTH else 0), 0
        try:
            derivation = self._derived(batch)
        except NotLinearError as error:  # of a function that has changed; where that is refused, it is at every call
            raise error.of_change() from error
        self._derivations[batch] = [derivation, *known][:_MOST_STATES]
        while len(self._derivations) > _MOST_SIZES:
            oldest = next(size for size in self._derivations if size not in {batch, self.domain.batch_shape})
            del self._derivations[oldest]
        return derivation, modules.read_all(derivation.state)

    def fixed(self, batch: tuple[int, ...], choose_map: MapChooser | None = None) -> tuple[Derivation, Tensors]:
        """Return the derivation for a size and its state as it is now, as functions without derivatives.

        It is derived afresh, apart from those in use, if a rule for maps by index is given, or they are compiled.
        """
        if choose_map is None and self.options.requested != "compiled":
            derivation, state = self._at(batch)
        else:
            twin = copy.copy(self)
            engine = "auto" if self.options.requested == "compiled" else self.options.requested
            rule = choose_map or self.options.choose_map
            twin.options = replace(self.options, requested=engine, choose_map=rule)
            twin._listings, twin._judged, twin._rebuilds = set(), WeakKeyDictionary(), 0
            with self._alone():
                derivation = twin._derived(batch)
            state = modules.read_all(derivation.state)
        return derivation.fixed(state), tuple(t.detach() for t in state)

    # -- how they are made ---------------------------------------------------------------------------------------------

    def _eager(self, reason: str) -> Derivation:
        return pipeline.eager_derivation(self.eager, self.options, reason)

    def _derived(self, batch: tuple[int, ...]) -> Derivation:
        """Derive for a size from the function as it is now, and judge whether that is linear."""
        domain = self.domain.with_batch(batch)
        eager = self.eager.on(domain)
        self.untraceable = None
        # Operators that the function calls have guards of their own, which those of its code do not include.
        inner = [derivation for source in modules.sources_inside(self.modules) for derivation in source.current()]
        # A function that has not changed was judged already, at another size.
        is_new = self._codomain is None or not all(
            self._is_judged(known[0], known[0].state_now()) for known in self._derivations.values()
        )
        seen = self._ran(eager) if is_new else None
        step(0)
        is_asked, is_unsteady = self.options.requested == "eager", self._rebuilds > _MOST_REBUILDS
        if is_asked or is_unsteady:
            derivation = self._eager("it was asked for" if is_asked else "what it depends on changes from call to call")
        else:
            derivation = self._traced(eager, domain, seen)
        if not derivation.programs and not is_unsteady:  # of the user's code, the modules are watched
            is_plain = is_asked or not self.options.check or self._judge is None
            size = 0 if is_plain else sum(s.dtype.itemsize * s.size for s in (*domain.specs, *self.codomain.specs))
            derivation = derivation.watched(self.modules, self.callable, size)
        step(0)
        if self._judge is not None and self.options.check and is_new:
            self._judge(self, derivation, domain, seen)
        derivation = self._followed(derivation)
        if inner:
            derivation = derivation.with_inner(inner)
        if self._is_watched(derivation):
            self._remember(derivation, modules.read_all(derivation.state))
        return derivation

    def _ran(self, eager: Eager) -> Sketch | None:
        """Run the function once on random data, the way its user would; return what is to be kept of the result."""
        if self.options.check and any(spec.device.type == "meta" for spec in self.domain.specs):
            raise SpaceMismatchError(
                f"expected a domain on a device with values to test, got {self.domain} on meta: choose a real device, "
                "or build with check=False"
            )
        try:
            x = Pair(eager.domain, eager.domain).x
        except RuntimeError:
            if self.options.check:
                raise
            # Larger than memory: without a check, shapes are all that is needed.
            with modules.attributes_kept(self.modules), compat.FakeTensorMode(allow_non_fake_inputs=True):
                result = eager.called(eager.domain.leaves(eager.domain.zeros()))
            changed: list[str] = []
        else:
            has_guards = modules.has_guards(self.callable, self.modules)
            with modules.buffers_kept(self.modules) as changed:
                result, calls = counted(lambda: eager.called(x, copied=False), has_guards=has_guards)
            self._operations, self._repeats = len(calls), repeats(calls)
            del x
        self.eager.structure = eager.structure
        if not self.domain.every(not changed):
            self.untraceable = UntraceableError(
                f"stateful: the forward changes {', '.join(changed) or 'something on another process'}"
            )
        if self._codomain is None:
            self._codomain = space_of(result, eager.structure, eager.domain, self._target)
            eager.is_shared = eager.is_shared or self._codomain.is_sharded
        else:
            require_outputs(result, eager.structure, self.codomain)
        if not self.options.check:
            return None
        return Sketch.of(result, Pair(eager.domain, self.codomain.with_batch(eager.domain.batch_shape)).y)

    def _traced(self, eager: Eager, domain: Space, seen: Sketch | None) -> Derivation:
        """Derive from the graph of a function; where it has none, its eager functions serve."""
        graphs, options = None, replace(self.options, choose=self._chooser)
        expect((CAPTURING + TRACING) * self._operations)
        if said := excess(self._operations, options.seconds):
            self.untraceable = UntraceableError("; ".join(filter(None, (said, self._repeats))))
        if self.untraceable is None:
            try:
                with modules.attributes_kept(self.modules):
                    watched = (self.modules, eager.once) if options.check else (self.modules,)
                    captured = capture(self.callable, self.kwargs, domain, *watched)
                    step(CAPTURING * self._operations)
                    graphs = pipeline.graphs_of(captured, domain, options)
                graphs = graphs.stateful(captured.is_stateful())  # which runs it, where modules hold no fake tensors
            except UntraceableError as error:
                self.untraceable = error
        if not domain.every(graphs is not None):
            self.untraceable = self.untraceable or UntraceableError("it is so on another process")
        if graphs is None or self.untraceable is not None:
            return self._eager(f"the function cannot be traced: {self.untraceable}")
        compiled = self._compiled_functions if options.requested == "compiled" and domain.batch_dims else None
        listing = tuple((n.op, n.target) for g in graphs.mapping().values() for n in g.body.nodes)
        pair = Pair(domain, self.codomain.with_batch(domain.batch_shape))
        if seen is None and options.check and listing not in self._listings:
            seen = Sketch.of(eager.called(pair.x), pair.y)
        derivation = pipeline.derive(graphs, eager, (pair.domain, pair.codomain), options, seen, compiled)
        if derivation.checked:
            self._listings.add(listing)
        return derivation

    def _compiled_functions(self) -> dict[str, Callable[..., Tensors]]:
        """Return the eager functions of leaves through ``torch.compile``, for all sizes at once."""
        self._compiled = self._compiled or self.eager.compiled(self.options.options, affine=self.options.affine)
        return self._compiled
