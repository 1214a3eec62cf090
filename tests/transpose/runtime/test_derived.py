"""A call like the one before takes a shorter way; anything that is not just as it was takes the whole one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from laws import assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import adjointlab as al
from adjointlab.transpose.runtime import derived


class Frozen(nn.Module):
    """A convolution that needs no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.layer.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.fixture
def A() -> al.LinearOperator:
    A = al.linear_operator(Frozen(), (2, 1, 8))
    for _ in range(2):
        A.H(A(A.domain.zeros()))
    return A


@pytest.fixture
def x(A: al.LinearOperator) -> Tensor:
    return A.domain.randn(torch.Generator().manual_seed(1))


def short(A: al.LinearOperator, x: Tensor) -> bool:
    """Return whether the shorter way takes x."""
    return A.source._shortcuts["function"](x) is not None


def test_calls_like_the_one_before_take_it(A: al.LinearOperator, x: Tensor) -> None:
    assert short(A, x)
    assert_close(A(x), A.module.layer(x), A.domain.eps)
    with torch.no_grad():
        assert short(A, x)


def test_a_torch_without_such_guards_has_none(A: al.LinearOperator, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived, "TensorGuards", None)
    A.source._shortcuts.clear()
    assert_close([A(x), A(x)], [A.module.layer(x)] * 2, A.domain.eps)
    assert not A.source._shortcuts


def test_results_are_the_callers_own(A: al.LinearOperator, x: Tensor) -> None:
    first = A(x)
    kept = first.clone()
    A(x).zero_()
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.clone().requires_grad_(),
        lambda x: torch.cat([x, x], -1)[..., ::2],
        lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        torch._neg_view,
        nn.Parameter,
        lambda x: x.double(),
        lambda x: x[..., 1:],
        lambda x: x[:1],
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: [x],
        lambda x: x.cpu().numpy(),
        lambda x: None,
    ],
)
def test_other_arguments_do_not(change, A: al.LinearOperator, x: Tensor) -> None:
    assert not short(A, change(x))


def test_an_element_that_looks_different_is_computed_alike(A: al.LinearOperator, x: Tensor) -> None:
    expected = A(x)
    for other in (torch._neg_view(-x), x.permute(2, 1, 0).contiguous().permute(2, 1, 0), x.clone().requires_grad_()):
        assert_close(A(other), expected, A.domain.eps)
        assert_close(A(other), expected, A.domain.eps)
        assert_close(A(x), expected, A.domain.eps)


def test_gradients_are_recorded_after_calls_without_them(A: al.LinearOperator, x: Tensor) -> None:
    A.module.requires_grad_()
    with torch.no_grad():
        for _ in range(2):  # the first derives anew
            assert not A(x).requires_grad
        assert short(A, x)
    assert not short(A, x)
    assert A(x).requires_grad
    leaf = x.clone().requires_grad_()
    A(leaf).sum().backward()
    assert_close(leaf.grad, A.H(torch.ones_like(A(x))), A.domain.eps)
    with torch.no_grad():
        assert not A(leaf).requires_grad
        assert not A(leaf).requires_grad
    assert A(leaf).requires_grad


def test_modes_and_transforms_do_not_take_it(A: al.LinearOperator, x: Tensor) -> None:
    taken = []

    def watched(z: Tensor) -> Tensor:
        taken.append(short(A, x))
        taken.append(short(A, z))
        return A(z)

    stacked = torch.func.vmap(watched)(torch.stack([x, 2 * x]))
    assert_close(stacked[1], 2 * A(x), A.domain.eps)
    assert_close(torch.func.jvp(watched, (x,), (x,))[1], A(x), A.domain.eps)
    assert_close(torch.func.vjp(watched, x)[1](x)[0], A.H(x), A.domain.eps)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, 3 * x)
        assert_close(forward_ad.unpack_dual(watched(dual)).tangent, 3 * A(x), A.domain.eps)
    with FakeTensorMode(allow_non_fake_inputs=True):
        taken.append(short(A, x))
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert watched(x).dtype == torch.float32
        assert watched(x).dtype == torch.float32
    assert taken
    assert not any(taken)
    assert short(A, x)


def test_one_made_under_autocast_is_for_without(A: al.LinearOperator, x: Tensor) -> None:
    expected = A(x)
    A.source._shortcuts.clear()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert torch.equal(A(x), expected)
        assert not short(A, x)
        assert torch.equal(A(x), expected)
    assert short(A, x)


def test_inference_mode(A: al.LinearOperator, x: Tensor) -> None:
    expected = A(x)
    with torch.inference_mode():
        assert_close([A(x), A(x)], [expected, expected], A.domain.eps)
        inside = x.clone()
        assert_close([A(inside), A(inside)], [expected, expected], A.domain.eps)
    assert_close([A(inside), A(inside), A(x)], [expected] * 3, A.domain.eps)
    leaf = x.clone().requires_grad_()
    assert A(leaf).requires_grad


def test_unfreezing_is_seen(A: al.LinearOperator, x: Tensor) -> None:
    assert not A(x).requires_grad
    A.module.requires_grad_()
    assert A(x).requires_grad


def test_a_parameter_that_is_gone_is_not_read(A: al.LinearOperator, x: Tensor) -> None:
    A(x)
    A.module.layer.weight = None
    with pytest.raises(TypeError, match="NoneType"):  # what the module itself raises
        A(x)


def test_moving_and_switching_take_the_new_program(A: al.LinearOperator, x: Tensor) -> None:
    expected = A(x)
    A.source.switch("eager")
    assert not A.source._shortcuts
    assert_close([A(x), A(x)], [expected, expected], A.domain.eps)
    assert A.engine == "eager"
    assert not A.source._shortcuts
    A.source.switch("auto")
    A.double()
    assert_close([A(x.double()), A(x.double())], [expected.double()] * 2, 1e-7)
    with pytest.raises(al.SpaceMismatchError, match="float32"):
        A(x)


def test_what_another_thread_derives_meanwhile_is_not_mixed_up() -> None:
    class Scaled(nn.Module):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    module = Scaled()
    A = al.linear_operator(module, (2, 3), batch_dims=1)
    x = torch.ones(5, 3)
    A(x)
    source = A.source
    old = source._derived[(5,)]

    def slow(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        result = old.function(leaves)
        module.scale = 3.0  # while the old program runs, another call sees a change
        A(torch.ones(2, 3))
        return result

    source._derived[(5,)] = replace(old, function=slow)
    source._shortcuts.clear()
    assert torch.equal(A(x), x)
    for _ in range(2):
        assert torch.equal(A(x), 3 * x)


@pytest.mark.parametrize("where", ["domain", "codomain"])
def test_trees_take_the_whole_way(where: str) -> None:
    scale = [2.0]
    if where == "domain":
        A = al.linear_operator(lambda x: scale[0] * x["a"], {"a": (3,)})
        x, value = {"a": torch.ones(3)}, lambda y: y
    else:
        A = al.linear_operator(lambda x: (scale[0] * x, x), (3,))
        x, value = torch.ones(3), lambda y: y[0]
    for _ in range(2):
        assert torch.equal(value(A(x)), torch.full((3,), scale[0]))
    scale[0] = 3.0
    assert torch.equal(value(A(x)), torch.full((3,), 3.0))
    assert not A.source._shortcuts


def test_hooks_run(A: al.LinearOperator, x: Tensor) -> None:
    seen = []
    handle = A.register_forward_hook(lambda module, given, result: seen.append(result.shape))
    A(x)
    handle.remove()
    A(x)
    assert seen == [x.shape]


def test_batches_of_other_sizes() -> None:
    layer = nn.Conv1d(1, 1, 3, padding=1, bias=False).requires_grad_(requires_grad=False)
    A = al.linear_operator(layer, (2, 1, 8), batch_dims=1)
    for n in (2, 2, 3, 3, 2, 1, 1):
        x = torch.randn(n, 1, 8)
        assert_close([A(x), A(x)], [layer(x)] * 2, A.domain.eps)


def test_compiling_a_function_of_an_operator_does_not_see_it(A: al.LinearOperator, x: Tensor) -> None:
    counter = CompileCounter()
    compiled = torch.compile(lambda z: 2 * A(z), backend=counter, fullgraph=True)
    expected = 2 * A(x)
    assert_close(compiled(x), expected, A.domain.eps)
    with torch.no_grad():
        A(x + 1)
    A(torch._neg_view(-x))
    assert_close(compiled(x), expected, A.domain.eps)
    assert counter.frame_count == 1
