"""A and Aᴴ as one: the state that they share, and each as a module of PyTorch that is called, moved and copied."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self

import torch
from torch import Tensor, nn

from adjointlab import grams
from adjointlab.algebra import Map, Operator, RowsOf
from adjointlab.compat import differentiated, uncompiled
from adjointlab.linked import Linked
from adjointlab.notation import Notation
from adjointlab.space import Space
from adjointlab.space.algebra import moved
from adjointlab.transpose import Transposition
from adjointlab.typed import X, Y

Made = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its arguments that make an operator again
Recipe = Made | Callable[[], Made]  # for copies and pickles; a function returns what these are by then
Parts = Mapping[str, nn.Module | Tensor | None]  # of an operator as a module, by name


@dataclass(eq=False)
class Body:
    """The state that A and Aᴴ share: two functions, two spaces, their source, and the operators made of them."""

    functions: tuple[Map, Map]
    spaces: tuple[Space, Space]
    source: Transposition | None = None
    linked: list[Linked | None] = field(default_factory=lambda: [None, None])  # of functions from outside
    is_unchecked: bool = False  # whether the adjoint is one that its user knows to be unchecked
    views: list[weakref.ref[Any] | None] = field(default_factory=lambda: [None, None])
    is_self_adjoint: bool = False
    transposes: list[Any] = field(default_factory=lambda: [None, None])
    notation: Notation | None = None  # of A in terms of its parts
    rows: tuple[RowsOf | None, RowsOf | None] = (None, None)  # from rows of the result to the operators of them
    apart: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)  # derivations seen to mix no batch
    main: int = 0  # the side that is written without ᴴ
    made: tuple[type[Any], Recipe] | None = None  # the class of that side, and how to make it again
    whole: grams.Whole | None = None  # of an operator made of others, once its gram was asked for
    root: tuple[Operator, bool] | None = None  # A, and whether there is a W, of AᴴWA


class Twin(nn.Module, Generic[X, Y]):
    """One of A and Aᴴ, which share a body: as a module with its spaces, parts and parameters, and its engine."""

    derived_operator = True  # for the walk of what a function captures, which stops at operators
    _body: Body
    _side: int
    _twin: Self | None
    plain: ClassVar[Any]  # the class of adjoints, whatever that of A is

    @classmethod
    def _of(cls, body: Body, recipe: Recipe, parts: Parts) -> Self:
        operator = cls.__new__(cls)
        operator._set(body, recipe, parts)
        return operator

    def _set(self, body: Body, recipe: Recipe, parts: Parts) -> None:
        body.made = type(self), recipe
        self._view(body, body.main, parts)
        twin = self.plain.__new__(self.plain)
        twin._view(body, 1 - body.main, parts)  # made now: torch.compile cannot make modules
        self.__dict__["_twin"] = twin

    def _view(self, body: Body, side: int, parts: Parts) -> None:
        super().__init__()
        # The body is no submodule, nor is the twin: A and Aᴴ know each other, and a module tree has no cycles. Neither
        # has memory: A holds Aᴴ, which does not hold A, so that both are freed with the last name of them.
        self._body, self._side, self.__dict__["_twin"] = body, side, None
        body.views[side] = weakref.ref(self)
        for name, part in parts.items():
            setattr(self, name, part)

    def _other(self) -> Any:
        """Return the other of A and Aᴴ, made anew and held where this one has outlived it."""
        body, side = self._body, 1 - self._side
        if body.is_self_adjoint:
            return self
        twin, view = self._twin, body.views[side]
        if twin is None and view is not None:
            twin = view()
        if twin is None:
            kind: Any = body.made[0] if body.made and side == body.main else self.plain
            twin = self.__dict__["_twin"] = kind.__new__(kind)
            twin._view(body, side, self._parts)
        return twin

    @property
    def _parts(self) -> Parts:
        return {**self._modules, **self._parameters}

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
        body = Body((function, source.adjoint), (source.domain, source.codomain), source, notation=notation, main=side)
        body.rows = rows, None
        operator = cls._of(body, recipe, parts)
        for name, part in parts.items():
            if isinstance(part, Tensor):
                source.follow(part, name, (operator, operator._other()))
        return operator

    @property
    def source(self) -> Transposition | None:
        """The derivation of the functions; None for an operator made of others, or of a pair of functions."""
        return self._body.source

    @property
    def is_unchecked(self) -> bool:
        """Whether the adjoint was given from outside, with ``check=False``."""
        return self._body.is_unchecked

    def use_unchecked(self, make: Callable[..., Operator]) -> None:
        """Note that the adjoint is unchecked, for copies by ``make`` as well."""
        self._body.is_unchecked = True
        self.made_by(make, *self._making[1])

    def made_by(self, make: Callable[..., Operator], *arguments: Any) -> None:
        """Have copies made by a function of arguments."""
        self._body.made = type(self), (make, arguments)

    @property
    def _making(self) -> Made:
        if self._side != self._body.main:
            return adjoint_of, (self._other(),)
        assert self._body.made is not None
        recipe = self._body.made[1]
        return recipe() if callable(recipe) else recipe

    @property
    def parts(self) -> list[Self]:
        """The operators that this one, or its adjoint, is made of."""
        return [part for part in self._modules.values() if isinstance(part, Twin)]  # type: ignore[misc]

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

    def residual_and_gradient(self, x: Any, y: Any, weight: Any, *, residual: bool) -> tuple[Any, Any] | None:
        """Return ``Ax − y`` if asked for, and ``Aᴴ w ⊙ (Ax − y)``: from one graph where A is derived, else None."""
        source = self._body.source
        if source is None or self._side or source.options.affine:  # the graph of an affine map has its offset
            return None
        return source.residual_and_gradient(x, y, weight, residual=residual)

    # -- how it is computed --------------------------------------------------------------------------------------------

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
                if isinstance(part, Twin):
                    root = part._body.root
                    for source in (part.source, root and grams.as_one(root[0])):
                        stack.enter_context(source.frozen() if source else contextlib.nullcontext())
            yield

    def require_apart(self, batch: tuple[int, ...], check: Callable[[], None]) -> None:
        """Call a check of whether A mixes a batch, which raises if so, unless it passed with what A computes now."""
        bodies = [part._body for part in self.modules() if isinstance(part, Twin)]
        now = [body.source.now(batch)[0] if body.source else body for body in bodies]
        if any(known not in self._body.apart for known in now):
            check()
            self._body.apart.update(now)

    def refresh(self) -> Self:
        """Derive A again from the map as it is now, after a change that ``explain()`` says is not watched; return A."""
        if self._body.source is not None:
            self._body.source.refresh()
        for part in self.parts:
            part.refresh()
        return self

    # -- being a module ------------------------------------------------------------------------------------------------

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
            function, arguments = (self if self._side == body.main else self._other())._making
            body.spaces = function(*arguments)._body.spaces
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments = self._making
        return function, arguments, self.training

    def __setstate__(self, training: bool) -> None:
        self.training = training  # of this module alone: parts bring their own


def adjoint_of(operator: Operator) -> Operator:
    """Return ``Aᴴ``: the recipe of an adjoint."""
    return operator.H
