"""What the suites compare with: the matrix of a claimed adjoint, and the dot test of a pair."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import adjointlab as al


def claimed_matrix(adjoint: Callable[[Any], Any], A: al.LinearOperator) -> Tensor:
    """Return the real matrix of a library's own adjoint, one call for each column."""
    claimed = al.LinearOperator(adjoint, A, A.codomain, A.domain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return al.to_dense(claimed, real=True)


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
