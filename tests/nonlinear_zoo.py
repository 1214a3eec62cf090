"""Functions that are not linear, by name, each with the shapes of a point where it is differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REAL, COMPLEX = torch.float64, torch.complex128


class Case(NamedTuple):
    """A function and the shapes of its point; ``positive`` asks for positive entries."""

    function: Callable[..., Any]
    shapes: Any
    dtype: torch.dtype = REAL
    positive: bool = False

    def point(self, seed: int = 0) -> Any:
        """Return a random point."""
        draw = torch.Generator().manual_seed(seed)

        def of(shapes: Any) -> Any:
            if isinstance(shapes, dict):
                return {name: of(shape) for name, shape in shapes.items()}
            if isinstance(shapes, list):
                return tuple(map(of, shapes))
            x = torch.randn(shapes, dtype=self.dtype, generator=draw)
            return x.abs() + 0.5 if self.positive else x

        return of(self.shapes)


def drawn(*shape: int, dtype: torch.dtype = REAL) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:] *= y[:-1].clone()
    return y.sin_()


def steps(x: Tensor) -> Tensor:
    for _ in range(5):
        x = x + 0.1 * torch.sin(x.roll(1))
    return x


def frozen(module: nn.Module) -> nn.Module:
    return module.double().eval().requires_grad_(False)


_W, _K, _M = drawn(5, 5), drawn(2, 2, 3, 3), drawn(4, 4, dtype=COMPLEX)
_EYE, _MASK, _IMAGE = torch.eye(4, dtype=REAL), torch.exp(2j * drawn(3, 4, 4)), drawn(1, 1, 6, 6)
_GRID = F.affine_grid(torch.eye(2, 3, dtype=REAL)[None], (1, 1, 6, 6), align_corners=False)
_TIMES = torch.arange(1.0, 4.0, dtype=REAL)[:, None]

ZOO: dict[str, Case] = {
    "square": Case(lambda x: x**2, (5,)),
    "sin": Case(torch.sin, (5,)),
    "sigmoid": Case(torch.sigmoid, (5,)),
    "erf": Case(torch.erf, (5,)),
    "softmax": Case(lambda x: torch.softmax(x, -1), (3, 5)),
    "logsumexp": Case(lambda x: torch.logsumexp(x, -1), (3, 5)),
    "unit": Case(lambda x: x / x.norm(), (5,)),
    "std": Case(lambda x: x.std(), (5,)),
    "prod": Case(lambda x: x.prod(), (5,)),
    "cumprod": Case(lambda x: x.cumprod(0), (5,)),
    "sort": Case(lambda x: x.sort().values, (5,)),
    "amax": Case(lambda x: x.amax(0), (4, 3)),
    "rational": Case(lambda x: x / (1 + x**2), (5,)),
    "gelu": Case(F.gelu, (5,)),
    "relu": Case(F.relu, (5,)),
    "softplus": Case(F.softplus, (5,)),
    "choice": Case(lambda x: torch.where(x > 0, x**2, x.exp()), (5,)),
    "in place": Case(in_place, (5,)),
    "steps": Case(steps, (5,)),
    "indices": Case(lambda x: (x**2)[torch.tensor([0, 0, 2])], (5,)),
    "quadratic": Case(lambda x: x @ _W @ x, (5,)),
    "outer": Case(lambda x: torch.outer(x, x), (5,)),
    "gram": Case(lambda x: x @ x.mT, (3, 4)),
    "einsum": Case(lambda x: torch.einsum("ij,jk,ki->i", x, x, x), (3, 3)),
    "inverse": Case(lambda x: torch.linalg.inv(x + 4 * _EYE), (4, 4)),
    "solve": Case(lambda x: torch.linalg.solve(x + 4 * _EYE, torch.ones(4, dtype=REAL)), (4, 4)),
    "det": Case(torch.linalg.det, (4, 4)),
    "singular values": Case(torch.linalg.svdvals, (4, 3)),
    "cholesky": Case(lambda x: torch.linalg.cholesky(x @ x.mT + _EYE), (4, 4)),
    "convolution and relu": Case(lambda x: F.relu(F.conv2d(x, _K, padding=1)), (1, 2, 6, 6)),
    "circular": Case(lambda x: torch.sin(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), _K)), (1, 2, 6, 6)),
    "image and kernel": Case(lambda x, k: F.conv2d(x, k, padding=1), [(1, 2, 6, 6), (2, 2, 3, 3)]),
    "max pool": Case(lambda x: F.max_pool2d(x, 2), (1, 2, 6, 6)),
    "mean pool": Case(lambda x: F.avg_pool2d(x**2, 2), (1, 2, 6, 6)),
    "interpolation": Case(lambda x: F.interpolate(x**2, scale_factor=2, mode="bilinear"), (1, 2, 6, 6)),
    "layer norm": Case(frozen(nn.LayerNorm(5)), (3, 5)),
    "group norm": Case(frozen(nn.GroupNorm(1, 2)), (1, 2, 4, 4)),
    "batch norm": Case(frozen(nn.Sequential(nn.BatchNorm2d(2), nn.Tanh())), (2, 2, 4, 4)),
    "recurrent cell": Case(frozen(nn.GRUCell(3, 3)), [(2, 3), (2, 3)]),
    "registration": Case(lambda d: F.grid_sample(_IMAGE, _GRID + d, align_corners=False), (1, 6, 6, 2)),
    "signal": Case(lambda m: m["rho"] * torch.exp(-_TIMES / m["t2"]), {"rho": (4,), "t2": (4,)}, REAL, True),
    "two results": Case(lambda x: (x**2, {"sum": x.sin().sum()}), (5,)),
    "magnitude": Case(lambda z: z.abs().square(), (4, 4), COMPLEX),
    "phase": Case(lambda x: torch.fft.fft2(_MASK * torch.exp(1j * x)).abs().square(), (4, 4)),
    "spectrum": Case(lambda x: torch.fft.rfft(x).abs(), (6,)),
    "holomorphic": Case(lambda z: z * z, (4,), COMPLEX),
    "autoconvolution": Case(lambda z: torch.fft.ifft(torch.fft.fft(z) ** 2), (4,), COMPLEX),
    "conjugate": Case(lambda z: z * z.conj(), (4,), COMPLEX),
    "angle": Case(torch.angle, (4,), COMPLEX),
    "complex inverse": Case(lambda z: torch.linalg.inv(z + 4 * _M), (4, 4), COMPLEX),
    "parts": Case(lambda z: torch.stack([z.real**2, z.imag * z.real]), (4,), COMPLEX),
    "coils and image": Case(lambda s, x: torch.fft.fft2(s * x), [(3, 4, 4), (4, 4)], COMPLEX),
}
