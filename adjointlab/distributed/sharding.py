r"""Spaces over processes: ``⟨a, b⟩ = Σᵣ ⟨aᵣ, bᵣ⟩``, where entries that several processes hold count once.

On each process, an element is represented by the tensor that this process holds. PyTorch's placements describe it:
``Shard(dim)`` means a range of rows of one large tensor, ``Replicate()`` means the same tensor on all processes. In a
*direct sum*, each process has a separate tensor.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

from adjointlab.distributed import communication
from adjointlab.distributed.windows import shard_range
from adjointlab.errors import SpaceMismatchError
from adjointlab.space import Space, TensorSpec
from adjointlab.space.spec import OfDict, OfPair, OfTensor
from adjointlab.typed import E


@dataclass(frozen=True)
class Sharding:
    """How one tensor is distributed over a mesh of processes: each process holds a shard or a copy.

    Parameters
    ----------
    mesh : DeviceMesh
        The processes.
    placements : tuple of Placement
        ``Shard(dim)`` or ``Replicate()`` for each dimension of the mesh.
    shape : tuple of int or None
        Shape of the whole tensor; None for a direct sum, where each process has a separate tensor.
    size : int
        Number of entries of the whole tensor.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...] | None
    size: int

    @functools.cached_property
    def share(self) -> float:
        """The reciprocal of the number of processes that hold the same entries."""
        return 1.0 / math.prod(self.mesh.size(d) for d, p in enumerate(self.placements) if p.is_replicate())

    @functools.cached_property
    def _groups(self) -> tuple[str, ...]:
        return _groups(self.mesh)

    def total(self, terms: Tensor, shares: tuple[float, ...]) -> Tensor:
        """Return ``Σᵢ shareᵢ termsᵢ`` summed over all processes, bitwise equal on all of them."""
        return communication.total(terms, shares, self._groups)

    def reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes that should hold the same entries."""
        for d, placement in enumerate(self.placements):
            if placement.is_replicate():
                tensor = communication.all_reduce(tensor, submesh(self.mesh, d))
        return tensor

    def generator(self, generator: torch.Generator | None) -> torch.Generator:
        """Return a generator for this shard, seeded by the given generator, or by the first process of the mesh."""
        where = mesh_coordinates(self.mesh)
        seed = int(torch.randint(1 << 31, (), generator=generator, device="cpu"))
        if generator is None:
            seed = round(_summed(self.mesh, [0.0 if any(where) else float(seed)])[0])
        index = 0
        for d, placement in enumerate(self.placements):
            if not placement.is_replicate():
                index = index * self.mesh.size(d) + where[d] + 1
        return torch.Generator().manual_seed((seed + index * 0x9E3779B1) % (1 << 32))

    def __repr__(self) -> str:
        if self.shape is None:
            return f"each of {self.mesh.size()} processes its own"
        return f"of {self.shape} by {', '.join(map(str, self.placements))} over {tuple(self.mesh.shape)} processes"


def mesh_coordinates(mesh: DeviceMesh) -> tuple[int, ...]:
    """Return the coordinates of this process in the mesh."""
    where = mesh.get_coordinate()
    if where is None:
        raise SpaceMismatchError(
            f"expected a process of the mesh {mesh}, got rank {torch.distributed.get_rank()}: build on the processes "
            "of the mesh only"
        )
    return tuple(where)


def submesh(mesh: DeviceMesh, dim: int) -> DeviceMesh:
    """Return the one-dimensional mesh through this process along mesh dimension ``dim``."""
    if mesh.ndim == 1:
        return mesh
    if mesh.mesh_dim_names is None:
        raise SpaceMismatchError(
            f"expected named dimensions of the mesh {mesh}, got none: init_device_mesh(…, mesh_dim_names=('y', 'x'))"
        )
    return mesh[mesh.mesh_dim_names[dim]]


def space(
    shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement], *, dtype: torch.dtype | None = None
) -> Space[Tensor]:
    """Return the space of one tensor distributed over a mesh, with ``⟨a, b⟩ = Σᵣ ⟨aᵣ, bᵣ⟩``.

    All processes of the mesh must call it with the same arguments; an element is the part that a process holds.

    Parameters
    ----------
    shape : sequence of int
        Shape of the whole tensor.
    mesh : DeviceMesh
        The processes, made by ``torch.distributed.init_device_mesh``; a mesh of several dimensions needs
        ``mesh_dim_names``.
    placements : sequence of Placement
        ``Shard(dim)`` or ``Replicate()`` for each dimension of the mesh; sizes follow the rule of ``torch.chunk``.
    dtype : torch.dtype, optional
        The dtype; torch's default dtype if not given.

    Returns
    -------
    Space
        A space with the methods of any other space. ``Space.of`` combines a pytree of such spaces into one space.

    Raises
    ------
    SpaceMismatchError
        If the arguments differ between processes, a process would hold no entries, or a placement is neither
        ``Shard(dim)`` nor ``Replicate()``.

    Examples
    --------
    >>> import tempfile, torch.distributed as dist
    >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    >>> mesh = dist.init_device_mesh("cpu", (1,))
    >>> X = space((1, 1, 64, 64), mesh, [Shard(2)])
    >>> X
    Space.of(TensorSpec((1, 1, 64, 64), torch.float32, of (1, 1, 64, 64) by S(2) over (1,) processes))
    >>> float(X.inner(X.zeros(), X.randn()))
    0.0
    >>> dist.destroy_process_group()
    """
    where = mesh_coordinates(mesh)
    whole = tuple(int(n) for n in shape)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not same_on_all_ranks(mesh, whole, tuple(placements), dtype):
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
            if shard_range(n, parts, parts - 1)[0] >= n:
                raise SpaceMismatchError(
                    f"expected a part for every process, got {n} rows in {parts} shards of {-(-n // parts)}: the last "
                    "would be empty; use fewer processes, or split another dimension"
                )
            start, stop = shard_range(n, parts, where[d])
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


@overload
def replicated(local: OfTensor, mesh: DeviceMesh) -> Space[Tensor]: ...


@overload
def replicated(local: OfPair, mesh: DeviceMesh) -> Space[tuple[Tensor, Tensor]]: ...


@overload
def replicated(local: OfDict, mesh: DeviceMesh) -> Space[dict[str, Tensor]]: ...


@overload
def replicated(local: Space[E] | E, mesh: DeviceMesh) -> Space[E]: ...


@overload
def replicated(local: Any, mesh: DeviceMesh) -> Space[Any]: ...


def replicated(local: Any, mesh: DeviceMesh) -> Space[Any]:
    """Return the space of elements that are equal on all processes, with ``⟨a, b⟩`` counted once.

    Parameters
    ----------
    local : Space or what ``Space.of`` takes
        The space of the element on each process, equal on all processes.
    mesh : DeviceMesh
        The processes.

    Returns
    -------
    Space
        The replicated space; its inner products count each entry once.

    Raises
    ------
    SpaceMismatchError
        If the processes pass different spaces.
    """
    found = _local(local)
    where = (Replicate(),) * mesh.ndim
    entries = [] if found.weight is None else found.weight.entries
    if not same_on_all_ranks(mesh, [(s.shape, s.dtype) for s in found.specs], found.structure, found.weight, *entries):
        raise SpaceMismatchError(f"expected the same space on all processes, got {found} here: replicate what is alike")
    specs = tuple(replace(s, sharding=Sharding(mesh, where, s.shape, s.numel)) for s in found.specs)
    return replace(found, specs=specs)


@overload
def direct_sum(local: OfTensor, mesh: DeviceMesh) -> Space[Tensor]: ...


@overload
def direct_sum(local: OfPair, mesh: DeviceMesh) -> Space[tuple[Tensor, Tensor]]: ...


@overload
def direct_sum(local: OfDict, mesh: DeviceMesh) -> Space[dict[str, Tensor]]: ...


@overload
def direct_sum(local: Space[E] | E, mesh: DeviceMesh) -> Space[E]: ...


@overload
def direct_sum(local: Any, mesh: DeviceMesh) -> Space[Any]: ...


def direct_sum(local: Any, mesh: DeviceMesh) -> Space[Any]:
    """Return the direct sum ``X₀ ⊕ … ⊕ Xₙ`` of one space per process, with ``⟨a, b⟩ = Σᵣ ⟨aᵣ, bᵣ⟩``.

    Parameters
    ----------
    local, mesh
        As for :func:`replicated`, but the shapes may differ between processes.

    Returns
    -------
    Space
        The direct sum; its inner products sum over the processes.

    Raises
    ------
    SpaceMismatchError
        If the processes have different numbers of leaves.
    """
    found = _local(local)
    if not same_on_all_ranks(mesh, len(found.specs)):
        raise SpaceMismatchError(
            f"expected as many leaves on every process, got {len(found.specs)} here: give all the same structure"
        )
    own = (Shard(0),) * mesh.ndim
    whole = [round(n) for n in _summed(mesh, [float(spec.numel) for spec in found.specs])]
    pairs = zip(found.specs, whole, strict=True)
    return replace(found, specs=tuple(replace(s, sharding=Sharding(mesh, own, None, n)) for s, n in pairs))


def _groups(mesh: DeviceMesh) -> tuple[str, ...]:
    return tuple(str(mesh.get_group(d).group_name) for d in range(mesh.ndim) if mesh.size(d) > 1)


def _summed(mesh: DeviceMesh, values: list[float]) -> list[float]:
    """Return the sums of numbers over all processes."""
    given = torch.tensor([values], dtype=torch.float64, device=mesh.device_type)
    return communication.total(given, (1.0,), _groups(mesh)).tolist()


def same_on_all_ranks(mesh: DeviceMesh, *values: Any) -> bool:
    """Return whether all processes pass the same values, comparing tensors bitwise and other values by their repr."""
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
