"""Matrices, norms and traces of operators: ``‖A‖₂ = max ‖Ax‖ / ‖x‖``, ``κ(A) = σ_max / σ_min``, ``tr A``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.space import Space

_CHUNK = 1 << 22  # entries of basis vectors and images that are held at a time


# -- matrices ----------------------------------------------------------------------------------------------------------


def to_dense(A: LinearOperator, *, real: bool | None = None) -> Tensor:
    """Return the matrix of A: ``to_dense(A) @ vector(x) = vector(A(x))``.

    Columns are made many at a time (by ``vmap``), in chunks of bounded memory; one after the other where A does not
    allow that.

    Parameters
    ----------
    A : LinearOperator
        The operator; its matrix has ``A.codomain.size * A.domain.size`` entries.
    real : bool, optional
        Whether to use real coordinates on both sides, ``[Re x; Im x]`` (real leaves have no imaginary part). A map that
        is only real-linear on a complex domain has no other matrix, so that this is then the default.

    Returns
    -------
    Tensor
        ``(m, n)``, in the order of ``Space.vector``; complex if A maps to or from a complex space and ``real`` is not
        set. The adjoint has the conjugate transpose; in real coordinates, always the transpose.

    Raises
    ------
    SpaceMismatchError
        If ``real=False`` is asked for where no such matrix exists.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import linear_operator
    >>> to_dense(linear_operator(lambda x: x[1:] - x[:-1], (3,)))
    tensor([[-1.,  1.,  0.],
            [ 0., -1.,  1.]])
    """
    only_real = A.domain.is_complex and not A.is_complex_linear
    if real is False and only_real:
        raise SpaceMismatchError(
            "expected a complex-linear operator for a complex matrix, got one that is only real-linear: use real=True"
        )
    real = only_real if real is None else real
    with torch.no_grad():
        return _columns(A, coordinates=real)


def _columns(A: LinearOperator, *, coordinates: bool) -> Tensor:
    domain, codomain = A.domain, A.codomain
    device = domain.specs[0].device
    dtype = domain.specs[0].dtype
    for other in domain.specs[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    real_part = torch.arange(domain.size, device=device)
    imaginary = real_part[_complex_entries(domain)] if coordinates else real_part[:0]
    positions = torch.cat([real_part, imaginary])
    mask = _complex_entries(codomain)

    def image(vector: Tensor) -> Tensor:
        y = codomain.vector(A(domain.element(vector)))
        return torch.cat([y.real, y.imag[mask]]) if coordinates and y.is_complex() else y

    chunk = max(1, _CHUNK // (domain.size + codomain.size))
    together = len(positions) > 1
    blocks: list[Tensor] = []
    for start in range(0, len(positions), chunk):
        where = positions[start : start + chunk]
        basis = torch.zeros(len(where), domain.size, dtype=dtype, device=device)
        basis[torch.arange(len(where), device=device), where] = 1
        if start + len(where) > domain.size:  # these columns belong to imaginary parts
            basis[max(0, domain.size - start) :] *= 1j
        found = _together(image, basis) if together else None
        together = found is not None
        blocks.append(torch.stack([image(row) for row in basis]) if found is None else found)
    return torch.cat(blocks).T.contiguous()


def _together(image: Callable[[Tensor], Tensor], basis: Tensor) -> Tensor | None:
    """Return the images of all rows at once, or None where vmap cannot, or is wrong for the last row."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ops that vmap runs one by one
            found = torch.func.vmap(image, chunk_size=None)(basis)
    except Exception:  # whatever a third-party forward raises under vmap, one by one it may well work
        return None
    expected = image(basis[-1])
    eps = torch.finfo(expected.dtype).eps
    scale = torch.linalg.vector_norm(found, dim=1).max()
    close = torch.linalg.vector_norm(found[-1] - expected) <= 64 * eps * scale
    return found if bool(close) else None


def _complex_entries(space: Space) -> Tensor:
    device = space.specs[0].device
    return torch.cat([torch.full((spec.numel,), spec.is_complex, device=device) for spec in space.specs])


# -- norms -------------------------------------------------------------------------------------------------------------


def operator_norm(
    A: LinearOperator, *, maxiter: int = 200, tol: float = 1e-4, generator: torch.Generator | None = None
) -> Tensor:
    r"""Return ``‖A‖₂ = √λ_max(AᴴA)`` by the Lanczos process, a lower bound that grows towards it.

    The estimate σ comes with a unit vector v, ``σ² = ⟨v, AᴴAv⟩ ≤ ‖A‖²``, and it stops once
    ``‖AᴴAv − σ²v‖ ≤ 2 tol σ²``: then A has a singular value within ``tol · σ`` of σ. From a random start that is the
    largest one: the start has no part along it with probability zero, and a small part delays, but does not prevent it.

    Parameters
    ----------
    A : LinearOperator
        The operator.
    maxiter : int
        Most applications of AᴴA.
    tol : float
        Relative error bound.
    generator : torch.Generator, optional
        Of the random start; seeded with 0 if not given.

    Returns
    -------
    Tensor
        Zero-dimensional, ``float64``.

    Notes
    -----
    All directions are kept orthogonal to each other; after 48 of them the process starts again from the best ones, so
    that memory for 48 elements of the domain is the most it takes. Other than power iteration, whose speed is the ratio
    of the two largest singular values, it does not mind clusters.

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
    with torch.no_grad():
        start = _flat(A.domain, A.domain.randn(generator or torch.Generator().manual_seed(0)))
        return _lanczos(lambda x: _flat(A.domain, A.H(A(_element(A.domain, x)))), start, maxiter, tol)


_BASIS, _KEPT = 48, 16


def _lanczos(gram: Callable[[Tensor], Tensor], start: Tensor, maxiter: int, tol: float) -> Tensor:
    """Return ``√λ_max`` of a self-adjoint positive map of real vectors by thick-restart Lanczos."""
    # VᵀGV is made from the products themselves, so that a restart needs no bookkeeping.
    most = min(_BASIS, start.numel())
    basis = start.new_zeros(most, start.numel())
    projected = torch.zeros(most, most, dtype=torch.float64)
    direction, k = start / torch.linalg.vector_norm(start), 0
    best = torch.zeros((), dtype=torch.float64, device=start.device)
    for _ in range(maxiter):
        basis[k] = direction
        product = gram(direction)
        row = (basis[: k + 1] @ product).double().cpu()
        projected[k, : k + 1] = projected[: k + 1, k] = row
        k += 1
        values, vectors = torch.linalg.eigh(projected[:k, :k])
        best = torch.fmax(best, values[-1].clamp(min=0).sqrt().to(best.device))
        rest = product - row.to(product).matmul(basis[:k])
        rest = rest - (basis[:k] @ rest) @ basis[:k]  # once more, against rounding
        length = torch.linalg.vector_norm(rest)
        # G V = V projected + rest eₖᵀ, also after a restart, since the kept vectors span a Krylov space with rest.
        gap = float(length.double().cpu() * vectors[-1, -1].abs())
        exhausted = float(length) <= torch.finfo(start.dtype).eps * float(values[-1].abs())
        if gap <= 2 * tol * float(values[-1]) or exhausted or k == start.numel():
            return best
        direction = rest / length
        if k == most:
            kept = min(_KEPT, most // 2)
            basis[:kept] = vectors[:, -kept:].T.to(basis) @ basis[:k]
            projected.zero_()
            projected[range(kept), range(kept)] = values[-kept:]
            k = kept
    return best


def _flat(space: Space, element: Any) -> Tensor:
    """Return an element as one real vector whose dot product is ``Re⟨·, ·⟩``."""
    leaves = space.leaves(element)
    parts = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in leaves]
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    if torch.finfo(dtype).bits < 32:
        dtype = torch.float32
    return torch.cat([part.reshape(-1).to(dtype) for part in parts])


def _element(space: Space, vector: Tensor) -> Any:
    sizes = [spec.numel * (2 if spec.is_complex else 1) for spec in space.specs]
    leaves = [
        torch.view_as_complex(part.reshape(*spec.shape, 2)).to(spec.dtype)
        if spec.is_complex
        else part.reshape(spec.shape).to(spec.dtype)
        for part, spec in zip(vector.split(sizes), space.specs, strict=True)
    ]
    return space.unflatten(leaves)


def condition_number(A: LinearOperator) -> Tensor:
    """Return ``κ(A) = σ_max / σ_min`` from the matrix of a small operator; infinite if A has a kernel.

    Parameters
    ----------
    A : LinearOperator
        An operator whose matrix fits into memory.

    Returns
    -------
    Tensor
        Zero-dimensional, ``float64``.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import diagonal
    >>> condition_number(diagonal(torch.tensor([1.0, -4.0])))
    tensor(4., dtype=torch.float64)
    """
    dense = to_dense(A, real=None if A.is_complex_linear else True)
    values = torch.linalg.svdvals(dense.to(torch.promote_types(dense.dtype, torch.float64)))
    if dense.shape[0] < dense.shape[1]:
        return torch.full((), torch.inf, dtype=torch.float64, device=dense.device)
    ratio: Tensor = values[0] / values[-1]
    return ratio


# -- estimates ---------------------------------------------------------------------------------------------------------


def estimate_trace(A: LinearOperator, *, samples: int = 64, generator: torch.Generator | None = None) -> Tensor:
    """Return an unbiased estimate of ``tr A``: the mean of ``⟨z, Az⟩`` over random signs z (Hutchinson).

    Parameters
    ----------
    A : LinearOperator
        From a space to itself.
    samples : int
        Number of z; the error falls with its root.
    generator : torch.Generator, optional
        Of the signs, on the CPU; seeded with 0 if not given.

    Returns
    -------
    Tensor
        Zero-dimensional, ``float64`` or ``complex128``.

    Raises
    ------
    SpaceMismatchError
        If A does not map a space to itself.

    References
    ----------
    M. F. Hutchinson, *A stochastic estimator of the trace of the influence matrix*, Commun. Stat. Simul. Comput. 19
    (1990) 433–450.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import diagonal
    >>> estimate_trace(diagonal(torch.tensor([1.0, 4.0])))  # exact for a diagonal
    tensor(5., dtype=torch.float64)
    """
    generator = generator or torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = [_signs(A, generator) for _ in range(samples)]
        return torch.stack([A.domain.inner(z, A(z)) for z in draws]).mean()


def estimate_diagonal(A: LinearOperator, *, samples: int = 64, generator: torch.Generator | None = None) -> Any:
    """Return an unbiased estimate of the diagonal of A: the mean of ``z ⊙ Az`` over random signs z.

    Parameters
    ----------
    A : LinearOperator
        From a space to itself.
    samples : int
        Number of z; the error falls with its root.
    generator : torch.Generator, optional
        Of the signs, on the CPU; seeded with 0 if not given.

    Returns
    -------
    pytree of tensors
        An element of the domain.

    Raises
    ------
    SpaceMismatchError
        If A does not map a space to itself.

    References
    ----------
    C. Bekas, E. Kokiopoulou and Y. Saad, *An estimator for the diagonal of a matrix*, Appl. Numer. Math. 57 (2007)
    1214–1229.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import diagonal
    >>> estimate_diagonal(diagonal(torch.tensor([1.0, 4.0])))
    tensor([1., 4.])
    """
    generator = generator or torch.Generator().manual_seed(0)
    total = [torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device) for spec in A.domain.specs]
    with torch.no_grad():
        for _ in range(samples):
            z = _signs(A, generator)
            for sum_, sign, image in zip(total, A.domain.leaves(z), A.domain.leaves(A(z)), strict=True):
                sum_.addcmul_(sign, image, value=1 / samples)
    return A.domain.unflatten(total)


def _signs(A: LinearOperator, generator: torch.Generator) -> Any:
    if A.domain != A.codomain:
        raise SpaceMismatchError(
            f"expected an operator from a space to itself, got one from {A.domain} to {A.codomain}: a diagonal needs "
            "that; use A.gram, say"
        )
    draws = [torch.randint(0, 2, s.shape, generator=generator).mul(2).sub(1) for s in A.domain.specs]
    return A.domain.unflatten([d.to(s.device, s.dtype) for d, s in zip(draws, A.domain.specs, strict=True)])


__all__ = ["condition_number", "estimate_diagonal", "estimate_trace", "operator_norm", "to_dense"]
