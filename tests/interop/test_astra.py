"""ASTRA's projectors as pairs: matched ones pass, others are named, and derivatives pass through them.

ASTRA is no requirement of the tests, which are skipped where it is not installed (``pip install astra-toolbox``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import adjointlab as al

astra = pytest.importorskip("astra", exc_type=ImportError)
pytestmark = pytest.mark.cpu

SIZE, ANGLES, CELLS = 24, 20, 36


def projections(beam: str, forward: str, back: str) -> dict[str, Any]:
    """Return the arguments of `from_pair` for a projector, and the back-projector of another one."""
    turn = np.linspace(0, 2 * np.pi if beam == "fan" else np.pi, ANGLES, endpoint=False)
    if beam == "fan":
        geometry = astra.create_proj_geom("fanflat", 1.5, CELLS, turn, 100.0, 50.0)
    else:
        geometry = astra.create_proj_geom("parallel", 1.0, CELLS, turn)
    volume = astra.create_vol_geom(SIZE, SIZE)
    W, V = (astra.OpTomo(astra.create_projector(kind, geometry, volume)) for kind in (forward, back))
    spaces = {"domain": (SIZE, SIZE), "codomain": (ANGLES, CELLS)}
    return {"f": W.FP, "adjoint": V.BP, "arrays": "numpy", **spaces}


def phantom() -> Tensor:
    image = torch.zeros(SIZE, SIZE)
    image[6:15, 8:18] = 1
    return image


@pytest.mark.parametrize(
    ("beam", "kind"),
    [
        ("parallel", "line"),
        ("parallel", "linear"),
        ("parallel", "strip"),
        ("fan", "line_fanflat"),
        ("fan", "strip_fanflat"),
    ],
)
def test_a_projector_and_its_own_back_projector(beam: str, kind: str) -> None:
    A = al.from_pair(**projections(beam, kind, kind))
    y = A(phantom())
    solution = al.solvers.cgls(A, y, damp=2.0, tol=1e-5)
    assert solution.converged, solution.reason
    dense = al.to_dense(A).double()
    normal = dense.T @ dense + 4 * torch.eye(SIZE**2, dtype=torch.float64)
    exact = torch.linalg.solve(normal, dense.T @ y.double().reshape(-1))
    # A gradient of 1e-5 leaves an error of 1e-5 / damp² times that at zero.
    bound = 1e-5 / 4 * float(torch.linalg.vector_norm(A.H(y)))
    assert float(torch.linalg.vector_norm(solution.x.reshape(-1) - exact)) <= bound


@pytest.mark.parametrize(
    ("beam", "kinds"), [("parallel", ("linear", "strip")), ("fan", ("line_fanflat", "strip_fanflat"))]
)
def test_another_back_projector_is_named(beam: str, kinds: tuple[str, str]) -> None:
    with pytest.raises(al.AdjointMismatchError, match=r"roughly Aᴴ: \d+\.\d% off, as with another interpolation"):
        al.from_pair(**projections(beam, *kinds))
    A = al.from_pair(**projections(beam, *kinds), check=False)
    assert "another interpolation" in al.solvers.cgls(A, A(phantom()), maxiter=5).reason


def test_unrolled_steps_against_finite_differences() -> None:
    A = al.from_pair(**projections("parallel", "linear", "linear"))
    truth, tau = phantom(), float(1 / al.operator_norm(A) ** 2)
    data = A(truth)

    def loss(step: Tensor, y: Tensor) -> Tensor:
        x = torch.zeros_like(truth)
        for _ in range(5):
            x = (x - step * A.H(A(x) - y)).clamp(min=0)
        return (x - truth).double().square().sum()

    step = torch.tensor(tau)
    found = torch.autograd.grad(loss(step.requires_grad_(), data.requires_grad_()), (step, data))
    with torch.no_grad():
        h, v = 0.01 * tau, torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
        along_step = float(loss(step + h, data) - loss(step - h, data)) / (2 * h)
        along_data = float(loss(step, data + 0.05 * v) - loss(step, data - 0.05 * v)) / 0.1
    # The objective is a polynomial of low degree between kinks; differences of float32 have three digits here.
    assert float(found[0]) == pytest.approx(along_step, rel=1e-3)
    assert float((found[1] * v).sum()) == pytest.approx(along_data, rel=1e-2)
