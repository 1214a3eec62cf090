"""The gradient of least squares as one graph equals forward and adjoint one after the other."""

from typing import Any

import pytest
import torch
from test_trace import ops_of
from torch import nn

import adjointlab as al
from adjointlab.transpose import pipeline as assemble
from adjointlab.transpose.kernels import registry as kernels
from adjointlab.transpose.kernels import select as choice
from adjointlab.transpose.runtime import program


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


def circular(monkeypatch: pytest.MonkeyPatch, **settings: object) -> tuple[al.LeastSquares, torch.Tensor]:
    """Return an objective whose gradient is by transforms, and an x."""
    monkeypatch.setattr(choice, "choose", lambda site, **_: kernels.transformed(site))
    monkeypatch.setattr(choice, "quickest", lambda ways, _: list(ways)[-1])
    module = nn.Conv2d(2, 2, 9, padding=4, **{"padding_mode": "circular", "groups": 2, "bias": False, **settings})
    operator = al.linear_operator(module.double().requires_grad_(False), (3, 2, 20, 24))
    generator = torch.Generator().manual_seed(0)
    return al.LeastSquares(operator, operator.codomain.randn(generator)), operator.domain.randn(generator)


def transforms(objective: al.LeastSquares, x: torch.Tensor) -> int:
    """Return how many transforms a gradient takes: those of real numbers, one for each."""
    objective.gradient(x)
    return sum(name in {"aten::_fft_r2c", "aten::_fft_c2r"} for name in ops_of(objective.gradient, x))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_cyclic_gradient_takes_three_transforms(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    objective, x = circular(monkeypatch, groups=groups)
    assert transforms(objective, x) == 3
    expected = objective.A.H(objective.A(x) - objective.y)
    assert float((objective.gradient(x) - expected).norm()) <= 32 * objective.A.domain.eps * float(expected.norm())
    value, gradient = objective.value_and_gradient(x)
    assert float((gradient - expected).norm()) <= 32 * objective.A.domain.eps * float(expected.norm())
    assert float(value) == pytest.approx(float(objective(x)), rel=1e-14)
    with torch.no_grad():  # data and kernel are read at every call
        objective.y.mul_(2)
        objective.A.module.weight.mul_(3)
    expected = objective.A.H(objective.A(x) - objective.y)
    assert float((objective.gradient(x) - expected).norm()) <= 32 * objective.A.domain.eps * float(expected.norm())


@pytest.mark.parametrize("settings", [{"padding_mode": "zeros"}, {"stride": 2}, {"padding_mode": "reflect"}], ids=str)
def test_other_gradients_take_four(monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]) -> None:
    objective, x = circular(monkeypatch, **settings)
    assert transforms(objective, x) == 4


def test_a_weighted_gradient_takes_four(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, x = circular(monkeypatch)
    assert transforms(al.LeastSquares(objective.A, objective.y, objective.y.abs()), x) == 4


@pytest.mark.parametrize("alpha", [1, 2])
def test_only_differences_of_data_are_taken_of_spectra(monkeypatch: pytest.MonkeyPatch, alpha: int) -> None:
    objective, x = circular(monkeypatch)
    inner, number = objective.A.module, 3.0 if alpha == 1 else torch.ones(3, 2, 20, 24, dtype=torch.float64)
    A = al.affine_operator(lambda x: inner(torch.sub(inner(x), number, alpha=alpha)), x)
    objective = al.LeastSquares(A, objective.y)
    expected = A.linear.H(A(x) - objective.y)
    assert float((objective.gradient(x) - expected).norm()) <= 32 * A.domain.eps * float(expected.norm())


def test_a_difference_of_spectra_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, x = circular(monkeypatch)
    expected = objective.A.H(objective.A(x) - objective.y)
    right = kernels.gradient

    def wrong(sites: Any) -> Any:
        return lambda x, y, *rest: right(sites)(x, -y, *rest)

    monkeypatch.setattr(kernels, "gradient", wrong)
    monkeypatch.setattr(program, "_SITED", {*program._SITED, wrong})
    assert transforms(objective, x) == 4
    assert torch.allclose(objective.gradient(x), expected)
