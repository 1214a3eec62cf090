"""Progress: a line on standard error for what takes longer than two seconds."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest
from torch import nn

import adjointlab as al
from adjointlab.progress import Line, expect, progress_of, step
from adjointlab.verify.checked_map import CheckedMap
from adjointlab.verify.dot_test import DotTest


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_nothing_is_shown_before_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock = on_terminal(monkeypatch), Clock()
    line = Line("cg", 10, clock=clock)
    clock.now += 1.9
    line.step()
    line.close()
    assert terminal.getvalue() == ""


def test_a_line_on_a_terminal_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock = on_terminal(monkeypatch), Clock()
    line = Line("cg", 10, most=True, clock=clock)
    for _ in range(3):
        clock.now += 2
        line.step(note=lambda: "residual 1.00e-03")
    line.close()
    first, second, third, last = terminal.getvalue().removeprefix("\r").split("\r")
    assert first.rstrip() == "cg: 1 of at most 10 steps, 2 s, at most 18 s left, residual 1.00e-03"
    assert second.startswith("cg: 2 of at most 10 steps, 4 s, at most 16 s left")
    assert third.startswith("cg: 3 of at most 10 steps, 6 s, at most 14 s left")
    assert last.rstrip(" \n") == "cg: 3 steps took 6 s"
    assert last.endswith("\n")
    assert len({len(part.rstrip("\n")) for part in (first, second, third, last)}) == 1


def test_states_follow_each_other_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock = on_terminal(monkeypatch), Clock()
    line = Line("cg", 10, clock=clock)
    clock.now += 2
    for _ in range(5):
        clock.now += 0.01
        line.step()
    assert terminal.getvalue().count("\r") == 1


def test_lines_that_stay_are_ten_seconds_apart(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    line = Line("cg", asked=True, clock=clock)
    for _ in range(24):
        clock.now += 1
        line.step()
    line.close()
    assert (
        capsys.readouterr().err == "cg: 2 steps, 2 s\ncg: 12 steps, 12 s\ncg: 22 steps, 22 s\ncg: 24 steps took 24 s\n"
    )


@pytest.mark.parametrize("asked", [None, False])
def test_what_is_no_terminal_stays_empty(asked: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    line = Line("cg", 10, asked=asked, clock=clock)
    clock.now += 60
    line.step()
    line.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "words"), [(8, "8 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_times_in_words(seconds: float, words: str) -> None:
    assert Line("cg").text(seconds) == f"cg: {words}"


def test_an_estimate_is_about_what_was_expected() -> None:
    line = Line("adjoint of Conv2d", 40)
    line.step(10)
    assert line.text(5) == "adjoint of Conv2d: 10 of 40 steps, 5 s, about 15 s left"
    line.step(40)
    assert line.text(25) == "adjoint of Conv2d: 50 steps, 25 s"  # there were more than expected


def test_what_is_called_inside_shows_and_counts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_of("outside", True) as line:
        expect(3)
        step()
        with progress_of("inside", True):
            expect(100)
            step(7)
        step()
    assert (line.done, line.total) == (2, 3)
    assert capsys.readouterr().err == "outside: 2 steps took 0 s\n"
    step()  # of nothing


def _blur() -> al.LinearOperator:
    return al.linear_operator(nn.Conv1d(1, 1, 3, bias=False), (1, 1, 12))


TASKS: dict[str, Callable[[bool | None], object]] = {
    "adjoint of Conv1d": lambda p: al.linear_operator(nn.Conv1d(1, 1, 3, bias=False), (1, 1, 12), progress=p),
    "adjoint of Linear": lambda p: al.affine_operator(nn.Linear(3, 2), (3,), progress=p),
    "adjoint of a function": lambda p: al.check_linearity(lambda x: 2 * x, (3,), progress=p),
    "check_adjoint": lambda p: al.check_adjoint(_blur(), progress=p),
    "operator_norm": lambda p: al.operator_norm(_blur(), progress=p),
    "to_dense": lambda p: al.to_dense(_blur(), progress=p),
}


@pytest.mark.parametrize("name", TASKS)
def test_progress_is_shown_where_it_is_asked_for(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    TASKS[name](True)
    shown = capsys.readouterr().err
    assert shown.startswith(f"{name}: ")
    assert shown.endswith(" s\n")
    assert shown.split()[-5] != "0"  # steps
    for asked in (None, False):
        TASKS[name](asked)
        assert capsys.readouterr().err == ""


def test_a_build_remembers_what_it_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    A = al.linear_operator(nn.Conv1d(1, 1, 3, bias=False), (1, 1, 12), progress=True)
    capsys.readouterr()
    A.refresh()
    assert "adjoint of Conv1d" in capsys.readouterr().err


def test_a_check_takes_as_many_steps_as_expected() -> None:
    A = al.linear_operator(nn.Conv1d(1, 1, 3, bias=False), (2, 1, 12), batch_dims=1)
    forward = CheckedMap(A, A.domain, A.codomain, "A")
    back = CheckedMap(A.H, A.codomain, A.domain, "B")
    with progress_of("a check", False) as line:
        DotTest(forward, back, exact=True, seed=0, powers=(20, -20)).run(5)
    assert line.total is not None
    assert line.total / 2 <= line.done <= line.total
