"""Convolutions ``y = k ∗ x`` of arrays that are split over processes: each process holds some rows of x and of y."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Shard

from adjointlab.distributed.communication import exchange, replicate
from adjointlab.distributed.derive import linear_operator
from adjointlab.distributed.sharding import Sharding, mesh_coordinates, same_on_all_ranks, space, submesh
from adjointlab.distributed.windows import shard_bounds, shard_range
from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.space import Space

_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


@dataclass(frozen=True)
class _Axis:
    """The parameters of a convolution along one dimension ``dim`` of the array."""

    dim: int
    size: int
    extent: int  # of the kernel, dilation included
    stride: int
    before: int
    after: int
    mode: str

    @property
    def outputs(self) -> int:
        return (self.size + self.before + self.after - self.extent) // self.stride + 1


@dataclass(frozen=True)
class _Fetch:
    """How one process gets its input along a split dimension: it fetches rows, pads them, and cuts the result."""

    dim: int
    mesh: DeviceMesh
    owned: tuple[int, ...]
    windows: tuple[int, ...]
    padding: tuple[int, int]
    cut: tuple[int, int]  # after padding: the first row to keep, and the number of rows to keep


class DistributedConvolution(nn.Module):
    """The part of one process: it fetches the rows that its outputs depend on, and convolves them."""

    def __init__(self, module: Any, sharding: Sharding) -> None:
        super().__init__()
        self.convolution = module
        self.local = _CONVOLUTIONS[type(module)]
        assert sharding.shape is not None
        axes = _axes(module, sharding.shape)
        split = {p.dim: d for d, p in enumerate(sharding.placements) if isinstance(p, Shard)}
        here = mesh_coordinates(sharding.mesh)
        self.meshes = [submesh(sharding.mesh, d) for d in split.values()]
        cut = [(axis, split[axis.dim]) for axis in axes if axis.dim in split]
        self.fetches = [_fetch(axis, submesh(sharding.mesh, d), here[d]) for axis, d in cut]
        pads = {a.dim: (a.before, a.after) for a in axes} | {f.dim: f.padding for f in self.fetches}
        self.pads = [n for axis in reversed(axes) for n in pads[axis.dim]]  # as torch.nn.functional.pad wants them
        self.mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        batch = sharding.shape[: -len(axes) - 1]
        self.shape = (*batch, module.out_channels, *(axis.outputs for axis in axes))

    def forward(self, x: Tensor) -> Tensor:
        """Return this process's part of the result."""
        for fetch in self.fetches:
            x = exchange(x, fetch.dim, fetch.owned, fetch.windows, fetch.mesh)
        if any(self.pads):
            x = F.pad(x, self.pads, mode=self.mode)
        for fetch in self.fetches:
            if fetch.cut != (0, x.shape[fetch.dim]):
                x = x.narrow(fetch.dim, *fetch.cut)
        c = self.convolution
        weight = c.weight  # replicated; each process computes a part of its gradient
        for mesh in self.meshes:
            weight = replicate(weight, mesh)
        return self.local(x, weight, None, c.stride, 0, c.dilation, c.groups)


def convolution(module: nn.Module, domain: Space[Tensor], **options: Any) -> LinearOperator[Tensor, Tensor]:
    r"""Return ``x ↦ k ∗ x`` for an array that is split along spatial dimensions, with its derived adjoint.

    The result is that of the module on the whole array, split like that by DTensor's rule. Each process fetches the
    rows that its outputs depend on, a halo narrower than the kernel, and pads at the outer border only. The adjoint
    sends the cotangents of the halo back and adds them. An all-reduce sums the gradients of the one kernel.

    Parameters
    ----------
    module : nn.Conv1d, nn.Conv2d or nn.Conv3d
        A convolution without bias; any stride, dilation, groups, padding and padding mode.
    domain : Space
        A space made by :func:`space`: one array, split along spatial dimensions or the batch dimension.
    **options
        As for :func:`linear_operator`.

    Returns
    -------
    LinearOperator
        An operator from the domain to the space of results.

    Raises
    ------
    SpaceMismatchError
        If the domain is not such a space, the channels are split, the processes have different kernels, or a process
        would have no outputs.

    Examples
    --------
    >>> import tempfile, torch.distributed as dist
    >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    >>> X = space((1, 1, 64, 64), dist.init_device_mesh("cpu", (1,)), [Shard(2)])
    >>> A = convolution(nn.Conv2d(1, 1, 5, padding=2, padding_mode="reflect", bias=False), X)
    >>> A.H(A(X.randn())).shape
    torch.Size([1, 1, 64, 64])
    >>> dist.destroy_process_group()
    """
    sharding = _require(module, domain)
    local = DistributedConvolution(module, sharding)
    codomain = space(local.shape, sharding.mesh, sharding.placements, dtype=domain.specs[0].dtype)
    return linear_operator(local, domain, codomain, **options)


def _require(module: Any, domain: Any) -> Sharding:
    if type(module) not in _CONVOLUTIONS:
        raise SpaceMismatchError(
            f"expected an nn.Conv1d, nn.Conv2d or nn.Conv3d, got {type(module).__name__}: other forwards can use "
            "halo_exchange inside (and the adjoint A.H is the transposed convolution)"
        )
    if module.bias is not None:
        raise SpaceMismatchError(
            "expected a convolution without bias, got one with: set bias=False, and take the offset off the data"
        )
    sharding = domain.specs[0].sharding if isinstance(domain, Space) and len(domain.specs) == 1 else None
    if not isinstance(sharding, Sharding) or sharding.shape is None:
        raise SpaceMismatchError(
            f"expected a sharded space of one array, got {domain}: adjointlab.distributed.space(shape, mesh, "
            "placements), without a convolution on a DTensor, which is silently wrong"
        )
    if not same_on_all_ranks(sharding.mesh, module, module.weight.requires_grad, module.weight):
        raise SpaceMismatchError(
            f"expected the same convolution on all processes, got {module} here, and elsewhere another one or another "
            "kernel: make it from one seed, or torch.distributed.broadcast(module.weight.data, 0)"
        )
    spatial = len(module.kernel_size)
    if len(sharding.shape) not in (spatial + 1, spatial + 2):
        raise SpaceMismatchError(
            f"expected an array of {spatial + 1} or {spatial + 2} dimensions for {type(module).__name__}, got shape "
            f"{sharding.shape}: add the dimensions of batch and channels"
        )
    channel = len(sharding.shape) - spatial - 1
    if any(isinstance(p, Shard) and p.dim == channel for p in sharding.placements):
        raise SpaceMismatchError(
            f"expected channels in one piece, got {sharding.placements}: split a spatial dimension, or use hstack"
        )
    return sharding


def _axes(module: Any, shape: tuple[int, ...]) -> list[_Axis]:
    spatial = len(module.kernel_size)
    pads = module._reversed_padding_repeated_twice
    axes = []
    for i, dim in enumerate(range(len(shape) - spatial, len(shape))):
        before, after = pads[2 * (spatial - 1 - i) :][:2]
        extent = module.dilation[i] * (module.kernel_size[i] - 1) + 1
        axis = _Axis(dim, shape[dim], extent, module.stride[i], before, after, module.padding_mode)
        if axis.size + axis.before + axis.after < extent:
            raise SpaceMismatchError(
                f"expected a kernel that fits into the padded array, got an extent of {extent} along dim {axis.dim} of "
                f"{axis.size} rows and padding {(axis.before, axis.after)}: use a larger array"
            )
        if module.padding_mode == "reflect" and max(axis.before, axis.after) >= axis.size:
            raise SpaceMismatchError(
                f"expected reflect padding of less than the {axis.size} rows along dim {axis.dim}, got "
                f"{(axis.before, axis.after)}: use a larger array"
            )
        axes.append(axis)
    return axes


def _fetch(axis: _Axis, mesh: DeviceMesh, here: int) -> _Fetch:
    """Return how a process gets its input along a split dimension; all processes compute the same windows."""
    parts = mesh.size()
    if shard_range(axis.outputs, parts, parts - 1)[0] >= axis.outputs:
        raise SpaceMismatchError(
            f"expected outputs for every process, got {axis.outputs} of them along dim {axis.dim} for {parts} "
            "processes: use fewer, or a smaller stride"
        )
    wanted = []
    for part in range(parts):
        start, stop = shard_range(axis.outputs, parts, part)
        wanted.append((start * axis.stride - axis.before, (stop - 1) * axis.stride - axis.before + axis.extent))
    windows = [_inside(axis, *window) for window in wanted]
    (first, last), (start, stop) = wanted[here], windows[here]
    # Reflection may need rows that the outputs do not: these rows are fetched, reflected, and cut off after padding.
    before, after = (0, 0) if axis.mode == "circular" else (max(0, -first), max(0, last - axis.size))
    return _Fetch(
        axis.dim, mesh, shard_bounds(axis.size, parts), tuple(n for window in windows for n in window), (before, after),
        (first - (start - before), last - first),
    )  # fmt: skip


def _inside(axis: _Axis, first: int, last: int) -> tuple[int, int]:
    """Return the rows of the array that padding turns into the rows ``first`` to ``last`` of the padded array."""
    if axis.mode == "circular":
        return first, last
    start, stop = max(0, first), min(axis.size, last)
    if axis.mode == "reflect":
        stop = max(stop, 1 - first) if first < 0 else stop
        start = min(start, 2 * axis.size - 1 - last) if last > axis.size else start
    if start >= stop:
        raise SpaceMismatchError(
            f"expected each process to have some of the array below its outputs, got only padding along dim {axis.dim} "
            "for one: use fewer processes, or less padding"
        )
    return start, stop


def halo_exchange(x: Tensor, domain: Space, dim: int, halo: tuple[int, int], *, circular: bool = False) -> Tensor:
    """Return x extended by rows of neighbouring processes; the adjoint sends their cotangents back and adds them.

    Parameters
    ----------
    x : Tensor
        This process's part of an array that is split along ``dim``. It may already be extended along other dimensions.
    domain : Space
        The space of the array, made by :func:`space`; it says how the array is split.
    dim : int
        The dimension to extend.
    halo : tuple of int
        Numbers of rows to add before the first and after the last one; they may exceed a neighbour's part.
    circular : bool
        Whether the array is periodic. If not, nothing is added at the outer borders; pad them if needed.

    Returns
    -------
    Tensor
        The rows before, x, and the rows after, concatenated along ``dim``.

    Raises
    ------
    SpaceMismatchError
        If the array is not split along ``dim``, or a halo is negative.
    """
    sharding = domain.specs[0].sharding
    if not isinstance(sharding, Sharding) or sharding.shape is None or min(halo) < 0:
        raise SpaceMismatchError(
            f"expected a sharded array and a halo of 0 rows or more, got {domain} and {halo}: see space"
        )
    dim %= len(sharding.shape)
    split = [d for d, p in enumerate(sharding.placements) if isinstance(p, Shard) and p.dim == dim]
    if not split:
        raise SpaceMismatchError(
            f"expected an array that is split along dim {dim}, got {sharding}: it has no neighbours there"
        )
    mesh, size = submesh(sharding.mesh, split[0]), sharding.shape[dim]
    owned = shard_bounds(size, mesh.size())
    windows: list[int] = []
    for start, stop in pairwise(owned):
        first, last = start - halo[0], stop + halo[1]
        windows += (first, last) if circular else (max(0, first), min(size, last))
    return exchange(x, dim, owned, tuple(windows), mesh)
