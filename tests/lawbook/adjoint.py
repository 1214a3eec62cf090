"""Laws of the adjoint: it is the conjugate transpose, changes nothing, and is the derivative."""

from __future__ import annotations

import torch
from laws import (
    Case,
    assert_close,
    call,
    distance,
    dot_error,
    draw,
    eps,
    exact,
    frobenius,
    in_widest_dtype,
    inner,
    law,
    leaves,
    matrix,
    no_side_effects,
    norm,
    tree_map,
)


def is_complex_linear(case: Case) -> bool:
    # Otherwise only the real part of ⟨·, ·⟩ has an adjoint, and the bilinear form has no transpose.
    return case.A.is_complex_linear


def has_a_complex_side(case: Case) -> bool:
    return case.A.domain.is_complex or case.A.codomain.is_complex


@law()
def forward_is_the_function(case: Case) -> None:
    A = case.A
    function, domain = case.build()
    x = draw(A.domain)
    expected = call(function, x)
    if case.entry.affine:
        expected = tree_map(torch.sub, expected, call(function, domain))
    scale = frobenius(case.dense) * norm(x) + norm(call(function, domain))
    assert_close(A(x), expected, eps(A.domain, A.codomain), scale)


@law()
def adjoint_is_the_conjugate_transpose(case: Case) -> None:
    A = case.A
    dense = case.dense
    adjoint = matrix(A.H, A.codomain.zeros())
    assert_close(adjoint, dense.T.contiguous(), eps(A.domain, A.codomain), frobenius(dense))


@law()
def dot_product(case: Case) -> None:
    A = case.A
    x, y = draw(A.domain, 1), draw(A.codomain, 2)
    real = not A.is_complex_linear
    assert dot_error(A, A.H, x, y, real) <= 16 * eps(A.domain, A.codomain)


@law(in_widest_dtype)
def values_are_elements_of_the_spaces(case: Case) -> None:
    A = case.A
    A.codomain.check(A(draw(A.domain)))
    A.domain.check(A.H(draw(A.codomain)))


@law(in_widest_dtype)
def adjoint_of_the_adjoint_is_the_operator(case: Case) -> None:
    A = case.A
    assert A.H.H is A
    assert A.H is A.H


@law(in_widest_dtype)
def adjoint_swaps_the_spaces(case: Case) -> None:
    A = case.A
    assert A.H.domain == A.codomain
    assert A.H.codomain == A.domain


@law(exact)
def transpose_is_the_adjoint_between_conjugations(case: Case) -> None:
    A = case.A
    y = draw(A.codomain)
    expected = tree_map(torch.conj, A.H(tree_map(torch.conj, y)))
    assert_close(A.T(y), expected, eps(A.domain), frobenius(case.dense) * norm(y))


@law(in_widest_dtype, is_complex_linear)
def transpose_satisfies_the_bilinear_identity(case: Case) -> None:
    A = case.A
    x, y = draw(A.domain, 1), draw(A.codomain, 2)
    left = inner(tree_map(torch.conj, A(x)), y)
    right = inner(tree_map(torch.conj, x), A.T(y))
    bound = 16 * eps(A.domain) * frobenius(case.dense) * norm(x) * norm(y)
    assert abs(left - right) <= bound


@law(exact, has_a_complex_side)
def complex_linearity(case: Case) -> None:
    assert case.A.is_complex_linear == case.entry.complex_linear
    assert case.A.H.is_complex_linear == case.entry.complex_linear


@law(exact)
def engine_in_force(case: Case) -> None:
    A = case.A
    assert A.engine == (case.engine if case.entry.traced else "eager")


# --------------------------------------------------------------------------------------------------- nothing is changed


@law()
def calls_change_nothing(case: Case) -> None:
    A = case.A
    x, y = draw(A.domain), draw(A.codomain)
    with no_side_effects(A, x, y):
        A(x)
        A.H(y)


@law(in_widest_dtype)
def outputs_share_no_memory_across_calls(case: Case) -> None:
    A = case.A
    y = draw(A.codomain)
    first = A.H(y)
    kept = tree_map(torch.clone, first)
    A.H(tree_map(lambda leaf: 2 * leaf, y))
    assert distance(first, kept) == 0


# ------------------------------------------------------------------------------------- A and Aᴴ are mutual derivatives


def pulled_back(function, x, v):
    """Return the vector-Jacobian product of `function` at `x` by plain autograd."""
    inputs = tree_map(lambda leaf: leaf.clone().requires_grad_(), x)
    attached = [(out, g) for out, g in zip(leaves(function(inputs)), leaves(v), strict=True) if out.requires_grad]
    outputs, cotangents = zip(*attached, strict=True)
    gradients = torch.autograd.grad(outputs, leaves(inputs), cotangents, allow_unused=True)
    found = iter(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves(inputs), strict=True))
    return tree_map(lambda _: next(found), x)


@law(exact)
def derivative_of_the_operator_is_the_adjoint(case: Case) -> None:
    A = case.A
    x, y = draw(A.domain, 1), draw(A.codomain, 2)
    assert_close(pulled_back(A, x, y), A.H(y), eps(A.domain), frobenius(case.dense) * norm(y))


@law(exact)
def derivative_of_the_adjoint_is_the_operator(case: Case) -> None:
    A = case.A
    x, y = draw(A.domain, 1), draw(A.codomain, 2)
    assert_close(pulled_back(A.H, y, x), A(x), eps(A.domain), frobenius(case.dense) * norm(x))
