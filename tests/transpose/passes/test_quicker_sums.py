"""Sums of pieces are left to PyTorch's own operations where the rule says so, and written where times do not tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from built import always, never, operator
from laws import seeded
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

import adjointlab as al
from adjointlab.transpose import Options
from adjointlab.transpose.graph.edit import call, known
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.kernels.select import Ways
from adjointlab.transpose.lowered import program_of
from adjointlab.transpose.passes.fuse_slices import accumulate, fuse_slices

SPEC = al.TensorSpec((6, 8), torch.float64)


def shifted(x: Tensor) -> Tensor:
    return x.roll(1, 0) - 2 * x.roll(3, 1)


def sums(A: al.LinearOperator) -> list[int]:
    """Return how many sums are written in the programs of A and its adjoint."""
    graphs = [A.source.nominal.programs[name][0].graph for name in ("function", "adjoint")]
    return [sum(node.target is accumulate for node in graph.body.nodes) for graph in graphs]


def asked(function: Callable[..., Tensor], domain: Any, *, answer: bool = False) -> tuple[al.LinearOperator, list[Any]]:
    """Return an operator, and what its rule for sums was asked."""
    seen: list[Any] = []

    def rule(expected: tuple[float, float], ways: Ways, device: torch.device) -> bool:
        seen.append((expected[1] / expected[0], *[way() for way in ways()]))
        return answer

    return operator(function, domain, None, choose_sum=rule), seen


def test_a_sum_that_is_not_worth_it_is_left_to_pytorch() -> None:
    left, made = (operator(shifted, SPEC, None, choose_sum=rule) for rule in (never, always))
    assert (sums(left), sums(made)) == ([0, 0], [1, 1])
    x = left.domain.randn(seeded(0))
    assert torch.equal(left(x), shifted(x))
    assert torch.allclose(left.H(x), made.H(x), rtol=0, atol=1e-14)


def test_the_two_ways_are_equal_and_on_data_with_the_strides_of_the_graph() -> None:
    _, seen = asked(lambda x: shifted(x[::2]) + shifted(x.mT[:, ::2].mT), SPEC)
    assert seen
    for _, native, other in seen:
        assert torch.allclose(native[0], other, rtol=0, atol=1e-14)


def test_what_is_expected_grows_with_calls_and_falls_with_passes() -> None:
    (small, *_), *_ = asked(lambda x: x.roll((1, 2), (0, 1)), (4, 4))[1]
    (large, *_), *_ = asked(lambda x: x.roll(1, 0) - 2 * x.roll(1, 1) + x.roll(2, 0), (700, 700))[1]
    assert small > 2
    assert large < 1


def test_equal_blocks_are_decided_once() -> None:
    def loop(x: Tensor) -> Tensor:
        for _ in range(12):
            x = shifted(x).cumsum(0)
        return x

    _, seen = asked(loop, SPEC)
    assert len(seen) == 2  # of A and of its adjoint
    A, seen = asked(lambda x: shifted(x).cumsum(0)[1:].roll(1, 0), SPEC)
    assert len(seen) == 4  # which differ
    assert sums(A) == [0, 0]


def test_sums_beside_convolutions_are_written() -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False).requires_grad_(False)
    A, seen = asked(layer, (1, 1, 8, 8))
    assert (sums(A), seen) == ([1, 1], [])


def test_sums_of_the_state_alone_are_written() -> None:
    weight = torch.randn(6, 8, dtype=torch.float64, generator=seeded(0))
    A, seen = asked(lambda x: shifted(weight) * x, SPEC)
    assert (sums(A), seen) == ([1, 1], [])


def test_sums_that_read_less_are_written() -> None:
    A = operator(lambda x: torch.cat([x.cumsum(0), 2 * x])[6:].roll(1, 0), SPEC, None, choose_sum=never)
    assert sums(A)[0] == 1
    assert "cumsum" not in str(A.source.nominal.programs["function"][0].graph.body)


def test_what_is_read_by_others_is_computed_once() -> None:
    answers = iter([True, False, False, True] * 9)

    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = shifted(x)
        return torch.fft.fft(y).real + y.roll(1, 0), y

    A = operator(f, SPEC, None, choose_sum=lambda *_: next(answers))
    x = A.domain.randn(seeded(0))
    for found, expected in zip(A(x), f(x), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-13)
    assert al.check_adjoint(A).passed


@pytest.mark.parametrize("op", ["wait_tensor", None])
def test_what_several_processes_run_is_written(op: str | None) -> None:
    body = fx.Graph()
    with FakeTensorMode():
        x = known(body.placeholder("x"), torch.empty(6, 8))
    y = x if op is None else call(body, getattr(torch.ops._c10d_functional, op).default, x)
    body.output((call(body, torch.ops.aten.roll.default, y, [1], [0]),))
    fused = fuse_slices(Graph(body, ()), never)
    assert any(node.target is accumulate for node in fused.body.nodes) is (op is not None)


def test_compiled_programs_are_not_asked_about() -> None:
    def refuse(*_: Any) -> bool:
        raise AssertionError("asked")

    graph = al.linear_operator(shifted, SPEC).source.nominal.graphs["function"]
    program = program_of(graph, options=Options(choose_sum=refuse), mode="compiled")
    assert any(node.target is accumulate for node in program.graph.body.nodes)
    with pytest.raises(AssertionError, match="asked"):
        program_of(graph, options=Options(choose_sum=refuse), mode="lowered")
