"""Operators that are built with a rule for kernels of the test's own: injected, not patched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import adjointlab as al
from adjointlab.affine import AffineOperator, _rebuild_linear
from adjointlab.derive import _rebuild as rebuilt
from adjointlab.derive import from_source, options_of, require_linear
from adjointlab.linearity import like_parameters
from adjointlab.transpose import Options, Transposition
from adjointlab.transpose.kernels.convolution import ConvSpec, sized
from adjointlab.transpose.kernels.registry import KERNELS, NATIVE, Kernel
from adjointlab.transpose.kernels.select import Run, Timed, Ways

TORCH = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
BY_NAME = {kernel.name: kernel for kernel in KERNELS}


def prefer(kernel: str | Kernel) -> Callable[[ConvSpec], Kernel]:
    """Return a rule that takes a kernel wherever it can serve."""
    wanted = BY_NAME[kernel] if isinstance(kernel, str) else kernel
    return lambda spec: wanted if wanted.supports(spec) else NATIVE


def broken(kernel: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Kernel:
    """Return a kernel whose results are changed."""
    right = BY_NAME[kernel]

    def make(spec: ConvSpec) -> Callable[..., torch.Tensor]:
        run = right.make(spec)
        return lambda *tensors: change(run(*tensors))

    return replace(right, make=make)


def first_way(native: Timed, ways: Callable[[], dict[Run, Timed]], device: torch.device, beside: Timed) -> Run | None:
    """Choose a sparse map wherever there is one."""
    return next(iter(ways()), None)


def last_way(native: Timed, ways: Callable[[], dict[Run, Timed]], device: torch.device, beside: Timed) -> Run | None:
    """Choose the last of several products with a sparse map."""
    return next(reversed(ways()), None)


def always(expected: tuple[float, float], ways: Ways, device: torch.device) -> bool:
    """Write every sum of slices."""
    return True


def never(expected: tuple[float, float], ways: Ways, device: torch.device) -> bool:
    """Leave every sum of slices to PyTorch's own operations."""
    return False


def source(function: Any, domain: Any, choose: Any = None, *, kwargs: Any = None, **options: Any) -> Transposition:
    space = like_parameters(function, domain, options.pop("batch_dims", 0))
    return Transposition(function, space, kwargs, Options(choose=choose, **options), judge=require_linear)


def operator(function: Any, domain: Any, choose: Any, **options: Any) -> al.LinearOperator:
    """Return the linear operator, or the linear part, of a function, with a rule for kernels."""
    made = source(function, domain, choose, **options)
    return from_source(made, lambda: (rebuilt, (function, made.domain, options_of(made))))


def affine(function: Any, domain: Any, choose: Any, **options: Any) -> AffineOperator:
    made = source(function, domain, choose, affine=True, **options)
    arguments = (function, made.domain, options_of(made))
    return AffineOperator(from_source(made, lambda: (_rebuild_linear, arguments)), made)


def square(n: int, k: int, dims: int, *, transposed: bool, dtype: torch.dtype = torch.float32) -> ConvSpec:
    """Return a convolution of one channel that keeps the size, which is the same in all dimensions."""
    shape = (1, *[n] * dims)
    one, zero = (1,) * dims, (0,) * dims
    settings = one, (k // 2,) * dims, one, transposed, zero, 1, dtype, torch.get_default_device()
    return sized(ConvSpec(1, shape, shape, (k,) * dims, *settings))


def needs_torch(version: str, what: str) -> pytest.MarkDecorator:
    """Skip a test of what PyTorch itself does only since a version, and say what that is."""
    return pytest.mark.skipif(tuple(map(int, version.split("."))) > TORCH, reason=f"before torch {version}, {what}")


def ops_of(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """Return the names of the operations that run in a call, as the profiler sees them."""
    with profile(activities=[ProfilerActivity.CPU]) as record, torch.no_grad():
        function(*arguments)
    return [event.name for event in record.events() if event.name.startswith("aten::")]
