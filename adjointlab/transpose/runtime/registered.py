"""Parameters that a function closes over: an operator registers them, where others may replace them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from adjointlab.errors import SpaceMismatchError
from adjointlab.transpose.graph.ir import Source


@dataclass(frozen=True)
class Registered:
    """A parameter under a name in modules, each of which may hold another there by now."""

    parameter: Tensor
    name: str
    holders: tuple[nn.Module, ...]

    def now(self) -> Tensor:
        """Return what replaces the parameter, the parameter itself where nothing does."""
        held = [holder._parameters[self.name] for holder in self.holders]
        return next((other for other in held if other is not None and other is not self.parameter), self.parameter)

    def read(self, source: Source) -> Tensor:
        """Read a tensor that was this parameter."""
        tensor = source.read()
        return self.now() if tensor is self.parameter else tensor


def followed(state: tuple[Source, ...], registered: Mapping[int, Registered]) -> tuple[Source, ...]:
    """Return sources that read parameters from where they are registered; ``registered`` is by their ids."""
    found = [(source, registered.get(id(source.read()))) for source in state]
    return tuple(replace(s, read=functools.partial(r.read, s)) if r else s for s, r in found)


def require_own(registered: Mapping[int, Registered]) -> None:
    """Raise if a parameter was replaced, which a function that runs itself cannot see."""
    for each in registered.values():
        if each.now() is not each.parameter:
            raise SpaceMismatchError(
                f"expected {each.name} to be the tensor that the function closes over, but it was replaced, which a "
                "function that is not traced cannot see: change its values in place, with copy_"
            )


__all__ = ["Registered", "followed", "require_own"]
