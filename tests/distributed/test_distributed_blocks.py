"""Rows, columns and blocks over processes equal the stacks of one process; solvers and checks are the same calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from parallel import ENGINES, assert_close, assert_same_everywhere, mesh_of, seeded
from processes import Group
from torch import nn

import adjointlab as al
from adjointlab import distributed
from adjointlab.solvers import cg, cgls, lsmr

pytestmark = pytest.mark.slow


def block(rank: int, dtype: torch.dtype, *, square: bool = False, engine: str = "eager") -> al.LinearOperator:
    """A blur of its own for each process, of as many outputs as it likes."""
    channels = 1 if square else 1 + rank % 2
    c = nn.Conv2d(1, channels, 3, padding=1, padding_mode="circular", bias=False, dtype=dtype)
    with torch.no_grad():
        c.weight.copy_(torch.randn(c.weight.shape, generator=seeded(rank), dtype=dtype))
    return al.linear_operator(c, al.TensorSpec((1, 1, 6, 5), dtype), engine=engine)


def stacked(
    kind: str, size: int, dtype: torch.dtype, engine: str = "eager"
) -> tuple[al.LinearOperator, al.LinearOperator]:
    """The operator over processes, and the one of a single process."""
    rank, mesh, square = torch.distributed.get_rank(), mesh_of(size), kind == "hstack"
    mine, whole = (
        block(rank, dtype, square=square, engine=engine),
        [block(r, dtype, square=square) for r in range(size)],
    )
    if kind == "hstack":
        mine, whole = mine.H, [part.H for part in whole]
    return getattr(distributed, kind)(mine, mesh), getattr(al, kind)(whole)


def part(space: al.Space, whole: Any) -> Any:
    """What this process has of an element."""
    return whole[torch.distributed.get_rank()] if isinstance(whole, tuple) else whole


@torch.no_grad()
def equal(kind: str, size: int, dtype: torch.dtype) -> None:
    A, single = stacked(kind, size, dtype, "auto")
    x, y = single.domain.randn(seeded(1)), single.codomain.randn(seeded(2))
    mine, yours = part(A.domain, x), part(A.codomain, y)
    assert (A.domain.size, A.codomain.size) == (single.domain.size, single.codomain.size)
    assert_close(A(mine), part(A.codomain, single(x)), units=128)
    assert_close(A.H(yours), part(A.domain, single.H(y)), units=128)
    inner = A.codomain.inner(A(mine), yours)
    eps = A.domain.eps
    size_of_inner = float(single.codomain.norm(single(x)) * single.codomain.norm(y))
    assert float(abs(inner - single.codomain.inner(single(x), y))) <= 16 * eps * size_of_inner
    assert_same_everywhere(float(inner.real), A.domain.specs[0].sharding.mesh)
    assert abs(float(A.domain.norm(mine) - single.domain.norm(x))) <= 16 * eps * float(single.domain.norm(x))
    report = al.check_adjoint(A, trials=2)
    assert report.passed, report
    assert A.H.H is A
    assert A.is_complex_linear


@pytest.mark.parametrize(("size", "dtype"), [(2, torch.complex128), (3, torch.float32)], ids=str)
@pytest.mark.parametrize("kind", ["vstack", "hstack", "block_diag"])
def test_equals_the_stack_of_one_process(
    groups: Callable[[int], Group], kind: str, size: int, dtype: torch.dtype
) -> None:
    groups(size).run(equal, kind, size, dtype)


def derived(size: int, dtype: torch.dtype) -> None:
    """The same operators with their adjoints derived, from forwards that communicate."""
    rank, mesh = torch.distributed.get_rank(), mesh_of(size)
    A, _ = stacked("vstack", size, dtype)
    B, _ = stacked("hstack", size, dtype)
    rows, columns = block(rank, dtype, engine="auto"), block(rank, dtype, square=True, engine="auto").H
    for engine in ENGINES:
        vertical = distributed.linear_operator(
            lambda x: rows(distributed.replicate(x, mesh)), A.domain, A.codomain, engine=engine
        )
        horizontal = distributed.linear_operator(
            lambda x: distributed.all_reduce(columns(x), mesh), B.domain, B.codomain, engine=engine
        )
        for written, found in ((A, vertical), (B, horizontal)):
            assert found.engine == ("traced" if engine == "auto" else engine), found.explain()
            x, y = found.domain.randn(seeded(1)), found.codomain.randn(seeded(2))
            with torch.no_grad():
                assert_close(found(x), written(x))
                assert_close(found.H(y), written.H(y))
            assert al.check_adjoint(found, trials=1).passed
            # The adjoint of the adjoint by differentiation, through torch.func and through autograd.
            y = y.requires_grad_()
            twice = torch.autograd.grad(found.H(y), y, x)[0]
            assert_close(twice, written(x).detach())
            again = torch.func.vjp(found.H, y.detach())[1](x)[0]
            assert_close(again, written(x).detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_derived_adjoints_are_the_written_ones(group: Group, dtype: torch.dtype) -> None:
    group.run(derived, group.size, dtype)


@torch.no_grad()
def solved(size: int, kind: str, dtype: torch.dtype) -> None:
    A, single = stacked(kind, size, dtype)
    y = single.codomain.randn(seeded(3))
    mine = part(A.codomain, y)
    x = single.domain.randn(seeded(4))
    damp, tol = 0.5, 1e-10
    matrix = al.to_dense(single)
    normal = matrix.mH @ matrix + damp**2 * torch.eye(matrix.shape[1], dtype=dtype)
    condition = float(torch.linalg.cond(normal))
    for solve in (cgls, lsmr):
        options: dict[str, Any] = {"tol": tol} if solve is cgls else {"atol": tol, "btol": tol}
        found, expected = (solve(B, b, damp=damp, **options) for B, b in ((A, mine), (single, y)))
        assert found.converged, found
        distance = A.domain.norm(found.x.sub(part(A.domain, expected.x)))
        assert float(distance) <= 2 * condition * tol * float(A.domain.norm(found.x)), float(distance)
        for norm in found.residual_norms:
            assert_same_everywhere(norm, A.domain.specs[0].sharding.mesh)
    b = part(A.domain, x)
    gram = A.gram + damp**2 * al.identity(A.domain)
    found, expected = cg(gram, b, tol=tol), cg(single.gram + damp**2 * al.identity(single.domain), x, tol=tol)
    distance = A.domain.norm(found.x.sub(part(A.domain, expected.x)))
    assert float(distance) <= 2 * condition * tol * float(A.domain.norm(found.x))
    norm = float(al.operator_norm(A, tol=1e-4))
    assert abs(norm - float(torch.linalg.matrix_norm(matrix, 2))) <= 2e-4 * norm


@pytest.mark.parametrize("kind", ["vstack", "hstack", "block_diag"])
def test_solvers_and_norms_are_the_same_calls(group: Group, kind: str) -> None:
    group.run(solved, group.size, kind, torch.complex128)


def least_squares(size: int) -> None:
    A, single = stacked("vstack", size, torch.complex128)
    y, x = single.codomain.randn(seeded(3)), single.domain.randn(seeded(4))
    w = tuple(leaf.abs() for leaf in single.codomain.randn(seeded(5)))
    for weight in (None, w):
        F = al.LeastSquares(A, part(A.codomain, y), part(A.codomain, weight))
        G = al.LeastSquares(single, y, weight)
        value, gradient = F.value_and_gradient(x)
        assert_close(value, G(x).detach())
        assert_close(gradient.detach(), G.gradient(x).detach(), units=128)
        assert_close(
            al.least_squares_gradient(A, x, part(A.codomain, y)).detach(),
            al.LeastSquares(single, y).gradient(x).detach(),
            units=128,
        )
        z = x.clone().requires_grad_()
        assert_close(torch.autograd.grad(F(z), z)[0], G.gradient(x).detach(), units=128)
        assert_close(torch.func.grad(lambda t, F=F: F(t))(x), G.gradient(x).detach(), units=128)
        assert cgls(A, part(A.codomain, y), weight=part(A.codomain, weight), maxiter=400).converged
    stop = cgls(A, part(A.codomain, y), tol=0.0, callback=lambda _, info: torch.distributed.get_rank() == size - 1)
    assert stop.iterations == 1  # one process is enough to stop all


def test_least_squares(group: Group) -> None:
    group.run(least_squares, group.size)


def implicit_gradients(size: int) -> None:
    A, single = stacked("vstack", size, torch.float64)
    y = single.codomain.randn(seeded(3))
    whole = tuple(leaf.requires_grad_() for leaf in y)
    mine = part(A.codomain, y).detach().requires_grad_()
    direction = single.domain.randn(seeded(9))
    found, expected = cgls(A, mine, damp=0.5, tol=1e-11), cgls(single, whole, damp=0.5, tol=1e-11)
    got = torch.autograd.grad(found.x, mine, direction)[0]
    right = torch.autograd.grad(expected.x, whole, direction)
    torch.testing.assert_close(got, right[torch.distributed.get_rank()], rtol=1e-8, atol=1e-8)


def test_solutions_are_differentiable(group: Group) -> None:
    group.run(implicit_gradients, group.size)


def wrong(size: int) -> None:
    rank, mesh = torch.distributed.get_rank(), mesh_of(size)
    A, _ = stacked("vstack", size, torch.float64)
    lacking = al.check_adjoint(A, adjoint=block(rank, torch.float64).H)
    assert not lacking.passed
    assert "the all-reduce over processes is missing" in lacking.diagnosis, lacking
    assert_same_everywhere(lacking.error, mesh)
    doubled = al.check_adjoint(A, adjoint=lambda v: 2 * A.H(v))
    assert not doubled.passed
    assert doubled.diagnosis == "Aᴴ is 2.000 × too large"
    with pytest.raises(al.AdjointMismatchError, match="the all-reduce over processes is missing"):
        al.assert_adjoint(A, block(rank, torch.float64).H)
    rows = block(rank, torch.float64)
    for engine in ENGINES:  # without `replicate` the derivative is each process's own
        with pytest.raises(al.NotDifferentiableError, match="the dot test fails"):
            distributed.linear_operator(rows, A.domain, A.codomain, engine=engine)
        unchecked = distributed.linear_operator(rows, A.domain, A.codomain, engine=engine, check=False)
        assert not al.check_adjoint(unchecked).passed
    with pytest.raises(al.NotLinearError, match="offset"):
        distributed.linear_operator(lambda x: rows(distributed.replicate(x, mesh)) + 1, A.domain, A.codomain)
    # Wrong on the last process only: all of them hear of it.
    with pytest.raises(al.NotLinearError, match=r"not linear|offset"):
        distributed.linear_operator(
            lambda x: rows(distributed.replicate(x, mesh)) + (rank == size - 1), A.domain, A.codomain
        )
    with pytest.raises(al.NotLinearError, match="not"):
        distributed.linear_operator(
            lambda x: rows(distributed.replicate(x, mesh) ** (2 if rank == size - 1 else 1)), A.domain, A.codomain
        )


def test_wrong_adjoints_and_forwards_are_found_by_all(group: Group) -> None:
    group.run(wrong, group.size)
