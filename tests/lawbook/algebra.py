"""Laws of the algebra of operators, which is the same whatever engine derived its parts."""

from __future__ import annotations

import torch
from laws import (
    Case,
    assert_acts_as,
    assert_close,
    draw,
    eps,
    frobenius,
    in_widest_dtype,
    inner,
    is_every_tenth,
    law,
    matrix,
    norm,
    once,
    tree_map,
)

import adjointlab as al


def has_complex_values(case: Case) -> bool:
    # Otherwise a complex multiple is not in the space, and is refused: see test_linear_operator.py.
    return all(spec.dtype.is_complex for spec in case.A.codomain.specs)


def scaling(space: al.Space, seed: int = 5) -> tuple[al.LinearOperator, torch.Tensor]:
    """Return a diagonal operator on a space, and its matrix made without it."""
    d = draw(space, seed)
    return al.diagonal(d), matrix(lambda x: tree_map(torch.mul, d, x), space.zeros())


@law(in_widest_dtype, once)
def adjoint_of_a_product(case: Case) -> None:
    A = case.A
    B, b = scaling(A.domain)
    a = case.dense
    scale = frobenius(a) * frobenius(b)
    assert_acts_as(A @ B, a @ b, draw(A.domain), eps(A.domain), scale)
    assert_acts_as((A @ B).H, b.T @ a.T, draw(A.codomain), eps(A.domain), scale)


@law(in_widest_dtype, once)
def adjoint_of_a_sum_and_difference(case: Case) -> None:
    A = case.A
    B, b = scaling(A.domain)
    a = case.dense
    scale = frobenius(a) * (1 + frobenius(b))
    assert_acts_as((A + A @ B).H, (a + a @ b).T, draw(A.codomain), eps(A.domain), scale)
    assert_acts_as((A - A @ B).H, (a - a @ b).T, draw(A.codomain), eps(A.domain), scale)


@law(in_widest_dtype, once)
def adjoint_of_a_multiple(case: Case) -> None:
    A = case.A
    y = draw(A.codomain)
    scale = 4 * frobenius(case.dense) * norm(y)
    c = 2 - 3j if A.domain.is_complex and A.is_complex_linear else -1.5
    expected = tree_map(lambda leaf: complex(c).conjugate() * leaf if isinstance(c, complex) else c * leaf, A.H(y))
    for multiple in (c * A, A * c, A / (1 / c)):
        assert_close(multiple.H(y), expected, eps(A.domain), scale)


@law(in_widest_dtype, once, has_complex_values)
def adjoint_of_a_complex_multiple(case: Case) -> None:
    A = case.A
    y = draw(A.codomain)
    # True of maps that are only real-linear as well: (cA)ᴴ = Aᴴ c̄.
    scale = 4 * frobenius(case.dense) * norm(y)
    expected = A.H(tree_map(lambda leaf: (2 + 3j) * leaf, y))
    assert_close(((2 - 3j) * A).H(y), expected, eps(A.domain), scale)


@law(in_widest_dtype, once)
def negative(case: Case) -> None:
    A = case.A
    y = draw(A.codomain)
    in_order = torch.get_default_device().type == "cpu"  # elsewhere, sums have another order at each call
    assert_close((-A).H(y), tree_map(torch.neg, A.H(y)), 0 if in_order else eps(A.domain, A.codomain))


@law(in_widest_dtype, once)
def vertical_stack(case: Case) -> None:
    A = case.A
    a = case.dense
    stack = al.vstack([A, -2 * A])
    dense = torch.cat([a, -2 * a])
    assert_acts_as(stack, dense, draw(A.domain), eps(A.domain))
    assert_acts_as(stack.H, dense.T, draw(stack.codomain), eps(A.domain))


@law(in_widest_dtype, once)
def horizontal_stack(case: Case) -> None:
    A = case.A
    a = case.dense
    stack = al.hstack([A, 3 * A])
    dense = torch.cat([a, 3 * a], dim=1)
    assert_acts_as(stack, dense, draw(stack.domain), eps(A.domain))
    assert_acts_as(stack.H, dense.T, draw(A.codomain), eps(A.domain))


@law(in_widest_dtype, once)
def block_diagonal(case: Case) -> None:
    A = case.A
    a = case.dense
    blocks = al.block_diag([A, A.H])
    dense = torch.block_diag(a, a.T)
    assert_acts_as(blocks, dense, draw(blocks.domain), eps(A.domain))
    assert_acts_as(blocks.H, dense.T, draw(blocks.codomain), eps(A.domain))


@law(in_widest_dtype, once)
def gram_is_the_adjoint_after_the_operator(case: Case) -> None:
    A = case.A
    a = case.dense
    assert_acts_as(A.gram, a.T @ a, draw(A.domain), eps(A.domain), frobenius(a) ** 2)


@law(in_widest_dtype, once)
def gram_is_self_adjoint(case: Case) -> None:
    A = case.A
    x, z = draw(A.domain, 1), draw(A.domain, 2)
    gap = inner(A.gram(x), z) - inner(x, A.gram(z))
    bound = 16 * eps(A.domain) * frobenius(case.dense) ** 2 * norm(x) * norm(z)
    assert abs(gap if A.is_complex_linear else gap.real) <= bound
    assert_close(A.gram.H(x), A.gram(x), eps(A.domain), frobenius(case.dense) ** 2 * norm(x))


@law(in_widest_dtype, once)
def gram_is_positive(case: Case) -> None:
    A = case.A
    x = draw(A.domain)
    bound = 16 * eps(A.domain) * frobenius(case.dense) ** 2 * norm(x) ** 2
    assert abs(inner(A.gram(x), x).real - norm(A(x)) ** 2) <= bound


def returns_rows(case: Case) -> bool:
    codomain = case.A.codomain
    return len(codomain.specs) == 1 and bool(codomain.specs[0].shape) and isinstance(codomain.zeros(), torch.Tensor)


@law(in_widest_dtype, once, is_every_tenth, returns_rows)
def rows_are_those_of_the_result(case: Case) -> None:
    A = case.A
    x, shape = draw(A.domain), A.codomain.specs[0].shape
    dim = max(range(len(shape)), key=shape.__getitem__)
    rows = [shape[dim] - 1, 0]
    part = A.rows(rows, dim)
    assert_close(part(x), A(x).index_select(dim, torch.tensor(rows)), eps(A.domain), frobenius(case.dense) * norm(x))
    v = draw(part.codomain, 1)
    among = torch.zeros_like(A(x)).index_add(dim, torch.tensor(rows), v)
    assert_close(part.H(v), A.H(among), eps(A.domain), frobenius(case.dense) * norm(v))
