"""Dense matrices and operator norms: ``‖A‖₂ = max ‖Ax‖ / ‖x‖``."""

from __future__ import annotations

import torch
from torch import Tensor

from adjointlab.errors import SpaceMismatchError
from adjointlab.linear_operator import LinearOperator
from adjointlab.space import Space

_CHUNK = 1 << 24  # entries of basis vectors and images that are held at a time


def to_dense(A: LinearOperator, *, real: bool | None = None) -> Tensor:
    """Return the matrix of A: ``to_dense(A) @ vector(x) = vector(A(x))``.

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
    spec = A.domain.specs[0]
    dtype = spec.dtype
    for other in A.domain.specs[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    size = A.domain.size
    imaginary = [i for i, is_complex in enumerate(_complex_entries(A.domain)) if is_complex] if coordinates else []
    total = size + len(imaginary)
    chunk = max(1, _CHUNK // max(1, A.domain.size + A.codomain.size))

    def image(vector: Tensor) -> Tensor:
        y = A.codomain.vector(A(A.domain.element(vector)))
        return _real_coordinates(y, A.codomain) if coordinates else y

    blocks = []
    for start in range(0, total, chunk):
        stop = min(total, start + chunk)
        basis = torch.zeros(stop - start, size, dtype=dtype, device=spec.device)
        for row, column in enumerate(range(start, stop)):
            basis[row, column if column < size else imaginary[column - size]] = 1 if column < size else 1j
        blocks.append(torch.stack([image(row) for row in basis]))
    return torch.cat(blocks).T.contiguous()


def _complex_entries(space: Space) -> list[bool]:
    return [spec.is_complex for spec in space.specs for _ in range(spec.numel)]


def _real_coordinates(vector: Tensor, space: Space) -> Tensor:
    if not vector.is_complex():
        return vector
    mask = torch.tensor(_complex_entries(space), device=vector.device)
    return torch.cat([vector.real, vector.imag[mask]])


def operator_norm(
    A: LinearOperator, *, maxiter: int = 200, tol: float = 1e-4, generator: torch.Generator | None = None
) -> Tensor:
    """Return ``‖A‖₂ = √λ_max(AᴴA)`` by power iteration, a lower bound that grows towards it.

    Parameters
    ----------
    A : LinearOperator
        The operator.
    maxiter : int
        Most applications of AᴴA.
    tol : float
        Stop once the estimate grows by less than this fraction in one step.
    generator : torch.Generator, optional
        Of the random start; seeded with 0 if not given.

    Returns
    -------
    Tensor
        Zero-dimensional, ``float64``.

    References
    ----------
    G. H. Golub and C. F. Van Loan, *Matrix Computations*, 4th ed., section 8.2.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import diagonal
    >>> round(float(operator_norm(diagonal(torch.tensor([1.0, -3.0])))), 3)
    3.0
    """
    with torch.no_grad():
        x = A.domain.randn(generator or torch.Generator().manual_seed(0))
        estimate = torch.zeros((), dtype=torch.float64, device=A.domain.specs[0].device)
        for _ in range(maxiter):
            length = A.domain.norm(x)
            if float(length) == 0.0:
                return estimate
            x = A.domain.unflatten([(leaf / length).to(leaf.dtype) for leaf in A.domain.leaves(x)])
            y = A(x)
            previous, estimate = estimate, A.codomain.norm(y)
            if float(estimate - previous) <= tol * float(estimate):
                return estimate
            x = A.H(y)
        return estimate


__all__ = ["operator_norm", "to_dense"]
