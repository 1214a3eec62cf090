"""Every way at hand to compute a convolution and its adjoint: by torch, by hand, by JAX, PyLops, SciPy and deepinv.

All kernels have an odd width and are padded to keep the size, but for the stride: with zeros, unless it says circular.
What a way may prepare (a flipped kernel, a kernel's transform, a compiled function) is ready before it is timed.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adjointlab as al

aten = torch.ops.aten
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MODULE = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

Ways = dict[str, Callable[[], Any]]
Skipped = dict[str, str]


@dataclass(frozen=True)
class Convolution:
    """A convolution with a kernel of odd width in every dimension, padded to keep the size if there is no stride."""

    batch: int
    c_in: int
    c_out: int
    shape: tuple[int, ...]
    width: int
    stride: int = 1
    circular: bool = False

    def __str__(self) -> str:
        n, ndim = self.shape[0], len(self.shape)
        power = {1: "", 2: "²", 3: "³"}[ndim]
        batch = f"{self.batch} × " if self.batch > 1 else ""
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        border = ", circular" if self.circular else ""
        return f"{batch}{self.c_in}→{self.c_out}, {n}{power}, {self.width}{power}{stride}{border}"

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def result(self) -> tuple[int, ...]:
        """Size of the result."""
        return tuple(-(-n // self.stride) for n in self.shape)

    @property
    def macs(self) -> int:
        """Number of multiplications of the direct sum."""
        return self.batch * self.c_in * self.c_out * math.prod(self.result) * self.width**self.ndim

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "case": str(self), "ndim": self.ndim, "size": self.shape[0], "width": self.width,
            "channels": f"{self.c_in}→{self.c_out}", "batch": self.batch,
        }  # fmt: skip


class Setup:
    """A convolution with its module, operator and random arguments."""

    def __init__(self, case: Convolution, device: torch.device) -> None:
        self.case, self.device = case, device
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), device="cpu")
        self.half = case.width // 2
        border = "circular" if case.circular else "zeros"
        settings = {"stride": case.stride, "padding": self.half, "padding_mode": border, "bias": False}
        self.module = MODULE[case.ndim](case.c_in, case.c_out, case.width, **settings)
        weight = draw(case.c_out, case.c_in, *[case.width] * case.ndim) / math.sqrt(case.c_in * case.width**case.ndim)
        self.module.weight = nn.Parameter(weight)
        self.module.to(device)
        self.weight = self.module.weight.detach()
        self.x = draw(case.batch, case.c_in, *case.shape).to(device)
        self.v = draw(case.batch, case.c_out, *case.result).to(device)

    @functools.cached_property
    def operator(self) -> al.LinearOperator:
        return al.linear_operator(self.module, self.x)

    def native_forward(self) -> Tensor:
        return CONV[self.case.ndim](self.x, self.weight, stride=self.case.stride, padding=self.half)

    def native_adjoint(self) -> Tensor:
        stride, shapes = self.case.stride, zip(self.case.shape, self.case.result, strict=True)
        rest = [n - 1 - (m - 1) * stride for n, m in shapes]  # inputs behind the last one that has an output
        return TRANSPOSED[self.case.ndim](self.v, self.weight, stride=stride, padding=self.half, output_padding=rest)


def adjoint_ways(s: Setup) -> tuple[Ways, Skipped]:
    """Return what computes the adjoint of a convolution at v."""
    n = s.case.ndim
    steps, ones, zeros, half = [s.case.stride] * n, [1] * n, [0] * n, [s.half] * n
    kernel = s.weight.transpose(0, 1).flip(tuple(range(2, 2 + n))).contiguous()
    A = s.operator
    ways: Ways = {
        "adjointlab": lambda: A.H(s.v),
        "eager vjp": lambda: torch.func.vjp(s.module, s.x)[1](s.v)[0],
        "convolution_backward": lambda: aten.convolution_backward(
            s.v, s.x, s.weight, None, steps, half, ones, False, zeros, 1, [True, False, False]
        )[0],
        "conv_transpose": s.native_adjoint,
    }
    if s.case.stride == 1:
        ways |= {"flipped conv": lambda: CONV[n](s.v, kernel, padding=s.half), "FFT": by_fft(s, adjoint=True)}
    return _with_libraries(s, ways, adjoint=True)


def recorded(way: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a way that replays a CUDA graph of another: all is started at once, whatever a call costs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries are loaded and plans made before, where memory may be asked for
        for _ in range(3):
            way()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = way()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def gradient_ways(s: Setup) -> Ways:
    """Return what computes the gradients of ``⟨Ax, v⟩`` in x and in the kernel, as training does."""
    x = s.x.clone().requires_grad_()
    wanted = (x, s.module.weight.requires_grad_())

    def through(function: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        @torch.enable_grad()
        def run() -> Tensor:
            return torch.autograd.grad(function(x), wanted, s.v)[1]

        return run

    return {"adjointlab": through(s.operator), "module": through(s.module)}


def forward_ways(s: Setup) -> tuple[Ways, Skipped]:
    """Return what computes a convolution at x."""
    A = s.operator
    ways: Ways = {"adjointlab": lambda: A(s.x), "conv": s.native_forward, "FFT": by_fft(s, adjoint=False)}
    return _with_libraries(s, ways, adjoint=False)


def by_fft(s: Setup, *, adjoint: bool) -> Callable[[], Tensor]:
    """Return the convolution as a product of transforms, of a fast length, with that of the kernel ready."""
    dims = tuple(range(2, 2 + s.case.ndim))
    size = [fast_length(n + s.case.width - 1) for n in s.case.shape]
    rows = (..., *[slice(s.half, s.half + n) for n in s.case.shape])
    if adjoint:
        transform = torch.fft.rfftn(s.weight.transpose(0, 1).contiguous(), s=size, dim=dims)
    else:
        transform = torch.fft.rfftn(s.weight.flip(dims), s=size, dim=dims)
    u = s.v if adjoint else s.x
    few = s.case.c_in * s.case.c_out <= 16

    def run() -> Tensor:
        source = torch.fft.rfftn(u, s=size, dim=dims)
        if few:
            product = (source[:, None] * transform).sum(2) if transform.shape[1] > 1 else source * transform[:, 0]
        else:
            flat = torch.einsum("bif,oif->bof", source.flatten(2), transform.flatten(2))
            product = flat.unflatten(2, source.shape[2:])
        return torch.fft.irfftn(product, s=size, dim=dims)[rows].contiguous()

    return run


def fast_length(n: int) -> int:
    """Return the smallest length of at least n without prime factors above 5."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def _with_libraries(s: Setup, ways: Ways, *, adjoint: bool) -> tuple[Ways, Skipped]:
    skipped: Skipped = {}
    for name, module, make in (
        ("JAX", "jax", _jax), ("PyLops", "pylops", _pylops), ("SciPy", "scipy.signal", _scipy),
        ("deepinv", "deepinv", _deepinv),
    ):  # fmt: skip
        library = imported(module, s.device.type)
        if library is None:
            skipped[name] = "not installed"
        elif name in {"PyLops", "SciPy"} and s.device.type != "cpu":
            skipped[name] = "on the CPU only"
        elif name == "JAX" and s.device.type != "cpu" and library.default_backend() == "cpu":
            skipped[name] = "installed for the CPU only"
        elif name in {"PyLops", "SciPy"} and (s.case.c_in * s.case.c_out > 1 or s.case.stride > 1):
            skipped[name] = "one channel and no stride only"
        else:
            found = make(library, s, adjoint)
            if found is not None:
                ways[name] = found
    return ways, skipped


@functools.cache
def imported(name: str, device: str) -> ModuleType | None:
    if device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes most of the memory for itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say when they are imported
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


def _jax(jax: Any, s: Setup, adjoint: bool) -> Callable[[], Any]:
    weight = jax.numpy.asarray(s.weight.cpu().numpy())
    padding = [(s.half, s.half)] * s.case.ndim
    precision = jax.lax.Precision.HIGHEST

    def forward(x: Any) -> Any:
        steps = [s.case.stride] * s.case.ndim
        return jax.lax.conv_general_dilated(x, weight, steps, padding, precision=precision)

    argument = jax.numpy.asarray((s.v if adjoint else s.x).cpu().numpy())
    if adjoint:
        transpose = jax.linear_transpose(forward, jax.ShapeDtypeStruct(tuple(s.x.shape), argument.dtype))
        run = jax.jit(lambda v: transpose(v)[0])
    else:
        run = jax.jit(forward)
    return lambda: run(argument).block_until_ready()


def _pylops(pylops: Any, s: Setup, adjoint: bool) -> Callable[[], Any]:
    h = np.ascontiguousarray(s.weight[0, 0].numpy()[(slice(None, None, -1),) * s.case.ndim])
    axes = tuple(range(1, 1 + s.case.ndim)) if s.case.batch > 1 else tuple(range(s.case.ndim))
    dims = (s.case.batch, *s.case.shape) if s.case.batch > 1 else s.case.shape
    A = pylops.signalprocessing.ConvolveND(dims, h, offset=(s.half,) * s.case.ndim, axes=axes, dtype="float32")
    u = (s.v if adjoint else s.x).numpy().reshape(-1)
    run = A.rmatvec if adjoint else A.matvec
    return lambda: run(u)


def _scipy(signal: Any, s: Setup, adjoint: bool) -> Callable[[], Any]:
    from scipy import fft

    kernel = s.weight.numpy()  # a batch and one channel before the kernel's dimensions, like the argument
    if not adjoint:
        kernel = np.ascontiguousarray(kernel[(..., *[slice(None, None, -1)] * s.case.ndim)])
    u = (s.v if adjoint else s.x).numpy()
    axes = tuple(range(2, 2 + s.case.ndim))

    def run() -> Any:
        with fft.set_workers(torch.get_num_threads()):
            return signal.fftconvolve(u, kernel, mode="same", axes=axes)

    return run


def _deepinv(deepinv: Any, s: Setup, adjoint: bool) -> Callable[[], Any] | None:
    if not adjoint:
        return None
    from deepinv.physics.forward import adjoint_function

    module = s.module.requires_grad_(False)
    transposed = adjoint_function(module, tuple(s.x.shape), device=s.device)
    return lambda: transposed(s.v)


def assert_equal(ways: Ways, reference: str, tolerance: float = 1e-5) -> None:
    """Check that all ways compute the same, to a part of the norm that single precision explains."""
    expected = _tensor(ways[reference]()).double().reshape(-1)
    for name, way in ways.items():
        gap = float((_tensor(way()).double().reshape(-1) - expected).norm() / expected.norm())
        assert gap < tolerance, f"{name} differs from {reference} by {gap:.1e} of its norm"


def _tensor(value: Any) -> Tensor:
    tensor = value.cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
