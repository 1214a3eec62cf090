"""The way of a call: what it sees of changes, and that results do not depend on how it is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from built import ops_of
from laws import assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

import adjointlab as al

pytestmark = pytest.mark.slow


class Fixed(nn.Module):
    """A convolution that needs no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.layer.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.fixture
def A() -> al.LinearOperator:
    return al.linear_operator(Fixed(), (2, 1, 8))


@pytest.fixture
def x(A: al.LinearOperator) -> Tensor:
    return A.domain.randn(torch.Generator().manual_seed(1))


def test_results_are_the_callers_own(A: al.LinearOperator, x: Tensor) -> None:
    first = A(x)
    kept = first.clone()
    A(x).zero_()
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.clone().requires_grad_(),
        lambda x: torch.cat([x, x], -1)[..., ::2].contiguous(),
        lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        lambda x: torch._neg_view(-x),
        nn.Parameter,
    ],
)
def test_an_element_that_looks_different_is_computed_alike(
    change: Callable[[Tensor], Tensor], A: al.LinearOperator, x: Tensor
) -> None:
    other = change(x)
    for _ in range(2):
        assert_close(A(other), A.module.layer(other), A.domain.eps)


def test_gradients_are_recorded_after_calls_without_them(A: al.LinearOperator, x: Tensor) -> None:
    A.module.requires_grad_()
    with torch.no_grad():
        for _ in range(2):  # the first derives anew
            assert not A(x).requires_grad
    assert A(x).requires_grad
    leaf = x.clone().requires_grad_()
    A(leaf).sum().backward()
    assert_close(leaf.grad, A.H(torch.ones_like(A(x))), A.domain.eps)
    with torch.no_grad():
        assert not A(leaf).requires_grad
    assert A(leaf).requires_grad


def test_modes_and_transforms(A: al.LinearOperator, x: Tensor) -> None:
    stacked = torch.func.vmap(A)(torch.stack([x, 2 * x]))
    assert_close(stacked[1], 2 * A(x), A.domain.eps)
    assert_close(torch.func.jvp(A, (x,), (x,))[1], A(x), A.domain.eps)
    assert_close(torch.func.vjp(A, x)[1](x)[0], A.H(x), A.domain.eps)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, 3 * x)
        assert_close(forward_ad.unpack_dual(A(dual)).tangent, 3 * A(x), A.domain.eps)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert A(x).dtype == torch.float32


def test_inside_of_transforms_changes_are_seen(A: al.LinearOperator, x: Tensor) -> None:
    class Scaled(nn.Module):
        scale = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    module = Scaled()
    A = al.linear_operator(module, (3,))
    xs = torch.ones(4, 3)
    assert torch.equal(torch.func.vmap(A)(xs), 2 * xs)
    module.scale = 5.0
    assert torch.equal(torch.func.vmap(A)(xs), 5 * xs)
    assert torch.equal(torch.func.vmap(A.H)(xs), 5 * xs)


def test_inference_mode(A: al.LinearOperator, x: Tensor) -> None:
    expected = A(x)
    with torch.inference_mode():
        assert_close([A(x), A(x)], [expected, expected], A.domain.eps)
        inside = x.clone()
        assert_close([A(inside), A(inside)], [expected, expected], A.domain.eps)
    assert_close([A(inside), A(inside), A(x)], [expected] * 3, A.domain.eps)
    assert A(x.clone().requires_grad_()).requires_grad


def test_a_parameter_that_is_gone_is_not_read(A: al.LinearOperator, x: Tensor) -> None:
    A(x)
    A.module.layer.weight = None
    with pytest.raises(al.SpaceMismatchError, match="NoneType"):  # what the module itself raises
        A(x)


def test_moving_and_switching_take_the_new_program(A: al.LinearOperator, x: Tensor) -> None:
    expected = A(x)
    A.source.switch("eager")
    assert_close([A(x), A(x)], [expected, expected], A.domain.eps)
    assert A.engine == "eager"
    A.source.switch("auto")
    A.double()
    assert_close([A(x.double()), A(x.double())], [expected.double()] * 2, 1e-7)
    with pytest.raises(al.SpaceMismatchError, match="float32"):
        A(x)


def test_hooks_run(A: al.LinearOperator, x: Tensor) -> None:
    seen = []
    handle = A.register_forward_hook(lambda module, given, result: seen.append(result.shape))
    A(x)
    handle.remove()
    A(x)
    assert seen == [x.shape]


def test_compiling_a_function_of_an_operator(A: al.LinearOperator, x: Tensor) -> None:
    counter = CompileCounter()
    compiled = torch.compile(lambda z: 2 * A(z), backend=counter, fullgraph=True)
    expected = 2 * A(x)
    assert_close(compiled(x), expected, A.domain.eps)
    with torch.no_grad():
        A(x + 1)
    A(torch._neg_view(-x))
    assert_close(compiled(x), expected, A.domain.eps)
    assert counter.frame_count == 1


def test_states_that_come_back_are_not_derived_again() -> None:
    class Switching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if self.training else 3 * x

    module = Switching()
    A, x = al.linear_operator(module, (3,)), torch.ones(3)
    for _ in range(30):
        for training in (True, False):
            module.train(training)
            assert torch.equal(A(x), x if training else 3 * x)
            assert torch.equal(A.H(x), x if training else 3 * x)
    assert A.engine == "traced"
    assert len(A.source._derivations[()]) == 2


def test_tied_tensors_are_untied_by_a_new_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.a * x + 10 * self.b * x

    module = Tied()
    A, x = al.linear_operator(module, (3,)), torch.ones(3)
    assert torch.equal(A(x), 11 * x)
    module.a = nn.Parameter(2 * torch.ones(3))
    assert torch.equal(A(x), 12 * x)
    assert torch.equal(A.H(x), 12 * x)


@pytest.mark.parametrize("stale", [True, False])
def test_frozen_blocks_look_once(stale: bool) -> None:
    layer = nn.Conv1d(1, 1, 31, padding=15, bias=False).requires_grad_(requires_grad=False)
    A = al.linear_operator(layer, (1, 1, 4096))
    v = A.domain.randn()
    before = A.H(v)
    with A.frozen():
        assert torch.equal(A.H(v), before)
        if stale:
            layer.weight.data.mul_(2)
            assert_close(A.H(v), before, A.domain.eps, 4 * float(before.norm()), factor=1e7)
        assert ops_of(A.H, v)
    assert_close(A.H(v), (2 if stale else 1) * before, A.domain.eps)


class Stateful(nn.Module):
    """A map that is linear only with the parameters that it had."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))
        self.slope = 1.0
        self.rounded = False

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.leaky_relu(x, self.slope)
        return y.round() if self.rounded else y


def test_a_map_that_has_changed_is_judged_again() -> None:
    module = Stateful()
    A, x = al.linear_operator(module, (8,)), torch.randn(8)
    assert_close(A(x), x, A.domain.eps)
    module.slope = 0.1
    for _ in range(2):
        with pytest.raises(al.NotLinearError, match="has changed, and is not linear any more"):
            A.H(x)
    module.slope = 1.0
    assert_close(A.H(x), x, A.domain.eps)
    module.rounded = True
    with pytest.raises((al.NotLinearError, al.NotDifferentiableError)):
        A.H(x)


def test_a_new_batch_size_reuses_what_was_derived() -> None:
    calls = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 7, padding=3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                calls.append(x.shape)
            return self.layer(x)

    module = Counted()
    A = al.linear_operator(module, (2, 1, 16, 16), batch_dims=1)
    built = len(calls)
    for n in (1, 3, 5, 2, 3):
        x = torch.randn(n, 1, 16, 16)
        assert_close(A(x), module.layer(x), A.domain.eps)
    assert len(calls) == built
    for n in range(1, 40):
        A.H(torch.ones(n, 1, 16, 16))
    assert len(A.source._derivations) <= 16
