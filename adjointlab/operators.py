"""Linear operators and their algebra: ``(AB)ᴴ = BᴴAᴴ``, ``(A + B)ᴴ = Aᴴ + Bᴴ``, ``(cA)ᴴ = c̄Aᴴ``."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeAlias, overload

import torch
from torch import Tensor, nn

from adjointlab import algebra, grams
from adjointlab.algebra import Made
from adjointlab.compat import differentiated, uncompiled
from adjointlab.errors import SpaceMismatchError
from adjointlab.linked import Linked
from adjointlab.notation import Expression, Notation, meaning
from adjointlab.numerics import commutes_with_i, full_precision
from adjointlab.space import Space
from adjointlab.space.algebra import (
    is_scalar,
    moved,
)
from adjointlab.space.selection import Selection, pieces, selection
from adjointlab.transpose import Transposition
from adjointlab.typed import X, Y, Z

if TYPE_CHECKING:
    import numpy as np

Map = Callable[[Any], Any]
Scalar: TypeAlias = "Tensor | complex | np.number[Any]"  # complex stands for int and float, too
# A function and its arguments that make the operator again, for copies and pickles; or a function that returns them.
Recipe = tuple[Callable[..., Any], tuple[Any, ...]] | Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]

Parts = Mapping[str, "nn.Module | Tensor | None"]  # of an operator as a module, by name
RowsOf = Callable[[Selection], "LinearOperator"]


@dataclass
class _Body:
    """The state that A and Aᴴ share: two functions, two spaces, their source, and the operators made of them."""

    functions: tuple[Map, Map]
    spaces: tuple[Space, Space]
    source: Transposition | None = None
    linked: list[Linked | None] = field(default_factory=lambda: [None, None])  # of functions from outside
    is_unchecked: bool = False  # whether the adjoint is one that its user knows to be unchecked
    views: list[weakref.ref[LinearOperator] | None] = field(default_factory=lambda: [None, None])
    is_self_adjoint: bool = False  # whether A is its own adjoint
    transposes: list[LinearOperator | None] = field(default_factory=lambda: [None, None])
    notation: Notation | None = None  # of A in terms of its parts
    rows: tuple[RowsOf | None, RowsOf | None] = (None, None)  # from rows of the result to the operators of them
    main: int = 0  # the side that is written without ᴴ
    made: tuple[type[LinearOperator], Recipe] | None = None  # the class of that side, and how to make it again
    whole: grams.Whole | None = None  # of an operator made of others, once its gram was asked for
    root: tuple[LinearOperator, bool] | None = None  # A, and whether there is a W, of AᴴWA


class LinearOperator(nn.Module, Generic[X, Y]):
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

    derived_operator = True  # for the walk of what a function captures, which stops at operators
    _body: _Body
    _side: int
    _twin: LinearOperator | None

    def __init__(
        self, function: Callable[[X], Y], adjoint_function: Callable[[Y], X], domain: Space[X], codomain: Space[Y]
    ) -> None:
        made = LinearOperator, (LinearOperator, (function, adjoint_function, domain, codomain))
        self._set(_Body((function, adjoint_function), (domain, codomain), made=made), {})
        twin = self.H
        k = domain.batch_dims
        self._body.linked[0] = Linked(self._leaves_of_function, twin._plain_leaves, k)
        self._body.linked[1] = Linked(twin._leaves_of_function, self._plain_leaves, k)

    def _set(self, body: _Body, parts: Parts) -> None:
        self._view(body, body.main, parts)
        twin = LinearOperator.__new__(LinearOperator)
        twin._view(body, 1 - body.main, parts)  # made now: torch.compile cannot make modules
        self.__dict__["_twin"] = twin

    def _view(self, body: _Body, side: int, parts: Parts) -> None:
        super().__init__()
        # The body is no submodule, nor is the twin: A and Aᴴ know each other, and a module tree has no cycles. Neither
        # has memory: A holds Aᴴ, which does not hold A, so that both are freed with the last name of them.
        self._body, self._side, self.__dict__["_twin"] = body, side, None
        body.views[side] = weakref.ref(self)
        for name, part in parts.items():
            setattr(self, name, part)

    @classmethod
    def _of(cls, body: _Body, recipe: Recipe, parts: Parts) -> Self:
        body.made = cls, recipe
        operator = cls.__new__(cls)
        operator._set(body, parts)
        return operator

    @classmethod
    def of_source(
        cls,
        source: Transposition,
        recipe: Recipe,
        modules: dict[str, nn.Module],
        *,
        side: int = 0,
        notation: Notation | None = None,
        rows: RowsOf | None = None,
    ) -> Self:
        """Return the operator of a map that is already derived, or (``side=1``) its adjoint; without an offset."""
        inside = {id(parameter) for module in modules.values() for parameter in module.parameters()}
        outside = [p for p in source.tensors() if isinstance(p, nn.Parameter) and id(p) not in inside]
        named = {f"parameter_{index}": parameter for index, parameter in enumerate(outside)}  # of no module
        return cls.of_parts(source, recipe, {**modules, **named}, side=side, notation=notation, rows=rows)

    @classmethod
    def of_parts(
        cls,
        source: Transposition,
        recipe: Recipe,
        parts: Parts,
        *,
        side: int,
        notation: Notation | None,
        rows: RowsOf | None = None,
    ) -> Self:
        """Return the operator of a derived map with modules, and with parameters that are in none, by name."""
        function = source.linear if source.options.affine else source.function
        body = _Body((function, source.adjoint), (source.domain, source.codomain), source, notation=notation, main=side)
        body.rows = rows, None
        operator = cls._of(body, recipe, parts)
        for name, part in parts.items():
            if isinstance(part, Tensor):
                source.follow(part, name, (operator, operator.H))
        return operator

    @property
    def _parts(self) -> Parts:
        return {**self._modules, **self._parameters}

    @property
    def source(self) -> Transposition | None:
        """The derivation of the functions; None for an operator made of others, or of a pair of functions."""
        return self._body.source

    @property
    def is_unchecked(self) -> bool:
        """Whether the adjoint was given from outside, with ``check=False``."""
        return self._body.is_unchecked

    def use_unchecked(self, make: Callable[..., LinearOperator]) -> None:
        """Note that the adjoint is unchecked, for copies by ``make`` as well."""
        self._body.is_unchecked = True
        self.made_by(make, *self.recipe[1])

    def made_by(self, make: Callable[..., LinearOperator], *arguments: Any) -> None:
        """Have copies made by a function of arguments."""
        self._body.made = type(self), (make, arguments)

    def use_as_adjoint(self) -> None:
        """Note that A is its own adjoint."""
        self._body.is_self_adjoint, self.__dict__["_twin"] = True, None

    @property
    def _recipe(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self._side != self._body.main:
            return adjoint_of, (self.H,)
        assert self._body.made is not None
        recipe = self._body.made[1]
        return recipe() if callable(recipe) else recipe

    @property
    def recipe(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The function that made the operator, of the algebra where it is of that, and its arguments."""
        function, arguments = self._recipe
        return (arguments[0], arguments[1:]) if function is made else (function, arguments)

    @property
    def parts(self) -> list[LinearOperator]:
        """The operators that this one, or its adjoint, is made of."""
        return [part for part in self._modules.values() if isinstance(part, LinearOperator)]

    @property
    def is_pair(self) -> bool:
        """Whether the operator is a pair of functions from outside."""
        return self._body.linked[0] is not None

    @property
    def domain(self) -> Space[X]:
        """The space of x in ``Ax``."""
        return self._body.spaces[self._side]

    @property
    def codomain(self) -> Space[Y]:
        """The space of ``Ax``."""
        return self._body.spaces[1 - self._side]

    if TYPE_CHECKING:

        def __call__(self, x: X) -> Y: ...  # noqa: D102

    def forward(self, x: X) -> Y:
        """Return ``Ax``; nothing is cast or broadcast: where x is not in the domain, raise ``SpaceMismatchError``."""
        function: Callable[[X], Y] = self._body.functions[self._side]
        linked = self._body.linked[self._side]
        if self._body.source is not None:
            return function(x)  # which checks x itself
        leaves = self.domain.leaves(x)
        if linked is not None and torch.compiler.is_compiling() and not linked.visible and differentiated(leaves):
            return uncompiled(self.forward, x)  # type: ignore[no-any-return]  # torch.compile sees no Function here
        with self.domain.without_autocast():
            # Where f and its adjoint are from outside, each is the other's derivative.
            if linked is None or not differentiated(leaves):
                return function(x)
            return self.codomain.unflatten(linked(leaves))

    def _leaves_of_function(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.codomain.leaves(self._body.functions[self._side](self.domain.unflatten(x)), "Ax")

    def _leaves(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self.codomain.leaves(self(self.domain.unflatten(x)))

    def _plain_leaves(self, y: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the leaves of A's image for the adjoint of A.H without weights, which is autograd's: ``W A W⁻¹ y``."""
        domain, codomain = self.domain, self.codomain
        return codomain.leaves(codomain.weigh(self(domain.unweigh(domain.unflatten(y)))))

    @property
    def H(self) -> LinearOperator[Y, X]:
        """The adjoint ``Aᴴ``, with ``⟨Ax, y⟩ = ⟨x, Aᴴy⟩`` (for the real part, where A is only real-linear).

        Between spaces with weights it is ``W_X⁻¹ Aᴴ W_Y``; autograd's derivative of A stays the one without weights.
        """
        if self._body.is_self_adjoint:
            return self  # type: ignore[return-value]  # X is Y
        twin, view = self._twin, self._body.views[1 - self._side]
        if twin is None and view is not None:
            twin = view()
        return self._made_twin() if twin is None else twin

    def _made_twin(self) -> LinearOperator[Y, X]:
        """Return the adjoint of an operator that has outlived the one that it was made with, and hold it."""
        body, side = self._body, 1 - self._side
        kind = body.made[0] if body.made and side == body.main else LinearOperator
        twin = kind.__new__(kind)
        twin._view(body, side, self._parts)
        self.__dict__["_twin"] = twin
        return twin

    @property
    def T(self) -> LinearOperator[Y, X]:
        """The transpose ``conj ∘ Aᴴ ∘ conj``, with ``Σ (Ax)ᵢ yᵢ = Σ xᵢ (Aᵀy)ᵢ``, both sums with weights if any."""
        twin = self._body.transposes[self._side]
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

    @property
    def engine(self) -> str:
        """The engine in force, ``"eager"``, ``"traced"`` or ``"compiled"``; for a sum or product, its slowest."""
        if self._body.source is not None:
            return self._body.source.explanation.engine
        engines = {part.engine for part in self.parts}
        return next((name for name in ("eager", "traced", "compiled") if name in engines), "eager")

    def compile(self, *, autotune: bool = False, **options: Any) -> Self:  # type: ignore[override]
        """Switch A and ``A.H`` to the compiled engine in place, and return A.

        Parameters
        ----------
        autotune : bool
            Whether to choose convolution kernels by a thorough measurement.
        **options
            For ``torch.compile``.

        Returns
        -------
        LinearOperator
            A itself; where compilation is not possible, ``A.explain()`` says why, and the engine stays as it was.
        """
        if self._body.source is not None:
            self._body.source.switch("compiled", autotune=autotune, options=options)
        for part in self.parts:
            part.compile(autotune=autotune, **options)
        return self

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Take all that A depends on as it is on entry, within a block: nothing is looked at again at each call.

        Tensors are read once, and so are the guards. Solvers do this by themselves.

        Examples
        --------
        >>> import torch
        >>> from adjointlab import linear_operator
        >>> c = torch.nn.Conv1d(1, 1, 3, padding=1, bias=False).requires_grad_(False)
        >>> A, x = linear_operator(c, (1, 1, 8)), torch.ones(1, 1, 8)
        >>> with A.frozen():
        ...     for _ in range(3):
        ...         x = x - 0.1 * A.H(A(x))
        """
        with contextlib.ExitStack() as stack:
            for part in self.modules():
                if isinstance(part, LinearOperator):
                    root = part._body.root
                    for source in (part.source, root and grams.as_one(root[0])):
                        stack.enter_context(source.frozen() if source else contextlib.nullcontext())
            yield

    def refresh(self) -> Self:
        """Derive A again from the map as it is now, after a change that ``explain()`` says is not watched; return A."""
        if self._body.source is not None:
            self._body.source.refresh()
        for part in self.parts:
            part.refresh()
        return self

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

    def residual_and_gradient(self, x: Any, y: Any, weight: Any, *, residual: bool) -> tuple[Any, Any] | None:
        """Return ``Ax − y`` if asked for, and ``Aᴴ w ⊙ (Ax − y)``: from one graph where A is derived, else None."""
        source = self._body.source
        if source is None or self._side or source.options.affine:  # the graph of an affine map has its offset
            return None
        return source.residual_and_gradient(x, y, weight, residual=residual)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move parameters, buffers and spaces together; ``.to``, ``.double`` and ``.cuda`` call this method."""
        body = self._body
        spaces = tuple(moved(space, fn) for space in body.spaces)  # first: a weight may refuse to be moved
        body.transposes, body.whole = [None, None], None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        body.spaces = spaces  # type: ignore[assignment]
        if body.source is not None:
            body.source.move(fn)
            body.spaces = (body.source.domain, body.source.codomain)
        elif self.parts:  # which have moved, each in its way: .double() leaves complex tensors as they are
            function, arguments = (self if self._side == body.main else self.H)._recipe
            body.spaces = function(*arguments)._body.spaces
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return *self._recipe, self.training

    def __setstate__(self, training: bool) -> None:
        self.training = training  # of this module alone: parts bring their own


# -- the algebra: pairs of closures, late-bound so that a part may move -----------------------------------------------


def derived(
    function: Map, adjoint_function: Map, domain: Space, codomain: Space, recipe: Any, *parts: nn.Module,
    notation: Notation | None = None, rows: tuple[RowsOf | None, RowsOf | None] = (None, None),
) -> LinearOperator:  # fmt: skip
    """Return the operator of two functions that apply the operators and modules in ``parts``."""
    # Rows of A, and of Aᴴ, are made by ``rows``; where that is None, they are selected after.
    named = {f"operator_{index}": part for index, part in enumerate(parts)}
    body = _Body((function, adjoint_function), (domain, codomain), notation=notation, rows=rows)
    return LinearOperator._of(body, recipe, named)


def adjoint_of(operator: LinearOperator) -> LinearOperator:
    """Return ``Aᴴ``: the recipe of an adjoint."""
    return operator.H


def made(make: Callable[..., Made], *arguments: Any) -> LinearOperator:
    """Return the operator that the algebra makes of arguments."""
    return _of(make(*arguments), (made, (make, *arguments)))


def _of(parts: Made, recipe: Recipe) -> LinearOperator:
    return derived(
        parts.function, parts.adjoint, parts.domain, parts.codomain, recipe, *parts.operators, notation=parts.notation,
        rows=parts.rows,
    )  # fmt: skip


def product(a: LinearOperator, b: LinearOperator) -> LinearOperator:
    """Return ``AB``, which is its own adjoint where A is Bᴴ."""
    operator = _of(algebra.product(a, b), (product, (a, b)))
    if a._body is b._body and a._side != b._side:  # AAᴴ and AᴴA are their own adjoints
        operator.use_as_adjoint()
        grams.as_gram(operator, b)
    return operator


def _selector(space: Space, rows: Selection) -> LinearOperator:
    """Return ``y ↦ y[rows]``; its adjoint puts rows among zeros."""
    operator: LinearOperator = derived(
        rows, rows.scattered, space, rows.of(space), lambda: (_selector, (operator.domain, rows)),
        notation=Notation(meaning=str(rows)),
    )  # fmt: skip
    return operator
