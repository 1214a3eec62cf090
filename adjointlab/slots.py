"""Slots of a step, for tensors that are others at each time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adjointlab.tree import SINGLE, Structure

Tensors = tuple[Tensor, ...]


class Slots(nn.Module):
    """A step that is given one more argument, of the structure of x: the slots, which hold the first entries of x."""

    def __init__(self, step: Callable[..., Any], x: Sequence[Tensor], structure: Structure) -> None:
        super().__init__()
        self.step, self.structure, self.count = step, structure, len(x)
        for index, leaf in enumerate(x):
            first = leaf.detach()[0].clone(memory_format=torch.contiguous_format).requires_grad_(leaf.requires_grad)
            self.register_buffer(f"slot_{index}", first, persistent=False)

    def forward(self, *given: Any) -> Any:
        """Return the results of the step for its arguments and the slots."""
        slots = self.leaves()
        return self.step(*given, slots[0] if self.structure is SINGLE else self.structure.unflatten(slots))

    def leaves(self) -> Tensors:
        """Return the tensors in the slots."""
        return tuple([getattr(self, f"slot_{index}") for index in range(self.count)])

    def put(self, leaves: Sequence[Tensor]) -> None:
        """Put other tensors into the slots."""
        for index, leaf in enumerate(leaves):
            setattr(self, f"slot_{index}", leaf)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Put back what is in the slots, after a block."""
        before = self.leaves()
        try:
            yield
        finally:
            self.put(before)
