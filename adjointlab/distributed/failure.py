"""An error on one process becomes an error on all processes, so that no process waits for a failed one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import DeviceMesh


@contextmanager
def explain_failure() -> Iterator[None]:
    """Explain why a collective failed: the transport's own message only mentions addresses and bytes."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "expected all processes to take part in a collective, but one of them failed, died, is late, or came with "
            f"another one: see its log ({error})"
        ) from error


def failed_ranks(mesh: DeviceMesh, failed: bool) -> list[int]:
    """Return the global ranks of the mesh on which something failed; all processes of the mesh must call this."""
    ranks = mesh.mesh.flatten().tolist()
    flags = torch.zeros(len(ranks), device=mesh.device_type)
    flags[ranks.index(torch.distributed.get_rank())] = float(failed)
    with explain_failure():
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(flags, group=mesh.get_group(dim))
    return [rank for rank, flag in zip(ranks, flags.tolist(), strict=True) if flag]


@contextmanager
def raise_on_all_ranks(mesh: DeviceMesh) -> Iterator[None]:
    """Run a block on all ranks of the mesh; if the block raises on one rank, raise on every rank.

    Parameters
    ----------
    mesh : DeviceMesh
        The processes.

    Yields
    ------
    None
        The block runs in this context.

    Raises
    ------
    RuntimeError
        If the block failed on other ranks only; the message names these ranks.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # any kind: it is raised again below
        failure = error
    if failure is not None:
        try:
            failed_ranks(mesh, failed=True)
        except RuntimeError as error:  # the other ranks run another collective, which will fail there
            failure.add_note(f"(the other processes could not be told: {error})")
        raise failure
    failed = failed_ranks(mesh, failed=False)
    if failed:
        raise RuntimeError(
            f"expected all {mesh.size()} processes to succeed, but rank {', '.join(map(str, failed))} failed: the "
            "error is in its log"
        )
