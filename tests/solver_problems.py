"""Problems with known solutions, for the tests of the solvers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from laws import norm
from torch import Tensor

import adjointlab as al

DTYPES = [torch.float64, torch.complex128, torch.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
LEAST_SQUARES: dict[str, Callable[..., al.solvers.Solution]] = {
    "cgls": lambda A, y, tol=1e-12, **o: al.solvers.cgls(A, y, tol=tol, **o),
    "lsmr": lambda A, y, tol=1e-12, **o: al.solvers.lsmr(A, y, atol=tol, btol=tol, **o),
}
every_solver = pytest.mark.parametrize("solve", LEAST_SQUARES.values(), ids=LEAST_SQUARES)


def dense(m: int, n: int, dtype: torch.dtype = torch.float64) -> tuple[al.LinearOperator, Tensor]:
    matrix = torch.randn(m, n, dtype=dtype)
    return al.linear_operator(lambda x: matrix @ x, torch.zeros(n, dtype=dtype)), matrix


def positive(n: int, dtype: torch.dtype = torch.float64) -> tuple[al.LinearOperator, Tensor]:
    root = torch.randn(n, n, dtype=dtype)
    matrix = root @ root.mH / n + torch.eye(n)
    return al.linear_operator(lambda x: matrix @ x, torch.zeros(n, dtype=dtype)), matrix


def close(found: Tensor, expected: Tensor, matrix: Tensor, tol: float = 1e-12, power: int = 2) -> bool:
    """Return whether an error is what a tolerance and rounding explain: `κ^power (tol + 16 eps)` of the norm."""
    expected = expected.to(found.dtype)
    condition = float(torch.linalg.cond(matrix))
    bound = condition**power * (tol + 16 * torch.finfo(found.dtype).eps) * norm(expected)
    return norm(found - expected) <= bound


def minimiser(matrix: Tensor, y: Tensor, damp: float = 0.0, weight: Tensor | None = None) -> Tensor:
    matrix, y = (
        matrix.to(torch.promote_types(matrix.dtype, torch.float64)),
        y.to(torch.promote_types(y.dtype, torch.float64)),
    )
    w = torch.ones(len(y), dtype=torch.float64) if weight is None else weight
    normal = matrix.mH @ (w[:, None] * matrix) + damp**2 * torch.eye(matrix.shape[1], dtype=torch.float64)
    return torch.linalg.solve(normal, matrix.mH @ (w * y))
