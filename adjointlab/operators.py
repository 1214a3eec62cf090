"""Linear operators and their algebra: ``(AB)ᴴ = BᴴAᴴ``, ``(A + B)ᴴ = Aᴴ + Bᴴ``, ``(cA)ᴴ = c̄Aᴴ``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, overload

import torch
from torch import Tensor, nn

from adjointlab import algebra, grams
from adjointlab.algebra import Map, RowsOf
from adjointlab.errors import SpaceMismatchError
from adjointlab.linked import Linked
from adjointlab.notation import Expression, Notation, meaning
from adjointlab.numerics import commutes_with_i, full_precision
from adjointlab.space import Space
from adjointlab.space.algebra import is_scalar
from adjointlab.space.selection import Selection, pieces, selection
from adjointlab.twin import Body, Recipe, Twin, adjoint_of
from adjointlab.typed import X, Y, Z

if TYPE_CHECKING:
    import numpy as np

__all__ = ["LinearOperator", "Map", "Recipe", "adjoint_of", "derived", "made", "product", "self_adjoint"]

Scalar: TypeAlias = "Tensor | complex | np.number[Any]"  # complex stands for int and float, too


class LinearOperator(Twin[X, Y]):
    r"""A linear map A between two spaces together with its adjoint: ``⟨Ax, y⟩ = ⟨x, Aᴴy⟩``.

    Made by :func:`adjointlab.linear_operator` from a module or function, by the algebra of operators, or from a pair
    of functions that are known to be adjoint to each other, which nothing here checks
    (:func:`adjointlab.from_pair` does). Each function of a pair is the other's derivative in its argument, whether
    autograd can see through it or not.

    Parameters
    ----------
    function, adjoint_function : callable
        ``x ↦ Ax`` and ``y ↦ Aᴴy`` on elements of the spaces.
    domain, codomain : Space
        Where x and y live.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import linear_operator
    >>> A = linear_operator(torch.nn.Conv1d(1, 1, 3, bias=False), (1, 1, 8))
    >>> x, y = A.domain.randn(), A.codomain.randn()
    >>> bool(abs(A.codomain.inner(A(x), y) - A.domain.inner(x, A.H(y))) < 1e-5)
    True
    """

    def __init__(
        self, function: Callable[[X], Y], adjoint_function: Callable[[Y], X], domain: Space[X], codomain: Space[Y]
    ) -> None:
        recipe = (LinearOperator, (function, adjoint_function, domain, codomain))
        self._set(Body((function, adjoint_function), (domain, codomain)), recipe, {})
        twin = self.H
        k = domain.batch_dims
        self._body.linked[0] = Linked(self._leaves_of_function, twin._plain_leaves, k)
        self._body.linked[1] = Linked(twin._leaves_of_function, self._plain_leaves, k)

    @property
    def H(self) -> LinearOperator[Y, X]:
        """The adjoint ``Aᴴ``, with ``⟨Ax, y⟩ = ⟨x, Aᴴy⟩`` (for the real part, where A is only real-linear).

        Between spaces with weights it is ``W_X⁻¹ Aᴴ W_Y``; autograd's derivative of A stays the one without weights.
        """
        return self._other()  # type: ignore[no-any-return]

    @property
    def T(self) -> LinearOperator[Y, X]:
        """The transpose ``conj ∘ Aᴴ ∘ conj``, with ``Σ (Ax)ᵢ yᵢ = Σ xᵢ (Aᵀy)ᵢ``, both sums with weights if any."""
        twin: LinearOperator[Y, X] | None = self._body.transposes[self._side]
        if twin is None:
            twin = self._body.transposes[self._side] = made(algebra.transpose, self)
            twin._body.transposes[0] = self
        return twin

    @property
    def real_view(self) -> LinearOperator:
        """The same map between real spaces, where a complex entry is a pair of real ones, ``torch.view_as_real``.

        Its adjoint is that of A for ``Re⟨·, ·⟩``. A itself, where no entry is complex.
        """
        is_complex = any(spec.is_complex for spec in (*self.domain.specs, *self.codomain.specs))
        return made(algebra.real_view, self) if is_complex else self

    def inverse(self, solver: Callable[..., Any], **options: Any) -> LinearOperator[Y, X]:
        r"""Return ``A⁻¹``, or the pseudo-inverse, by a solver: ``y ↦ solver(A, y, **options).x``.

        Its adjoint is ``x ↦ solver(Aᴴ, x, **options).x``. With ``damp`` it is ``(AᴴA + damp²)⁻¹Aᴴ``.

        Parameters
        ----------
        solver : callable
            ``al.solvers.cgls``, ``lsmr`` or, if A is self-adjoint and positive definite, ``cg``.
        **options
            For the solver. A weight is refused, because it belongs to one of both sides.

        Returns
        -------
        LinearOperator
            From the codomain to the domain, as accurate as the solver.

        Raises
        ------
        SpaceMismatchError
            If ``solver`` is not callable, or an option is for one side only.

        Warns
        -----
        ConvergenceWarning
            At a call in which the solver does not converge.

        Examples
        --------
        >>> import torch
        >>> from adjointlab import diagonal, solvers
        >>> A = diagonal(torch.tensor([1.0, 2.0]))
        >>> A.inverse(solvers.cgls)(torch.tensor([1.0, 1.0]))
        tensor([1.0000, 0.5000])
        """
        one_sided = sorted({"weight", "x0", "precondition"} & options.keys())
        if not callable(solver) or one_sided:
            raise SpaceMismatchError(
                "expected a solver such as al.solvers.cgls, and options that fit A and Aᴴ alike, got "
                f"{', '.join(one_sided) or type(solver).__name__}: write the operator with al.from_pair"
            )
        return made(algebra.inverse, self, solver, options)

    @property
    def gram(self) -> LinearOperator[X, X]:
        """The self-adjoint, positive semi-definite ``AᴴA``.

        Where A is derived, or made of operators that are, it is one program, without what Aᴴ undoes: transforms,
        shifts and samples cancel, factors are multiplied. It is built at the first call; :meth:`explain` says what is
        simplified.

        Examples
        --------
        >>> import torch
        >>> from adjointlab import linear_operator
        >>> mask = torch.tensor([1.0, 0.0, 2.0])
        >>> A = linear_operator(lambda x: torch.fft.fft(mask * x, norm="ortho"), torch.zeros(3, dtype=torch.complex64))
        >>> print(A.gram.explain().splitlines()[2])
        one graph: ifft · fft cancelled, diagonal · diagonal merged
        """
        return product(self.H, self)

    def rows(self, index: Any, dim: int = 0) -> LinearOperator[X, Any]:
        """Return ``x ↦ (Ax)[index]``, an operator that computes these rows only, forwards and backwards.

        Operations of which other rows are needed are computed whole; ``explain()`` names them.

        Parameters
        ----------
        index : slice, sequence or tensor of int, mask, or int
            The rows of the result, in any order; negative ones count from the end. A single integer drops the
            dimension, as ``y[3]`` does.
        dim : int
            The dimension of the result's tensor along which the rows are; it is none of a batch.

        Returns
        -------
        LinearOperator
            From the same domain to the rows. Parameters and buffers are shared with A.

        Raises
        ------
        IndexError
            If the index is none, is empty or out of range, or a mask has another length.
        SpaceMismatchError
            If the results are not one tensor on one process, or ``dim`` is none of its dimensions behind the batch.

        Examples
        --------
        >>> import torch
        >>> from adjointlab import matrix
        >>> A = matrix(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
        >>> A.rows([0, 2])(torch.ones(2))
        tensor([1., 3.])
        """
        return self.selected(selection(index, dim, self.codomain))

    def split(self, n: int, dim: int = 0) -> list[LinearOperator[X, Any]]:
        """Return ``[A₁, …, Aₙ]``, the operators of n pieces of the rows, with ``Ax = (A₁x, …, Aₙx)`` along a dimension.

        Parameters
        ----------
        n : int
            The number of pieces, which are as ``torch.tensor_split`` cuts the results: one after the other, of
            sizes that differ by one at most.
        dim : int
            As in :meth:`rows`.

        Returns
        -------
        list of LinearOperator
            The pieces, each as :meth:`rows` makes it.

        Raises
        ------
        ValueError
            If n is not between one and the number of rows.
        SpaceMismatchError
            As in :meth:`rows`.

        Examples
        --------
        >>> import torch
        >>> from adjointlab import matrix
        >>> A = matrix(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
        >>> [part(torch.ones(2)).tolist() for part in A.split(2)]
        [[1.0, 2.0], [3.0]]
        """
        return [self.selected(piece) for piece in pieces(n, dim, self.codomain)]

    def selected(self, rows: Selection) -> LinearOperator:
        """Return the operator of some rows of the result."""
        of = self._body.rows[self._side]
        return product(_selector(self.codomain, rows), self) if of is None else of(rows)

    @property
    def recipe(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The function that made the operator, of the algebra where it is of that, and its arguments."""
        function, arguments = self._making
        return (arguments[0], arguments[1:]) if function is made else (function, arguments)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of entries of ``Ax`` and of x, as of a matrix."""
        return self.codomain.size, self.domain.size

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a matrix of A: that of the entries of x and of ``Ax``, the widest of all leaves."""
        return functools.reduce(torch.promote_types, [s.dtype for s in (*self.domain.specs, *self.codomain.specs)])

    @property
    def is_complex_linear(self) -> bool:
        """Whether ``A(ix) = iA(x)``; trivially so between real spaces, never between a real and a complex one."""
        specs = (*self.domain.specs, *self.codomain.specs)
        if not any(spec.is_complex for spec in specs):
            return True
        if not all(spec.is_complex for spec in specs):
            return False
        x = self.domain.leaves(self.domain.randn(torch.Generator().manual_seed(0)))
        with torch.no_grad(), full_precision:
            return commutes_with_i(self._leaves, x, self.codomain)

    @property
    def multiplier(self) -> Tensor | None:
        r"""``K`` with ``A = F⁻¹ diag(K) F`` where A is a cyclic convolution, F being the Fourier transform; else None.

        Of shape ``(C, *frequencies)`` for images of C channels with a kernel each, as ``torch.fft.rfftn`` has
        frequencies. It is known of an operator that is one convolution with a circular border and as many groups as
        channels, and of its adjoint, if ``lowering=True``, the kernel has so many entries that a product of transforms
        is as accurate as the sum, and the sizes of the images have no large prime factor.

        Examples
        --------
        >>> import torch
        >>> from adjointlab import linear_operator
        >>> c = torch.nn.Conv2d(1, 1, 25, padding=12, padding_mode="circular", bias=False)
        >>> A = linear_operator(c, (1, 1, 128, 128))
        >>> A.multiplier.shape
        torch.Size([1, 128, 65])
        >>> torch.dist(A.H.multiplier, A.multiplier.conj())
        tensor(0.)
        """
        source = self._body.source
        found = None if source is None else source.adjoint_multiplier()
        return found if found is None or self._side else found.conj().resolve_conj()

    def explain(self) -> str:
        """Return a readable account: the adjoint's program, kernels, cost, memory, evidence; of ``A.H``, its own."""
        letters = Expression(self).letters
        if not self.parts:
            return "\n".join([repr(self), *[part._account(letter, self._side) for letter, part in letters.items()]])
        accounts = [
            f"\n\n{letter} = {meaning(part)}\n{part._account(letter, part._side)}" for letter, part in letters.items()
        ]
        count = f"made of {len(letters)} operator{'s' * (len(letters) != 1)}"
        return "\n".join([repr(self), *grams.simplified(self), count]) + "".join(accounts)

    def _account(self, letter: str, side: int) -> str:
        if self._body.source is not None:
            return self._body.source.account(letter, adjoint=bool(side))
        return "a product, entry by entry" if self._body.notation else "given as a pair of functions"

    def __repr__(self) -> str:
        return str(Expression(self))

    # -- algebra -----------------------------------------------------------------------------------------------------

    @overload
    def __matmul__(self, other: LinearOperator[Z, X]) -> LinearOperator[Z, Y]: ...

    @overload
    def __matmul__(self, other: X) -> Y: ...

    def __matmul__(self, other: Any) -> Any:
        return product(self, other) if isinstance(other, LinearOperator) else self(other)

    def __add__(self, other: LinearOperator[X, Y]) -> LinearOperator[X, Y]:
        return made(algebra.total, self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __radd__(self, other: Literal[0]) -> Self:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # sum([A, B]) begins with 0

    def __sub__(self, other: LinearOperator[X, Y]) -> LinearOperator[X, Y]:
        return made(algebra.total, self, -other) if isinstance(other, LinearOperator) else NotImplemented

    def __neg__(self) -> LinearOperator[X, Y]:
        return made(algebra.multiple_of, -1, self)

    def __rmul__(self, scalar: Scalar) -> LinearOperator[X, Y]:
        return made(algebra.multiple_of, scalar, self) if is_scalar(scalar) else NotImplemented

    def __mul__(self, scalar: Scalar) -> LinearOperator[X, Y]:
        return made(algebra.of_multiple, self, scalar) if is_scalar(scalar) else NotImplemented

    def __truediv__(self, scalar: Scalar) -> LinearOperator[X, Y]:
        if not is_scalar(scalar):
            return NotImplemented
        if isinstance(scalar, Tensor):  # whose value may change
            return made(algebra.multiple_of, scalar, self, True)
        return made(algebra.multiple_of, 1 / scalar, self)

    # -- being a module ----------------------------------------------------------------------------------------------


LinearOperator.plain = LinearOperator


# -- the algebra: pairs of closures, late-bound so that a part may move -----------------------------------------------


def derived(
    function: Map, adjoint_function: Map, domain: Space, codomain: Space, recipe: Any, *parts: nn.Module,
    notation: Notation | None = None, rows: tuple[RowsOf | None, RowsOf | None] = (None, None),
) -> LinearOperator:  # fmt: skip
    """Return the operator of two functions that apply the operators and modules in ``parts``."""
    # Rows of A, and of Aᴴ, are made by ``rows``; where that is None, they are selected after.
    named = {f"operator_{index}": part for index, part in enumerate(parts)}
    body = Body((function, adjoint_function), (domain, codomain), notation=notation, rows=rows)
    return LinearOperator._of(body, recipe, named)


def made(make: Callable[..., algebra.Made], *arguments: Any) -> LinearOperator:
    """Return the operator that the algebra makes of arguments."""
    return _of(make(*arguments), (made, (make, *arguments)))


def _of(parts: algebra.Made, recipe: Recipe) -> LinearOperator:
    return derived(
        parts.function, parts.adjoint, parts.domain, parts.codomain, recipe, *parts.operators, notation=parts.notation,
        rows=parts.rows,
    )  # fmt: skip


def product(a: LinearOperator, b: LinearOperator) -> LinearOperator:
    """Return ``AB``, which is its own adjoint where A is Bᴴ."""
    operator = _of(algebra.product(a, b), (product, (a, b)))
    if a._body is b._body and a._side != b._side:  # AAᴴ and AᴴA are their own adjoints
        grams.as_gram(self_adjoint(operator), b)
    return operator


def self_adjoint(operator: LinearOperator[X, X]) -> LinearOperator[X, X]:
    """Have an operator be its own adjoint, and return it."""
    operator._body.is_self_adjoint, operator.__dict__["_twin"] = True, None
    return operator


def _selector(space: Space, rows: Selection) -> LinearOperator:
    """Return ``y ↦ y[rows]``; its adjoint puts rows among zeros."""
    operator: LinearOperator = derived(
        rows, rows.scattered, space, rows.of(space), lambda: (_selector, (operator.domain, rows)),
        notation=Notation(meaning=str(rows)),
    )  # fmt: skip
    return operator
