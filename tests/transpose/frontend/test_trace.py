"""The traced engine: a graph where there can be one, the eager engine and a reason where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from built import needs_torch, ops_of
from laws import assert_close, draw, norm, operator, seeded
from operator_zoo import BY_NAME, ZOO
from torch import nn
from torch._higher_order_ops.scan import scan
from torch.utils import _pytree as pytree

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


def test_numbers_from_a_generator_that_the_call_seeds_are_constants() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        generator = seeded(0)
        return x * torch.randn(3, generator=generator) + x.flip(0) * torch.rand(3, generator=generator)

    A, x = al.linear_operator(twice, torch.zeros(3)), torch.ones(3)
    assert A.engine == "traced"
    assert torch.equal(A(x), twice(x))


def test_numbers_from_a_generator_that_no_call_seeds_are_random() -> None:
    generator = seeded(0)
    for check in (True, False):
        function = lambda x: x * torch.randn(3, generator=generator)  # noqa: E731
        if check:
            with pytest.raises(al.NotLinearError, match="random"):
                al.linear_operator(function, torch.zeros(3))
        else:
            assert al.linear_operator(function, torch.zeros(3), check=False).engine == "eager"


@pytest.mark.parametrize(
    "function",
    [
        lambda x, index: x[torch.unique(index)],
        lambda x, index: x.repeat_interleave(index),
        lambda x, index: torch.bincount(index, minlength=3)[:3] * x,
        lambda x, index: torch.linalg.lstsq(index[:, None].float(), torch.eye(3)).solution @ x,
    ],
)
def test_results_that_only_values_of_constants_tell_follow_these(function) -> None:
    index = torch.tensor([2, 0, 1])
    A, x = al.linear_operator(lambda x: function(x, index), (3,)), torch.randn(3, generator=seeded(0))
    assert A.engine == "traced"
    assert torch.equal(A(x), function(x, index))
    index.copy_(torch.tensor([1, 2, 2]))
    if function(x, index).shape == A.codomain.specs[0].shape:
        assert torch.equal(A(x), function(x, index))
    else:
        with pytest.raises(al.SpaceMismatchError, match="expected"):
            A(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which PyTorch itself looks at
def test_a_branch_on_a_constant_follows_it() -> None:
    flag = torch.tensor(True)
    A = al.linear_operator(lambda x: torch.cond(flag, lambda z: 2 * z, lambda z: 3 * z, (x,)), (3,))
    assert A.engine == "traced"
    assert torch.equal(A.H(torch.ones(3)), 2 * torch.ones(3))
    flag.fill_(False)
    assert torch.equal(A.H(torch.ones(3)), 3 * torch.ones(3))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which PyTorch itself looks at
@needs_torch("2.10", "scan has no derivative")
def test_a_scan_is_traced_as_a_loop_is() -> None:
    weight = torch.tensor([[0.5, 1.0], [0.0, 0.25]])

    def step(carry: Any, x: Any) -> Any:
        after = carry @ weight + x["a"]
        return after, (carry + after, x["b"].sum())

    def forward(x: dict[str, torch.Tensor]) -> Any:
        return scan(step, x["start"], {"a": x["a"], "b": x["b"]}, reverse=True)

    x = {"start": torch.ones(2), "a": torch.ones(3, 2), "b": torch.ones(3, 4)}
    A = al.linear_operator(forward, x)
    assert A.engine == "traced"
    assert al.check_adjoint(A).passed
    v = A.codomain.randn()
    with torch.no_grad():
        weight.mul_(2)
    leaf = x["a"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(pytree.tree_leaves(forward(x | {"a": leaf})), [leaf], pytree.tree_leaves(v))
    torch.testing.assert_close(A.H(v)["a"], gradient)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@needs_torch("2.10", "scan has no derivative")
def test_a_long_scan_is_left_to_autograd_and_told_of_recurrences() -> None:
    step = lambda c, y: (0.5 * c + y, c + y)  # noqa: E731
    A = al.linear_operator(lambda x: scan(step, torch.zeros(()), x)[1], (40,), budget=1.0)
    assert A.engine == "eager"
    assert "operations would take some 10 s" in A.explain()
    assert "write it with al.recurrence(" in A.explain()
    assert al.check_adjoint(A).passed


class Named(torch.Tensor):
    """A subclass that adds a method."""

    def twice(self) -> torch.Tensor:
        return 2 * self


def test_a_subclass_that_adds_methods_is_a_constant_like_others() -> None:
    w = torch.tensor([1.0, 2.0, 3.0]).as_subclass(Named)
    A = al.linear_operator(lambda x: w.twice() * x, (3,))
    assert A.engine == "traced"
    assert torch.equal(A(torch.ones(3)), torch.tensor([2.0, 4.0, 6.0]))
    w.mul_(2)
    assert torch.equal(A(torch.ones(3)), torch.tensor([4.0, 8.0, 12.0]))
