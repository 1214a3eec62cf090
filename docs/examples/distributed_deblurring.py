"""Deblurring of a volume that is split among processes, with checkpoints: whoever is killed, the others go on from one.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # or gloo meets the addresses of the dead after a restart
    torchrun --standalone --nproc-per-node=4 --max-restarts=3 docs/examples/distributed_deblurring.py --size 48

No process ever holds the volume. Every few iterations the iterate is saved by ``torch.distributed.checkpoint``, each
process its part. When a process dies, the others get an error, ``torchrun`` starts all of them again, and they go on
from the last checkpoint; by hand, the same command does that. ``--kill-rank 2 --kill-at 7`` shows it.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

import adjointlab as al
from adjointlab import distributed
from adjointlab.solvers import Info, cgls


def gaussian_blur(width: int, sigma: float) -> nn.Conv3d:
    """Return a blur with reflecting borders."""
    blur = nn.Conv3d(1, 1, width, padding=width // 2, padding_mode="reflect", bias=False, dtype=torch.float64)
    line = torch.exp(-0.5 * ((torch.arange(width, dtype=torch.float64) - width // 2) / sigma) ** 2)
    kernel = torch.einsum("i,j,k->ijk", line, line, line)
    blur.weight.data.copy_(kernel / kernel.sum())
    return blur.requires_grad_(False)


def phantom(space: al.Space, mesh: dist.DeviceMesh) -> Tensor:
    """Return this process's part of a volume of two balls, made from the coordinates of its own rows."""
    part = space.specs[0].shape
    size, step = part[-1], -(-part[-1] // mesh.size())
    z = (torch.arange(part[2], dtype=torch.float64) + mesh.get_local_rank() * step) / size
    y = x = torch.arange(size, dtype=torch.float64) / size
    z, y, x = torch.meshgrid(z, y, x, indexing="ij")
    balls = [((0.4, 0.4, 0.5), 0.25, 1.0), ((0.7, 0.6, 0.4), 0.15, 0.5)]
    volume = sum(v * ((z - a) ** 2 + (y - b) ** 2 + (x - c) ** 2 < r**2) for (a, b, c), r, v in balls)
    return torch.as_tensor(volume).reshape(part).to(space.specs[0].device, torch.float64)


class Checkpoint:
    """The last iterate in a folder: the file ``latest`` names it once it is whole, so that a torn one is never read."""

    def __init__(self, folder: Path, space: al.Space, mesh: dist.DeviceMesh) -> None:
        self.folder, self.space, self.mesh = folder, space, mesh

    def _spread(self, part: Tensor) -> DTensor:
        shape = torch.Size(self.space.specs[0].sharding.shape)
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(part, self.mesh, [Shard(2)], run_check=False, shape=shape, stride=strides)

    def save(self, x: Tensor, done: int) -> None:
        """Save the iterate after ``done`` iterations."""
        dcp.save({"x": self._spread(x)}, checkpoint_id=self.folder / str(done))
        if dist.get_rank() == 0:
            (self.folder / "new").write_text(str(done))
            (self.folder / "new").replace(self.folder / "latest")

    def load(self) -> tuple[Tensor | None, int]:
        """Return the last iterate and its number, or nothing and 0."""
        dist.barrier()
        if not (self.folder / "latest").exists():
            return None, 0
        done = int((self.folder / "latest").read_text())
        part = self.space.zeros()
        dcp.load({"x": self._spread(part)}, checkpoint_id=self.folder / str(done))
        return part, done


def deblur(options: argparse.Namespace) -> None:
    """Deblur, and report from the first process."""
    cuda = torch.cuda.is_available()
    mesh = dist.init_device_mesh("cuda" if cuda else "cpu", (dist.get_world_size(),))
    X = distributed.space((1, 1, *[options.size] * 3), mesh, [Shard(2)], dtype=torch.float64)
    A = distributed.convolution(gaussian_blur(5, 1.0).to(X.specs[0].device), X)

    truth = phantom(X, mesh)
    y = A(truth) + 1e-3 * A.codomain.randn(torch.Generator().manual_seed(0))
    checkpoint = Checkpoint(options.folder, X, mesh)
    x0, start = checkpoint.load()
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def after_each_step(x: Tensor, info: Info) -> None:
        done = start + info.iteration
        if done % options.every == 0:
            checkpoint.save(x, done)
        if first and done == options.kill_at and dist.get_rank() == options.kill_rank:
            os.kill(os.getpid(), signal.SIGKILL)

    solution = cgls(
        A, y, x0=x0, damp=options.damp, tol=options.tol, maxiter=options.iterations - start, callback=after_each_step
    )
    gradient = X.norm(A.H(A(solution.x) - y) + options.damp**2 * solution.x) / X.norm(A.H(y))
    error = X.norm(solution.x - truth) / X.norm(truth)
    if dist.get_rank() == 0:
        print(f"from iteration {start}: {solution.reason}, after {solution.iterations} more")
        print(f"relative gradient {float(gradient):.1e}, distance from the truth {float(error):.3f}")
    if options.output is not None:
        whole, data = distributed.gather(solution.x, X), distributed.gather(y, A.codomain)
        if dist.get_rank() == 0:
            torch.save({"x": whole, "y": data, "start": start, "converged": solution.converged}, options.output)


def main() -> None:
    """Deblur."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--every", type=int, default=5, help="iterations between checkpoints")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints"))
    parser.add_argument("--output", type=Path, help="where to save the whole result and the data, for small ones")
    parser.add_argument("--tol", type=float, default=1e-8)
    parser.add_argument("--damp", type=float, default=0.1)
    parser.add_argument("--kill-rank", type=int, default=-1, help="kill this process, the first time")
    parser.add_argument("--kill-at", type=int, default=7, help="... at this iteration")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=5))
    deblur(options)
    gc.collect()  # operators and spaces hold the mesh, and torch 2.14 may abort at exit where that is still there
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
