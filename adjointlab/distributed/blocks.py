"""Operators whose blocks are spread over processes: rows, columns, or a diagonal of blocks ``Aᵣ``, one on each."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from adjointlab.distributed import communication
from adjointlab.distributed.failure import raise_on_all_ranks
from adjointlab.distributed.sharding import direct_sum, replicated
from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator, derived


def vstack(A: LinearOperator, mesh: DeviceMesh) -> LinearOperator:
    """Return ``x ↦ (A₀x, …, Aₙx)``, rows over processes; its adjoint is ``(y₀, …, yₙ) ↦ Σᵣ Aᵣᴴyᵣ``.

    For coils, projection angles or frames: x is replicated, each process has its ``Aᵣ`` and its ``yᵣ``. The forward
    does not communicate; the adjoint is one all-reduce (for each leaf of x).

    Parameters
    ----------
    A : LinearOperator
        This process's block, with the same domain on all.
    mesh : DeviceMesh
        The processes, along one dimension.

    Returns
    -------
    LinearOperator
        From the replicated domain to the direct sum of the codomains.

    Raises
    ------
    SpaceMismatchError
        If A is no operator, or domains differ.

    Examples
    --------
    >>> import tempfile, torch.distributed as dist
    >>> from adjointlab import diagonal
    >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    >>> A = vstack(diagonal(torch.tensor([1.0, 2.0])), dist.init_device_mesh("cpu", (1,)))
    >>> A.H(torch.tensor([1.0, 1.0]))
    tensor([1., 2.])
    >>> dist.destroy_process_group()
    """
    block = _block(A, "vstack")
    with raise_on_all_ranks(mesh):
        domain, codomain = replicated(block.domain, mesh), direct_sum(block.codomain, mesh)
    return derived(
        lambda x: block(_each(communication.replicate, x, mesh)),
        lambda y: _each(communication.all_reduce, block.H(y), mesh),
        domain, codomain, (vstack, (block, mesh)), block,
    )  # fmt: skip


def hstack(A: LinearOperator, mesh: DeviceMesh) -> LinearOperator:
    """Return ``(x₀, …, xₙ) ↦ Σᵣ Aᵣxᵣ``, columns over processes: the adjoint of the rows ``Aᵣᴴ``.

    The forward is one all-reduce (for each leaf of the result); the adjoint does not communicate.

    Parameters
    ----------
    A, mesh
        As for :func:`vstack`, with the same codomain on all.

    Returns
    -------
    LinearOperator
        From the direct sum of the domains to the replicated codomain.

    Raises
    ------
    SpaceMismatchError
        If A is no operator, or codomains differ.
    """
    return vstack(_block(A, "hstack").H, mesh).H


def block_diag(A: LinearOperator, mesh: DeviceMesh) -> LinearOperator:
    """Return ``(x₀, …, xₙ) ↦ (A₀x₀, …, Aₙxₙ)``, one block on each process, for a batch that is spread, say.

    Neither it nor its adjoint communicates.

    Parameters
    ----------
    A : LinearOperator
        This process's block.
    mesh : DeviceMesh
        The processes.

    Returns
    -------
    LinearOperator
        Between direct sums.

    Raises
    ------
    SpaceMismatchError
        If A is no operator, or the processes' elements have different numbers of leaves.
    """
    block = _block(A, "block_diag")
    with raise_on_all_ranks(mesh):
        domain, codomain = direct_sum(block.domain, mesh), direct_sum(block.codomain, mesh)
    return derived(block, block.H, domain, codomain, (block_diag, (block, mesh)), block)


def _block(A: Any, name: str) -> LinearOperator:
    if not isinstance(A, LinearOperator):
        raise SpaceMismatchError(
            f"expected this process's part of {name} as a LinearOperator, got {type(A).__name__}: wrap it with "
            "al.linear_operator"
        )
    return A


def _each(function: Any, element: Any, mesh: DeviceMesh) -> Any:
    if isinstance(element, torch.Tensor):
        return function(element, mesh)
    return pytree.tree_map(lambda leaf: function(leaf, mesh), element)


__all__ = ["block_diag", "hstack", "vstack"]
