"""What fails on one process fails on all of them, by name: nobody waits for one that is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import DeviceMesh


@contextmanager
def waiting() -> Iterator[None]:
    """Say what it means that a collective fails: the transport knows of addresses and bytes only."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "expected all processes to take part in a collective, but one of them failed, died, is late, or came with "
            f"another one: see its log ({error})"
        ) from error


def failing(mesh: DeviceMesh, failed: bool) -> list[int]:
    """Return the global ranks of the processes of the mesh on which something failed; all of them must ask."""
    ranks = mesh.mesh.flatten().tolist()
    flags = torch.zeros(len(ranks), device=mesh.device_type)
    flags[ranks.index(torch.distributed.get_rank())] = float(failed)
    with waiting():
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(flags, group=mesh.get_group(dim))
    return [rank for rank, flag in zip(ranks, flags.tolist(), strict=True) if flag]


@contextmanager
def raise_on_all_ranks(mesh: DeviceMesh) -> Iterator[None]:
    """Make what is raised on one process an error on all: for what each process does by itself, as building its part.

    Parameters
    ----------
    mesh : DeviceMesh
        The processes.

    Yields
    ------
    None
        Nothing.

    Raises
    ------
    RuntimeError
        If the block failed on other processes only; it names them.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # of whatever kind: it is raised again
        failure = error
    if failure is not None:
        try:
            failing(mesh, failed=True)
        except RuntimeError as error:  # the others are in the middle of something else, and will hear of it there
            failure.add_note(f"(the other processes could not be told: {error})")
        raise failure
    failed = failing(mesh, failed=False)
    if failed:
        raise RuntimeError(
            f"expected all {mesh.size()} processes to succeed, but rank {', '.join(map(str, failed))} failed: the "
            "error is in its log"
        )


__all__ = ["failing", "raise_on_all_ranks", "waiting"]
