"""Counts what operators and solvers send, compares it with formulas, and writes the tables of the documentation.

    python tests/distributed/communication.py

writes ``docs/explanation/communication.inc``. Every line of the first table was counted, on gloo processes of this
machine, and is equal to its formula; those of the second are the formulas, for sizes that no machine at hand has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parallel import alike, mesh_of, seeded
from processes import Group
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.profiler import ProfilerActivity, profile

import adjointlab as al
from adjointlab import distributed
from adjointlab.solvers import cg, cgls, lsmr

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "communication.inc"
Message = tuple[str, int]  # the collective, and how many real numbers this process hands to it

N, K = 24, 5  # rows of the test image, and width of the kernel


def counted(function: Callable[[], Any]) -> list[Message]:
    """Return the collectives that a call makes, as the profiler sees PyTorch's functional collectives."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        function()
    messages = []
    for event in profiler.events():
        name = event.name.removeprefix("_c10d_functional::")
        if name not in (event.name, "wait_tensor"):
            shape = event.input_shapes[0]
            messages.append((name, torch.Size(shape).numel()))
    return messages


def held(function: Callable[[], Any]) -> int:
    """Return the most bytes that a call holds at any time, beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    return max(itertools.accumulate(event.self_cpu_memory_usage for event in events))


# -- formulas: real numbers sent by an inner process ------------------------------------------------------------------


def halo(width: int, section: int) -> int:
    """Both sides of a slab: half a kernel's rows to each neighbour, ``(k − 1) s``."""
    return (width - 1) * section


def slab(rank: int, ranks: int, width: int, section: int) -> int:
    """The same at the outer border, which has one neighbour; none where there is one process only."""
    sides = (rank > 0) + (rank < ranks - 1)
    return sides * (width - 1) // 2 * section


# -- counts -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def count(size: int) -> dict[str, tuple[list[Message], list[Message]]]:
    """Return for each operation what was counted on this process, and what the formulas say."""
    mesh, rank = mesh_of(size), torch.distributed.get_rank()
    found: dict[str, tuple[list[Message], list[Message]]] = {}

    def add(name: str, function: Callable[[], Any], *expected: Message) -> None:
        function()  # the first call may have something to prepare
        found[name] = (counted(function), list(expected))

    c = alike(nn.Conv2d(1, 1, K, padding=K // 2, padding_mode="reflect", bias=False))
    for engine in ("eager", "traced", "auto"):
        X = distributed.space((1, 1, N, N), mesh, [Shard(2)])
        A = distributed.convolution(c, X, engine=engine)
        x, y = X.randn(seeded()), A.codomain.randn(seeded())
        sent = [("all_to_all_single", slab(rank, size, K, N))] if size > 1 else []
        add(f"convolution, forward, {engine}", lambda A=A, x=x: A(x), *sent)
        # The reference runs the forward as well; what is traced does not.
        add(f"convolution, adjoint, {engine}", lambda A=A, y=y: A.H(y), *sent * (2 if engine == "eager" else 1))
    rows = distributed.vstack(al.linear_operator(nn.Conv2d(1, 2, 3, bias=False), (1, 1, N, N)), mesh)
    x, y = rows.domain.randn(seeded()), rows.codomain.randn(seeded())
    add("rows, forward", lambda: rows(x))
    add("rows, adjoint", lambda: rows.H(y), ("all_reduce", N * N))
    columns = distributed.hstack(al.linear_operator(nn.Conv2d(1, 2, 3, bias=False), (1, 1, N, N)).H, mesh)
    p, q = columns.domain.randn(seeded()), columns.codomain.randn(seeded())
    add("columns, forward", lambda: columns(p), ("all_reduce", N * N))
    add("columns, adjoint", lambda: columns.H(q))
    blocks = distributed.block_diag(al.linear_operator(nn.Conv2d(1, 2, 3, bias=False), (1, 1, N, N)), mesh)
    b = blocks.domain.randn(seeded())
    add("blocks, forward", lambda: blocks(b))
    add("blocks, adjoint", lambda: blocks.H(blocks(b)))
    scalar = [("all_reduce", 1)] if size > 1 else []
    add("inner product", lambda: X.inner(X.zeros(), X.zeros()), *scalar)
    for name, solve, scalars in (("cg", cg, 2), ("cgls", cgls, 3), ("lsmr", lsmr, 3)):
        B, right = (A.gram, X.randn(seeded())) if solve is cg else (A, A.codomain.randn(seeded()))
        options = {"atol": 0.0, "btol": 0.0} if solve is lsmr else {"tol": 0.0}
        runs = [counted(lambda n=n, s=solve, B=B, r=right, o=options: s(B, r, maxiter=n, **o)) for n in (3, 4)]  # type: ignore[misc]
        sent = [("all_to_all_single", slab(rank, size, K, N))] * 2 if size > 1 else []
        step = sorted(set(runs[1])), len(runs[1]) - len(runs[0])
        expected = sorted({*sent, *scalar}), (2 + scalars) * (size > 1)
        found[f"{name}, one step"] = ([(str(step), 0)], [(str(expected), 0)])
    return found


@torch.no_grad()
def count_memory(size: int) -> dict[str, tuple[float, int, float]]:
    """Return the parts of an image that a solver holds beside its right-hand side, its vectors, a part and its halo."""
    mesh, rows = mesh_of(size), 128
    X = distributed.space((1, 1, rows * size, rows), mesh, [Shard(2)], dtype=torch.float64)
    c = alike(nn.Conv2d(1, 1, K, padding=K // 2, padding_mode="circular", bias=False, dtype=torch.float64))
    A = distributed.convolution(c, X, lowering=False)
    y, part = A.codomain.randn(seeded()), 8 * rows**2
    window = (rows + K - 1) * (rows + K - 1) / rows**2  # what is convolved, with its halo
    found = {}
    for name, solve, vectors in (("cg", cg, 5), ("cgls", cgls, 4), ("lsmr", lsmr, 6)):
        B, options = (A.gram if solve is cg else A), ({"atol": 0.0, "btol": 0.0} if solve is lsmr else {"tol": 0.0})
        solve(B, y, maxiter=3, **options)  # type: ignore[arg-type]
        found[name] = held(lambda s=solve, B=B, o=options: s(B, y, maxiter=3, **o)) / part, vectors, window  # type: ignore[misc]
    return found


@torch.no_grad()
def count_pencils() -> tuple[list[Message], list[Message]]:
    """Return what an image that is split along both dimensions sends, on a mesh of 2 × 2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("y", "x"))
    X = distributed.space((1, 1, N, N), mesh, [Shard(2), Shard(3)])
    A = distributed.convolution(alike(nn.Conv2d(1, 1, K, padding=K // 2, bias=False)), X)
    y = A.codomain.randn(seeded())
    A.H(y)
    first, second = K // 2 * (N // 2), K // 2 * (N // 2 + K // 2)  # the second halo has the corners in it
    return counted(lambda: A.H(y)), [("all_to_all_single", second), ("all_to_all_single", first)]


# -- the page ---------------------------------------------------------------------------------------------------------


def counted_table(results: dict[int, list[dict[str, tuple[list[Message], list[Message]]]]]) -> str:
    """Return the counts of an inner process (or the last one) for each number of processes."""
    sizes = sorted(results)
    lines = ["| operation | " + " | ".join(f"{n} processes" for n in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for name in results[sizes[0]][0]:
        if "step" in name:
            continue
        cells = []
        for n in sizes:
            messages, expected = results[n][min(1, n - 1)][name]
            assert messages == expected, (n, name, messages, expected)
            cells.append(", ".join(f"{what} of {numel}" for what, numel in messages) or "nothing")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def human(numbers: float) -> str:
    """Return bytes of float32 numbers in words."""
    size = 4.0 * numbers
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def extrapolated_table(n: int = 4096, k: int = 11) -> str:
    """Return memory and messages of one process for a volume of n³ and a kernel of k³, by the formulas."""
    lines = [
        "| processes | mesh | part of x | cgls, with y | sent by one application | of its part |",
        "|---|---|---|---|---|---|",
    ]
    for ranks, (py, px) in ((64, (64, 1)), (512, (512, 1)), (512, (32, 16)), (4096, (64, 64)), (16384, (128, 128))):
        rows, columns = n // py, n // px
        part = rows * columns * n
        sent = halo(k, columns * n)
        if px > 1:
            sent += halo(k, (rows + k - 1) * n)
        lines.append(
            f"| {ranks} | {py} × {px} | {human(part)} | {human(5 * part)} | {human(sent)} | {100 * sent / part:.3g} % |"
        )
    return "\n".join(lines)


def page() -> str:
    """Return the tables, made anew."""
    results = {}
    for size in (2, 3, 4):
        group = Group(size)
        results[size] = group.run(count, size)
        if size == 4:
            for messages, expected in group.run(count_pencils):
                assert messages == expected, (messages, expected)
        group.close()
    return render(results)


def render(results: dict[int, list[dict[str, tuple[list[Message], list[Message]]]]]) -> str:
    """Return the tables from what was counted."""
    return (
        f"Counted, for an image of {N} × {N} and a kernel of {K} × {K}, in real numbers that one process (not the "
        f"first) hands over:\n\n{counted_table(results)}\n\nBy the formulas, for a volume of 4096³ in float32 "
        f"and a kernel of 11³:\n\n{extrapolated_table()}\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page())
