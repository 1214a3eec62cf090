"""Maps by index: sparse matrices, gathers, samples of images, pools, against autograd and equal ways by hand.

`A.H(v)` and `A(x)` are timed twice, each with an operator of its own: called in a loop, and called within `frozen()`,
as solvers do, where what the operator depends on is not looked at again.

deepinv lives in the second environment, where `make bench` runs this file by itself, if there is one;
`.venv-interop/bin/python tests/benchmarks/bench_maps.py` prints milliseconds.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import maps
import pytest
import torch
from bench_solvers import Clock
from contenders import Skipped, Ways, assert_equal
from interleave import Comparison
from scipy.sparse.linalg import lsqr
from torch import Tensor

import adjointlab as al

Sizes = tuple[Any, ...]

# Each with its sizes, and tiny ones for a quick run.
ROWS: dict[str, tuple[Callable[..., maps.Map], Sizes, Sizes]] = {
    "CSR": (maps.matrix, ("CSR", 7680, 16384, 250), ("CSR", 30, 64, 5)),
    "COO": (maps.matrix, ("COO", 7680, 16384, 250), ("COO", 30, 64, 5)),
    "Radon": (maps.radon, (128, 60), (16, 5)),
    "ray sum": (maps.ray_sum, (2000, 128, 128), (20, 8, 16)),
    "fan beam": (maps.fan_beam, (128, 90, 128, 128), (16, 5, 16, 16)),
    "cone beam": (maps.cone_beam, (32, 24, 24, 48), (8, 3, 6, 12)),
    "gather": (maps.gather, (400_000, 256), (400, 16)),
    "nonuniform FFT": (maps.nonuniform_fourier, (128, 20_000, 4), (16, 50, 4)),
    "warp": (maps.warp, (3, 256), (3, 16)),
    "bicubic": (maps.resized, ("bicubic", 3, 128, 512), ("bicubic", 3, 8, 32)),
    "nearest": (maps.resized, ("nearest", 3, 128, 512), ("nearest", 3, 8, 32)),
    "antialiased": (maps.resized, ("bilinear", 3, 512, 128), ("bilinear", 3, 32, 8)),
    "pool": (maps.pooled, (4, 512), (4, 32)),
    "wavelets": (maps.wavelets, (256, 3), (16, 2)),
    "coded aperture": (maps.coded_aperture, (28, 128), (4, 16)),
}


class Setup:
    """A map with two operators, the second of which is for calls within `frozen()`."""

    def __init__(self, kind: str, *, quick: bool) -> None:
        make, sizes, tiny = ROWS[kind]
        self.map = make(*(tiny if quick else sizes))
        self.operator, self.second = (al.linear_operator(self.map.forward, self.map.x) for _ in range(2))
        chosen = [
            [line for line in A.explain().splitlines() if line.startswith("kernel:")]
            for A in (self.operator, self.second)
        ]
        self.alike = chosen[0] == chosen[1]


@functools.lru_cache(maxsize=1)
def _setup(kind: str, *, quick: bool) -> Setup:
    return Setup(kind, quick=quick)


@pytest.fixture(autouse=True)
def _on_the_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("the peers run on the CPU")


@pytest.mark.parametrize("which", ["adjoint", "forward"])  # of one map in turn, so that it is built once
@pytest.mark.parametrize("kind", ROWS)
def test_map(kind: str, which: str, quick: bool, compare: Any) -> None:
    s = _setup(kind, quick=quick)
    ways, skipped = ways_of(s, which)
    facts = {"section": "maps", "map": which, "kind": kind, "case": s.map.case, "alike": s.alike}
    with s.second.frozen():
        assert_equal(ways, "eager")
        compare(ways, skipped=skipped, **facts)


def ways_of(s: Setup, which: str) -> tuple[Ways, Skipped]:
    m, A, B = s.map, s.operator, s.second
    if which == "adjoint":
        ways, skipped = maps.adjoint_ways(m)
        return {"adjointlab": lambda: A.H(m.v), "frozen": lambda: B.H(m.v), **ways}, skipped
    ways, skipped = maps.forward_ways(m)
    return {"adjointlab": lambda: A(m.x), "frozen": lambda: B(m.x), **ways}, skipped


# -- what an operator costs before it is called ------------------------------------------------------------------------

KEPT: dict[str, tuple[Callable[..., maps.Map], Sizes, Sizes]] = {
    "CSR": ROWS["CSR"],
    "Radon": ROWS["Radon"],
    "10 M entries": (maps.ray_sum, (20_000, 500, 256), (20, 8, 16)),
}


@pytest.mark.parametrize("kind", KEPT)
def test_build(kind: str, quick: bool, benchmark: Any) -> None:
    make, sizes, tiny = KEPT[kind]
    m = make(*(tiny if quick else sizes))
    built(make(*tiny))  # the first operator of a process loads what all of them need
    found = [built(m) for _ in range(1 if quick else 3)]
    seconds = statistics.median(each for each, _ in found)
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    benchmark.extra_info.update(
        section="kept", kind=kind, case=m.case, seconds={"adjointlab": seconds}, kept=found[-1][1]
    )


def built(m: maps.Map) -> tuple[float, dict[str, float]]:
    """Return the seconds until an operator has been called both ways, and the megabytes of its matrices, 0 for none."""
    start = time.perf_counter()
    A = al.linear_operator(m.forward, m.x)
    A(m.x), A.H(m.v)
    seconds, account = time.perf_counter() - start, A.explain()
    sizes = {}
    for name, rows, columns in (("A", m.v, m.x), ("A.H", m.x, m.v)):
        line = re.search(rf"sparse map {rows.numel():,} × {columns.numel():,} .*\(([\d.]+) MB\)", account)
        sizes[name] = float(line[1]) if line else 0.0
    return seconds, sizes


# -- a part of the data ------------------------------------------------------------------------------------------------

EIGHTH = slice(0, None, 8)


@pytest.mark.parametrize("which", ["adjoint", "forward"])
def test_rows(which: str, quick: bool, compare: Comparison) -> None:
    m = maps.radon(*((16, 8) if quick else (128, 64)))
    A = al.linear_operator(m.forward, m.x)
    P, v = A.rows(EIGHTH), m.v[EIGHTH].contiguous()
    maps_of: dict[str, Ways] = {
        "adjoint": {"an eighth of the views": lambda: P.H(v), "all views": lambda: A.H(m.v)},
        "forward": {"an eighth of the views": lambda: P(m.x), "all views": lambda: A(m.x)},
    }
    assert torch.allclose(P(m.x), A(m.x)[EIGHTH], atol=1e-4)
    compare(maps_of[which], section="subsets", case=f"{m.case}, {which}", share=0.6)


# -- a solver ----------------------------------------------------------------------------------------------------------

STEPS = 50


def test_tomography(quick: bool, compare: Comparison) -> None:
    m = maps.radon(*((16, 20) if quick else (256, 180)))
    y = m.forward(disc(m.x.shape[-1]))
    y = y + 1e-2 * y.std() * m.v
    M, data = m.matrix, y.reshape(-1).numpy()
    start = time.perf_counter()
    A = al.linear_operator(m.forward, m.x)
    build = time.perf_counter() - start
    ways: Ways = {
        "adjointlab": lambda: al.solvers.cgls(A, y, maxiter=STEPS, tol=0).x,
        "SciPy lsqr": lambda: torch.from_numpy(lsqr(M, data, atol=0, btol=0, conlim=0, iter_lim=STEPS)[0]),
    }
    residuals = {
        name: float((m.forward(way().reshape_as(m.x).float()) - y).norm() / y.norm()) for name, way in ways.items()
    }
    compare(ways, share=2.0, section="tomography", case=m.case, residuals=residuals, build=build)
    assert residuals["adjointlab"] <= 1.01 * residuals["SciPy lsqr"]


SUBSETS = 12


def test_subsets(quick: bool, compare: Comparison) -> None:
    m = maps.radon(*((16, 24) if quick else (256, 180)))
    y = m.forward(disc(m.x.shape[-1]))
    y = y + 1e-2 * y.std() * m.v
    A = al.linear_operator(m.forward, m.x)
    parts = [A.rows(slice(i, None, SUBSETS)) for i in range(SUBSETS)]
    data = [y[i::SUBSETS].contiguous() for i in range(SUBSETS)]
    steps = 5 if quick else STEPS
    target = float(al.solvers.cgls(A, y, maxiter=steps, tol=0).residual_norms[-1])

    def by_parts() -> al.solvers.Solution:
        return al.solvers.svrg(parts, data, maxiter=100, tol=0, callback=lambda x, info: float(info.residual) <= target)

    reached = by_parts()
    ways: Ways = {"adjointlab": lambda: by_parts().x, "cgls": lambda: al.solvers.cgls(A, y, maxiter=steps, tol=0).x}
    compare(ways, share=2.0, section="ordered subsets", case=m.case, epochs=int(reached.iterations), subsets=SUBSETS)
    assert float(reached.residual_norms[-1]) <= target


def disc(n: int) -> Tensor:
    """Return the image of a disc with a hole."""
    at = torch.linspace(-1, 1, n)
    radius = (at[:, None] ** 2 + at**2).sqrt()
    return ((radius > 0.3) & (radius < 0.8)).float()[None, None]


# -- beside deepinv ----------------------------------------------------------------------------------------------------


def test_radon_beside_deepinv(quick: bool, benchmark: Any) -> None:
    python = Path(__file__).parents[2] / ".venv-interop/bin/python"
    if quick or not python.exists():
        pytest.skip("deepinv lives in an environment of its own: make .venv-interop/.stamp")
    run = subprocess.run([python, __file__], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    benchmark.pedantic(lambda: None, rounds=1, iterations=1)
    benchmark.extra_info.update(json.loads(run.stdout.splitlines()[-1]))


def radon_beside_deepinv() -> dict[str, Any]:
    """Time adjoints of Radon transforms: that of `Tomography` samples as many places of as many angles, but others."""
    import deepinv

    s = Setup("Radon", quick=False)
    ways, _ = ways_of(s, "adjoint")
    n, angles = s.map.x.shape[-1], s.map.v.shape[0]
    physics = deepinv.physics.Tomography(angles, n, circle=True, normalize=False)
    sinogram = s.map.v[:, 0].mT[None, None].contiguous()
    ways["deepinv"] = lambda: physics.A_adjoint(sinogram)
    versions = f"torch {torch.__version__.split('+')[0]} and deepinv {metadata.version('deepinv')}"
    facts = {"section": "beside deepinv", "case": f"{s.map.case}, {versions}"}
    with s.second.frozen():
        return facts | {"seconds": Comparison(Clock(), torch.device("cpu"))(ways, **facts)}


def main() -> None:
    """Print a table and a line of JSON, without pytest: what the second environment is for."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what deepinv says when it is imported
        row = radon_beside_deepinv()
    for name, seconds in sorted(row["seconds"].items(), key=lambda item: item[1]):
        print(f"{name:12} {1e3 * seconds:9.3f} ms")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
