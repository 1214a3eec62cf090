"""Stencils: whole images moved, memory with margins of zeros, and one function a step for a compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import adjointlab as al
from adjointlab.transpose.passes.in_row import in_row
from adjointlab.transpose.passes.stencils import moved, stencils
from adjointlab.transpose.runtime import program as runtime

D = torch.float64
STATE = (torch.zeros(5, 9, dtype=D), torch.zeros(5, 9, dtype=D))
SPEED = torch.linspace(0.1, 0.4, 45, dtype=D).reshape(5, 9)


class Wave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.speed = nn.Parameter(SPEED.clone())

    def forward(self, state: tuple[Tensor, Tensor], source: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        u, before = state
        p = F.pad(u, (1, 1, 1, 1))
        around = p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2]
        after = 2 * u - before + self.speed * (around - 4 * u)
        after[2, 3] -= self.speed[2, 3] * source
        return (after, u), u[1, ::2]


def staggered(state: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
    """Return a pressure and a velocity between its points, with one shape each."""
    p, v = state
    v = v - 0.3 * (p[1:] - p[:-1])
    p = p - 0.3 * (F.pad(v, (0, 1)) - F.pad(v, (1, 0)))
    return (p, v), p.sum()


def around_and_back(u: Tensor) -> Tensor:
    return u + 0.1 * (SPEED * (u.roll(1, 0) + u.roll(-1, 1) - 2 * u)).roll(2, 1)


def twice(u: Tensor) -> Tensor:
    right = SPEED * (F.pad(u[:, 1:], (0, 1)) - u)
    return u + 0.2 * (F.pad(right[:, :-1], (1, 0)) - right) - 0.1 * u.mean() * SPEED


def of_each_time(u: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return u + x * F.pad(u[1:], (0, 0, 0, 1)) - 0.1 * F.pad((x * u)[:, 2:], (0, 2)), u[2]


CASES = {
    "wave": (Wave(), STATE, {"inputs": (7,)}),
    "staggered": (staggered, (torch.zeros(8, dtype=D), torch.zeros(7, dtype=D)), {"steps": 7}),
    "circular": (around_and_back, STATE[0], {"steps": 7}),
    "twice": (twice, STATE[0], {"steps": 7}),
    "of each time": (of_each_time, STATE[0], {"xs": torch.stack([SPEED + i for i in range(7)])}),
}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have functions run as they are where a compiler would get them; return these."""
    found = list[Any]()

    def kept(function: Callable[..., Any], options: Any) -> Callable[..., Any]:
        found.append(function)
        return function

    monkeypatch.setattr(runtime, "_compiled", kept)
    return found


def derived(A: al.LinearOperator[Any, Any]) -> Any:
    return A.parts[0].source.now(())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("uncompiled")
def test_steps_of_stencils_are_those_one_by_one(name: str) -> None:
    step, state, options = CASES[name]
    A, B = (al.recurrence(step, state, **options, final=True, initial=True, engine=e) for e in ("traced", "compiled"))
    assert B.engine == "compiled"
    x, y = A.domain.randn(), A.codomain.randn()
    for one, other in zip((*A.codomain.leaves(A(x)), *A.domain.leaves(A.H(y))),
                          (*B.codomain.leaves(B(x)), *B.domain.leaves(B.H(y))), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)
    programs = [derived(B)[0].programs[name][0] for name in ("function", "adjoint")]
    assert all(program._binds for program in programs)
    assert any(graph.margins for program in programs for graph in program._in_row.values())
    parameters = list(step.parameters()) if isinstance(step, nn.Module) else []
    leaves = [t.requires_grad_() for t in A.domain.leaves(x)]
    found = [torch.autograd.grad(C.codomain.inner(y, C(A.domain.unflatten(leaves))), [*leaves, *parameters])
             for C in (A, B)]  # fmt: skip
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["function", "adjoint"])
def test_a_step_is_one_function_that_cuts_nothing_off(name: str, uncompiled: list[Any]) -> None:
    A = al.recurrence(Wave(), STATE, inputs=(7,), engine="compiled")
    graph = stencils(derived(A)[0].programs[name][0].graph)
    assert graph is not None
    uncompiled.clear()
    bound = in_row(graph, (), ((0, 0), (1, 1)), (), lambda function: runtime._compiled(function, {}))
    assert len(uncompiled) == 1
    names = uncompiled[0].__closure__[0].cell_contents.__code__.co_names
    assert "copy_" in names
    assert not any("moved" in name or "pad" in name for name in names)
    assert list(bound.margins.values()) == [((1, 1), (8, 7))]  # rows begin where lines of the cache do
    assert bound.after[0 if name == "function" else 1] < 0  # in the memory of what is read at its own place alone


@pytest.mark.usefixtures("uncompiled")
def test_sweeps_for_gradients_are_of_stencils_too() -> None:
    A = al.recurrence(Wave(), STATE, inputs=(7,), engine="compiled")
    derivation, state = derived(A)
    places = tuple(i for i, tensor in enumerate(state) if tensor.requires_grad)
    programs = derivation.in_sweeps(2, (), places)
    assert programs is not None  # equal to the parts
    A(A.domain.randn()).sum().backward()
    (graph,) = programs.back._in_row.values()
    assert graph.margins
    assert len(set(graph.after)) == len(graph.after)  # each result has memory of its own


def test_a_graph_without_stencils_is_left() -> None:
    A = al.recurrence(lambda u: 0.5 * u + u.flip(0), STATE[0], steps=3)
    assert stencils(derived(A)[0].programs["function"][0].graph) is None


def test_what_is_moved_is_zero_where_it_has_no_entries() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(moved(x, [-1, 1, 0, 0]), torch.tensor([[1.0, 2, 0], [4, 5, 0]]))


def test_it_is_compiled_by_torch() -> None:
    A, B = (al.recurrence(Wave().float(), (torch.zeros(5, 9),) * 2, inputs=(7,), engine=engine)
            for engine in ("traced", "compiled"))  # fmt: skip
    assert B.engine == "compiled", B.explain()
    x, y = A.domain.randn(), A.codomain.randn()
    for one, other in zip(pytree.tree_leaves((A(x), A.H(y))), pytree.tree_leaves((B(x), B.H(y))), strict=True):
        torch.testing.assert_close(one, other)
    assert all(program._binds for program, _ in derived(B)[0].programs.values())
