"""Spectra as preconditioners, ``s ↦ C F⁻¹ diag(λ)⁻¹ F C s``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adjointlab import blocks
from adjointlab.affine import Operator
from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.precondition.columns import Leaves
from adjointlab.precondition.equations import Equations, positive, seeded
from adjointlab.space import TensorSpec
from adjointlab.typed import X

_SURE = 0.05  # error up to which norms may scale a gram whose spectrum is to be seen, and cosines are equal
_PROBES = 49
_SAMPLES = 8


class _Filter(nn.Module):
    """``s ↦ c F⁻¹(λ⁻¹ F(c s))``, leaf by leaf, with a Fourier transform F over the last dimensions."""

    def __init__(self, dims: list[int], scales: list[Tensor] | None, inverses: list[Tensor]) -> None:
        super().__init__()
        self.dims, self.is_scaled = dims, scales is not None
        for index, inverse in enumerate(inverses):
            self.register_buffer(f"inverse_{index}", inverse)
        for index, scale in enumerate(scales or []):
            self.register_buffer(f"scale_{index}", scale)

    def forward(self, leaves: Leaves) -> list[Tensor]:
        return [self._filtered(index, leaf) for index, leaf in enumerate(leaves)]

    def _filtered(self, index: int, leaf: Tensor) -> Tensor:
        scale = getattr(self, f"scale_{index}") if self.is_scaled else None
        inverse, dims = getattr(self, f"inverse_{index}"), self.dims[index]
        spectrum = _spectrum(leaf if scale is None else scale * leaf, dims)
        found = _image(inverse * spectrum, leaf, dims)
        return found if scale is None else scale * found


def _spectrum(leaf: Tensor, dims: int) -> Tensor:
    """Return the Fourier transform over the last dimensions, half of it if the leaf is real."""
    if not dims:
        return leaf.to(torch.complex128)
    over = tuple(range(-dims, 0))
    leaf = leaf.float() if leaf.dtype in {torch.float16, torch.bfloat16} else leaf
    transform = torch.fft.fftn if leaf.is_complex() else torch.fft.rfftn
    found: Tensor = transform(leaf, dim=over, norm="ortho")
    return found


def _image(spectrum: Tensor, like: Tensor, dims: int) -> Tensor:
    over = tuple(range(-dims, 0))
    if not dims:
        return (spectrum if like.is_complex() else spectrum.real).to(like.dtype)
    if like.is_complex():
        found: Tensor = torch.fft.ifftn(spectrum, dim=over, norm="ortho")
    else:
        found = torch.fft.irfftn(spectrum, s=like.shape[-dims:], dim=over, norm="ortho").to(like.dtype)
    return found


def circulant(
    A: Operator[X, Any],
    *,
    weight: Any = None,
    damp: float | Tensor = 0.0,
    scale: X | None = None,
    dims: int | None = None,
    samples: int = _SAMPLES,
    generator: torch.Generator | None = None,
) -> LinearOperator[X, X]:
    r"""Return ``C F⁻¹ diag(λ)⁻¹ F C``: a division by a spectrum, between scalings ``C = diag(c)``.

    λ belongs to the equations in ``C⁻¹x``, ``N = C(AᴴWA + damp²)C``: at each frequency it is the length of a row of
    ``FNFᴴ``. Where N is a convolution, cyclic on the domain, that is its spectrum. Where it is not, as beside a border,
    under a mask or with weights, what one frequency gets from others counts as if it were its own: λ is not small where
    a division would amplify that. Of T. Chan's circulant, the diagonal of ``FNFᴴ``, this is the regularised relative;
    it is positive without a floor.

    Parameters
    ----------
    A, weight, damp
        As for :func:`diagonal`.
    scale : pytree of tensors, optional
        The entries c, such as one over the norms of the columns; ones if not given. If the domain has a weight, they
        scale ``W^½ x``.
    dims : int, optional
        Number of last dimensions that F transforms; the others, such as channels, have a spectrum each. All but the
        first two of a leaf with three or more, and all of others, if not given.
    samples : int
        Number of products with ``AᴴWA``, with vectors of random phases, that the lengths are a mean over.
    generator : torch.Generator, optional
        CPU generator of the phases.

    Returns
    -------
    LinearOperator
        On the domain of A. It takes a transform and its inverse, and memory for λ and c.

    Raises
    ------
    SpaceMismatchError
        If A is not an operator on whole tensors, or the weight or c does not match its spaces.
    ValueError
        If ``damp`` is of another batch than the domain of A, ``samples`` is not positive, or ``dims`` is more than a
        leaf has.

    References
    ----------
    T. F. Chan, *An optimal circulant preconditioner for Toeplitz systems*, SIAM J. Sci. Stat. Comput. 9 (1988) 766–771.
    E. E. Tyrtyshnikov, *Optimal and superoptimal circulant preconditioners*, SIAM J. Matrix Anal. Appl. 13 (1992)
    459–473.

    Examples
    --------
    >>> import torch, adjointlab as al
    >>> c = torch.nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
    >>> A = al.linear_operator(c, (1, 1, 8))
    >>> x = torch.ones(1, 1, 8)
    >>> torch.allclose(circulant(A, damp=1.0)(A.gram(x) + x), x)
    True
    """
    equations = Equations(A, weight, damp)
    scales = None if scale is None else [c.detach() for c in equations.space.leaves(scale, "scale")]
    return _circulant(equations, scales, dims, positive("samples", samples), seeded(generator))


def _circulant(
    equations: Equations, scales: list[Tensor] | None, dims: int | None, samples: int, generator: torch.Generator
) -> LinearOperator:
    return _Seen.of(equations, scales, dims, samples, generator).operator()


@dataclass(frozen=True)
class _Seen:
    """The diagonal of ``FNFᴴ``, ``N = C(AᴴWA + damp²)C``, and the lengths of its rows, as random vectors show them."""

    equations: Equations
    scales: list[Tensor] | None
    dims: list[int]
    entries: list[Tensor]
    lengths: list[Tensor]

    @staticmethod
    def of(
        equations: Equations, scales: list[Tensor] | None, dims: int | None, samples: int, generator: torch.Generator
    ) -> _Seen:
        """Return that of vectors of random phases."""
        space = equations.space
        if space.is_sharded:
            raise SpaceMismatchError(f"expected a domain of whole tensors, got {space}: use al.precondition.diagonal")
        each = [_transformed(spec, space.batch_dims, dims) for spec in space.specs]
        diagonal, squares = [torch.zeros(()) for _ in each], [torch.zeros(()) for _ in each]
        for _ in range(samples):
            leaves = space.leaves(space.randn(generator))
            phases = [_phases(_spectrum(leaf, n)) for leaf, n in zip(leaves, each, strict=True)]
            white = [_image(p, leaf, n) for p, leaf, n in zip(phases, leaves, each, strict=True)]
            given = white if scales is None else [c * z for c, z in zip(scales, white, strict=True)]
            image = equations(tuple(given))
            image = image if scales is None else tuple(c.conj() * q for c, q in zip(scales, image, strict=True))
            rows = [_spectrum(q, n) for q, n in zip(image, each, strict=True)]
            diagonal = [
                a + (p.conj() * r).real.double() / samples for a, p, r in zip(diagonal, phases, rows, strict=True)
            ]
            squares = [a + r.abs().double().square() / samples for a, r in zip(squares, rows, strict=True)]
        return _Seen(equations, scales, each, diagonal, [square.sqrt() for square in squares])

    @property
    def cosine(self) -> float:
        """The cosine of the angle between N and the identity, ``tr N / (√n ‖N‖)``."""
        lengths = torch.cat([a.flatten() for a in self.lengths])
        size = float(torch.linalg.vector_norm(lengths)) * math.sqrt(len(lengths))
        return float(sum(a.sum() for a in self.entries)) / size if size > 0 else 1.0

    @property
    def filtered_cosine(self) -> float:
        """That between the identity and N divided by the lengths of its rows, which makes them one."""
        ratios = [a / b.clamp_min(torch.finfo(b.dtype).tiny) for a, b in zip(self.entries, self.lengths, strict=True)]
        return float(torch.cat([r.flatten() for r in ratios]).mean())

    def operator(self) -> LinearOperator:
        """Return the division by the lengths."""
        specs = self.equations.space.specs
        inverses = [_inverse(lengths, spec) for lengths, spec in zip(self.lengths, specs, strict=True)]
        return self.equations.preconditioner(_Filter(self.dims, self.scales, inverses))


def _inverse(lengths: Tensor, spec: TensorSpec) -> Tensor:
    """Return one over lengths, bounded by rounding."""
    largest = float(lengths.amax())
    least = torch.finfo(spec.dtype).eps * largest if largest > 0 else 1.0
    dtype = spec.dtype.to_real() if spec.is_complex else spec.dtype
    return (1 / lengths.clamp_min(least)).to(torch.float32 if torch.finfo(dtype).bits < 32 else dtype)


def _transformed(spec: TensorSpec, batch_dims: int, dims: int | None) -> int:
    most = len(spec.shape) - batch_dims
    if dims is None:
        return max(1, len(spec.shape) - max(2, batch_dims)) if len(spec.shape) > 2 else most
    if not 1 <= dims <= max(most, 1):
        raise ValueError(f"expected dims between 1 and {most}, the dimensions of a leaf that are no batch, got {dims}")
    return min(dims, most)


def _phases(spectrum: Tensor) -> Tensor:
    return torch.polar(torch.ones_like(spectrum.real), spectrum.angle())


def auto(
    A: Operator[X, Any],
    *,
    weight: Any = None,
    damp: float | Tensor = 0.0,
    dims: int | None = None,
    samples: int = _SAMPLES,
    generator: torch.Generator | None = None,
) -> LinearOperator[X, X]:
    r"""Return :func:`circulant` between the scalings ``cⱼ = 1 / √dⱼ`` of :func:`diagonal`, or less where that will do.

    The norms of the columns take care of what differs from place to place, and the spectrum of what all places have in
    common. Norms that are probed with an error of more than 5 % are left out, for their noise would hide small values
    of the spectrum; so is the spectrum on domains that are distributed.

    Equations N close to the identity stay as they are, and those close to it after scaling are not filtered: where the
    angle to the identity, of the cosine ``tr N / (√n ‖N‖)``, is less than 45°, and the filter does not make the cosine
    larger by more than 5 %. The products that find the spectrum tell both.

    Parameters
    ----------
    A, weight, damp, dims, samples, generator
        As for :func:`circulant`; a quarter as many products again tell whether it is needed, and norms
        that are probed take 49 for each leaf.

    Returns
    -------
    LinearOperator
        On the domain of A.

    Raises
    ------
    SpaceMismatchError, ValueError
        As :func:`circulant` does.

    Examples
    --------
    >>> import torch, adjointlab as al
    >>> c = torch.nn.Conv1d(1, 1, 3, padding=1, bias=False).requires_grad_(False)
    >>> sensitivity = torch.logspace(0, -3, 64)
    >>> A = al.linear_operator(lambda x: c(sensitivity * x), (1, 1, 64))
    >>> y = A(torch.ones(1, 1, 64))
    >>> steps = al.solvers.cgls(A, y, damp=1e-3, precondition=auto(A, damp=1e-3)).iterations
    >>> steps < al.solvers.cgls(A, y, damp=1e-3).iterations
    True
    """
    return of_equations(Equations(A, weight, damp), dims, positive("samples", samples), generator)


def of_equations(
    equations: Equations, dims: int | None = None, samples: int = _SAMPLES, generator: torch.Generator | None = None
) -> LinearOperator[Any, Any]:
    """Return the preconditioner of some equations, between scalings."""
    space, generator = equations.space, seeded(generator)
    found, error = equations.diagonal(_PROBES, generator)
    pairs = list(zip(found, space.specs, strict=True))
    if space.is_sharded:
        return equations.divided(found)
    identity = partial(blocks.identity, equations.domain)
    if error > _SURE:
        seen = _Seen.of(equations, None, dims, samples, generator)
        return _simplest([(seen.cosine, identity)], seen)
    few = _Seen.of(equations, None, dims, max(1, samples // 4), generator)
    seen = _Seen.of(equations, [_half(d, spec) for d, spec in pairs], dims, samples, generator)
    return _simplest([(few.cosine, identity), (seen.cosine, partial(equations.divided, found))], seen)


def _simplest(simple: list[tuple[float, Callable[[], LinearOperator]]], seen: _Seen) -> LinearOperator:
    """Return the first of simple ones that is as good as the filter, else the filter."""
    # Below 45°, most of the spectrum is as large as its largest value. Above, the cosine tells of a few values only.
    least = max(math.sqrt(0.5), (1 - _SURE) * seen.filtered_cosine)
    return next((make for cosine, make in simple if cosine >= least), seen.operator)()


def _half(d: Tensor, spec: TensorSpec) -> Tensor:
    return d.rsqrt().to(spec.dtype.to_real() if spec.is_complex else spec.dtype)
