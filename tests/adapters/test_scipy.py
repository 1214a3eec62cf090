"""SciPy, both ways: matrices, dtypes, its solvers and decompositions on our operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as ss
import scipy.sparse.linalg as sp
import torch
from laws import cases, operator
from operator_zoo import ZOO, Entry
from torch import Tensor, nn

import adjointlab as al
from adjointlab.adapters.scipy import from_scipy, to_scipy


def matrix_of(scipy_operator: Any) -> np.ndarray:
    return scipy_operator @ np.eye(scipy_operator.shape[1], dtype=scipy_operator.dtype)


def gap(a: Any, b: Any) -> float:
    scale = max(np.linalg.norm(np.asarray(a)), np.linalg.norm(np.asarray(b)), 1e-300)
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / scale)


SOME = ("conv2d-reflect-", "conv1d-unbatched", "conv2d-complex-kernel-on-real", "fft", "conj", "tuple", "dict")


@pytest.mark.parametrize(("entry", "dtype"), [case for case in cases(ZOO) if case.id.startswith(SOME)])
def test_matrix_and_its_adjoint(entry: Entry, dtype: torch.dtype) -> None:
    A = operator(entry, dtype, "traced")
    S = to_scipy(A)
    expected = al.to_dense(A, real=None if A.is_complex_linear else True).cpu().numpy()
    bound = 64 * max(A.domain.eps, A.codomain.eps)
    assert gap(matrix_of(S), expected) <= bound
    assert gap(matrix_of(S.H), expected.conj().T) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
def test_dtype_is_preserved(dtype: torch.dtype) -> None:
    A = al.linear_operator(nn.Linear(4, 3, bias=False, dtype=dtype), torch.zeros(4, dtype=dtype))
    S = to_scipy(A)
    expected = torch.empty(0, dtype=dtype).cpu().numpy().dtype
    x = np.ones(4, expected)
    assert S.dtype == S.matvec(x).dtype == S.rmatvec(np.ones(3, expected)).dtype == expected
    assert from_scipy(S, device=torch.get_default_device()).domain == al.Space.of((4,), dtype=dtype)


def test_dtypes_that_numpy_lacks_are_refused() -> None:
    A = al.identity(al.Space.of((2,), dtype=torch.bfloat16))
    with pytest.raises(al.SpaceMismatchError, match=r"convert the operator"):
        to_scipy(A)


def test_read_only_and_foreign_arrays_are_taken_and_never_changed() -> None:
    S = to_scipy(al.identity(al.Space.of((3,), dtype=torch.float64)))
    x = np.arange(3.0)
    x.setflags(write=False)
    y = S.matvec(x)
    assert np.array_equal(y, x)
    y += 1  # what comes back is the caller's
    assert np.array_equal(x, np.arange(3.0))
    assert np.array_equal(S.matvec(np.arange(6)[::2]), [0.0, 2.0, 4.0])


@pytest.mark.cpu
def test_memory_is_shared_where_it_can_be() -> None:
    pointers = []

    def forward(x: Tensor) -> Tensor:
        pointers.append(x.data_ptr())
        return 2 * x

    space = al.Space.of((3,), dtype=torch.float64)
    x = np.arange(3.0)
    to_scipy(al.LinearOperator(forward, forward, space, space)).matvec(x)
    assert pointers == [x.ctypes.data]


def test_a_real_operator_acts_on_complex_vectors() -> None:
    A = al.linear_operator(nn.Linear(4, 3, bias=False, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
    x = np.arange(4) + 1j
    assert gap(to_scipy(A).matvec(x), al.to_dense(A).detach().cpu().numpy() @ x) <= 16 * A.domain.eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_solvers_of_scipy(dtype: torch.dtype) -> None:
    w = torch.randn(9, 5, dtype=dtype)
    A = al.linear_operator(lambda x: w @ x, torch.zeros(5, dtype=dtype))
    S, y = to_scipy(A), torch.randn(9, dtype=dtype)
    expected = torch.linalg.lstsq(w, y[:, None]).solution[:, 0].cpu().numpy()
    bound = 1e4 * A.domain.eps * float(torch.linalg.cond(w)) ** 2
    for solver in (sp.lsqr, sp.lsmr):
        assert gap(solver(S, y.cpu().numpy(), atol=1e-14, btol=1e-14)[0], expected) <= bound
    values = torch.linalg.svdvals(w).cpu().numpy()
    assert gap(np.sort(sp.svds(S, k=2)[1]), values[:2][::-1]) <= bound
    assert gap(np.sort(sp.eigsh(to_scipy(A.gram), k=2)[0]), values[:2][::-1] ** 2) <= bound


def test_real_linear_maps_through_real_views() -> None:
    A = al.linear_operator(torch.fft.rfft, torch.zeros(6, dtype=torch.float64))
    S = to_scipy(A)
    assert (S.shape, S.dtype) == ((8, 6), np.float64)
    values = torch.linalg.svdvals(al.to_dense(A, real=True)).cpu()
    assert gap(sp.svds(S, k=1)[1], values[:1]) <= 1e3 * A.domain.eps


@pytest.mark.parametrize("make", [ss.csr_array, np.asarray, sp.aslinearoperator])
@pytest.mark.parametrize("dtype", [np.float32, np.complex128, np.int64])
def test_from_scipy(make: Any, dtype: Any) -> None:
    dense = (np.arange(6).reshape(2, 3) * (1 + 2j if dtype is np.complex128 else 1)).astype(dtype)
    A = from_scipy(make(dense))
    assert gap(al.to_dense(A), dense) == 0
    assert gap(al.to_dense(A.H), dense.conj().T) == 0
    al.assert_adjoint(A)


def test_from_scipy_is_differentiable() -> None:
    A = from_scipy(np.arange(6.0).reshape(2, 3), device=torch.get_default_device())
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(A, x)
    assert torch.autograd.gradgradcheck(lambda x: A(x).square(), x)


def test_there_and_back() -> None:
    A = al.linear_operator(nn.Conv1d(1, 2, 3, bias=False, dtype=torch.complex128), (1, 1, 7))
    assert gap(al.to_dense(from_scipy(to_scipy(A))), al.to_dense(A).cpu()) <= 16 * A.domain.eps


def test_what_comes_back_is_no_part_of_what_was_given() -> None:
    S = sp.LinearOperator((2, 3), matvec=lambda x: x[1:], rmatvec=lambda y: np.append(0, y), dtype=np.float64)
    x = torch.arange(3.0, dtype=torch.float64)
    y = from_scipy(S, device=x.device)(x)
    y += 10
    assert torch.equal(x, torch.arange(3.0, dtype=torch.float64))


def test_workspaces_and_writes_of_a_foreign_operator_do_no_harm() -> None:
    workspace = np.zeros(2)

    def matvec(x: np.ndarray) -> np.ndarray:
        workspace[:] = 2 * x
        x[:] = -1
        return workspace

    A = from_scipy(sp.LinearOperator((2, 2), matvec=matvec, rmatvec=matvec, dtype=np.float64))
    x = torch.ones(2, dtype=torch.float64, device="cpu")
    for B in (A, A.H):
        first, second = B(x), B(3 * x)
        assert torch.equal(first, 2 * x)
        assert torch.equal(second, 6 * x)
        assert torch.equal(x, torch.ones_like(x))


@pytest.mark.cpu
def test_imaginary_parts_of_a_real_operator_are_refused() -> None:
    turned = sp.LinearOperator((2, 2), matvec=lambda x: (1 + 1j) * x, rmatvec=lambda y: y, dtype=np.float64)
    A = from_scipy(turned, check=False)
    with pytest.raises(al.SpaceMismatchError, match="declare the operator complex"):
        A(torch.ones(2, dtype=torch.float64))
    rounded = sp.LinearOperator(
        (5, 5), matvec=lambda x: np.fft.ifft(np.fft.fft(x)), rmatvec=lambda y: np.fft.ifft(np.fft.fft(y)), dtype=float
    )
    al.assert_adjoint(from_scipy(rounded))


def test_a_wrong_rmatvec_is_refused() -> None:
    with pytest.raises(al.AdjointMismatchError, match=r"2\.000 × too large"):
        from_scipy(sp.LinearOperator((3, 3), matvec=lambda x: x, rmatvec=lambda y: 2 * y, dtype=np.float64))


@pytest.mark.parametrize("make", [ss.csr_array, sp.aslinearoperator])
@pytest.mark.parametrize("batch", [(5,), (2, 3)])
def test_batches_of_vectors(make: Any, batch: tuple[int, ...]) -> None:
    dense = np.arange(6.0).reshape(2, 3) + 1
    A = from_scipy(make(dense), batch_dims=len(batch))
    x, y = A.domain.with_batch(batch).randn(), A.codomain.with_batch(batch).randn()
    assert gap(A(x), x @ torch.from_numpy(dense).T) <= 16 * A.domain.eps
    assert gap(A.H(y), y @ torch.from_numpy(dense)) <= 16 * A.domain.eps
    al.assert_adjoint(A)
