"""The figure of a report: an impulse response of B, of Aᴴ and of their difference, where the difference is large."""

from __future__ import annotations

import torch
from torch import Tensor

from adjointlab.numerics import norm
from adjointlab.reporting import Grid
from adjointlab.space import Space
from adjointlab.space.coordinates import place_of
from adjointlab.verify.checked_map import ExhaustedError, Tensors, impulse
from adjointlab.verify.comparison import Comparison

Figure = tuple[tuple[str, Grid], ...]
_MOST_CELLS = 32  # along each side of a heat map


def figure_of(comparison: Comparison) -> Figure:
    """Return heat maps of ``B v``, ``Aᴴ v`` and their difference, for the centre or an impulse that shows more."""
    adjoint, reference, y = comparison.adjoint, comparison.reference, comparison.inputs[0]
    space = adjoint.space.with_batch(y[0].shape[: adjoint.space.batch_dims])
    what, got, right = "random input", *(tuple(t[0] for t in u) for u in (comparison.found, comparison.expected))
    typical = norm(_gap(got, right)) / max(1.0, adjoint.space.size**0.5)  # of the error for an impulse
    try:
        number, index = 0, tuple(size // 2 for size in space.specs[0].shape)
        for _ in range(2):
            e = impulse(space, number, index)
            pair = adjoint(e), reference(e)
            if norm(_gap(*pair)) > 0.0:
                what, (got, right) = f"impulse at {index}", pair
            if norm(_gap(*pair)) >= typical / 2:  # the centre will do, unless it shows little of the error
                break
            number, index = _worst_impulse(comparison, space)
    except ExhaustedError:  # the impulse that was found, or the random input, will do
        pass
    gaps = [float(t.abs().max()) for t in _gap(got, right)]
    leaf = max(range(len(gaps)), key=gaps.__getitem__)
    difference = (got[leaf] - right[leaf]).abs()
    where = int(difference.argmax())
    names = ("Bv", "Aᴴv", "|Bv − Aᴴv|")
    images = [_plane(image, where) for image in (got[leaf].abs(), right[leaf].abs(), difference)]
    (top, bottom), (left, end) = _window(images)
    height, width = images[0].shape
    if (bottom - top, end - left) != (height, width):
        what += f", rows {top}–{bottom - 1} of {height}, columns {left}–{end - 1} of {width}"
    return tuple(
        (f"{name}, {what}", _grid(image[top:bottom, left:end])) for name, image in zip(names, images, strict=True)
    )


def _gap(got: Tensors, right: Tensors) -> Tensors:
    return tuple(map(torch.sub, got, right))


def _worst_impulse(comparison: Comparison, space: Space) -> tuple[int, tuple[int, ...]]:
    """Return the leaf and index of an impulse whose response is about the most wrong, by bisection of y."""
    # The half with the larger error is kept. As B − Aᴴ is linear, the error of one half shows that of the other.
    y = space.vector(space.unflatten(comparison.inputs[0]))

    def error(low: int, high: int) -> Tensors:
        part = torch.zeros_like(y)
        part[low:high] = y[low:high]
        leaves = space.leaves(space.element(part))
        return _gap(comparison.adjoint(leaves), comparison.reference(leaves))

    low, high = 0, len(y)
    whole = error(low, high)
    while high - low > 1 and comparison.meter.left >= 4:
        middle = (low + high) // 2
        first = error(low, middle)
        second = _gap(whole, first)
        low, high, whole = (low, middle, first) if norm(first) >= norm(second) else (middle, high, second)
    return place_of(space, low)


def _plane(image: Tensor, where: int) -> Tensor:
    """Return the plane of the last two dimensions that contains the entry with flat index ``where``."""
    plane = image.detach().double().cpu()
    plane = plane.reshape(1, -1) if plane.ndim < 2 else plane
    height, width = plane.shape[-2:]
    return plane.reshape(-1, height, width)[where // (height * width)]


def _window(images: list[Tensor]) -> list[tuple[int, int]]:
    """Return the rows and columns where some image is not zero, with a margin."""
    lit = torch.stack([image > 1e-6 * float(image.max()) for image in images]).any(dim=0)
    bounds = []
    for dim, size in enumerate(lit.shape):
        places = lit.any(dim=1 - dim).nonzero().flatten()
        low, high = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, size)
        margin = max(2, (high - low) // 4)
        bounds.append((max(0, low - margin), min(size, high + margin)))
    return bounds


def _grid(plane: Tensor) -> Grid:
    """Return a plane as numbers, reduced to the largest entry of each cell, with the same aspect ratio."""
    height, width = plane.shape
    share = min(1.0, _MOST_CELLS / max(height, width))
    size = (max(1, round(share * height)), max(1, round(share * width)))
    thin = torch.nn.functional.adaptive_max_pool2d(plane[None], size)[0]
    return tuple(tuple(float(f"{value:.4g}") for value in row) for row in thin.tolist())
