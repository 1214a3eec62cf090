"""Pairs of functions from outside: each is the other's derivative, in every mode of differentiation."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import numpy as np
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


# -- opaque functions under transforms ---------------------------------------------------------------------------------


def test_transforms_of_hidden_pairs() -> None:
    A, m = pair().cpu(), MATRIX
    x, v = (torch.randn(n, dtype=m.dtype, device="cpu") for n in (3, 2))
    eps = A.domain.eps
    assert_close(torch.func.jvp(A, (x,), (x,))[1], m @ x, eps)
    assert_close(torch.func.vjp(A, x)[1](v)[0], m.T @ v, eps)
    assert_close(torch.func.jacrev(A)(x), m, eps)
    assert_close(torch.func.jacfwd(A)(x), m, eps)
    assert_close(torch.func.hessian(lambda x: A(x).square().sum())(x), 2 * m.T @ m, eps)
    assert_close(
        torch.func.grad(lambda x: torch.func.grad(lambda z: A(z).pow(3).sum())(x) @ x)(x), 9 * m.T @ (m @ x) ** 2, eps
    )
    stack = torch.stack([x, 2 * x, -x])
    assert_close(torch.func.vmap(A)(stack), stack @ m.T, eps)
    assert_close(torch.func.vmap(A, in_dims=1, out_dims=1)(stack.T), m @ stack.T, eps)
    assert_close(torch.func.vmap(torch.func.grad(lambda x: A(x).square().sum()))(stack), 2 * stack @ m.T @ m, eps)
    assert_close(torch.func.jvp(torch.func.vmap(A), (stack,), (stack,))[1], stack @ m.T, eps)
    assert_close(al.to_dense(A), m, eps)


@pytest.mark.cpu
def test_a_transform_runs_the_whole_batch_at_once() -> None:
    calls = []

    def product(x: np.ndarray) -> np.ndarray:
        calls.append(x.shape)
        return x @ MATRIX.numpy().T

    spaces = [al.Space.of((1, n), dtype=torch.float64, batch_dims=1) for n in (3, 2)]
    A = al.from_pair(product, lambda y: y @ MATRIX.numpy(), *spaces, arrays="numpy", batch_dims=1)
    A(torch.ones(2, 3, dtype=torch.float64, requires_grad=True))  # finds what autograd sees
    calls.clear()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    assert_close(torch.func.vmap(A)(x), x @ MATRIX.T, A.domain.eps)
    assert calls == [(20, 3)]


def test_gradients_of_parameters_remain_under_transforms() -> None:
    p = torch.tensor(3.0, dtype=torch.float64)
    space = al.Space.of((3,), dtype=torch.float64)
    A = al.LinearOperator(lambda x: x + p * x.detach(), lambda y: (1 + p) * y, space, space)
    x = torch.randn(2, 3, dtype=torch.float64)
    assert_close(torch.func.vmap(torch.func.grad(lambda x: A(x).sum()))(x), torch.full_like(x, 4.0), space.eps)
    p.requires_grad_()  # after what autograd sees of A was found
    for run in (lambda: torch.func.vmap(A)(x), lambda: torch.stack([A(one.requires_grad_()) for one in x.detach()])):
        assert_close(torch.autograd.grad(run().sum(), p)[0], x.sum(), space.eps)
    assert_close(torch.func.jvp(A, (x[0],), (x[0],))[1].detach(), 4 * x[0], space.eps)


# -- arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.cpu
def test_arrays_share_the_memory_of_tensors() -> None:
    given, returned = [], []

    def product(x: np.ndarray) -> np.ndarray:
        given.append(x.ctypes.data)
        found = MATRIX.numpy() @ x
        returned.append(found.ctypes.data)
        return found

    spaces = [al.Space.of((n,), dtype=torch.float64) for n in (3, 2)]
    A = al.from_pair(product, lambda y: MATRIX.numpy().T @ y, *spaces, arrays="numpy")
    x = torch.randn(3, dtype=torch.float64)
    y = A(x)
    assert (given[-1], returned[-1]) == (x.data_ptr(), y.data_ptr())
    assert torch.autograd.gradcheck(A, x.requires_grad_(), check_forward_ad=True)
    for B in (copy.deepcopy(A), A.gram):
        assert al.check_adjoint(B).passed
    with pytest.raises(al.SpaceMismatchError, match="from_dlpack"):
        al.from_pair(product, product, *spaces, arrays="math")
    for arrays in ("np", np):
        with pytest.raises(al.SpaceMismatchError, match="expected arrays to name a module, such as 'numpy'"):
            al.from_pair(product, product, *spaces, arrays=arrays)


@pytest.mark.cpu
def test_arrays_that_tensors_cannot_share_are_copied() -> None:
    space = al.Space.of({"a": (3,), "b": (1,)}, dtype=torch.float64)

    def mirror(x: dict[str, Any]) -> dict[str, Any]:
        return {"a": x["a"][::-1], "b": np.broadcast_to(2 * x["b"], (1,))}

    A = al.from_pair(mirror, mirror, space, space, arrays="numpy")
    x = space.randn()
    assert torch.equal(A(x)["a"], x["a"].flip(0))


# -- what is not matched -----------------------------------------------------------------------------------------------


def unmatched(n: int, factor: float, noise: float) -> dict[str, Any]:
    """Return a square matrix and a claimed adjoint that is off by a factor and by noise, of NumPy arrays."""
    draw = np.random.default_rng(0)
    M, E = draw.standard_normal((2, n, n))
    return {
        "f": lambda x: M @ x, "adjoint": lambda y: factor * ((M + noise * E).T @ y),
        "domain": al.Space.of((n,), dtype=torch.float64, device="cpu"),
        "codomain": al.Space.of((n,), dtype=torch.float64, device="cpu"), "arrays": "numpy",
    }  # fmt: skip


@pytest.mark.parametrize("n", [20, 600])  # of the larger one, no dense matrix is made
@pytest.mark.parametrize(
    ("factor", "noise", "match"),
    [
        (0.5, 0.0, r"Aᴴ is 2\.000 × too small"),
        (1.0, 0.1, r"roughly Aᴴ: .*% off, as with another interpolation or discretisation \(an unmatched pair\)"),
        (0.25, 0.1, r".*another interpolation .*, and about (4|4\.1|3\.9) × too small"),
        (1.0, 3.0, "unrecognised.*"),
    ],
)
def test_unmatched_pairs_are_named(n: int, factor: float, noise: float, match: str) -> None:
    with pytest.raises(al.AdjointMismatchError, match=rf"\A{match}\n"):
        al.from_pair(**unmatched(n, factor, noise))


def test_solvers_say_what_an_unchecked_adjoint_costs() -> None:
    for factor, noise, words in (
        (0.5, 0.0, r"2\.000 × too small"),
        (1.0, 0.1, "another interpolation"),
        (1.0, 9.0, "not near"),
    ):
        A = al.from_pair(**unmatched(30, factor, noise), check=False)
        y = A.codomain.randn(torch.Generator().manual_seed(0))
        for B in (A, al.vstack([A, al.identity(A.domain)]), pickled(A)):
            data = (y, y) if B.codomain != A.codomain else y
            assert re.search(words, al.solvers.cgls(B, data, maxiter=5).reason), words
    right = al.from_pair(**unmatched(30, 1.0, 0.0), check=False)
    assert "adjoint" not in al.solvers.cgls(right, y, maxiter=5).reason
    assert "adjoint" not in al.solvers.cgls(al.from_pair(**unmatched(30, 1.0, 0.0)), y, maxiter=5).reason


def pickled(A: al.LinearOperator) -> al.LinearOperator:
    """Return a copy, as a pickle is made of a recipe, but of functions that a pickle cannot hold."""
    with pytest.raises((pickle.PicklingError, AttributeError), match=r"lambda|local"):
        pickle.dumps(A)
    return copy.deepcopy(A)


def test_functions_that_overwrite_are_refused() -> None:
    workspace = torch.zeros(3)

    def reuse(x: Tensor) -> Tensor:
        return torch.mul(x, 2, out=workspace)

    def overwrite(x: Tensor) -> Tensor:
        x *= 2
        return x.clone()

    double = lambda x: 2 * x  # noqa: E731
    for pair, match in (
        ((reuse, double), "f to leave its last result"),
        ((double, reuse), "the adjoint to leave its last result"),
        ((overwrite, double), "f to leave its argument"),
        ((double, overwrite), "writes to its argument"),
    ):
        with torch.no_grad(), pytest.raises(al.AdjointMismatchError, match=match):
            al.from_pair(*pair, (3,), (3,))


# torch.compile looks at .grad of what a graph that ends passes on.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_derivatives_remain_in_compiled_functions() -> None:
    A = pair().cpu()
    x = torch.randn(3, dtype=torch.float64, device="cpu", requires_grad=True)
    run = torch.compile(lambda x: (2 * A(x)).sum() + x.sum(), backend="eager")
    for _ in range(2):  # before and after it is known that autograd does not see through A
        (found,) = torch.autograd.grad(run(x), x)
        assert_close(found, 2 * MATRIX.sum(0) + 1, A.domain.eps)


def test_hidden_functions_are_no_constants_of_a_trace() -> None:
    spaces = [al.Space.of((n,), dtype=torch.float64, device="cpu") for n in (3, 2)]
    A = al.from_pair(lambda x: MATRIX.numpy() @ x, lambda y: MATRIX.numpy().T @ y, *spaces, arrays="numpy")
    x = torch.randn(3, dtype=torch.float64, device="cpu")
    with pytest.raises(RuntimeError, match="take its result for a constant"):
        torch.func.linearize(A, x)
    B = al.linear_operator(lambda x: 2 * A(x.cumsum(0)), A.domain)
    assert B.engine == "eager"
    assert_close(B(x), 2 * MATRIX @ x.cumsum(0), A.domain.eps)
    assert al.check_adjoint(B).passed
