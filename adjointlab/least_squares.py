"""Least squares: ``F(x) = ½‖Ax − y‖²_W + ½ Σ λ ‖Lx − b‖²``, its gradient, its Hessian and its minimiser."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor, nn

from adjointlab.affine import AffineOperator, Operator, require_operator, residual_and_gradient
from adjointlab.blocks import diagonal_entries, weighted_gram
from adjointlab.errors import SpaceMismatchError
from adjointlab.operators import LinearOperator
from adjointlab.solvers import Solution, cgls
from adjointlab.solvers.closed_form import closed_form
from adjointlab.space import Space
from adjointlab.space.algebra import added, scaled
from adjointlab.terms import Penalty, stacked, stacked_weight, weight_operator
from adjointlab.typed import X, Y


class LeastSquares(nn.Module, Generic[X, Y]):
    r"""The objective ``F(x) = ½‖Ax − y‖²_W + ½ Σ λ ‖Lx − b‖²``, with ``‖r‖²_W = Re⟨r, Wr⟩``.

    If the spaces of A have weights, so has this inner product, and ``gradient`` is the gradient in the domain of A:
    ``A.domain.weigh(F.gradient(x))`` is the one that autograd computes. They are equal where there are no weights.

    Parameters
    ----------
    A : LinearOperator or AffineOperator
        The forward model.
    y : pytree of tensors
        The data, an element of ``A.codomain``.
    weight : LinearOperator, float, or pytree of real tensors, optional
        ``W``: a self-adjoint operator on the codomain, or the entries of a diagonal one, each 0 or more; a number, or a
        tensor without dimensions, is for all entries, or all of a leaf.
    penalties : sequence of (λ, L) or (λ, L, b)
        A number λ ≥ 0, an operator L on the domain of A, such as :func:`finite_differences` makes, and an element b of
        the codomain of L; zero if not given. With ``batch_dims``, λ may be a tensor with one entry for each problem.

    Raises
    ------
    SpaceMismatchError
        If y, the weight or a penalty does not fit the spaces of A.
    ValueError
        If a λ is negative, or a tensor of another shape.

    Notes
    -----
    F is a module: of y, W, λ and b, tensors are buffers, and parameters are parameters; ``.to`` moves all of them with
    A and L.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import diagonal, identity
    >>> A = diagonal(torch.tensor([1.0, 2.0]))
    >>> F = LeastSquares(A, torch.tensor([1.0, 0.0]))
    >>> F(torch.tensor([0.0, 1.0]))
    tensor(2.5000)
    >>> F.gradient(torch.tensor([0.0, 1.0]))
    tensor([-1.,  4.])
    >>> LeastSquares(A, torch.tensor([1.0, 0.0]), penalties=[(1.0, identity((2,)))]).solve().x
    tensor([0.5000, 0.0000])
    """

    def __init__(
        self,
        A: Operator[X, Y],
        y: Y,
        weight: LinearOperator[Y, Y] | Y | float | None = None,
        penalties: Sequence[tuple[Any, ...]] = (),
    ) -> None:
        super().__init__()
        require_operator(A)
        leaves = A.codomain.leaves(y, "y")
        self.A = A
        self._names = [f"_y_{index}" for index in range(len(leaves))]
        for name, leaf in zip(self._names, leaves, strict=True):
            if isinstance(leaf, nn.Parameter):
                self.register_parameter(name, leaf)
            else:
                self.register_buffer(name, leaf)
        self.weight = None if weight is None else weight_operator(A, weight, self.batch_shape)
        self.penalties = nn.ModuleList(Penalty.of(penalties, A.domain, self.batch_shape))

    @property
    def y(self) -> Y:
        """The data."""
        A: Any = self._modules["A"]  # past a search by name, which costs a microsecond
        found = self._buffers
        data: Y = A.codomain.unflatten([found[n] if n in found else self._parameters[n] for n in self._names])
        return data

    @property
    def domain(self) -> Space[X]:
        """The space of x in ``F(x)``."""
        return self.A.domain

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The sizes of the batch of data."""
        return tuple(self.A.codomain.leaves(self.y)[0].shape[: self.A.codomain.batch_dims])

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Take all operators as they are on entry, within a block; see :meth:`LinearOperator.frozen`."""
        with contextlib.ExitStack() as stack:
            for part in self.modules():
                if isinstance(part, LinearOperator) and part.source is not None:
                    stack.enter_context(part.source.frozen())
            yield

    def residual(self, x: X) -> Y:
        """Return ``Ax − y``."""
        return self._residual(x, self.y)

    def _residual(self, x: X, y: Y) -> Y:
        codomain = self.A.codomain
        pairs = list(zip(codomain.leaves(self.A(x)), codomain.leaves(y), strict=True))
        if pairs[0][0].shape != pairs[0][1].shape:
            raise SpaceMismatchError(
                f"expected x of the batch size of the data, got Ax of shape {tuple(pairs[0][0].shape)} for data of "
                f"shape {tuple(pairs[0][1].shape)}: nothing is broadcast"
            )
        return codomain.unflatten([a - b for a, b in pairs])

    if TYPE_CHECKING:

        def __call__(self, x: X) -> Tensor: ...  # noqa: D102

    def forward(self, x: X) -> Tensor:
        """Return ``F(x)``, a real zero-dimensional tensor that autograd can differentiate."""
        residual = self.residual(x)
        return self._value(residual, self._weighted(residual), x)

    def gradient(self, x: X) -> X:
        """Return ``Aᴴ W (Ax − y) + Σ λ Lᴴ (Lx − b)``."""
        return self.gradient_for(x, self.y)

    def gradient_for(self, x: X, y: Y) -> X:
        """Return the gradient at x of the objective with other data."""
        gradient = self._residual_and_gradient(x, y, residual=False)[2]  # which may not need the residual
        return self._penalised(gradient, x)

    def value_and_gradient(self, x: X) -> tuple[Tensor, X]:
        """Return F and its gradient at x, with one forward and one adjoint of A."""
        residual, weighted, gradient = self._residual_and_gradient(x, self.y, residual=True)
        value = self._value(residual, self._weighted(residual) if weighted is None else weighted, x)
        return value, self._penalised(gradient, x)

    def _penalised(self, gradient: X, x: X) -> X:
        for penalty in self._penalties:
            gradient = added(gradient, penalty.L.H(penalty.times(penalty.residual(x))))
        return gradient

    @property
    def _penalties(self) -> Iterator[Penalty]:
        found: Any = self._modules["penalties"]
        return iter(found)

    def _residual_and_gradient(self, x: X, y: Y, *, residual: bool) -> tuple[Any, Any, X]:
        """Return ``Ax − y``, its weighted form if that was computed, and the gradient: from one graph if possible."""
        entries = None if self.weight is None else diagonal_entries(self.weight)
        if self.weight is None or entries is not None:
            A: Any = self._modules["A"]
            fused = residual_and_gradient(A, x, y, entries, residual=residual)
            if fused is not None:
                return fused[0], None, fused[1]
        apart = self._residual(x, y)
        weighted = self._weighted(apart)
        return apart, weighted, self.A.H(weighted)

    def _weighted(self, residual: Any) -> Any:
        return residual if self.weight is None else self.weight(residual)

    @property
    def hessian(self) -> LinearOperator[X, X]:
        """The Hessian ``Aᴴ W A + Σ λ LᴴL``, self-adjoint and positive semi-definite; simplified as ``A.gram`` is."""
        A = self.A.linear if isinstance(self.A, AffineOperator) else self.A
        hessian = A.gram if self.weight is None else weighted_gram(A, self.weight)
        for penalty in self._penalties:
            hessian = hessian + penalty.hessian
        return hessian

    def solve(self, solver: Callable[..., Solution[X]] | None = None, **options: Any) -> Solution[X]:
        r"""Return the minimiser of F: of ``‖S x − d‖²`` with ``S = (A, L, …)``, ``d = (y, b, …)`` and weights W, λ, ….

        Where A and all L are cyclic convolutions, such as differences with a circular border, and there are no weights,
        the Fourier transform decouples the unknowns: x is a quotient of spectra. That A and L are convolutions is
        tested with random data, and x by the gradient of F; if that is not small enough, the solver runs.

        Parameters
        ----------
        solver : callable, optional
            ``adjointlab.solvers.cgls``, ``adjointlab.solvers.lsmr``, or any function of an operator, data and
            ``weight=``; if not given, ``cgls``, or no solver where there is a closed form and the only option is
            ``tol``.
        **options
            For the solver: ``tol``, ``maxiter``, ``damp``, ``x0``, ``callback``, ….

        Returns
        -------
        Solution
            As of the solver. x is differentiable in y, W, λ, b and the parameters of A and L. Of many minimisers, it is
            that of least norm.

        Raises
        ------
        ValueError
            If an option is refused by the solver, or λ has become negative.

        Examples
        --------
        >>> import torch
        >>> from adjointlab import finite_differences, linear_operator
        >>> A = linear_operator(lambda x: x[::3], (7,))  # every third sample; the others are to be smooth
        >>> y = torch.tensor([0.0, 3.0, 0.0])
        >>> LeastSquares(A, y, penalties=[(1e-3, finite_differences((7,)))]).solve().x.round(decimals=2)
        tensor([0., 1., 2., 3., 2., 1., 0.])
        """
        penalties, run = list(self._penalties), solver or _cgls
        for penalty in penalties:
            penalty.check(self.batch_shape)
        if not penalties:
            return run(self.A, self.y, weight=self.weight, **options)
        A, y = self.A, self.y
        if isinstance(A, AffineOperator):
            space = A.domain.with_batch(self.batch_shape)
            y, A = added(y, scaled(-1, A(space.zeros()))), A.linear
        if solver is None and self.weight is None and options.keys() <= {"tol", "progress"}:
            found = closed_form(A, y, penalties, options.get("tol", 1e-6))
            if found is not None:
                return found
        data = (y, *[penalty.L.codomain.with_batch(self.batch_shape).zeros() if penalty.b is None else penalty.b
                     for penalty in penalties])  # fmt: skip
        weight = stacked_weight(A, self.weight, penalties)
        return run(stacked(A, penalties), data, weight=weight, **options)

    def _value(self, residual: Any, weighted: Any, x: X) -> Tensor:
        terms = [(self.A.codomain, residual, weighted)]
        for penalty in self._penalties:
            apart = penalty.residual(x)
            terms.append((penalty.L.codomain, apart, penalty.times(apart)))
        return sum([_half_inner(*term) for term in terms[1:]], start=_half_inner(*terms[0]))


_cgls: Callable[..., Solution[Any]] = cgls


def _half_inner(space: Space, residual: Any, weighted: Any) -> Tensor:
    """Return ``½ Re⟨r, Wr⟩``."""
    with space.without_autocast():
        pairs = zip(space.leaves(residual), space.leaves(space.weigh(weighted)), strict=True)
        return space.total([torch.linalg.vecdot(r.reshape(-1), w.reshape(-1)).real for r, w in pairs]) / 2


def least_squares_gradient(A: Operator[X, Y], x: X, y: Y) -> X:
    """Return ``Aᴴ(Ax − y)``, the gradient of ``½‖Ax − y‖²``.

    Parameters
    ----------
    A : LinearOperator or AffineOperator
        The forward model.
    x : pytree of tensors
        An element of the domain.
    y : pytree of tensors
        The data, an element of the codomain.

    Returns
    -------
    pytree of tensors
        An element of the domain.

    Raises
    ------
    SpaceMismatchError
        If x or y is not an element of its space.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import linear_operator
    >>> c = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
    >>> A = linear_operator(c, (1, 1, 8, 8))
    >>> least_squares_gradient(A, torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)).shape
    torch.Size([1, 1, 8, 8])
    """
    return LeastSquares(A, y).gradient(x)
