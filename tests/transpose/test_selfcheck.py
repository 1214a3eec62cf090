"""What differs from the eager reference is not used: the comparison names it."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import adjointlab as al
from adjointlab.transpose.selfcheck import Maps, disagreement

Leaves = tuple[torch.Tensor, ...]


def said(change: Callable[[Maps], Maps]) -> str:
    source = al.linear_operator(nn.Conv1d(1, 1, 3, bias=False), (1, 1, 16)).source
    derived = source._derived[()]
    reference = Maps(source.reference.flat, source.reference.adjoint, source.domain, source.codomain)
    candidate = change(Maps(derived.function, derived.adjoint, source.domain, source.codomain))
    with torch.no_grad():
        sample = source.reference.sample(*source._random(()), tuple(state.read() for state in derived.state))
    return disagreement(reference, candidate, sample, source.captured, derived.state, compiled=False)


def scaled(function: Callable[[Leaves], Leaves], factor: float) -> Callable[[Leaves], Leaves]:
    return lambda leaves: tuple(factor * t for t in function(leaves))


def test_what_agrees_is_passed_without_a_word() -> None:
    assert not said(lambda maps: maps)


@pytest.mark.parametrize("factor", [1.0001, -1.0, 0.0, float("nan")])
def test_a_wrong_function_or_adjoint_is_named(factor: float) -> None:
    forward = said(lambda m: Maps(scaled(m.function, factor), m.adjoint, m.domain, m.codomain))
    adjoint = said(lambda m: Maps(m.function, scaled(m.adjoint, factor), m.domain, m.codomain))
    assert "the derived forward differs" in forward
    assert "the derived adjoint differs" in adjoint


def test_a_lost_gradient_in_parameters_is_named() -> None:
    def detached(maps: Maps) -> Maps:
        return Maps(
            lambda leaves: tuple(t.detach() for t in maps.function(leaves)), maps.adjoint, maps.domain, maps.codomain
        )

    assert "the gradient in weight differs" in said(detached)


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])  # the second is inductor's, of strides
def test_what_raises_is_named(kind: type[Exception]) -> None:
    def raising(leaves: Leaves) -> Leaves:
        raise kind("no such kernel")

    assert "failed (no such kernel)" in said(lambda m: Maps(raising, m.adjoint, m.domain, m.codomain))
