"""Samples on a grid, as PyTorch's ``grid_sample`` takes them: which entries of an image, with which weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from adjointlab.transpose.passes.rows import NotByIndexError

_BILINEAR, _NEAREST, _BICUBIC = range(3)
_ZEROS, _BORDER, _REFLECTION = range(3)
_FAR = 1e6  # sizes of the image
_CUBIC = -0.75  # Keys' parameter, as PyTorch has it


def samples(grid: Tensor, sizes: Sequence[int], mode: int, padding: int, corners: bool) -> tuple[Tensor, Tensor]:
    """Return the numbers of entries, −1 outside of the image, and their weights: ``(grids, samples, entries of each)``.

    The arithmetic is PyTorch's own, operation by operation, so that the nearest entries are the same ones.
    """
    if not bool((grid.abs() < _FAR).all()):  # NaN is not
        raise NotByIndexError(
            "a grid with infinities, or so far outside that rounding decides where it is reflected to"
        )
    taps = []
    for u, n in zip(grid.flatten(1, -2).unbind(-1), reversed(sizes), strict=True):
        at = ((u + 1) / 2) * (n - 1) if corners else ((u + 1) * n - 1) / 2
        if mode != _BICUBIC:
            at = _inside(at, n, padding, corners)
        low = at.floor()
        if mode == _BILINEAR:
            taps.append([(low, low + 1 - at), (low + 1, at - low)])
        elif mode == _NEAREST:
            taps.append([(at.round(), torch.ones_like(at))])
        else:
            weights = _cubic(at - low)
            taps.append([(_inside(low - 1 + i, n, padding, corners), w) for i, w in enumerate(weights)])
    index, weight = [], []
    for corner in itertools.product(*reversed(taps)):
        zeros = torch.zeros_like(grid[..., 0].flatten(1))
        number, product, is_inside = zeros.long(), zeros + 1, zeros == 0
        for (near, w), n in zip(corner, sizes, strict=True):
            is_inside = is_inside & (near >= 0) & (near < n)
            number = number * n + near.clamp(-1, n).long()
            product = product * w
        index.append(torch.where(is_inside, number, -1))
        weight.append(product)
    return torch.stack(index, -1), torch.stack(weight, -1)


def _inside(at: Tensor, n: int, padding: int, corners: bool) -> Tensor:
    """Return where padding finds a coordinate."""
    if padding == _BORDER:
        return at.clamp(0, n - 1)
    if padding == _REFLECTION:
        low, span = (0.0, n - 1.0) if corners else (-0.5, float(n))
        if span == 0:
            return torch.zeros_like(at)
        beyond = (at - low).abs()
        rest, flips = beyond.fmod(span), (beyond / span).floor()
        return torch.where(flips % 2 == 0, rest + low, span - rest + low).clamp(0, n - 1)
    return at


def _cubic(t: Tensor) -> list[Tensor]:
    """Return the weights of the four entries around a place between the middle two."""
    a = _CUBIC

    def near(x: Tensor) -> Tensor:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return [far(t + 1), near(t), near(1 - t), far(2 - t)]
