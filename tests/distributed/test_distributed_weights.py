"""Sharded spaces with weights: each process has its part of the weight, and inner products sum."""

from __future__ import annotations

import pytest
import torch
from parallel import assert_close, assert_same_everywhere, mesh_of, seeded
from processes import Group
from torch import Tensor
from torch.distributed.tensor import Shard

import adjointlab as al
from adjointlab import distributed

pytestmark = pytest.mark.slow


def positive(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=seeded(seed)) + 0.5


def parts_of_one_weight(size: int) -> None:
    mesh, whole = mesh_of(size), positive(3 * size, seed=1)
    plain = distributed.space((3 * size,), mesh, [Shard(0)], dtype=torch.float64)
    space = al.Space.of(plain, weight=distributed.shard(whole, plain))
    a, b = (torch.randn(3 * size, dtype=torch.float64, generator=seeded(k)) for k in (2, 3))
    found = space.inner(distributed.shard(a, plain), distributed.shard(b, plain))
    assert_close(found, (a * whole * b).sum())
    assert_same_everywhere(found, mesh)
    D = al.diagonal(distributed.shard(whole, plain), space)
    assert al.check_adjoint(D).passed
    assert float(al.operator_norm(D, tol=1e-6)) == pytest.approx(float(whole.max()), rel=1e-5)


def test_parts_of_one_weight(group: Group) -> None:
    group.run(parts_of_one_weight, group.size)


def rows_of_one_problem(size: int) -> None:
    mesh, rank = mesh_of(size), torch.distributed.get_rank()
    rows = torch.randn(size, 4, 3, dtype=torch.float64, generator=seeded(1))
    inner, outer = positive(3, seed=2), positive(size, 4, seed=3)
    data = torch.randn(size, 4, dtype=torch.float64, generator=seeded(4))
    X = al.Space.of((3,), dtype=torch.float64, weight=inner)
    blocks = [al.matrix(M, X, al.Space.of((4,), dtype=M.dtype, weight=w)) for M, w in zip(rows, outer, strict=True)]
    A, single = distributed.vstack(blocks[rank], mesh), al.vstack(blocks)
    assert al.check_adjoint(A).passed
    assert_close(A.H(data[rank]), single.H(tuple(data)))
    expected = al.solvers.cgls(single, tuple(data), damp=0.5, tol=1e-14).x
    assert_close(al.solvers.cgls(A, data[rank], damp=0.5, tol=1e-14).x, expected, units=1e3)  # tol / damp² in units
    direct = distributed.linear_operator(lambda x: rows[rank] @ distributed.replicate(x, mesh), A.domain, A.codomain)
    assert_close(direct.H(data[rank]), A.H(data[rank]))


def test_rows_of_one_problem(group: Group) -> None:
    group.run(rows_of_one_problem, group.size)


def refused(size: int) -> None:
    mesh, rank = mesh_of(size), torch.distributed.get_rank()
    sharded = distributed.space((3 * size,), mesh, [Shard(0)])
    with pytest.raises(al.SpaceMismatchError, match="positive"):
        al.Space.of(sharded, weight=torch.ones(3) - 2.0 * (rank == 1))
    replicated = distributed.replicated((3,), mesh)
    with pytest.raises(al.SpaceMismatchError, match="processes that hold the same entries"):
        al.Space.of(replicated, weight=torch.full((3,), rank + 1.0))
    with pytest.raises(al.SpaceMismatchError, match="same space on all processes"):
        distributed.replicated(al.Space.of((3,), weight=rank + 2.0), mesh)


def test_what_fails_on_one_process_fails_on_all(group: Group) -> None:
    group.run(refused, group.size)
