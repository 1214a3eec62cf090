"""Convolutions: the rows of DESIGN §6, and sweeps over sizes, against native kernels and other libraries."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contenders import Convolution, Setup, adjoint_ways, assert_equal, forward_ways, gradient_ways, recorded
from targets import SLOWER

import adjointlab as al

ROWS = [
    Convolution(1, 1, 1, (256,) * 2, 3),
    Convolution(1, 1, 1, (512,) * 2, 11),
    Convolution(1, 1, 1, (512,) * 2, 31),
    Convolution(1, 3, 64, (128,) * 2, 3),
    Convolution(1, 64, 64, (64,) * 2, 3),
    Convolution(1, 1, 8, (48,) * 3, 3),
    Convolution(1, 1, 1, (64,) * 3, 7),
    Convolution(4, 1, 1, (65536,), 9),
]

CYCLIC = [
    Convolution(1, 1, 1, (256,) * 2, 11, circular=True),
    Convolution(1, 1, 1, (512,) * 2, 31, circular=True),
    Convolution(1, 1, 1, (1024,) * 2, 11, circular=True),
    Convolution(1, 1, 1, (64,) * 3, 7, circular=True),
]
STRIDED = [
    Convolution(1, 1, 1, (512,) * 2, 5, 2),
    Convolution(1, 1, 1, (512,) * 2, 11, 2),
    Convolution(1, 1, 1, (512,) * 2, 9, 4),
    Convolution(1, 3, 64, (128,) * 2, 3, 2),
    Convolution(1, 64, 64, (64,) * 2, 3, 2),
    Convolution(1, 1, 1, (64,) * 3, 5, 2),
    Convolution(4, 1, 1, (65536,), 9, 4),
]


def _sweep() -> list[Convolution]:
    cases = [Convolution(1, 1, 1, (n,), k) for k in (3, 31) for n in (1024, 32768, 1048576)]
    cases += [Convolution(1, 1, 1, (n,) * 2, k) for k in (3, 5, 11, 31, 63) for n in (64, 128, 256, 512, 1024, 2048)]
    cases += [Convolution(1, 1, 1, (n,) * 3, k) for k in (3, 5, 9, 15) for n in (16, 32, 64, 128, 192)]
    for c_in, c_out in ((3, 3), (1, 8), (8, 8), (3, 64), (64, 64)):
        cases += [Convolution(1, c_in, c_out, (n,) * 2, k) for k in (3, 7) for n in (64, 256)]
    cases += [Convolution(8, 1, 1, (n,) * 2, k) for k in (3, 11) for n in (64, 256)]
    cases += [Convolution(1, c, 8, (n,) * 3, k) for c in (1, 8) for k in (3, 5) for n in (16, 48)]
    return cases


def _tiny(case: Convolution) -> Convolution:
    shape = tuple(min(n, {1: 256, 2: 32, 3: 12}[case.ndim]) for n in case.shape)
    return replace(case, c_in=min(case.c_in, 8), c_out=min(case.c_out, 8), shape=shape, width=min(case.width, 7))


@functools.lru_cache(maxsize=2)
def _setup(case: Convolution, device: torch.device) -> Setup:
    return Setup(case, device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        of = {
            test_sweep: _sweep(),
            test_sweep_again: _sweep(),
            test_strided: STRIDED,
            test_gradient: ROWS + CYCLIC,
            test_exported: ROWS[:3] + CYCLIC[:1],
        }
        cases = of.get(metafunc.function, ROWS)
        if metafunc.config.getoption("--quick", default=False):
            cases = list(dict.fromkeys(map(_tiny, cases)))
        metafunc.parametrize("case", cases, ids=str)


@pytest.fixture
def setup(case: Convolution, device: torch.device) -> Setup:
    return _setup(case, device)


def test_adjoint(setup: Setup, compare: Any) -> None:
    ways, skipped = adjoint_ways(setup)
    assert_equal(ways, "conv_transpose")
    compare(ways, skipped=skipped, section="rows", map="adjoint", **setup.case.facts)


def test_forward(setup: Setup, compare: Any) -> None:
    ways, skipped = forward_ways(setup)
    assert_equal(ways, "conv")
    compare(ways, skipped=skipped, section="rows", map="forward", **setup.case.facts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA, and so no CUDA graph")
def test_recorded(setup: Setup, compare: Any) -> None:
    ways = {name: recorded(way) for name, way in adjoint_ways(setup)[0].items() if name not in {"eager vjp", "JAX"}}
    assert_equal(ways, "conv_transpose")
    compare(ways, section="recorded", **setup.case.facts)


def test_gradient(setup: Setup, compare: Any) -> None:
    A, x, v = setup.operator, setup.x, setup.v
    objective = al.LeastSquares(A, v)
    ways = {
        "gradient": lambda: objective.gradient(x), "parts": lambda: (A(x), A.H(v))[1],
        "forward": lambda: A(x), "adjoint": lambda: A.H(v),
    }  # fmt: skip
    # Solvers call it in a loop, which finds memory where it has left it; each of the other ways leaves it elsewhere.
    compare(ways, section="gradient", share=0.6, most=401, settle=4e-3, **setup.case.facts)


def test_strided(setup: Setup, compare: Any) -> None:
    ways, skipped = adjoint_ways(setup)
    assert_equal(ways, "conv_transpose")
    compare(ways, skipped=skipped, section="strided", **setup.case.facts)


def test_exported(setup: Setup, compare: Any, tmp_path: Path) -> None:
    A, v = setup.operator, setup.v
    al.export(A.H, tmp_path / "adjoint.pt2")
    exported = torch.export.load(tmp_path / "adjoint.pt2").module()
    ways = {"adjointlab": lambda: A.H(v), "exported": lambda: exported(v), "its forward": lambda: exported.forward(v)}
    assert_equal(ways, "exported")
    compare(ways, section="exported", **setup.case.facts)


def test_learning(setup: Setup, compare: Any) -> None:
    ways = gradient_ways(setup)
    assert_equal(ways, "module", tolerance=1e-4)  # sums over all of the image
    compare(ways, section="learning", **setup.case.facts)


# -- sweeps: ours against native ---------------------------------------------------------------------------------------

LIMIT = 3.0  # seconds that one native run may take
BUILD_LIMIT = 2.0  # ... of native forward and adjoint where our operator is still built: its self-check runs them

_ROUNDS: dict[str, Any] = {"share": 0.1, "most": 401}
# Of so many points, some are above by chance: the slow moments of the machine last for seconds. They are measured once
# more at the end, and count as they are then.
_ABOVE: set[tuple[Convolution, str]] = set()

# Seconds a multiplication of the native kernel, (forward, adjoint), by dimension, channels and width: from the largest
# size so far. Sizes ascend, so that what would take too long is known before it is run.
_RATES: dict[tuple[Any, ...], tuple[float, float]] = {}


def _predicted(case: Convolution) -> tuple[float, float]:
    key = (case.ndim, case.batch, case.c_in, case.c_out, case.width)
    forward, adjoint = _RATES.get(key, (0.0, 0.0))
    return forward * case.macs, adjoint * case.macs


def _learn(case: Convolution, forward: float | None, adjoint: float | None) -> None:
    key = (case.ndim, case.batch, case.c_in, case.c_out, case.width)
    old = _RATES.get(key, (0.0, 0.0))
    _RATES[key] = (
        forward / case.macs if forward else old[0],
        adjoint / case.macs if adjoint else old[1],
    )


@pytest.mark.parametrize("which", ["adjoint", "forward"])  # of one case in turn, so that it is built once
def test_sweep(case: Convolution, which: str, device: torch.device, compare: Any) -> None:
    facts = {"section": "sweep", "map": which, **case.facts}
    forward, adjoint = _predicted(case)
    native = adjoint if which == "adjoint" else forward
    skipped = {"native": f"about {native:.0f} s, predicted"} if native > LIMIT else {}
    if forward + adjoint > BUILD_LIMIT:
        skipped |= {"adjointlab": "not built: its self-check would run the native kernels"}
        compare.skip(skipped, **facts)
        return
    ways = _sweep_ways(_setup(case, device), which)
    if skipped:
        ways = {"adjointlab": ways["adjointlab"]}
    medians = compare(ways, **_ROUNDS, skipped=skipped, **facts)
    if "native" in ways:
        _learn(case, *((None, medians["native"]) if which == "adjoint" else (medians["native"], None)))
        if medians["adjointlab"] > SLOWER * medians.get("module", medians["native"]):
            _ABOVE.add((case, which))


@pytest.mark.parametrize("which", ["adjoint", "forward"])
def test_sweep_again(case: Convolution, which: str, device: torch.device, compare: Any) -> None:
    if (case, which) not in _ABOVE:
        pytest.skip("it was not slower")
    ways = _sweep_ways(_setup(case, device), which)
    compare(ways, **_ROUNDS, section="sweep", map=which, again=True, **case.facts)


def _sweep_ways(s: Setup, which: str) -> dict[str, Any]:
    A, x, v = s.operator, s.x, s.v
    if which == "adjoint":
        return {"adjointlab": lambda: A.H(v), "native": s.native_adjoint}
    return {"adjointlab": lambda: A(x), "native": s.native_forward, "module": lambda: s.module(x)}
