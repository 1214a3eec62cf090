"""Matrices, norms and traces of operators: ``‖A‖₂ = max ‖Ax‖ / ‖x‖``, ``κ(A) = σ_max / σ_min``, ``tr A``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from adjointlab.affine import AffineOperator
from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.space import Space
from adjointlab.space.algebra import scaled
from adjointlab.space.coordinates import (
    common_dtype,
    complex_entries,
    real_element,
    real_size,
    real_vector,
    split_complex,
)

_CHUNK = 1 << 22  # most entries of basis vectors and images in memory at a time


# -- matrices ----------------------------------------------------------------------------------------------------------


def to_dense(A: LinearOperator, *, real: bool | None = None) -> Tensor:
    """Return the matrix of A: ``to_dense(A) @ vector(x) = vector(A(x))``.

    Many columns at a time by ``vmap``, in chunks of bounded memory; one by one if A does not support it.

    Parameters
    ----------
    A : LinearOperator
        The operator. Its matrix has ``A.codomain.size * A.domain.size`` entries.
    real : bool, optional
        Whether to use the real coordinates ``[Re x; Im x]`` (without imaginary parts of real leaves); by default only
        for a map that is only real-linear on a complex domain, which has no other matrix.

    Returns
    -------
    Tensor
        The ``(m, n)`` matrix, in the coordinates of ``Space.vector``. That of the adjoint is the transpose in real
        coordinates, and else, for a complex-linear A, the conjugate transpose.

    Raises
    ------
    SpaceMismatchError
        If A is not a LinearOperator, or ``real=False`` is given but A has no complex matrix.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import linear_operator
    >>> to_dense(linear_operator(lambda x: x[1:] - x[:-1], (3,)))
    tensor([[-1.,  1.,  0.],
            [ 0., -1.,  1.]])

    A map from a real to a complex space and its adjoint, which is only real-linear, have different kinds of matrices
    by default; to compare them, set ``real=True`` for both:

    >>> F = linear_operator(torch.fft.rfft, (16,))
    >>> to_dense(F).shape, to_dense(F.H).shape
    (torch.Size([9, 16]), torch.Size([16, 18]))
    >>> torch.equal(to_dense(F, real=True).T, to_dense(F.H))
    True
    """
    _require_operator(A)
    only_real = A.domain.is_complex and not A.is_complex_linear
    if real is False and only_real:
        raise SpaceMismatchError(
            "expected a complex-linear operator for a complex matrix, got one that is only real-linear: use real=True"
        )
    real = only_real if real is None else real
    with torch.no_grad():
        return columns(A, coordinates=real)


def _require_operator(A: Any) -> None:
    if not isinstance(A, LinearOperator):
        remedy = "pass its .linear" if isinstance(A, AffineOperator) else "wrap it with al.linear_operator"
        raise SpaceMismatchError(f"expected a LinearOperator, got {type(A).__name__}: {remedy}")


def columns(A: LinearOperator, *, coordinates: bool, most: int = _CHUNK) -> Tensor:
    """Return the matrix of A, in real ``coordinates`` or not, from chunks of at most so many entries."""
    domain, codomain = A.domain, A.codomain
    device, dtype = domain.specs[0].device, common_dtype(domain)
    real_part = torch.arange(domain.size, device=device)
    positions = torch.cat([real_part, real_part[complex_entries(domain)]]) if coordinates else real_part

    def image(vector: Tensor) -> Tensor:
        y = codomain.vector(A(domain.element(vector)))
        return split_complex(codomain, y) if coordinates else y

    chunk = max(1, most // (domain.size + codomain.size))
    vectorized = len(positions) > 1
    dense = torch.empty(0, device=device)
    for start in range(0, len(positions), chunk):
        where = positions[start : start + chunk]
        basis = torch.zeros(len(where), domain.size, dtype=dtype, device=device)
        basis[torch.arange(len(where), device=device), where] = 1
        if start + len(where) > domain.size:  # these columns belong to imaginary parts
            basis[max(0, domain.size - start) :] *= 1j
        found = _vectorized(image, basis) if vectorized else None
        vectorized = found is not None
        block = torch.stack([image(row) for row in basis]) if found is None else found
        if start == 0:
            dense = block.new_empty(block.shape[1], len(positions))
        dense[:, start : start + len(where)] = block.T
    return dense


def _vectorized(image: Callable[[Tensor], Tensor], basis: Tensor) -> Tensor | None:
    """Return the images of all rows by vmap, or None if vmap fails or is wrong for the last row."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vmap warns about ops that it runs one by one
            found = torch.func.vmap(image, chunk_size=None)(basis)
    except Exception:  # a third-party forward may raise anything under vmap, and still work row by row
        return None
    expected = image(basis[-1])
    eps = torch.finfo(expected.dtype).eps
    scale = torch.linalg.vector_norm(found, dim=1).max()
    close = torch.linalg.vector_norm(found[-1] - expected) <= 64 * eps * scale
    return found if bool(close) else None


# -- norms -------------------------------------------------------------------------------------------------------------


def operator_norm(
    A: LinearOperator, *, maxiter: int = 200, tol: float = 1e-4, generator: torch.Generator | None = None
) -> Tensor:
    r"""Return ``‖A‖₂ = √λ_max(AᴴA)``, estimated from below by the Lanczos process.

    The estimate σ belongs to a unit vector v with ``σ² = ⟨v, AᴴAv⟩ ≤ ‖A‖²``. The iteration stops once
    ``‖AᴴAv − σ²v‖ ≤ 2 tol σ²``; then A has a singular value within ``tol · σ`` of σ: with a random start, the largest
    one with probability one.

    Parameters
    ----------
    A : LinearOperator
        The operator.
    maxiter : int
        Largest number of applications of AᴴA. If it is reached first, the current σ is returned, a lower bound.
    tol : float
        Relative error bound.
    generator : torch.Generator, optional
        CPU generator of the random start; a generator with seed 0 if not given.

    Returns
    -------
    Tensor
        Zero-dimensional, ``float64``; NaN if A returns NaN.

    Raises
    ------
    SpaceMismatchError
        If A is not a LinearOperator.
    ValueError
        If ``maxiter`` is not positive, or ``tol`` is negative.

    Notes
    -----
    After 48 orthogonal directions, the process restarts from the best 16: it needs memory for at most about 70
    elements of the domain. Clustered singular values do not slow it down, as they do power iteration.

    References
    ----------
    J. Kuczyński and H. Woźniakowski, *Estimating the largest eigenvalue by the power and Lanczos algorithms with a
    random start*, SIAM J. Matrix Anal. Appl. 13 (1992) 1094–1122. K. Wu and H. Simon, *Thick-restart Lanczos method*,
    SIAM J. Matrix Anal. Appl. 22 (2000) 602–616.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import diagonal
    >>> round(float(operator_norm(diagonal(torch.tensor([1.0, -3.0])))), 3)
    3.0
    """
    _require_operator(A)
    if not (maxiter >= 1 and tol >= 0):
        raise ValueError(f"expected maxiter of 1 or more and tol of 0 or more, got {maxiter} and {tol}")
    domain, codomain = A.domain, A.codomain
    with torch.no_grad(), A.domain.without_autocast():
        start = domain.randn(generator or torch.Generator().manual_seed(0))
        scale = codomain.norm(A(start)) / domain.norm(start)
        if scale == 0 or not torch.isfinite(scale):
            return scale
        factor = float(1 / scale)  # scales A, so that the entries of AᴴA neither underflow nor overflow

        def gram(x: Tensor) -> Tensor:
            return factor * real_vector(domain, A.H(scaled(factor, A(real_element(domain, x)))))

        return scale * _lanczos(gram, real_vector(domain, start), maxiter, tol, domain)


_MOST_DIRECTIONS, _KEPT_DIRECTIONS = 48, 16


def _lanczos(gram: Callable[[Tensor], Tensor], start: Tensor, maxiter: int, tol: float, space: Space) -> Tensor:
    """Return ``√λ_max`` of a self-adjoint positive map of real vectors by thick-restart Lanczos."""
    process_sum, dimension = _process_sum(space), real_size(space)
    # VᵀGV is computed from the products GV, so that a restart needs no recurrence coefficients.
    most = min(_MOST_DIRECTIONS, dimension)
    basis = start.new_zeros(most, start.numel())
    projected = torch.zeros(most, most, dtype=torch.float64, device="cpu")
    direction, k = start / process_sum(torch.linalg.vector_norm(start), 2), 0
    best = torch.zeros((), dtype=torch.float64, device=start.device)
    for _ in range(maxiter):
        basis[k] = direction
        product = gram(direction)
        row = process_sum(basis[: k + 1] @ product).double().cpu()
        if not bool(torch.isfinite(row).all()):
            return torch.full_like(best, torch.nan)
        projected[k, : k + 1] = projected[: k + 1, k] = row
        k += 1
        values, vectors = torch.linalg.eigh(projected[:k, :k])
        best = torch.fmax(best, values[-1].clamp(min=0).sqrt().to(best.device))
        rest = product - row.to(product).matmul(basis[:k])
        rest = rest - process_sum(basis[:k] @ rest) @ basis[:k]  # orthogonalised again, against rounding
        length = process_sum(torch.linalg.vector_norm(rest), 2)
        # G V = V projected + rest eₖᵀ holds after a restart, too: the kept vectors and rest span a Krylov space.
        gap = float(length.double().cpu() * vectors[-1, -1].abs())
        exhausted = float(length) <= torch.finfo(start.dtype).eps * float(values[-1].abs())
        if gap <= 2 * tol * float(values[-1]) or exhausted or k == dimension:
            return best
        direction = rest / length
        if k == most:
            kept = min(_KEPT_DIRECTIONS, most // 2)
            basis[:kept] = vectors[:, -kept:].T.to(basis) @ basis[:k]
            projected.zero_()
            projected[range(kept), range(kept)] = values[-kept:]
            k = kept
    return best


def _process_sum(space: Space) -> Callable[..., Tensor]:
    """Return a function that sums inner products (power 1) or combines norms (power 2) over all processes."""
    sharding = space.specs[0].sharding
    if sharding is None:
        return lambda part, power=1: part
    return lambda part, power=1: sharding.total(part[None] ** power, (1.0,)) ** (1 / power)


def condition_number(A: LinearOperator) -> Tensor:
    """Return ``κ(A) = σ_max / σ_min`` from the matrix of a small operator; infinite if A has a nontrivial kernel."""
    # G. H. Golub and C. F. Van Loan, Matrix Computations, 4th ed., Johns Hopkins University Press 2013, section 2.6.
    _require_operator(A)
    dense = to_dense(A, real=None if A.is_complex_linear else True)
    if not bool(torch.isfinite(dense).all()):
        return torch.full((), torch.nan, dtype=torch.float64, device=dense.device)
    values = torch.linalg.svdvals(dense.to(torch.promote_types(dense.dtype, torch.float64)))
    if dense.shape[0] < dense.shape[1] or values[-1] == 0:
        return torch.full_like(values[0], torch.inf)
    ratio: Tensor = values[0] / values[-1]
    return ratio


# -- estimates ---------------------------------------------------------------------------------------------------------


def estimate_trace(A: LinearOperator, *, samples: int = 64, generator: torch.Generator | None = None) -> Tensor:
    """Return an unbiased estimate of ``tr A``: the mean of ``⟨z, Az⟩`` over vectors z of random signs."""
    # M. F. Hutchinson, A stochastic estimator of the trace of the influence matrix, Commun. Stat. Simul. Comput. 19
    # (1990) 433–450.
    with torch.no_grad():
        return torch.stack([A.domain.inner(z, image) for z, image in _probes(A, samples, generator)]).mean()


def estimate_diagonal(A: LinearOperator, *, samples: int = 64, generator: torch.Generator | None = None) -> Any:
    """Return an unbiased estimate of the diagonal of A: the mean of ``z ⊙ Az`` over vectors z of random signs."""
    # C. Bekas, E. Kokiopoulou and Y. Saad, An estimator for the diagonal of a matrix, Appl. Numer. Math. 57 (2007)
    # 1214–1229.
    _require_operator(A)
    leaves = A.domain.leaves
    total = leaves(A.domain.zeros())
    with torch.no_grad():
        for z, image in _probes(A, samples, generator):
            for sum_, sign, entry in zip(total, leaves(z), leaves(image), strict=True):
                sum_.addcmul_(sign, entry, value=1 / samples)
    return A.domain.unflatten(total)


def _probes(A: LinearOperator, samples: int, generator: torch.Generator | None) -> Iterator[tuple[Any, Any]]:
    """Yield vectors z of random signs, each with Az."""
    _require_operator(A)
    if samples < 1:
        raise ValueError(f"expected samples of 1 or more, got {samples}")
    if A.domain != A.codomain:
        raise SpaceMismatchError(
            f"expected an operator from a space to itself, got one from {A.domain} to {A.codomain}: a diagonal needs "
            "that; use A.gram, say"
        )
    generator = generator or torch.Generator().manual_seed(0)
    for _ in range(samples):
        pairs = zip(A.domain.specs, A.domain.sources(generator), strict=True)
        draws = [torch.randint(0, 2, s.shape, generator=source, device="cpu").mul(2).sub(1) for s, source in pairs]
        z = A.domain.unflatten([d.to(s.device, s.dtype) for d, s in zip(draws, A.domain.specs, strict=True)])
        yield z, A(z)
