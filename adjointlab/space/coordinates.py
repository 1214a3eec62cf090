"""An element as one vector of real numbers, whose dot products are ``Re⟨·, ·⟩``, and back."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjointlab.space.space import Space


def common_dtype(space: Space) -> torch.dtype:
    """Return the dtype that holds the entries of all leaves."""
    return functools.reduce(torch.promote_types, [spec.dtype for spec in space.specs])


def complex_entries(space: Space) -> slice | Tensor:
    """Return the positions of complex entries in ``Space.vector``: a full slice if all are complex, else a mask."""
    if all(spec.is_complex for spec in space.specs):
        return slice(None)
    device = space.specs[0].device
    return torch.cat([torch.full((spec.numel,), spec.is_complex, device=device) for spec in space.specs])


def split_complex(space: Space, vector: Tensor) -> Tensor:
    """Return ``[Re a; Im a]`` for a vector of a space, where real leaves have no imaginary part."""
    return torch.cat([vector.real, vector.imag[complex_entries(space)]]) if vector.is_complex() else vector


def join_complex(space: Space, coordinates: Tensor) -> Tensor:
    """Return the vector with the coordinates ``[Re a; Im a]``: the inverse of :func:`split_complex`."""
    if not space.is_complex:
        return coordinates
    real = coordinates[: space.size]
    imaginary = torch.zeros_like(real)
    imaginary[complex_entries(space)] = coordinates[space.size :]
    return torch.complex(real, imaginary)


def real_size(space: Space) -> int:
    """Return the number of real coordinates of an element, over all processes."""
    return sum(spec.size * (2 if spec.is_complex else 1) for spec in space.specs)


def place_of(space: Space, number: int) -> tuple[int, tuple[int, ...]]:
    """Return the leaf and the index of an entry of ``Space.vector``, by its number."""
    leaf = 0
    while number >= space.specs[leaf].numel:
        number -= space.specs[leaf].numel
        leaf += 1
    return leaf, tuple(map(int, np.unravel_index(number, space.specs[leaf].shape)))


def _roots(space: Space) -> list[float]:
    """Return the weight of each leaf: entries that n processes hold have 1/√n, so that they count once."""
    return [1.0 if spec.sharding is None else spec.sharding.share**0.5 for spec in space.specs]


def real_vector(space: Space, element: Any) -> Tensor:
    """Return an element as one real vector; the dot product, summed over processes, is ``Re⟨·, ·⟩``."""
    dtype = common_dtype(space).to_real()
    if torch.finfo(dtype).bits < 32:
        dtype = torch.float32
    leaves = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in space.leaves(element)]
    flat = [leaf.reshape(-1).to(dtype) for leaf in leaves]
    return torch.cat([w * leaf for w, leaf in zip(_roots(space), flat, strict=True)] if space.is_sharded else flat)


def real_element(space: Space, vector: Tensor) -> Any:
    """Return the element with the given real vector: the inverse of :func:`real_vector`."""
    parts = vector.split([spec.numel * (2 if spec.is_complex else 1) for spec in space.specs])
    leaves = []
    for part, spec, root in zip(parts, space.specs, _roots(space), strict=True):
        own = part / root if space.is_sharded else part
        whole = torch.view_as_complex(own.reshape(*spec.shape, 2)) if spec.is_complex else own.reshape(spec.shape)
        leaves.append(whole.to(spec.dtype))
    return space.unflatten(leaves)
