"""Whole tensors and the parts of them that processes hold: an element is sharded, and gathered."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard

from adjointlab.distributed.sharding import Sharding, mesh_coordinates
from adjointlab.distributed.windows import shard_range
from adjointlab.errors import SpaceMismatchError
from adjointlab.space import Space, TensorSpec
from adjointlab.typed import X


def shard(whole: X, space: Space[X]) -> X:
    """Return a copy of this process's part of a whole element.

    Parameters
    ----------
    whole : pytree of tensors
        The whole tensors, available on every process.
    space : Space
        The sharded space that the parts belong to.

    Returns
    -------
    pytree of tensors
        An element of the space.

    Raises
    ------
    SpaceMismatchError
        If the space is not sharded by rows, or the shapes do not match.
    """
    shardings = _shardings(space)
    specs = [TensorSpec(s.shape or (), spec.dtype, spec.device) for s, spec in zip(shardings, space.specs, strict=True)]
    parts = []
    wholes: Space[X] = Space.of(space.unflatten(specs))
    for leaf, sharding in zip(wholes.leaves(whole), shardings, strict=True):
        part, where = leaf, mesh_coordinates(sharding.mesh)
        for d, placement in enumerate(sharding.placements):
            if isinstance(placement, Shard):
                start, stop = shard_range(leaf.shape[placement.dim], sharding.mesh.size(d), where[d])
                part = part.narrow(placement.dim, start, stop - start)
        parts.append(part.clone(memory_format=torch.contiguous_format))
    return space.unflatten(parts)


def gather(element: X, space: Space[X]) -> X:
    """Return the whole element on every process; use it for small elements only.

    Parameters
    ----------
    element : pytree of tensors
        This process's part.
    space : Space
        The sharded space of the element.

    Returns
    -------
    pytree of tensors
        The whole tensors.

    Raises
    ------
    SpaceMismatchError
        If ``element`` is not in the space, or the space is not sharded by rows.
    """
    shardings, wholes = _shardings(space), []
    for leaf, sharding in zip(space.leaves(element), shardings, strict=True):
        real = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
        shape = torch.Size((*(sharding.shape or ()), *([2] if leaf.is_complex() else [])))
        strides = torch.empty(shape, device="meta").stride()
        tensor = DTensor.from_local(
            real.contiguous(), sharding.mesh, sharding.placements, run_check=False, shape=shape, stride=strides
        )
        whole = tensor.full_tensor()
        wholes.append(torch.view_as_complex(whole.contiguous()) if leaf.is_complex() else whole)
    return space.unflatten(wholes)


def _shardings(space: Space) -> list[Sharding]:
    found = [spec.sharding for spec in space.specs]
    if not all(isinstance(sharding, Sharding) and sharding.shape is not None for sharding in found):
        raise SpaceMismatchError(
            f"expected a space of tensors that are sharded by rows, got {space}: in a direct sum, each process has its "
            "own"
        )
    return found  # type: ignore[return-value]
