"""The traced engine: a graph where there can be one, the eager engine and a reason where not."""

from __future__ import annotations

import pytest
import torch
from built import ops_of
from laws import assert_close, draw, norm, operator, seeded
from operator_zoo import BY_NAME, ZOO
from torch import nn

import adjointlab as al


@pytest.mark.parametrize("name", ["item-of-buffer", "branch-on-buffer", "numpy-of-buffer"])
def test_numbers_from_constants_are_traced(name: str) -> None:
    assert operator(BY_NAME[name], torch.float64, "traced").engine == "traced"


@pytest.mark.parametrize("name", [entry.name for entry in ZOO if not entry.traced])
def test_fallback_says_why(name: str) -> None:
    A = operator(BY_NAME[name], torch.float64, "traced")
    assert A.engine == "eager"
    assert "reason" in A.explain()


@pytest.mark.parametrize("name", ["item-of-buffer", "conv2d"])
def test_auto_traces_where_it_can(name: str) -> None:
    function, domain = BY_NAME[name].build(torch.float64)
    assert al.linear_operator(function, domain).engine == "traced"


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Conv2d(1, 1, 3, padding=1, bias=False), lambda: lambda x: x.cumsum(-1), lambda: nn.AvgPool2d(2)],
    ids=["conv", "cumsum", "pool"],
)
def test_operators_larger_than_memory_can_be_built(make) -> None:
    spec = al.TensorSpec((1, 1, 2**20, 2**20), torch.float32, torch.device("cpu"))  # 4 TiB
    A = al.linear_operator(make(), spec, engine="traced", check=False)
    assert A.engine == "traced"
    assert A.H.codomain.specs == (spec,)
    assert "adjoint program" in A.explain()


@pytest.mark.cpu
def test_constants_are_evaluated_once() -> None:
    A = al.linear_operator(*BY_NAME["radon"].build(torch.float64))
    y = draw(A.codomain)
    A.H(y)
    ops = ops_of(A.H, y)
    assert not [name for name in ops if "affine_grid" in name or "linspace" in name or "bmm" in name]


def test_the_forward_does_not_run_in_the_adjoint() -> None:
    calls = []

    class Counted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return x.cumsum(-1)

    A = al.linear_operator(Counted(), (2, 3), engine="traced")
    A.H(draw(A.codomain))
    before = len(calls)
    A.H(draw(A.codomain))
    A(draw(A.domain))
    assert len(calls) == before


def test_each_batch_size_has_its_graph() -> None:
    A = al.linear_operator(lambda x: x - x.mean(0, keepdim=True), (2, 3), engine="traced")
    B = al.linear_operator(lambda x: x * x.shape[0], (2, 3), batch_dims=1, engine="traced")
    assert_close(B.H(torch.ones(5, 3)), torch.full((5, 3), 5.0), B.domain.eps)
    assert_close(B.H(torch.ones(2, 3)), torch.full((2, 3), 2.0), B.domain.eps)
    assert norm(A.H(torch.ones(2, 3))) <= 16 * A.domain.eps


def test_noncontiguous_and_lazily_conjugated_arguments() -> None:
    A = operator(BY_NAME["conv2d"], torch.complex128, "traced")
    y = draw(A.codomain)
    strange = y.conj().transpose(-1, -2).contiguous().transpose(-1, -2).conj()
    assert_close(A.H(strange), A.H(y.clone()), A.domain.eps)
    expanded = y[..., :1].expand(y.shape)
    assert_close(A.H(expanded), A.H(expanded.clone()), A.domain.eps)


def test_results_do_not_alias_constants_or_arguments() -> None:
    weight = torch.ones(3)
    for function in (lambda x: x, lambda x: x.view(3), lambda x: weight * x, lambda x: x[:]):
        A = al.linear_operator(function, (3,), engine="traced")
        y = torch.ones(3)
        A.H(y).mul_(5)
        A(y).mul_(5)
        assert torch.equal(y, torch.ones(3))
        assert torch.equal(A.H(y), torch.ones(3))
        assert torch.equal(weight, torch.ones(3))


def test_explain_shows_the_program() -> None:
    text = operator(BY_NAME["finite-differences"], torch.float64, "traced").explain()
    assert "engine: traced" in text
    assert "adjoint program" in text
    assert "return" in text
    assert "does not read the input" in text


def test_default_dtype_does_not_matter() -> None:
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        A = al.linear_operator(nn.Conv1d(1, 1, 3, bias=False), torch.zeros(1, 1, 6, dtype=torch.float64))
    finally:
        torch.set_default_dtype(default)
    y = draw(A.codomain)
    assert A.H(y).dtype == torch.float64


def test_a_generator_of_its_own_is_no_constant_to_lift() -> None:
    A = al.linear_operator(lambda x: x * torch.randn(3, generator=seeded(0)), torch.zeros(3))
    assert A.engine == "eager"
    assert "Generator" in A.explain()
