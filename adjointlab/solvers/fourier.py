"""The Fourier basis, in which a cyclic convolution is diagonal: ``A = F⁻¹ diag(K) F`` with the unitary transform F."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adjointlab.operators import LinearOperator, product
from adjointlab.solvers.arithmetic import Vector
from adjointlab.space import Space, TensorSpec


def multiplier(A: LinearOperator) -> Tensor | None:
    """Return ``K`` with ``A = F⁻¹ diag(K) F`` for a cyclic convolution or a product of two; None for any other."""
    made, arguments = A.recipe
    if made is not product:
        return A.multiplier
    first, second = (part.multiplier for part in arguments)
    return None if first is None or second is None or first.shape != second.shape else first * second


@dataclass(frozen=True)
class FourierBasis:
    """Half spectra as coordinates of the real images in ``space``: an isometry for ``Re⟨·, ·⟩``.

    The spectrum of a real image is symmetric, so one half determines it. Coordinates that represent two frequencies are
    multiplied by ``√2``.
    """

    space: Space
    operator: LinearOperator  # diag(K), between spectra

    @staticmethod
    def of(A: LinearOperator) -> FourierBasis | None:
        """Return the Fourier basis for a cyclic convolution, and None for any other operator."""
        K = A.multiplier
        if K is None:
            return None
        spec = A.domain.specs[0]
        spectra = TensorSpec((*spec.shape[: 1 - K.ndim], *K.shape[1:]), K.dtype, spec.device)
        space = Space.of(spectra, batch_dims=A.domain.batch_dims)
        return FourierBasis(A.domain, LinearOperator(lambda c: K * c, lambda c: K.conj() * c, space, space))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Sizes of the spatial dimensions of an image."""
        return self.space.specs[0].shape[2:]

    @property
    def dims(self) -> tuple[int, ...]:
        """Indices of the spatial dimensions, counted from the last."""
        return tuple(range(-len(self.lengths), 0))

    def spectrum(self, x: Tensor) -> Tensor:
        """Return the coordinates of an element, detached from autograd."""
        found: Tensor = torch.fft.rfftn(x.detach(), dim=self.dims, norm="ortho")
        self._doubled(found).mul_(math.sqrt(2))
        return found

    def element(self, vector: Vector) -> Tensor:
        """Return the element with the given coordinates, which are not modified."""
        spectrum = torch.view_as_complex(vector[0]).clone()
        self._doubled(spectrum).mul_(math.sqrt(0.5))
        if self.dims[:-1]:  # two steps, so that the input of the first is freed before the second
            spectrum = torch.fft.ifftn(spectrum, dim=self.dims[:-1], norm="ortho")
        found: Tensor = torch.fft.irfft(spectrum, n=self.lengths[-1], norm="ortho")
        return found

    def _doubled(self, spectrum: Tensor) -> Tensor:
        return spectrum[..., 1 : (self.lengths[-1] + 1) // 2]
