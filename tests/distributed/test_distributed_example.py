"""The example under ``torchrun``: a process is killed, all start again from a checkpoint, the answer is the same."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import adjointlab as al
from adjointlab.solvers import cgls

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "distributed_deblurring.py"
TOL, DAMP = 1e-8, 0.1


@pytest.fixture
def example() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("distributed_deblurring", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torchrun(folder: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """Run the example on two processes, and return what it printed and saved."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
        str(EXAMPLE), "--size", "20", "--tol", str(TOL), "--damp", str(DAMP), "--folder", str(folder),
        "--output", str(folder) + ".pt", *options,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, torch.load(str(folder) + ".pt")


def test_a_killed_process_costs_the_iterations_since_the_last_checkpoint(tmp_path: Path, example: ModuleType) -> None:
    said, resumed = torchrun(tmp_path / "b", "--kill-rank", "1", "--kill-at", "12")
    assert "exitcode: -9" in said
    assert resumed["start"] == 10
    assert resumed["converged"]
    # The answer is that of one process which nobody has killed.
    y = resumed["y"]
    undisturbed = cgls(al.linear_operator(example.gaussian_blur(5, 1.0), y), y, damp=DAMP, tol=TOL)
    assert undisturbed.converged
    # Both gradients are within tol ‖Aᴴy‖ of zero, and the Hessian is at least damp²: ‖x − x'‖ ≤ 2 tol ‖Aᴴy‖ / damp²,
    # where ‖Aᴴy‖ = ‖(AᴴA + damp²) x‖ ≤ (1 + damp²) ‖x‖, for a blur of norm 1 or a little more at reflecting borders.
    difference = torch.linalg.vector_norm(undisturbed.x - resumed["x"])
    assert difference <= 2 * TOL * 1.5 / DAMP**2 * torch.linalg.vector_norm(undisturbed.x)
