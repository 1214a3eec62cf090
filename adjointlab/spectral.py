"""Matrices, norms and traces of operators: ``‖A‖₂ = max ‖Ax‖ / ‖x‖``, ``κ(A) = σ_max / σ_min``, ``tr A``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adjointlab.affine import AffineOperator
from adjointlab.errors import ConvergenceWarning, SpaceMismatchError
from adjointlab.numerics import wide
from adjointlab.operators import LinearOperator
from adjointlab.progress import expect, progress_of, step
from adjointlab.space import Space
from adjointlab.space.coordinates import common_dtype, complex_entries, real_size, split_complex
from adjointlab.typed import X
from adjointlab.verify.mismatch import unmatched

_CHUNK = 1 << 22  # most entries of basis vectors and images in memory at a time


# -- matrices ----------------------------------------------------------------------------------------------------------


def to_dense(A: LinearOperator, *, real: bool | None = None, progress: bool | None = None) -> Tensor:
    """Return the matrix of A: ``to_dense(A) @ vector(x) = vector(A(x))``.

    Many columns at a time by ``vmap``, in chunks of bounded memory; one by one if A does not support it.

    Parameters
    ----------
    A : LinearOperator
        The operator. Its matrix has ``A.codomain.size * A.domain.size`` entries.
    real : bool, optional
        Whether to use the real coordinates ``[Re x; Im x]`` (without imaginary parts of real leaves); by default only
        for a map that is only real-linear on a complex domain, which has no other matrix.
    progress : bool, optional
        Whether to show a line on standard error with the progress; by default on a terminal, after two seconds.

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
    with torch.no_grad(), progress_of("to_dense", progress):
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

    expect(len(positions))
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
        step(len(where))
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
    A: LinearOperator,
    *,
    maxiter: int = 200,
    tol: float = 1e-3,
    seed: int = 0,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
) -> Tensor:
    r"""Return ``‖A‖₂ = √λ_max(AᴴA)``, estimated from below by Golub–Kahan bidiagonalisation.

    The estimate σ belongs to a unit vector v with ``σ = ‖Av‖ ≤ ‖A‖``. The iteration stops once
    ``‖AᴴAv − σ²v‖ ≤ 2 tol σ²``; then A has a singular value within ``tol · σ`` of σ: with a random start, the largest
    one with probability one. So the default is accurate to three digits, which is enough for the steps of a solver.

    Parameters
    ----------
    A : LinearOperator
        The operator.
    maxiter : int
        Largest number of applications of A, and of Aᴴ.
    tol : float
        Relative error bound; rounding in the dtype of A limits it from below.
    seed : int
        Seed of the random start; torch's global generator is not used.
    generator : torch.Generator, optional
        CPU generator of the random start, in place of the seed.
    progress : bool, optional
        Whether to show a line on standard error with the progress; by default on a terminal, after two seconds.

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

    Warns
    -----
    ConvergenceWarning
        If ``maxiter`` is reached first: the current σ is returned, a lower bound, and the warning says how close it is.
        If the adjoint in A was given with ``check=False`` and is none: then σ is a lower bound, and no more is known.

    Notes
    -----
    Only the last two vectors are kept: besides the memory of A, it needs two elements of the domain and two of the
    codomain. Clustered singular values do not slow it down, as they do power iteration. Where A has an adjoint B that
    is none, σ is the largest ``‖Av‖`` of power iteration with BA, which stops once it changes by ``tol · σ`` or less.

    References
    ----------
    G. H. Golub and W. Kahan, *Calculating the singular values and pseudo-inverse of a matrix*, SIAM J. Numer. Anal. 2
    (1965) 205–224. J. Kuczyński and H. Woźniakowski, *Estimating the largest eigenvalue by the power and Lanczos
    algorithms with a random start*, SIAM J. Matrix Anal. Appl. 13 (1992) 1094–1122.

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
    shown = progress_of("operator_norm", progress, maxiter, most=True)
    with torch.no_grad(), A.domain.without_autocast(), shown:
        start = A.domain.randn(generator or torch.Generator().manual_seed(seed))
        said = unmatched(A)
        norm, error = (_by_power(A, start, maxiter, tol), 0.0) if said else _bidiagonalised(A, start, maxiter, tol)
    if said and math.isfinite(norm):
        warnings.warn(
            f"{said}; so {norm:.6g} is a lower bound of the norm, and nothing is known of an upper one",
            ConvergenceWarning,
            stacklevel=2,
        )
    elif error > tol:
        warnings.warn(
            f"operator_norm has not converged in maxiter={maxiter} steps: {norm:.6g} is a lower bound, with a relative "
            f"error of about {error:.1e}, where tol={tol:g} was asked for; raise maxiter or tol",
            ConvergenceWarning,
            stacklevel=2,
        )
    return torch.tensor(norm, dtype=torch.float64, device=A.domain.specs[0].device)


def _bidiagonalised(A: LinearOperator, start: Any, maxiter: int, tol: float) -> tuple[float, float]:
    """Return the largest singular value of the bidiagonal ``UᴴAV``, and its relative error; 0 if it is below tol."""
    # AV = UB and AᴴU = VBᵀ + βveᵀ hold to rounding, although vectors that were not kept are not orthogonal for long: B
    # then has copies of its singular values. C. C. Paige, Accuracy and effectiveness of the Lanczos algorithm for the
    # symmetric eigenproblem, Linear Algebra Appl. 34 (1980) 235–258.
    domain, codomain = _Sphere(A.domain), _Sphere(A.codomain)
    tol = max(tol, 4 * max(A.domain.eps, A.codomain.eps))
    v = [leaf.clone() for leaf in domain.vector(start)]
    del start
    domain.normalise(v)
    u = [leaf * (codomain.radius / domain.radius) for leaf in codomain.vector(A(domain.element(v)))]
    alphas, betas, norm, error = [codomain.normalise(u)], list[float](), 0.0, 0.0
    for number in range(1, maxiter + 1):
        if alphas[-1] > 0:
            domain.advance(v, alphas[-1], domain.vector(A.H(codomain.element(u))), domain.radius / codomain.radius)
            beta = domain.normalise(v)
        else:  # Av is where it was already
            beta = 0.0
        if not math.isfinite(alphas[-1] + beta):
            return math.nan, 0.0
        # A decomposition takes as long as a product with a small operator: later ones are made now and then.
        if number % max(1, number // 10) == 0 or number == maxiter or beta <= tol * norm:
            left, values, _ = torch.linalg.svd(_bidiagonal(alphas, betas))
            norm = max(norm, float(values[0]))
            error = beta * float(left[-1, 0].abs()) / norm / 2 if norm else 0.0
            if error <= tol:
                return norm, 0.0
        codomain.advance(u, beta, codomain.vector(A(domain.element(v))), codomain.radius / domain.radius)
        betas.append(beta)
        alphas.append(codomain.normalise(u))
        step(note=partial("at least {:.6g}".format, norm))
    return norm, error


def _by_power(A: LinearOperator, start: Any, maxiter: int, tol: float) -> float:
    """Return the largest ``‖Av‖`` of unit vectors ``v ← BAv / ‖BAv‖``, until it changes no more than by tol."""
    domain, codomain = _Sphere(A.domain), _Sphere(A.codomain)
    v, norm = domain.vector(start), 0.0
    for _ in range(maxiter):
        v = [leaf.clone() for leaf in v]  # it may be the function's own memory
        domain.normalise(v)
        u = [leaf * (codomain.radius / domain.radius) for leaf in codomain.vector(A(domain.element(v)))]
        length = codomain.normalise(u)
        if not math.isfinite(length):
            return math.nan
        is_still = abs(length - norm) <= tol * length
        norm = max(norm, length)
        if is_still:
            break
        step(note=partial("at least {:.6g}".format, norm))
        v = domain.vector(A.H(codomain.element(u)))
    return norm


def _bidiagonal(diagonal: list[float], above: list[float]) -> Tensor:
    found = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    return found + torch.diag(torch.tensor(above, dtype=torch.float64, device="cpu"), 1) if above else found


class _Sphere:
    """Real vectors of a space, in single precision or better, whose entries are of size one and do not underflow."""

    def __init__(self, space: Space) -> None:
        self.space, self.radius = space, math.sqrt(real_size(space))

    def vector(self, element: Any) -> list[Tensor]:
        """Return an element as real tensors, which may share its memory."""
        leaves = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in self.space.leaves(element)]
        return [t.float() if torch.finfo(t.dtype).bits < 32 else t for t in leaves]

    def element(self, vector: list[Tensor]) -> Any:
        """Return a vector as an element, which may share its memory."""
        pairs = zip(vector, self.space.specs, strict=True)
        return self.space.unflatten([(torch.view_as_complex(t) if s.is_complex else t).to(s.dtype) for t, s in pairs])

    def normalise(self, vector: list[Tensor]) -> float:
        """Scale a vector in place, and return its length; one of length zero stays as it is."""
        if self.space.weight is None:
            squares = [torch.linalg.vector_norm(t, dtype=torch.float64).square() for t in vector]
            length = math.sqrt(self.space.total(squares)) / self.radius
        else:
            length = float(self.space.norm(self.element(vector))) / self.radius
        for leaf in vector if length else ():
            leaf.div_(length)
        return length

    @staticmethod
    def advance(vector: list[Tensor], back: float, image: list[Tensor], factor: float) -> None:
        """Set ``v ← factor · image − back · v``."""
        for leaf, new in zip(vector, image, strict=True):
            leaf.mul_(-back).add_(new, alpha=factor)


def condition_number(A: LinearOperator) -> Tensor:
    """Return ``κ(A) = σ_max / σ_min`` from the matrix of a small operator; infinite if A has a nontrivial kernel."""
    # G. H. Golub and C. F. Van Loan, Matrix Computations, 4th ed., Johns Hopkins University Press 2013, section 2.6.
    _require_operator(A)
    real = None if A.is_complex_linear else True
    dense = to_dense(A, real=real)
    if A.codomain.weight is not None:
        dense = _root(A.codomain, real).mH @ wide(dense)
    if A.domain.weight is not None:
        dense = torch.linalg.solve_triangular(_root(A.domain, real), wide(dense).mH, upper=False).mH
    if not bool(torch.isfinite(dense).all()):
        return torch.full((), torch.nan, dtype=torch.float64, device=dense.device)
    values = torch.linalg.svdvals(wide(dense))
    if dense.shape[0] < dense.shape[1] or values[-1] == 0:
        return torch.full_like(values[0], torch.inf)
    ratio: Tensor = values[0] / values[-1]
    return ratio


def _root(space: Space, real: bool | None) -> Tensor:
    """Return ``L`` with ``‖x‖ = ‖Lᴴx‖₂`` in a space with a weight, in double precision."""
    dense = to_dense(LinearOperator(space.weigh, space.weigh, space.plain, space.plain), real=real)
    root: Tensor = torch.linalg.cholesky(wide(dense))
    return root


# -- estimates ---------------------------------------------------------------------------------------------------------


def estimate_trace(A: LinearOperator, *, samples: int = 64, generator: torch.Generator | None = None) -> Tensor:
    """Return an unbiased estimate of ``tr A``: the mean of ``⟨z, Az⟩`` over vectors z of random signs."""
    # M. F. Hutchinson, A stochastic estimator of the trace of the influence matrix, Commun. Stat. Simul. Comput. 19
    # (1990) 433–450.
    with torch.no_grad():  # a trace does not depend on inner products: here they have no weights
        return torch.stack([A.domain.plain.inner(z, image) for z, image in _probes(A, samples, generator)]).mean()


def estimate_diagonal(A: LinearOperator[X, X], *, samples: int = 64, generator: torch.Generator | None = None) -> X:
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
