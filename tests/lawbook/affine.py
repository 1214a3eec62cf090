"""Laws of affine operators: `f(x) = A x + b`, with `Aᴴ` the adjoint of the linear part."""

from __future__ import annotations

from laws import (
    Case,
    assert_acts_as,
    assert_close,
    call,
    draw,
    eps,
    frobenius,
    in_widest_dtype,
    is_affine,
    is_every_tenth,
    is_linear,
    law,
    no_side_effects,
    norm,
    once,
)

import adjointlab as al


@law(is_affine)
def affine_value_is_the_function(case: Case) -> None:
    f, (function, _) = case.f, case.build()
    x = draw(f.linear.domain)
    expected = call(function, x)
    scale = frobenius(case.dense) * norm(x) + norm(f.offset)
    assert_close(f(x), expected, eps(f.linear.domain), scale)


@law(is_affine)
def offset_is_the_value_at_zero(case: Case) -> None:
    f, (function, domain) = case.f, case.build()
    assert_close(f.offset, call(function, domain), eps(f.linear.domain))


@law(is_affine)
def affine_value_is_the_linear_part_plus_the_offset(case: Case) -> None:
    f = case.f
    x = draw(f.linear.domain)
    assert_close(f(x), f.linear(x) + f.offset, eps(f.linear.domain), norm(f.linear(x)) + norm(f.offset))


@law(is_affine)
def affine_adjoint_is_that_of_the_linear_part(case: Case) -> None:
    f = case.f
    assert_acts_as(f.H, case.dense.T, draw(f.linear.codomain), eps(f.linear.domain))


@law(is_affine)
def affine_adjoint_is_a_linear_operator(case: Case) -> None:
    f = case.f
    assert isinstance(f.linear, al.LinearOperator)
    assert f.H is f.linear.H
    assert f.H.H is f.linear


@law(is_linear, is_every_tenth, in_widest_dtype, once)
def linear_maps_are_affine_with_offset_zero(case: Case) -> None:
    f = al.affine_operator(*case.build())
    assert norm(f.offset) == 0
    assert_acts_as(f.H, case.dense.T, draw(f.linear.codomain), eps(f.linear.domain))


@law(is_affine, in_widest_dtype, once)
def making_and_calling_an_affine_operator_changes_nothing(case: Case) -> None:
    function, domain = case.build()
    with no_side_effects(function, domain):
        f = al.affine_operator(function, domain)
        f.H(f(draw(f.linear.domain)))
