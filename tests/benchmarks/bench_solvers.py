"""Deblurring a 512² photograph with an 11² kernel: 50 steps of `cgls` against the same in other libraries.

Every peer minimises `‖Ax − y‖²` for the same kernel (circular, so that the FFT diagonalises it, the best case for the
peers), single precision, 50 steps, no tolerance, one thread. Times are taken in turns; what counts are their ratios in
one run. Processor time is taken rather than wall time, which on a machine with other work says more about that.

Run `python tests/benchmarks/bench_solvers.py`, or `make bench`.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, lsmr
from torch import Tensor, nn

import adjointlab as al

SIZE, WIDTH, STEPS, ROUNDS = 512, 11, 50, 3


def photograph() -> Tensor:
    from skimage import data

    return torch.from_numpy(data.camera()).float().div(255)[None, None]


def kernel() -> Tensor:
    profile = torch.exp(-0.5 * (torch.arange(WIDTH) - WIDTH // 2).square() / 2.0**2)
    blur = profile[:, None] * profile
    return (blur / blur.sum())[None, None]


class Solve:
    """One way to solve the problem: `run()` returns the image, and `name` says what ran."""

    def __init__(self, name: str, run: Callable[[], Tensor]) -> None:
        self.name, self.run = name, run


def ways(y: Tensor, k: Tensor) -> list[Solve]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peers say when they are imported
        found = [*ours(y, k), *by_fft(y, k), *by_pylops(y, k)]
        found += by_deepinv(y, k)
    return found


def ours(y: Tensor, k: Tensor) -> list[Solve]:
    c = nn.Conv2d(1, 1, WIDTH, padding=WIDTH // 2, padding_mode="circular", bias=False)
    c.weight = nn.Parameter(k, requires_grad=False)
    A = al.linear_operator(c, y)
    return [
        Solve("adjointlab cgls", lambda: al.solvers.cgls(A, y, maxiter=STEPS, tol=0).x),
        Solve("adjointlab lsmr", lambda: al.solvers.lsmr(A, y, maxiter=STEPS, atol=0, btol=0, conlim=0).x),
    ]


def by_fft(y: Tensor, k: Tensor) -> list[Solve]:
    """SciPy's lsmr, with a forward and an adjoint written by hand as products of FFTs."""
    from scipy import fft

    spectrum = fft.rfft2(np.roll(np.pad(k[0, 0].numpy(), (0, SIZE - WIDTH)), (-(WIDTH // 2),) * 2, (0, 1)))

    def product(factor: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        def apply(x: np.ndarray) -> np.ndarray:
            image = x.reshape(SIZE, SIZE).astype(np.float32, copy=False)
            return fft.irfft2(fft.rfft2(image) * factor, s=image.shape).ravel()

        return apply

    A = LinearOperator((SIZE**2,) * 2, matvec=product(spectrum), rmatvec=product(spectrum.conj()), dtype=np.float32)
    data = y.numpy().ravel()

    def run() -> Tensor:
        return torch.from_numpy(lsmr(A, data, maxiter=STEPS, atol=0, btol=0, conlim=0)[0]).reshape(y.shape)

    return [Solve("SciPy lsmr, FFT by hand", run)]


def by_pylops(y: Tensor, k: Tensor) -> list[Solve]:
    import pylops

    h = k[0, 0].numpy()
    data = y.numpy().ravel()
    A = pylops.signalprocessing.Convolve2D((SIZE, SIZE), h=h, offset=(WIDTH // 2,) * 2, dtype="float32")

    def shaped(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x.astype(np.float32)).reshape(y.shape)

    return [
        Solve("PyLops cgls", lambda: shaped(pylops.cgls(A, data, niter=STEPS, tol=0)[0])),
        Solve("PyLops lsqr", lambda: shaped(pylops.lsqr(A, data, niter=STEPS, atol=0, btol=0, conlim=0)[0])),
    ]


def by_deepinv(y: Tensor, k: Tensor) -> list[Solve]:
    try:
        import deepinv
    except ImportError:  # it lives in the second environment
        return []
    from deepinv.optim.linear import least_squares

    found = []
    for label, physics in (
        ("FFT blur", deepinv.physics.BlurFFT(img_size=y.shape[1:], filter=k)),
        ("blur", deepinv.physics.Blur(filter=k, padding="circular")),
    ):
        for solver in ("CG", "lsqr"):

            def run(physics=physics, solver=solver) -> Tensor:
                return least_squares(physics.A, physics.A_adjoint, y, solver=solver, max_iter=STEPS, tol=0.0)

            found.append(Solve(f"deepinv {solver}, {label}", run))
    return found


def residual(k: Tensor, y: Tensor, x: Tensor) -> float:
    half = WIDTH // 2
    padded = nn.functional.pad(x.double(), (half,) * 4, mode="circular")
    return float((nn.functional.conv2d(padded, k.double()) - y).norm() / y.norm())


def compare(rounds: int = ROUNDS) -> dict[str, tuple[float, float, float]]:
    """Return seconds, ratio to ours (both medians over rounds) and relative residual of every way."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    k = kernel()
    half = WIDTH // 2
    y = nn.functional.conv2d(nn.functional.pad(photograph(), (half,) * 4, mode="circular"), k)
    y = y + 1e-2 * torch.randn_like(y)
    times: dict[str, list[float]] = {}
    residuals: dict[str, float] = {}
    with torch.no_grad():
        found = ways(y, k)
        for turn in range(rounds + 1):
            for way in found:
                start = time.process_time()
                x = way.run()
                if turn:  # the first turn warms up
                    times.setdefault(way.name, []).append(time.process_time() - start)
                else:
                    residuals[way.name] = residual(k, y, x)
    own = times["adjointlab cgls"]
    return {
        name: (
            statistics.median(taken),
            statistics.median(a / b for a, b in zip(taken, own, strict=True)),
            residuals[name],
        )
        for name, taken in times.items()
    }


def test_deblurring_takes_half_the_time_of_the_fastest_peer(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("benchmark_enable"):
        pytest.skip("a benchmark: make bench")
    table = compare()
    report(table)
    peers = {name: row for name, row in table.items() if not name.startswith("adjointlab")}
    best = min(peers.values(), key=lambda row: row[1])
    assert best[1] >= 2
    assert table["adjointlab cgls"][2] <= 1.01 * min(row[2] for row in peers.values())


def report(table: dict[str, tuple[float, float, float]]) -> None:
    print(f"\n{'way':32} {'seconds':>9} {'ratio':>7} {'residual':>10}")
    for name, (seconds, ratio, size) in sorted(table.items(), key=lambda item: item[1]):
        print(f"{name:32} {seconds:9.3f} {ratio:7.2f} {size:10.6f}")


if __name__ == "__main__":
    report(compare())
