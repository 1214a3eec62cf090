"""No process waits for ever when another fails: all of them get an error."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from parallel import alike, mesh_of, seeded
from processes import TIMEOUT, Group
from torch import nn
from torch.distributed.tensor import Shard

import adjointlab as al
from adjointlab import distributed
from adjointlab.solvers import cgls

pytestmark = pytest.mark.slow


def test_a_part_that_cannot_be_built_is_an_error_on_all(group: Group) -> None:
    said = group.run(a_part_that_raises_alone, group.size)
    assert all(f"rank {group.size - 1} failed" in text for text in said[:-1])
    assert "has an offset" in said[-1]


def a_part_that_raises_alone(size: int) -> str:
    mesh, rank = mesh_of(size), torch.distributed.get_rank()
    expected = al.NotLinearError if rank == size - 1 else RuntimeError
    with (
        pytest.raises(expected, match=f"rank {size - 1} failed|has an offset") as caught,
        distributed.raise_on_all_ranks(mesh),
    ):
        al.linear_operator(nn.Conv1d(1, 1, 3, bias=rank == size - 1), (1, 1, 8))  # an offset, on the last process
    A = distributed.vstack(al.identity((3,)), mesh)  # nobody is left behind: they go on together
    assert float(A.H(torch.ones(3)).sum()) == 3 * size
    return str(caught.value)


def fails_in_a_solve(size: int, how: str, folder: str) -> None:
    mesh, rank = mesh_of(size), torch.distributed.get_rank()
    c = alike(nn.Conv2d(1, 1, 3, padding=1, bias=False))
    A = distributed.convolution(c, distributed.space((1, 1, 8 * size, 8), mesh, [Shard(2)]))
    steps = []

    def callback(_: torch.Tensor, info: object) -> None:
        steps.append(1)
        if len(steps) == 3 and rank == size - 1:
            if how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("on this process only")

    try:
        cgls(A, A.codomain.randn(seeded()), tol=0.0, maxiter=50, callback=callback)
    except ValueError:
        while how == "goes on alone" and not Path(folder, "0").exists():
            time.sleep(0.1)
    except RuntimeError as error:
        Path(folder, str(rank)).write_text(str(error))
    os._exit(1)  # as a program does that an error ends: its own neighbours hear of it in turn


@pytest.mark.parametrize(
    ("size", "how", "timeout", "why"),
    [
        (2, "is killed", TIMEOUT, "closed by peer|reset by peer|pair closure|Broken pipe"),
        (4, "is killed", TIMEOUT, "closed by peer|reset by peer|pair closure|Broken pipe"),
        (3, "raises", TIMEOUT, "closed by peer|reset by peer|pair closure|Broken pipe"),
        (2, "goes on alone", 15.0, "Timed out"),
    ],
)
def test_a_process_that_fails_in_a_solve_is_an_error_on_the_others(
    size: int, how: str, timeout: float, why: str, tmp_path: Path
) -> None:
    group = Group(size, timeout)
    try:
        outcomes = group.outcomes(fails_in_a_solve, size, how, str(tmp_path))
    finally:
        group.broken = True
        group.close()
    assert outcomes[:-1] == [(False, "the process died")] * (size - 1)
    for rank in range(size - 1):
        said = Path(tmp_path, str(rank)).read_text()
        assert said.startswith("expected all processes to take part in a collective, but one of them failed")
        assert re.search(why, said)
    assert not Path(tmp_path, str(size - 1)).exists()
