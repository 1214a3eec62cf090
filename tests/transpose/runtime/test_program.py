"""Graphs made callable: what is written in place, and what never is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from built import operator, ops_of, prefer
from laws import assert_close, draw, norm, seeded
from torch import Tensor, fx, nn

import adjointlab as al
from adjointlab.transpose.graph.edit import copied
from adjointlab.transpose.graph.ops import op_name
from adjointlab.transpose.kernels.registry import transformed
from adjointlab.transpose.passes import partition
from adjointlab.transpose.passes.partition import _in_place, kept_nodes
from adjointlab.transpose.runtime import program

pytestmark = pytest.mark.slow

X, W = torch.zeros(1, 1, 6), torch.zeros(1, 1, 3)


def convolved(graph: fx.Graph, x: fx.Node, w: fx.Node) -> fx.Node:
    node = graph.call_function(torch.convolution, (x, w, None, [1], [1], [1], False, [0], 1))
    node.meta["val"] = X
    return node


def combined(graph: fx.Graph, op: Any, a: Any, b: Any, value: Tensor = X, **options: Any) -> fx.Node:
    node = graph.call_function(op, (a, b), options)
    node.meta["val"] = value
    return node


def rewritten(build: Callable[[fx.Graph, fx.Node, fx.Node], Any], second: Tensor = X) -> list[Any]:
    """Return the targets of the sums and products of a graph of ``x``, ``y`` and a weight, after the rewriting."""
    graph = fx.Graph()
    x, y, w = (graph.placeholder(name) for name in "xyw")
    for node, value in ((x, X), (y, second), (w, W)):
        node.meta["val"] = value
    result = build(graph, convolved(graph, x, w), y)
    graph.output(result if isinstance(result, tuple) else (result,))
    _in_place(graph)
    return [n.target for n in graph.nodes if n.op == "call_function" and n.target is not torch.convolution]


def test_what_nothing_else_reads_is_written_to() -> None:
    assert rewritten(lambda g, c, y: combined(g, torch.sub, c, y)) == [torch.Tensor.sub_]
    chain = rewritten(lambda g, c, y: combined(g, torch.mul, combined(g, torch.add, c, y), y))
    assert chain == [torch.Tensor.add_, torch.Tensor.mul_]


@pytest.mark.parametrize(
    ("build", "second"),
    [
        (lambda g, c, y: combined(g, torch.sub, y, c), X),  # written to y, which is not ours
        (lambda g, c, y: (combined(g, torch.sub, c, y), c), X),
        (lambda g, c, y: combined(g, torch.mul, combined(g, torch.neg, c, y), y), X),
        (lambda g, c, y: combined(g, torch.add, combined(g, torch.sub, c, y), c), X),  # read again, after the first
        (lambda g, c, y: combined(g, torch.add, c, y, torch.zeros(2, 1, 6)), torch.zeros(2, 1, 6)),  # grows
        (lambda g, c, y: combined(g, torch.add, c, y, X.double()), X.double()),
        (lambda g, c, y: combined(g, torch.add, c, y, alpha=2), X),
        (lambda g, c, y: combined(g, torch.add, c, 2.0), X),
    ],
)
def test_all_else_is_left_alone(build: Callable[..., Any], second: Tensor) -> None:
    assert not {torch.Tensor.add_, torch.Tensor.sub_, torch.Tensor.mul_} & set(rewritten(build, second)[:1])


class Branches(nn.Module):
    """Convolutions that are added, subtracted, multiplied and read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv1d(2, 2, 3, padding=1, bias=False) for _ in range(2))
        self.register_buffer("mask", torch.rand(2, 9, generator=seeded(2)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.a(x)
        return self.b(x) - x, self.a(x) * self.mask + self.b(x), y + x, y


def test_results_are_those_of_the_eager_engine() -> None:
    module = Branches().double().requires_grad_(requires_grad=False)
    mask = module.mask.clone()
    domain = al.TensorSpec((3, 2, 9), torch.float64)
    eager, traced = (al.linear_operator(module, domain, engine=engine) for engine in ("eager", "traced"))
    x, y = draw(eager.domain, 1), draw(eager.codomain, 2)
    kept = x.clone(), tuple(t.clone() for t in y)
    assert traced.engine == "traced"
    for _ in range(2):
        assert_close(traced(x), eager(x), eager.domain.eps)
        assert_close(traced.H(y), eager.H(y), eager.domain.eps)
        gradients = [al.LeastSquares(A, y).gradient(x) for A in (eager, traced)]
        assert_close(gradients[1], gradients[0], eager.domain.eps)
    assert torch.equal(x, kept[0])
    assert all(map(torch.equal, y, kept[1]))
    assert torch.equal(module.mask, mask)


def test_data_are_subtracted_from_a_convolution_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def subtracted(r: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return r.sub_(y)

    monkeypatch.setitem(partition._IN_PLACE, torch.sub, subtracted)
    A = al.linear_operator(nn.Conv1d(2, 3, 3, bias=False).double().requires_grad_(requires_grad=False), (1, 2, 9))
    x, y = draw(A.domain, 1), draw(A.codomain, 2)
    assert_close(al.LeastSquares(A, y).gradient(x), A.H(A(x) - y), A.domain.eps)
    assert seen
    assert seen[-1] is y


class Prepared(nn.Module):
    """Two convolutions whose kernels are prepared: each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(1, 1, 9, padding=4, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


@pytest.mark.cpu
@pytest.mark.parametrize(("device", "kept"), [("cpu", ["fft", "flipped"]), ("meta", ["fft"])])
def test_an_accelerator_keeps_transforms_alone(device: str, kept: list[str]) -> None:
    module = nn.Conv2d(1, 1, 9, padding=4, bias=False).double().requires_grad_(requires_grad=False)
    names = []
    for kernel in ("fft", "flipped"):
        A = operator(module, al.TensorSpec((1, 1, 20, 20), torch.float64), prefer(kernel))
        graph = copied(A.source.nominal.programs["adjoint"][0].graph)
        for node in graph.placeholders:
            node.meta["val"] = torch.empty(node.meta["val"].shape, device=device)
        names += [op_name(node.target) for node in kept_nodes(graph)]
    assert names == [f"prepack_{kernel}" for kernel in kept]


@pytest.fixture
def prepared() -> tuple[Prepared, Callable[[], int]]:
    """A module of two convolutions by FFT, and how many transforms a call of its operator takes."""
    module = Prepared().double().requires_grad_(requires_grad=False)
    A = operator(module, al.TensorSpec((1, 1, 20, 20), torch.float64), transformed)
    x = draw(A.domain, 1)

    def transforms() -> int:
        count = ops_of(A, x).count("aten::_fft_r2c")
        assert_close(A(x), module(x), 8 * A.domain.eps)
        return count

    assert [transforms() for _ in range(2)] == [2, 2]  # those of the image
    return module, transforms


def test_what_is_prepared_is_made_again_for_what_has_changed_only(prepared: tuple[Prepared, Callable[[], int]]) -> None:
    module, transforms = prepared
    module.a.weight.data.mul_(2)
    assert [transforms() for _ in range(2)] == [3, 2]


def test_nothing_is_kept_of_what_a_cuda_graph_records(
    prepared: tuple[Prepared, Callable[[], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, transforms = prepared
    with monkeypatch.context() as recording:
        recording.setattr(program, "is_captured", lambda _: True)
        module.a.weight.data.mul_(2)
        assert [transforms() for _ in range(2)] == [4, 4]
    assert [transforms() for _ in range(2)] == [3, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA, and so no CUDA graph")
@pytest.mark.parametrize("kernel", ["native", "flipped", "fft"])
def test_a_cuda_graph_follows_what_is_written(kernel: str) -> None:
    module = nn.Conv2d(1, 1, 9, padding=4, bias=False).cuda().requires_grad_(requires_grad=False)
    A = operator(module, al.TensorSpec((1, 1, 20, 20), device="cuda"), prefer(kernel))
    x, y = draw(A.domain, 1), draw(A.codomain, 2)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        A.H(A(x) - y)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        gradient = A.H(A(x) - y)
    for write in (lambda: x.copy_(draw(A.domain, 3)), lambda: module.weight.mul_(-2)):
        write()
        graph.replay()
        largest = float(module.weight.abs().sum())  # at least the operator norm
        scale = largest * (largest * norm(x) + norm(y))
        assert_close(gradient, A.H(A(x) - y), A.domain.eps, scale)
