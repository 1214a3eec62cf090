r"""Spaces over processes: ``⟨a, b⟩ = Σᵣ ⟨aᵣ, bᵣ⟩``, where what several processes hold alike counts once.

An element is on each process the tensor that it holds. PyTorch's placements say what that is: ``Shard(dim)`` a range of
the rows of one large tensor, ``Replicate()`` the same as on the other processes. In a *direct sum*, each process has a
tensor of its own.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

from adjointlab.distributed import communication
from adjointlab.distributed.windows import chunk
from adjointlab.errors import SpaceMismatchError
from adjointlab.space import Space, TensorSpec


@dataclass(frozen=True)
class Sharding:
    """How one tensor is spread over a mesh: ``mesh``, one placement for each of its dimensions, and the whole's shape.

    Parameters
    ----------
    mesh : DeviceMesh
        The processes.
    placements : tuple of Placement
        ``Shard(dim)`` or ``Replicate()`` for each dimension of the mesh.
    shape : tuple of int or None
        Of the whole tensor; None for a direct sum, in which each process has a tensor of its own.
    size : int
        Number of entries of the whole.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...] | None
    size: int

    @functools.cached_property
    def share(self) -> float:
        """One over the number of processes that hold the same entries."""
        return 1.0 / math.prod(self.mesh.size(d) for d, p in enumerate(self.placements) if p.is_replicate())

    @functools.cached_property
    def _groups(self) -> tuple[str, ...]:
        return tuple(str(self.mesh.get_group(d).group_name) for d in range(self.mesh.ndim) if self.mesh.size(d) > 1)

    def total(self, terms: Tensor, shares: tuple[float, ...]) -> Tensor:
        """Return ``Σᵢ shareᵢ termsᵢ`` summed over all processes: the same number on each."""
        return communication.total(terms, shares, self._groups)

    def reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes that should hold the same entries."""
        for d, placement in enumerate(self.placements):
            if placement.is_replicate():
                tensor = communication.all_reduce(tensor, along(self.mesh, d))
        return tensor

    def generator(self, generator: torch.Generator | None) -> torch.Generator:
        """Return a generator for this shard, with a seed from the one given, or else from the mesh's first process."""
        where = coordinate(self.mesh)
        seed = torch.randint(1 << 31, (), generator=generator, device="cpu")
        if generator is None:
            first = not any(where)
            mine = torch.full((1,), float(seed) if first else 0.0, dtype=torch.float64, device=self.mesh.device_type)
            seed = self.total(mine, (1.0,))
        index = 0
        for d, placement in enumerate(self.placements):
            if not placement.is_replicate():
                index = index * self.mesh.size(d) + where[d] + 1
        return torch.Generator().manual_seed((int(seed) + index * 0x9E3779B1) % (1 << 32))

    def __repr__(self) -> str:
        if self.shape is None:
            return f"each of {self.mesh.size()} processes its own"
        return f"of {self.shape} by {', '.join(map(str, self.placements))} over {tuple(self.mesh.shape)} processes"


def coordinate(mesh: DeviceMesh) -> tuple[int, ...]:
    """Return where this process is in the mesh."""
    where = mesh.get_coordinate()
    if where is None:
        raise SpaceMismatchError(
            f"expected a process of the mesh {mesh}, got rank {torch.distributed.get_rank()}: build on the processes "
            "of the mesh only"
        )
    return tuple(where)


def along(mesh: DeviceMesh, dim: int) -> DeviceMesh:
    """Return the mesh of the processes that differ from this one in one coordinate."""
    if mesh.ndim == 1:
        return mesh
    if mesh.mesh_dim_names is None:
        raise SpaceMismatchError(
            f"expected named dimensions of the mesh {mesh}, got none: init_device_mesh(…, mesh_dim_names=('y', 'x'))"
        )
    return mesh[mesh.mesh_dim_names[dim]]


def space(
    shape: Sequence[int],
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    *,
    dtype: torch.dtype | None = None,
) -> Space:
    """Return the space of one tensor that is spread over a mesh; its elements are what each process holds.

    All processes of the mesh call it, with the same arguments.

    Parameters
    ----------
    shape : sequence of int
        Of the whole tensor.
    mesh : DeviceMesh
        The processes, from ``torch.distributed.init_device_mesh``; with names, if it has several dimensions.
    placements : sequence of Placement
        ``Shard(dim)`` or ``Replicate()`` for each dimension of the mesh. Shards follow the rule of ``torch.chunk`` and
        DTensor, uneven ones included.
    dtype : torch.dtype, optional
        Torch's default dtype if not given.

    Returns
    -------
    Space
        The same calls work on it as on any other; a pytree of such spaces is a space as well, by ``Space.of``.

    Raises
    ------
    SpaceMismatchError
        If processes ask for different spaces, one would hold nothing, or a placement is none of these two.

    Examples
    --------
    >>> import tempfile, torch.distributed as dist
    >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    >>> mesh = dist.init_device_mesh("cpu", (1,))
    >>> X = space((1, 1, 64, 64), mesh, [Shard(2)])
    >>> X
    Space(TensorSpec((1, 1, 64, 64), float32, cpu, of (1, 1, 64, 64) by S(2) over (1,) processes))
    >>> float(X.inner(X.zeros(), X.randn()))
    0.0
    >>> dist.destroy_process_group()
    """
    where = coordinate(mesh)
    whole = tuple(int(n) for n in shape)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not alike(mesh, whole, tuple(placements), dtype):
        raise SpaceMismatchError(
            f"expected the same space on all processes, got {whole} by {tuple(placements)} of {dtype} here: pass the "
            "shape of the whole tensor, not of this process's part"
        )
    chosen = tuple(_placement(p, len(whole)) for p in placements)
    if len(chosen) != mesh.ndim:
        raise SpaceMismatchError(
            f"expected one placement for each of the {mesh.ndim} dimensions of the mesh, got {chosen}: "
            "Replicate() where nothing is to be split"
        )
    dims = [p.dim for p in chosen if isinstance(p, Shard)]
    if len(set(dims)) < len(dims):
        raise SpaceMismatchError(
            f"expected each dimension to be split along one dimension of the mesh, got {chosen}: flatten the mesh"
        )
    local = list(whole)
    for d, placement in enumerate(chosen):
        if isinstance(placement, Shard):
            n, parts = whole[placement.dim], mesh.size(d)
            if chunk(n, parts, parts - 1)[0] >= n:
                raise SpaceMismatchError(
                    f"expected a part for every process, got {n} rows in {parts} shards of {-(-n // parts)}: the last "
                    "would be empty; use fewer processes, or split another dimension"
                )
            start, stop = chunk(n, parts, where[d])
            local[placement.dim] = stop - start
    sharding = Sharding(mesh, chosen, whole, math.prod(whole))
    return Space((TensorSpec(tuple(local), dtype, torch.device(mesh.device_type), sharding),))


def _placement(placement: Any, ndim: int) -> Placement:
    if type(placement) is Shard and -ndim <= placement.dim < ndim:
        return Shard(placement.dim % ndim)
    if isinstance(placement, Replicate):
        return placement
    raise SpaceMismatchError(
        f"expected Shard(dim) with a dimension of the tensor or Replicate(), got {placement}: an element holds "
        "numbers, not parts of sums (all_reduce those)"
    )


def replicated(local: Any, mesh: DeviceMesh) -> Space:
    """Return the space of what is the same on all processes of the mesh.

    Parameters
    ----------
    local : Space or what ``Space.of`` takes
        What each process holds: the same on all.
    mesh : DeviceMesh
        The processes.

    Returns
    -------
    Space
        Whose inner products count each entry once.

    Raises
    ------
    SpaceMismatchError
        If it is not the same space everywhere.
    """
    found = _local(local)
    where = (Replicate(),) * mesh.ndim
    if not alike(mesh, [(s.shape, s.dtype) for s in found.specs], found.structure):
        raise SpaceMismatchError(f"expected the same space on all processes, got {found} here: replicate what is alike")
    specs = tuple(replace(s, sharding=Sharding(mesh, where, s.shape, s.numel)) for s in found.specs)
    return replace(found, specs=specs)


def direct_sum(local: Any, mesh: DeviceMesh) -> Space:
    """Return the space in which each process has a tensor (or pytree) of its own, of a shape of its own.

    Parameters
    ----------
    local : Space or what ``Space.of`` takes
        What this process has.
    mesh : DeviceMesh
        The processes.

    Returns
    -------
    Space
        Whose inner products sum over the processes.

    Raises
    ------
    SpaceMismatchError
        If processes have different numbers of leaves.
    """
    found = _local(local)
    if not alike(mesh, len(found.specs)):
        raise SpaceMismatchError(
            f"expected as many leaves on every process, got {len(found.specs)} here: give all the same structure"
        )
    own = tuple(Shard(0) for _ in range(mesh.ndim))
    whole = [round(n) for n in _summed(mesh, [float(spec.numel) for spec in found.specs])]
    pairs = zip(found.specs, whole, strict=True)
    return replace(found, specs=tuple(replace(s, sharding=Sharding(mesh, own, None, n)) for s, n in pairs))


def _summed(mesh: DeviceMesh, values: list[float]) -> list[float]:
    """Return the sums of numbers over all processes."""
    everywhere = Sharding(mesh, tuple(Shard(0) for _ in range(mesh.ndim)), None, 0)
    given = torch.tensor([values], dtype=torch.float64, device=mesh.device_type)
    return everywhere.total(given, (1.0,)).tolist()


def alike(mesh: DeviceMesh, *values: Any) -> bool:
    """Return whether all processes came with the same values: what they print as, tensors bit by bit."""
    bits = [v.detach().cpu().contiguous().flatten().view(torch.uint8) if isinstance(v, Tensor) else v for v in values]
    print_of = b" ".join(bytes(v.tolist()) if isinstance(v, Tensor) else repr(v).encode() for v in bits)
    value = float(zlib.crc32(print_of))
    differs = _summed(mesh, [value])[0] != value * mesh.size()
    return _summed(mesh, [float(differs)])[0] == 0.0


def _local(local: Any) -> Space:
    found = Space.of(local)
    if found.is_sharded or found.batch_dims:
        raise SpaceMismatchError(
            f"expected a space of one process and of fixed sizes, got {found}: build it on each process by itself"
        )
    return found


# -- whole tensors and their parts -------------------------------------------------------------------------------------


def shard(whole: Any, space: Space) -> Any:
    """Return this process's part of a whole element: a copy.

    Parameters
    ----------
    whole : pytree of tensors
        Of the shapes that the space's tensors have as wholes, on every process.
    space : Space
        Where the parts live.

    Returns
    -------
    pytree of tensors
        An element of the space.

    Raises
    ------
    SpaceMismatchError
        If the space is not sharded, or the shapes do not fit.
    """
    shardings = _shardings(space)
    leaves = Space.of(
        space.unflatten([TensorSpec(s.shape or (), spec.dtype, spec.device) for s, spec in shardings])
    ).leaves(whole)
    parts = []
    for leaf, (sharding, _) in zip(leaves, shardings, strict=True):
        part = leaf
        where = coordinate(sharding.mesh)
        for d, placement in enumerate(sharding.placements):
            if isinstance(placement, Shard):
                start, stop = chunk(leaf.shape[placement.dim], sharding.mesh.size(d), where[d])
                part = part.narrow(placement.dim, start, stop - start)
        parts.append(part.clone(memory_format=torch.contiguous_format))
    return space.unflatten(parts)


def gather(element: Any, space: Space) -> Any:
    """Return the whole of an element, on every process: for small ones, and for looking at.

    Parameters
    ----------
    element : pytree of tensors
        This process's part.
    space : Space
        Where it lives.

    Returns
    -------
    pytree of tensors
        The whole tensors.

    Raises
    ------
    SpaceMismatchError
        If it is not an element, or the space is not sharded by ranges of rows.
    """
    shardings = _shardings(space)
    wholes = []
    for leaf, (sharding, _) in zip(space.leaves(element), shardings, strict=True):
        real = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
        shape = torch.Size((*(sharding.shape or ()), *([2] if leaf.is_complex() else [])))
        strides = torch.empty(shape, device="meta").stride()
        tensor = DTensor.from_local(
            real.contiguous(), sharding.mesh, sharding.placements, run_check=False, shape=shape, stride=strides
        )
        whole = tensor.full_tensor()
        wholes.append(torch.view_as_complex(whole.contiguous()) if leaf.is_complex() else whole)
    return space.unflatten(wholes)


def _shardings(space: Space) -> list[tuple[Sharding, TensorSpec]]:
    found = [(spec.sharding, spec) for spec in space.specs]
    if not all(isinstance(sharding, Sharding) and sharding.shape is not None for sharding, _ in found):
        raise SpaceMismatchError(
            f"expected a space of tensors that are sharded by rows, got {space}: in a direct sum, each process has its "
            "own"
        )
    return found  # type: ignore[return-value]


__all__ = ["Sharding", "alike", "along", "coordinate", "direct_sum", "gather", "replicated", "shard", "space"]
