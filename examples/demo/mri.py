"""A real MRI volume: blurred by a ``Conv3d``, and measured by ``y = M F S x`` (coil maps, Fourier transform, mask)."""

from __future__ import annotations

import math
from importlib.resources import as_file, files

import nibabel
import numpy as np
import torch
from torch import Tensor, nn

import adjointlab as al

from .common import Recovery, Stage, blur, drawn, recover, scale, show

_BLUR_NOISE = 0.005
_COIL_NOISE = 0.005
_COILS = 8
_SIGMAS = (0.5, 1.0, 1.0)
_HEAD = slice(20, 108)  # columns: what lies outside is air


def volume(*, quick: bool = False) -> Tensor:
    """Return nibabel's example volume as slices × rows × columns, scaled so that 99.9 % of it lies in [0, 1].

    Parameters
    ----------
    quick : bool
        Every second row and column of eight slices.

    Returns
    -------
    Tensor
        ``float32``.
    """
    with as_file(files("nibabel") / "tests" / "data" / "example4d.nii.gz") as path:
        scans = np.asarray(nibabel.Nifti1Image.from_filename(path).dataobj, dtype=np.float32)
    x = torch.from_numpy(np.rot90(scans[..., 0]).transpose(2, 0, 1)[..., _HEAD].copy())
    x = x / torch.quantile(x[len(x) // 2], 0.999)
    return x[8:16, ::2, ::2].contiguous() if quick else x


def deblur_volume(stage: Stage) -> Recovery:
    """Recover the volume from ``y = k ⊛ x + noise``, a three-dimensional convolution.

    Parameters
    ----------
    stage : Stage
        Where to print.

    Returns
    -------
    Recovery
        The result and its numbers.
    """
    stage.title("3  An MRI volume: Conv3d blur with replicated borders, and noise")
    truth = volume(quick=stage.quick)[None, None]
    A = al.linear_operator(blur(nn.Conv3d, *_SIGMAS, padding_mode="replicate"), truth)
    data = A(truth)
    data = data + _BLUR_NOISE * torch.randn(data.shape, generator=torch.Generator().manual_seed(2))
    recovery = recover(
        stage, "MRI volume, Conv3d", A, truth=truth, data=data, start=data, steps=8 if stage.quick else 30
    )
    _draw_blur(stage, recovery)
    return recovery


class MultiCoil(nn.Module):
    """``x ↦ M F S x``: coil maps S, the orthonormal 2-D Fourier transform F of every slice, and a sampling mask M.

    Parameters
    ----------
    maps : Tensor
        Complex, coils × rows × columns, with ``Σ |s|² = 1`` at every pixel.
    mask : Tensor
        Zeros and ones, rows × 1: which rows of the Fourier plane are measured.
    """

    maps: Tensor
    mask: Tensor

    def __init__(self, maps: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("maps", maps)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Return slices × coils × rows × columns of Fourier samples of the slices x."""
        samples: Tensor = self.mask * torch.fft.fft2(self.maps * x[:, None], norm="ortho")
        return samples


def coil_maps(coils: int, height: int, width: int) -> Tensor:
    """Return smooth complex sensitivities of coils on a ring, ``Σ |s|² = 1``.

    Parameters
    ----------
    coils, height, width : int
        Numbers of coils, rows and columns.

    Returns
    -------
    Tensor
        ``complex64``, coils × rows × columns.

    Examples
    --------
    >>> coil_maps(4, 8, 8).abs().square().sum(0).allclose(torch.ones(8, 8))
    True
    """
    v = torch.linspace(-1, 1, height)[:, None]
    u = torch.linspace(-1, 1, width)
    angles = [2 * math.pi * k / coils for k in range(coils)]
    maps = torch.stack(
        [
            torch.polar(
                torch.exp(-((u - 1.1 * math.cos(a)).square() + (v - 1.1 * math.sin(a)).square()) / 0.9),
                1.5 * (u * math.sin(a) - v * math.cos(a)) + a,
            )
            for a in angles
        ]
    )
    return maps / maps.abs().square().sum(0).sqrt()


def sampling_mask(rows: int, generator: torch.Generator) -> Tensor:
    """Return which rows of the Fourier plane are measured: the low frequencies, and a random third of the others.

    Parameters
    ----------
    rows : int
        Number of rows.
    generator : torch.Generator
        For the random rows.

    Returns
    -------
    Tensor
        Zeros and ones, rows × 1, in the order of ``torch.fft``.
    """
    frequency = torch.fft.fftfreq(rows).abs()
    low = frequency < 0.05
    chosen: Tensor = low | (torch.rand(rows, generator=generator) < 1 / 3)
    return chosen[:, None].to(torch.float32)


def reconstruct_coils(stage: Stage) -> Recovery:
    """Recover the volume from ``y = M F S x + noise``, a complex operator, beginning with ``cᴴ y``.

    Parameters
    ----------
    stage : Stage
        Where to print and draw.

    Returns
    -------
    Recovery
        The result and its numbers.
    """
    stage.title("4  The same volume: complex coil maps, Fourier transform and undersampling, and noise")
    generator = torch.Generator().manual_seed(3)
    truth = volume(quick=stage.quick).to(torch.complex64)
    height, width = truth.shape[1:]
    mask = sampling_mask(height, generator)
    c = MultiCoil(coil_maps(_COILS, height, width), mask)
    A = al.linear_operator(c, truth)
    share = float(mask.mean())
    stage.console.print(
        f"{_COILS} coils, {share:.0%} of the rows measured; is_complex_linear = {A.is_complex_linear}: "
        "the adjoint is the Hermitian one"
    )
    data = A(truth)
    data = data + _COIL_NOISE * mask * torch.randn(data.shape, generator=generator, dtype=data.dtype)
    recovery = recover(
        stage, "MRI volume, coils and FFT", A, truth=truth, data=data, start=A.H(data), steps=10 if stage.quick else 60
    )
    _draw_coils(stage, recovery)
    return recovery


def _draw_blur(stage: Stage, r: Recovery) -> None:
    """Draw one slice of the volume, of the data and of the result, across and along, and the objective."""
    slices, rows = r.truth.shape[2], r.truth.shape[3]
    titles = ("MRI volume", f"data y, error {r.error_before:.1%}", f"result, error {r.error_after:.1%}")
    with drawn(stage, "mri_blur.png", 4.2, r, height_ratios=[3.3, 1]) as panels:
        for across, along, image, title in zip("abc", "def", (r.truth, r.data, r.result), titles, strict=True):
            show(panels[across], image[0, 0, slices // 2], title, vmin=0, vmax=1.1)
            show(panels[along], image[0, 0, :, rows // 2].flip(0), "across the slices", vmin=0, vmax=1.1, aspect=1.1)


def _draw_coils(stage: Stage, r: Recovery) -> None:
    """Draw one slice: truth, one coil's samples, start, result and their errors, and the objective."""
    middle = len(r.truth) // 2
    truth, start, result = (image[middle].abs() for image in (r.truth, r.start, r.result))
    samples = torch.fft.fftshift(r.data[middle, 0].abs()).clamp_min(1e-3).log10()
    top = float((start - truth).abs().max())
    with drawn(stage, "mri_coils.png", 5.2, r) as panels:
        show(panels["a"], truth, "MRI volume, one slice", vmin=0, vmax=1.1)
        show(panels["b"], start, f"cᴴ y, error {r.error_before:.1%}", vmin=0, vmax=1.1)
        show(panels["c"], result, f"result, error {r.error_after:.1%}", vmin=0, vmax=1.1)
        scale(panels["d"], show(panels["d"], samples, "log₁₀ |y| of one coil", cmap="viridis"))
        for name, image, title in (("e", start, "its error"), ("f", result, "its error, same scale")):
            picture = show(panels[name], (image - truth).abs(), title, cmap="magma", vmin=0, vmax=top)
            scale(panels[name], picture)
