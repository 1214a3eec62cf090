"""Ways to write a forward that people use, each with the engine that it gets; a page of the documentation shows them.

``traced`` means that the adjoint is a graph without the forward in it, ``eager`` that autograd is run at each call.
"""

from __future__ import annotations

import concurrent.futures
import copy
import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

Function = Callable[..., Any]
N = 12


@dataclass(frozen=True)
class Idiom:
    """A way to write a forward of N numbers, what a reader calls it, and the engine that it gets."""

    name: str
    make: Callable[[], Function]
    engine: str


class Blur(nn.Module):
    """A convolution of images with a kernel that does not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[None, None])[0, 0]


def weights() -> Tensor:
    return torch.linspace(1, 2, N)


IDIOMS: list[Idiom] = []


def idiom(
    name: str, engine: str = "traced", note: str = ""
) -> Callable[[Callable[[], Function]], Callable[[], Function]]:
    """Add an idiom to the list, made by the function that follows."""

    def add(make: Callable[[], Function]) -> Callable[[], Function]:
        IDIOMS.append(Idiom(name, make, engine))
        return make

    return add


# -- TorchScript and torch.compile -------------------------------------------------------------------------------------


@idiom("`torch.jit.script(module)`")
def scripted_module() -> Function:
    return torch.jit.script(Blur())


@idiom("`torch.jit.trace(module, example)`")
def traced_module() -> Function:
    return torch.jit.trace(Blur(), torch.zeros(N))


@idiom("`torch.jit.script(function)`, called by the forward")
def scripted_function() -> Function:
    @torch.jit.script
    def running(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(x.shape[0]):
            out[i] = x[: i + 1].sum()
        return out

    return lambda x: 2 * running(x)


@idiom("`torch.compile(module)`")
def compiled_module() -> Function:
    return torch.compile(Blur(), backend="eager")


@idiom("`torch.compile(function)`")
def compiled_function() -> Function:
    w = weights()
    return torch.compile(lambda x: w * x, backend="eager")


@idiom("a part compiled: `self.part = torch.compile(part)`")
def compiled_part() -> Function:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = torch.compile(Blur(), backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) + x

    return Outer()


# -- Python around the tensors -----------------------------------------------------------------------------------------


@idiom("a helper with `functools.lru_cache`")
def cached_helper() -> Function:
    @functools.lru_cache
    def window(n: int) -> Tensor:
        return torch.hann_window(n)

    return lambda x: window(len(x)) * x


@idiom("a dictionary that is filled at the first call")
def cached_in_dictionary() -> Function:
    kept: dict[int, Tensor] = {}

    def forward(x: Tensor) -> Tensor:
        if len(x) not in kept:
            kept[len(x)] = torch.hann_window(len(x))
        return kept[len(x)] * x

    return forward


@idiom("parts in threads of a pool", "eager")
def in_threads() -> Function:
    w = weights()

    def forward(x: Tensor) -> Tensor:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return torch.cat(list(pool.map(lambda part: part[0] * part[1], zip(w.chunk(3), x.chunk(3), strict=True))))

    return forward


@idiom("`copy.deepcopy` of a module inside of the forward")
def deepcopied() -> Function:
    blur = Blur()

    def forward(x: Tensor) -> Tensor:
        return copy.deepcopy(blur)(x)

    return forward


@idiom("a `while` loop on a Python number")
def loop() -> Function:
    def forward(x: Tensor) -> Tensor:
        step = 1
        while step < len(x):
            x = x + F.pad(x, (step, 0))[: len(x)]
            step *= 2
        return x

    return forward


@idiom("`functools.partial`, and a bound method")
def partial() -> Function:
    class Physics:
        def __init__(self) -> None:
            self.w = weights()

        def A(self, x: Tensor, power: int) -> Tensor:
            return self.w**power * x

    return functools.partial(Physics().A, power=2)


@idiom("`torch.no_grad()` around constants")
def constants_without_gradients() -> Function:
    w = weights()

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            factor = w.sqrt()
        return factor * x

    return forward


# -- NumPy and other languages -----------------------------------------------------------------------------------------


@idiom("constants by NumPy: `torch.from_numpy(np.hanning(n))`")
def numpy_constants() -> Function:
    return lambda x: torch.from_numpy(np.hanning(len(x)).astype(np.float32)) * x


@idiom("constants of the module through NumPy: `self.angles.numpy()`")
def numpy_of_a_buffer() -> Function:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("angles", weights())

        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(np.cos(self.angles.numpy())) * x

    return Module()


class Cumulative(torch.autograd.Function):
    """A running sum by NumPy, with the backward that somebody wrote."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(np.cumsum(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return torch.from_numpy(np.cumsum(v.detach().numpy()[::-1])[::-1].copy())


@idiom("an `autograd.Function` that computes by NumPy", "eager")
def numpy_function() -> Function:
    return Cumulative.apply


class Copied(torch.autograd.Function):
    """Twice x, by a function in C that takes pointers."""

    @staticmethod
    def _twice(x: Tensor) -> Tensor:
        source, out = x.detach().contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        ctypes.memmove(out.data_ptr(), source.data_ptr(), source.numel() * source.element_size())
        return out.mul_(2)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Copied._twice(x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return Copied._twice(v)


@idiom("an `autograd.Function` that calls C by pointers", "eager")
def by_pointer() -> Function:
    return Copied.apply


# -- constants that are made at each call ------------------------------------------------------------------------------


@idiom("`torch.tensor([[a.cos(), -a.sin()], …])`")
def tensor_of_tensors() -> Function:
    a = torch.tensor(0.3)

    def forward(x: Tensor) -> Tensor:
        rotation = torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]])
        return (rotation @ x.reshape(2, -1)).reshape(-1)

    return forward


@idiom("a seeded generator: `torch.randn(n, generator=g)`")
def seeded() -> Function:
    def forward(x: Tensor) -> Tensor:
        g = torch.Generator().manual_seed(3)
        return torch.randn(len(x), generator=g) * x

    return forward


@idiom("`torch.unique` of constants")
def unique() -> Function:
    index = torch.tensor([3, 1, 1, 7])
    return lambda x: x[torch.unique(index)]


@idiom("`repeat_interleave` by constants")
def repeated() -> Function:
    counts = torch.arange(N) % 3
    return lambda x: x.repeat_interleave(counts)


@idiom("`torch.bincount` of constants")
def counted() -> Function:
    index = torch.tensor([3, 1, 1, 7])
    return lambda x: torch.bincount(index, minlength=N) * x


@idiom("`torch.linalg.lstsq` of constants")
def least_squares() -> Function:
    M = torch.randn(20, N, generator=torch.Generator().manual_seed(0))
    return lambda x: torch.linalg.lstsq(M, torch.eye(20)).solution @ (M @ x)


@idiom("`torch.linalg.solve` with x on the right")
def solved() -> Function:
    M = torch.eye(N) + 0.1 * torch.randn(N, N, generator=torch.Generator().manual_seed(0))
    return lambda x: torch.linalg.solve(M, x)


@idiom("a number of a constant: `self.n.item()`, `tolist()`")
def numbers_of_constants() -> Function:
    shifts = torch.tensor([1, 3])
    return lambda x: sum(torch.roll(x, shift) for shift in shifts.tolist())


@idiom("a mask: `x[mask]`")
def masked() -> Function:
    mask = weights() > 1.5
    return lambda x: x[mask]


@idiom("sparse matrices: `S @ x`, COO or CSR")
def sparse() -> Function:
    S = torch.eye(N).to_sparse()
    return lambda x: (S @ x[:, None])[:, 0]


# -- what PyTorch has for modules --------------------------------------------------------------------------------------


@idiom("`torch.nn.utils.parametrizations.weight_norm`")
def weight_norm() -> Function:
    blur = Blur()
    parametrizations.weight_norm(blur.conv)
    return blur.requires_grad_(False)


@idiom("`torch.utils.checkpoint.checkpoint`")
def checkpointed() -> Function:
    blur = Blur()
    return lambda x: checkpoint(blur, x, use_reentrant=False)


@idiom("hooks: `register_forward_hook`")
def hooked() -> Function:
    blur = Blur()
    blur.register_forward_hook(lambda module, args, output: 2 * output)
    return blur


@idiom("`torch.func.vmap`, `torch.func.jvp` inside of the forward")
def transformed() -> Function:
    w = weights()
    return lambda x: torch.func.jvp(lambda z: torch.vmap(torch.mul)(w, z) ** 2, (w,), (x,))[1]


@idiom("`torch.func.functional_call`")
def functional() -> Function:
    blur = Blur()
    kernel = {"conv.weight": torch.ones(1, 1, 3)}
    return lambda x: torch.func.functional_call(blur, kernel, (x,))


@idiom("`torch.cond` on a constant")
def branch() -> Function:
    flag = torch.tensor(True)
    return lambda x: torch.cond(flag, lambda z: 2 * z, lambda z: 3 * z, (x,))


class Named(Tensor):
    """A tensor with a method of its own."""

    def twice(self) -> Tensor:
        return 2 * self


@idiom("a constant that is a subclass of Tensor")
def subclass() -> Function:
    w = weights().as_subclass(Named)
    return lambda x: w.twice() * x
