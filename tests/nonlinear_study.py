"""Non-linear least squares beside torchsolve and mrpro: seconds and memory until an objective is reached.

``python -m tests.nonlinear_study`` prints a table for ``½‖f(x) − y‖² + ½ damp² ‖x‖²`` on two models, from one start,
with one damping, for every library at hand. Each way runs in a process of its own, on one thread, and is timed in
seconds of the processor. The *objective* is what our Gauss–Newton converges to, plus 0.1 %. *Built* leaves out what is
done once for a model. *Memory* is how far the resident memory rises, with the building.

torchsolve keeps its schedule fixed, by ``alpha = alpha_min = damp²``, and takes the fastest of several inner
tolerances. mrpro has no Gauss–Newton: its L-BFGS and its Adam minimise the same objective.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import adjointlab as al

MOST = 30.0  # seconds for one way
INNER = (0.1, 0.01, 0.001)  # tolerances of torchsolve's inner solver; it has none by default
RATES = (0.003, 0.01, 0.03)  # of Adam


class Problem(NamedTuple):
    """A model with data, a start, and the damping."""

    f: Callable[[Tensor], Tensor]
    y: Tensor
    x0: Tensor
    damp: float

    def objective(self, x: Tensor) -> float:
        """Return ``½‖f(x) − y‖² + ½ damp² ‖x‖²``."""
        with torch.no_grad():
            return float((self.f(x) - self.y).square().sum() + self.damp**2 * x.square().sum()) / 2


def _smooth(n: int, draw: torch.Generator) -> Tensor:
    spectrum = torch.randn(3, n, n, generator=draw, dtype=torch.complex64)
    k = torch.fft.fftfreq(n, 1 / n)
    images = torch.fft.ifft2(spectrum * torch.exp(-(k[:, None] ** 2 + k**2) / 8)).real
    return images / images.abs().amax((1, 2), keepdim=True)


def phase_retrieval(n: int) -> Problem:
    """Return the magnitudes of four masked spectra, as a function of the phase."""
    draw = torch.Generator().manual_seed(0)
    masks = torch.exp(2j * torch.pi * torch.rand(4, n, n, generator=draw))
    truth = _smooth(n, draw)[0]

    def f(x: Tensor) -> Tensor:
        return torch.fft.fft2(masks * torch.exp(1j * x), norm="ortho").abs().square()

    y = f(truth)
    return Problem(f, y + 0.05 * torch.randn(y.shape, generator=draw), 0.7 * truth, 0.1)


def relaxation(n: int) -> Problem:
    """Return eight echoes of an MRI signal, as a function of density and rates of relaxation."""
    draw, t = torch.Generator().manual_seed(0), torch.linspace(0.1, 3, 8)[:, None, None]

    def f(m: Tensor) -> Tensor:
        rho, r1, r2 = m
        return rho * torch.exp(-t * r2) * (1 - torch.exp(-4 * t * r1))

    truth = 1 + 0.5 * _smooth(n, draw)
    y = f(truth)
    return Problem(f, y + 0.01 * torch.randn(y.shape, generator=draw), torch.ones_like(truth), 0.03)


PROBLEMS = {"phase retrieval": (phase_retrieval, 256), "MRI signal": (relaxation, 256)}

# From a problem to a function that runs a way, and tells of each iterate by a callback, which returns whether to stop.
Run = Callable[[Callable[[Tensor], bool]], Any]


class Reached(Exception):  # noqa: N818
    """An objective is reached: raised where a library has no other way to stop."""


def _ours(p: Problem, solver: Callable[..., Any]) -> Run:
    made: list[al.Jacobian] = []

    def run(told: Callable[[Tensor], bool]) -> None:
        made[:] = made or [al.jacobian(p.f, p.x0)]
        solver(made[0], p.y, p.x0, damp=p.damp, tol=1e-7, callback=lambda x, info: told(x))

    return run


def _stopping(told: Callable[[Tensor], bool], x: Tensor) -> None:
    if told(x):
        raise Reached


def _torchsolve(p: Problem, rtol: float) -> Run:
    import torchsolve  # type: ignore[import-not-found, unused-ignore]

    def run(told: Callable[[Tensor], bool]) -> None:
        torchsolve.gauss_newton(
            p.f, p.y, p.x0, alpha=p.damp**2, alpha_min=p.damp**2, reference=torch.zeros_like(p.x0), iterations=200,
            solver=torchsolve.CGSolver(rtol=rtol), callback=lambda step, x: _stopping(told, x),
        )  # fmt: skip

    return run


def _mrpro(p: Problem, name: str, **options: Any) -> Run:
    from mrpro.algorithms import optimizers
    from mrpro.operators import Operator

    class Objective(Operator):  # type: ignore[misc]
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (((p.f(x) - p.y).square().sum() + p.damp**2 * x.square().sum()) / 2,)

    def run(told: Callable[[Tensor], bool]) -> None:
        def callback(status: Any) -> None:
            _stopping(told, status["solution"][0].detach())

        getattr(optimizers, name)(Objective(), (p.x0,), callback=callback, **options)

    return run


def ways(p: Problem) -> dict[str, Callable[[], Run]]:
    """Return every way to solve a problem, each made when it is called."""
    found: dict[str, Callable[[], Run]] = {
        "adjointlab, gauss_newton": lambda: _ours(p, al.solvers.gauss_newton),
        "adjointlab, levenberg_marquardt": lambda: _ours(p, al.solvers.levenberg_marquardt),
    }
    for rtol in INNER:
        found[f"torchsolve, gauss_newton, inner rtol {rtol}"] = lambda rtol=rtol: _torchsolve(p, rtol)  # type: ignore[misc]
    found["mrpro, lbfgs"] = lambda: _mrpro(p, "lbfgs", max_iterations=3000, tolerance_grad=0, tolerance_change=0)
    for rate in RATES:
        found[f"mrpro, adam, rate {rate}"] = lambda rate=rate: _mrpro(
            p, "adam", max_iterations=100_000, learning_rate=rate
        )  # type: ignore[misc]
    return found


def least(p: Problem) -> float:
    """Return the objective at the minimum."""
    return p.objective(al.solvers.gauss_newton(p.f, p.y, p.x0, damp=p.damp, tol=1e-7, maxiter=100).x)


def _timed(p: Problem, run: Run, goal: float) -> tuple[float, float, int]:
    """Return the seconds, the objective and the number of iterates of a run up to the goal."""
    apart, steps, value = 0.0, 0, math.inf
    start = time.process_time()

    def told(x: Tensor) -> bool:
        nonlocal apart, steps, value
        now = time.process_time()
        value, steps = p.objective(x), steps + 1
        apart += time.process_time() - now
        return value <= goal or now - start > MOST

    with contextlib.suppress(Reached):
        run(told)
    return time.process_time() - start - apart, value, steps


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measured(problem: str, way: str, goal: float) -> dict[str, Any]:
    """Return what one way takes, in this process."""
    torch.set_num_threads(1)
    make, size = PROBLEMS[problem]
    small, p = make(16), make(size)
    _timed(small, ways(small)[way](), small.objective(small.x0) / 2)  # what is imported and set up at first
    before, run = _resident(), ways(p)[way]()
    first, value, steps = _timed(p, run, goal)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    again = sorted(_timed(p, run, goal)[0] for _ in range(3))[1] if first < MOST / 4 else first
    return {"first": first, "built": again, "value": value, "steps": steps, "memory": most, "reached": value <= goal}


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Print a table for each problem."""
    for problem, (make, size) in PROBLEMS.items():
        p = make(size)
        goal = 1.001 * least(p)
        _print(f"\n{problem}, {size}², objective {p.objective(p.x0):.4g} at the start, {goal:.5g} to be reached\n")
        _print(
            "| way | seconds | built | steps | objective | memory, MiB |\n| --- | ---: | ---: | ---: | ---: | ---: |"
        )
        for way in ways(p):
            run = subprocess.run(
                [sys.executable, "-m", "tests.nonlinear_study", problem, way, str(goal)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if run.returncode:
                _print(f"| {way} | {run.stderr.strip().splitlines()[-1]} |")
                continue
            r = json.loads(run.stdout.splitlines()[-1])
            seconds = [f"{r[key]:.2f}" if r["reached"] else "not reached" for key in ("first", "built")]
            cells = [way, *seconds, str(r["steps"]), f"{r['value']:.5g}", f"{r['memory'] / 2**20:.0f}"]
            _print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # what peers say when they are imported
    if len(sys.argv) > 1:
        _print(json.dumps(measured(sys.argv[1], sys.argv[2], float(sys.argv[3]))))
    else:
        main()
