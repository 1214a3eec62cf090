"""The suites compare with the matrix of a claimed adjoint, and with the dot test of a pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import adjointlab as al


def claimed_matrix(adjoint: Callable[[Any], Any], A: al.LinearOperator) -> Tensor:
    """Return the matrix of a library's own adjoint in real coordinates, one call for each column."""
    columns = []
    for index, spec in enumerate(A.codomain.specs):
        parts = torch.eye(spec.numel, dtype=spec.dtype)
        for unit in (1, 1j) if spec.is_complex else (1,):
            for row in unit * parts:
                leaves = [torch.zeros(s.shape, dtype=s.dtype) for s in A.codomain.specs]
                leaves[index] = row.reshape(spec.shape)
                with torch.enable_grad():  # some libraries take gradients inside
                    columns.append(A.domain.vector(adjoint(A.codomain.unflatten(leaves))).detach())
    dense = torch.stack(columns, 1)
    return torch.cat([dense.real, dense.imag]) if dense.is_complex() else dense


def relative_gap(found: Tensor, expected: Tensor) -> float:
    """Return `‖found − expected‖_F / ‖expected‖_F`."""
    scale = torch.linalg.matrix_norm(expected.double())
    gap = torch.linalg.matrix_norm(found.double() - expected.double())
    return float(gap / scale) if scale else float(gap)


def assert_derived_adjoint(A: al.LinearOperator, steps: int = 64) -> Tensor:
    """Assert that `A.H` is the transpose of A in real coordinates, and passes the dot test; return its matrix."""
    report = al.check_adjoint(A)
    assert report.passed, str(report)
    forward, backward = al.to_dense(A, real=True), al.to_dense(A.H, real=True)
    assert relative_gap(backward, forward.T) <= steps * max(A.domain.eps, A.codomain.eps)
    return backward
