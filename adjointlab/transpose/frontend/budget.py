"""The budget of a build: operations are counted while the function runs, and seconds while it is traced."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from torch.overrides import TorchFunctionMode

from adjointlab.errors import SpaceMismatchError

T = TypeVar("T")

_RATE = 100  # operations of a forward that a build gets through in a second
_OFTEN, _MOSTLY, _LONGEST = 16, 0.8, 256  # times that a block repeats, its part of all operations, and its length
ADVICE = (
    "where that is a step in time, write it with al.recurrence(step, state, steps=…), which derives the step once, and "
    "whose adjoint runs backwards without storing a state"
)
CAPTURING, TRACING = 7, 9  # steps of its progress for each of them: a step of tracing is an operation of ATen


class _Counted(TorchFunctionMode):
    """Lists the operations that Python code calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls.append(hash(func))
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[], T], *, has_guards: bool) -> tuple[T, list[int]]:
    """Return the result of a call, and a number for each operation that it takes; none if it is not to be counted.

    Guards of ``torch.compile`` see whether operations are counted: what has some would be compiled again, or fail.
    """
    if has_guards:
        return run(), []
    mode = _Counted()
    try:
        with mode:
            return run(), mode.calls
    except SpaceMismatchError:  # of code that cannot be counted, or fails by itself
        return run(), []


def repeats(calls: Sequence[int]) -> str:
    """Return advice for operations that repeat one block over and over, or nothing where they do not."""
    found = np.asarray(calls)
    for length in range(1, min(len(calls) // _OFTEN, _LONGEST) + 1):
        differs = np.flatnonzero(found[length:] != found[:-length])
        run = int(np.diff(differs, prepend=-1, append=len(calls) - length).max()) - 1 + length
        if run >= max(_OFTEN * length, _MOSTLY * len(calls)):
            return (
                f"the forward repeats a block of {length} operation{'s' * (length > 1)} {run // length} times: {ADVICE}"
            )
    return ""


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
