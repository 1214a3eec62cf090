"""Equal ways to compute one convolution: native, flipped, tap by tap, several outputs at a time, by FFT.

Each is made for a site, as a function of the input, of what depends on the weight (ready-made) and of the bias: what
follows from sizes and settings alone is not computed at every call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjointlab.transpose.kernels.convolution import Site, flipped_site, window

aten = torch.ops.aten
Kernel = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def native(site: Site) -> Kernel:
    """Return the convolution as PyTorch computes it."""
    settings = site.stride, site.padding, site.dilation, site.transposed, site.output_padding, site.groups

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.convolution(x, weight, bias, *settings)

    return run


def flip(weight: Tensor, site: Site) -> Tensor:
    """Return the kernel whose plain convolution is the transposed one: reversed, channels swapped within groups."""
    c_in, per_group = weight.shape[:2]
    if c_in * per_group > 1:
        weight = weight.reshape(site.groups, c_in // site.groups, per_group, *site.kernel).transpose(1, 2)
        weight = weight.reshape(site.groups * per_group, c_in // site.groups, *site.kernel)
    return weight.flip(site.dims).contiguous()


def flipped(site: Site) -> Kernel:
    """Return a transposed convolution of stride 1 as a plain one with the flipped kernel."""
    return native(flipped_site(site))


def spectrum(weight: Tensor, site: Site) -> Tensor:
    """Return the kernel's transform, of shape ``(groups, C_out / groups, C_in / groups, *frequencies)``.

    Where each channel has a kernel of its own, it is of shape ``(C, *frequencies)``.
    """
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
    return result[:, 0, 0] if result.shape[1] == result.shape[2] == 1 else result


def fft(site: Site) -> Kernel:
    """Return the convolution as a product of transforms."""

    def run(x: Tensor, transform: Tensor, bias: Tensor | None) -> Tensor:
        return _synthesis(_product(_analysis(x, site), transform), bias, site)

    return run


def gradient(sites: tuple[Site, Site]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return ``(x, y, a, b) ↦ B(Ax − y)`` for two products with transforms, of one length: subtracted are spectra.

    That needs three transforms, where one product after the other needs four.
    """
    first, second = sites

    def run(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        spectrum = _product(_analysis(x, first), a).sub_(_analysis(y, second))
        return _synthesis(_product(spectrum, b), None, second)

    return run


def _analysis(x: Tensor, site: Site) -> Tensor:
    """Return the transform of what a site reads."""
    if site.transposed and any(s > 1 for s in site.stride):
        spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], site.stride, strict=True)))
        where: Any = (..., *[slice(None, None, s) for s in site.stride])
        spread[where] = x
        x = spread
    found: Tensor = torch.fft.rfftn(x, s=site.fft_size, dim=site.dims)
    return found


def _product(source: Tensor, transform: Tensor) -> Tensor:
    """Return the spectrum of the result; the source's memory may be used for it."""
    if transform.ndim < source.ndim:
        return source.mul_(transform)  # no one else has it
    (batch, _, *frequencies), g = source.shape, transform.shape[0]
    if transform.shape[2] == 1:
        product = source.reshape(batch, g, 1, *frequencies) * transform[:, :, 0]
    else:
        product = (source.reshape(batch, g, 1, -1, *frequencies) * transform).sum(3)
    return product.reshape(batch, -1, *frequencies)


def _synthesis(product: Tensor, bias: Tensor | None, site: Site) -> Tensor:
    """Return the result with a spectrum."""
    dims = site.dims
    if product.device.type == "cpu":
        rows = torch.fft.ifftn(product, dim=dims[:-1]) if len(dims) > 1 else product
        y: Tensor = torch.fft.irfft(_spread(rows), n=site.fft_size[-1], dim=-1)
    else:
        y = torch.fft.irfftn(product, s=site.fft_size, dim=dims)
    steps = [1] * len(dims) if site.transposed else site.stride
    wanted = [slice(0, (n - 1) * s + 1, s) for n, s in zip(site.output_shape[1:], steps, strict=True)]
    inside: Any = (..., *wanted)
    y = y[inside]
    return y.contiguous() if bias is None else y + bias.reshape(-1, *[1] * len(dims))


def _spread(rows: Tensor) -> Tensor:
    """Return rows whose entries do not lie a power of two apart in the CPU's memory.

    The first transforms leave the last dimension as the slowest. Where its entries are kilobytes apart, all of a row
    compete for the same few lines of the cache, and the last transform takes twice as long: far more than a copy.
    """
    *inner, last = rows.shape[2:]
    step = math.prod(inner)
    if rows.stride(-1) != step or step * rows.element_size() % 1024:
        return rows
    step += 8
    strides = (rows.shape[1] * last * step, last * step, *rows.stride()[2:-1], step)
    return torch.empty_strided(rows.shape, strides, dtype=rows.dtype).copy_(rows)


def taps(weight: Tensor, site: Site) -> Tensor:
    """Return the weights of each tap of a depthwise plain convolution, of shape ``(taps, C, 1, …)``."""
    kernel = flip(weight, site) if site.transposed else weight
    return kernel.reshape(kernel.shape[0], -1).T.reshape(-1, kernel.shape[0], *[1] * len(site.kernel)).contiguous()


def tapped(site: Site) -> Kernel:
    """Return a depthwise convolution as a sum of shifted images, one pass over memory for each tap."""
    border = [p for p in reversed(site.around) for _ in range(2)]
    reach = [(n - 1) * s + 1 for n, s in zip(site.output_shape[1:], site.stride, strict=True)]
    settings = list(zip(site.dilation, reach, site.stride, strict=True))
    windows: list[Any] = [
        (..., *[slice(i * d, i * d + r, s) for i, (d, r, s) in zip(tap, settings, strict=True)])
        for tap in itertools.product(*map(range, site.kernel))
    ]

    def run(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        x = aten.constant_pad_nd.default(x, border)
        total: Tensor | None = None
        for weight, where in zip(weights, windows, strict=True):
            shifted = x[where]
            total = shifted * weight if total is None else total.addcmul_(shifted, weight)
        assert total is not None
        return total if bias is None else total.add_(bias.reshape(-1, *[1] * len(site.kernel)))

    return run


def bands(weight: Tensor, site: Site) -> Tensor:
    """Return the kernels of all phases: for each of neighbouring outputs, its taps where it reads the common window."""
    kernel = flip(weight, site) if site.transposed else weight
    places = [_places(i, site) for i in range(len(site.kernel))]
    spread = kernel.new_zeros(kernel.shape[0], math.prod(site.phases), kernel.shape[1], *window(site))
    for phase, along in enumerate(itertools.product(*places)):
        taps, taken = zip(*along, strict=True)
        spread[(slice(None), phase, slice(None), *taken)] = kernel[(slice(None), slice(None), *taps)]
    spread = spread.flatten(0, 1)
    if len(site.kernel) == 1:
        spread = spread.unsqueeze(2)
    return spread if len(site.kernel) == 3 else channels_last(spread)  # for volumes, blocked channels are faster


def _places(dim: int, site: Site) -> list[tuple[slice, slice]]:
    """Return, for each phase along a dimension, which taps of the kernel it has and where they are in its window."""
    count, k, s, p, d = (t[dim] for t in (site.phases, site.kernel, site.stride, site.around, site.dilation))
    if count == 1:
        return [(slice(0, k), slice(0, k))]
    up, down = (1, s) if site.transposed else (s, 1)  # the output at t reads inputs at (up t + d j − p) / down
    found = []
    for phase in range(count):
        taps = [j for j in range(k) if (up * phase + d * j - p) % down == 0]
        if not taps:
            found.append((slice(0, 0), slice(0, 0)))
            continue
        first, last = ((up * phase + d * j - p) // down + p // down for j in (taps[0], taps[-1]))
        step = down // math.gcd(d, down)
        found.append((slice(taps[0], taps[-1] + 1, step), slice(first, last + 1, d * step // down)))
    return found


def polyphase(site: Site) -> Kernel:
    """Return a convolution, transposed or not, as a plain one of which neighbouring outputs are the channels.

    Direct kernels have channels for their vectors. An image of one channel leaves these empty; here, neighbouring
    outputs fill them, for a few multiplications by zero. Outputs of a transposed convolution with a stride read
    different taps in turn: with the stride's outputs as channels, nothing is multiplied by the zeros between inputs.
    The kernels of oneDNN are called by name since PyTorch takes slower ones for small images, and for volumes with a
    3×3×3 kernel.
    """
    padding = [p // s if site.transposed else p for p, s in zip(site.around, site.stride, strict=True)]
    stride = [c // s if site.transposed else c * s for c, s in zip(site.phases, site.stride, strict=True)]
    # oneDNN reads past the end where a kernel of one entry is dilated.
    dilation = [d if c == 1 < k else 1 for c, d, k in zip(site.phases, site.dilation, site.kernel, strict=True)]
    blocks = [-(-n // c) for n, c in zip(site.output_shape[1:], site.phases, strict=True)]
    reached = [d * (k - 1) + 1 for d, k in zip(dilation, window(site), strict=True)]
    room = [n + 2 * p - e for n, p, e in zip(site.input_shape[1:], padding, reached, strict=True)]
    missing = [max(0, (q - 1) * s - r) for q, s, r in zip(blocks, stride, room, strict=True)]
    border = [n for m in reversed(missing) for n in (0, m)] if any(missing) else None
    fits = all((r + m) // s + 1 == q for r, m, s, q in zip(room, missing, stride, blocks, strict=True))
    flat = len(blocks) == 1
    if flat:
        padding, stride, dilation = [0, *padding], [1, *stride], [1, *dilation]
    inside: Any = (..., *[slice(0, q) for q in blocks])
    count, none = math.prod(site.phases), [0] * len(stride)
    interleaved = _interleaved(site, blocks)

    def run(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        if flat:
            x = x.unsqueeze(2)
        if border:
            x = aten.constant_pad_nd.default(x, border)
        bias = None if bias is None else bias.repeat_interleave(count)
        if torch.compiler.is_compiling():  # which knows no shape of the other
            y = torch.convolution(x, kernel, bias, stride, padding, dilation, False, none, site.groups)
        else:
            y = torch.mkldnn_convolution(x, kernel, bias, padding, stride, dilation, site.groups)
        return interleaved(y if fits else y[inside])

    return run


def _interleaved(site: Site, blocks: list[int]) -> Callable[[Tensor], Tensor]:
    """Return a function that puts outputs which were computed as channels in their places in the image."""
    count = len(blocks)
    order = [0, 1, *[n for i in range(count) for n in (2 + count + i, 2 + i)]]
    phases = [site.output_shape[0], *site.phases, *blocks]
    shape = [site.output_shape[0], *[c * q for c, q in zip(site.phases, blocks, strict=True)]]
    inside: Any = (..., *[slice(0, n) for n in site.output_shape[1:]])
    whole = tuple(shape) == site.output_shape

    def run(y: Tensor) -> Tensor:
        y = y.reshape(-1, *phases).permute(order).reshape(-1, *shape)
        return y if whole else y[inside].contiguous()

    return run


def channels_last(image: Tensor) -> Tensor:
    """Return an image of one channel in the order that has the channels last, if it is contiguous: it is both then.

    Strides of dimensions of size one are free, but the CPU's convolutions read the order from them: an input gradient
    at an image in this order is many times as fast.
    """
    if image.ndim not in (4, 5) or image.shape[1] != 1 or not image.is_contiguous():
        return image
    return image.as_strided(image.shape, (image.stride(0), 1, *image.stride()[2:]))


KERNELS: dict[str, Callable[[Site], Kernel]] = {
    "native": native, "flipped": flipped, "tapped": tapped, "polyphase": polyphase, "fft": fft,
}  # fmt: skip
PREPARE: dict[str, Callable[[Tensor, Site], Tensor]] = {
    "flipped": flip, "tapped": taps, "polyphase": bands, "fft": spectrum,
}  # fmt: skip


def is_kept(prepare: object, device: torch.device) -> bool:
    """Return whether what ``prepare`` makes of a kernel is kept for later calls.

    To see that the kernel is still the same is to compare its values, for which an accelerator has to finish all that
    it has been given: there, only a transform takes longer.
    """
    return device.type == "cpu" or prepare is spectrum


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
    # For results one column wide, oneDNN computes garbage.
    vectors = (math.prod(site.phases) > 1 or len(site.kernel) == 3) and site.output_shape[-1] > site.phases[-1]
    if (reaches or not site.transposed) and site.groups == 1 and vectors and site.suits_onednn:
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
