"""What is read off a graph: what cuts the input off, what shares memory, what is dead."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adjointlab.space import Space
from adjointlab.transpose.frontend.capture import capture
from adjointlab.transpose.frontend.trace import trace_forward
from adjointlab.transpose.graph.edit import clean, part
from adjointlab.transpose.graph.ir import Graph
from adjointlab.transpose.graph.ops import op_name
from adjointlab.transpose.passes.drop_forward import cut_off
from adjointlab.transpose.passes.normalise import normalise
from adjointlab.transpose.passes.own_outputs import own_outputs

aten = torch.ops.aten
C = torch.ones(4)
DETACH = "detach" if torch.__version__ < (2, 14) else ""  # then traced as an alias, whose derivative is the map's own


def graph_of(function: Callable[[Tensor], Tensor]) -> Graph:
    domain = Space.of((4,))
    return normalise(trace_forward(capture(function, {}, domain, ())))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: x + x.detach(), DETACH),
        (lambda x: x.floor(), "floor"),
        (lambda x: x + (x > 0), "gt"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), "div"),
        (lambda x: x + x.argmax(), "argmax"),
        (lambda x: x.to(torch.int32).float(), "_to_copy"),
        (lambda x: 2 * x.flip(0), ""),
        (lambda x: torch.where(C > 0, x, torch.zeros_like(x)), ""),
        (lambda x: x + C.floor(), ""),
    ],
)
def test_what_cuts_the_input_off_is_named(function: Callable[[Tensor], Tensor], name: str) -> None:
    assert cut_off(graph_of(function)) == name


@pytest.mark.parametrize(
    ("function", "copied"),
    [
        (lambda x: x, True),
        (lambda x: x[1:].view(3, 1), True),
        (lambda x: C, True),
        (lambda x: C.view(2, 2), True),
        (lambda x: x + 1, False),
        (lambda x: (x + 1)[1:], False),
    ],
)
def test_outputs_share_no_memory_with_what_lives_on(function: Callable[[Tensor], Tensor], copied: bool) -> None:
    graph = own_outputs(graph_of(function))
    assert (graph.outputs[0].target is aten.clone.default) == copied


def test_outputs_share_no_memory_with_each_other() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = x + 1
        return y, y.view(2, 2), y[1:], x.exp()

    graph = own_outputs(graph_of(function))
    assert [node.target is aten.clone.default for node in graph.outputs] == [False, True, True, False]


def test_a_part_has_what_its_outputs_need() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        image, kernel = x.view(1, 1, 4), C.view(1, 1, 4)[..., :3]
        gradients = aten.convolution_backward(
            x[:2].view(1, 1, 2), image, kernel, [0], [1], [0], [1], False, [0], 1, [True] * 3
        )
        return (x.exp(), *gradients)

    graph = graph_of(function)
    exponential, of_image, of_kernel, _ = graph.outputs
    assert [op_name(n.target) for n in part(graph, [exponential]).body.nodes if n.op == "call_function"] == ["exp"]
    both, single = part(graph, [of_image, None, of_kernel]), part(graph, [of_kernel])
    x = torch.arange(4.0)
    assert [None if t is None else t.shape for t in both.function(C, x)] == [(1, 1, 4), None, (1, 1, 3)]
    assert torch.equal(single.function(C, x)[0], function(x)[2])
    masks = [node.args[-1] for g in (graph, both, single) for node in g.body.nodes if "backward" in str(node.target)]
    assert masks == [[True, True, True], [True, True, False], [False, True, False]]


def test_dead_code_is_dropped() -> None:
    graph = graph_of(lambda x: 2 * x)
    (out,) = graph.outputs
    with graph.body.inserting_before(out):
        graph.body.call_function(aten.exp.default, (graph.inputs[0],))
    clean(graph.body)
    assert [op_name(n.target) for n in graph.body.nodes if n.op == "call_function"] == ["mul"]
