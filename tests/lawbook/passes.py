"""One law for all passes: a pass takes a graph that runs, leaves it as it was, and returns an equal graph that runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from built import first_way, last_way, never, prefer
from laws import Case, in_widest_dtype, law, once, seeded
from torch import Tensor

from adjointlab.space.selection import Selection
from adjointlab.transpose.frontend.trace import trace_vjp
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.passes.compose import linear_part, residual_and_gradient
from adjointlab.transpose.passes.convolutions import joined, lower
from adjointlab.transpose.passes.drop_forward import drop_forward
from adjointlab.transpose.passes.fuse_slices import fuse_slices
from adjointlab.transpose.passes.maps_by_index import maps_by_index
from adjointlab.transpose.passes.normalise import normalise
from adjointlab.transpose.passes.own_outputs import own_outputs
from adjointlab.transpose.passes.restrict import restrict
from adjointlab.transpose.runtime.program import Program

PASSES: dict[str, Callable[[Graph], Graph]] = {
    "normalise": normalise,
    "own_outputs": own_outputs,
    "fuse_slices": fuse_slices,
    "fuse_slices, none": lambda graph: fuse_slices(graph, never),
    "fuse_slices, some": lambda graph: fuse_slices(graph, lambda expected, *_: expected[1] < expected[0]),
    "joined": joined,
    **{
        f"lower to {name}": lambda graph, name=name: lower(graph, prefer(name), lambda _: True)
        for name in ("native", "flipped", "tapped", "fft", "polyphase")
    },
    "maps_by_index": lambda graph: maps_by_index(graph, first_way),
    "maps_by_index, the last way": lambda graph: maps_by_index(graph, last_way),
    "lower after fuse_slices": lambda graph: lower(fuse_slices(graph), prefer("fft")),
}


def random(graph: Graph) -> list[Tensor]:
    """Return the state of a graph as it is, and random inputs."""
    draw = seeded(0)
    inputs = [
        torch.randn(node.meta["val"].shape, dtype=node.meta["val"].dtype, generator=draw) for node in graph.inputs
    ]
    return [source.read().detach() for source in graph.state] + inputs


def run(graph: Graph | Program, tensors: list[Tensor]) -> list[Tensor]:
    function = graph.run if isinstance(graph, Program) else graph.function
    with torch.no_grad():
        return [t for t in function(*[t.clone() for t in tensors]) if t is not None]


def assert_equal(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    assert len(found) == len(expected), what
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), what
        scale = float(b.abs().max()) if b.numel() else 0.0
        error = float((a - b).abs().max()) if b.numel() else 0.0
        assert error <= 64 * torch.finfo(b.dtype).eps * max(scale, 1.0), f"{what}: {error:.1e}"


def listing(graph: Graph) -> str:
    return str(graph.body)


def has_graphs(case: Case) -> bool:
    return case.entry.traced


@law(has_graphs, in_widest_dtype, once)
def every_pass_leaves_an_equal_graph(case: Case) -> None:
    graphs = case.A.source.nominal.graphs
    forward, linear = graphs["function"], graphs["linear"]
    traced = trace_vjp(linear)
    whole = normalise(traced, detached=False)
    adjoint = drop_forward(whole, len(linear.inputs)).graph
    for graph in (traced, forward, adjoint):
        tensors, before = random(graph), listing(graph)
        expected = run(graph, tensors)
        for name, each in PASSES.items():
            changed = each(graph)
            assert listing(graph) == before, f"{name} changes the graph that it is given"
            if listing(changed) == before:
                continue  # nothing of it is for this pass
            assert_equal(run(changed, tensors), expected, name)
            assert_equal(run(Program(changed, graph), tensors), expected, f"{name}, as a program")
    _assert_the_forward_is_dropped(whole, adjoint, len(linear.inputs))
    _assert_the_gradient_is_that_of_the_parts(forward, adjoint)
    _assert_the_linear_part_is_without_an_offset(forward)


def _assert_the_forward_is_dropped(whole: Graph, adjoint: Graph, n: int) -> None:
    tensors = random(whole)
    state, primals, cotangents = (
        tensors[: len(whole.state)], tensors[len(whole.state) :][:n], tensors[len(whole.state) + n :],
    )  # fmt: skip
    expected = run(whole, [*state, *[torch.zeros_like(p) for p in primals], *cotangents])[:n]
    assert_equal(run(adjoint, [*state, *cotangents]), expected, "drop_forward")


def _assert_the_gradient_is_that_of_the_parts(forward: Graph, adjoint: Graph) -> None:
    graph = residual_and_gradient(forward, adjoint, weighted=False, residual=True)
    tensors, n, m = random(graph), len(forward.state), len(forward.inputs)
    image = run(forward, tensors[: n + m])
    apart = [a - y for a, y in zip(image, tensors[n + m :], strict=True)]
    assert_equal(run(graph, tensors), [*apart, *run(adjoint, [*tensors[:n], *apart])], "residual_and_gradient")


def _assert_the_linear_part_is_without_an_offset(forward: Graph) -> None:
    tensors, n = random(forward), len(forward.state)
    zero = run(forward, [*tensors[:n], *[torch.zeros_like(t) for t in tensors[n:]]])
    expected = [a - b for a, b in zip(run(forward, tensors), zero, strict=True)]
    assert_equal(run(linear_part(forward), tensors), expected, "linear_part")


def returns_one_tensor(case: Case) -> bool:
    return len(case.A.codomain.specs) == 1


@law(has_graphs, returns_one_tensor, in_widest_dtype, once)
def rows_of_a_graph_are_rows_of_its_result(case: Case) -> None:
    graph = case.A.source.nominal.graphs["linear"]
    tensors = random(graph)
    inputs, (result,) = tensors[len(graph.state) :], run(graph, tensors)
    for dim, n in enumerate(result.shape):
        for rows in ((n - 1, 0, 0), tuple(range(n // 2, n))):
            selection = Selection(dim, rows, n)
            found, _ = restrict(graph, selection)
            state = [source.read().detach() for source in found.state]
            assert_equal(run(found, state + inputs), [selection(result)], f"rows {rows} along {dim}")
