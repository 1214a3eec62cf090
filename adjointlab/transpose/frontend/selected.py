"""A function of which some rows of the result are wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from adjointlab.space.selection import Selection


class Selected:
    """``x ↦ f(x)[rows]``, as it is without a graph: f is computed whole."""

    def __init__(self, function: Callable[..., Tensor], selection: Selection) -> None:
        self.__wrapped__, self.selection = function, selection

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the rows of ``f(x)``."""
        return self.selection(self.__wrapped__(*args, **kwargs))

    def __str__(self) -> str:
        before = f"{self.__wrapped__}, of these " if isinstance(self.__wrapped__, Selected) else ""
        return f"{before}{self.selection}"
