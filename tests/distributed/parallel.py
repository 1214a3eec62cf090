"""What the cases share: comparison with one process, and the laws of an operator whose parts are spread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import adjointlab as al
from adjointlab import distributed

ENGINES = ("eager", "auto")


def mesh_of(size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (size,))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def alike(module: nn.Module) -> Any:
    """Return a module with the same random parameters on all processes."""
    source = seeded(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype, generator=source))
    return module


def assert_close(found: Any, expected: Any, units: float = 32) -> None:
    """Require equality to ``units`` of rounding of the norm: sums are made in another order, nothing else."""
    spaces = al.Space.of(found), al.Space.of(expected)
    pairs = list(zip(spaces[0].leaves(found), spaces[1].leaves(expected), strict=True))
    scale = max(float(torch.linalg.vector_norm(e.detach())) for _, e in pairs)
    for f, e in pairs:
        assert f.shape == e.shape, (f.shape, e.shape)
        assert f.dtype == e.dtype, (f.dtype, e.dtype)
        gap = float(torch.linalg.vector_norm(f.detach() - e.detach()))
        assert gap <= units * torch.finfo(e.dtype).eps * scale, (gap, scale)


def assert_same_everywhere(value: float | Tensor, mesh: DeviceMesh) -> None:
    """Require the same bits on all processes."""
    mine = torch.as_tensor(value, dtype=torch.float64).reshape(1)
    found = [torch.empty_like(mine) for _ in range(mesh.size())]
    torch.distributed.all_gather(found, mine)
    assert all(torch.equal(other, mine) for other in found), found


@torch.no_grad()
def assert_equals_single(A: al.LinearOperator, single: al.LinearOperator) -> None:
    """Require that an operator between arrays sharded by rows is the one of one process, and adjoint to its adjoint."""
    x, y = single.domain.randn(seeded(1)), single.codomain.randn(seeded(2))
    local_x, local_y = distributed.shard(x, A.domain), distributed.shard(y, A.codomain)
    assert_close(distributed.gather(A(local_x), A.codomain), single(x))
    assert_close(distributed.gather(A.H(local_y), A.domain), single.H(y))
    left, right = A.codomain.inner(A(local_x), local_y), A.domain.inner(local_x, A.H(local_y))
    size = float(A.codomain.norm(A(local_x)) * A.codomain.norm(local_y))
    assert float(abs(left - right)) <= 16 * A.domain.eps * size
    assert_same_everywhere(float(left.real), A.domain.specs[0].sharding.mesh)
