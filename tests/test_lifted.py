"""Operators made of one on smaller or other elements: slices, Kronecker products, complex elements, views, inverses."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adjointlab as al


def blur(n: int = 6, dtype: torch.dtype = torch.float64, **options: Any) -> al.LinearOperator[Tensor, Tensor]:
    torch.manual_seed(n)
    c = nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect", bias=False, dtype=dtype).requires_grad_(False)
    return al.linear_operator(lambda x: c(x[None, None])[0, 0, ::2], torch.zeros(n, dtype=dtype), **options)


def foreign(n: int = 6) -> al.LinearOperator[Tensor, Tensor]:
    """Differences by NumPy, which no transform of PyTorch sees through."""

    def f(x: Tensor) -> Tensor:
        return torch.from_numpy(np.diff(x.detach().numpy()))

    def adjoint(y: Tensor) -> Tensor:
        return torch.from_numpy(-np.diff(y.detach().numpy(), prepend=0, append=0))

    spaces = (al.Space.of(torch.zeros(n - k, dtype=torch.float64)) for k in (0, 1))
    return al.from_pair(f, adjoint, *spaces)


MADE = {
    "derived": blur, "eager": lambda: blur(engine="eager"), "pair": foreign, "sum": lambda: 2 * foreign() - foreign(),
    "diagonal": lambda: al.diagonal(torch.arange(1.0, 7.0).double()),
}  # fmt: skip


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_map_acts_on_every_slice(make: Any, dim: int) -> None:
    A = make()
    M = al.map(A, dim, 4)
    x = M.domain.randn()
    torch.testing.assert_close(M(x), torch.stack([A(s) for s in x.unbind(dim)], dim))
    al.assert_adjoint(M)
    assert M.H.H is M


def test_map_over_a_free_number_of_slices_and_over_free_sizes() -> None:
    A = blur()
    free = al.map(A)
    for n in (1, 3):
        x = torch.randn(n, 6, dtype=torch.float64)
        torch.testing.assert_close(free(x), torch.stack([A(s) for s in x]))
    batched = al.linear_operator(lambda x: x.diff(), (2, 5), batch_dims=1)
    M = al.map(batched, 1, 3)
    assert M(torch.randn(7, 3, 5)).shape == (7, 3, 4)
    with pytest.raises(al.SpaceMismatchError, match="dim from 1 to 2"):
        al.map(batched, 0, 3)
    with pytest.raises(al.SpaceMismatchError, match="number of slices"):
        al.map(batched, 1)
    with pytest.raises(al.SpaceMismatchError, match="an integer of 1 or more"):
        al.map(batched, 1, 0)


def test_map_of_pytrees() -> None:
    A = al.linear_operator(lambda x: {"a": x["a"].diff(), "b": x["a"].sum() + x["b"]}, {"a": (4,), "b": (2,)})
    M = al.map(A, 0, 3)
    x = M.domain.randn()
    for k in range(3):
        one = A({name: leaf[k] for name, leaf in x.items()})
        for name, leaf in M(x).items():
            torch.testing.assert_close(leaf[k], one[name])
    al.assert_adjoint(M)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_kron_is_the_matrix_of_that_name(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(m, n, dtype=dtype, generator=draw) for m, n in ((3, 4), (5, 2)))
    K = al.kron(al.matrix(a), al.matrix(b))
    torch.testing.assert_close(al.to_dense(K), torch.kron(a, b))
    torch.testing.assert_close(al.to_dense(K.H), torch.kron(a, b).mH)
    x = K.domain.randn()
    torch.testing.assert_close(K(x), a @ x @ b.mT)


def test_kron_of_images_and_of_pairs() -> None:
    images = al.linear_operator(nn.AvgPool2d(2).double(), torch.zeros(1, 4, 4, dtype=torch.float64))
    K = al.kron(images, foreign())
    assert K.domain.specs[0].shape == (1, 4, 4, 6)
    x = K.domain.randn()
    torch.testing.assert_close(K(x), nn.functional.avg_pool2d(x.diff().movedim(-1, 0), 2).movedim(0, -1))
    al.assert_adjoint(K)


def test_kron_refuses_what_is_no_single_tensor() -> None:
    A = blur()
    with pytest.raises(al.SpaceMismatchError, match="single tensors with batch_dims=0"):
        al.kron(A, al.vstack([A, A]))
    with pytest.raises(al.SpaceMismatchError, match="the dtype and device that B returns"):
        al.kron(A, blur(dtype=torch.float32))
    with pytest.raises(al.SpaceMismatchError, match=r"wrap it with al\.linear_operator"):
        al.kron(A, nn.Identity())


def test_complexify_is_the_same_matrix_on_complex_elements() -> None:
    A = blur()
    C = al.complexify(A)
    torch.testing.assert_close(al.to_dense(C), al.to_dense(A).to(torch.complex128))
    assert C.is_complex_linear
    al.assert_adjoint(C)
    x = C.domain.randn()
    torch.testing.assert_close(C(x.conj()), C(x).conj())
    with pytest.raises(al.SpaceMismatchError, match="between real spaces"):
        al.complexify(C)
    with pytest.raises(al.SpaceMismatchError, match="no complex numbers of this dtype"):
        al.complexify(al.identity(torch.zeros(3, dtype=torch.bfloat16)))


@pytest.mark.parametrize(
    "f", [torch.fft.fft, torch.fft.rfft, torch.real, torch.conj, lambda x: (x.real, 1j * x)],
    ids=["complex", "from real", "to real", "antilinear", "pytree"],
)  # fmt: skip
def test_real_view_is_the_same_map(f: Any) -> None:
    domain = torch.zeros(4, dtype=torch.float64 if f is torch.fft.rfft else torch.complex128)
    A = al.linear_operator(f, domain)
    R = A.real_view
    assert not R.domain.is_complex
    assert not R.codomain.is_complex
    al.assert_adjoint(R)

    def seen(x: Any) -> Any:
        return torch.utils._pytree.tree_map(lambda t: torch.view_as_real(t.resolve_conj()) if t.is_complex() else t, x)

    x, y = A.domain.randn(), A.codomain.randn()
    for operator, element, real in ((A, x, R), (A.H, y, R.H)):
        torch.testing.assert_close(real(seen(element)), seen(operator(element)))
    assert R.real_view is R


def test_real_view_is_differentiable() -> None:
    R = al.linear_operator(torch.fft.fft, torch.zeros(3, dtype=torch.complex128)).real_view
    x = R.domain.randn().requires_grad_()
    assert torch.autograd.gradcheck(R, x)
    assert torch.autograd.gradgradcheck(R, x)


def test_inverse_is_the_pseudo_inverse_and_its_adjoint_that_of_the_adjoint() -> None:
    draw = torch.Generator().manual_seed(1)
    for shape in ((5, 3), (3, 5), (4, 4)):
        A = al.matrix(torch.randn(shape, dtype=torch.float64, generator=draw))
        B = A.inverse(al.solvers.lsmr, atol=1e-13, btol=1e-13)
        pinv = torch.linalg.pinv(al.to_dense(A))
        torch.testing.assert_close(torch.stack([B(e) for e in torch.eye(shape[0]).double()], 1), pinv)
        torch.testing.assert_close(torch.stack([B.H(e) for e in torch.eye(shape[1]).double()], 1), pinv.T)


def test_inverse_says_that_it_did_not_converge_and_refuses_a_weight() -> None:
    A = al.matrix(torch.vander(torch.linspace(0, 1, 8, dtype=torch.float64)))
    with pytest.warns(al.ConvergenceWarning, match="maxiter was reached"):
        A.inverse(al.solvers.cgls, maxiter=1)(torch.ones(8, dtype=torch.float64))
    with pytest.raises(al.SpaceMismatchError, match="fit A and Aᴴ alike, got weight"):
        A.inverse(al.solvers.cgls, weight=torch.ones(8))
    with pytest.raises(al.SpaceMismatchError, match="a solver such as"):
        A.inverse(3)  # type: ignore[arg-type]


def test_inverse_is_differentiable() -> None:
    A, y = al.matrix(torch.tensor([[2.0, 1.0], [0.0, 3.0]]).double()), torch.ones(2, dtype=torch.float64)
    assert torch.autograd.gradcheck(A.inverse(al.solvers.cgls, tol=1e-13), y.requires_grad_())


def test_shape_and_dtype_are_those_of_the_matrix() -> None:
    A = al.linear_operator(torch.fft.rfft, (8,))
    assert (A.shape, A.dtype) == ((5, 8), torch.complex64)
    assert A.shape == tuple(al.to_dense(A).shape)
    assert (al.vstack([A, A]).H.shape, A.double().dtype) == ((8, 10), torch.complex128)


def test_sum_of_a_list() -> None:
    A = blur()
    x = A.domain.randn()
    torch.testing.assert_close(sum([A, A, 2 * A])(x), 4 * A(x))
    with pytest.raises(TypeError, match="unsupported operand"):
        3 + A  # type: ignore[operator]


@pytest.mark.parametrize(
    "lift", [lambda A: al.map(A, 0, 3), lambda A: al.kron(A, A), al.complexify, lambda A: al.complexify(A).real_view],
    ids=["map", "kron", "complexify", "real_view"],
)  # fmt: skip
def test_lifted_operators_move_copy_and_follow_their_part(lift: Any) -> None:
    c = nn.Conv1d(1, 1, 3, padding=1, bias=False)
    L = lift(al.linear_operator(c, (1, 1, 4)))
    x = L.domain.randn()
    twin = copy.deepcopy(L)
    torch.testing.assert_close(twin(x), L(x))
    with torch.no_grad():
        c.weight.mul_(2)
    assert torch.dist(twin(x), L(x)) > 0.1
    L(x).abs().sum().backward()
    assert c.weight.grad is not None
    L.double()
    wide = L.domain.randn()
    assert wide.dtype in {torch.float64, torch.complex128}
    al.assert_adjoint(L)
    assert L.codomain.norm(L(wide)) > 0


def test_lifted_operators_can_be_pickled() -> None:
    L = al.map(al.complexify(al.linear_operator(nn.AvgPool1d(2), (1, 4))), 1, 3)
    again = pickle.loads(pickle.dumps(L))
    x = L.domain.randn()
    torch.testing.assert_close(again(x), L(x))
    assert str(again) == str(L)


def test_move_of_a_multiple_of_a_real_to_complex_map() -> None:
    A = 2 * al.linear_operator(torch.fft.rfft, (8,))
    A.double()
    assert A.codomain.specs[0].dtype == torch.complex128
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        al.assert_adjoint(A)
