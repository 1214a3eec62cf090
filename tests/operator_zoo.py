"""The zoo: linear (and some affine) maps of every kind, each with how to make it and what is expected of it.

Every entry is made afresh and deterministically by `entry.build(dtype)`; its domain is small, so that it can be made
dense entry by entry.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

REAL = (torch.float64, torch.float32)
COMPLEX = (torch.complex128,)
BOTH = (*REAL, *COMPLEX)

Made = tuple[Callable[..., Any], Any]


@dataclass(frozen=True)
class Entry:
    """An operator of the zoo.

    `make(dtype)` returns a module or function and an example of its domain, whose dtype is `dtype`. `complex_linear`
    is meaningful where a side is complex. `traced`: the forward-free engine must take it; `proved`: its linearity must
    be proved, not only supported.
    """

    name: str
    make: Callable[[torch.dtype], Made]
    dtypes: tuple[torch.dtype, ...] = BOTH
    complex_linear: bool = True
    traced: bool = True
    proved: bool = True
    affine: bool = False

    def build(self, dtype: torch.dtype) -> Made:
        """Return the module or function and its domain: the same numbers each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make(dtype)

    def only(self, dtype: torch.dtype) -> Entry:
        """Return the entry in one dtype."""
        return dataclasses.replace(self, dtypes=(dtype,))


ZOO: list[Entry] = []


def add(name: str, make: Callable[[torch.dtype], Made], dtypes: tuple[torch.dtype, ...] = BOTH, **flags: bool) -> None:
    ZOO.append(Entry(name, make, dtypes, **flags))


def on(*shape: int, to: Callable[..., Any]) -> Callable[[torch.dtype], Made]:
    """Return a maker for a function without constants."""
    return lambda dtype: (to, torch.zeros(shape, dtype=dtype))


def module(kind: Callable[..., nn.Module], *args: Any, shape: tuple[int, ...], **options: Any):
    """Return a maker for a module that takes a dtype."""
    return lambda dtype: (kind(*args, dtype=dtype, **options), torch.zeros(shape, dtype=dtype))


def with_constant(*constant: int, shape: tuple[int, ...], to: Callable[..., Any]):
    """Return a maker for `x ↦ to(x, c)` with a random constant `c`."""

    def make(dtype: torch.dtype) -> Made:
        c = torch.randn(constant, dtype=dtype)
        return lambda x: to(x, c), torch.zeros(shape, dtype=dtype)

    return make


# ------------------------------------------------------------------------------------------------------ convolutions

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def conv(dims: int, channels: tuple[int, int], kernel: Any, size: tuple[int, ...], batch: int = 1, **options: Any):
    shape = (batch, channels[0], *size) if batch else (channels[0], *size)
    return module(CONVOLUTIONS[dims], *channels, kernel, shape=shape, bias=False, **options)


def conv_transpose(dims: int, channels: tuple[int, int], kernel: Any, size: tuple[int, ...], **options: Any):
    return module(TRANSPOSED[dims], *channels, kernel, shape=(1, channels[0], *size), bias=False, **options)


add("conv1d", conv(1, (2, 3), 3, (7,)))
add("conv1d-batch", conv(1, (2, 1), 3, (5,), batch=2, padding=1))
add("conv1d-unbatched", conv(1, (2, 3), 3, (6,), batch=0, padding=1))
add("conv1d-stride-remainder", conv(1, (1, 2), 3, (8,), stride=3, padding=1))
add("conv1d-dilation", conv(1, (2, 2), 3, (9,), dilation=3, padding=2))
add("conv1d-groups", conv(1, (4, 2), 2, (6,), groups=2))
add("conv1d-even-kernel", conv(1, (1, 2), 4, (7,), padding=2))
add("conv1d-same", conv(1, (1, 2), 3, (7,), padding="same"))
add("conv1d-same-even-kernel", conv(1, (2, 1), 4, (7,), padding="same"))
add("conv1d-same-circular", conv(1, (1, 1), 4, (6,), padding="same", padding_mode="circular"))
add("conv1d-valid", conv(1, (2, 1), 2, (6,), padding="valid"))
add("conv1d-kernel-1", conv(1, (2, 3), 1, (4,)))
for mode in ("reflect", "replicate", "circular"):
    add(f"conv1d-{mode}", conv(1, (2, 1), 3, (6,), padding=2, padding_mode=mode))
    add(f"conv2d-{mode}", conv(2, (1, 2), (3, 2), (4, 5), padding=(1, 2), padding_mode=mode))
    add(f"conv2d-{mode}-stride", conv(2, (1, 1), 3, (6, 5), padding=2, stride=2, padding_mode=mode))
    add(f"conv3d-{mode}", conv(3, (1, 1), 2, (3, 4, 3), padding=1, padding_mode=mode))
add("conv2d", conv(2, (2, 2), 3, (4, 5), padding=1))
add("conv2d-tuples", conv(2, (2, 3), (2, 3), (5, 6), stride=(2, 1), padding=(0, 2), dilation=(1, 2)))
add("conv2d-depthwise", conv(2, (3, 6), 2, (4, 3), groups=3))
add("conv2d-same", conv(2, (1, 1), (3, 2), (5, 4), padding="same", dilation=(1, 2)))
add("conv2d-padding-exceeds-kernel", conv(2, (1, 1), 2, (3, 4), padding=3, stride=2))
add("conv2d-unbatched", conv(2, (2, 1), 3, (4, 4), batch=0))
add("conv3d", conv(3, (1, 2), 3, (3, 4, 3), padding=1))
add("conv3d-stride-groups", conv(3, (2, 2), (2, 1, 2), (3, 3, 4), stride=(2, 1, 2), groups=2))
add("conv3d-same", conv(3, (1, 1), (2, 3, 1), (3, 3, 3), padding="same"))
add("conv-transpose1d", conv_transpose(1, (2, 1), 3, (5,), stride=2, padding=1, output_padding=1))
add("conv-transpose1d-dilation", conv_transpose(1, (1, 2), 3, (4,), stride=2, dilation=3, output_padding=2))
add("conv-transpose2d", conv_transpose(2, (2, 1), (3, 2), (3, 4), stride=(2, 3), padding=1, output_padding=(1, 2)))
add("conv-transpose2d-groups", conv_transpose(2, (2, 4), 3, (3, 3), groups=2))
add("conv-transpose3d", conv_transpose(3, (1, 1), 2, (2, 3, 2), stride=2, padding=1, output_padding=(1, 0, 1)))


def _complex_kernel(dtype: torch.dtype) -> Made:
    kernel = torch.randn(2, 1, 3, 2, dtype=dtype.to_complex())
    return lambda x: F.conv2d(x.to(kernel.dtype), kernel, padding=1), torch.zeros(1, 1, 4, 3, dtype=dtype)


add("conv2d-complex-kernel-on-real", _complex_kernel, REAL, complex_linear=False)

# ----------------------------------------------------------------------------------------------- dense layers, pooling

add("linear", module(nn.Linear, 5, 3, shape=(2, 5), bias=False))
add("bilinear-in-one-argument", lambda dtype: (_bilinear_in_first(dtype), torch.zeros(2, 3, dtype=dtype)), REAL)


def _bilinear_in_first(dtype: torch.dtype) -> Callable[..., Any]:
    layer, z = nn.Bilinear(3, 2, 4, bias=False, dtype=dtype), torch.randn(2, 2, dtype=dtype)
    return lambda x: layer(x, z)


add("avg-pool1d", on(1, 2, 7, to=nn.AvgPool1d(3, stride=2, padding=1)), REAL)
add("avg-pool2d", on(1, 1, 5, 6, to=nn.AvgPool2d((2, 3), stride=(1, 2))), REAL)
add("avg-pool2d-ceil", on(1, 1, 5, 6, to=nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False)), REAL)
add("avg-pool2d-divisor", on(1, 1, 4, 4, to=nn.AvgPool2d(2, divisor_override=3)), REAL)
add("avg-pool3d", on(1, 1, 3, 4, 4, to=nn.AvgPool3d(2, stride=1)), REAL)
add("adaptive-avg-pool1d", on(1, 2, 7, to=nn.AdaptiveAvgPool1d(3)), REAL)
add("adaptive-avg-pool2d", on(1, 1, 5, 7, to=nn.AdaptiveAvgPool2d((2, 3))), REAL)
add("adaptive-avg-pool2d-global", on(1, 2, 3, 4, to=nn.AdaptiveAvgPool2d(1)), REAL)
add("adaptive-avg-pool3d", on(1, 1, 3, 4, 5, to=nn.AdaptiveAvgPool3d((2, 3, 2))), REAL)

# ---------------------------------------------------------------------------------------------------------- resampling


def interpolate(*shape: int, **options: Any):
    return on(*shape, to=lambda x: F.interpolate(x, **options))


add("interpolate-nearest", interpolate(1, 1, 4, 5, size=(7, 3), mode="nearest"), REAL)
add("interpolate-nearest-exact", interpolate(1, 1, 4, 5, scale_factor=1.5, mode="nearest-exact"), REAL)
add("interpolate-linear", interpolate(1, 2, 5, size=8, mode="linear"), REAL)
add("interpolate-bilinear", interpolate(1, 1, 4, 5, size=(7, 3), mode="bilinear"), REAL)
add("interpolate-bilinear-corners", interpolate(1, 1, 4, 5, size=(7, 6), mode="bilinear", align_corners=True), REAL)
add("interpolate-bilinear-antialias", interpolate(1, 1, 6, 5, size=(3, 2), mode="bilinear", antialias=True), REAL)
add("interpolate-bicubic", interpolate(1, 1, 4, 5, size=(7, 3), mode="bicubic"), REAL)
add("interpolate-trilinear", interpolate(1, 1, 3, 2, 4, size=(2, 4, 5), mode="trilinear"), REAL)
add("interpolate-area", interpolate(1, 1, 5, 6, size=(2, 3), mode="area"), REAL)
add("upsample-module", on(1, 1, 3, 3, to=nn.Upsample(scale_factor=2, mode="nearest")), REAL)


def grid_sample(shape: tuple[int, ...], out: tuple[int, ...], **options: Any):
    def make(dtype: torch.dtype) -> Made:
        grid = 2.4 * torch.rand(1, *out, len(out), dtype=dtype) - 1.2
        return lambda x: F.grid_sample(x, grid, align_corners=False, **options), torch.zeros(shape, dtype=dtype)

    return make


add("grid-sample-bilinear", grid_sample((1, 1, 4, 5), (3, 4)), REAL)
add("grid-sample-border", grid_sample((1, 1, 4, 5), (3, 4), padding_mode="border"), REAL)
add("grid-sample-reflection", grid_sample((1, 1, 4, 5), (3, 4), padding_mode="reflection"), REAL)
add("grid-sample-nearest", grid_sample((1, 1, 4, 5), (3, 4), mode="nearest"), REAL)
add("grid-sample-bicubic", grid_sample((1, 1, 4, 5), (3, 4), mode="bicubic"), REAL)
add("grid-sample-3d", grid_sample((1, 1, 3, 3, 4), (2, 3, 2)), REAL)


def _radon(dtype: torch.dtype) -> Made:
    angles = torch.arange(3, dtype=dtype) * (math.pi / 3)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    rotations = torch.stack([cos, -sin, zero, sin, cos, zero], dim=-1).reshape(-1, 2, 3)

    def radon(image: torch.Tensor) -> torch.Tensor:
        grid = F.affine_grid(rotations, [3, 1, 6, 6], align_corners=False)
        return F.grid_sample(image.expand(3, -1, -1, -1), grid, align_corners=False).sum(-2)

    return radon, torch.zeros(1, 1, 6, 6, dtype=dtype)


add("radon", _radon, REAL)

# ------------------------------------------------------------------------------------------- patches, shuffles and pads

add("unfold", on(1, 2, 4, 5, to=lambda x: F.unfold(x, (2, 3), stride=(2, 1), padding=1)))
add("fold", on(1, 4, 6, to=lambda x: F.fold(x, (3, 4), (2, 2))))
add("tensor-unfold", on(2, 7, to=lambda x: x.unfold(-1, 3, 2)))
add("pixel-shuffle", on(1, 4, 2, 3, to=nn.PixelShuffle(2)))
add("pixel-unshuffle", on(1, 1, 4, 6, to=nn.PixelUnshuffle(2)))
add("channel-shuffle", on(1, 4, 3, to=lambda x: x.reshape(1, 2, 2, 3).transpose(1, 2).flatten(1, 2)))
add("pad-constant", on(2, 4, 3, to=lambda x: F.pad(x, (1, 2, 0, 1))))
add("pad-crop", on(2, 4, 5, to=lambda x: F.pad(x, (-1, 2, 1, -2))))
for mode in ("reflect", "replicate", "circular"):
    add(f"pad1d-{mode}", on(1, 2, 5, to=functools.partial(F.pad, pad=(2, 1), mode=mode)))
    add(f"pad2d-{mode}", on(1, 1, 4, 3, to=functools.partial(F.pad, pad=(2, 1, 1, 2), mode=mode)))
    add(f"pad3d-{mode}", on(1, 1, 3, 2, 3, to=functools.partial(F.pad, pad=(2, 1, 1, 1, 2, 0), mode=mode)))
add("pad-module-zero", on(1, 1, 3, 4, to=nn.ZeroPad2d((1, 0, 2, 1))))

# ------------------------------------------------------------------------------------------------- Fourier transforms

add("fft", on(2, 5, to=torch.fft.fft), COMPLEX)
add("fft-ortho", on(2, 6, to=lambda x: torch.fft.fft(x, norm="ortho")), COMPLEX)
add("fft-cropped", on(2, 6, to=lambda x: torch.fft.fft(x, n=4)), COMPLEX)
add("fft2", on(1, 4, 3, to=torch.fft.fft2), COMPLEX)
add("ifft2-forward-norm", on(1, 4, 3, to=lambda x: torch.fft.ifft2(x, norm="forward")), COMPLEX)
add("fftn-centred", on(3, 2, 4, to=lambda x: torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(x)))), COMPLEX)
add("fft-of-real", on(2, 5, to=torch.fft.fft), REAL, complex_linear=False)
for n in (6, 7):
    add(f"rfft-{n}", on(2, n, to=torch.fft.rfft), REAL, complex_linear=False)
    add(f"rfft2-{n}", on(3, n, to=lambda x: torch.fft.rfft2(x, norm="ortho")), REAL, complex_linear=False)
    add(f"irfft-{n}", on(2, n // 2 + 1, to=functools.partial(torch.fft.irfft, n=n)), COMPLEX, complex_linear=False)
    add(f"hfft-{n}", on(2, n // 2 + 1, to=functools.partial(torch.fft.hfft, n=n)), COMPLEX, complex_linear=False)
    add(f"ihfft-{n}", on(2, n, to=torch.fft.ihfft), REAL, complex_linear=False)
add(
    "fft-convolution",
    with_constant(6, shape=(2, 6), to=lambda x, c: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(c), n=6)),
    REAL,
)


def _stft(dtype: torch.dtype) -> Made:
    window = torch.hann_window(6, dtype=dtype)
    return lambda x: torch.stft(x, 6, hop_length=3, window=window, return_complex=True), torch.zeros(2, 12, dtype=dtype)


def _istft(dtype: torch.dtype) -> Made:
    window = torch.hamming_window(6, dtype=torch.float64)
    return lambda x: torch.istft(x, 6, hop_length=3, window=window), torch.zeros(4, 4, dtype=dtype)


add("stft", _stft, REAL, complex_linear=False)
add("istft", _istft, COMPLEX, complex_linear=False)

# ----------------------------------------------------------------------------------- products, indexing, rearrangements

add("einsum", with_constant(2, 3, 4, shape=(2, 4), to=lambda x, c: torch.einsum("bij,bj->ib", c, x)))
add("einsum-conj", with_constant(3, 4, shape=(2, 4), to=lambda x, c: torch.einsum("ij,bj->bi", c.conj(), x)))
add("matmul", with_constant(4, 3, shape=(2, 4), to=lambda x, c: x @ c))
add("matmul-both-sides", with_constant(3, 3, shape=(3, 3), to=lambda x, c: c @ x @ c.mH))
add("hadamard", with_constant(2, 3, shape=(2, 3), to=lambda x, c: c * x))
add("divide", with_constant(2, 3, shape=(2, 3), to=lambda x, c: x / c))
add("outer", with_constant(3, shape=(4,), to=torch.outer))
add("kron", with_constant(2, 2, shape=(2, 3), to=torch.kron))
add("solve", with_constant(3, 3, shape=(3, 2), to=lambda x, c: torch.linalg.solve(c, x)))
add(
    "solve-triangular",
    with_constant(
        3, 3, shape=(3, 2), to=lambda x, c: torch.linalg.solve_triangular(c.triu() + 3 * c.diag().diag(), x, upper=True)
    ),
)
add("scalar", on(to=lambda x: 3 * x))
add("slices", on(3, 6, to=lambda x: x[1:, ::2]))
add("negative-slices", on(3, 6, to=lambda x: x[..., -4:-1].flip(-1)))
add("select", on(3, 4, to=lambda x: x[:, 2]))
add("index-list", on(3, 4, to=lambda x: x[[0, 2, 2, 1]]))
add("index-pairs", on(3, 4, to=lambda x: x[[0, 2, 2], [1, 1, 3]]))


def _boolean_mask(dtype: torch.dtype) -> Made:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    return lambda x: x[mask], torch.zeros(2, 3, dtype=dtype)


def _gather(dtype: torch.dtype) -> Made:
    index = torch.tensor([[0, 2, 2, 1], [1, 1, 0, 0]])
    return lambda x: x.gather(1, index), torch.zeros(2, 3, dtype=dtype)


def _scatter_add(dtype: torch.dtype) -> Made:
    index = torch.tensor([[0, 2, 2, 1], [1, 1, 0, 0]])
    return lambda x: x.new_zeros(2, 3).scatter_add(1, index, x), torch.zeros(2, 4, dtype=dtype)


def _index_select(dtype: torch.dtype) -> Made:
    index = torch.tensor([2, 0, 2])
    return lambda x: x.index_select(0, index), torch.zeros(3, 2, dtype=dtype)


def _where(dtype: torch.dtype) -> Made:
    mask = torch.tensor([True, False, True, True])
    return lambda x: torch.where(mask, x, torch.zeros_like(x)), torch.zeros(2, 4, dtype=dtype)


def _masked_fill(dtype: torch.dtype) -> Made:
    mask = torch.tensor([True, False, True, True])
    return lambda x: x.masked_fill(mask, 0), torch.zeros(2, 4, dtype=dtype)


add("boolean-mask", _boolean_mask)
add("gather", _gather)
add("scatter-add", _scatter_add)
add("index-select", _index_select)
add("where", _where)
add("masked-fill", _masked_fill)
add("roll", on(3, 4, to=lambda x: x.roll((1, -2), (0, 1))))
add("flip", on(3, 4, to=lambda x: x.flip(0, 1)))
add("cumsum", on(3, 4, to=lambda x: x.cumsum(-1)))
add("diff", on(3, 5, to=lambda x: x.diff(dim=-1)))
add("triu", on(4, 3, to=torch.triu))
add("permute-reshape", on(2, 3, 4, to=lambda x: x.permute(2, 0, 1).reshape(4, 6)))
add("view", on(2, 6, to=lambda x: x.view(3, 4)))
add("transpose", on(2, 3, to=lambda x: x.mT))
add("expand", on(1, 3, to=lambda x: x.expand(4, 2, 3)))
add("repeat", on(2, 3, to=lambda x: x.repeat(2, 1, 2)))
add("repeat-interleave", on(2, 3, to=lambda x: x.repeat_interleave(2, -1)))
add("stack-cat", on(2, 3, to=lambda x: torch.cat([torch.stack([x, 2 * x]), x[None]])))
add("split", on(2, 5, to=lambda x: x.split([2, 3], -1)[1] + x.split([3, 2], -1)[0]))
add("sum-mean", on(3, 4, to=lambda x: x.sum(0, keepdim=True) - x.mean(0, keepdim=True)))
add("full-sum", on(2, 3, to=torch.sum))
add("subtract-mean", on(2, 5, to=lambda x: x - x.mean(-1, keepdim=True)))
add("diagonal", on(3, 4, to=lambda x: x.diagonal(1)))
add("diag-embed", on(2, 3, to=torch.diag_embed))
add("as-strided", on(6, to=lambda x: x.as_strided((2, 3), (1, 2))))
add("lerp", with_constant(4, shape=(3, 4), to=lambda x, c: torch.lerp(x, x.flip(-1), 0.3) + 0 * c))
add("zero-map", on(2, 3, to=lambda x: 0 * x))
add("identity", on(2, 3, to=lambda x: x))
add("identity-module", on(2, 3, to=nn.Identity()))


def sparse(layout: str):
    def make(dtype: torch.dtype) -> Made:
        dense = torch.randn(3, 4, dtype=dtype) * (torch.rand(3, 4) > 0.4)
        with warnings.catch_warnings():  # torch calls its CSR support a beta
            warnings.simplefilter("ignore")
            matrix = dense.to_sparse() if layout == "coo" else getattr(dense, f"to_sparse_{layout}")()
        return lambda x: matrix @ x, torch.zeros(4, 2, dtype=dtype)

    return make


add("sparse-coo", sparse("coo"))
add("sparse-csr", sparse("csr"))
add("sparse-csc", sparse("csc"))

# --------------------------------------------------------------------------------------- modules, parametrized weights


def _batch_norm(kind: type[nn.Module], shape: tuple[int, ...], **options: Any):
    def make(dtype: torch.dtype) -> Made:
        norm = kind(shape[1], dtype=dtype, **options)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
        return norm.eval(), torch.zeros(shape, dtype=dtype)

    return make


add("batch-norm1d", _batch_norm(nn.BatchNorm1d, (2, 3)), REAL, affine=True)
add("batch-norm2d", _batch_norm(nn.BatchNorm2d, (2, 2, 2, 3)), REAL, affine=True)
add("batch-norm3d-plain", _batch_norm(nn.BatchNorm3d, (1, 2, 2, 1, 3), affine=False), REAL, affine=True)


def _weight_norm(dtype: torch.dtype) -> Made:
    layer = nn.Conv2d(1, 2, 3, padding=1, bias=False, dtype=dtype)
    return nn.utils.parametrizations.weight_norm(layer), torch.zeros(1, 1, 4, 3, dtype=dtype)


def _spectral_norm(dtype: torch.dtype) -> Made:
    layer = nn.Conv1d(2, 2, 3, bias=False, dtype=dtype)
    return nn.utils.parametrizations.spectral_norm(layer).eval(), torch.zeros(1, 2, 6, dtype=dtype)


def _spectral_norm_train(dtype: torch.dtype) -> Made:
    layer = nn.Linear(4, 3, bias=False, dtype=dtype)
    return nn.utils.parametrizations.spectral_norm(layer), torch.zeros(2, 4, dtype=dtype)


class _Exponential(nn.Module):
    def forward(self, theta: torch.Tensor) -> torch.Tensor:
        return theta.exp()


def _exponential_kernel(dtype: torch.dtype) -> Made:
    layer = nn.Conv1d(1, 2, 3, padding=1, bias=False, dtype=dtype)
    nn.utils.parametrize.register_parametrization(layer, "weight", _Exponential())
    return layer, torch.zeros(1, 1, 5, dtype=dtype)


add("weight-norm", _weight_norm, REAL)
add("spectral-norm", _spectral_norm, REAL)
add("exponential-kernel", _exponential_kernel)
add("conv-bias", module(nn.Conv2d, 1, 2, 3, shape=(1, 1, 4, 4), padding=1), affine=True)
add("linear-bias", module(nn.Linear, 4, 3, shape=(2, 4)), affine=True)
add("pad-value", on(2, 4, to=lambda x: F.pad(x, (1, 2), value=1.5)), affine=True)


def _chain(dtype: torch.dtype) -> Made:
    layers = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect", bias=False, dtype=dtype),
        nn.AvgPool2d(2),
        nn.PixelShuffle(2),
        nn.Upsample(size=(3, 5), mode="bilinear"),
        nn.Conv2d(1, 2, 2, padding="same", padding_mode="circular", bias=False, dtype=dtype),
    )
    return layers, torch.zeros(1, 1, 6, 4, dtype=dtype)


def _conv_chain(dtype: torch.dtype) -> Made:
    layers = [nn.Conv1d(2, 2, 3, padding=1, stride=s, bias=False, dtype=dtype) for s in (1, 2, 1)]
    return nn.Sequential(*layers), torch.zeros(1, 2, 9, dtype=dtype)


def _chain_with_norm(dtype: torch.dtype) -> Made:
    norm, _ = _batch_norm(nn.BatchNorm2d, (1, 2, 4, 4))(dtype)
    conv2d = nn.Conv2d(1, 2, 3, dtype=dtype)
    return nn.Sequential(conv2d, norm, nn.Flatten()).eval(), torch.zeros(1, 1, 5, 4, dtype=dtype)


def _eval_dropout(dtype: torch.dtype) -> Made:
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2, bias=False, dtype=dtype)).eval(), torch.zeros(
        2, 4, dtype=dtype
    )


class _Residual(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = nn.Conv1d(2, 2, 3, padding=1, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(self.inner(x))


add("chain", _chain, REAL)
add("conv-chain", _conv_chain)
add("chain-with-norm", _chain_with_norm, REAL, affine=True)
add("eval-dropout", _eval_dropout)
add("residual-shared-weight", lambda dtype: (_Residual(dtype), torch.zeros(1, 2, 5, dtype=dtype)))

# ------------------------------------------------------------------------------------------------------ writes in place


def _slices_into_zeros(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(2, 6, dtype=x.dtype, device=x.device)
    out[:, 1:5] = x
    out[:, 0] = x[:, -1]
    out[:, -1] += 2 * x[:, 0]
    return out


def _overwritten(x: torch.Tensor) -> torch.Tensor:
    out = x.clone()
    out[:, ::2] *= 2
    out[:, 1] = out[:, 0]
    return out.mul_(3)


def _written_views(x: torch.Tensor) -> torch.Tensor:
    out = x.new_zeros(2, 3, 2)
    out.permute(2, 1, 0).select(0, 0).copy_(x.mT)
    out[..., 1].add_(x.flip(-1))
    return out


def _finite_differences(x: torch.Tensor) -> torch.Tensor:
    rows = F.pad(x[1:] - x[:-1], (0, 0, 0, 1))
    columns = F.pad(x[:, 1:] - x[:, :-1], (0, 1))
    return torch.stack([rows, columns])


def _finite_differences_in_place(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros((2, *x.shape), dtype=x.dtype)
    out[0, :-1] = x[1:] - x[:-1]
    out[1, :, :-1] = x[:, 1:] - x[:, :-1]
    return out


def _loop(x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(x)
    for shift in range(3):
        total += x.roll(shift, -1) / (shift + 1)
    return total


add("slices-into-zeros", on(2, 4, to=_slices_into_zeros))
add("overwritten-clone", on(2, 5, to=_overwritten))
add("written-views", on(2, 3, to=_written_views))
add("finite-differences", on(4, 3, to=_finite_differences))
add("finite-differences-in-place", on(4, 3, to=_finite_differences_in_place))
add("accumulating-loop", on(2, 4, to=_loop))

# --------------------------------------------------------------------------------------------------- complex structure


class MultiCoil(nn.Module):
    """Coil sensitivities, Fourier transform and sampling mask, as in magnetic resonance imaging."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.coils = nn.Parameter(torch.randn(2, 4, 3, dtype=dtype))
        self.register_buffer("mask", (torch.rand(4, 1) > 0.4).to(dtype.to_real()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.mask * torch.fft.fft2(self.coils * image, norm="ortho")


add("multi-coil-mri", lambda dtype: (MultiCoil(dtype), torch.zeros(4, 3, dtype=dtype)), COMPLEX)
add("real-part", on(2, 3, to=lambda x: x.real), COMPLEX, complex_linear=False)
add("imaginary-part", on(2, 3, to=lambda x: x.imag), COMPLEX, complex_linear=False)
add("conj", on(2, 3, to=torch.conj), COMPLEX, complex_linear=False)
add("conj-physical", on(2, 3, to=lambda x: 1j * x.conj().resolve_conj()), COMPLEX, complex_linear=False)
add("mH", on(2, 3, to=lambda x: x.mH), COMPLEX, complex_linear=False)
add("x-plus-conj", on(2, 3, to=lambda x: x + 2 * x.conj()), COMPLEX, complex_linear=False)
add("twice-conj", on(2, 3, to=lambda x: (x.conj() * 1j).conj()), COMPLEX)
add("view-as-real", on(2, 3, to=torch.view_as_real), COMPLEX, complex_linear=False)
add("view-as-complex", on(3, 2, to=torch.view_as_complex), REAL, complex_linear=False)
add("real-view-round-trip", on(2, 3, to=lambda x: torch.view_as_complex(2 * torch.view_as_real(x))), COMPLEX)
add("cast-to-complex", on(2, 3, to=lambda x: x.to(x.dtype.to_complex())), REAL, complex_linear=False)
add("times-i", on(2, 3, to=lambda x: 1j * x), REAL, complex_linear=False)
add("complex-of-parts", on(2, 3, to=lambda x: torch.complex(x, 2 * x)), REAL, complex_linear=False)

# ------------------------------------------------------------------------------------ several inputs and outputs, casts


class TwoInputs(nn.Module):
    """`(x, z) ↦ W x + V z`, with two positional arguments."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4, bias=False, dtype=dtype)
        self.second = nn.Linear(2, 4, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.second(z)


def _two(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(3, dtype=dtype), torch.zeros(2, dtype=dtype)


def _dict(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"image": torch.zeros(2, 3, dtype=dtype), "offset": torch.zeros(3, dtype=dtype)}


def _nested(tree: dict[str, Any]) -> dict[str, Any]:
    return {"sum": tree["a"] + tree["b"][0], "parts": [2 * tree["b"][1], tree["a"].flip(0)]}


def _complex_and_real(tree: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return tree["c"] + 2j * tree["r"], tree["c"].imag - tree["r"]


add("tuple-domain", lambda dtype: (TwoInputs(dtype), _two(dtype)))
add("dict-domain", lambda dtype: (lambda t: t["image"] @ t["image"].new_ones(3, 3) + t["offset"], _dict(dtype)))
add("tuple-output", on(2, 4, to=lambda x: (x[:, :2], x.sum(-1))))
add("dict-output", on(2, 4, to=lambda x: {"low": x[:, ::2], "high": x[:, 1::2] - x[:, ::2]}))
add("split-output", on(2, 5, to=lambda x: x.split([2, 3], -1)))
add("same-output-twice", on(2, 2, to=lambda x: (x, x)))
add(
    "nested-pytrees",
    lambda dtype: (
        _nested,
        {"a": torch.zeros(3, dtype=dtype), "b": [torch.zeros(3, dtype=dtype), torch.zeros(2, dtype=dtype)]},
    ),
)
add("unused-leaf", lambda dtype: (lambda x, z: 2 * x, _two(dtype)))
add(
    "complex-and-real-leaves",
    lambda dtype: (
        _complex_and_real,
        {"c": torch.zeros(3, dtype=dtype.to_complex()), "r": torch.zeros(3, dtype=dtype)},
    ),
    (torch.float64,),
    complex_linear=False,
)
add("cast-up", on(2, 3, to=lambda x: 2 * x.double()), (torch.float32,))

# ------------------------------------------------------------------------------------------------ kinds of functions


class Physics(nn.Module):
    """A module whose map is a method, not `forward`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Conv1d(1, 2, 3, bias=False, dtype=dtype)

    def measure(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class HoldsTensor:
    """A callable that is no module and holds a tensor."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.weights = torch.randn(3, dtype=dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.weights * x


def _closure(dtype: torch.dtype) -> Made:
    weight = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    return lambda x: x @ weight, torch.zeros(2, 3, dtype=dtype)


def _closure_over_module(dtype: torch.dtype) -> Made:
    layer = nn.Conv1d(1, 2, 3, padding=1, bias=False, dtype=dtype)
    return lambda x: 2 * layer(x), torch.zeros(1, 1, 5, dtype=dtype)


def _partial(dtype: torch.dtype) -> Made:
    return functools.partial(F.conv1d, weight=torch.randn(2, 1, 3, dtype=dtype)), torch.zeros(1, 1, 5, dtype=dtype)


class OldStyle(torch.autograd.Function):
    """`x ↦ c x`, its context set in `forward`: `torch.func` refuses it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, c: float) -> torch.Tensor:
        ctx.c = c
        return c * x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.c * g, None


class NewStyle(torch.autograd.Function):
    """`x ↦ c x`, with `setup_context`."""

    @staticmethod
    def forward(x: torch.Tensor, c: float) -> torch.Tensor:
        return c * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.c = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.c * g, None


@torch.library.custom_op("adjointlab_zoo::reverse", mutates_args=())
def reverse(x: torch.Tensor) -> torch.Tensor:
    """The last dimension reversed and doubled."""
    return 2 * x.flip(-1)


@reverse.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


reverse.register_autograd(lambda ctx, g: reverse(g))


class ScaledByItem(nn.Module):
    """A number is read from a buffer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.5, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale.item()


class ScaledByNumpy(nn.Module):
    """A number is computed by numpy from a buffer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.randn(3, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(np.linalg.norm(self.kernel.cpu().numpy()))


class BranchOnBuffer(nn.Module):
    """The branch depends on a buffer, not on the input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.randn(3, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(-1) if self.kernel.abs().sum() > 0 else -x


def _no_grad_inside(dtype: torch.dtype) -> Made:
    layer = nn.Linear(3, 2, bias=False, dtype=dtype)

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weight = 2 * layer.weight
        return F.linear(x, weight)

    return run, torch.zeros(2, 3, dtype=dtype)


add("bound-method", lambda dtype: (Physics(dtype).measure, torch.zeros(1, 1, 5, dtype=dtype)))
add("callable-object", lambda dtype: (HoldsTensor(dtype), torch.zeros(2, 3, dtype=dtype)))
add("closure", _closure)
add("closure-over-module", _closure_over_module)
add("partial", _partial)
# Traced, its weight would get a gradient that autograd does not give it.
add("no-grad-constants", _no_grad_inside, traced=False, proved=False)
add("old-style-function", on(2, 3, to=lambda x: OldStyle.apply(x, 2.5)))
add("new-style-function", on(2, 3, to=lambda x: NewStyle.apply(x, 2.5)))
add("custom-op", on(2, 3, to=reverse))
add("item-of-buffer", lambda dtype: (ScaledByItem(dtype), torch.zeros(2, 3, dtype=dtype)))
add("numpy-of-buffer", lambda dtype: (ScaledByNumpy(dtype), torch.zeros(2, 3, dtype=dtype)))
add("branch-on-buffer", lambda dtype: (BranchOnBuffer(dtype), torch.zeros(2, 3, dtype=dtype)))

LINEAR = [entry for entry in ZOO if not entry.affine]
AFFINE = [entry for entry in ZOO if entry.affine]
BY_NAME = {entry.name: entry for entry in ZOO}

# What the laws run in: beside a complex dtype, the real ones take turns, since they differ by rounding only.
TRIED = {
    entry.name: (entry.dtypes[turn % 2], torch.complex128) if entry.dtypes == BOTH else entry.dtypes
    for turn, entry in enumerate(ZOO)
}
# What a quick run tests: every fifth operator in one dtype, and each dtype in its turn.
QUICK = {entry.name: TRIED[entry.name][turn % len(TRIED[entry.name])] for turn, entry in enumerate(ZOO[::5])}
