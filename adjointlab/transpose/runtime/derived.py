"""What is derived for one size of everything, and whether it still is what the function does."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from adjointlab.transpose.explanation import Account
from adjointlab.transpose.frontend.capture import Capture, Source
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.passes.drop_forward import Pruned
from adjointlab.transpose.runtime.program import Program, canonical, differentiated, plain

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is private: a later torch may not have it, and then there is no shorter way
    TensorGuards: Any = None  # type: ignore[no-redef]

Tensors = tuple[Tensor, ...]
Function = Callable[[Tensors], Tensors]
Shortcut = Callable[..., Tensors | None]


@dataclass(frozen=True)
class Derived:
    """A function and its adjoint for one size of everything; ``linear`` is the function without its offset.

    ``captured`` is what the function depended on, ``state`` where the programs read tensors, ``metadata`` what these
    looked like, ``baked`` the tensors whose values are in the programs. ``fused(weighted, residual)`` makes the program
    of the least-squares gradient, with the residual as a result or without; ``multiplier`` returns what the adjoint
    multiplies spectra with, if it does nothing else.
    """

    function: Function
    linear: Function
    adjoint: Function
    account: Account
    captured: Capture
    state: tuple[Source, ...] = ()
    metadata: tuple[Any, ...] = ()
    baked: tuple[tuple[Source, Tensor], ...] = ()
    graphs: tuple[Graph, Pruned] | None = None
    programs: Mapping[str, Program] = field(default_factory=dict)  # of function, linear and adjoint
    fused: Callable[[bool, bool], Program | None] | None = None
    multiplier: Callable[[], Tensor | None] | None = None

    @property
    def outputs(self) -> list[Tensor]:
        """Return fake tensors like those that the function returns."""
        return [] if self.graphs is None else [node.meta["val"] for node in self.graphs[0].outputs]

    def stale(self) -> bool:
        """Return whether the programs are out of date, for other reasons than values of the state."""
        if self.graphs is None:
            return False
        if self.captured.changed():
            return True
        try:
            for source, metadata in zip(self.state, self.metadata, strict=True):
                tensor = source.container[source.key]
                if not isinstance(tensor, Tensor) or not _as_before(tensor, metadata):
                    return True
        except (KeyError, IndexError):  # what held a tensor holds none any more
            return True
        return any(_differs(source.read(), value) for source, value in self.baked) if self.baked else False


def bound(program: Program, linked: Callable[..., Tensors], state: tuple[Source, ...]) -> Function:
    """Return a program as a function of leaves, which reads the state at every call.

    ``linked`` is the same with a derivative, for when one may be asked for.
    """

    def call(leaves: Tensors) -> Tensors:
        tensors = (*[source.container[source.key] for source in state], *map(canonical, leaves))
        return program.run(*tensors) if plain() and not differentiated(tensors) else linked(*tensors)

    return call


def shortcut(run: Callable[..., Tensors], derived: Derived, leaves: Tensors) -> Shortcut | None:
    """Return a program as a function of leaves, for tensors and circumstances that are just as they are now.

    It returns None where anything differs. What a call has to see of tensors, and of transforms that are under way, is
    in what ``torch.compile`` guards its own programs with, and that takes a quarter of a microsecond: a call costs what
    the module's own does, where taking it apart costs twice that.
    """
    state = [source.read() for source in derived.state]  # another thread may have changed it since it was looked at
    fits = all(map(_as_before, state, derived.metadata)) and all(canonical(leaf) is leaf for leaf in leaves)
    if TensorGuards is None or derived.baked or not fits or not plain() or differentiated((*state, *leaves)):
        return None
    alike = TensorGuards(*state, *leaves, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    containers, keys = [source.container for source in derived.state], [source.key for source in derived.state]
    tracked = any(tensor.requires_grad for tensor in (*state, *leaves))
    changed = derived.captured.changed

    def call(*leaves: Tensor) -> Tensors | None:
        if changed() or _modes() or forward_ad._current_level >= 0 or (tracked and torch.is_grad_enabled()):
            return None
        try:
            tensors = (*map(_read, containers, keys), *leaves)
        except (KeyError, IndexError):  # what held a tensor holds none any more
            return None
        return run(*tensors) if alike(*tensors) else None

    return call


_read: Callable[[Any, Any], Tensor] = operator.getitem
_modes = torch._C._len_torch_dispatch_stack


def metadata_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return all that a program assumes of a tensor besides its values."""
    lazy = tensor.is_conj(), tensor.is_neg()
    return tensor.requires_grad, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, lazy


def _as_before(tensor: Tensor, metadata: tuple[Any, ...]) -> bool:
    """Return whether a tensor of the state is as it was, but for values."""
    found = metadata_of(tensor)  # frozen since is fine; unfrozen since, its gradient has not been compared
    return found == metadata or (not found[0] and found[1:] == metadata[1:])


def _differs(tensor: Tensor, baked: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or not torch.equal(tensor, baked)


__all__ = ["Derived", "Function", "Shortcut", "Tensors", "bound", "metadata_of", "shortcut"]
