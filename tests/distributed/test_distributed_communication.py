"""What is sent is what the documentation says: counted, op by op."""

from __future__ import annotations

from collections.abc import Callable

import communication
import pytest
import torch
from parallel import alike, mesh_of
from processes import Group
from torch import nn
from torch.distributed.tensor import Shard

from adjointlab import distributed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(groups: Callable[[int], Group]) -> dict[int, list]:
    return {size: groups(size).run(communication.count, size) for size in (2, 3, 4)}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_messages_are_those_of_the_formulas(results: dict[int, list], size: int) -> None:
    for rank, found in enumerate(results[size]):
        for name, (messages, expected) in found.items():
            assert messages == expected, (rank, name)


def test_pencils(groups: Callable[[int], Group]) -> None:
    for messages, expected in groups(4).run(communication.count_pencils):
        assert messages == expected


def test_memory_is_that_of_the_formulas(group: Group) -> None:
    for found in group.run(communication.count_memory, group.size):
        for name, (held, vectors, window) in found.items():  # while A is applied: fetched, padded, convolved
            assert vectors + 1 <= held <= vectors + 3 * window, (name, held, vectors, window)


def test_the_page_is_up_to_date(results: dict[int, list]) -> None:
    assert communication.PAGE.read_text() == communication.render(results), (
        "run: python tests/distributed/communication.py"
    )


def graphs(size: int) -> None:
    """The adjoint's graph has the adjoint collectives, and none of the forward."""
    mesh = mesh_of(size)
    X = distributed.space((1, 1, 8 * size, 6), mesh, [Shard(2)])
    A = distributed.convolution(alike(nn.Conv2d(1, 1, 3, padding=1, bias=False)), X, engine="traced")
    program = A.explain()
    assert "exchange_adjoint" in program
    explanation = A.source.explanation
    assert explanation.ops_after["adjointlab.exchange_adjoint"] == 1, explanation.ops_after
    assert explanation.ops_after["adjointlab.exchange"] == 0
    assert explanation.ops_before["adjointlab.exchange"] == 1  # the forward was there, before it was cut off
    assert explanation.independent
    rows = distributed.linear_operator(
        lambda x: (1 + torch.distributed.get_rank()) * distributed.replicate(x, mesh),
        distributed.replicated((4,), mesh), distributed.direct_sum((4,), mesh),
    )  # fmt: skip
    after = rows.source.explanation.ops_after
    assert (after["adjointlab.all_reduce"], after["adjointlab.replicate"]) == (1, 0), after
    columns = distributed.linear_operator(
        lambda x: distributed.all_reduce(x, mesh),
        distributed.direct_sum((4,), mesh),
        distributed.replicated((4,), mesh),
    )
    assert columns.source.explanation.ops_after["adjointlab.all_reduce"] == 0


def test_no_forward_collective_survives_in_the_adjoint(group: Group) -> None:
    group.run(graphs, group.size)
