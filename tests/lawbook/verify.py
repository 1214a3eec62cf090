"""Laws of the dot-product test: it passes for every adjoint and fails for every wrong one."""

from __future__ import annotations

import torch
from laws import Case, in_widest_dtype, is_linear, law, no_side_effects, once, tree_map

import adjointlab as al


def is_not_zero(case: Case) -> bool:
    return bool(case.dense.any())  # any multiple of zero is its adjoint


@law(is_linear, in_widest_dtype)
def derived_adjoint_passes_the_check_with_a_tolerance_of_a_few_eps(case: Case) -> None:
    A = case.A
    with no_side_effects(A):
        report = al.check_adjoint(A)
    assert report.passed, report
    assert report.error <= report.tolerance
    assert report.diagnosis == ""
    assert 0 < report.tolerance <= 16 * max(A.domain.eps, A.codomain.eps)


@law(is_linear, in_widest_dtype, once, is_not_zero)
def scaled_adjoint_fails_the_check(case: Case) -> None:
    A = case.A
    eps = max(A.domain.eps, A.codomain.eps)
    assert not al.check_adjoint(A, lambda y: tree_map(lambda leaf: leaf * (1 + 1e3 * eps), A.H(y))).passed


@law(is_linear, in_widest_dtype, once, is_not_zero)
def negated_adjoint_fails_the_check(case: Case) -> None:
    A = case.A
    report = al.check_adjoint(A, lambda y: tree_map(torch.neg, A.H(y)))
    assert not report.passed
    assert report.error > report.tolerance
    assert report.diagnosis != ""


@law(is_linear, in_widest_dtype, once)
def shifted_adjoint_fails_the_check(case: Case) -> None:
    A = case.A
    wrong = tree_map(torch.ones_like, A.domain.zeros())
    assert not al.check_adjoint(A, lambda y: tree_map(torch.add, A.H(y), wrong)).passed
