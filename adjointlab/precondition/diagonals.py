"""The norms of columns as a preconditioner, ``s ↦ s / d``."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from adjointlab.affine import Operator
from adjointlab.errors import ConvergenceWarning
from adjointlab.operators import LinearOperator
from adjointlab.precondition.equations import Equations, positive, seeded
from adjointlab.typed import X

_DOUBTFUL = 0.3  # error of probed norms that is told


def diagonal(
    A: Operator[X, Any],
    *,
    weight: Any = None,
    damp: float | Tensor = 0.0,
    samples: int = 49,
    generator: torch.Generator | None = None,
) -> LinearOperator[X, X]:
    r"""Return ``s ↦ s / d`` with ``dⱼ = ‖W^½ A eⱼ‖² + damp²``, the squared norms of the columns.

    They are exact where the entries of A are known: of sparse and dense matrices, convolutions, and what gathers,
    scatters, samples, pads, scales or sums, of products of these and stacks. Else they are probed by ``samples``
    products with ``AᴴWA``, in which every p-th place of each dimension is ±1 and the others zero: exact if columns p
    places apart do not overlap, and else with the relative error ``√(Σ |gⱼₖ|²) / gⱼⱼ`` over those k, where g is the
    matrix of ``AᴴWA``.

    Parameters
    ----------
    A : LinearOperator or AffineOperator
        The operator.
    weight : LinearOperator, float, or pytree of real tensors, optional
        The weight W, as the solvers take it.
    damp : float or Tensor
        ``damp²`` is the weight of the penalty ``‖x‖²``; a tensor has no dimensions, or one entry for each problem.
    samples : int
        Most products with ``AᴴWA`` for each leaf of the domain, if the entries of A are not known.
    generator : torch.Generator, optional
        CPU generator of the signs.

    Returns
    -------
    LinearOperator
        On the domain of A. A column of norm zero is treated as the largest.

    Raises
    ------
    SpaceMismatchError
        If A is not an operator, or the weight does not match its codomain.
    ValueError
        If ``damp`` is of another batch than the domain of A, or ``samples`` is not positive.

    Warns
    -----
    ConvergenceWarning
        If the norms are probed and their error is more than 30 %.

    Notes
    -----
    If entries are used, there is memory for them for the moment: about 30 B for each, and 16 million at most.

    References
    ----------
    J. M. Tang and Y. Saad, *A probing method for computing the diagonal of a matrix inverse*, Numer. Linear Algebra
    Appl. 19 (2012) 485–501.

    Examples
    --------
    >>> import torch, adjointlab as al
    >>> A = al.matrix(torch.tensor([[3.0, 0.0], [4.0, 0.5]]))
    >>> M = diagonal(A)
    >>> M(torch.ones(2))
    tensor([0.0400, 4.0000])
    """
    equations = Equations(A, weight, damp)
    found, error = equations.diagonal(positive("samples", samples), seeded(generator))
    if error > _DOUBTFUL:
        warnings.warn(
            f"the squared norms of the columns are probed with an error of about {error:.0%}: raise samples, or use "
            "circulant, for columns overlap far",
            ConvergenceWarning,
            stacklevel=2,
        )
    return equations.divided(found)
