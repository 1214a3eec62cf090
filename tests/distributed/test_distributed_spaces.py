"""Sharded spaces: parts and wholes, inner products, random elements, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from built import needs_torch
from parallel import assert_same_everywhere, mesh_of, seeded
from processes import Group
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import adjointlab as al
from adjointlab import distributed

pytestmark = pytest.mark.slow


def wholes(size: int, dtype: torch.dtype) -> None:
    mesh = mesh_of(size)
    whole = torch.randn(7, 10, dtype=dtype, generator=seeded())
    for placement in (Shard(0), Shard(1), Shard(-1), Replicate()):
        space = distributed.space(whole.shape, mesh, [placement], dtype=dtype)
        part = distributed.shard(whole, space)
        assert torch.equal(part, distribute_tensor(whole, mesh, [placement]).to_local())
        assert torch.equal(distributed.gather(part, space), whole)
        other = torch.randn(7, 10, dtype=dtype, generator=seeded(1))
        found = space.inner(part, distributed.shard(other, space))
        expected = torch.vdot(whole.flatten(), other.flatten())
        eps = torch.finfo(dtype).eps
        assert abs(complex(found) - complex(expected)) <= 16 * eps * float(whole.norm() * other.norm())
        assert abs(float(space.norm(part) - whole.norm())) <= 16 * eps * float(whole.norm())
        assert_same_everywhere(space.norm(part), mesh)
        assert space.size == whole.numel()


COMPLEX = pytest.param(torch.complex128, marks=needs_torch("2.10", "gloo sends no complex numbers"))


@pytest.mark.parametrize("dtype", [torch.float32, COMPLEX], ids=str)
def test_parts_are_those_of_dtensor(group: Group, dtype: torch.dtype) -> None:
    group.run(wholes, group.size, dtype)


def random(size: int) -> None:
    mesh, rank = mesh_of(size), torch.distributed.get_rank()
    replicated, sharded = distributed.replicated((4000,), mesh), distributed.space((4000 * size,), mesh, [Shard(0)])
    both = al.Space.of({"a": replicated, "b": sharded})
    torch.manual_seed(rank)  # the global generators differ: the seed is that of the first process
    for generator in (None, seeded(5)):
        element = both.randn(generator)
        assert_same_everywhere(element["a"].double().sum(), mesh)
        whole = distributed.gather(element["b"], sharded).reshape(size, 4000)
        correlations = torch.corrcoef(whole) - torch.eye(size)
        assert float(correlations.abs().max()) < 6 / 4000**0.5  # six standard deviations
        assert abs(float(whole.std()) - 1) < 6 / (2 * 4000 * size) ** 0.5
    assert torch.equal(both.randn(seeded(5))["b"], both.randn(seeded(5))["b"])
    assert both.size == 4000 * (size + 1)
    one = both.unflatten([torch.ones(spec.shape) for spec in both.specs])
    assert float(both.inner(one, one)) == 4000 * (size + 1)  # what is replicated counts once


def test_random_elements(group: Group) -> None:
    group.run(random, group.size)


def estimates(size: int) -> None:
    mesh = mesh_of(size)
    space = distributed.space((12,), mesh, [Shard(0)], dtype=torch.float64)
    d = torch.arange(1.0, 13.0, dtype=torch.float64)
    D = al.diagonal(distributed.shard(d, space), space)
    from adjointlab import spectral

    assert float(spectral.estimate_trace(D)) == pytest.approx(float(d.sum()), rel=1e-14)
    torch.testing.assert_close(spectral.estimate_diagonal(D), distributed.shard(d, space))
    assert float(al.operator_norm(D, tol=1e-4)) == pytest.approx(12.0, rel=1e-4)
    with pytest.raises(al.SpaceMismatchError, match="expected a space of one process"):
        al.to_dense(D)


def test_estimators(group: Group) -> None:
    group.run(estimates, group.size)


def refusals(size: int) -> None:
    mesh = mesh_of(size)
    space = distributed.space((8 * size, 3), mesh, [Shard(0)])

    def refused(match: str, function: Any, *arguments: Any) -> None:
        with pytest.raises(al.SpaceMismatchError, match=match):
            function(*arguments)

    tensor = distribute_tensor(torch.ones(8 * size, 3), mesh, [Shard(0)])
    refused("got a DTensor of shape .*to_local", al.Space.of, tensor)
    refused("got a DTensor of shape .*to_local", al.Space.of, {"a": tensor})
    refused("got a DTensor of shape .*to_local", al.linear_operator, lambda x: x, tensor)
    refused("got a DTensor of shape", distributed.replicated((8 * size, 3), mesh).check, tensor)
    refused("got a DTensor of shape", al.Space.of((8 * size, 3)).check, tensor)
    refused("got a DTensor of shape", al.identity(al.Space.of((8 * size, 3))), tensor)
    refused("the last would be empty", distributed.space, (size + 1 if size > 2 else 1, 3), mesh, [Shard(0)])
    refused("expected Shard", distributed.space, (8, 3), mesh, [Partial()])
    refused("expected Shard", distributed.space, (8, 3), mesh, [Shard(2)])
    refused("one placement for each", distributed.space, (8, 3), mesh, [Shard(0), Replicate()])
    refused("sharded by rows", distributed.gather, torch.ones(2), distributed.direct_sum((2,), mesh))
    refused("a codomain beside the sharded domain", al.linear_operator, lambda x: x, space)
    refused("sharded over one mesh", distributed.linear_operator, lambda x: x, space, al.Space.of((3,)))
    refused("outputs in the codomain", distributed.linear_operator, lambda x: x[1:], space, space)
    refused("one mesh", al.Space.of, {"a": space, "b": (3,)})
    refused("batch_dims=0", lambda: al.Space.of(space, batch_dims=1))
    replicated = distributed.replicated(al.Space.of(tuple(space.specs[0].shape)), mesh)
    assert replicated != space
    refused("domain of A to be the codomain of B", lambda: al.identity(replicated) @ al.identity(space))
    refused("to have one domain", lambda: al.identity(replicated) + al.identity(space))
    if torch.distributed.get_rank() == 0:
        refused("part of vstack as a LinearOperator", distributed.vstack, nn.Conv1d(1, 1, 3), mesh)
    with pytest.raises(al.SpaceMismatchError, match="the same space on all processes"):
        distributed.replicated((3 + torch.distributed.get_rank(),), mesh)
    for shape, dim in (
        ((8 * size + torch.distributed.get_rank(), 3), 0),
        ((8 * size, 8 * size), torch.distributed.get_rank() % 2),
    ):
        with pytest.raises(al.SpaceMismatchError, match="pass the shape of the whole tensor"):
            distributed.space(shape, mesh, [Shard(dim)])
    with pytest.raises(al.SpaceMismatchError, match="as many leaves on every process"):
        distributed.direct_sum([(2,)] * (1 + torch.distributed.get_rank()), mesh)


def test_what_does_not_fit_is_refused(group: Group) -> None:
    group.run(refusals, group.size)


def dtensors_inside(size: int) -> None:
    mesh = mesh_of(size)
    c = nn.Conv1d(1, 1, 3, padding=1, bias=False)
    X = distributed.space((1, 1, 4 * size), mesh, [Shard(2)])

    def through_dtensor(x: torch.Tensor) -> torch.Tensor:
        weight = DTensor.from_local(c.weight, mesh, [Replicate()])
        spread = DTensor.from_local(x, mesh, [Shard(2)])
        return torch.nn.functional.conv1d(spread, weight, padding=1).to_local()

    replicated, own = distributed.replicated((4,), mesh), distributed.direct_sum((4,), mesh)

    def without_placements(x: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(x, mesh, [Replicate()]).to_local() * (1.0 + torch.distributed.get_rank())

    for engine in ("eager", "auto"):
        with pytest.raises(al.SpaceMismatchError, match="on a DTensor"):
            distributed.linear_operator(through_dtensor, X, X, engine=engine)
        with pytest.raises((al.SpaceMismatchError, al.NotDifferentiableError), match=r"DTensor|dot test"):
            distributed.linear_operator(without_placements, replicated, own, engine=engine)


def test_dtensors_inside_of_a_forward_are_refused(group: Group) -> None:
    group.run(dtensors_inside, group.size)


def on_a_mesh_of_two() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("y", "x"))
    whole = torch.randn(6, 5, generator=seeded(), dtype=torch.float64)
    for placements in ([Shard(0), Shard(1)], [Shard(1), Replicate()], [Replicate(), Replicate()]):
        space = distributed.space(whole.shape, mesh, placements, dtype=torch.float64)
        part = distributed.shard(whole, space)
        assert torch.equal(distributed.gather(part, space), whole)
        assert float(space.norm(part)) == pytest.approx(float(whole.norm()), rel=1e-14)
    with pytest.raises(al.SpaceMismatchError, match="split along one dimension of the mesh"):
        distributed.space(whole.shape, mesh, [Shard(0), Shard(0)])
    with pytest.raises(ValueError, match="a mesh of one dimension"):
        distributed.replicate(whole, mesh)
    # Rows over one dimension of the mesh, on each line of the other.
    A = distributed.vstack(al.diagonal(whole * (1 + torch.distributed.get_rank() // 2)), mesh["y"])
    x = torch.ones_like(whole)
    torch.testing.assert_close(A.gram(x), whole**2 * (1 + 4))


def test_meshes_of_two_dimensions(groups: Any) -> None:
    groups(4).run(on_a_mesh_of_two)
