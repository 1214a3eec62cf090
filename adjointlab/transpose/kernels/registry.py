"""The kernels for convolutions: which can compute a convolution, what each is expected to take, and how it is bound."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adjointlab.transpose.kernels.convolution import VECTOR, ConvSpec, Run, phases_cost
from adjointlab.transpose.kernels.direct import flip, flipped, native
from adjointlab.transpose.kernels.fft import fft, spectrum
from adjointlab.transpose.kernels.polyphase import phase_kernels, polyphase
from adjointlab.transpose.kernels.tapped import tapped, taps

Prepack = Callable[[Tensor, ConvSpec], Tensor]
_ONEDNN = torch.backends.mkldnn.is_available()


@dataclass(frozen=True)
class Kernel:
    """One way to compute convolutions.

    To see that a weight is unchanged is to compare its values, for which an accelerator has to finish all that it has
    been given: only a transform takes longer, and is ``kept_everywhere``.
    """

    name: str  # as explain() prints it
    make: Callable[[ConvSpec], Run]  # to (x, prepacked, bias) ↦ y: sizes alone are not looked at in every call
    prepack: Prepack | None  # from a weight and a spec to what the kernel reads instead, None for the weight itself
    supports: Callable[[ConvSpec], bool]  # whether it can compute a spec, as accurately as PyTorch's own
    cost: Callable[[ConvSpec], float]  # the expected seconds, right to a factor of a few only: the rest is measured
    kept_everywhere: bool = False

    def bind(self, spec: ConvSpec) -> Run:
        """Return the kernel as a function ``(x, prepacked, bias) ↦ y`` that carries its kernel and spec."""
        return _carrying(self.make(spec), self, spec, self.name)  # type: ignore[no-any-return]

    def bind_prepack(self, spec: ConvSpec) -> Callable[[Tensor], Tensor]:
        """Return the function of the weight alone whose result the bound kernel reads."""
        prepack: Any = self.prepack
        run = _carrying(lambda weight: prepack(weight, spec), self, spec, f"prepack_{self.name}")
        return run  # type: ignore[no-any-return]


def _carrying(run: Any, kernel: Kernel, spec: ConvSpec, name: str) -> Any:
    run.kernel, run.spec, run.__name__, run.__qualname__ = kernel, spec, name, name
    return run


def bound(target: Any) -> tuple[Kernel, ConvSpec] | None:
    """Return the kernel and spec that a bound function carries; None for any other target of a node."""
    kernel = getattr(target, "kernel", None)
    return (kernel, target.spec) if isinstance(kernel, Kernel) and not target.__name__.startswith("prepack") else None


# Costs: rates in multiplications or steps of a transform a second, on two cores of a current server and on an H200.
_OVERHEAD = 2e-5


def _on_cpu(spec: ConvSpec) -> bool:
    return spec.device.type == "cpu"


def _direct_cost(spec: ConvSpec) -> float:
    """Direct kernels live on channels to vectorise over, transposed ones more so."""
    c_in, c_out = spec.input_shape[0] // spec.groups, spec.output_shape[0] // spec.groups
    if not _on_cpu(spec):
        rate = min(1e13, (1e11 if spec.transposed else 3e11) * c_in * c_out)
    elif len(spec.kernel) == 3:
        reads, writes = (c_out, c_in) if spec.transposed else (c_in, c_out)
        rate = 3e9 if writes >= 4 else 4e8 if reads >= 4 or spec.transposed else 1e9
    else:
        rate = min(3e10, 4e8 * (c_in * c_out) ** 0.85) if spec.transposed else min(6e10, 1e9 * (c_in * c_out) ** 0.75)
        rate *= min(spec.groups, VECTOR) if c_in == c_out == 1 else 1  # depthwise ones have those of other groups
    return _OVERHEAD + spec.macs / rate


def _fft_cost(spec: ConvSpec) -> float:
    c_in, c_out, size = spec.input_shape[0], spec.output_shape[0], math.prod(spec.fft_size)
    steps = (c_in + c_out) * spec.batch * size * math.log2(max(2, size))
    products = c_in * c_out // spec.groups * spec.batch * size / 2
    overhead, step_rate, product_rate = (2e-4, 8e9, 6e8) if _on_cpu(spec) else (1.6e-4, 9e11, 1e11)
    return overhead + steps / step_rate + products / product_rate


def _tapped_cost(spec: ConvSpec) -> float:
    size = spec.batch * math.prod(spec.output_shape) * spec.dtype.itemsize / 4
    rate = 1e11 if not _on_cpu(spec) else 1.6e10 if size < 1 << 21 else 5e9  # in the caches, or past them
    return math.prod(spec.kernel) * (1e-5 + size / rate)


def _reaches(spec: ConvSpec) -> bool:
    return all(e - 1 >= p for e, p in zip(spec.extent, spec.padding, strict=True))


def _is_plain(spec: ConvSpec) -> bool:
    """Return whether a convolution is a plain one, if need be with the flipped kernel."""
    return not spec.transposed or (_reaches(spec) and set(spec.stride) == {1} and not any(spec.output_padding))


def _is_wide(spec: ConvSpec) -> bool:
    return spec.dtype in (torch.float32, torch.float64)  # complex convolutions reach here as three real ones


def _supports_tapped(spec: ConvSpec) -> bool:
    return _is_plain(spec) and _is_wide(spec) and spec.input_shape[0] == spec.output_shape[0] == spec.groups


def _supports_polyphase(spec: ConvSpec) -> bool:
    # oneDNN computes garbage where results are one column wide.
    vectors = (math.prod(spec.phases) > 1 or len(spec.kernel) == 3) and spec.output_shape[-1] > spec.phases[-1]
    suits_onednn = _ONEDNN and _on_cpu(spec) and spec.dtype == torch.float32
    return (_reaches(spec) or not spec.transposed) and spec.groups == 1 and vectors and suits_onednn


def _supports_fft(spec: ConvSpec) -> bool:
    # Rounding errors of the direct sum grow like √terms · eps / 7, those of the transform like √log₂(points) · eps / 2:
    # a product of transforms is used where it loses at most a factor of four.
    terms = math.prod(spec.kernel) * spec.input_shape[0] // spec.groups
    return _is_wide(spec) and terms >= 1.1 * math.log2(max(2, math.prod(spec.fft_size)))


NATIVE = Kernel("native", native, None, lambda _: True, _direct_cost)
FFT = Kernel("fft", fft, spectrum, _supports_fft, _fft_cost, kept_everywhere=True)
FLIPPED = Kernel(
    "flipped", flipped, flip, lambda spec: spec.transposed and _is_plain(spec),
    lambda spec: _direct_cost(spec._replace(transposed=False)),
)  # fmt: skip
TAPPED = Kernel("tapped", tapped, taps, _supports_tapped, _tapped_cost)
POLYPHASE = Kernel("polyphase", polyphase, phase_kernels, _supports_polyphase, lambda spec: 6e-5 + phases_cost(spec))
KERNELS = (NATIVE, FLIPPED, TAPPED, POLYPHASE, FFT)


@functools.cache
def available(spec: ConvSpec) -> tuple[Kernel, ...]:
    """Return the kernels that can compute a spec, PyTorch's own first."""
    return tuple(kernel for kernel in KERNELS if kernel.supports(spec))


def transformed(spec: ConvSpec) -> Kernel:
    """Return the product of transforms for a spec wherever it is accurate enough, else PyTorch's own kernel."""
    return FFT if FFT.supports(spec) else NATIVE
