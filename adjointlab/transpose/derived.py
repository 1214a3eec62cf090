"""What is derived for one size of everything, and whether it still is what the function does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adjointlab.transpose.account import Account
from adjointlab.transpose.capture import Capture, Source
from adjointlab.transpose.graph import Graph
from adjointlab.transpose.program import Program, differentiated, plain
from adjointlab.transpose.prune import Pruned

Tensors = tuple[Tensor, ...]
Function = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Derived:
    """A function and its adjoint for one size of everything; ``linear`` is the function without its offset.

    ``state`` is where the programs read tensors, ``metadata`` what these looked like, ``baked`` the tensors whose
    values are in the programs. ``fused`` makes the program of residual and gradient, with weights or without.
    """

    function: Function
    linear: Function
    adjoint: Function
    account: Account
    state: tuple[Source, ...] = ()
    metadata: tuple[Any, ...] = ()
    baked: tuple[tuple[Source, Tensor], ...] = ()
    graphs: tuple[Graph, Pruned] | None = None
    fused: Callable[[bool], Function | None] | None = None

    @property
    def outputs(self) -> list[Tensor]:
        """Return fake tensors like those that the function returns."""
        return [] if self.graphs is None else [node.meta["val"] for node in self.graphs[0].outputs]

    def stale(self, captured: Capture) -> bool:
        """Return whether the programs are out of date, for other reasons than values of the state."""
        if self.graphs is None:
            return False
        if captured.changed():
            return True
        try:
            for source, metadata in zip(self.state, self.metadata, strict=True):
                tensor = source.container[source.key]
                if not isinstance(tensor, Tensor):
                    return True
                found = metadata_of(tensor)
                if found != metadata and (found[0] or found[1:] != metadata[1:]):
                    return True  # frozen since is fine; unfrozen since, its gradient has not been compared
        except (KeyError, IndexError):  # what held a tensor holds none any more
            return True
        return any(_differs(source.read(), value) for source, value in self.baked) if self.baked else False


def bound(program: Program, linked: Callable[..., Tensors], state: tuple[Source, ...], device_type: str) -> Function:
    """Return a program as a function of leaves, which reads the state at every call.

    ``linked`` is the same with a derivative, for when one may be asked for.
    """

    def call(leaves: Tensors) -> Tensors:
        tensors = (*[source.container[source.key] for source in state], *map(canonical, leaves))
        if torch.is_autocast_enabled(device_type):  # spaces have dtypes, and keep them
            with torch.autocast(device_type, enabled=False):
                return linked(*tensors)
        if plain() and not differentiated(tensors):
            return program.run(*tensors)
        return linked(*tensors)

    return call


def canonical(tensor: Tensor) -> Tensor:
    """Return the tensor as it was traced: contiguous, without lazy conjugation or negation."""
    if tensor.is_complex():
        tensor = tensor.resolve_conj()
    return tensor.resolve_neg().contiguous()


def metadata_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return all that a program assumes of a tensor besides its values."""
    return tensor.requires_grad, tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _differs(tensor: Tensor, baked: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or not torch.equal(tensor, baked)


__all__ = ["Derived", "Function", "Tensors", "bound", "canonical", "metadata_of"]
