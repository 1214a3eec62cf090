"""The eager reference, and the quicker one that a check may begin with."""

from __future__ import annotations

import pytest
import torch
from laws import assert_close, draw, with_backward
from torch import Tensor, nn

import adjointlab as al
from adjointlab.transpose.kernels import registry as kernels
from adjointlab.transpose.kernels import select as choice
from adjointlab.transpose.kernels.convolution import Site
from adjointlab.transpose.runtime import program
from adjointlab.transpose.runtime.reference import Reference

pytestmark = pytest.mark.cpu  # for which the quick sample is

CPU = torch.device("cpu")
IMAGE = al.Space.of(al.TensorSpec((2, 1, 64, 40), torch.float64, CPU))


def reference(function: object, domain: al.Space = IMAGE) -> Reference:
    return Reference(function, {}, domain)


@pytest.fixture
def layer() -> nn.Module:
    return nn.Conv2d(1, 3, 3, padding=1, bias=False, dtype=torch.float64).requires_grad_(requires_grad=False)


def random(*shape: int) -> tuple[Tensor]:
    return (torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), device=CPU),)


X, V = random(2, 1, 64, 40), random(2, 3, 64, 40)


def test_the_quick_sample_is_the_sample(layer: nn.Module) -> None:
    quick, plain = reference(layer).quick_sample(X, V, ()), reference(layer).sample(X, V, ())
    assert_close(quick.at_x[0], plain.at_x[0], 1e-15)
    assert_close(quick.at_v[0], plain.at_v[0], 1e-15)
    assert quick.x is plain.x is X
    assert quick.v is plain.v is V


def test_its_x_has_the_channels_last(layer: nn.Module) -> None:
    seen = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x.stride())
        return layer(x)

    reference(forward).quick_sample(X, V, ())
    assert seen == [(2560, 2560, 40, 1), (2560, 1, 40, 1)]
    seen.clear()
    with torch.no_grad():
        reference(forward).sample(X, V, ())
    assert seen == 3 * [(2560, 2560, 40, 1)]


@pytest.mark.parametrize("kind", ["quick_sample", "sample"])
def test_a_sample_has_the_function_far_away_and_its_gradients(kind: str) -> None:
    layer = nn.Conv2d(1, 3, 3, padding=1, dtype=torch.float64)
    parameters = tuple(layer.parameters())
    sample = getattr(reference(layer), kind)(X, V, (*parameters, torch.ones(2, requires_grad=True)))
    at_x = layer(X[0])
    assert torch.equal(sample.at_x[0], at_x)
    assert not sample.at_x[0].requires_grad
    assert_close(sample.at_far[0], layer(2**20 * X[0]).detach(), 1e-15)
    expected = torch.autograd.grad(at_x, parameters, V[0])
    assert all(map(torch.equal, sample.gradients, (*expected, torch.zeros(2))))
    assert getattr(reference(layer), kind)(X, V, ()).gradients == ()


def test_a_derivative_that_is_refused_is_told() -> None:
    def refuse(g: Tensor) -> Tensor:
        raise RuntimeError("no derivative\nat all")

    refusing = with_backward(torch.clone, refuse)
    weight = torch.ones(3, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    sample = reference(lambda x: nn.functional.conv2d(x, refusing(weight))).sample(X, V, (weight,))
    assert sample.gradients == "no derivative"
    assert torch.equal(sample.at_far[0], 2**20 * sample.at_x[0])


@pytest.mark.parametrize("shape", [(2, 3, 64, 40), (1, 64, 80), (5000,), (2, 1, 6, 5)])
def test_there_is_none_where_no_order_is_quicker(shape: tuple[int, ...]) -> None:
    domain = al.Space.of(al.TensorSpec(shape, torch.float64))
    assert reference(lambda x: 2 * x, domain).quick_sample(random(*shape), random(*shape), ()) is None


def test_there_is_none_where_the_function_refuses_it(layer: nn.Module) -> None:
    def forward(x: Tensor) -> Tensor:
        return layer(x).view(2, -1)  # three channels, and these last: no view of that shape

    assert reference(forward).quick_sample(X, random(2, 7680), ()) is None
    A = al.linear_operator(forward, IMAGE)
    assert A.engine == "traced", A.explain()
    assert al.check_adjoint(A).passed


def test_a_function_that_reads_strides_is_compared_with_the_plain_reference(layer: nn.Module) -> None:
    def forward(x: Tensor) -> Tensor:
        y = layer(x)
        return y.as_strided((y.numel(),), (1,)) * torch.arange(1.0, 1 + y.numel(), dtype=y.dtype)

    v = random(15360)
    quick, plain = reference(forward).quick_sample(X, v, ()), reference(forward).sample(X, v, ())
    assert float((quick.at_far[0] - plain.at_far[0]).norm()) > 1  # another function, there
    assert float((quick.at_v[0] - plain.at_v[0]).norm()) > 1
    A = al.linear_operator(forward, IMAGE)
    assert A.engine == "traced", A.explain()
    x = draw(A.domain)
    assert_close(A(x), forward(x), A.domain.eps)
    assert_close(A.H(*v), plain.at_v[0], A.domain.eps)


def test_a_wrong_kernel_is_not_taken_for_the_difference_that_strides_make(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.KERNELS["flipped"]

    def wrong(site: Site) -> kernels.Kernel:
        return lambda *tensors: 3 * right(site)(*tensors)

    monkeypatch.setitem(kernels.KERNELS, "flipped", wrong)
    monkeypatch.setattr(program, "_SITED", {*program._SITED, wrong})
    monkeypatch.setattr(
        choice, "choose", lambda site, **_: "flipped" if "flipped" in kernels.available(site) else "native"
    )
    layer = nn.Conv2d(1, 3, 3, padding=1, bias=False, dtype=torch.float64).requires_grad_(requires_grad=False)

    def forward(x: Tensor) -> Tensor:
        y = layer(x)
        return y * (2 if y.stride(1) == 1 else 1)

    A = al.linear_operator(forward, IMAGE)
    assert "lowered: the derived adjoint differs" in A.explain()
    assert_close(A.H(V[0]), reference(forward).adjoint(V)[0], A.domain.eps)


@pytest.mark.parametrize("kind", [AssertionError, TypeError, RuntimeError])
def test_there_is_none_where_a_derivative_refuses_it(kind: type[Exception]) -> None:
    class Strict(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def setup_context(ctx, inputs, output) -> None:
            ctx.stride = inputs[0].stride()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            if gradient.stride() != ctx.stride:
                raise kind("other strides")
            return 2 * gradient

    assert reference(Strict.apply).quick_sample(X, X, ()) is None
    assert al.linear_operator(Strict.apply, IMAGE).engine == "traced"
