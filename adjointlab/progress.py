"""A line on standard error for what takes longer than two seconds: how far it is, and how long it still takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_AFTER = 2.0  # seconds without a line
_TERMINAL, _FILE = 0.2, 10.0  # seconds between two states of a line, and between two lines where they stay
_WIDTH = 79


class Line:
    """The progress of ``name``: ``done`` of ``total`` steps, or of at ``most`` so many, if anybody knows how many."""

    def __init__(
        self,
        name: str,
        total: int | None = None,
        *,
        most: bool = False,
        asked: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.total, self.most, self.done = name, total, most, 0
        self._on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._is_on = sys.stderr is not None and (self._on_terminal if asked is None else asked)
        self._clock, self._start = clock, clock()
        self._due = self._start + _AFTER
        self._ends = bool(asked)  # whether its end is shown

    def step(self, count: int = 1, note: Callable[[], str] | None = None) -> None:
        """Count steps; where the line is due, show it, with a note."""
        self.done += count
        if self._is_on and self._clock() >= self._due:
            self._show(note)

    def close(self) -> None:
        """Show the line for the last time, if it was shown or asked for."""
        if self._is_on and self._ends:
            self._show(None, ended=True)

    def _show(self, note: Callable[[], str] | None, *, ended: bool = False) -> None:
        now = self._clock()
        text = self.text(now - self._start, "" if note is None else note(), ended=ended)
        line = f"\r{text[:_WIDTH]:<{_WIDTH}}" if self._on_terminal else f"{text}\n"
        sys.stderr.write(f"{line}\n" if ended and self._on_terminal else line)
        sys.stderr.flush()
        self._ends, self._due = True, now + (_TERMINAL if self._on_terminal else _FILE)

    def text(self, seconds: float, note: str = "", *, ended: bool = False) -> str:
        """Return the line after some seconds."""
        if ended:
            return f"{self.name}: {self.done:,} steps took {_duration(seconds)}"
        parts = [*([f"{self.done:,} steps"] if self.done else []), _duration(seconds)]
        if self.total is not None and 0 < self.done < self.total:
            parts[0] = f"{self.done:,} of {'at most ' if self.most else ''}{self.total:,} steps"
            left = _duration(seconds * (self.total - self.done) / self.done)
            parts.append(f"{'at most' if self.most else 'about'} {left} left")
        return f"{self.name}: {', '.join([*parts, *([note] if note else [])])}"


_current: ContextVar[Line | None] = ContextVar("adjointlab_progress", default=None)


@contextmanager
def progress_of(name: str, asked: bool | None, total: int | None = None, *, most: bool = False) -> Iterator[Line]:
    """Show the progress of a block if asked for, by default on a terminal; inside of it nothing else shows its own."""
    line = Line(name, total, most=most, asked=asked if _current.get() is None else False)
    token = _current.set(line)
    try:
        yield line
    finally:
        _current.reset(token)
        line.close()


def step(count: int = 1, note: Callable[[], str] | None = None) -> None:
    """Count steps of what is in progress, wherever that was begun; with a count of 0, say that it still is."""
    line = _current.get()
    if line is not None:
        line.step(count, note)


def expect(total: int) -> None:
    """Say how many steps what is in progress will take."""
    line = _current.get()
    if line is not None:
        line.total = total


def _duration(seconds: float) -> str:
    """Return a time in words: ``8 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
