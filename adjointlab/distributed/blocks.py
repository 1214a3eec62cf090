"""Operators whose blocks are spread over processes: each process r has one block ``Aᵣ``."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from adjointlab.distributed.communication import all_reduce, replicate
from adjointlab.distributed.failure import raise_on_all_ranks
from adjointlab.distributed.sharding import direct_sum, replicated
from adjointlab.errors import SpaceMismatchError
from adjointlab.notation import Notation
from adjointlab.operators import LinearOperator, derived
from adjointlab.tree import map_leaves


def vstack(A: LinearOperator, mesh: DeviceMesh) -> LinearOperator:
    """Return ``x ↦ (A₀x, …, Aₙx)`` with one row per process; its adjoint is ``(y₀, …, yₙ) ↦ Σᵣ Aᵣᴴyᵣ``.

    All processes hold the same x; process r holds ``Aᵣ`` and ``yᵣ``, as for some of many coils, angles or frames. The
    forward does not communicate. The adjoint performs one all-reduce for each leaf of x.

    Parameters
    ----------
    A : LinearOperator
        The block of this process. All processes must have the same domain.
    mesh : DeviceMesh
        The processes, along one dimension.

    Returns
    -------
    LinearOperator
        From the replicated domain to the direct sum of the codomains.

    Raises
    ------
    SpaceMismatchError
        If A is not a LinearOperator, or the domains differ.

    Examples
    --------
    >>> import tempfile, torch, torch.distributed as dist
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
        lambda x: block(map_leaves(lambda leaf: replicate(leaf, mesh), x)),
        lambda y: map_leaves(lambda leaf: all_reduce(leaf, mesh), block.H(y)),
        domain, codomain, (vstack, (block, mesh)), block,
        notation=Notation("vstack({} of each process)"),
    )  # fmt: skip


def hstack(A: LinearOperator, mesh: DeviceMesh) -> LinearOperator:
    """Return ``(x₀, …, xₙ) ↦ Σᵣ Aᵣxᵣ`` with one column per process; its adjoint is ``y ↦ (A₀ᴴy, …, Aₙᴴy)``.

    The forward performs one all-reduce for each leaf of the result. The adjoint does not communicate.

    Parameters
    ----------
    A, mesh
        As for :func:`vstack`, but all processes must have the same codomain.

    Returns
    -------
    LinearOperator
        From the direct sum of the domains to the replicated codomain.

    Raises
    ------
    SpaceMismatchError
        If A is not a LinearOperator, or the codomains differ.
    """
    return vstack(_block(A, "hstack").H, mesh).H


def block_diag(A: LinearOperator, mesh: DeviceMesh) -> LinearOperator:
    """Return ``(x₀, …, xₙ) ↦ (A₀x₀, …, Aₙxₙ)``, with one block per process; its adjoint has the blocks ``Aᵣᴴ``.

    Use it for a batch that is distributed over processes. Neither the operator nor its adjoint communicates.

    Parameters
    ----------
    A, mesh
        As for :func:`vstack`, but domains and codomains may differ, and the mesh may have several dimensions.

    Returns
    -------
    LinearOperator
        From the direct sum of the domains to the direct sum of the codomains.

    Raises
    ------
    SpaceMismatchError
        If A is not a LinearOperator, or the processes have different numbers of leaves.
    """
    block = _block(A, "block_diag")
    with raise_on_all_ranks(mesh):
        domain, codomain = direct_sum(block.domain, mesh), direct_sum(block.codomain, mesh)
    notation = Notation("block_diag({} of each process)")
    return derived(block, block.H, domain, codomain, (block_diag, (block, mesh)), block, notation=notation)


def _block(A: Any, name: str) -> LinearOperator:
    if not isinstance(A, LinearOperator):
        raise SpaceMismatchError(
            f"expected this process's part of {name} as a LinearOperator, got {type(A).__name__}: wrap it with "
            "al.linear_operator"
        )
    return A
