"""The eager reference, and the quicker one that a check may begin with."""

from __future__ import annotations

import pytest
import torch
from laws import assert_close, draw
from torch import Tensor, nn

import adjointlab as al
from adjointlab.transpose.reference import Reference

IMAGE = al.Space.of(al.TensorSpec((2, 1, 6, 5), torch.float64))


def reference(function: object, domain: al.Space = IMAGE) -> Reference:
    return Reference(function, {}, domain)


@pytest.fixture
def layer() -> nn.Module:
    return nn.Conv2d(1, 3, 3, padding=1, bias=False, dtype=torch.float64).requires_grad_(requires_grad=False)


def test_the_quick_adjoint_is_the_adjoint(layer: nn.Module) -> None:
    found = reference(layer)
    v = torch.randn(2, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (quick,), (plain,) = found.quick_adjoint((v,)), found.adjoint((v,))
    assert_close(quick, plain, 1e-15)


def test_it_starts_from_a_zero_with_the_channels_last(layer: nn.Module) -> None:
    seen = []

    def forward(x: Tensor) -> Tensor:
        seen.append(x.stride())
        return layer(x)

    found, v = reference(forward), torch.zeros(2, 3, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        found.quick_adjoint((v,))
        found.adjoint((v,))
    assert seen == [(30, 1, 5, 1), (30, 30, 5, 1)]


@pytest.mark.parametrize("shape", [(2, 3, 6, 5), (1, 6, 5), (6,)])
def test_there_is_none_where_no_order_is_quicker(shape: tuple[int, ...]) -> None:
    domain = al.Space.of(al.TensorSpec(shape, torch.float64))
    assert reference(lambda x: 2 * x, domain).quick_adjoint((torch.zeros(shape, dtype=torch.float64),)) is None


def test_there_is_none_where_the_function_refuses_it(layer: nn.Module) -> None:
    def forward(x: Tensor) -> Tensor:
        return layer(x).view(2, -1)  # three channels, and these last: no view of that shape

    v = torch.zeros(2, 90, dtype=torch.float64)
    assert reference(forward).quick_adjoint((v,)) is None
    A = al.linear_operator(forward, IMAGE)
    assert A.engine == "traced", A.explain()
    assert al.check_adjoint(A).passed


def test_a_function_that_reads_strides_is_compared_with_the_plain_reference(layer: nn.Module) -> None:
    def forward(x: Tensor) -> Tensor:
        y = layer(x)
        return y.as_strided((y.numel(),), (1,)) * torch.arange(1.0, 1 + y.numel(), dtype=y.dtype)

    v = torch.randn(180, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = reference(forward)
    assert float((found.quick_adjoint((v,))[0] - found.adjoint((v,))[0]).norm()) > 1  # another function, there
    A = al.linear_operator(forward, IMAGE)
    assert A.engine == "traced", A.explain()
    x = draw(A.domain)
    assert_close(A(x), forward(x), A.domain.eps)
    assert_close(A.H(v), found.adjoint((v,))[0], A.domain.eps)
