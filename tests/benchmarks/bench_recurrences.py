"""Recurrences: a wave on 256² cells from a source to receivers, against a loop in Python and, if installed, Deepwave.

Deepwave (0.1, CPU) has the same scheme, of second order, with a pressure of zero at the border; its results are
compared with ours before either is timed. Its code makes numbers too small for the format zero while it runs; here,
that is so for all.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_engine import _probe
from contenders import Ways
from torch import Tensor, nn

import adjointlab as al

CELL, TICK = 5.0, 5e-4


class Wave(nn.Module):
    """A leapfrog step with a source in the middle and receivers in a row."""

    def __init__(self, speed: Tensor) -> None:
        super().__init__()
        self.speed = nn.Parameter(speed)

    def forward(self, state: tuple[Tensor, Tensor], source: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        u, before = state
        p, n = F.pad(u, (1, 1, 1, 1)), len(u)
        around = p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2]
        factor = (self.speed * TICK) ** 2
        after = 2 * u - before + factor / CELL**2 * (around - 4 * u)
        after[n // 2, n // 2] -= factor[n // 2, n // 2] * source
        return (after, u), u[5, 5 : n - 5 : 4]

    def back(self, state: tuple[Tensor, Tensor], source: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state before: the same step with time reversed."""
        after, u = state
        return u, self((u, after), source)[0][0]


class Setup:
    """The same model for every way."""

    def __init__(self, *, quick: bool) -> None:
        self.n, self.steps = (32, 20) if quick else (256, 300)
        torch.manual_seed(0)
        self.wave = Wave(3000 + 1000 * torch.rand(self.n, self.n))  # as fast as Deepwave takes in whole steps
        self.state = (torch.zeros(self.n, self.n), torch.zeros(self.n, self.n))
        self.A, self.B = (self.build(engine=engine) for engine in ("auto", "compiled"))
        self.C = self.build(inverse=self.wave.back)
        self.x, self.y = self.A.domain.randn(), self.A.codomain.randn()
        self.case = f"wave, {self.n}², {self.steps} steps"

    def build(self, **options: Any) -> al.LinearOperator[Any, Any]:
        return al.recurrence(self.wave, self.state, inputs=(self.steps,), **options)

    def loop(self, x: Tensor) -> Tensor:
        state, traces = self.state, []
        for source in x.unbind():
            state, trace = self.wave(state, source)
            traces.append(trace)
        return torch.stack(traces)

    def gradient(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad((model(self.x) * self.y).sum(), self.wave.speed)[0]

    @functools.cached_property
    def deepwave(self) -> Callable[[Tensor], Tensor] | None:
        """The same by Deepwave, as a function of the source and, with gradients, of the speed."""
        if importlib.util.find_spec("deepwave") is None:
            return None
        import deepwave

        n = self.n
        columns = torch.arange(5, n - 5, 4)
        receivers = torch.stack([torch.full_like(columns, 5), columns], 1)[None]

        def run(x: Tensor) -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = deepwave.scalar(
                    self.wave.speed, CELL, TICK, source_amplitudes=x[None, None],
                    source_locations=torch.tensor([[[n // 2, n // 2]]]), receiver_locations=receivers, accuracy=2,
                    pml_width=0,
                )  # fmt: skip
            return found[-1][0].T

        return run


@functools.lru_cache(maxsize=1)
def _setup(*, quick: bool) -> Setup:
    return Setup(quick=quick)


@pytest.fixture
def _flushed() -> Iterator[None]:
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("_flushed")
@pytest.mark.parametrize("which", ["A", "A.H", "gradient", "build"])
def test_recurrence(which: str, quick: bool, compare: Any) -> None:
    s = _setup(quick=quick)
    ways: Ways
    theirs, skipped = s.deepwave, {} if s.deepwave else {"Deepwave": "not installed"}
    if which == "A":
        ways = {"adjointlab": lambda: s.A(s.x), "compiled": lambda: s.B(s.x), "loop": lambda: s.loop(s.x)}
        ways |= {} if theirs is None else {"Deepwave": lambda: theirs(s.x)}
    elif which == "A.H":
        ways = {"adjointlab": lambda: s.A.H(s.y), "compiled": lambda: s.B.H(s.y), "A": lambda: s.A(s.x)}
        ways |= {"A, compiled": lambda: s.B(s.x)}
        forth = [s.A(s.x), s.B(s.x)]
        assert torch.allclose(forth[0], forth[1], rtol=1e-3, atol=1e-3 * float(forth[0].abs().max()))
    elif which == "gradient":
        models = {
            "adjointlab": s.A,
            "compiled": s.B,
            "loop": s.loop,
            **({} if theirs is None else {"Deepwave": theirs}),
        }
        ways = {name: functools.partial(s.gradient, model) for name, model in models.items()}
    else:
        ways = {"adjointlab": s.build}
    if which in {"A", "gradient"}:
        _assert_alike(ways)
    if which == "gradient":
        # Not compared: hardly a wave is at the receivers so soon, and its gradient is below the rounding of the states.
        ways |= {"inverse": lambda: s.gradient(s.C)}
        ways |= {"A": lambda: s.A(s.x), "A, compiled": lambda: s.B(s.x)}
    compare(ways, skipped=skipped, section="recurrences", map=which, case=s.case)


def _assert_alike(ways: Ways) -> None:
    first, *rest = [way() for way in ways.values()]
    assert first.norm() > 0  # zeros are all alike
    for other in rest:
        assert torch.dist(other, first) <= 1e-4 * first.norm()


def test_memory_of_recurrences(quick: bool, benchmark: Any) -> None:
    counts = (20, 40) if quick else (1000, 10000)
    found = {f"{way}, {steps}": _probe("recurrence", way, steps, 32 if quick else 256)["bytes"]
             for way in ("A", "A.H", "gradient", "gradient, inverse") for steps in counts}  # fmt: skip
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(section="recurrences, memory", case="wave", bytes=found)
