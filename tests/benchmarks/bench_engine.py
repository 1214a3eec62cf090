"""The engine itself: traced adjoints against the bare kernels in them, overhead, memory, time to build and import."""

from __future__ import annotations

import functools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contenders import Convolution, Setup, assert_equal
from torch import Tensor

import adjointlab as al

aten = torch.ops.aten


def _draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype, device="cpu").to(device)


# -- against bare kernels ----------------------------------------------------------------------------------------------

CONVOLUTIONS = [
    Convolution(1, 1, 1, (256,) * 2, 3),
    Convolution(1, 3, 64, (128,) * 2, 3),
    Convolution(1, 64, 64, (64,) * 2, 3),
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution_without_lowering(case: Convolution, device: torch.device, compare: Any) -> None:
    s = Setup(case, device)
    A = al.linear_operator(s.module, s.x, lowering=False)
    n = case.ndim
    ones, zeros, half = [1] * n, [0] * n, [s.half] * n
    ways = {
        "traced": lambda: A.H(s.v),
        "bare kernel": lambda: aten.convolution_backward(
            s.v, s.x, s.weight, None, ones, half, ones, False, zeros, 1, [True, False, False]
        )[0],
        "eager vjp": lambda: torch.func.vjp(s.module, s.x)[1](s.v)[0],
    }
    assert_equal(ways, "bare kernel")
    compare(ways, section="bare", case=f"convolution {case}", most=51)


def test_masked_fourier_transform(quick: bool, device: torch.device, compare: Any) -> None:
    n = 32 if quick else 256
    mask = (_draw(n, n, device=device) > 0).float()
    x = _draw(4, n, n, device=device, dtype=torch.complex64)

    def forward(x: Tensor) -> Tensor:
        return mask * torch.fft.fft2(x)

    A = al.linear_operator(forward, x)
    ways = {
        "traced": lambda: A.H(x),
        "bare kernel": lambda: aten._fft_c2c.default(mask * x, [1, 2], 0, False),
        "eager vjp": lambda: torch.func.vjp(forward, x)[1](x)[0],
        "forward": lambda: A(x),
    }
    assert_equal({name: ways[name] for name in ("traced", "bare kernel", "eager vjp")}, "bare kernel")
    compare(ways, section="bare", case=f"mask of fft2, 4 × {n}²", most=51)


@pytest.mark.parametrize("sampled", ["grids at every call", "grids ready"])
def test_radon(sampled: str, quick: bool, device: torch.device, compare: Any) -> None:
    n, angles = (16, 5) if quick else (128, 60)
    theta = torch.arange(angles) * (math.pi / angles)
    cos, sin, zero = theta.cos(), theta.sin(), torch.zeros_like(theta)
    rotations = torch.stack([cos, -sin, zero, sin, cos, zero], dim=-1).reshape(-1, 2, 3).to(device)
    ready = F.affine_grid(rotations, [angles, 1, n, n], align_corners=False)

    def radon(image: Tensor) -> Tensor:
        grid = ready if sampled == "grids ready" else F.affine_grid(rotations, [angles, 1, n, n], align_corners=False)
        return F.grid_sample(image.expand(angles, -1, -1, -1), grid, align_corners=False).sum(-2)

    x, v = _draw(1, 1, n, n, device=device), _draw(angles, 1, n, device=device)
    A = al.linear_operator(radon, x)
    kept = torch.func.vjp(radon, x)[1]
    ways = {
        "traced": lambda: A.H(v),
        "kept pull-back": lambda: kept(v)[0],
        "eager vjp": lambda: torch.func.vjp(radon, x)[1](v)[0],
    }
    assert_equal(ways, "kept pull-back")
    compare(ways, section="bare", case=f"Radon, {n}², {angles} angles, {sampled}", share=0.6)


# -- finite differences ------------------------------------------------------------------------------------------------


def padded(x: Tensor) -> Tensor:
    """Return ``[x[i + 1] − x[i], x[:, j + 1] − x[:, j]]``, zero at the last row or column."""
    rows = F.pad(x[1:] - x[:-1], (0, 0, 0, 1))
    columns = F.pad(x[:, 1:] - x[:, :-1], (0, 1))
    return torch.stack([rows, columns])


def in_place(x: Tensor) -> Tensor:
    """Return the same, written into a buffer."""
    out = x.new_zeros(2, *x.shape)
    out[0, :-1] = x[1:] - x[:-1]
    out[1, :, :-1] = x[:, 1:] - x[:, :-1]
    return out


def by_hand(v: Tensor) -> Tensor:
    """Return the adjoint of either as a person writes it, minus the divergence: here added up in place."""
    rows, columns = v[0, :-1], v[1, :, :-1]
    out = v.new_zeros(v.shape[1:])
    out[1:] += rows
    out[:-1] -= rows
    out[:, 1:] += columns
    out[:, :-1] -= columns
    return out


def by_pads(v: Tensor) -> Tensor:
    """Return the same in one expression, which compilers like better."""
    rows, columns = v[0, :-1], v[1, :, :-1]
    return F.pad(rows, (0, 0, 1, 0)) - F.pad(rows, (0, 0, 0, 1)) + F.pad(columns, (1, 0)) - F.pad(columns, (0, 1))


# torch's own code, when torch.compile first loads its parts
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("forward", [padded, in_place], ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [512, 2048])
def test_finite_differences(
    size: int, forward: Callable[[Tensor], Tensor], quick: bool, device: torch.device, compare: Any
) -> None:
    n = size // 16 if quick else size
    x, v = _draw(n, n, device=device), _draw(2, n, n, device=device)
    A, B = (al.linear_operator(forward, x, engine=engine) for engine in ("auto", "compiled"))
    in_place_compiled, pads_compiled = torch.compile(by_hand), torch.compile(by_pads)
    # As many bytes as the adjoint reads and writes: two images in, one out.
    source, target = torch.ones(3 * n * n // 2, device=device), torch.empty(3 * n * n // 2, device=device)
    ways = {
        "traced": lambda: A.H(v),
        "compiled": lambda: B.H(v),
        "by hand": lambda: by_hand(v),
        "by pads": lambda: by_pads(v),
        "by hand, compiled": lambda: in_place_compiled(v),
        "by pads, compiled": lambda: pads_compiled(v),
        "eager vjp": lambda: torch.func.vjp(forward, x)[1](v)[0],
    }
    assert_equal(ways, "by hand")
    assert B.engine == "compiled", B.explain()
    ways["copy"] = lambda: target.copy_(source)
    compare(ways, section="differences", case=f"{n}², {forward.__name__.replace('_', ' ')}", size=size, most=101)


# -- calls -------------------------------------------------------------------------------------------------------------


def test_call_overhead(device: torch.device, compare: Any) -> None:
    s = Setup(Convolution(1, 1, 1, (7, 7), 3), device)
    kept = torch.func.vjp(s.module, s.x)[1]
    A = s.operator
    ways = {
        "adjointlab": lambda: A.H(s.v),
        "A(x)": lambda: A(s.x),
        "conv_transpose": s.native_adjoint,
        "kept pull-back": lambda: kept(s.v)[0],
        "eager vjp": lambda: torch.func.vjp(s.module, s.x)[1](s.v)[0],
    }
    compare(ways, section="overhead", case="7×7 image, 3² kernel", most=2001)


# -- in processes of their own -----------------------------------------------------------------------------------------


def _probe(name: str, *arguments: object) -> dict[str, float]:
    script = Path(__file__).with_name("probes.py")
    command = [sys.executable, "-W", "ignore", str(script), name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _median(rounds: int, probe: Callable[[], dict[str, float]]) -> dict[str, float]:
    found = [probe() for _ in range(rounds)]
    return {key: statistics.median(each[key] for each in found) for key in found[0]}


@pytest.mark.parametrize("kind", ["import", "build"])
def test_start(kind: str, quick: bool, device: torch.device, benchmark: Any) -> None:
    found = _median(1 if quick else 3, functools.partial(_probe, kind, *([device] if kind == "build" else [])))
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(section=kind, case=kind, seconds=found)


def test_memory(quick: bool, benchmark: Any) -> None:
    found = _probe("memory", 64 if quick else 1024)
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(section="memory", case="12 convolutions", bytes=found)
