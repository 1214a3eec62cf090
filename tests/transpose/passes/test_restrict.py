"""Rows of a result: where a selection moves through an operation, only its part is computed; and where it must not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lawbook.passes import assert_equal, random, run
from laws import seeded
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from adjointlab.space import Space
from adjointlab.space.selection import Selection
from adjointlab.transpose.frontend.capture import capture
from adjointlab.transpose.frontend.trace import trace_forward
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import LIKE, VIEWS
from adjointlab.transpose.passes.normalise import normalise
from adjointlab.transpose.passes.restrict import restrict

aten = torch.ops.aten
Map = Callable[[Tensor], Any]


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=seeded(0)) - 0.5


class Work(TorchDispatchMode):
    """Counts the entries that operations compute, views and factories aside."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket not in VIEWS | LIKE | {aten.full, aten.zeros, aten.index_select}:
            outputs = found if isinstance(found, (tuple, list)) else [found]
            self.entries += sum(out.numel() for out in outputs if isinstance(out, Tensor))
        return found


def work(graph: Graph) -> int:
    tensors = random(graph)
    with Work() as count, torch.no_grad():
        graph.function(*tensors)
    return count.entries


def traced(function: Map, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Graph:
    domain = Space.of(tuple(shape), dtype=dtype)
    return normalise(trace_forward(capture(function, {}, domain, ())))


def rows_of(graph: Graph, dim: int, rows: Sequence[int]) -> tuple[Graph, tuple[str, ...]]:
    """Return the graph of some rows, once it is seen to be that."""
    (result,) = graph.outputs
    selection = Selection(dim, tuple(rows), result.meta["val"].shape[dim])
    found, whole = restrict(graph, selection)
    tensors = random(graph)
    inputs = tensors[len(graph.state) :]
    expected = [selection(out) for out in run(graph, tensors)]
    assert_equal(run(found, [source.read().detach() for source in found.state] + inputs), expected, "rows")
    return found, whole


W, GRID = drawn(8, 8), 2 * drawn(8, 5, 6, 2)
TALL_GRID = 2 * drawn(1, 8, 6, 2)
GRID_3D = 2 * drawn(8, 2, 3, 4, 3)
INDEX = torch.randint(0, 8, (8, 5), generator=seeded(0))
SMALL = torch.tensor([0, 2, 2, 1, 3, 3, 0, 1])
NORM = torch.nn.BatchNorm2d(8, dtype=torch.float64).eval()
KERNEL, TURNED, DEPTHWISE = drawn(8, 3, 3, 3), drawn(3, 8, 3, 3), drawn(8, 1, 3, 3)
CUBE, PAIRS, TALL = drawn(2, 8, 4), drawn(8, 2, 3), drawn(2, 8, 3)
TWICE = {"rows in larger rows", "dimensions that are joined", "einsum"}  # for parts of larger rows, or for copies


def put(x: Tensor) -> Tensor:
    out = x.new_zeros(8, 4)
    out[:, [0, 2, 1]] = 3 * x
    return out


def shifted(x: Tensor) -> Tensor:
    x = 3 * x
    return torch.stack([x.roll(k, 0) for k in range(4)], 1).sum(1)


# A map whose result has eight rows along a dimension, computed in one step from something; the shape of its domain.
FIRES: dict[str, tuple[Map, tuple[int, ...], int]] = {
    "pointwise": (lambda x: 2 * x, (8, 3), 0),
    "a product that is broadcast": (lambda x: x * W[:, :, None], (8, 1, 3), 0),
    "a product with rows of the state": (lambda x: x * W, (8, 8), 1),
    "where": (lambda x: torch.where(W > 0, x, 0 * x), (8, 8), 0),
    "real and imaginary parts": (lambda x: torch.view_as_real(torch.view_as_complex(x) * (1 + 2j)), (8, 3, 2), 0),
    "unsqueeze": (lambda x: (3 * x)[:, None], (8, 3), 0),
    "squeeze": (lambda x: (3 * x).squeeze(1), (4, 1, 8), 1),
    "permute": (lambda x: (3 * x).permute(2, 0, 1), (2, 4, 8), 0),
    "transpose": (lambda x: (3 * x).mT, (2, 8), 0),
    "select": (lambda x: (3 * x)[:, 1], (2, 4, 8), 1),
    "slice along it": (lambda x: (3 * x)[::2], (16, 3), 0),
    "slice along another": (lambda x: (3 * x)[:, 1:], (8, 3), 0),
    "expand": (lambda x: (3 * x).expand(4, 8, 3), (8, 3), 1),
    "expand of one row": (lambda x: x.expand(8, 3) * W[:, :3], (1, 3), 0),
    "repeat": (lambda x: x.repeat(4, 1), (2, 3), 0),
    "windows of a signal": (lambda x: (3 * x).unfold(1, 3, 2), (8, 9), 0),
    "a dimension that was cut": (lambda x: (3 * x).reshape(8, 2, 3), (16, 3), 0),
    "the second of a dimension that was cut": (lambda x: (3 * x).reshape(2, 8, 3), (16, 3), 1),
    "dimensions that are joined": (lambda x: (3 * x).reshape(8, 6), (4, 2, 2, 3), 0),
    "rows in larger rows": (lambda x: (3 * x).reshape(-1)[:8], (16, 8), 0),
    "cat along it": (lambda x: torch.cat([3 * x, 2 * x]), (4, 3), 0),
    "cat along another": (lambda x: torch.cat([3 * x, 2 * x], 1), (8, 3), 0),
    "stack along it": (lambda x: torch.stack([k * x for k in range(8)]), (3,), 0),
    "stack along another": (lambda x: torch.stack([3 * x, 2 * x], 1), (8, 3), 0),
    "split": (lambda x: (3 * x).split([2, 8, 6])[1], (16, 3), 0),
    "split along another": (lambda x: (3 * x).split([1, 2], 1)[1], (8, 3), 0),
    "unbind": (lambda x: (3 * x).unbind(1)[1], (4, 3, 8), 1),
    "slices written": (lambda x: torch.slice_scatter(3 * x, 2 * x[2:5], 0, 2, 5), (8, 3), 0),
    "slices written along another": (lambda x: torch.slice_scatter(3 * x, 2 * x[:, 1:], 1, 0, 2), (8, 3), 0),
    "a row written": (lambda x: torch.select_scatter(3 * x, 2 * x[0], 0, 1), (8, 3), 0),
    "a column written": (lambda x: torch.select_scatter(3 * x, 2 * x[:, 0], 1, 1), (8, 3), 0),
    "the batch of a norm": (NORM, (8, 8, 3, 2), 0),
    "the channels of a norm": (NORM, (2, 8, 3, 2), 1),
    "mm, of the left": (lambda x: W @ x, (8, 3), 0),
    "mm, of the right": (lambda x: x @ W, (3, 8), 1),
    "mv": (lambda x: W @ x, (8,), 0),
    "addmm": (lambda x: torch.addmm(x, W, x), (8, 3), 0),
    "bmm, of the batch": (lambda x: torch.bmm(PAIRS, x), (8, 3, 4), 0),
    "bmm, of the left": (lambda x: torch.bmm(TALL, x), (2, 3, 4), 1),
    "einsum": (lambda x: torch.einsum("bij,bj->ib", CUBE, x), (2, 4), 0),
    "sum": (lambda x: (3 * x).sum((0, 2)), (3, 8, 4), 0),
    "mean": (lambda x: (3 * x).mean(1, keepdim=True), (8, 4), 0),
    "cumsum": (lambda x: x.cumsum(1), (8, 4), 0),
    "fft": (lambda x: torch.view_as_real(torch.fft.fft2(x)), (8, 4, 4), 0),
    "irfft": (lambda x: torch.fft.irfft(torch.fft.rfft(x)), (8, 6), 0),
    "triu": (lambda x: x.triu(), (8, 4, 4), 0),
    "reflected": (lambda x: F.pad(x, (1, 1, 2, 1), mode="reflect"), (1, 8, 4, 4), 1),
    "padded along another": (lambda x: F.pad(x, (1, 2)), (8, 3), 0),
    "padded along it, inside": (lambda x: F.pad(3 * x, (0, 0, 1, 1))[1:9], (8, 3), 0),
    "resampled": (lambda x: F.interpolate(x, (7, 5), mode="bilinear"), (8, 2, 4, 4), 0),
    "pooled": (lambda x: F.avg_pool2d(x, 2), (1, 8, 4, 4), 1),
    "pixels shuffled": (lambda x: F.pixel_shuffle(x, 2), (8, 4, 3, 3), 0),
    "rolled, a vector": (lambda x: (3 * x).roll(3), (8,), 0),
    "flipped along it": (lambda x: (3 * x).flip(0, 1), (8, 3), 0),
    "rolled along it": (lambda x: (3 * x).roll((3, 1), (0, 1)), (8, 3), 0),
    "the batch of a convolution": (lambda x: F.conv2d(x, KERNEL), (8, 3, 5, 5), 0),
    "the channels of a convolution": (lambda x: F.conv2d(x, KERNEL), (1, 3, 5, 5), 1),
    "the channels of a depthwise convolution": (lambda x: F.conv2d(x, DEPTHWISE, groups=8), (1, 8, 5, 5), 1),
    "the channels of a transposed convolution": (lambda x: F.conv_transpose2d(x, TURNED), (1, 3, 5, 5), 1),
    "the batch of samples": (lambda x: F.grid_sample(x, GRID, align_corners=False), (8, 1, 4, 4), 0),
    "the channels of samples": (lambda x: F.grid_sample(x, GRID[:1], align_corners=False), (1, 8, 4, 4), 1),
    "the places of samples": (lambda x: F.grid_sample(x, TALL_GRID, align_corners=False), (1, 1, 4, 4), 2),
    "a volume's samples": (lambda x: F.grid_sample(x, GRID_3D, align_corners=False), (8, 1, 3, 4, 4), 0),
    "patches": (lambda x: F.unfold(x, 2), (8, 1, 3, 3), 0),
    "patches added": (lambda x: F.fold(x, (3, 3), 2), (1, 32, 4), 1),
    "rows by index": (lambda x: x[SMALL], (4, 3), 0),
    "columns by index": (lambda x: (3 * x)[:, SMALL], (8, 4), 0),
    "a table of places": (lambda x: x[INDEX], (8, 2), 0),
    "pairs of places": (lambda x: x[SMALL, SMALL[[2] * 8]], (4, 4), 0),
    "index_select": (lambda x: x.index_select(1, SMALL), (2, 4), 1),
    "gather along another": (lambda x: x.gather(1, INDEX), (8, 8), 0),
    "gather along it": (lambda x: x.gather(0, INDEX), (8, 5), 0),
    "added by index along another": (lambda x: x.new_zeros(8, 4).index_add(1, SMALL, 3 * x), (8, 8), 0),
    "scattered along another": (lambda x: x.new_zeros(8, 8).scatter_add(1, INDEX, 3 * x), (8, 5), 0),
    "put along another": (put, (8, 3), 0),
}  # fmt: skip

# The same operations along dimensions whose rows depend on each other; and what is computed whole.
STOPS: dict[str, tuple[Map, tuple[int, ...], int, str]] = {
    "real and imaginary parts": (lambda x: torch.view_as_real(1j * x), (8,), 1, "view_as_real"),
    "windows of a signal": (lambda x: (3 * x).unfold(0, 3, 2), (9, 2), 0, "unfold"),
    "neither in nor of larger rows": (lambda x: (3 * x).reshape(3, 4), (2, 6), 0, "view"),
    "the inner of dimensions that are cut anew": (lambda x: (3 * x).reshape(3, 4), (2, 6), 1, "view"),
    "cumsum": (lambda x: x.cumsum(0), (8, 4), 0, "cumsum"),
    "fft": (lambda x: torch.view_as_real(torch.fft.fft2(x)), (2, 8, 4), 1, "_fft_c2c"),
    "triu": (lambda x: x.triu(), (8, 4), 0, "triu"),
    "reflected": (lambda x: F.pad(x, (1, 1, 2, 1), mode="reflect"), (1, 1, 4, 4), 2, "reflection_pad2d"),
    "padded along it": (lambda x: F.pad(x, (0, 0, 2, 2)), (8, 3), 0, "constant_pad_nd"),
    "pooled": (lambda x: F.avg_pool2d(x, 2), (1, 1, 8, 4), 2, "avg_pool2d"),
    "pixels shuffled": (lambda x: F.pixel_shuffle(x, 2), (1, 8, 3, 3), 1, "pixel_shuffle"),
    "rolled as one": (lambda x: (3 * x).roll(3), (8, 2), 0, "roll"),
    "the pixels of a convolution": (lambda x: F.conv2d(x, KERNEL), (1, 3, 5, 5), 2, "convolution"),
    "patches": (lambda x: F.unfold(x, 2), (1, 2, 3, 3), 1, "im2col"),
    "patches added": (lambda x: F.fold(x, (3, 3), 2), (1, 4, 4), 2, "col2im"),
    "indices apart": (lambda x: x[SMALL, :, SMALL], (4, 2, 4), 0, "index"),
    "scattered along it": (lambda x: x.new_zeros(8, 5).scatter_add(0, INDEX, 3 * x), (8, 5), 0, "scatter_add"),
    "put along it": (lambda x: x.new_zeros(4, 8).index_put((SMALL,), 3 * x, accumulate=True), (8, 8), 0, "index_put"),
    "what no rule knows": (lambda x: torch.linalg.solve(W, x), (8, 3), 1, "getitem"),
    "what most rows need": (lambda x: torch.cat([(3 * x).cumsum(1)] * 4), (2, 3), 0, ""),
}  # fmt: skip

ROWS = {"one": [1], "in order": [1, 2], "evenly spaced": [1, 5], "in any order": [6, 1]}


@pytest.mark.parametrize("name", FIRES)
def test_only_rows_that_are_wanted_are_computed(name: str) -> None:
    function, shape, dim = FIRES[name]
    graph = traced(function, shape)
    n = graph.outputs[0].meta["val"].shape[dim]
    for chosen in ROWS.values():
        rows = [row for row in chosen if row < n]
        found, whole = rows_of(graph, dim, rows)
        assert whole == ()
        assert work(found) <= max(work(graph) * len(rows) / n, 1) * (2 if name in TWICE else 1)


@pytest.mark.parametrize("name", STOPS)
def test_rows_that_depend_on_others_are_selected_after(name: str) -> None:
    function, shape, dim, stop = STOPS[name]
    graph = traced(function, shape)
    n = graph.outputs[0].meta["val"].shape[dim]
    _, whole = rows_of(graph, dim, [n - 1, 0])
    assert stop in {*whole, ""}
    assert bool(whole) == bool(stop)


def test_rows_may_come_several_times_and_all_of_them_are_no_selection() -> None:
    graph = traced(lambda x: torch.cat([3 * x, W @ x]), (8, 3))
    rows_of(graph, 0, [9, 9, 1, 15, 1])
    found, _ = rows_of(graph, 0, range(16))
    assert work(found) == work(graph)


def test_a_value_of_which_more_than_all_rows_are_wanted_is_computed_once() -> None:
    graph = traced(shifted, (8, 3))
    found, whole = rows_of(graph, 0, [0, 1, 2, 4, 6])
    assert "mul" in whole
    assert sum(node.target is aten.mul.Tensor for node in found.body.nodes) == 1


def test_a_sparse_matrix_loses_the_entries_of_other_rows() -> None:
    dense = torch.where(drawn(8, 6) > 0, drawn(8, 6), 0)
    dense[3] = 0
    matrix = dense.to_sparse()
    graph = traced(lambda x: matrix @ x, (6,))
    for rows in ([1], [5, 1, 5], [3], [0, 1, 2, 3]):
        found, whole = rows_of(graph, 0, rows)
        assert whole == ()
        assert work(found) < work(graph)


def test_a_part_of_the_state_is_read_where_the_whole_is() -> None:
    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", drawn(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.mask * x

    module = Masked()
    domain = Space.of((8, 3), dtype=torch.float64)
    graph = normalise(trace_forward(capture(module, {}, domain, (module,))))
    found, _ = rows_of(graph, 0, [2, 4])
    source = found.state[-1]
    assert source.name == "rows 2:5:2 along dimension 0 of mask"
    module.mask = 2 * module.mask
    assert torch.equal(source.read(), module.mask[2:5:2])
