"""One size of everything: the functions of state and leaves derived for it, and whether they are up to date."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from adjointlab import compat
from adjointlab.modules import Source, Watch, read_all, sources_named, sources_of
from adjointlab.transpose.explanation import Explanation
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.runtime.eager import Eager
from adjointlab.transpose.runtime.program import Program, Residuals, Tensors, at_start, canonical
from adjointlab.transpose.runtime.steps import InSweeps

Run = Callable[..., Tensors]
GONE = (KeyError, IndexError, AttributeError, TypeError)  # raised where what held a tensor holds none any more


@dataclass(frozen=True)
class Gram:
    """``AᴴA`` as one program, and what was simplified in it."""

    program: Program
    simplified: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Derivation:
    """A function, its linear part and its adjoint, for one size of everything."""

    explanation: Explanation
    # By name: functions of leaves that run the user's code, where there are no programs.
    eager: Mapping[str, Callable[[Tensors], Tensors]] = field(default_factory=dict)
    # By name, each as a program, and as a function with a derivative, of the state and leaves.
    programs: Mapping[str, tuple[Program, Run]] = field(default_factory=dict)
    holds: Callable[[], bool] = lambda: True  # whether what programs depend on besides tensors is as it was
    state: tuple[Source, ...] = ()  # where the programs read tensors
    metadata: tuple[Any, ...] = ()  # all that the programs assume of these besides their values
    specialized: tuple[tuple[Source, Tensor], ...] = ()  # tensors whose values are in the programs
    graphs: Mapping[str, Graph] = field(default_factory=dict)  # of the programs, before kernels were chosen
    # (weighted, residual) to the program of the least-squares gradient, None where the parts are to run.
    gradient: Callable[[bool, bool], Program | None] = lambda *_: None
    # (swapped, weighted) to AᴴWA or, swapped, AWAᴴ as one program, None where the parts are to run.
    gram: Callable[[bool, bool], Gram | None] = lambda *_: None
    # The state to what the adjoint multiplies spectra with, None where it does anything else.
    multiplier: Callable[[Tensors], Tensor | None] = lambda _: None
    of_storage: bool = False  # whether programs read memory from where a tensor starts, and not by indices
    is_doubtful: bool = False  # whether the map may be linear only for the values that its state has
    user: Eager | None = None  # the user's function, where there are no programs
    functions: Callable[[Eager], Mapping[str, Callable[[Tensors], Tensors]]] = lambda _: {}  # of it, by name
    # (count, moving, chosen) to the programs for gradients in chosen places of the state by two sweeps through time.
    in_sweeps: Callable[[int, tuple[int, ...], tuple[int, ...]], InSweeps | None] = lambda *_: None
    residuals: Residuals | None = None  # what is computed once for a point, where the function is a pull-back
    has_checks: bool = False  # whether the function raises on some points, which the programs do not
    checked: bool = False  # whether the functions were compared with the user's forward, and with each other

    def state_now(self) -> Tensors | None:
        """Return the values of the state; None where the programs are out of date."""
        if not self.holds():
            return None
        try:
            state = read_all(self.state)
        except GONE:
            return None
        for tensor, metadata in zip(state, self.metadata, strict=True):
            if not _as_before(tensor, metadata):
                return None
        if self.specialized and any(_differs(source.read(), value) for source, value in self.specialized):
            return None
        return state

    def run(self, name: str, state: Tensors, leaves: Tensors) -> Tensors:
        """Return the leaves of a function's result, with a derivative where one may be asked for."""
        if not self.programs:
            return self.eager[name](leaves)
        program, linked = self.programs[name]
        if self.of_storage:
            leaves = tuple(map(at_start, leaves))
        tensors = (*state, *map(canonical, leaves))
        return program.run(*tensors) if compat.plain() and not compat.differentiated(tensors) else linked(*tensors)

    def frozen(self, state: Tensors) -> Derivation:
        """Return the functions for a state that does not change."""
        if self.user is not None:
            return self.keeping(math.inf)
        programs = {name: (program.frozen(state), linked) for name, (program, linked) in self.programs.items()}

        @functools.cache
        def gram(swapped: bool, weighted: bool) -> Gram | None:
            found = self.gram(swapped, weighted)
            is_ready = found is not None and found.program.is_prepared(state)
            return replace(found, program=found.program.frozen(state)) if found is not None and is_ready else None

        return replace(self, programs=programs, gram=gram)

    def fixed(self, state: Tensors) -> Derivation:
        """Return the programs for a state that does not change as functions without derivatives, also under a trace."""
        programs = {name: program.frozen(state) for name, (program, _) in self.programs.items()}

        @functools.cache
        def gradient(weighted: bool, residual: bool) -> Program | None:
            program = self.gradient(weighted, residual)
            return None if program is None else program.frozen(state)

        return replace(self, programs={name: (p, p.run) for name, p in programs.items()}, gradient=gradient)

    def keeping(self, most: float) -> Derivation:
        """Return the user's functions with a pull-back that is kept, if it takes no more bytes than ``most``."""
        assert self.user is not None
        user = self.user.keeping(most)
        return replace(self, eager=self.functions(user), user=user)

    def with_inner(self, others: Sequence[Derivation]) -> Derivation:
        """Return the same, out of date where others are that it is made of."""
        return replace(self, holds=lambda: self.holds() and all(other.state_now() is not None for other in others))

    def watched(self, parts: tuple[nn.Module, ...], function: Callable[..., Any], most: int) -> Derivation:
        """Return the user's functions with what is watched of modules and, if any, of what the function names.

        While all of that is as it was, a pull-back is kept that takes no more bytes than ``most``, if any.
        """
        named = sources_named(function) if most else {}
        state = tuple({**named, **sources_of(parts)}.values())
        return replace(
            self.keeping(most), holds=Watch(parts, function if most else None).holds, state=state, is_doubtful=True,
            metadata=tuple(metadata_of(source.read()) for source in state),
        )  # fmt: skip

    def function(self, name: str) -> Callable[[Tensors], Tensors]:
        """Return a function of leaves alone, which reads the state at every call."""
        return lambda leaves: self.run(name, read_all(self.state), leaves)


def metadata_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return all that a program assumes of a tensor besides its values."""
    lazy = tensor.is_conj(), tensor.is_neg()
    strides = tensor.stride() if tensor.layout is torch.strided else tensor.layout
    return tensor.requires_grad, tensor.shape, strides, tensor.dtype, tensor.device, lazy


def _as_before(tensor: Any, metadata: tuple[Any, ...]) -> bool:
    """Return whether a tensor of the state is as it was, but for values."""
    if not isinstance(tensor, Tensor):
        return False
    found = metadata_of(tensor)  # frozen since is fine; unfrozen since, there is no program for its gradient
    return found == metadata or (not found[0] and found[1:] == metadata[1:])


def _differs(tensor: Tensor, specialized: Tensor) -> bool:
    if tensor is specialized:
        return False
    if compat.is_wrapped(tensor):
        return True
    with compat._disable_current_modes():  # other people's, who are not to see what we compare
        return not torch.equal(tensor, specialized)
