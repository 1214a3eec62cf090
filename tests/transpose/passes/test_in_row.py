"""Graphs for calls in a row: equal to the graph, in as little memory as calls need, and checked where they are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

import adjointlab as al
from adjointlab.transpose.passes.in_row import in_row
from adjointlab.transpose.runtime import program as runtime
from adjointlab.transpose.runtime.program import Row

D = torch.float64
STATE = (torch.zeros(4, 6, dtype=D), torch.zeros(4, 6, dtype=D))


def leapfrog(state: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
    u, before = state
    p = F.pad(u, (1, 1, 1, 1))
    after = 2 * u - before + 0.1 * (p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - 4 * u)
    return (after, u), {"row": u[1, ::2], "sum": after.sum(), "all": 3 * u}


def swapped(state: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
    return state[::-1], state[0].mT


def same_twice(state: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
    u = state[0] + state[1].flip(0)
    return (u, u), u


def of_views(state: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
    u, w = state
    flat = torch.cat([u.reshape(3, 8).mT.reshape(-1)[:12], w.mT.reshape(24)[12:]])
    return (flat.view(6, 4).mT, w - u.mT.reshape(4, 6)), flat[None].expand(2, 24)


def products(state: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
    u, w = state
    m = torch.linspace(-0.3, 0.4, 16, dtype=D).reshape(4, 4)
    return (m @ u - w / 3, F.pad(w[1:, :-1], (1, 0, 0, 1)) + u), (u * w.new_ones(6), torch.zeros_like(u))


def updated(state: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
    return (state[0] + 0.5 * state[1], state[1].neg()), state[1].sum()


def updated_and_seen(state: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
    return (state[0] + 0.5 * state[1], state[1] - 0.1 * state[1].mean()), state[0]


def half_gone(state: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
    return (torch.zeros_like(state[0]), state[0]), state[1] + 0


STEPS = [leapfrog, swapped, same_twice, of_views, products, updated, updated_and_seen, half_gone]


@pytest.mark.parametrize("step", STEPS)
def test_calls_in_a_row_are_those_one_by_one(step: Callable[..., Any]) -> None:
    A = al.recurrence(step, STATE, steps=7, final=True)
    source = A.parts[0].source
    derivation, _ = source.now(())
    x, y = A.domain.randn(), A.codomain.randn()
    before = [t.clone() for t in A.domain.leaves(x)]
    u, found = x, []
    for _ in range(7):
        u, o = step(u)
        found.append(pytree.tree_leaves(o))
    expected = [*A.domain.leaves(u), *map(torch.stack, zip(*found, strict=True))]
    for one, other in zip(A.codomain.leaves(A(x)), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert all(map(torch.equal, before, A.domain.leaves(x)))
    assert abs(A.codomain.inner(A(x), y) - A.domain.inner(x, A.H(y))) < 1e-12 * A.codomain.norm(A(x)) * A.codomain.norm(
        y
    )
    assert all(program._binds for program, _ in derivation.programs.values())


def test_memory_is_taken_once_and_views_are_made_once() -> None:
    A = al.recurrence(leapfrog, STATE, steps=50)
    derivation, state = A.parts[0].source.now(())
    program = derivation.programs["function"][0]
    row = program.row(state, (), ((0, 0), (1, 1)))
    assert isinstance(row, Row)
    carry = tuple(map(torch.ones_like, STATE))
    places = tuple([torch.empty(n.meta["val"].shape, dtype=D) for n in program.graph.outputs[2:]])
    seen = set()
    for _ in range(50):
        carry = row(carry, (), places)
        seen |= set(map(id, carry))
    assert len(seen) == 3  # the last two states, and the next
    assert len(row._calls) <= 5
    graph = in_row(program.graph, (), ((0, 0), (1, 1)))
    assert "slice" not in graph.run.__code__.co_names
    assert graph.after == (len(graph.rooms) - 1, -1)


def test_sums_over_time_are_added_up_in_place() -> None:
    A = al.recurrence(updated, STATE, steps=3)
    graph = A.parts[0].source.now(())[0].programs["function"][0].graph
    assert in_row(graph, (), ((0, 0), (1, 1))).after[0] == -1  # the memory that it was in
    assert in_row(graph, (), ((0, 0), (1, 1)), kept=(0,)).after[0] >= 0  # of what is seen afterwards, it is not


def test_results_of_one_call_are_left_by_the_next() -> None:
    A = al.recurrence(leapfrog, STATE, steps=5, final=True)
    x, z = A.domain.randn(), A.domain.randn()
    first = A.codomain.leaves(A(x))
    kept = [t.clone() for t in first]
    A(z)
    assert all(map(torch.equal, first, kept))


def test_a_row_that_is_another_map_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    true = runtime.in_row

    def wrong(*arguments: Any) -> Any:
        found = true(*arguments)

        def run(*tensors: Tensor) -> Any:
            found.run(*tensors)
            tensors[-1].mul_(1.5)

        return replace(found, run=run)

    monkeypatch.setattr(runtime, "in_row", wrong)
    A = al.recurrence(lambda u: u + 0.1 * u.roll(1), (3,), steps=4)
    (known,) = A.parts[0].source._derivations[()]
    assert not any(program._binds for program, _ in known.programs.values())
    u = x = torch.randn(3)
    for _ in range(4):
        u = u + 0.1 * u.roll(1)
    torch.testing.assert_close(A(x), u)
