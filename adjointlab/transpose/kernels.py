"""Equal ways to compute one convolution: native, flipped, tap by tap, several outputs at a time, by FFT.

Each takes what depends on the weight ready-made.

A *site* is a call of ``aten.convolution``: with ``transposed=False`` the correlation
``y[m] = Σ_j w[j] x[m s + d j − p]``, with ``transposed=True`` its transpose ``y[t] = Σ x[m] w[j]`` over all m, j with
``t = m s + d j − p``. Channels are summed over within each group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten
_VECTOR = 16  # channels that the CPU's direct kernels compute at once
Ints = tuple[int, ...]


class Site(NamedTuple):
    """One convolution: the sizes of all that it reads, and its settings."""

    batch: int
    input_shape: Ints  # (C_in, *spatial)
    output_shape: Ints  # (C_out, *spatial)
    kernel: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    transposed: bool
    output_padding: Ints
    groups: int
    dtype: torch.dtype
    device: torch.device
    # Set by `sized`, since torch.compile looks into everything that is computed later:
    fft_size: Ints = ()
    around: Ints = ()  # padding of the plain convolution that a transposed one of stride 1 is with the flipped kernel
    phases: int = 1  # neighbouring outputs that are computed as so many channels

    @property
    def dims(self) -> Ints:
        """Positions of the spatial dimensions in a tensor."""
        return tuple(range(2, 2 + len(self.kernel)))

    @property
    def extent(self) -> Ints:
        """How far a kernel reaches, dilation included."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True))

    @property
    def macs(self) -> int:
        """Number of multiplications of the direct sum."""
        spatial = self.input_shape[1:] if self.transposed else self.output_shape[1:]
        return (
            self.batch * self.input_shape[0] * self.output_shape[0] // self.groups
            * math.prod(spatial) * math.prod(self.kernel)
        )  # fmt: skip


def sized(site: Site) -> Site:
    """Return the site with the lengths at which a cyclic convolution has the wanted outputs, fast for an FFT.

    And with the padding of its plain convolution, and the number of its phases.
    """
    sizes = []
    for i, (n, out, p, s) in enumerate(
        zip(site.input_shape[1:], site.output_shape[1:], site.padding, site.stride, strict=True)
    ):
        if site.transposed:  # the first p entries of the full result wrap around behind the wanted ones
            need = max(out + p, (n - 1) * s + 1, site.extent[i])
        else:  # indices −p … n + p − 1 are read: those below zero wrap around to where the input is zero
            need = max(n + p, (out - 1) * s + 1, site.extent[i])
        sizes.append(fast_length(need))
    around = site.padding
    if site.transposed:
        around = tuple(e - 1 - p for e, p in zip(site.extent, site.padding, strict=True))
    phases = _VECTOR
    while phases > 1 and (phases * site.output_shape[0] > _VECTOR or 2 * phases > site.output_shape[-1]):
        phases //= 2
    return site._replace(fft_size=tuple(sizes), around=around, phases=phases)


def fast_length(n: int) -> int:
    """Return the smallest even length of at least n that suits a transform of real numbers."""
    n += n % 2
    while not smooth(n):
        n += 2
    return n


def smooth(n: int) -> bool:
    """Return whether a length has no prime factor above 11: those that libraries have code of their own for."""
    for prime in (2, 3, 5, 7, 11):
        while n % prime == 0:
            n //= prime
    return n == 1


def native(x: Tensor, weight: Tensor, bias: Tensor | None, site: Site) -> Tensor:
    """Return the convolution as PyTorch computes it."""
    return torch.convolution(
        x, weight, bias, site.stride, site.padding, site.dilation, site.transposed, site.output_padding, site.groups
    )


def flip(weight: Tensor, site: Site) -> Tensor:
    """Return the kernel whose plain convolution is the transposed one: reversed, channels swapped within groups."""
    c_in, per_group = weight.shape[:2]
    swapped = weight.reshape(site.groups, c_in // site.groups, per_group, *site.kernel).transpose(1, 2)
    return swapped.reshape(site.groups * per_group, c_in // site.groups, *site.kernel).flip(site.dims).contiguous()


def flipped_site(site: Site) -> Site:
    """Return the plain convolution that a transposed one of stride 1 is with the flipped kernel."""
    return sized(site._replace(padding=site.around, transposed=False))


def flipped(x: Tensor, kernel: Tensor, bias: Tensor | None, site: Site) -> Tensor:
    """Return a transposed convolution of stride 1 as a plain one with the flipped kernel."""
    none = site.output_padding  # or it were no plain convolution
    return torch.convolution(x, kernel, bias, site.stride, site.around, site.dilation, False, none, site.groups)


def spectrum(weight: Tensor, site: Site) -> Tensor:
    """Return the kernel's transform, of shape ``(groups, C_out / groups, C_in / groups, *frequencies)``."""
    g = site.groups
    if site.transposed:
        weight = weight.reshape(g, weight.shape[0] // g, weight.shape[1], *site.kernel).transpose(1, 2)
    else:
        weight = weight.reshape(g, weight.shape[0] // g, weight.shape[1], *site.kernel)
    size = site.fft_size
    placed = weight.new_zeros(*weight.shape[:3], *size)
    where: Any = (..., *[slice(0, e, d) for e, d in zip(site.extent, site.dilation, strict=True)])
    placed[where] = weight
    axes = tuple(range(3, 3 + len(size)))
    # Moved by the padding, so that the first wanted output is the first entry of the result.
    placed = placed.roll([-p for p in site.padding], axes)
    transform = torch.fft.rfftn(placed, dim=axes)
    result: Tensor = transform if site.transposed else transform.conj().resolve_conj()
    return result


def fft(x: Tensor, transform: Tensor, bias: Tensor | None, site: Site) -> Tensor:
    """Return the convolution as a product of transforms."""
    size, dims, g = site.fft_size, site.dims, site.groups
    if site.transposed and any(s > 1 for s in site.stride):
        spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], site.stride, strict=True)))
        where: Any = (..., *[slice(None, None, s) for s in site.stride])
        spread[where] = x
        x = spread
    source = torch.fft.rfftn(x, s=size, dim=dims)
    batch, frequencies = x.shape[0], source.shape[2:]
    if transform.shape[1] == transform.shape[2] == 1:
        product = source.reshape(batch, g, *frequencies).mul_(transform[:, 0, 0])  # no one else has it
    elif transform.shape[2] == 1:
        product = source.reshape(batch, g, 1, *frequencies) * transform[:, :, 0]
    else:
        product = (source.reshape(batch, g, 1, -1, *frequencies) * transform).sum(3)
    product = product.reshape(batch, -1, *frequencies)
    rows = torch.fft.ifftn(product, dim=dims[:-1]) if len(dims) > 1 else product
    y: Tensor = torch.fft.irfft(_spread(rows), n=size[-1], dim=-1)
    steps = [1] * len(dims) if site.transposed else site.stride
    wanted = [slice(0, (n - 1) * s + 1, s) for n, s in zip(site.output_shape[1:], steps, strict=True)]
    inside: Any = (..., *wanted)
    y = y[inside]
    return y.contiguous() if bias is None else y + bias.reshape(-1, *[1] * len(dims))


def _spread(rows: Tensor) -> Tensor:
    """Return rows whose entries do not lie a power of two apart in memory.

    The first transforms leave the last dimension as the slowest. Where its entries are kilobytes apart, all of a row
    compete for the same few lines of the cache, and the last transform takes twice as long: far more than a copy.
    """
    *inner, last = rows.shape[2:]
    step = math.prod(inner)
    if rows.device.type != "cpu" or rows.stride(-1) != step or step * rows.element_size() % 1024:
        return rows
    step += 8
    strides = (rows.shape[1] * last * step, last * step, *rows.stride()[2:-1], step)
    return torch.empty_strided(rows.shape, strides, dtype=rows.dtype).copy_(rows)


def taps(weight: Tensor, site: Site) -> Tensor:
    """Return the weights of each tap of a depthwise plain convolution, of shape ``(taps, C, 1, …)``."""
    kernel = flip(weight, site) if site.transposed else weight
    return kernel.reshape(kernel.shape[0], -1).T.reshape(-1, kernel.shape[0], *[1] * len(site.kernel)).contiguous()


def tapped(x: Tensor, weights: Tensor, bias: Tensor | None, site: Site) -> Tensor:
    """Return a depthwise convolution as a sum of shifted images, one pass over memory for each tap."""
    x = aten.constant_pad_nd.default(x, [p for p in reversed(site.around) for _ in range(2)])
    reach = [(n - 1) * s + 1 for n, s in zip(site.output_shape[1:], site.stride, strict=True)]
    total: Tensor | None = None
    for weight, tap in zip(weights, itertools.product(*map(range, site.kernel)), strict=True):
        window = [slice(i * d, i * d + r, s) for i, d, r, s in zip(tap, site.dilation, reach, site.stride, strict=True)]
        where: Any = (..., *window)
        shifted = x[where]
        total = shifted * weight if total is None else total.addcmul_(shifted, weight)
    assert total is not None
    return total if bias is None else total.add_(bias.reshape(-1, *[1] * len(site.kernel)))


def bands(weight: Tensor, site: Site) -> Tensor:
    """Return the kernels of all phases of a plain convolution: the same one, each shifted by a stride from the last."""
    kernel = flip(weight, site) if site.transposed else weight
    (*_, s), (*_, d), (*_, e), count = site.stride, site.dilation, site.extent, site.phases
    spread = kernel.new_zeros(kernel.shape[0], count, *kernel.shape[1:-1], s * (count - 1) + e)
    for phase in range(count):
        spread[:, phase, ..., s * phase : s * phase + e : d] = kernel
    spread = spread.flatten(0, 1)
    if len(site.kernel) == 1:
        spread = spread.unsqueeze(2)
    return spread if len(site.kernel) == 3 else channels_last(spread)  # for volumes, blocked channels are faster


def polyphase(x: Tensor, kernel: Tensor, bias: Tensor | None, site: Site) -> Tensor:
    """Return a plain convolution whose last stride is that of several outputs, which are channels of it.

    Direct kernels have channels for their vectors. An image of one channel leaves these empty; here, neighbouring
    outputs fill them, for a few multiplications by zero. The kernels of oneDNN are called by name since PyTorch takes
    slower ones for small images, and for volumes with a 3×3×3 kernel.
    """
    padding, count, wanted = [*site.around], site.phases, site.output_shape[-1]
    stride, dilation = [*site.stride[:-1], count * site.stride[-1]], [*site.dilation[:-1], 1]
    if x.ndim == 3:
        x, padding, stride, dilation = x.unsqueeze(2), [0, *padding], [1, *stride], [1, *dilation]
    blocks = -(-wanted // count)
    missing = (blocks - 1) * stride[-1] + kernel.shape[-1] - x.shape[-1] - 2 * padding[-1]
    if missing > 0:
        x = aten.constant_pad_nd.default(x, [0, missing])
    bias = None if bias is None else bias.repeat_interleave(count)
    if torch.compiler.is_compiling():  # which knows no shape of the other
        y = torch.convolution(x, kernel, bias, stride, padding, dilation, False, [0] * len(stride), site.groups)
    else:
        y = torch.mkldnn_convolution(x, kernel, bias, padding, stride, dilation, site.groups)
    y = y if y.shape[-1] == blocks else y[..., :blocks]
    y = y.view(y.shape[0], -1, count, *y.shape[2:]).movedim(2, -1)
    y = y.reshape(x.shape[0], *site.output_shape[:-1], blocks * count)
    found: Tensor = y if blocks * count == wanted else y[..., :wanted].contiguous()
    return found


def channels_last(image: Tensor) -> Tensor:
    """Return an image of one channel in the order that has the channels last, if it is contiguous: it is both then.

    Strides of dimensions of size one are free, but the CPU's convolutions read the order from them: an input gradient
    at an image in this order is many times as fast.
    """
    if image.ndim not in (4, 5) or image.shape[1] != 1 or not image.is_contiguous():
        return image
    return image.as_strided(image.shape, (image.stride(0), 1, *image.stride()[2:]))


KERNELS: dict[str, Callable[..., Tensor]] = {
    "native": native, "flipped": flipped, "tapped": tapped, "polyphase": polyphase, "fft": fft,
}  # fmt: skip
PREPARE: dict[str, Callable[[Tensor, Site], Tensor]] = {
    "flipped": flip, "tapped": taps, "polyphase": bands, "fft": spectrum,
}  # fmt: skip


_ONEDNN = torch.backends.mkldnn.is_available()


def available(site: Site) -> list[str]:
    """Return the kernels that can compute this site."""
    names = ["native"]
    reaches = all(e - 1 >= p for e, p in zip(site.extent, site.padding, strict=True))
    plain = not site.transposed or (reaches and all(s == 1 for s in site.stride) and not any(site.output_padding))
    if site.transposed and plain:
        names.append("flipped")
    wide = site.dtype in (torch.float32, torch.float64)  # complex convolutions reach here as three real ones
    if plain and wide and site.input_shape[0] == site.output_shape[0] == site.groups:
        names.append("tapped")
    vectors = site.groups == 1 and (site.phases > 1 or len(site.kernel) == 3) and site.output_shape[-1] > 1
    if plain and vectors and site.dtype == torch.float32 and site.device.type == "cpu" and _ONEDNN:
        names.append("polyphase")
    # Rounding errors of the direct sum grow like √terms · eps / 7, those of the transform like √log₂(points) · eps / 2:
    # a product of transforms is used where it loses at most a factor of four.
    terms = math.prod(site.kernel) * site.input_shape[0] // site.groups
    if wide and terms >= 1.1 * math.log2(max(2, math.prod(site.fft_size))):
        names.append("fft")
    return names


def transformed(site: Site) -> str:
    """Return the kernel for a site if it is to be a product of transforms wherever that is accurate enough."""
    return "fft" if "fft" in available(site) else "native"
