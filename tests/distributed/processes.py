"""Processes that run test cases together: started once for each number of them, since that takes seconds."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_GRACE = 20.0
TIMEOUT = 600.0  # seconds that a collective waits: the machine may be busy, and whoever is late is not gone


def _work(rank: int, size: int, file: str, timeout: float, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    while True:
        task = connection.recv()
        if task is None:
            break
        function, arguments = task
        torch.manual_seed(rank)  # what is to be the same on all processes must not come from here
        try:
            connection.send((True, function(*arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Group:
    """``size`` processes with a gloo process group; ``run(f, *args)`` calls f on each and returns the results."""

    def __init__(self, size: int, timeout: float = TIMEOUT) -> None:
        context = mp.get_context("forkserver")  # imports what takes seconds once, and not in each process
        context.set_forkserver_preload(["torch", "torch.distributed", "adjointlab.distributed", "adjointlab.solvers"])
        self.size = size
        self.broken = False
        self.folder = tempfile.TemporaryDirectory()
        file = str(Path(self.folder.name) / "rendezvous")
        os.environ["OMP_NUM_THREADS"] = "1"
        self.connections, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, size, file, timeout, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[tuple[bool, Any]]:
        """Return for each process whether the function returned, and what, or the traceback."""
        for connection in self.connections:
            connection.send((function, arguments))
        found: list[tuple[bool, Any]] = [(False, "no answer after another process failed")] * self.size
        pending = dict(zip(self.connections, range(self.size), strict=True))
        grace: float | None = None  # what is left for the others to say once one has failed
        while pending:
            ready = wait(list(pending), grace)
            if not ready:
                break
            for connection in ready:
                try:
                    found[pending[connection]] = connection.recv()
                except EOFError:
                    found[pending[connection]] = (False, "the process died")
                if not found[pending.pop(connection)][0]:
                    grace = _GRACE
        self.broken |= any(not fine for fine, _ in found)
        return found

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what the function returns on each process; fail with every traceback if it raises on one."""
        found = self.outcomes(function, *arguments)
        failures = [f"rank {rank}: {said}" for rank, (fine, said) in enumerate(found) if not fine]
        assert not failures, "\n".join(failures)
        return [result for _, result in found]

    def alive(self) -> bool:
        """Return whether all processes are there, and in step."""
        return not self.broken and all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        """End the processes."""
        for connection, process in zip(self.connections, self.processes, strict=True):
            if process.is_alive() and not self.broken:
                connection.send(None)
            elif self.broken:
                process.kill()
        for process in self.processes:
            process.join(3)
            if process.is_alive():
                process.kill()
                process.join()
        self.folder.cleanup()
