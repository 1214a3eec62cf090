"""Affine operators: ``f(x) = Ax + b``, with linear part A and offset ``b = f(0)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, Unpack, overload

from torch import Tensor, nn

from adjointlab.derive import BuildOptions, from_source, options_of, require_linear, space_for, weighted_codomain
from adjointlab.errors import SpaceMismatchError
from adjointlab.notation import name_of, outline
from adjointlab.operators import LinearOperator
from adjointlab.space import Space
from adjointlab.space.selection import Selection, pieces, selection
from adjointlab.space.spec import OfContainer, OfDict, OfPair, OfTensor
from adjointlab.transpose import Options, Selected, Transposition
from adjointlab.typed import E, X, Y
from adjointlab.weighted import in_spaces

Operator: TypeAlias = "LinearOperator[X, Y] | AffineOperator[X, Y]"


class AffineOperator(nn.Module, Generic[X, Y]):
    """An affine map ``f(x) = Ax + b``; made by :func:`affine_operator`.

    Attributes
    ----------
    linear : LinearOperator
        ``A``, that is ``x ↦ f(x) − f(0)``, with the derived adjoint.
    """

    def __init__(self, linear: LinearOperator[X, Y], source: Transposition) -> None:
        super().__init__()
        self.linear = linear
        self._source = source

    @property
    def domain(self) -> Space[X]:
        """The space of x in ``f(x)``."""
        return self.linear.domain

    @property
    def codomain(self) -> Space[Y]:
        """The space of ``f(x)``."""
        return self.linear.codomain

    @property
    def offset(self) -> Y:
        """The element ``b = f(0)`` of the codomain, for the parameters as they are now."""
        offset: Y = self._source.function(self.domain.zeros())
        return offset

    @property
    def H(self) -> LinearOperator[Y, X]:
        """The adjoint of the linear part, ``Aᴴ``."""
        return self.linear.H

    @property
    def engine(self) -> str:
        """The engine in force, ``"eager"``, ``"traced"`` or ``"compiled"``."""
        return self.linear.engine

    def rows(self, index: Any, dim: int = 0) -> AffineOperator[X, Any]:
        """Return ``x ↦ f(x)[index]``, as :meth:`LinearOperator.rows` does for its linear part."""
        return self._selected(selection(index, dim, self.codomain))

    def split(self, n: int, dim: int = 0) -> list[AffineOperator[X, Any]]:
        """Return the operators of n pieces of the rows, as :meth:`LinearOperator.split` does for its linear part."""
        return [self._selected(piece) for piece in pieces(n, dim, self.codomain)]

    def _selected(self, rows: Selection) -> AffineOperator[X, Any]:
        function, plain, options = _arguments(self._source)
        return _rebuild(Selected(function, rows), plain, options, self.domain, rows.of(self.codomain))

    def explain(self) -> str:
        """Return the account of how the adjoint of the linear part was derived."""
        return self.linear.explain()

    def __getattr__(self, name: str) -> Any:
        """Return a module or parameter; where only linear operators have the attribute, say so."""
        if name in dir(LinearOperator):
            raise AttributeError(f"an affine operator has no {name!r}; its linear part has: f.linear.{name}")
        return super().__getattr__(name)

    if TYPE_CHECKING:

        def __call__(self, x: X) -> Y: ...  # noqa: D102

    def forward(self, x: X) -> Y:
        """Return ``f(x) = Ax + b``; where x is not an element of the domain, raise ``SpaceMismatchError``."""
        image: Y = self._source.function(x)
        return image

    def __matmul__(self, x: X) -> Y:
        return self(x)

    def __repr__(self) -> str:
        arrow = f"{outline(self.domain)} → {outline(self.codomain)}"
        return f"AffineOperator f, f(x) = A x + f(0): {arrow}\n  f = {name_of(self._source.callable)}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        domain, codomain = self.linear.domain, self.linear.codomain
        return _rebuild, (*_arguments(self._source), domain, codomain), self.training

    def __setstate__(self, training: bool) -> None:
        self.training = training


def require_operator(A: Any) -> None:
    """Raise unless A is a linear or affine operator."""
    if not isinstance(A, (LinearOperator, AffineOperator)):
        raise SpaceMismatchError(
            f"expected a LinearOperator or AffineOperator, got {type(A).__name__}: wrap it with al.linear_operator"
        )


def residual_and_gradient(
    A: Operator[Any, Any], x: Any, y: Any, weight: Any, *, residual: bool
) -> tuple[Any, Any] | None:
    """Return ``f(x) − y`` if asked for, and ``Aᴴ w ⊙ (f(x) − y)``: from one graph, or None where none is to run."""
    if isinstance(A, AffineOperator):
        if A.linear.source is None:  # there are weights
            return None
        return A._source.residual_and_gradient(x, y, weight, residual=residual)
    return A.residual_and_gradient(x, y, weight, residual=residual)


@overload
def affine_operator(
    module_or_function: Callable[[Tensor, Tensor], Y], domain: OfPair, **options: Unpack[BuildOptions]
) -> AffineOperator[tuple[Tensor, Tensor], Y]: ...


@overload
def affine_operator(
    module_or_function: nn.Module, domain: OfTensor, **options: Unpack[BuildOptions]
) -> AffineOperator[Tensor, Tensor]: ...


@overload
def affine_operator(
    module_or_function: Callable[[Tensor], Y], domain: OfTensor, **options: Unpack[BuildOptions]
) -> AffineOperator[Tensor, Y]: ...


@overload
def affine_operator(
    module_or_function: Callable[[dict[str, Tensor]], Y], domain: OfDict, **options: Unpack[BuildOptions]
) -> AffineOperator[dict[str, Tensor], Y]: ...


@overload
def affine_operator(
    module_or_function: Callable[..., Y], domain: Space[E] | E, **options: Unpack[BuildOptions]
) -> AffineOperator[E, Y]: ...


@overload
def affine_operator(
    module_or_function: Callable[..., Y], domain: OfContainer, **options: Unpack[BuildOptions]
) -> AffineOperator[Any, Y]: ...


def affine_operator(
    module_or_function: Callable[..., Any],
    domain: Any,
    *,
    batch_dims: int = 0,
    kwargs: dict[str, Any] | None = None,
    engine: str = "auto",
    check: bool = True,
    lowering: bool = True,
    autotune: bool = False,
    derivative: str = "autograd",
    tol: float | None = None,
    budget: float = 20.0,
    progress: bool | None = None,
    codomain: Any = None,
) -> AffineOperator[Any, Any]:
    """Return ``f(x) = Ax + b`` with the derived adjoint of A: for a convolution with a bias, say.

    Parameters
    ----------
    module_or_function : nn.Module or callable
        An affine map; a linear one has the offset zero.
    domain, batch_dims, kwargs, engine, check, lowering, autotune, derivative, tol, budget, progress, codomain
        As in :func:`adjointlab.linear_operator`.

    Returns
    -------
    AffineOperator
        Callable, with ``.linear``, ``.offset`` and ``.H``.

    Raises
    ------
    NotLinearError
        If ``f(x) − f(0)`` is not linear.
    NotDifferentiableError
        If autograd's derivative is not the map's own.
    SpaceMismatchError
        If the domain is none, or does not fit the map.

    Examples
    --------
    >>> import torch
    >>> f = affine_operator(torch.nn.Linear(3, 2), (3,))
    >>> x = torch.ones(3)
    >>> torch.allclose(f(x), f.linear(x) + f.offset)
    True
    """
    options = Options(engine, True, lowering, autotune, derivative, tol, check, budget, progress)
    space = space_for(module_or_function, domain, batch_dims)
    source = Transposition(module_or_function, space.plain, kwargs, options, judge=require_linear)
    linear = from_source(source, lambda: (_rebuild_linear, _arguments(source)))
    return AffineOperator(in_spaces(linear, space, weighted_codomain(linear, codomain)), source)


def _arguments(source: Transposition) -> tuple[Callable[..., Any], Space, dict[str, Any]]:
    return source.callable, source.domain, options_of(source)


def _rebuild(
    function: Callable[..., Any], plain: Space, options: dict[str, Any], domain: Space, codomain: Space
) -> AffineOperator:
    f = affine_operator(function, plain, **options)
    return AffineOperator(in_spaces(f.linear, domain, codomain), f._source)


def _rebuild_linear(function: Callable[..., Any], plain: Space, options: dict[str, Any]) -> LinearOperator:
    return affine_operator(function, plain, **options).linear
