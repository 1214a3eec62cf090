"""A program on a tensor that knows itself as a sparse function returns its own matrix."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from laws import assert_close
from torch import Tensor
from torch.nn import functional as F

from adjointlab.transpose.passes.rows import NotByIndexError, Rows
from adjointlab.transpose.passes.sparse_rows import Sparse

aten = torch.ops.aten
Map = Callable[[Tensor], Tensor]


def seeded(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


INDEX = torch.randint(0, 49, (5, 6), generator=torch.Generator().manual_seed(0))
GRID = seeded(1, 6, 5, 2) * 2.4 - 1.2
GRID_3D = seeded(1, 3, 4, 5, 3) * 2.6 - 1.3
WEIGHTS = seeded(5, 6)
MAPS: dict[str, tuple[Map, tuple[int, ...], int]] = {
    "rays": (lambda x: (x.reshape(-1)[INDEX] * WEIGHTS).sum(-1), (7, 7), 0),
    "rays of each channel": (lambda x: (x.reshape(3, -1)[:, INDEX] * WEIGHTS).sum(-1), (3, 7, 7), 1),
    "sums of parts": (lambda x: torch.cat([x, 2 * x.flip(0)], 1) - torch.cat([x * 3, -x], 1), (4, 5), 0),
    "added by index": (lambda x: x.new_zeros(49).index_add(0, INDEX[0], x), (6,), 0),
    "scattered": (lambda x: x.new_zeros(5, 49).scatter_add(1, INDEX, x), (5, 6), 0),
    "put": (lambda x: torch.index_put(x.new_zeros(49), (INDEX,), x, accumulate=True), (5, 6), 0),
    "mean": (lambda x: x.mean((1, 2), keepdim=True) / 3, (2, 4, 5), 1),
    "windows": (lambda x: F.unfold(x, 3, padding=1), (1, 2, 5, 6), 0),
    "windows added": (lambda x: F.fold(x, (5, 6), 3, padding=1), (1, 18, 30), 1),
    "reflected": (lambda x: F.pad(x, (1, 2, 2, 1), mode="reflect"), (1, 2, 5, 6), 2),
    "pooled to a size": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), (1, 2, 7, 6), 2),
    "pooled volume": (lambda x: F.avg_pool3d(x, 2), (1, 2, 4, 6, 4), 2),
    "pooled by five": (lambda x: F.avg_pool2d(x, 3, divisor_override=5), (1, 2, 7, 6), 2),
}
for ceil, counts in itertools.product((False, True), repeat=2):
    settings = [3, 2], [2, 2], [1, 1], ceil, counts
    MAPS[f"pool {ceil} {counts}"] = lambda x, s=settings: F.avg_pool2d(x, *s), (1, 2, 7, 6), 2
    pooled = F.avg_pool2d(torch.zeros(1, 2, 7, 6), *settings)
    MAPS[f"pool {ceil} {counts}, transposed"] = (
        lambda v, s=settings: aten.avg_pool2d_backward(v, v.new_empty(1, 2, 7, 6), *s, None), tuple(pooled.shape), 2,
    )  # fmt: skip
for (m, mode), (p, padding), corners in itertools.product(
    enumerate(("bilinear", "nearest", "bicubic")), enumerate(("zeros", "border", "reflection")), (False, True)
):
    for grid, sample, sampled, d in ((GRID, (7, 8), (6, 5), 2), (GRID_3D, (4, 3, 5), (3, 4, 5), 3)):
        if mode == "bicubic" and d == 3:
            continue
        name = f"sample {d}-D {mode} {padding} {corners}"
        MAPS[name] = (
            lambda x, g=grid, s=(mode, padding, corners): F.grid_sample(x, g, s[0], s[1], align_corners=s[2]),
            (1, 2, *sample), 2,
        )  # fmt: skip
        op = getattr(aten, f"grid_sampler_{d}d_backward")
        MAPS[f"{name}, transposed"] = (
            lambda v, op=op, g=grid, size=sample, s=(m, p, corners): op(
                v, torch.empty(1, 2, *size, dtype=v.dtype), g, *s, [True, False]
            )[0],
            (1, 2, *sampled), 2,
        )  # fmt: skip
for mode, dims in (("nearest", 2), ("bilinear", 2), ("bicubic", 2), ("linear", 1), ("trilinear", 3)):
    for factor in (2, 0.6):
        MAPS[f"{mode} times {factor}"] = (
            lambda x, m=mode, f=factor: F.interpolate(x, scale_factor=f, mode=m), (1, 2, *(5, 6, 7)[:dims]), 2,
        )  # fmt: skip


def matrix(found: Sparse, x: Tensor) -> Tensor:
    rows = found.rows
    dense = x.new_zeros(len(rows.start) - 1, x.numel() // math.prod(found.batch))
    return dense.index_put((rows.row, rows.column), rows.value, accumulate=True)


@pytest.mark.parametrize("name", MAPS)
def test_a_program_returns_its_own_matrix(name: str) -> None:
    function, shape, prefix = MAPS[name]
    x = torch.randn(shape, dtype=torch.float64)
    found, y = function(Sparse.identity(x, prefix)), function(x)
    assert found.shape == y.shape
    count = math.prod(shape[:prefix])
    assert_close((x.reshape(count, -1) @ matrix(found, x).mT).reshape(y.shape), y, 1e-15)


@pytest.mark.parametrize("name", ["rays", "sample 2-D bilinear zeros False", "windows"])
def test_entries_of_one_place_are_added(name: str) -> None:
    function, shape, prefix = MAPS[name]
    found = function(Sparse.identity(torch.empty(shape, dtype=torch.float64), prefix))
    columns = math.prod(shape[prefix:])
    compact, x = found.rows.compact(columns), torch.randn(shape, dtype=torch.float64)
    keys = compact.row * columns + compact.column
    assert bool((keys.diff() > 0).all())
    assert_close(matrix(found.like(compact, found.shape), x), matrix(found, x), 1e-15)


def test_large_matrices_are_compact_where_many_entries_are_at_one_place() -> None:
    start = torch.arange((1 << 14) + 1) * 75
    for columns, is_worth in ((1 << 16, False), (64, True)):
        column = torch.arange(75 << 14).mul_(7919).remainder_(columns).int()
        rows = Rows(start, column.flip(0), torch.ones(75 << 14))
        found = rows.smaller(columns)
        assert (found is not rows) is is_worth
        assert float(found.value.sum()) == 75 << 14
        assert len(found.value) == (64 << 14 if is_worth else 75 << 14)


REFUSED: dict[str, tuple[Map, tuple[int, ...], int]] = {
    "adds a number": (lambda x: x + 1, (3,), 0),
    "a square": (lambda x: x * x, (3,), 0),
    "a quotient": (lambda x: 1 / x, (3,), 0),
    "another dtype": (lambda x: x.float(), (3,), 0),
    "ones beside it": (lambda x: F.pad(x, (1, 1), value=1.0), (3,), 0),
    "ones in some places": (lambda x: x.masked_fill(torch.tensor([True, False, True]), 1.0), (3,), 0),
    "ones elsewhere": (lambda x: torch.where(torch.tensor([True, False, True]), x, 1.0), (3,), 0),
    "an exponential": (lambda x: x.exp(), (3,), 0),
    "a factor for each channel": (lambda x: x * torch.arange(3.0)[:, None], (3, 4), 1),
    "a sum over channels": (lambda x: x.sum(0), (3, 4), 1),
    "channels exchanged": (lambda x: x.flip(0), (3, 4), 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_map_by_index_is_refused(name: str) -> None:
    function, shape, prefix = REFUSED[name]
    with pytest.raises(NotByIndexError, match=r"\w"):
        function(Sparse.identity(torch.empty(shape, dtype=torch.float64), prefix))
