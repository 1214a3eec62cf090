"""Matrices as operators: dense, sparse in each layout, SciPy's and NumPy's; on images, on batches, with gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as ss
import torch
from laws import assert_close
from torch import Tensor, nn

import adjointlab as al

# Torch warns once in a process that makes sparse tensors.
pytestmark = [pytest.mark.filterwarnings(f"ignore:Sparse {what}") for what in ("CS[CR] tensor", "invariant checks")]

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def sparse(dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Return a dense matrix of 12 × 20 with many zeros, an empty row and an empty column."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.randn(12, 20, dtype=dtype, generator=draw) * (torch.rand(12, 20, generator=draw) < 0.3)
    found[3], found[:, 5] = 0, 0
    return found


def uncoalesced(dense: Tensor) -> Tensor:
    """Return a COO tensor that has each entry in two parts."""
    once = (dense / 2).to_sparse()
    return torch.sparse_coo_tensor(torch.cat([once.indices()] * 2, 1), once.values().repeat(2), dense.shape)


LAYOUTS: dict[str, Any] = {
    "dense": lambda dense: dense,
    "COO": Tensor.to_sparse,
    "COO, not coalesced": uncoalesced,
    "CSR": Tensor.to_sparse_csr,
    "CSC": Tensor.to_sparse_csc,
    "BSR": lambda dense: dense.to_sparse_bsr((4, 4)),
    "BSR of other blocks": lambda dense: dense.to_sparse_bsr((3, 4)),
    "BSC": lambda dense: dense.to_sparse_bsc((3, 4)),
    "SciPy CSR": lambda dense: ss.csr_array(dense.numpy()),
    "SciPy CSC": lambda dense: ss.csc_matrix(dense.numpy()),
    "SciPy COO": lambda dense: ss.coo_array(dense.numpy()),
    "NumPy": lambda dense: dense.numpy(),
}


@pytest.mark.cpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_matrix_is_its_own_dense_matrix(layout: str, dtype: torch.dtype) -> None:
    dense = sparse(dtype)
    A = al.matrix(LAYOUTS[layout](dense))
    assert A.engine == "traced"
    assert "the derivative does not read the input" in str(A.explain())
    assert_close(al.to_dense(A), dense, 4 * A.domain.eps)
    assert_close(al.to_dense(A.H), dense.mH, 4 * A.domain.eps)


@pytest.mark.cpu
@pytest.mark.parametrize("layout", ["dense", "CSR", "COO"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", [False, True], ids=["same field", "other field"])
def test_images_and_batches(layout: str, dtype: torch.dtype, other: bool) -> None:
    dense = sparse(dtype)
    field = dense.real.dtype if dtype.is_complex else torch.promote_types(dtype, torch.complex32)
    A = al.matrix(
        LAYOUTS[layout](dense), al.TensorSpec((3, 4, 5), field if other else dtype), codomain=(2, 6), batch_dims=1
    )
    for batch in (3, 1, 4):
        x = A.domain.with_batch((batch,)).randn()
        wide = dense.to(torch.promote_types(dtype, x.dtype))
        assert_close(A(x), (x.to(wide.dtype).reshape(batch, 20) @ wide.mT).reshape(batch, 2, 6), 8 * A.domain.eps)
    al.assert_adjoint(A)


@pytest.mark.cpu
@pytest.mark.parametrize("layout", ["dense", "COO", "CSR"])
def test_parameters_stay_parameters_and_learn(layout: str) -> None:
    dense = sparse(torch.float64)
    weight = nn.Parameter(LAYOUTS[layout](dense))
    A = al.matrix(weight)
    assert [p is weight for p in A.parameters()] == [True]
    x, y = A.domain.randn(), A.codomain.randn()
    dense = dense.clone()
    expected = torch.outer(y, x) * (1 if layout == "dense" else dense != 0)
    for found in (A(x) @ y, A.H(y) @ x):
        (gradient,) = torch.autograd.grad(found, [weight])
        assert gradient.layout == weight.layout
        assert_close(gradient.to_dense(), expected, 1e-15)
    with torch.no_grad():
        weight.values().mul_(2) if layout == "CSR" else weight.mul_(2)
    assert_close(A(x), 2 * dense @ x, 1e-15)
    assert_close(A.H(y), 2 * dense.mT @ y, 1e-15)


@pytest.mark.cpu
def test_the_memory_of_scipy_is_shared() -> None:
    held = ss.csr_array(sparse(torch.float64).numpy())
    A = al.matrix(held)
    x = A.domain.randn()
    held.data *= 3
    assert_close(A(x), torch.from_numpy(held @ x.numpy()), 1e-15)


@pytest.mark.cpu
def test_arrays_that_tensors_cannot_share() -> None:
    dense = np.arange(6.0).reshape(2, 3)
    fixed = dense.copy()
    fixed.setflags(write=False)
    twice = ss.csr_array((np.ones(4), np.array([2, 0, 0, 1]), np.array([0, 3, 4])), shape=(2, 3))
    for held in (dense[::-1], dense.astype(">f8"), fixed, dense[:, ::2], ss.coo_array(dense), twice):
        expected = torch.from_numpy(np.array(held.toarray() if ss.issparse(held) else held, dtype=float))
        assert_close(al.to_dense(al.matrix(held)), expected, 1e-15)


@pytest.mark.cpu
def test_integers_become_numbers() -> None:
    assert al.matrix([[1, 2], [3, 4]]).domain == al.Space.of((2,), dtype=torch.get_default_dtype())
    assert al.matrix(ss.csr_array(np.eye(3, dtype=np.int64))).domain.specs[0].dtype.is_floating_point


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: al.matrix(torch.zeros(3)), "expected a matrix"),
        (lambda: al.matrix(torch.zeros(2, 0)), "expected a matrix"),
        (lambda: al.matrix(ss.coo_array(np.ones(3))), "expected a matrix"),
        (lambda: al.matrix(np.eye(2, dtype=np.longdouble)), "numbers that tensors have"),
        (lambda: al.matrix(np.eye(2).astype(object)), "numbers that tensors have"),
        (lambda: al.matrix(torch.eye(4), domain=(5,)), "a domain with 4 entries"),
        (lambda: al.matrix(torch.eye(4), codomain=(5,)), "a codomain with 4 entries"),
        (lambda: al.matrix(torch.eye(4), domain=al.TensorSpec((4,), torch.float64)), "the precision and device"),
        (lambda: al.matrix(torch.eye(4), domain=((2,), (2,))), "a domain of one tensor"),
    ],
)
def test_what_does_not_fit_is_refused(made: Any, message: str) -> None:
    with pytest.raises(al.SpaceMismatchError, match=message):
        made()
