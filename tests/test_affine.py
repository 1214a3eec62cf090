"""Affine operators: `f(x) = A x + b`, with `Aᴴ` the adjoint of the linear part."""

from __future__ import annotations

import pytest
import torch
from laws import assert_close, distance, draw
from torch import nn

import adjointlab as al


def biased() -> nn.Conv1d:
    return nn.Conv1d(1, 2, 3, dtype=torch.float64)


def test_offset_follows_the_bias() -> None:
    layer = biased()
    f = al.affine_operator(layer, (1, 1, 5))
    with torch.no_grad():
        layer.bias.add_(1)
    assert_close(f.offset, layer(torch.zeros(1, 1, 5, dtype=torch.float64)), f.linear.domain.eps)


def test_parameters_are_shared() -> None:
    layer = biased()
    f = al.affine_operator(layer, (1, 1, 5))
    assert {id(p) for p in f.parameters()} == {id(p) for p in layer.parameters()}


def test_gradient_in_weight_and_bias() -> None:
    layer = biased()
    f = al.affine_operator(layer, (1, 1, 5))
    x = draw(f.linear.domain)
    found = torch.autograd.grad(f(x).square().sum(), tuple(layer.parameters()))
    expected = torch.autograd.grad(layer(x).square().sum(), tuple(layer.parameters()))
    assert_close(found, expected, f.linear.domain.eps)


def test_batch_sizes_may_change() -> None:
    layer = biased()
    f = al.affine_operator(layer, (2, 1, 5), batch_dims=1)
    x = torch.randn(3, 1, 5, dtype=torch.float64)
    assert_close(f(x), layer(x), f.linear.domain.eps)
    assert f.H(f(x)).shape == x.shape


def test_moving_moves_parameters_spaces_and_offset() -> None:
    f = al.affine_operator(biased(), (1, 1, 5)).to(torch.float32)
    assert f(draw(f.linear.domain)).dtype == f.offset.dtype == torch.float32


def test_keyword_arguments() -> None:
    f = al.affine_operator(lambda x, *, shift: 2 * x + shift, (3,), kwargs={"shift": 1.5})
    assert torch.equal(f.offset, torch.full((3,), 1.5))


def test_pytrees() -> None:
    f = al.affine_operator(lambda x, z: {"sum": x + z + 1, "first": x}, ((3,), (3,)))
    x = draw(f.linear.domain)
    assert distance(f(x), {"sum": x[0] + x[1] + 1, "first": x[0]}) == 0
    assert distance(f.H({"sum": torch.ones(3), "first": torch.zeros(3)}), (torch.ones(3), torch.ones(3))) == 0


def test_large_offset_does_not_hide_the_linear_part() -> None:
    f = al.affine_operator(lambda x: 2 * x + 1e6, torch.zeros(3, dtype=torch.float64))
    y = draw(f.linear.codomain)
    assert_close(f.H(y), 2 * y, f.linear.domain.eps)


def test_what_is_not_affine_is_refused() -> None:
    with pytest.raises(al.NotLinearError, match=r"affine|linear"):
        al.affine_operator(lambda x: x**2 + 1, (3,))


def test_wrong_argument_is_refused() -> None:
    with pytest.raises(al.SpaceMismatchError, match="element"):
        al.affine_operator(biased(), (1, 1, 5))(torch.zeros(1, 1, 5))


def test_what_only_the_linear_part_has_is_named() -> None:
    f = al.affine_operator(nn.Linear(3, 2), (3,))
    with pytest.raises(AttributeError, match=r"no 'gram'; its linear part has: f\.linear\.gram"):
        f.gram  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        f.nothing  # noqa: B018
    assert not hasattr(f, "nothing")
