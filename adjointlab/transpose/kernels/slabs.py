"""``B(Ax − y)`` of a volume, a slab of slices at a time, so that all that is done to a slice is done by one thread.

Convolutions of volumes share the work by depth; elementwise loops share it by what is outermost in memory, which is
channels. What one thread has written another has to read then, and waits for it where the two run on processors that
share no cache. Here slices are outermost: a slab of them, of all channels, is an image of so many channels, of which
there is a batch, and convolutions of images share the work by that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from adjointlab.transpose.kernels.convolution import VECTOR, Site, sized


class _Sizes(NamedTuple):
    """How slabs are cut: for the convolution and for its transpose alike."""

    slices: int  # of the result of the convolution, in a slab
    window: int  # slices of the volume that these depend on
    phases: int  # neighbours in a row of the volume that are computed as so many channels
    slabs: int


def suited(first: Site, second: Site) -> bool:
    """Return whether ``second`` is, but for the weight, the transpose of ``first``, and both can be computed in slabs.

    oneDNN computes garbage where results are one column wide.
    """
    volume = len(first.kernel) == 3 and not first.transposed and first.groups == 1 and first.batch > 0
    unit = all(n == 1 for n in (*first.stride, *first.dilation))
    reaches = all(p < k for p, k in zip(first.padding, first.kernel, strict=True))
    if not (volume and unit and reaches and first.suits_onednn):
        return False
    back = first._replace(input_shape=first.output_shape, output_shape=first.input_shape, transposed=True)
    if second != sized(back):
        return False
    return first.output_shape[-1] > 1 and first.input_shape[-1] > _sizes(first).phases


def _sizes(site: Site) -> _Sizes:
    """Return the sizes at which channels fill a vector, and no slab or row is cut short."""
    (channels, depth, *_), (sources, *_, width), reach = site.output_shape, site.input_shape, site.kernel[0] - 1
    slices = next(n for n in range(max(1, VECTOR // channels), 0, -1) if depth % n == 0)
    window = slices + reach
    phases = next(n for n in (8, 4, 2, 1) if n == 1 or (window * sources * n <= VECTOR and width % n == 0))
    return _Sizes(slices, window, phases, depth // slices)


def gathering(weight: Tensor, site: Site) -> Tensor:
    """Return the kernel with which slabs of the convolution are made from windows of the volume."""
    sizes, (c_out, c_in, depth, *image) = _sizes(site), weight.shape
    kernel = weight.new_zeros(sizes.slices, c_out, sizes.window, c_in, *image)
    for i in range(sizes.slices):
        kernel[i, :, i : i + depth] = weight.transpose(1, 2)
    return kernel.reshape(sizes.slices * c_out, sizes.window * c_in, *image)


def scattering(weight: Tensor, site: Site) -> Tensor:
    """Return the kernel with which slabs are taken back to the windows that they were made from.

    ``site`` is that of the convolution, of which this is the transpose.
    """
    sizes, (c_in, c_out, depth, height, width) = _sizes(site), weight.shape
    flipped = weight.flip(3, 4).permute(2, 1, 0, 3, 4)
    room = sizes.window, sizes.phases, c_out, sizes.slices, c_in, height, width + sizes.phases - 1
    kernel = weight.new_zeros(room)
    for i in range(sizes.slices):
        for phase in range(sizes.phases):
            kernel[i : i + depth, phase, :, i, :, :, phase : phase + width] = flipped
    return kernel.reshape(sizes.window * sizes.phases * c_out, sizes.slices * c_in, height, width + sizes.phases - 1)


def gradient(site: Site) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return ``(x, y, a, b) ↦ B(Ax − y)``, with the kernels that gather and scatter for a and b."""
    sizes, batch, c_in = _sizes(site), site.batch, site.input_shape[0]
    (before, *padding), (_, *kernel) = site.padding, site.kernel
    around = [k - 1 - p for k, p in zip(kernel, padding, strict=True)]
    (_, depth, *image), target = site.input_shape, site.output_shape
    pieces = -(-sizes.window // sizes.slices)

    def gathered(x: Tensor, a: Tensor) -> Tensor:
        border = x.new_zeros(batch, c_in, before, *image)
        windows = torch.cat((border, x, border), 2).unfold(2, sizes.window, sizes.slices)
        windows = windows.permute(0, 2, 5, 1, 3, 4).reshape(batch * sizes.slabs, -1, *image)
        return torch.mkldnn_convolution(windows, a, None, padding, [1, 1], [1, 1], 1).contiguous()

    def run(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        slabs = gathered(x, a)
        slabs.view(batch, target[1], target[0], *target[2:]).sub_(y.transpose(1, 2))
        found = torch.mkldnn_convolution(slabs, b, None, around, [1, sizes.phases], [1, 1], 1)
        del slabs
        found = found.reshape(batch, sizes.slabs, sizes.window, -1)
        # Windows overlap: they are added up, a slab's worth of their slices after the other.
        whole = x.new_empty(batch, sizes.slabs + pieces - 1, sizes.slices, found.shape[-1])
        whole[:, sizes.slabs :] = 0
        for i in range(pieces):
            part = found[:, :, i * sizes.slices : (i + 1) * sizes.slices]
            where = whole[:, i : i + sizes.slabs, : part.shape[2]]
            if i == 0:
                where.copy_(part)
            else:
                where.add_(part)
        inside = whole.flatten(1, 2)[:, before : before + depth]
        apart = inside.unflatten(2, (sizes.phases, c_in, image[0], image[1] // sizes.phases))
        result: Tensor = apart.permute(0, 3, 1, 4, 5, 2).contiguous().view(batch, c_in, depth, *image)
        return result

    return run
