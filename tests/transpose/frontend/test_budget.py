"""A build that would take too long is given up before it begins; what was asked for by name is done."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from laws import assert_close, seeded
from torch import Tensor, nn

import adjointlab as al
from adjointlab.transpose.frontend.budget import counted, deadline, excess, repeats

pytestmark = pytest.mark.slow


def stepped(count: int):
    def forward(u: Tensor) -> Tensor:
        for _ in range(count):
            u = u + 0.1 * (torch.roll(u, 1, 0) - 2 * u + torch.roll(u, -1, 0))
        return u

    return forward


def test_a_long_loop_is_left_to_autograd_and_the_reason_says_what_to_do() -> None:
    A = al.linear_operator(stepped(400), (8,))
    assert A.engine == "eager"
    assert "operations would take some 30 s, more than the budget of 20 s" in A.explain()
    assert "pass budget=30" in A.explain()
    assert al.check_adjoint(A).passed


def test_a_loop_is_told_of_recurrences_whether_it_is_traced_left_to_autograd_or_refused() -> None:
    for operator in (al.linear_operator(stepped(20), (8,)), al.linear_operator(stepped(400), (8,))):
        assert operator.explain().count("write it with al.recurrence") == 1
    assert "repeats a block of 7 operations 400 times" in operator.explain()
    with pytest.raises(al.NotLinearError, match="repeats a block of 7 operations 400 times"):
        al.linear_operator(lambda x: stepped(400)(x).abs(), (8,))
    layers = nn.Sequential(*[nn.Conv1d(1, 1, 3, padding=1, bias=False) for _ in range(12)])
    assert "repeats" not in al.linear_operator(layers, (1, 1, 8)).explain()


def test_blocks_are_found_between_a_beginning_and_an_end() -> None:
    assert "block of 3 operations 40 times" in repeats([7, 8, *[1, 2, 3] * 40, 9, 7, 8])
    assert not repeats([1, 2, 3] * 10)
    assert not repeats([*range(100), *[1, 2] * 30])
    assert not repeats([])


def test_a_budget_is_an_argument() -> None:
    assert al.linear_operator(stepped(20), (8,), budget=1.0).engine == "eager"
    assert al.affine_operator(stepped(20), (8,), budget=1.0).engine == "eager"
    A = al.linear_operator(stepped(20), (8,), budget=3.0)
    assert A.engine == "traced"
    x = A.domain.randn(seeded(0))
    assert_close(A(x), stepped(20)(x), A.domain.eps)


def test_a_budget_holds_for_every_batch_size() -> None:
    A = al.linear_operator(lambda x: torch.stack([stepped(400)(each) for each in x.unbind()]), (1, 8), batch_dims=1)
    x = torch.randn(2, 8, generator=seeded(0))
    assert_close(A(x[:1]), stepped(400)(x[0])[None], A.domain.eps, factor=2000)
    assert A(x).shape == (2, 8)
    assert {known.explanation.engine for each in A.source._derivations.values() for known in each} == {"eager"}


def test_an_engine_that_is_asked_for_has_all_the_time_it_takes() -> None:
    assert al.linear_operator(stepped(5), (8,), engine="traced", budget=0.0).engine == "traced"


def test_operations_are_counted_where_nothing_is_guarded() -> None:
    f, x = stepped(3), torch.zeros(8)
    assert len(counted(lambda: f(x), has_guards=False)[1]) == 21
    assert counted(lambda: f(x), has_guards=True)[1] == []
    assert not excess(0, 0.0)
    assert not excess(2000, 20.0)
    assert excess(2001, 20.0)


def test_a_call_that_cannot_be_counted_is_made_again() -> None:
    calls = []

    def run() -> int:
        calls.append(None)
        if len(calls) == 1:
            raise al.SpaceMismatchError("a guard of compiled code")
        return 7

    assert counted(run, has_guards=False) == (7, [])


class Holder:
    def __init__(self, part) -> None:
        self.part = part


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("place", ["itself", "closure", "attribute", "module", "helper"])
def test_a_build_compiles_no_part_of_the_users_again(place: str, fullgraph: bool) -> None:
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    w = torch.linspace(1, 2, 8)
    part = torch.compile(lambda x: w * x, backend=backend, fullgraph=fullgraph)
    helper = lambda x: part(x)  # noqa: E731, PLW0108
    holder = Holder(part)
    module = nn.Sequential(torch.compile(nn.Linear(8, 8, bias=False), backend=backend, fullgraph=fullgraph))
    function = {
        "itself": part, "closure": lambda x: part(x) + x, "attribute": lambda x: holder.part(x) + x, "module": module,
        "helper": lambda x: helper(x) + x,
    }[place]  # fmt: skip
    x = torch.ones(8)
    with torch.no_grad():
        function(x)
    before = len(compiled)
    A = al.linear_operator(function, (8,))
    with torch.no_grad():
        function(x)
        torch.testing.assert_close(A(x), function(x))
    assert len(compiled) <= before + 1  # with gradients enabled, torch.compile has another form


def test_a_trace_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    is_over = deadline(5.0)
    assert not is_over()
    now[0] = 105.5
    assert is_over() == "to trace it takes longer than the budget of 5 s"


def test_an_operator_copied_keeps_its_budget() -> None:
    A = al.linear_operator(nn.Linear(3, 2, bias=False), (3,), budget=7.0)
    for other in (copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
        assert other.source.options.budget == 7.0
