"""PyLops, both ways: its dot test, its solvers, and PyProximal's where it is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from laws import cases, operator
from operator_zoo import ZOO, Entry
from torch import nn

import adjointlab as al

pylops = pytest.importorskip("pylops")
bridge = pytest.importorskip("adjointlab.adapters.pylops")


def blur(dtype: torch.dtype = torch.float64) -> al.LinearOperator:
    c = nn.Conv2d(1, 2, 3, padding=1, bias=False, dtype=dtype).requires_grad_(False)
    return al.linear_operator(c, (1, 1, 6, 5))


def relative(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


SOME = ("conv2d-reflect-", "conv1d-unbatched", "conv2d-complex-kernel-on-real", "fft", "conj", "tuple", "dict")


@pytest.mark.parametrize(
    ("entry", "dtype"), [case for case in cases(ZOO) if case.id.startswith(SOME) and "float32" not in case.id]
)
def test_the_dot_test_of_pylops_passes(entry: Entry, dtype: torch.dtype) -> None:
    A = operator(entry, dtype, "traced")
    P = bridge.to_pylops(A)
    flag = (1 if A.domain.is_complex else 0) + (2 if A.codomain.is_complex else 0)
    rng = np.random.get_state()
    np.random.seed(0)
    try:
        # Its tolerance is relative to the products, which may cancel: so it is given, from the norms.
        scale = float(torch.linalg.matrix_norm(al.to_dense(A, real=True))) * (A.domain.size * A.codomain.size) ** 0.5
        pylops.utils.dottest(P, complexflag=flag, rtol=0, atol=64 * A.domain.eps * scale, raiseerror=True)
    finally:
        np.random.set_state(rng)


def test_shapes_and_names() -> None:
    P = bridge.to_pylops(blur())
    assert (P.dims, P.dimsd, P.clinear, P.dtype) == ((1, 1, 6, 5), (1, 2, 6, 5), True, np.float64)
    assert (P @ np.ones((1, 1, 6, 5))).shape == (1, 2, 6, 5)


@pytest.mark.parametrize("name", ["cgls", "lsqr"])
def test_solvers_of_pylops(name: str) -> None:
    A = blur()
    x = A.domain.randn(torch.Generator().manual_seed(0))
    solver = getattr(pylops, name)
    options = {"tol": 0} if name == "cgls" else {"atol": 1e-15, "btol": 1e-15, "conlim": 0}
    found = solver(bridge.to_pylops(A), A(x).cpu().numpy().ravel(), niter=120, **options)[0]
    condition = float(al.spectral.condition_number(A))
    assert relative(found.ravel(), x.cpu().numpy().ravel()) <= 1e3 * condition**2 * A.domain.eps


def test_algebra_with_operators_of_pylops() -> None:
    A = blur()
    both = pylops.VStack([bridge.to_pylops(A), pylops.Identity(30)])
    assert pylops.utils.dottest(both, rtol=1e-9, atol=1e-9)


def test_pyproximal_runs() -> None:
    proximal = pytest.importorskip("pyproximal")
    A = al.linear_operator(lambda x: torch.cat([x, 2 * x]), torch.zeros(8, dtype=torch.float64))
    x = torch.linspace(1, 2, 8, dtype=torch.float64)
    f = proximal.L2(Op=bridge.to_pylops(A), b=A(x).cpu().numpy())
    g = proximal.L1(sigma=1e-12)
    found = proximal.optimization.primal.ProximalGradient(f, g, x0=np.zeros(8), tau=0.1, niter=100)
    assert relative(found[0] if isinstance(found, tuple) else found, x.cpu().numpy()) <= 1e-6


@pytest.mark.parametrize(
    "make",
    [
        lambda: pylops.FirstDerivative((4, 5), axis=1, kind="forward"),
        lambda: pylops.signalprocessing.FFT(6, dtype="complex128"),
        lambda: pylops.signalprocessing.FFT(6, real=True, dtype="float64"),
        lambda: pylops.Real(5, dtype="complex128"),
        lambda: pylops.MatrixMult(np.arange(6.0).reshape(2, 3)),
    ],
    ids=["derivative", "fft", "rfft", "real", "matrix"],
)
def test_from_pylops(make: Any) -> None:
    P = make()
    A = bridge.from_pylops(P)
    assert A.domain.specs[0].shape == tuple(P.dims)
    assert A.codomain.specs[0].shape == tuple(P.dimsd)
    al.assert_adjoint(A)
    x = A.domain.randn(torch.Generator().manual_seed(0))
    assert np.array_equal(A(x).cpu().numpy().ravel(), P.matvec(x.cpu().numpy().ravel()))
    x.requires_grad_()
    assert torch.autograd.gradcheck(A, x)


def test_real_fft_maps_real_to_complex() -> None:
    A = bridge.from_pylops(pylops.signalprocessing.FFT(6, real=True, dtype="float64"))
    assert (A.domain.is_complex, A.codomain.is_complex) == (False, True)


def test_batches() -> None:
    P = pylops.FirstDerivative((4, 5), axis=0)
    A = bridge.from_pylops(P, batch_dims=1)
    x = A.domain.with_batch((3,)).randn()
    assert np.array_equal(A(x).cpu().numpy(), np.stack([P @ one for one in x.cpu().numpy()]))
    assert A.H(A(x)).shape == x.shape


def test_there_and_back() -> None:
    A = blur(torch.complex128)
    B = bridge.from_pylops(bridge.to_pylops(A), device=torch.get_default_device())
    assert (B.domain, B.codomain) == (A.domain, A.codomain)
    assert relative(al.to_dense(B).cpu(), al.to_dense(A).cpu()) <= 16 * A.domain.eps
