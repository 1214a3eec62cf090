"""deepinv, both ways: derived adjoints for any number of samples, TensorLists, parameters, and its solvers."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import adjointlab as al

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    deepinv = pytest.importorskip("deepinv")
    bridge = pytest.importorskip("adjointlab.adapters.deepinv")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
EPS = torch.finfo(torch.float32).eps


def blur(batch_dims: int = 1) -> al.LinearOperator:
    c = nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect", bias=False)
    return al.linear_operator(c, (1, 1, 6, 6), batch_dims=batch_dims)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_adjoint_for_any_number_of_samples(batch_dims: int, samples: int) -> None:
    physics = bridge.to_deepinv(blur(batch_dims))
    assert isinstance(physics, deepinv.physics.LinearPhysics)
    x = torch.randn(samples, 1, 6, 6)
    assert physics.A(x).shape == (samples, 2, 6, 6)
    assert float(physics.adjointness_test(x, num_samples=samples)) <= 64 * EPS


def test_samples_that_do_not_fit_are_refused() -> None:
    A = al.linear_operator(lambda x: x.flip(0), (2, 1, 4, 4))
    with pytest.raises(al.SpaceMismatchError, match="batch_dims=1"):
        bridge.to_deepinv(A).A(torch.ones(3, 1, 4, 4))


def test_several_outputs_are_a_tensor_list() -> None:
    A = blur()
    physics = bridge.to_deepinv(al.vstack([A, 2 * A]))
    x = torch.randn(3, 1, 6, 6)
    y = physics.A(x)
    assert isinstance(y, deepinv.utils.TensorList)
    assert relative(physics.A_adjoint(y), 5 * A.H(A(x))) <= 64 * EPS


def test_a_tensor_list_of_the_forward_itself() -> None:
    stacked = deepinv.physics.stack(deepinv.physics.Denoising(), deepinv.physics.Decolorize())
    physics = bridge.to_deepinv(bridge.from_deepinv(stacked, (1, 3, 4, 4)))
    x = torch.randn(2, 3, 4, 4)
    assert relative(physics.A_adjoint_A(x), stacked.A_adjoint_A(x)) <= 64 * EPS


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (1, 1, 4, 4)], ids=["each", "shared"])
def test_keyword_parameters_of_each_sample(shape: tuple[int, ...]) -> None:
    A = al.linear_operator(lambda x, mask=None: x if mask is None else mask * x, (1, 1, 4, 4), batch_dims=1)
    physics, mask = bridge.to_deepinv(A), torch.rand(shape)
    for samples in (3, 1, 2)[: 1 if shape[0] == 3 else 3]:
        x = torch.randn(samples, 1, 4, 4)
        assert torch.equal(physics.A(x, mask=mask), mask * x)
        assert torch.equal(physics.A_adjoint(x, mask=mask), mask * x)
    mask.mul_(2)  # in place, which deepinv's own update_parameters may do
    assert torch.equal(physics.A_adjoint(x, mask=mask), mask * x)


def test_keyword_parameters_reach_the_forward() -> None:
    A = al.linear_operator(lambda x, mask=None: x if mask is None else mask * x, (1, 1, 4, 4), batch_dims=1)
    physics = bridge.to_deepinv(A)
    x, mask = torch.randn(3, 1, 4, 4), torch.rand(1, 1, 4, 4)
    assert torch.equal(physics.A(x), x)
    for _ in range(2):
        assert torch.equal(physics.A(x, mask=mask), mask * x)
        assert torch.equal(physics.A_adjoint(x, mask=mask), mask * x)
    with pytest.raises(al.SpaceMismatchError, match="take no parameters"):
        bridge.to_deepinv(A.H @ A).A(x, mask=mask)


@pytest.mark.parametrize("solver", ["CG", "lsqr", "minres", "BiCGStab"])
def test_solvers_of_deepinv(solver: str) -> None:
    A = al.vstack([blur(), al.identity(al.Space.of((1, 1, 6, 6), batch_dims=1))])
    physics = bridge.to_deepinv(A, max_iter=200, tol=1e-7, implicit_backward_solver=False)
    x = torch.randn(2, 1, 6, 6)
    with torch.no_grad():
        assert relative(physics.A_dagger(physics.A(x), solver=solver), x) <= 1e-2


def test_parameters_are_trained_through_the_physics() -> None:
    A = blur()
    physics = bridge.to_deepinv(A)
    physics.A_adjoint(torch.randn(2, 2, 6, 6)).square().sum().backward()
    (weight,) = physics.parameters()
    assert weight.grad is not None
    assert float(weight.grad.norm()) > 0


def test_norm_by_deepinv_is_ours() -> None:
    A = blur()
    theirs = bridge.to_deepinv(A).compute_sqnorm(torch.randn(1, 1, 6, 6), max_iter=500, tol=1e-7, verbose=False)
    assert abs(float(theirs) ** 0.5 - float(al.operator_norm(A))) <= 1e-2 * float(al.operator_norm(A))


def test_from_deepinv_with_parameters() -> None:
    physics, mask = deepinv.physics.Inpainting(img_size=(1, 4, 4), mask=0.5), torch.rand(1, 1, 4, 4)
    A = bridge.from_deepinv(physics, (1, 1, 4, 4), mask=mask)
    x = torch.randn(3, 1, 4, 4)
    assert torch.equal(A(x), mask * x)
    assert A.codomain.batch_dims == 1


@pytest.mark.parametrize(
    "f", [torch.fft.rfft2, torch.real, torch.fft.fft2], ids=["real to complex", "to real", "complex"]
)
def test_maps_between_real_and_complex_images_pass_their_test_of_adjoints(f: Callable[[Tensor], Tensor]) -> None:
    x = torch.zeros(1, 2, 4, 4, dtype=torch.float32 if f is torch.fft.rfft2 else torch.complex64)
    A = al.linear_operator(f, x, batch_dims=1)
    physics = bridge.to_deepinv(A)
    given = torch.randn(1, 2, 2, 4, 4) if f is torch.real else torch.randn_like(x)  # pairs of real numbers
    assert float(physics.adjointness_test(given, num_samples=20)) <= 64 * EPS
    if f is not torch.fft.fft2:
        y = physics.A(given)
        assert not y.is_complex()
        solved = physics.A_dagger(y, solver="lsqr", tol=1e-6)
        assert relative(physics.A(solved), y) <= 1e-3
