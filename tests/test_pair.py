"""Pairs of functions from outside: each is the other's derivative, in every mode of differentiation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import assert_close
from torch import Tensor

import adjointlab as al

MATRIX = torch.arange(6.0, dtype=torch.float64, device="cpu").reshape(2, 3) + torch.eye(2, 3, device="cpu")


def hidden(matrix: Tensor) -> Any:
    """Return `x ↦ Mx` through NumPy, which autograd cannot see through."""
    return lambda x: torch.from_numpy(matrix.numpy() @ x.detach().cpu().numpy()).to(x.device)


def pair() -> al.LinearOperator:
    spaces = [al.Space.of((n,), dtype=torch.float64) for n in (3, 2)]
    return al.from_pair(hidden(MATRIX), hidden(MATRIX.T), *spaces)


def test_gradients_pass_through_numpy() -> None:
    A = pair()
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, dtype=torch.float64, requires_grad=True)
    for B, z in ((A, x), (A.H, y), (A.gram, x), (2 * A, x), (al.vstack([A, A]).H, (y, y))):
        inputs = z if isinstance(z, tuple) else (z,)
        assert torch.autograd.gradcheck(lambda *t, B=B: B(t if len(t) > 1 else t[0]), inputs)
        assert torch.autograd.gradgradcheck(
            lambda *t, B=B: B(t if len(t) > 1 else t[0]).square(), inputs, check_fwd_over_rev=False
        )
    assert torch.autograd.gradcheck(A, x, check_forward_ad=True)


def test_gradients_of_parameters_remain() -> None:
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    spaces = [al.Space.of((n,), dtype=torch.float64) for n in (3, 2)]
    A = al.LinearOperator(lambda x: w.exp() @ x, lambda y: w.exp().T @ y, *spaces)
    x, y = torch.randn(3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)

    def value(w_: Tensor, x: Tensor) -> Tensor:
        B = al.LinearOperator(lambda x: w_.exp() @ x, lambda y: w_.exp().T @ y, *spaces)
        return B(B.H(B(x)))

    assert torch.autograd.gradcheck(value, (w, x.requires_grad_()))
    assert torch.autograd.gradgradcheck(value, (w, x))
    (found,) = torch.autograd.grad(A(x.detach()) @ y, w)
    assert_close(found, torch.outer(y, x.detach()) * w.detach().exp(), A.domain.eps)


def test_a_partly_hidden_function_has_the_adjoint_as_derivative() -> None:
    p = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    space = al.Space.of((3,), dtype=torch.float64)
    A = al.LinearOperator(lambda x: x + p * x.detach(), lambda y: (1 + p) * y, space, space)
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(A(x).sum(), (x, p))
    assert_close(found[0], torch.full((3,), 4.0, dtype=torch.float64), space.eps)
    assert_close(found[1], x.detach().sum(), space.eps)
    with pytest.raises(RuntimeError, match="second ones"):
        torch.autograd.grad(A(x).sum(), p, create_graph=True)


def test_transforms_of_pairs() -> None:
    m = MATRIX.to(torch.get_default_device())
    A = al.LinearOperator(lambda x: m @ x, lambda y: m.T @ y, *(al.Space.of((n,), dtype=m.dtype) for n in (3, 2)))
    x, v = torch.randn(3, dtype=m.dtype), torch.randn(2, dtype=m.dtype)
    assert_close(torch.func.jvp(A, (x,), (x,))[1], m @ x, A.domain.eps)
    assert_close(torch.func.vjp(A, x)[1](v)[0], m.T @ v, A.domain.eps)
    assert_close(torch.func.jacrev(A)(x), m, A.domain.eps)
    assert_close(torch.func.jacfwd(A)(x), m, A.domain.eps)
    assert_close(torch.func.hessian(lambda x: A(x).square().sum())(x), 2 * m.T @ m, A.domain.eps)
    assert_close(torch.func.vmap(A)(torch.stack([x, 2 * x])), torch.stack([m @ x, 2 * m @ x]), A.domain.eps)


def test_complex_pairs_of_pytrees() -> None:
    def forward(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():  # hides it
            return 2j * x["p"], x["p"].sum() + x["q"].mean() * torch.ones(2, dtype=torch.complex128)

    def adjoint(y: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            total = y[1].sum()
            return {"q": total.expand(4) / 4, "p": -2j * y[0] + total}

    domain = al.Space.of({"p": (3,), "q": (4,)}, dtype=torch.complex128)
    codomain = al.Space.of([(3,), (2,)], dtype=torch.complex128)
    codomain = al.Space.of(tuple(codomain.zeros()))
    A = al.from_pair(forward, adjoint, domain, codomain)
    x = domain.randn()
    assert torch.autograd.gradcheck(
        lambda p, q: A({"q": q, "p": p}), (x["p"].requires_grad_(), x["q"].requires_grad_())
    )


def test_batches() -> None:
    A = al.from_pair(lambda x: x[:, 1:], lambda y: torch.nn.functional.pad(y, (1, 0)), (1, 3), (1, 2), batch_dims=1)
    x = torch.ones(5, 3, requires_grad=True)
    assert_close(torch.autograd.grad(A(x).sum(), x)[0], torch.tensor([0.0, 1.0, 1.0]).expand(5, 3), 1e-7)


def test_wrong_pairs_are_refused() -> None:
    with pytest.raises(al.AdjointMismatchError, match=r"-1|sign|factor"):
        al.from_pair(lambda x: x, lambda y: -y, (3,), (3,))
    with pytest.raises(al.AdjointMismatchError, match="adjoint test FAILED"):
        al.from_pair(lambda x: x[1:], lambda y: torch.nn.functional.pad(y, (0, 1)), (3,), (2,))
    with pytest.raises(al.SpaceMismatchError, match="adjoint to be a function"):
        al.from_pair(lambda x: x, None, (3,), (3,))  # type: ignore[arg-type]
    assert al.from_pair(lambda x: x, lambda y: -y, (3,), (3,), check=False).domain.size == 3
