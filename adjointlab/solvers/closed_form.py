r"""Regularised least squares in closed form, where all operators are cyclic convolutions along the same dimensions.

With the Fourier transform F along them, ``A = F⁻¹ diag(K) F`` and ``L = F⁻¹ diag(Q) F``, the minimiser is

``x = F⁻¹ (conj(K) · Fy + Σ λ conj(Q) · Fb) / (|K|² + Σ λ |Q|²)``, and zero at frequencies where the denominator is.

The spectra are those of the responses to an impulse. That an operator is such a convolution is proved for random data:
it commutes with the shifts by one, and its image at one place is the inner product of the data with that response.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from adjointlab.numerics import UNITS, allowance
from adjointlab.operators import LinearOperator
from adjointlab.solvers.arithmetic import Vectors
from adjointlab.solvers.problem import nonnegative
from adjointlab.solvers.solution import REASONS, Solution, Status
from adjointlab.terms import Penalty, per_problem
from adjointlab.tree import SINGLE


@dataclass(frozen=True)
class _Term:
    """The term ``½ λ ‖Kx − d‖²``, by spectra; d is zero if None."""

    K: Tensor
    d: Tensor | None
    strength: Any
    extra: tuple[int, ...]  # the dimensions that images have and x has not

    def right(self) -> Tensor:
        """Return ``λ conj(K) d``."""
        return self._weighted(torch.zeros_like(self.K) if self.d is None else self.K.conj() * self.d)

    def square(self) -> Tensor:
        """Return ``λ |K|²``."""
        return self._weighted(_squared(self.K))

    def misfit(self, x: Tensor) -> Tensor:
        """Return ``λ |Kx − d|²``."""
        apart = self.K * self._widened(x) if self.d is None else self.K * self._widened(x) - self.d
        return self._weighted(_squared(apart))

    def _widened(self, x: Tensor) -> Tensor:
        for dim in self.extra:
            x = x.unsqueeze(dim)
        return x

    def _weighted(self, spectrum: Tensor) -> Tensor:
        whole = spectrum.sum(self.extra) if self.extra else spectrum
        found: Tensor = per_problem(self.strength, whole) * whole
        return found


def _squared(spectrum: Tensor) -> Tensor:
    return spectrum.real.square() + spectrum.imag.square()


@dataclass(frozen=True)
class _Transform:
    """The Fourier transform along some dimensions, counted from the last; half of it for real elements."""

    domain: Vectors
    dims: tuple[int, ...]

    @property
    def sizes(self) -> list[int]:
        """The sizes of the dimensions."""
        return [self.domain.space.specs[0].shape[dim] for dim in self.dims]

    def spectrum(self, x: Tensor) -> Tensor:
        """Return the spectrum of a tensor."""
        transform = torch.fft.fftn if x.is_complex() else torch.fft.rfftn
        found: Tensor = transform(x, dim=self.dims)
        return found

    def element(self, spectrum: Tensor) -> Tensor:
        """Return the element with a spectrum."""
        is_complex, dims = self.domain.space.is_complex, self.dims
        found: Tensor = (
            torch.fft.ifftn(spectrum, dim=dims) if is_complex else torch.fft.irfftn(spectrum, self.sizes, dims)
        )
        return found

    def total(self, squares: Tensor) -> Tensor:
        """Return ``‖x‖²`` of every problem from the squares of the absolute values of a spectrum, by Parseval."""
        squares = squares.double()
        if not self.domain.space.is_complex:  # all but the first and the middle frequency stand for two
            n, halved = self.sizes[-1], squares.movedim(self.dims[-1], -1)
            squares = 2 * halved
            squares[..., 0] = halved[..., 0]
            if n % 2 == 0:
                squares[..., -1] = halved[..., -1]
        size = torch.tensor(self.sizes).prod().item()
        return squares.reshape(*self.domain.batch, -1).sum(-1) / size

    def terms(self, A: LinearOperator, K: Tensor | None, d: Any, strength: Any) -> list[_Term] | None:
        """Return the terms of an operator, one for each leaf of its codomain, or None unless it is a convolution."""
        spectra = [K] if K is not None and _dims_of(K) == self.dims else None
        if spectra is None:
            responses = _responses(A, self)
            if responses is None:
                return None
            spectra = [self.spectrum(response) for response in responses]
        k, rank = len(self.domain.batch), len(self.domain.space.specs[0].shape)
        extra = [tuple(range(k, k + len(spec.shape) - rank)) for spec in A.codomain.specs]
        data = [None] * len(spectra) if d is None else [self.spectrum(leaf) for leaf in A.codomain.leaves(d)]
        return [_Term(*found[:2], strength, found[2]) for found in zip(spectra, data, extra, strict=True)]


def closed_form(A: LinearOperator, y: Any, penalties: Sequence[Penalty], tol: float) -> Solution | None:
    """Return the minimiser of ``½‖Ax − y‖² + ½ Σ λ ‖Lx − b‖²``; None if it has no such form."""
    tol, operators = nonnegative("tol", tol), [A, *[penalty.L for penalty in penalties]]
    if not all(_may_be_cyclic(operator) for operator in operators):
        return None
    domain = Vectors(A.domain, tuple(A.codomain.leaves(y)[0].shape[: A.codomain.batch_dims]))
    known = [_known(operator) for operator in operators]
    dims = {dim for A, K in zip(operators, known, strict=True) for dim in _spread(A, K, domain)}
    transform, terms = _Transform(domain, tuple(sorted(dims))), list[_Term]()
    data = [y, *[penalty.b for penalty in penalties]]
    strengths = [1.0, *[penalty.strength for penalty in penalties]]
    for given in zip(operators, known, data, strengths, strict=True):
        found = transform.terms(*given) if dims else None
        if found is None:
            return None
        terms.extend(found)
    return _minimiser(transform, terms, tol)


def _minimiser(transform: _Transform, terms: Sequence[_Term], tol: float) -> Solution | None:
    """Return the minimiser of the sum of terms, if the gradient there is as small as it has to be."""
    domain = transform.domain
    units = allowance(UNITS, domain.space.eps)
    right = reduce(torch.add, [term.right() for term in terms])
    square = reduce(torch.add, [term.square() for term in terms])
    most = float(square.detach().amax())
    kernel = square <= units**2 * most  # which nothing but rounding tells from zero
    x = transform.element(torch.where(kernel, 0, right / torch.where(kernel, 1, square)))
    with torch.no_grad():
        again = transform.spectrum(x.detach())
        norm = torch.stack([transform.total(term.misfit(again)) for term in terms]).sum(0).sqrt()
        slope, size, length = (transform.total(_squared(t)).sqrt() for t in (square * again - right, right, again))
        is_small, is_rounding = slope <= tol * size, slope <= units * (most * length + most**0.5 * norm)
    # Squares that overflow, or underflow, tell nothing: solvers choose other units.
    is_told = size.isfinite() & (size > 0) if bool(right.detach().any()) else torch.ones_like(is_small)
    if not bool(((is_small | is_rounding) & is_told).all()):
        return None
    reason = REASONS[Status.LEAST_SQUARES if bool(is_small.all()) else Status.PRECISION]
    if not domain.batch:
        return Solution(x, True, 0, norm[None], reason)
    return Solution(x, torch.ones_like(is_small), torch.zeros_like(is_small, dtype=torch.int64), norm[None], reason)


def _may_be_cyclic(A: LinearOperator) -> bool:
    """Return whether x is one tensor, and images have its shape, or one that ends with it."""
    domain, codomain = A.domain, A.codomain
    if domain.structure is not SINGLE or domain.is_sharded or torch.finfo(domain.specs[0].dtype).bits < 32:
        return False
    x, k = domain.specs[0], domain.batch_dims
    rest = x.shape[k:]
    return bool(rest) and all(s.dtype == x.dtype and s.shape[k:][-len(rest) :] == rest for s in codomain.specs)


def _known(A: LinearOperator) -> Tensor | None:
    """Return the spectrum that the engine knows, unless it needs a gradient, for it has none."""
    K = A.multiplier
    if K is not None and torch.is_grad_enabled() and A.source is not None:
        return None if any(t.requires_grad for t in A.source.tensors()) else K
    return K


def _dims_of(K: Tensor) -> tuple[int, ...]:
    return tuple(range(1 - K.ndim, 0))


def _spread(A: LinearOperator, K: Tensor | None, domain: Vectors) -> set[int]:
    """Return the dimensions, counted from the last, along which an operator spreads an impulse at a random place."""
    if K is not None:
        return set(_dims_of(K))
    draw, shape = torch.Generator().manual_seed(0), domain.space.specs[0].shape
    place = [int(torch.randint(size, (), generator=draw, device="cpu")) for size in shape]
    impulse = domain.space.zeros()
    impulse[tuple(place)] = 1
    with torch.no_grad():
        where = [leaf.nonzero() for leaf in A.codomain.leaves(A(impulse))]
    dims = range(len(domain.batch) - len(shape), 0)
    return {dim for dim in dims if any(bool((found[:, dim] != place[dim]).any()) for found in where)}


def _responses(A: LinearOperator, transform: _Transform) -> list[Tensor] | None:
    """Return the responses to an impulse at the origin of every image, or None if A is no convolution."""
    domain, dims, space = transform.domain, transform.dims, transform.domain.space
    impulse, r = space.zeros(), space.randn(torch.Generator().manual_seed(1))
    inside = (..., *[0 if dim in dims else slice(None) for dim in range(-len(space.specs[0].shape), 0)])
    impulse[inside] = 1
    responses = A.codomain.leaves(A(impulse))
    with torch.no_grad():
        images = A.codomain.leaves(A(r))
        for dim in dims:
            moved = A.codomain.leaves(A(r.roll(1, dim)))
            if not all(_equal(a, b.roll(1, dim)) for a, b in zip(moved, images, strict=True)):
                return None
        for response, image in zip(responses, images, strict=True):
            wide = r
            for _ in range(image.ndim - r.ndim):
                wide = wide.unsqueeze(len(domain.batch))
            back = response.detach().flip(dims).roll([1] * len(dims), dims)  # the response at −j
            if not _equal((back * wide).sum(dims), image[inside], response.detach(), r):
                return None
    return list(responses)


def _equal(found: Tensor, expected: Tensor, *factors: Tensor) -> bool:
    """Return whether two tensors are equal but for rounding, which is of the size of what they are, or of factors."""
    lengths = [float(torch.linalg.vector_norm(factor)) for factor in factors or (expected,)]
    eps = torch.finfo(expected.dtype).eps
    return float(torch.linalg.vector_norm(found - expected)) <= allowance(UNITS, eps) * math.prod(lengths)
