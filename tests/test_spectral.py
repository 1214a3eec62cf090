"""Dense matrices and norms of operators."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from laws import assert_close, norm, seeded
from torch import Tensor, nn

import adjointlab as al
from adjointlab import spectral


def test_matrix_of_a_matrix() -> None:
    w = torch.randn(3, 4, dtype=torch.complex128)
    A = al.linear_operator(lambda x: w @ x, torch.zeros(4, dtype=torch.complex128))
    assert_close(al.to_dense(A), w, A.domain.eps)


def test_matrix_of_a_real_to_complex_operator_is_complex() -> None:
    A = al.linear_operator(torch.fft.rfft, torch.zeros(4, dtype=torch.float64))
    expected = torch.fft.fft(torch.eye(4, dtype=torch.float64))[:3]
    assert_close(al.to_dense(A), expected, A.domain.eps)


def test_matrix_of_a_real_linear_operator_on_a_complex_space_is_real() -> None:
    A = al.linear_operator(torch.conj, torch.zeros(2, dtype=torch.complex128))
    assert torch.equal(al.to_dense(A), torch.diag(torch.tensor([1.0, 1, -1, -1], dtype=torch.float64)))


def test_real_coordinates_of_a_complex_matrix() -> None:
    w = torch.randn(3, 4, dtype=torch.complex128)
    A = al.linear_operator(lambda x: w @ x, torch.zeros(4, dtype=torch.complex128))
    expected = torch.cat([torch.cat([w.real, -w.imag], 1), torch.cat([w.imag, w.real], 1)])
    assert_close(al.to_dense(A, real=True), expected, A.domain.eps)


def test_matrix_of_algebra() -> None:
    A = al.linear_operator(nn.Linear(4, 3, bias=False, dtype=torch.float64), (4,))
    a = al.to_dense(A)
    eps, scale = A.domain.eps, norm(a) ** 2
    assert_close(al.to_dense(A.gram), a.T @ a, eps, scale)
    assert_close(al.to_dense(2 * A.T - A.H), a.T.contiguous(), eps)
    assert_close(al.to_dense(al.vstack([A, A])), torch.cat([a, a]), eps)
    assert_close(al.to_dense(al.hstack([A, -A])), torch.cat([a, -a], 1), eps)
    assert_close(al.to_dense(al.block_diag([A, A.H])), torch.block_diag(a, a.T), eps)


def test_matrix_of_the_identity() -> None:
    space = al.Space.of((2, 3), dtype=torch.float64)
    assert torch.equal(al.to_dense(al.identity(space)), torch.eye(6, dtype=torch.float64))


def test_function_that_vmap_refuses() -> None:
    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            bool((x > -torch.inf).all())  # a branch on the input, which vmap refuses
            return 2 * x

    A = al.linear_operator(Positive(), torch.zeros(3, dtype=torch.float64), engine="eager")
    assert torch.equal(al.to_dense(A), 2 * torch.eye(3, dtype=torch.float64))


def test_batched_operator_is_dense_for_its_own_example() -> None:
    A = al.linear_operator(nn.Conv1d(1, 1, 3, bias=False), (2, 1, 6), batch_dims=1)
    assert al.to_dense(A).shape == (8, 12)


# ---------------------------------------------------------------------------------------------------------------- norm


@pytest.mark.parametrize("size", [1, 2, 30])
def test_norm_of_a_diagonal(size: int) -> None:
    d = torch.linspace(0.1, 3, size, dtype=torch.float64)
    found = float(al.operator_norm(al.diagonal(d)))
    assert abs(found - float(d.max())) <= 16 * torch.finfo(torch.float32).eps ** 0.5 * float(d.max())


def test_norm_never_exceeds_the_largest_singular_value() -> None:
    A = al.linear_operator(nn.Linear(20, 15, bias=False, dtype=torch.float64), (20,))
    expected = float(torch.linalg.matrix_norm(al.to_dense(A), 2))
    assert float(al.operator_norm(A)) <= expected * (1 + 16 * A.domain.eps)


def test_norm_of_zero_is_zero() -> None:
    assert float(al.operator_norm(0 * al.identity(al.Space.of((3,))))) == 0


def test_norms_of_adjoint_and_operator_agree() -> None:
    A = al.linear_operator(nn.Conv1d(1, 2, 3, bias=False, dtype=torch.complex128), (1, 1, 9))
    gap = abs(float(al.operator_norm(A)) - float(al.operator_norm(A.H)))
    assert gap <= 16 * torch.finfo(torch.float32).eps ** 0.5 * float(al.operator_norm(A))


def test_norm_is_homogeneous() -> None:
    A = al.linear_operator(nn.Conv1d(1, 2, 3, bias=False, dtype=torch.float64), (1, 1, 9))
    gap = abs(float(al.operator_norm(-3 * A)) - 3 * float(al.operator_norm(A)))
    assert gap <= 16 * torch.finfo(torch.float32).eps ** 0.5 * float(al.operator_norm(A))


def test_norm_is_deterministic() -> None:
    A = al.linear_operator(nn.Conv1d(1, 2, 3, bias=False), (1, 1, 9))
    assert float(al.operator_norm(A)) == float(al.operator_norm(A))


def test_norm_of_pytrees() -> None:
    A = al.linear_operator(lambda x, z: {"sum": x + z}, (torch.zeros(3), torch.zeros(3)))
    found = float(al.operator_norm(A))
    assert abs(found - 2**0.5) <= 16 * torch.finfo(torch.float32).eps ** 0.5 * 2**0.5


@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-6])
def test_norm_of_a_clustered_spectrum(spread: float) -> None:
    # Power iteration would need some 1/spread steps to tell the largest values apart.
    d = torch.cat([1 - spread * torch.linspace(0, 1, 300), torch.linspace(0, 0.9, 300)]).double()
    found = float(al.operator_norm(al.diagonal(d), tol=1e-6, maxiter=1000))
    assert abs(found - 1) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_default_accuracy_of_the_norm_is_three_digits(dtype: torch.dtype) -> None:
    w = torch.randn(300, 200, dtype=dtype)
    found, expected = float(al.operator_norm(al.matrix(w))), float(torch.linalg.matrix_norm(w, 2))
    assert abs(found - expected) <= 1e-3 * expected


def test_norm_that_has_not_converged_says_so() -> None:
    d = torch.linspace(0.1, 1, 200, dtype=torch.float64)
    with pytest.warns(al.ConvergenceWarning, match="not converged in maxiter=3 steps: .* is a lower bound") as said:
        found = float(al.operator_norm(al.diagonal(d), tol=1e-8, maxiter=3))
    assert found < 1
    assert said[0].filename == __file__


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
@pytest.mark.parametrize("wrong", [0.0, 0.05, 1.0, 30.0])
def test_norm_of_an_unchecked_pair_is_a_lower_bound(wrong: float, dtype: torch.dtype) -> None:
    matrix, noise = torch.randn(2, 8, 6, dtype=dtype, generator=seeded(3))
    other = matrix + wrong * noise
    spaces = (al.Space.of((n,), dtype=dtype) for n in (6, 8))
    A = al.from_pair(lambda x: matrix @ x, lambda y: other.mH @ y, *spaces, check=False)
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    for B, size in ((A, 1.0), (2 * A, 2.0), (A.H, 1.0)):
        with pytest.warns(al.ConvergenceWarning, match="is none: .* lower bound") if wrong else nullcontext():
            found = float(al.operator_norm(B, maxiter=1000))
        of = exact if B is not A.H else float(torch.linalg.matrix_norm(other, 2))
        assert found <= (1 + 8 * torch.finfo(dtype).eps) * size * of
        assert found >= {0.0: 0.998, 0.05: 0.98}.get(wrong, 0.0) * size * of


def test_norm_starts_from_a_seed() -> None:
    A = al.diagonal(torch.linspace(0.1, 1, 200, dtype=torch.float64))
    found = [float(al.operator_norm(A, seed=seed, tol=0.1)) for seed in (0, 1)]
    assert found[0] != found[1]
    assert found[1] == float(al.operator_norm(A, generator=torch.Generator().manual_seed(1), tol=0.1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32], ids=str)
def test_norm_of_a_dense_spectrum(dtype: torch.dtype) -> None:
    w = torch.randn(300, 200, dtype=dtype)
    A = al.linear_operator(lambda x: w @ x, torch.zeros(200, dtype=dtype))
    expected = float(torch.linalg.matrix_norm(w, 2))
    tol = 1e-4 if dtype == torch.float32 else 1e-8
    found = float(al.operator_norm(A, tol=tol, maxiter=2000))
    assert abs(found - expected) <= 2 * tol * expected


def test_matrix_in_chunks() -> None:
    A = al.linear_operator(nn.Conv2d(2, 1, 3, bias=False, dtype=torch.complex128), (1, 2, 4, 5))
    whole = al.to_dense(A, real=True)
    with torch.no_grad():
        chunks = spectral.columns(A, coordinates=True, most=7 * (A.domain.size + A.codomain.size))
    assert_close(chunks, whole, A.domain.eps)


def test_columns_are_made_together() -> None:
    calls = []

    def forward(x: Tensor) -> Tensor:
        calls.append(1)
        return 2 * x

    space = al.Space.of((50,))
    A = al.LinearOperator(forward, forward, space, space)
    al.to_dense(A)  # which also finds out whether autograd sees through the functions
    calls.clear()
    al.to_dense(A)
    assert len(calls) <= 3


def test_condition_number() -> None:
    d = torch.tensor([1.0, 4.0, -2.0], dtype=torch.float64)
    assert float(spectral.condition_number(al.diagonal(d))) == 4
    wide = al.linear_operator(lambda x: x[:2], (3,))
    assert float(spectral.condition_number(wide)) == float("inf")
    assert float(spectral.condition_number(wide.H)) == 1
    antilinear = al.linear_operator(torch.conj, torch.zeros(2, dtype=torch.complex128))
    assert float(spectral.condition_number(antilinear)) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_trace_and_diagonal_are_estimated_without_bias(dtype: torch.dtype) -> None:
    w = torch.randn(20, 20, dtype=dtype)
    A = al.linear_operator(lambda x: w @ x, torch.zeros(20, dtype=dtype))
    samples = 2000
    off = norm(w - torch.diag(w.diagonal()))
    # The standard error of either is at most √2 ‖off-diagonal‖_F / √samples; five of them is beyond chance.
    bound = 5 * 2**0.5 * off / samples**0.5
    assert abs(complex(spectral.estimate_trace(A, samples=samples)) - complex(w.trace())) <= bound
    assert norm(spectral.estimate_diagonal(A, samples=samples) - w.diagonal()) <= bound


def test_estimates_need_a_space_to_itself() -> None:
    A = al.linear_operator(lambda x: x[:2], (3,))
    for estimate in (spectral.estimate_trace, spectral.estimate_diagonal):
        with pytest.raises(al.SpaceMismatchError, match="from a space to itself"):
            estimate(A)


@pytest.mark.parametrize(
    ("dtype", "power"),
    [
        (dtype, power)
        for dtype in (torch.float16, torch.float32, torch.float64)
        for power in (-25, -3, 2, 25)
        if torch.finfo(dtype).smallest_normal < 10.0**power < torch.finfo(dtype).max
    ],
    ids=str,
)
def test_norm_neither_vanishes_nor_overflows(dtype: torch.dtype, power: int) -> None:
    d = (10.0**power * torch.tensor([0.5, 3.0], dtype=torch.float64)).to(dtype)
    found = float(al.operator_norm(al.diagonal(d))) / float(d.max())
    assert abs(found - 1) <= 1e-4 + 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    A = al.diagonal(torch.tensor([1.0, bad]))
    assert not torch.isfinite(al.operator_norm(A))
    assert torch.isnan(spectral.condition_number(A))
    one_sided = al.LinearOperator(lambda x: x, lambda y: bad * y, A.domain, A.codomain)
    assert not torch.isfinite(al.operator_norm(one_sided))


def test_condition_number_of_zero_is_infinite() -> None:
    assert float(spectral.condition_number(0 * al.identity((3,)))) == float("inf")


ESTIMATES = (
    al.to_dense,
    al.operator_norm,
    spectral.condition_number,
    spectral.estimate_trace,
    spectral.estimate_diagonal,
)


@pytest.mark.parametrize("function", ESTIMATES, ids=lambda f: f.__name__)
def test_what_is_no_operator_is_refused(function: Callable[..., Tensor]) -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(al.SpaceMismatchError, match="wrap it"):
        function(layer)
    with pytest.raises(al.SpaceMismatchError, match=r"\.linear"):
        function(al.affine_operator(layer, (2,)))


def test_numbers_of_steps_and_samples_are_positive() -> None:
    A = al.identity((2,))
    for option in ({"maxiter": 0}, {"tol": -1.0}, {"tol": torch.nan}):
        with pytest.raises(ValueError, match="expected maxiter of 1 or more and tol"):
            al.operator_norm(A, **option)
    for estimate in (spectral.estimate_trace, spectral.estimate_diagonal):
        with pytest.raises(ValueError, match="samples of 1 or more"):
            estimate(A, samples=0)
