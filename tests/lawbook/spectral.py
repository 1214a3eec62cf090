"""Laws of dense matrices and norms."""

from __future__ import annotations

import torch
from laws import Case, assert_close, draw, in_widest_dtype, law, leaves, no_side_effects, norm, once

import adjointlab as al

# Where these do not hold, a matrix of complex entries cannot say what the operator does: see the laws of `real=True`.


def is_complex_linear_where_its_domain_is_complex(case: Case) -> bool:
    return case.A.is_complex_linear or not case.A.domain.is_complex


def is_complex_linear_where_a_side_is_complex(case: Case) -> bool:
    return case.A.is_complex_linear or not (case.A.domain.is_complex or case.A.codomain.is_complex)


def single(A: al.LinearOperator) -> bool:
    return len(leaves(A.domain.zeros())) == len(leaves(A.codomain.zeros())) == 1


@law(in_widest_dtype, once)
def real_matrix(case: Case) -> None:
    A = case.A
    dense = al.to_dense(A, real=True)
    reference = case.dense
    assert dense.shape == reference.shape
    if single(A):  # the order of coordinates of several leaves is not laid down
        assert_close(dense.double(), reference, max(A.domain.eps, A.codomain.eps))
    else:
        gap = float(torch.linalg.matrix_norm(dense.double()) - torch.linalg.matrix_norm(reference))
        assert abs(gap) <= 16 * max(A.domain.eps, A.codomain.eps) * float(torch.linalg.matrix_norm(reference))


@law(in_widest_dtype, once)
def real_matrix_of_the_adjoint_is_the_transpose(case: Case) -> None:
    A = case.A
    dense = al.to_dense(A, real=True)
    assert_close(al.to_dense(A.H, real=True).double(), dense.double().T, max(A.domain.eps, A.codomain.eps), norm(dense))


@law(in_widest_dtype, once, is_complex_linear_where_its_domain_is_complex)
def dense_matrix_acts_as_the_operator(case: Case) -> None:
    A = case.A
    x = draw(A.domain)
    dense = al.to_dense(A)
    assert dense.shape == (A.codomain.size, A.domain.size)
    vector, expected = A.domain.vector(x), A.codomain.vector(A(x))
    wide = torch.promote_types(dense.dtype, vector.dtype)
    found = dense.to(wide) @ vector.to(wide)
    assert_close(found, expected.to(wide), A.domain.eps, norm(dense) * norm(x))


@law(in_widest_dtype, once, is_complex_linear_where_a_side_is_complex)
def dense_matrix_of_the_adjoint_is_the_conjugate_transpose(case: Case) -> None:
    A = case.A
    dense = al.to_dense(A)
    adjoint = al.to_dense(A.H)
    assert_close(adjoint, dense.mH.to(adjoint.dtype), A.domain.eps, norm(dense))


@law(in_widest_dtype, once)
def norm_is_the_largest_singular_value(case: Case) -> None:
    A = case.A
    with no_side_effects(A):
        found = float(al.operator_norm(A))
    expected = float(torch.linalg.matrix_norm(case.dense, 2))
    # The default asks for as much as single precision gives.
    assert abs(found - expected) <= 16 * torch.finfo(torch.float32).eps ** 0.5 * expected
