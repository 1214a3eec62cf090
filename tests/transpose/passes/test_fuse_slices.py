"""Sums of pieces equal the graphs that they replace."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import seeded

import adjointlab as al

pytestmark = pytest.mark.slow

SHAPE = (5, 6)


def _window(draw: st.DrawFn, size: int) -> tuple[int, int]:
    start = draw(st.integers(0, size - 1))
    return start, draw(st.integers(start + 1, size))


@st.composite
def programs(draw: st.DrawFn) -> list[tuple]:
    """Draw a list of steps, each from images of one shape to images of that shape."""
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["write", "crop", "roll", "cat", "sum", "scale", "select", "stack"]))
        dim = draw(st.integers(0, 1))
        steps.append((kind, dim, *_window(draw, SHAPE[dim]), draw(st.integers(-3, 3))))
    return steps


def _run(steps: list[tuple], x: torch.Tensor) -> torch.Tensor:
    history = [x]
    for kind, dim, start, stop, number in steps:
        y, other = history[-1], history[number % len(history)]
        length = stop - start
        if kind == "write":
            z = other.clone()
            z.narrow(dim, start, length).copy_(y.narrow(dim, 0, length))
        elif kind == "crop":
            pads = [start, SHAPE[dim] - stop]
            z = torch.nn.functional.pad(y.narrow(dim, start, length), pads if dim == 1 else [0, 0, *pads])
        elif kind == "roll":
            z = torch.roll(y, number, dim)
        elif kind == "cat":
            z = torch.cat([y.narrow(dim, start, length), other.narrow(dim, 0, SHAPE[dim] - length)], dim)
        elif kind == "sum":
            z = y - other if number < 0 else y + other
        elif kind == "scale":
            z = -y
        elif kind == "select":
            z = torch.zeros_like(y)
            z.select(dim, start).add_(other.select(dim, stop - 1))
        else:
            z = torch.stack([y, other])[number % 2] + torch.stack([y, other]).sum(0)
        history.append(z)
    return history[-1]


@given(programs())
@settings(max_examples=15, deadline=None)
def test_lowered_equals_plain(steps: list[tuple]) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return _run(steps, x)

    domain = al.TensorSpec(SHAPE, torch.float64)
    plain = al.linear_operator(f, domain, lowering=False)
    lowered = al.linear_operator(f, domain)
    # Small integers: sums of them are exact in any order, so that the two are equal, not only close.
    x = torch.randint(-9, 9, SHAPE, generator=seeded(0)).double()
    assert lowered.engine == plain.engine == "traced"
    assert torch.equal(lowered(x), plain(x))
    assert torch.equal(lowered.H(x), plain.H(x))


def test_finite_differences_are_one_pass() -> None:
    def gradient(x: torch.Tensor) -> torch.Tensor:
        g = torch.zeros(2, *x.shape, dtype=x.dtype)
        g[0, :-1] = x[1:] - x[:-1]
        g[1, :, :-1] = x[:, 1:] - x[:, :-1]
        return g

    program = al.linear_operator(gradient, (8, 8)).explain().split("adjoint program:")[1]
    assert program.count(" = ") == 1
    assert "accumulate" in program
