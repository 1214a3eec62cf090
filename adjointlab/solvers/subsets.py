r"""Ordered subsets for ``min ½‖Ax − y‖² + ½ damp² ‖x‖² + h(x)``: steps that see a part of the data each.

A step along the gradient of one of n parts costs the n-th part of a pass over the data, and is about as good as one
along the whole gradient, far from the minimum. Near it, the parts disagree. *Variance reduction* takes the difference
out: each step then adds to a whole gradient, which was computed before, what has changed of it in one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Unpack

from adjointlab.affine import Operator
from adjointlab.solvers.parts import SAGA, SGD, SVRG, Options, solve
from adjointlab.solvers.problem import nonnegative
from adjointlab.solvers.solution import Solution


def sgd(
    A: Operator[Any, Any] | Sequence[Operator[Any, Any]],
    y: Any,
    *,
    decay: float = 0.0,
    momentum: float = 0.0,
    maxiter: int = 20,
    tol: float = 1e-6,
    **options: Unpack[Options],
) -> Solution:
    r"""Bring ``½‖Ax − y‖² + ½ damp² ‖x‖² + h(x)`` down by steps along the gradients of n parts of the data in turn.

    Known as *ordered subsets*, or incremental gradients. The first epochs gain most. With steps of one length, x then
    stays away from the minimum as far as the parts disagree; with a ``decay``, or by :func:`svrg`, it does not.

    Parameters
    ----------
    A : LinearOperator, AffineOperator, or sequence of these
        The operator, or operators of its parts: ``A.split(n)``, or a list of ``A.rows(…)``. To derive the parts takes
        a second for each, and can so be done once for many solves.
    y : pytree of tensors, or sequence of these
        The data; a sequence, if A is one.
    subsets : int, optional
        The number n of parts, if A is one operator: part i has the rows ``i, i + n, i + 2n, …``.
    dim : int
        The dimension of the data along which these rows are.
    x0 : pytree of tensors, optional
        The first iterate; zero if not given.
    damp : float
        ``damp²`` is the weight of the penalty ``‖x‖²``.
    prox : callable, optional
        The proximal map of h, ``(x, step) ↦ argmin_u h(u) + ‖u − x‖² / (2 step)``; h is zero if not given.
    step : float, optional
        The length s of the steps ``x ← x − s Aᵢᴴ(Aᵢx − yᵢ)``; if not given, ``1 / max ‖Aᵢ‖²``.
    decay : float
        In epoch k, counted from zero, steps are shorter by the factor ``1 / (1 + decay · k)``.
    momentum : float
        The largest factor by which steps go on in the direction of the last ones, below one: it grows to that as
        Nesterov's does. With some ten subsets, 0.9 brings x to the same place in about half as many epochs.
    maxiter : int
        Largest number of epochs, in each of which every part has its turn, in a random order.
    tol : float
        The solver stops where x has changed in an epoch by no more than ``tol`` times its norm.
    generator : torch.Generator, optional
        Draws the orders; one with the seed 0 if not given.
    callback : callable, optional
        Function that is called with a copy of x and an :class:`Info` after each epoch. If it returns True, the solver
        stops.
    progress : bool, optional
        Whether to show a line on standard error with the progress; by default on a terminal, after two seconds.

    Returns
    -------
    Solution
        Its iterations are epochs. ``residual_norms`` are ``√(‖Ax − y‖² + damp² ‖x‖²)``, computed from x at the start
        and after each epoch: that takes A once more. ``Info.gradient`` is the norm of the mean of the gradients in the
        epoch, times n. An epoch that diverges is taken back, and steps are halved. NaN is
        reported as a reason; nothing is raised.

    Raises
    ------
    SpaceMismatchError
        If the operators, the data or ``x0`` do not fit each other.
    ValueError
        If ``subsets`` is missing where A is one operator or given where it is not, or a number is out of its range.

    Notes
    -----
    A derivative of x is refused: use :func:`cgls` or :func:`fista` where it is wanted. The entries of a batch are one
    problem. Besides x and y, the solver needs memory for four elements of the domain and for one of the
    codomain.

    References
    ----------
    H. M. Hudson and R. S. Larkin, *Accelerated image reconstruction using ordered subsets of projection data*, IEEE
    Trans. Med. Imaging 13 (1994) 601–609. D. P. Bertsekas, *Incremental proximal methods for large scale convex
    optimization*, Math. Program. 129 (2011) 163–195.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import matrix
    >>> A = matrix(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]]))
    >>> sgd(A, A(torch.tensor([1.0, 2.0])), subsets=2, maxiter=100).x
    tensor([1., 2.])
    """
    make = partial(SGD, decay=nonnegative("decay", decay), momentum=_momentum(momentum))
    return solve(make, A, y, name="sgd", share=1.0, maxiter=maxiter, tol=tol, **options)


def _momentum(value: float) -> float:
    if not nonnegative("momentum", value) < 1:
        raise ValueError(f"expected momentum to be a number from 0 to below 1, got {value!r}")
    return float(value)


def saga(
    A: Operator[Any, Any] | Sequence[Operator[Any, Any]],
    y: Any,
    *,
    maxiter: int = 50,
    tol: float = 1e-6,
    **options: Unpack[Options],
) -> Solution:
    r"""Minimise ``½‖Ax − y‖² + ½ damp² ‖x‖² + h(x)`` by steps that renew the gradient of one of n parts each.

    A step is along the mean of all gradients, as the parts were seen last, with the change of that of one part in
    full. With steps of one length it converges to the minimum.

    Parameters
    ----------
    A, y, subsets, dim, x0, damp, prox, maxiter, tol, generator, callback, progress
        As in :func:`sgd`.
    step : float, optional
        The length of the steps; if not given, ``1 / (3 max ‖Aᵢ‖²)``.

    Returns
    -------
    Solution
        As of :func:`sgd`. ``Info.gradient`` is the norm of the sum of the gradients as the parts were seen last.

    Raises
    ------
    SpaceMismatchError, ValueError
        As :func:`sgd` does.

    Notes
    -----
    As in :func:`sgd`; memory for one more element of the domain and of the codomain is needed: what is kept of each
    part is not its gradient, but its residual.

    References
    ----------
    A. Defazio, F. Bach, S. Lacoste-Julien, *SAGA: a fast incremental gradient method with support for non-strongly
    convex composite objectives*, NeurIPS 2014.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import matrix
    >>> A = matrix(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]]))
    >>> saga(A, torch.tensor([1.0, 2.0, 3.0, 0.0]), subsets=2, maxiter=200).x
    tensor([1.3333, 1.6667])
    """
    return solve(SAGA, A, y, name="saga", share=1 / 3, maxiter=maxiter, tol=tol, **options)


def svrg(
    A: Operator[Any, Any] | Sequence[Operator[Any, Any]],
    y: Any,
    *,
    maxiter: int = 50,
    tol: float = 1e-6,
    **options: Unpack[Options],
) -> Solution:
    r"""Minimise ``½‖Ax − y‖² + ½ damp² ‖x‖² + h(x)`` by steps along the whole gradient at the start of each epoch.

    To that gradient, each step adds what has changed since of the gradient of one of n parts, ``AᵢᴴAᵢ(z − x)``. With
    Nesterov's momentum, n steps gain as much as n steps of the whole problem would, as long as n is small. An epoch
    that raises the objective is taken back, the momentum starts anew, and steps are halved. (With a proximal map, whose
    h nobody knows, this is so where the residual exceeds twice that of the start or of x = 0.)

    Parameters
    ----------
    A, y, subsets, dim, x0, damp, prox, step, maxiter, generator, callback, progress
        As in :func:`sgd`. An epoch costs two passes over the data.
    tol : float
        The solver stops where the norm of the gradient is at most ``tol`` times that at the start; with a proximal
        map, that of a step along the whole gradient.

    Returns
    -------
    Solution
        As of :func:`sgd`. ``Info.gradient`` is the norm of the gradient at the start of the epoch.

    Raises
    ------
    SpaceMismatchError, ValueError
        As :func:`sgd` does.

    Notes
    -----
    As in :func:`sgd`; memory for three more elements of the domain is needed.

    References
    ----------
    R. Johnson and T. Zhang, *Accelerating stochastic gradient descent using predictive variance reduction*, NeurIPS
    2013. D. Kim, S. Ramani, J. A. Fessler, *Combining ordered subsets and momentum for accelerated X-ray CT image
    reconstruction*, IEEE Trans. Med. Imaging 34 (2015) 167–178.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import matrix
    >>> A = matrix(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]]))
    >>> solution = svrg(A, torch.tensor([1.0, 2.0, 3.0, 0.0]), subsets=2)
    >>> solution.x, solution.converged
    (tensor([1.3333, 1.6667]), True)
    """
    make = partial(SVRG, tol=nonnegative("tol", tol))
    return solve(make, A, y, name="svrg", share=1.0, maxiter=maxiter, tol=None, **options)
