"""Deblurring a 512² photograph with an 11² kernel: 50 steps of `cgls` against the solvers of other libraries.

With `x ≥ 0`, 50 steps of `fista` against the accelerated proximal gradients of others.

Every peer minimises `‖Ax − y‖²` for the same kernel and border, in single precision, by as many steps as it needs for
the residual that ours has after 50, and at least 50 too; one that has not got there after 150 is timed with 150, and
does not count (deepinv's CG, which diverges here). Circular borders are the best case, since the FFT diagonalises the
blur; with zeros beyond the border the transforms have to be longer than the image. Wall times, taken in turns; every
library keeps the number of threads that it takes by default, and before each run there is a pause in which those of
the one before go to sleep: some spin for longer than a solve takes, and keep a core from it.

deepinv lives in the second environment, where `make bench` runs this file by itself, if there is one;
`.venv-interop/bin/python tests/benchmarks/bench_solvers.py` prints the ratios.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interleave import Comparison
from scipy import fft
from scipy.sparse.linalg import LinearOperator, lsmr
from torch import Tensor, nn

import adjointlab as al

SIZE, WIDTH, STEPS = 512, 11, 50
HALF = WIDTH // 2
TRIED = (50, 51, 52, 53, 54, 55, 57, 60, 65, 70, 80, 100, 125, 150)
HOPELESS = 2.0  # seconds for 50 steps from which a way is not tried with more
BORDERS = {"circular": "circular", "zero": "zeros"}  # the padding mode of torch

Solve = Callable[[int], Tensor]  # from the number of steps to the image


def photograph() -> Tensor:
    from skimage import data

    return torch.from_numpy(data.camera()).float().div(255)[None, None]


def kernel() -> Tensor:
    profile = torch.exp(-0.5 * (torch.arange(WIDTH) - HALF).square() / 2.0**2)
    blur = profile[:, None] * profile
    return (blur / blur.sum())[None, None]


def camera(border: str) -> nn.Conv2d:
    c = nn.Conv2d(1, 1, WIDTH, padding=HALF, padding_mode=BORDERS[border], bias=False).requires_grad_(False)
    c.weight.copy_(kernel())
    return c


def ways(y: Tensor, border: str) -> dict[str, Solve]:
    """Return every way to solve the problem, ours first."""
    A = al.linear_operator(camera(border), y)
    found: dict[str, Solve] = {"adjointlab": lambda n: al.solvers.cgls(A, y, maxiter=n, tol=0).x}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peers say when they are imported and set up
        return found | by_fft(y, border) | by_pylops(y, border) | by_deepinv(y, border)


def by_fft(y: Tensor, border: str) -> dict[str, Solve]:
    """SciPy's lsmr, with a forward and an adjoint written by hand as products of FFTs."""
    length = SIZE if border == "circular" else fft.next_fast_len(SIZE + WIDTH - 1, real=True)
    shape = (length, length)
    spread = np.roll(np.pad(kernel()[0, 0].numpy(), (0, length - WIDTH)), (-HALF, -HALF), (0, 1))
    spectrum = fft.rfft2(spread)  # real: the kernel is symmetric

    def product(factor: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        def apply(x: np.ndarray) -> np.ndarray:
            image = x.reshape(SIZE, SIZE).astype(np.float32, copy=False)
            return fft.irfft2(fft.rfft2(image, s=shape) * factor, s=shape)[:SIZE, :SIZE].ravel()

        return apply

    A = LinearOperator((SIZE**2,) * 2, matvec=product(spectrum), rmatvec=product(spectrum.conj()), dtype=np.float32)
    data = y.numpy().ravel()

    def run(steps: int) -> Tensor:
        return torch.from_numpy(lsmr(A, data, maxiter=steps, atol=0, btol=0, conlim=0)[0]).reshape(y.shape)

    return {"SciPy lsmr, FFT by hand": run}


def by_pylops(y: Tensor, border: str) -> dict[str, Solve]:
    import pylops

    h, data = kernel()[0, 0].numpy(), y.numpy().ravel()
    shape = (SIZE, SIZE)
    if border == "circular":
        F = pylops.signalprocessing.FFT2D(shape, real=True, dtype="float32", engine="scipy")
        spectrum = fft.rfft2(np.roll(np.pad(h, (0, SIZE - WIDTH)), (-HALF, -HALF), (0, 1)))
        A = F.H @ pylops.Diagonal(spectrum.ravel(), dtype="complex64") @ F
    else:
        A = pylops.signalprocessing.Convolve2D(shape, h=h, offset=(HALF, HALF), dtype="float32")

    def shaped(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.real(x).astype(np.float32)).reshape(y.shape)

    return {
        "PyLops cgls": lambda n: shaped(pylops.cgls(A, data, niter=n, tol=0)[0]),
        "PyLops lsqr": lambda n: shaped(pylops.lsqr(A, data, niter=n, atol=0, btol=0, conlim=0)[0]),
    }


def by_deepinv(y: Tensor, border: str) -> dict[str, Solve]:
    try:
        import deepinv
    except ImportError:  # it lives in the second environment
        return {}
    from deepinv.optim.linear import least_squares

    physics = {}
    if border == "circular":
        physics["FFT blur"] = deepinv.physics.BlurFFT(img_size=y.shape[1:], filter=kernel())
    for label, use_fft in (("blur", False), ("blur by FFT", True)):
        padding = "circular" if border == "circular" else "constant"
        physics[label] = deepinv.physics.Blur(filter=kernel(), padding=padding, use_fft=use_fft)
    found: dict[str, Solve] = {}
    for label, p in physics.items():
        for solver in ("CG", "lsqr"):

            def run(n: int, p: Any = p, solver: str = solver) -> Tensor:
                options = {"ATA": p.A_adjoint_A} if solver == "CG" else {}
                return least_squares(p.A, p.A_adjoint, y, solver=solver, max_iter=n, tol=0.0, **options)

            found[f"deepinv {solver}, {label}"] = run
    return found


def nonnegative_ways(y: Tensor, F: al.LeastSquares) -> dict[str, Solve]:
    """Return every way to deblur with `x ≥ 0` by accelerated proximal gradients, ours first; steps of 1/‖A‖² = 1."""
    found: dict[str, Solve] = {
        "adjointlab": lambda n: al.solvers.fista(F, al.prox.nonnegative(), maxiter=n, tol=0).x,
        "adjointlab projected_gradient": lambda n: al.solvers.projected_gradient(F, (0, None), maxiter=n, tol=0).x,
    }
    spread = torch.zeros(SIZE, SIZE)
    spread[:WIDTH, :WIDTH] = kernel()[0, 0]
    spectrum = torch.fft.rfft2(spread.roll((-HALF, -HALF), (0, 1)))

    def blur(x: Tensor, factor: Tensor) -> Tensor:
        return torch.fft.irfft2(factor * torch.fft.rfft2(x), s=(SIZE, SIZE))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return found | nonnegative_by_mrpro(y, spectrum, blur) | nonnegative_by_pyproximal(y, spectrum, blur)


def nonnegative_by_mrpro(y: Tensor, spectrum: Tensor, blur: Callable[..., Tensor]) -> dict[str, Solve]:
    try:
        from mrpro.algorithms.optimizers import pgd
        from mrpro.operators import LinearOperator as Base
        from mrpro.operators import ProximableFunctional
        from mrpro.operators.functionals import L2NormSquared
    except ImportError:  # it lives in the second environment
        return {}

    class Blur(Base):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (blur(x, spectrum),)

        def adjoint(self, x: Tensor) -> tuple[Tensor]:
            return (blur(x, spectrum.conj()),)

    class Nonnegative(ProximableFunctional):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (torch.zeros(()),)

        def prox(self, x: Tensor, sigma: Any = 1.0) -> tuple[Tensor]:
            return (x.clamp(min=0),)

    F, g = 0.5 * (L2NormSquared(target=y) @ Blur()), Nonnegative()
    return {"mrpro pgd": lambda n: pgd(F, g, torch.zeros_like(y), stepsize=0.99, max_iterations=n)[0]}


def nonnegative_by_pyproximal(y: Tensor, spectrum: Tensor, blur: Callable[..., Tensor]) -> dict[str, Solve]:
    try:
        import pyproximal
    except ImportError:
        return {}
    import pylops

    class Blur(pylops.LinearOperator):
        def __init__(self) -> None:
            super().__init__(dtype=np.float32, shape=(SIZE**2, SIZE**2))

        def _matvec(self, x: np.ndarray) -> np.ndarray:
            return fft.irfft2(spectrum.numpy() * fft.rfft2(x.reshape(SIZE, SIZE)), s=(SIZE, SIZE)).ravel()

        def _rmatvec(self, x: np.ndarray) -> np.ndarray:
            return fft.irfft2(
                spectrum.conj().resolve_conj().numpy() * fft.rfft2(x.reshape(SIZE, SIZE)), s=(SIZE, SIZE)
            ).ravel()

    F, g = pyproximal.L2(Op=Blur(), b=y.numpy().ravel()), pyproximal.Box(0, np.inf)
    run = pyproximal.optimization.primal.ProximalGradient
    start = np.zeros(SIZE**2, np.float32)

    def solve(n: int) -> Tensor:
        x = run(F, g, x0=start, tau=0.99, niter=n, acceleration="fista", tol=0)
        return torch.from_numpy(np.asarray(x, np.float32)).reshape(y.shape)

    return {"PyProximal FISTA": solve}


def steps_to(solve: Solve, distance: Callable[[Tensor], float], target: float) -> tuple[int, float]:
    """Return the fewest steps tried that reach a residual, to a thousandth, or the most, with the residual."""
    for steps in TRIED:
        start = time.perf_counter()
        found = distance(solve(steps))
        if found <= 1.001 * target or time.perf_counter() - start > HOPELESS:
            break
    return steps, found


def deblur(compare: Comparison, border: str, share: float = 2.0) -> dict[str, Any]:
    """Time all ways, and return steps and relative residuals of each."""
    c = camera(border)
    y = c(photograph())
    y = y + 1e-2 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    exact = camera(border).double()

    def distance(x: Tensor) -> float:
        return float((exact(x.double()) - y).norm() / y.norm())

    return race(compare, ways(y, border), distance, f"{border} border", share)


def deblur_nonnegative(compare: Comparison, share: float = 2.0) -> dict[str, Any]:
    """Time the ways to `min ½‖Ax − y‖²` over `x ≥ 0`, for an image that is zero in large parts."""
    c = camera("circular")
    y = c((photograph() - 0.4).relu())
    y = y + 1e-2 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    exact = camera("circular").double()

    def distance(x: Tensor) -> float:
        return float((exact(x.double().clamp(min=0)) - y).norm() / y.norm())

    found = nonnegative_ways(y, al.LeastSquares(al.linear_operator(c, y), y))
    return race(compare, found, distance, "x ≥ 0, circular border", share, section="bounds")


def race(
    compare: Comparison,
    found: dict[str, Solve],
    distance: Callable[[Tensor], float],
    case: str,
    share: float,
    *,
    section: str = "solvers",
) -> dict[str, Any]:
    """Time all ways to the residual that the first has after 50 steps."""
    target = distance(found["adjointlab"](STEPS))
    reached = {name: steps_to(solve, distance, target) for name, solve in found.items()}
    facts = {
        "section": section,
        "case": case,
        "steps": {name: steps for name, (steps, _) in reached.items()},
        "residuals": {name: size for name, (_, size) in reached.items()},
    }
    timed = {name: (lambda s=solve, n=reached[name][0]: s(n)) for name, solve in found.items()}
    return facts | {"seconds": compare(timed, share=share, most=15, rest=0.2, **facts)}


@pytest.mark.parametrize("border", BORDERS)
def test_deblurring(border: str, compare: Comparison, quick: bool, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("the peers run on the CPU")
    if quick:
        pytest.skip("has no small size")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "overflow", RuntimeWarning)  # in the estimates of PyLops' lsqr
        row = deblur(compare, border)
    own = row["residuals"]["adjointlab"]
    assert any(size <= 1.001 * own for name, size in row["residuals"].items() if name != "adjointlab")


def test_nonnegative_deblurring(compare: Comparison, quick: bool, device: torch.device) -> None:
    if device.type != "cpu" or quick:
        pytest.skip("the peers run on the CPU" if device.type != "cpu" else "has no small size")
    row = deblur_nonnegative(compare)
    assert row["residuals"]["adjointlab"] < 1


@pytest.mark.parametrize("border", [*BORDERS, "nonnegative"])
def test_deblurring_beside_deepinv(border: str, benchmark: Any, quick: bool) -> None:
    python = Path(__file__).parents[2] / ".venv-interop/bin/python"
    if quick or not python.exists():
        pytest.skip("deepinv lives in an environment of its own: make .venv-interop/.stamp")
    run = subprocess.run([python, __file__, border], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    benchmark.extra_info.update(json.loads(run.stdout.splitlines()[-1]))


class Clock:
    """What `Comparison` needs of pytest-benchmark."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.stats: Any = None

    def pedantic(self, own: Callable[[], Any], setup: Callable[[], Any], rounds: int, iterations: int) -> None:
        taken = []
        for _ in range(rounds * iterations):
            setup()
            start = time.perf_counter()
            own()
            taken.append(time.perf_counter() - start)
        self.stats = types.SimpleNamespace(stats=types.SimpleNamespace(median=float(np.median(taken))))


def main(*borders: str) -> None:
    """Print a table and a line of JSON for each border, without pytest: what the second environment is for."""
    for border in borders or [*BORDERS, "nonnegative"]:
        clock = Comparison(Clock(), torch.device("cpu"))
        with torch.no_grad():
            row = deblur_nonnegative(clock) if border == "nonnegative" else deblur(clock, border)
        own = row["seconds"]["adjointlab"]
        print(f"\n{row['case']:32} {'seconds':>8} {'ratio':>6} {'steps':>6} {'residual':>9}")
        for name, seconds in sorted(row["seconds"].items(), key=lambda item: item[1]):
            print(f"{name:32} {seconds:8.3f} {seconds / own:6.2f} {row['steps'][name]:6} {row['residuals'][name]:9.6f}")
        versions = f"torch {torch.__version__.split('+')[0]} and deepinv {metadata.version('deepinv')}"
        print(json.dumps(row | {"case": f"{row['case']}, {versions}"}))


if __name__ == "__main__":
    main(*sys.argv[1:])
