"""Sums of pieces equal the graphs that they replace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from built import always, never, operator
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import seeded

import adjointlab as al
from adjointlab.transpose.passes.fuse_slices import accumulate

pytestmark = pytest.mark.slow

SHAPE = (5, 6)


def _window(draw: st.DrawFn, size: int) -> tuple[int, int]:
    start = draw(st.integers(0, size - 1))
    return start, draw(st.integers(start + 1, size))


def written(function: Callable[[torch.Tensor], torch.Tensor], domain: Any) -> al.LinearOperator:
    """Return the operator in which all sums are written."""
    return operator(function, domain, None, choose_sum=always)


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
            z = number * y
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
    turns = iter([True, False] * 99)
    # Small integers: sums of them are exact in any order, so that the two are equal, not only close.
    x = torch.randint(-9, 9, SHAPE, generator=seeded(0)).double()
    for rule in (always, never, lambda *_: next(turns)):
        lowered = operator(f, domain, None, choose_sum=rule)
        assert lowered.engine == plain.engine == "traced"
        assert torch.equal(lowered(x), plain(x))
        assert torch.equal(lowered.H(x), plain.H(x))


def test_finite_differences_are_one_pass() -> None:
    def gradient(x: torch.Tensor) -> torch.Tensor:
        g = torch.zeros(2, *x.shape, dtype=x.dtype)
        g[0, :-1] = x[1:] - x[:-1]
        g[1, :, :-1] = x[:, 1:] - x[:, :-1]
        return g

    program = written(gradient, (8, 8)).explain().split("adjoint program:")[1]
    assert program.count(" = ") == 1
    assert "accumulate" in program


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("step", [-1, 0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex128])
def test_windows_of_one_source_are_a_view(axis: int, step: int, dtype: torch.dtype) -> None:
    offsets = [12 + step * i for i in range(5)]

    def windows(x: torch.Tensor) -> torch.Tensor:
        return 2 * torch.stack([x[1:, at : at + 6] for at in offsets], axis)

    A = written(windows, al.TensorSpec((4, 31), dtype))
    # Small integers, whose sums are exact.
    x, y = ((3 * t).real.round().to(dtype) for t in (A.domain.randn(seeded(0)), A.codomain.randn(seeded(1))))
    assert torch.equal(A(x), windows(x))
    expected = torch.zeros_like(x)
    for i, at in enumerate(offsets):
        expected[1:, at : at + 6] += (2 * y).select(axis, i)
    assert al.check_adjoint(A).passed
    assert torch.equal(A.H(y), expected)
    assert torch.equal(torch.vmap(A)(torch.stack([x, 3 * x])), torch.stack([windows(x), 3 * windows(x)]))


def test_bands_shifted_and_added_are_one_pass() -> None:
    def dispersed(cube: torch.Tensor) -> torch.Tensor:
        shifted = cube.new_zeros(40, 8, 8 + 39)
        for i, band in enumerate(cube):
            shifted[i, :, i : i + 8] = band
        return shifted.sum(0)

    A = written(lambda cube: dispersed(3 * cube), (40, 8, 8))
    program = A.explain().split("adjoint program:")[1]
    assert "windows([" in program
    assert program.count(" = ") == 4  # two views of v, windows of it, the product
    v = A.codomain.randn(seeded(0))
    assert torch.equal(A.H(v), 3 * v.unfold(1, 8, 1).movedim(1, 0))


def test_a_result_is_no_window_of_its_input() -> None:
    A = written(lambda x: torch.stack([x[i : i + 4] for i in range(6)]), (9,))
    x = torch.arange(9.0)
    A(x).zero_()
    assert torch.equal(x, torch.arange(9.0))
    H = written(lambda x: torch.stack([x[i : i + 4] for i in range(6)]).reshape(2, 3, 4)[1].mT, (9,))
    H(x).zero_()
    assert torch.equal(x, torch.arange(9.0))


def _entry(x: torch.Tensor) -> torch.Tensor:
    y = 2 * x - x.roll(1, 0)
    y[3, 4] += x[0, 0]
    return y


def test_a_write_to_an_entry_leaves_the_rest_in_one_piece() -> None:
    A = written(_entry, al.TensorSpec((6, 7), torch.float64))
    programs = [g for name in ("function", "adjoint") for g in [A.source.nominal.programs[name][0].graph]]
    counts = [[len(n.args[1]) for n in g.body.nodes if n.target is accumulate] for g in programs]
    assert counts == [[4], [4]]  # the image, the two parts of the rolled one, and the entry
    x = A.domain.randn(seeded(0))
    assert torch.allclose(A(x), _entry(x), rtol=0, atol=1e-14)
    assert al.check_adjoint(A).passed


def test_what_is_written_whole_into_another_sum_is_written_there() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.roll(1, 0) - 3 * x.roll(2, 1)
        z = torch.zeros(6, 9, dtype=x.dtype)
        z[:, :7] = -2 * y
        return z + x.sum()

    A = written(f, al.TensorSpec((6, 7), torch.float64))
    x = A.domain.randn(seeded(0))
    assert torch.allclose(A(x), f(x), rtol=0, atol=1e-13)
    assert al.check_adjoint(A).passed


def test_an_image_that_is_read_whole_is_not_copied() -> None:
    A = written(lambda x: torch.cat([x[:2], x[2:]]).cumsum(0), (5,))
    x = torch.arange(5.0)
    assert torch.equal(A(x), x.cumsum(0))
    assert torch.equal(x, torch.arange(5.0))
