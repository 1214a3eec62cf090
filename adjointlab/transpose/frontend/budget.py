"""The budget of a build: operations are counted while the function runs, and seconds while it is traced."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch.overrides import TorchFunctionMode

from adjointlab.errors import SpaceMismatchError

T = TypeVar("T")

_RATE = 100  # operations of a forward that a build gets through in a second
CAPTURING, TRACING = 7, 9  # steps of its progress for each of them: a step of tracing is an operation of ATen


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


def counted(run: Callable[[], T], *, has_guards: bool) -> tuple[T, int]:
    """Return the result of a call, and how many operations it takes; 0 for one that is not to be counted.

    Guards of ``torch.compile`` see whether operations are counted: what has some would be compiled again, or fail.
    """
    if has_guards:
        return run(), 0
    mode = _Counted()
    try:
        with mode:
            return run(), mode.number
    except SpaceMismatchError:  # of code that cannot be counted, or fails by itself
        return run(), 0


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
