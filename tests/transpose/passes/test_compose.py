"""The gradient of least squares as one graph equals forward and adjoint one after the other."""

from dataclasses import replace

import pytest
import torch
from built import affine, operator, ops_of
from torch import nn

import adjointlab as al
from adjointlab.transpose import Options
from adjointlab.transpose.frontend.capture import capture
from adjointlab.transpose.kernels import fft
from adjointlab.transpose.kernels.registry import transformed
from adjointlab.transpose.lowered import gradient
from adjointlab.transpose.pipeline import graphs_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_fused_equals_unfused(dtype: torch.dtype, biased: bool, weighted: bool) -> None:
    module = nn.Conv2d(1, 2, 5, padding=2, stride=2, bias=biased, dtype=dtype).requires_grad_(False)
    A = (al.affine_operator if biased else al.linear_operator)(module, (1, 1, 12, 12))
    generator = torch.Generator().manual_seed(0)
    x, y = A.domain.randn(generator), A.codomain.randn(generator)
    weight = A.codomain.randn(generator).abs() if weighted else None
    objective = al.LeastSquares(A, y, weight)
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
    A = al.linear_operator(module, (2, 1, 8, 8), batch_dims=1)
    objective = al.LeastSquares(A, torch.zeros(2, 1, 6, 6))
    with pytest.raises(al.SpaceMismatchError, match="nothing is broadcast"):
        objective.gradient(torch.zeros(1, 1, 8, 8))


def test_a_fused_graph_that_is_wrong_is_not_used() -> None:
    module = nn.Conv2d(1, 1, 3, bias=False).requires_grad_(False)
    A, twice = (al.linear_operator(f, (1, 1, 8, 8)) for f in (module, lambda x: 2 * module(x)))
    derivation, options = A.source.nominal, Options()
    right = graphs_of(capture(module, {}, A.domain, ()), A.domain, options)
    wrong = replace(right, adjoint=replace(right.adjoint, graph=twice.source.nominal.graphs["adjoint"]))
    for residual in (True, False):
        found = [gradient(derivation, g, A.domain, options, "lowered", False, residual) for g in (right, wrong)]
        assert [program is None for program in found] == [False, True]


def circular(**settings: object) -> tuple[al.LeastSquares, torch.Tensor]:
    """Return an objective whose gradient is by transforms, and an x."""
    module = nn.Conv2d(2, 2, 9, padding=4, **{"padding_mode": "circular", "groups": 2, "bias": False, **settings})
    A = operator(module.double().requires_grad_(False), (3, 2, 20, 24), transformed)
    generator = torch.Generator().manual_seed(0)
    return al.LeastSquares(A, A.codomain.randn(generator)), A.domain.randn(generator)


def transforms(objective: al.LeastSquares, x: torch.Tensor) -> int:
    """Return how many transforms a gradient takes: those of real numbers, one for each."""
    objective.gradient(x)
    return sum(name in {"aten::_fft_r2c", "aten::_fft_c2r"} for name in ops_of(objective.gradient, x))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_cyclic_gradient_takes_three_transforms(groups: int) -> None:
    objective, x = circular(groups=groups)
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
def test_other_gradients_take_four(settings: dict[str, object]) -> None:
    objective, x = circular(**settings)
    assert transforms(objective, x) == 4


def test_a_weighted_gradient_takes_four() -> None:
    objective, x = circular()
    assert transforms(al.LeastSquares(objective.A, objective.y, objective.y.abs()), x) == 4


@pytest.mark.parametrize("alpha", [1, 2])
def test_only_differences_of_data_are_taken_of_spectra(alpha: int) -> None:
    objective, x = circular()
    inner, number = objective.A.module, 3.0 if alpha == 1 else torch.ones(3, 2, 20, 24, dtype=torch.float64)
    A = affine(lambda x: inner(torch.sub(inner(x), number, alpha=alpha)), x, transformed)
    objective = al.LeastSquares(A, objective.y)
    expected = A.linear.H(A(x) - objective.y)
    assert float((objective.gradient(x) - expected).norm()) <= 32 * A.domain.eps * float(expected.norm())


def test_a_difference_of_spectra_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, x = circular()
    expected = objective.A.H(objective.A(x) - objective.y)
    right = fft.gradient
    monkeypatch.setattr(fft, "gradient", lambda specs: lambda x, y, *rest: right(specs)(x, -y, *rest))
    assert transforms(objective, x) == 4
    assert torch.allclose(objective.gradient(x), expected)


def test_a_linear_part_has_no_bias_left() -> None:
    """Whatever is added to what depends on x goes; where that cannot be told, f(0) is subtracted."""
    layer, weight = nn.Conv1d(1, 1, 3), torch.rand(6)
    for f in (
        layer,
        lambda x: 2 - layer(x),
        lambda x: torch.cat([layer(x), torch.ones(1, 1, 2)], -1),
        lambda x: torch.nn.functional.pad(layer(x), (1, 2), value=3.0),
        lambda x: torch.addmm(weight[:4], layer(x)[0], torch.eye(4)),
        lambda x: (layer(x), torch.ones(3)),
        lambda x: 1 + weight[0] * (layer(x) - 5),
    ):
        A = al.affine_operator(f, (1, 1, 6))
        assert A.engine == "traced", A.explain()
        x = torch.randn(1, 1, 6)
        outputs = [[t] if isinstance(t, torch.Tensor) else t for t in (A.linear(x), A(x), A.offset, f(x))]
        for linear, whole, offset, expected in zip(*outputs, strict=True):
            assert torch.allclose(linear, whole - offset, atol=1e-6)
            assert torch.allclose(whole, expected, atol=1e-6)
