"""What a build may take: operations are counted while the function runs, and seconds while it is traced."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

_RATE = 100  # operations of a forward that a build gets through in a second


class _Counted(TorchFunctionMode):
    """Counts the operations that Python code calls."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted(function: Callable[..., Any], modules: tuple[nn.Module, ...]) -> Iterator[Callable[[], int]]:
    """Count operations in a block; none where the user has compiled a part, which would be compiled again for that."""
    parts = (function, *(part for module in modules for part in module.modules()))
    if any(hasattr(part, "_torchdynamo_orig_callable") or hasattr(part, "_orig_mod") for part in parts):
        yield lambda: 0
        return
    with _Counted() as mode:
        yield lambda: mode.number


def excess(operations: int, seconds: float) -> str:
    """Return why a forward of so many operations is not traced within some seconds, or nothing."""
    if operations <= _RATE * seconds:
        return ""
    needed = 10 * math.ceil(operations / _RATE / 10)
    return (
        f"a build of its {operations:,} operations would take some {needed} s, more than the budget of {seconds:g} s; "
        f"pass budget={needed} to have it traced"
    )


def deadline(seconds: float) -> Callable[[], str]:
    """Return a function that says from some seconds on that they are over, and nothing before."""
    end = time.monotonic() + seconds
    return lambda: f"to trace it takes longer than the budget of {seconds:g} s" if time.monotonic() > end else ""
