"""The largest eigenvalues as a preconditioner, by the randomised Nyström approximation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from adjointlab.affine import Operator
from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.precondition.columns import Leaves
from adjointlab.precondition.equations import Equations, seeded
from adjointlab.space.coordinates import common_dtype
from adjointlab.typed import X


class _LowRank(nn.Module):
    """``s ↦ U (diag(e) − l) Uᴴs + l s``, in coordinates of the space: real ones if U is real."""

    basis: Tensor
    factors: Tensor

    def __init__(self, basis: Tensor, factors: Tensor, rest: float) -> None:
        super().__init__()
        self.rest = rest
        self.register_buffer("basis", basis)
        self.register_buffer("factors", factors - rest)

    def forward(self, leaves: Leaves) -> list[Tensor]:
        s = _coordinates(leaves, self.basis)
        found = self.basis @ (self.factors * (self.basis.mH @ s)) + self.rest * s
        return _leaves(found, leaves)


def _coordinates(leaves: Leaves, like: Tensor) -> Tensor:
    """Return leaves as one vector, complex or real as ``like`` is."""
    parts = [t if like.is_complex() or not t.is_complex() else torch.view_as_real(t.resolve_conj()) for t in leaves]
    return torch.cat([part.reshape(-1).to(like.dtype) for part in parts])


def _leaves(vector: Tensor, like: Leaves) -> list[Tensor]:
    found, first = [], 0
    for leaf in like:
        shape = leaf.shape if vector.is_complex() or not leaf.is_complex() else (*leaf.shape, 2)
        part = vector[first : first + math.prod(shape)].reshape(shape)
        first += part.numel()
        is_pairs = leaf.is_complex() and not part.is_complex()
        found.append((torch.view_as_complex(part.contiguous()) if is_pairs else part).to(leaf.dtype))
    return found


def nystrom(
    A: Operator[X, Any],
    rank: int,
    *,
    weight: Any = None,
    damp: float | Tensor = 0.0,
    generator: torch.Generator | None = None,
) -> LinearOperator[X, X]:
    r"""Return ``U diag(λ + damp²)⁻¹ Uᴴ + (λₗ + damp²)⁻¹ (1 − UUᴴ)`` from ``AᴴWA ≈ U diag(λ) Uᴴ``.

    The randomised Nyström approximation of a given rank knows the largest eigenvalues; λₗ is the smallest of those. It
    serves where ``AᴴWA`` has few eigenvalues that are larger than ``damp²``.

    Parameters
    ----------
    A, weight
        As for :func:`diagonal`.
    rank : int
        Number of eigenvalues, of products with ``AᴴWA`` that find them, and of vectors that are kept.
    damp : float or Tensor
        ``damp²`` is the weight of the penalty ``‖x‖²``: one number.
    generator : torch.Generator, optional
        CPU generator of the random vectors.

    Returns
    -------
    LinearOperator
        On the domain of A. It keeps ``rank`` elements of it, and making it takes memory for three times as many.

    Raises
    ------
    SpaceMismatchError
        If A is not an operator on whole tensors of fixed size, or the weight does not match its codomain.
    ValueError
        If ``rank`` is not positive or more than the domain has dimensions, or ``damp`` is more than one number.

    Notes
    -----
    If A is only real-linear, or real and complex leaves are mixed, all of this is about real coordinates.

    References
    ----------
    Z. Frangella, J. A. Tropp and M. Udell, *Randomized Nyström preconditioning*, SIAM J. Matrix Anal. Appl. 44 (2023)
    718–752.

    Examples
    --------
    >>> import torch, adjointlab as al
    >>> A = al.diagonal(torch.logspace(2, -2, 60))
    >>> options = {"damp": 1.0, "tol": 1e-5}
    >>> plain = al.solvers.cgls(A, torch.ones(60), **options)
    >>> M = nystrom(A, 30, damp=1.0)
    >>> al.solvers.cgls(A, torch.ones(60), precondition=M, **options).iterations < plain.iterations / 2
    True
    """
    equations = Equations(A, weight, 0.0)
    space, damping = equations.space, torch.as_tensor(damp, dtype=torch.float64)
    if damping.ndim:
        raise ValueError(f"expected damp to be one number for nystrom, got the shape {tuple(damping.shape)}")
    if space.is_sharded or space.batch_dims:
        raise SpaceMismatchError(f"expected a domain of whole tensors and no batch_dims, got {space}: use diagonal")
    is_complex = all(spec.is_complex for spec in space.specs) and equations.A.is_complex_linear
    wide = torch.promote_types(common_dtype(space), torch.float32)
    like = torch.zeros((), dtype=wide if is_complex else wide.to_real(), device=space.specs[0].device)
    zeros = space.leaves(space.zeros())
    size = len(_coordinates(zeros, like))
    if not isinstance(rank, int) or not 1 <= rank <= size:
        raise ValueError(f"expected rank to be an integer between 1 and {size}, the size of the domain, got {rank!r}")
    source = seeded(generator)
    draws = torch.randn(size, rank, dtype=like.dtype, generator=source, device="cpu").to(like.device)
    draws = torch.linalg.qr(draws).Q
    sketch = torch.stack([_coordinates(equations(tuple(_leaves(v, zeros))), like) for v in draws.mT], 1)
    basis, values = _eigenvectors(draws, sketch)
    square = float(damping) ** 2
    largest = float(values[0]) + square
    least = max(float(values[-1]) + square, torch.finfo(like.dtype).eps * largest) if largest > 0 else 1.0
    factors = 1 / (values + square).clamp_min(least)
    return equations.preconditioner(_LowRank(basis, factors, 1 / least))


def _eigenvectors(draws: Tensor, sketch: Tensor) -> tuple[Tensor, Tensor]:
    """Return U and λ with ``Y (Ωᴴ Y)⁻¹ Yᴴ ≈ U diag(λ) Uᴴ`` for the sketch ``Y = NΩ``, stably: algorithm 2.1."""
    shift = math.sqrt(len(draws)) * torch.finfo(sketch.dtype).eps * torch.linalg.matrix_norm(sketch)
    shifted = sketch + shift * draws
    middle = draws.mH @ shifted
    middle = (middle + middle.mH) / 2
    if not shift > 0:  # N = 0, or NaN
        return draws, torch.zeros(draws.shape[1], dtype=sketch.real.dtype, device=sketch.device)
    root, info = torch.linalg.cholesky_ex(middle)
    if int(info):  # more noise than the shift covers
        values, vectors = torch.linalg.eigh(middle)
        scaled = shifted @ (vectors / values.clamp_min(shift).sqrt())
    else:
        scaled = torch.linalg.solve_triangular(root, shifted.mH, upper=False).mH
    basis, singular, _ = torch.linalg.svd(scaled, full_matrices=False)
    return basis, (singular.square() - shift).clamp_min(0)
