"""A function of which some rows of the result are wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adjointlab.space.selection import Selection


@dataclass(frozen=True, eq=False)
class Selected:
    """``x ↦ f(x)[rows]``, as it is without a graph: f is computed whole."""

    __wrapped__: Callable[..., Tensor]
    selection: Selection

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the rows of ``f(x)``."""
        return self.selection(self.__wrapped__(*args, **kwargs))

    def __str__(self) -> str:
        before = f"{self.__wrapped__}, of these " if isinstance(self.__wrapped__, Selected) else ""
        return f"{before}{self.selection}"
