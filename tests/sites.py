"""Convolutions as the engine sees them."""

import torch

from adjointlab.transpose.kernels.convolution import Site, sized


def square(n: int, k: int, dims: int, *, transposed: bool, dtype: torch.dtype = torch.float32) -> Site:
    """Return a convolution of one channel that keeps the size, which is the same in all dimensions."""
    shape = (1, *[n] * dims)
    one, zero = (1,) * dims, (0,) * dims
    settings = one, (k // 2,) * dims, one, transposed, zero, 1, dtype, torch.get_default_device()
    return sized(Site(1, shape, shape, (k,) * dims, *settings))
