"""Derived functions that are wrong are not used: the self-check names what is wrong with them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from built import broken, operator, prefer, source
from laws import assert_close
from torch import Tensor, nn

import adjointlab as al
from adjointlab.transpose import selfcheck
from adjointlab.transpose.selfcheck import Candidate, Pair, Sketch

Leaves = tuple[Tensor, ...]
Change = Callable[[Leaves], Leaves]


derived = functools.cache(source)


def said(function: object, domain: object, change: Callable[[Candidate], Candidate], **options: object) -> str:
    """Return what the self-check says of the derived functions of a map once they are changed."""
    made = derived(function, domain, **options)
    derivation, pair = made.nominal, Pair(made.domain, made.codomain)
    functions = [derivation.function(name) for name in ("function", "linear", "adjoint")]
    candidate = change(Candidate(*functions, made.domain, made.codomain))
    seen = Sketch.of(made.eager.called(pair.x), pair.y)
    affine = made.options.affine
    return selfcheck.disagreement(candidate, seen, made.eager.called, affine=affine, compiled=False)


def with_(name: str, change: Change) -> Callable[[Candidate], Candidate]:
    """Return a change of one of the functions, or of both that are the forward."""

    def changed(candidate: Candidate) -> Candidate:
        names = ("function", "linear") if name == "forward" else (name,)
        return replace(candidate, **{n: followed(getattr(candidate, n)) for n in names})

    def followed(function: Change) -> Change:
        return lambda leaves: change(function(leaves))

    return changed


CONV = nn.Conv1d(1, 1, 3, bias=False)
BIASED = nn.Conv1d(1, 1, 3)
DTYPES = (torch.float32, torch.float64, torch.complex128)
CONVOLUTIONS = {dtype: nn.Conv1d(1, 1, 3, bias=False, dtype=dtype) for dtype in DTYPES}


def test_right_ones_are_passed_without_a_word() -> None:
    assert not said(CONV, (1, 1, 16), lambda candidate: candidate)
    assert not said(BIASED, (1, 1, 16), lambda candidate: candidate, affine=True)


@pytest.mark.parametrize("factor", [1.0001, -1.0, 0.0, float("nan")])
@pytest.mark.parametrize("dtype", CONVOLUTIONS)
def test_a_wrong_forward_or_adjoint_is_named(factor: float, dtype: torch.dtype) -> None:
    layer, spec = CONVOLUTIONS[dtype], al.TensorSpec((1, 1, 16), dtype)
    scale: Change = lambda leaves: tuple(factor * t for t in leaves)  # noqa: E731
    assert "the derived forward differs" in said(layer, spec, with_("forward", scale))
    assert "the derived adjoint fails the dot test" in said(layer, spec, with_("adjoint", scale))


@pytest.mark.parametrize("entry", [0, 7, 15])
def test_one_wrong_entry_is_seen(entry: int) -> None:
    def spoiled(leaves: Leaves) -> Leaves:
        (t,) = leaves
        t = t.clone()
        t.view(-1)[entry % t.numel()] += 1e-3 * t.norm()
        return (t,)

    for name, what in (("forward", "the derived forward"), ("adjoint", "the derived adjoint")):
        assert what in said(CONV, (1, 1, 16), with_(name, spoiled))


@pytest.mark.parametrize("factor", [1e-7, 1.0, 1e7])
def test_a_large_leaf_hides_no_small_one(factor: float) -> None:
    outputs: Callable[[Tensor], Leaves] = lambda x: (factor * x, x.flip(0))  # noqa: E731
    inputs: Callable[[Tensor, Tensor], Tensor] = lambda x, z: factor * x + z.flip(0)  # noqa: E731
    two = (torch.zeros(6), torch.zeros(6))
    for wrong in (0, 1):

        def flipped(leaves: Leaves, wrong: int = wrong) -> Leaves:
            return tuple(-t if i == wrong else t for i, t in enumerate(leaves))

        def one_sided(candidate: Candidate, change: Change = flipped) -> Candidate:
            return replace(candidate, adjoint=lambda v: candidate.adjoint(change(v)))

        assert "forward differs" in said(outputs, (6,), with_("forward", flipped))
        assert "dot test" in said(inputs, two, with_("adjoint", flipped))
        assert "dot test" in said(outputs, (6,), one_sided)


def test_a_wrong_linear_part_is_named() -> None:
    shifted: Change = lambda leaves: tuple(t + 1 for t in leaves)  # noqa: E731
    assert "linear part differs" in said(BIASED, (1, 1, 16), with_("linear", shifted), affine=True)


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError])  # the second is inductor's, of strides
def test_an_error_is_named(kind: type[Exception]) -> None:
    def refuse(leaves: Leaves) -> Leaves:
        raise kind("no such kernel")

    assert "failed (no such kernel)" in said(CONV, (1, 1, 16), with_("function", refuse))


@pytest.mark.parametrize("name", ["flipped", "fft", "tapped"])
@pytest.mark.parametrize(
    "change", [lambda t: 3 * t, lambda t: t.roll(1, -1), lambda t: t * (1 + 1e-3 * torch.randn_like(t))]
)
def test_wrong_kernels_are_not_used(name: str, change: Callable[[Tensor], Tensor]) -> None:
    layer = nn.Conv2d(1, 1, 7, padding=3, bias=False, dtype=torch.float64)
    A = operator(layer, (1, 1, 20, 20), prefer(broken(name, change)))
    assert A.engine == "traced"
    assert "lowered: the derived" in A.explain()
    x, v = A.domain.randn(), A.codomain.randn()
    assert_close(A(x), layer(x), A.domain.eps)
    assert_close(A.H(v), torch.func.vjp(layer, x)[1](v)[0], A.domain.eps)


class Doubling(torch.autograd.Function):
    """The identity, whose backward says that it doubles."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, v: Tensor) -> Tensor:
        return 2 * v


class Straight(torch.autograd.Function):
    """A weight is rounded; its gradient is not."""

    @staticmethod
    def forward(w: Tensor) -> Tensor:
        return w.round()

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, v: Tensor) -> Tensor:
        return v


def test_a_custom_backward_that_is_not_the_adjoint_is_refused_or_passed_by() -> None:
    with pytest.raises(al.NotDifferentiableError, match='derivative="forward"'):
        al.linear_operator(Doubling.apply, (4,))
    A = al.linear_operator(Doubling.apply, (4,), derivative="forward")
    v = torch.randn(4)
    assert torch.equal(A.H(v), v)
    assert "autograd's own adjoint differs by 5.0e-01" in A.explain()
    assert al.check_adjoint(A).passed


def test_what_is_detached_is_differentiated_by_its_operations() -> None:
    f: Callable[[Tensor], Tensor] = lambda x: x + 2 * x.detach()  # noqa: E731
    with pytest.raises(al.NotDifferentiableError, match="detach"):
        al.linear_operator(f, (4,))
    A = al.linear_operator(f, (4,), derivative="forward")
    assert torch.equal(A.H(torch.ones(4)), torch.full((4,), 3.0))


def test_gradients_in_parameters_are_those_of_the_author() -> None:
    weight = nn.Parameter(torch.tensor([1.4, 2.6]))
    A = al.linear_operator(lambda x: Straight.apply(weight) * x, (2,))
    (gradient,) = torch.autograd.grad(A(torch.ones(2)).sum(), weight)
    assert torch.equal(gradient, torch.ones(2))
    assert A.engine == "eager"
    assert "gradient in weight differs from autograd's" in A.explain()


def test_lower_precision_inside_is_taken_with_a_tolerance() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.fft.fft(x.to(torch.complex64)).to(torch.complex128)

    spec = al.TensorSpec((64,), torch.complex128)
    A = al.linear_operator(f, spec, tol=1e-5)
    assert A.engine == "traced"
    x, v = A.domain.randn(), A.codomain.randn()
    assert abs(A.codomain.inner(A(x), v) - A.domain.inner(x, A.H(v))) < 1e-5 * 64
    wrong = nn.Conv1d(1, 1, 3, bias=False, dtype=torch.float64)
    assert "dot test" in said(wrong, (1, 1, 16), with_("adjoint", lambda t: (1.01 * t[0],)), tol=1e-5)
