"""mrpro, both ways: derived adjoints beside its own, and its solvers on our operators."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import adjointlab as al

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mrpro = pytest.importorskip("mrpro")
    bridge = pytest.importorskip("adjointlab.adapters.mrpro")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
EPS = torch.finfo(torch.float32).eps


def blur() -> al.LinearOperator[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    c = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect", bias=False, dtype=torch.float64)
    return al.linear_operator(c, (1, 1, 6, 6), batch_dims=1)


def test_an_operator_of_ours_passes_their_tests_of_adjoints() -> None:
    A = blur()
    B = bridge.to_mrpro(A)
    x, y = A.domain.randn(), A.codomain.randn()
    torch.testing.assert_close(B(x)[0], A(x), rtol=0, atol=0)
    torch.testing.assert_close(B.H(y)[0], A.H(y), rtol=0, atol=0)
    assert abs(torch.vdot(B(x)[0].flatten(), y.flatten()) - torch.vdot(x.flatten(), B.adjoint(y)[0].flatten())) < 1e-12
    torch.testing.assert_close((B.H @ B)(x)[0], A.gram(x))
    torch.testing.assert_close((2 * B + B @ B)(x)[0], 2 * A(x) + A(A(x)))
    assert [id(p) for p in B.parameters()] == [id(p) for p in A.parameters()]


def test_their_conjugate_gradients_solve_with_our_operator() -> None:
    A = blur()
    H = bridge.to_mrpro(A.gram + 0.1 * al.identity(A.domain))
    x = A.domain.randn()
    with torch.no_grad():
        (found,) = mrpro.algorithms.optimizers.cg(H, H(x), max_iterations=200, tolerance=1e-12)
    torch.testing.assert_close(found, x)


def test_an_operator_of_theirs_has_their_adjoint() -> None:
    for theirs, x in (
        (mrpro.operators.FastFourierOp(dim=(-2, -1)), torch.zeros(1, 1, 1, 8, 8, dtype=torch.complex64)),
        (mrpro.operators.FiniteDifferenceOp(dim=(-1, -2), mode="forward"), torch.zeros(4, 5)),
        (mrpro.operators.SensitivityOp(torch.randn(1, 3, 1, 4, 4) + 0j), torch.zeros(2, 1, 1, 4, 4) + 0j),
    ):
        A = bridge.from_mrpro(theirs, x)
        y = A.codomain.randn()
        assert float((A.H(y) - theirs.adjoint(y)[0]).norm()) <= 64 * EPS * float(A.H(y).norm())
        assert A.engine == "traced"


def test_there_and_back() -> None:
    A = blur()
    again = bridge.from_mrpro(bridge.to_mrpro(A), A.domain, batch_dims=1)
    y = torch.randn(3, 1, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(again.H(y), A.H(y))
    torch.testing.assert_close(copy.deepcopy(again).H(y), A.H(y))


def test_others_are_refused() -> None:
    A = blur()
    with pytest.raises(al.SpaceMismatchError, match="between single tensors"):
        bridge.to_mrpro(al.vstack([A, A]))
    with pytest.raises(al.SpaceMismatchError, match="a linear operator of mrpro, got Conv1d"):
        bridge.from_mrpro(nn.Conv1d(1, 1, 3), (1, 1, 8))
