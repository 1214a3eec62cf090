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
        set. The adjoint has the conjugate transpose of a complex-linear operator; in real coordinates, always the
        transpose.

    Notes
    -----
    The two sides of a map from a real space to a complex one differ: ``rfft`` of 16 numbers has a complex matrix, 9 ×
    16, but its adjoint is only real-linear (it drops imaginary parts), and has the real one, 16 × 18. Ask for
    ``real=True`` on both to compare them.

    Raises
    ------
    SpaceMismatchError
        If A is no linear operator, or ``real=False`` is asked for where no such matrix exists.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import linear_operator
    >>> to_dense(linear_operator(lambda x: x[1:] - x[:-1], (3,)))
    tensor([[-1.,  1.,  0.],
            [ 0., -1.,  1.]])

    A map from real to complex numbers, and its adjoint:

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
        return _columns(A, coordinates=real)


def _require_operator(A: Any) -> None:
    if not isinstance(A, LinearOperator):
        remedy = "pass its .linear" if isinstance(A, AffineOperator) else "wrap it with al.linear_operator"
        raise SpaceMismatchError(f"expected a LinearOperator, got {type(A).__name__}: {remedy}")


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
    dense = torch.empty(0, device=device)
    for start in range(0, len(positions), chunk):
        where = positions[start : start + chunk]
        basis = torch.zeros(len(where), domain.size, dtype=dtype, device=device)
        basis[torch.arange(len(where), device=device), where] = 1
        if start + len(where) > domain.size:  # these columns belong to imaginary parts
            basis[max(0, domain.size - start) :] *= 1j
        found = _together(image, basis) if together else None
        together = found is not None
        block = torch.stack([image(row) for row in basis]) if found is None else found
        if start == 0:
            dense = block.new_empty(block.shape[1], len(positions))
        dense[:, start : start + len(where)] = block.T
    return dense


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
        Most applications of AᴴA; if they come first, σ is what it is by then, still from below.
    tol : float
        Relative error bound.
    generator : torch.Generator, optional
        Of the random start; seeded with 0 if not given.

    Returns
    -------
    Tensor
        Zero-dimensional, ``float64``; NaN if A returns NaN.

    Raises
    ------
    SpaceMismatchError
        If A is no linear operator.
    ValueError
        If ``maxiter`` is not positive, or ``tol`` is negative.

    Notes
    -----
    All directions are kept orthogonal to each other; after 48 of them the process starts again from the best 16, so
    that memory for some 70 elements of the domain is the most it takes. Other than power
    iteration, whose speed is the ratio of the two largest singular values, it does not mind clusters.

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
        factor = float(1 / scale)  # of A, so that the entries of AᴴA neither vanish nor overflow

        def gram(x: Tensor) -> Tensor:
            image = [factor * leaf for leaf in codomain.leaves(A(_element(domain, x)))]
            return factor * _flat(domain, A.H(codomain.unflatten(image)))

        return scale * _lanczos(gram, _flat(domain, start), maxiter, tol, domain)


_BASIS, _KEPT = 48, 16


def _lanczos(
    gram: Callable[[Tensor], Tensor], start: Tensor, maxiter: int, tol: float, space: Space | None = None
) -> Tensor:
    """Return ``√λ_max`` of a self-adjoint positive map of real vectors by thick-restart Lanczos."""
    across = _across(space)
    dimension = start.numel() if space is None else real_size(space)
    # VᵀGV is made from the products themselves, so that a restart needs no bookkeeping.
    most = min(_BASIS, dimension)
    basis = start.new_zeros(most, start.numel())
    projected = torch.zeros(most, most, dtype=torch.float64, device="cpu")
    direction, k = start / across(torch.linalg.vector_norm(start), 2), 0
    best = torch.zeros((), dtype=torch.float64, device=start.device)
    for _ in range(maxiter):
        basis[k] = direction
        product = gram(direction)
        row = across(basis[: k + 1] @ product).double().cpu()
        if not bool(torch.isfinite(row).all()):
            return torch.full_like(best, torch.nan)
        projected[k, : k + 1] = projected[: k + 1, k] = row
        k += 1
        values, vectors = torch.linalg.eigh(projected[:k, :k])
        best = torch.fmax(best, values[-1].clamp(min=0).sqrt().to(best.device))
        rest = product - row.to(product).matmul(basis[:k])
        rest = rest - across(basis[:k] @ rest) @ basis[:k]  # once more, against rounding
        length = across(torch.linalg.vector_norm(rest), 2)
        # G V = V projected + rest eₖᵀ, also after a restart, since the kept vectors span a Krylov space with rest.
        gap = float(length.double().cpu() * vectors[-1, -1].abs())
        exhausted = float(length) <= torch.finfo(start.dtype).eps * float(values[-1].abs())
        if gap <= 2 * tol * float(values[-1]) or exhausted or k == dimension:
            return best
        direction = rest / length
        if k == most:
            kept = min(_KEPT, most // 2)
            basis[:kept] = vectors[:, -kept:].T.to(basis) @ basis[:k]
            projected.zero_()
            projected[range(kept), range(kept)] = values[-kept:]
            k = kept
    return best


def _across(space: Space | None) -> Callable[..., Tensor]:
    """Return what makes an inner product of flat vectors, or a norm (of power 2), that of whole elements."""
    sharding = None if space is None else space.specs[0].sharding
    if sharding is None:
        return lambda part, power=1: part
    return lambda part, power=1: sharding.total(part[None] ** power, (1.0,)) ** (1 / power)


def real_size(space: Space) -> int:
    """Return the number of real coordinates of the whole."""
    return sum(
        (spec.numel if spec.sharding is None else spec.sharding.size) * (2 if spec.is_complex else 1)
        for spec in space.specs
    )


def _flat(space: Space, element: Any) -> Tensor:
    """Return an element as one real vector whose dot product is ``Re⟨·, ·⟩``: summed over processes, if sharded."""
    leaves = space.leaves(element)
    parts = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in leaves]
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    if torch.finfo(dtype).bits < 32:
        dtype = torch.float32
    flat = [part.reshape(-1).to(dtype) for part in parts]
    if space.is_sharded:  # what is held n times over counts once
        flat = [part * spec.sharding.share**0.5 for part, spec in zip(flat, space.specs, strict=True) if spec.sharding]
    return torch.cat(flat)


def _element(space: Space, vector: Tensor) -> Any:
    parts = vector.split([spec.numel * (2 if spec.is_complex else 1) for spec in space.specs])
    if space.is_sharded:
        parts = tuple(p / spec.sharding.share**0.5 for p, spec in zip(parts, space.specs, strict=True) if spec.sharding)
    leaves = [
        torch.view_as_complex(part.reshape(*spec.shape, 2)).to(spec.dtype)
        if spec.is_complex
        else part.reshape(spec.shape).to(spec.dtype)
        for part, spec in zip(parts, space.specs, strict=True)
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
        Zero-dimensional, ``float64``; NaN if A returns NaN or infinity.

    Raises
    ------
    SpaceMismatchError
        If A is no linear operator.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import diagonal
    >>> condition_number(diagonal(torch.tensor([1.0, -4.0])))
    tensor(4., dtype=torch.float64)
    """
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
        If A is no linear operator, or does not map a space to itself.
    ValueError
        If ``samples`` is not positive.

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
    with torch.no_grad():
        return torch.stack([A.domain.inner(z, image) for z, image in _probes(A, samples, generator)]).mean()


def estimate_diagonal(A: LinearOperator, *, samples: int = 64, generator: torch.Generator | None = None) -> Any:
    """Return an unbiased estimate of the diagonal of A: the mean of ``z ⊙ Az`` over random signs z.

    Parameters
    ----------
    A, samples, generator
        As in :func:`estimate_trace`.

    Returns
    -------
    pytree of tensors
        An element of the domain.

    Raises
    ------
    SpaceMismatchError
        If A is no linear operator, or does not map a space to itself.
    ValueError
        If ``samples`` is not positive.

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
    _require_operator(A)
    leaves = A.domain.leaves
    total = leaves(A.domain.zeros())
    with torch.no_grad():
        for z, image in _probes(A, samples, generator):
            for sum_, sign, entry in zip(total, leaves(z), leaves(image), strict=True):
                sum_.addcmul_(sign, entry, value=1 / samples)
    return A.domain.unflatten(total)


def _probes(A: LinearOperator, samples: int, generator: torch.Generator | None) -> Iterator[tuple[Any, Any]]:
    """Yield random signs z with Az."""
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


__all__ = ["condition_number", "estimate_diagonal", "estimate_trace", "operator_norm", "to_dense"]
