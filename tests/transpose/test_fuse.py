"""The gradient of least squares as one graph equals forward and adjoint one after the other."""

import pytest
import torch
from torch import nn

import adjointlab as al
from adjointlab.transpose import assemble


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_fused_equals_unfused(dtype: torch.dtype, affine: bool, weighted: bool) -> None:
    module = nn.Conv2d(1, 2, 5, padding=2, stride=2, bias=affine, dtype=dtype).requires_grad_(False)
    operator = (al.affine_operator if affine else al.linear_operator)(module, (1, 1, 12, 12))
    generator = torch.Generator().manual_seed(0)
    x, y = operator.domain.randn(generator), operator.codomain.randn(generator)
    weight = operator.codomain.randn(generator).abs() if weighted else None
    objective = al.LeastSquares(operator, y, weight)
    fused = objective.gradient(x)
    followed = objective.gradient(x.requires_grad_())  # gradients are wanted: no fused graph
    assert followed.requires_grad
    assert not fused.requires_grad
    eps = torch.finfo(torch.float64).eps
    assert float((fused - followed.detach()).norm()) <= 32 * eps * float(fused.norm())
    value, gradient = objective.value_and_gradient(x.detach())
    assert torch.equal(gradient, fused)
    expected = objective(x.detach())
    assert abs(float(value) - float(expected)) <= 32 * eps * float(expected)


def test_batches_that_do_not_fit_the_data_are_refused() -> None:
    module = nn.Conv2d(1, 1, 3, bias=False).requires_grad_(False)
    operator = al.linear_operator(module, (2, 1, 8, 8), batch_dims=1)
    objective = al.LeastSquares(operator, torch.zeros(2, 1, 6, 6))
    with pytest.raises(al.SpaceMismatchError, match="nothing is broadcast"):
        objective.gradient(torch.zeros(1, 1, 8, 8))


def test_a_fused_graph_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Conv2d(1, 1, 3, bias=False).requires_grad_(False)
    operator, twice = (al.linear_operator(f, (1, 1, 8, 8)) for f in (module, lambda x: 2 * module(x)))
    wrong = twice.source._derived[()].graphs[1].graph
    fuse = assemble.residual_and_gradient
    monkeypatch.setattr(
        assemble, "residual_and_gradient", lambda forward, _, **options: fuse(forward, wrong, **options)
    )
    x, y = operator.domain.randn(), operator.codomain.randn()
    for residual in (True, False):
        assert operator.residual_and_gradient(x, y, None, residual=residual) is None
    assert torch.allclose(al.least_squares_gradient(operator, x, y), operator.H(operator(x) - y))
