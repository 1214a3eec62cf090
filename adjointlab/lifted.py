"""Operators made of one on smaller or other elements: on every slice, Kronecker products, complex elements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from adjointlab.errors import SpaceMismatchError
from adjointlab.notation import POWER, PRODUCT, Notation
from adjointlab.operators import LinearOperator, Map, derived
from adjointlab.space import Space, TensorSpec
from adjointlab.space.algebra import require_whole, weighted_like
from adjointlab.tree import SINGLE, map_leaves
from adjointlab.weighted import operator_of


def map(A: LinearOperator[Any, Any], dim: int = 0, size: int | None = None) -> LinearOperator[Any, Any]:
    """Return ``(x₁, …, xₙ) ↦ (Ax₁, …, Axₙ)`` on the slices of tensors along a dimension; its adjoint is that of Aᴴ.

    All slices are computed at once, by ``torch.func.vmap``; one after the other where A is a function that PyTorch
    cannot see through.

    Parameters
    ----------
    A : LinearOperator
        The operator of one slice.
    dim : int
        Where the dimension of slices is put into each leaf; may be negative.
    size : int, optional
        Number of slices, of a dimension behind the free ones of A. If not given, the dimension of slices is free, too,
        and the first.

    Returns
    -------
    LinearOperator
        From stacks of elements of the domain to stacks of elements of the codomain.

    Raises
    ------
    SpaceMismatchError
        If A is not an operator, or the dimension or its size does not fit.

    Examples
    --------
    >>> import torch
    >>> import adjointlab as al
    >>> A = al.map(al.linear_operator(lambda x: x.diff(), (4,)), dim=1, size=3)
    >>> A(torch.arange(12.0).reshape(4, 3)).shape
    torch.Size([3, 3])
    """
    _require_operators("al.map", A)
    if size is not None and (type(size) is not int or size < 1):
        raise SpaceMismatchError(f"expected size to be an integer of 1 or more, got {size!r}")
    if size is None and dim != 0:
        raise SpaceMismatchError(
            f"expected the number of slices for dim={dim}, got none: pass size=…; only the first dimension may be free"
        )
    return derived(
        _at_slices(A, dim), _at_slices(A.H, dim), _stacked(A.domain, dim, size), _stacked(A.codomain, dim, size),
        (map, (A, dim, size)), A, notation=Notation("map({})"),
    )  # fmt: skip


def _stacked(space: Space, dim: int, size: int | None) -> Space:
    """Return the space of stacks of elements along a new dimension, which is free if it has no size."""
    require_whole(space, "al.map")
    specs, first = [], 0 if size is None else space.batch_dims
    for spec in space.specs:
        place = dim if dim >= 0 else len(spec.shape) + 1 + dim
        if not first <= place <= len(spec.shape):
            raise SpaceMismatchError(
                f"expected dim from {first} to {len(spec.shape)} for elements of {space}, got {dim}: "
                "slices of a given number are stacked behind the free dimensions"
            )
        specs.append(replace(spec, shape=(*spec.shape[:place], size or 1, *spec.shape[place:])))

    def entries(w: Tensor, spec: TensorSpec) -> Tensor:
        return w if size is None else _of_all(w, spec.shape[first:]).unsqueeze(dim if dim < 0 else dim - first)

    plain = Space(tuple(specs), space.structure, space.batch_dims + (size is None))
    return weighted_like(plain, (space,), entries, lambda W: map(operator_of(W), dim, size))


def _of_all(w: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the weight of a leaf with all of its dimensions, some of size one."""
    return w.reshape((1,) * (len(shape) - w.ndim) + tuple(w.shape))


def _at_slices(A: LinearOperator, dim: int) -> Map:
    """Return the map that applies an operator to every slice."""

    def one_by_one(x: Any) -> Any:
        slices = zip(*[leaf.unbind(dim) for leaf in A.domain.structure.leaves(x) or ()], strict=True)
        images = [A(A.domain.unflatten(parts)) for parts in slices]
        return map_leaves(lambda *leaves: torch.stack(leaves, dim), *images)

    at_once: Map = torch.func.vmap(A, in_dims=dim, out_dims=dim)
    return at_once if _is_seen(A) else one_by_one


def _is_seen(A: LinearOperator) -> bool:
    """Return whether PyTorch sees through an operator, so that transforms apply to it."""
    if A.source is not None:
        return A.engine != "eager"
    return not A.is_pair and all(_is_seen(part) for part in A.parts)


def kron(A: LinearOperator[Tensor, Tensor], B: LinearOperator[Tensor, Tensor]) -> LinearOperator[Tensor, Tensor]:
    """Return ``A ⊗ B``: A along the first dimensions of a tensor and B along the last; its adjoint is ``Aᴴ ⊗ Bᴴ``.

    For images, A and B on vectors, that is ``X ↦ A X Bᵀ``.

    Parameters
    ----------
    A, B : LinearOperator
        Operators between single tensors of one dtype, without free dimensions; A maps what B returns.

    Returns
    -------
    LinearOperator
        From tensors of the shape ``(*a, *b)``, for elements of A and B of the shapes ``a`` and ``b``.

    Raises
    ------
    SpaceMismatchError
        If A or B is not an operator between such spaces.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import linear_operator
    >>> D = linear_operator(lambda x: x.diff(), (4,))
    >>> kron(D, D)(torch.ones(4, 4)).shape
    torch.Size([3, 3])
    """
    _require_operators("al.kron", A, B)
    for space in (A.domain, A.codomain, B.domain, B.codomain):
        require_whole(space, "al.kron")
        if space.structure is not SINGLE or space.batch_dims:
            raise SpaceMismatchError(
                f"expected al.kron of operators between single tensors with batch_dims=0, got one on {space}: use "
                "al.slicewise for the dimensions of a batch"
            )
    if A.domain.specs[0].dtype != B.codomain.specs[0].dtype or A.domain.specs[0].device != B.codomain.specs[0].device:
        raise SpaceMismatchError(
            f"expected A to map the dtype and device that B returns, got {A.domain} and {B.codomain}: move one with "
            ".to(…)"
        )
    a, b, c, d = (space.specs[0].shape for space in (A.domain, A.codomain, B.domain, B.codomain))
    columns, columns_back, rows, rows_back = (
        _at_slices(operator, dim) for operator, dim in ((A, -1), (A.H, -1), (B, 0), (B.H, 0))
    )
    return derived(
        lambda x: columns(rows(x.reshape(-1, *c)).reshape(*a, -1)).reshape(*b, *d),
        lambda y: rows_back(columns_back(y.reshape(*b, -1)).reshape(-1, *d)).reshape(*a, *c),
        _products(A.domain, B.domain, B.domain), _products(A.codomain, B.codomain, A.codomain),
        (kron, (A, B)), A, B, notation=Notation("{} ⊗ {}", PRODUCT, POWER),
    )  # fmt: skip


def _products(left: Space, right: Space, like: Space) -> Space:
    """Return the space of tensors with the dimensions of both spaces, of the dtype of one."""
    (a,), (b,) = left.specs, right.specs
    if a.dtype != b.dtype and not all(s.weight is None or s.weight.is_diagonal for s in (left, right)):
        raise SpaceMismatchError(
            f"expected al.kron of operators between spaces of one dtype, where a weight is an operator, got {left} and "
            f"{right}: use weights that are numbers"
        )
    plain = Space((replace(like.specs[0], shape=(*a.shape, *b.shape)),))

    def entries(v: Tensor, w: Tensor, *_: TensorSpec) -> Tensor:
        return v.reshape(*v.shape, *[1] * len(b.shape)) * w

    return weighted_like(plain, (left, right), entries, lambda V, W: kron(operator_of(V), operator_of(W)))


def complexify(A: LinearOperator[Any, Any]) -> LinearOperator[Any, Any]:
    """Return ``x ↦ A(Re x) + i A(Im x)``, a real operator on complex elements; its adjoint is that of Aᴴ.

    For maps that PyTorch has for real tensors only, such as ``torch.nn.functional.grid_sample``.

    Parameters
    ----------
    A : LinearOperator
        An operator between real spaces.

    Returns
    -------
    LinearOperator
        Between the complex spaces of the same shapes; it is complex-linear.

    Raises
    ------
    SpaceMismatchError
        If A is not an operator between real spaces, or PyTorch has no complex numbers of its dtype.

    Examples
    --------
    >>> import torch
    >>> from adjointlab import linear_operator
    >>> A = complexify(linear_operator(torch.nn.AvgPool1d(2), (1, 4)))
    >>> A(torch.tensor([[1 + 1j, 1 - 1j, 2j, 4j]]))
    tensor([[1.+0.j, 0.+3.j]])
    """
    _require_operators("al.complexify", A)
    return derived(
        _apart(A), _apart(A.H), _complex(A.domain), _complex(A.codomain), (complexify, (A,)), A,
        notation=Notation("complexify({})"),
    )  # fmt: skip


def _apart(A: LinearOperator) -> Map:
    """Return the map that applies a real operator to real and imaginary parts."""

    def function(x: Any) -> Any:
        real, imaginary = (
            A(map_leaves(lambda leaf, part=part: part(leaf.resolve_conj()).contiguous(), x))
            for part in (torch.real, torch.imag)
        )
        return map_leaves(torch.complex, real, imaginary)

    return function


_COMPLEX = {torch.float16: torch.complex32, torch.float32: torch.complex64, torch.float64: torch.complex128}


def _complex(space: Space) -> Space:
    """Return the space of complex elements of the same shapes."""
    require_whole(space, "al.complexify")
    if not all(spec.dtype in _COMPLEX for spec in space.specs):
        raise SpaceMismatchError(
            f"expected an operator between real spaces of {', '.join([str(dtype) for dtype in _COMPLEX])}, got one on "
            f"{space}: PyTorch has no complex numbers of this dtype"
        )
    specs = tuple([replace(s, dtype=_COMPLEX[s.dtype]) for s in space.specs])
    plain = Space(specs, space.structure, space.batch_dims)
    return weighted_like(plain, (space,), lambda w, _: w, lambda W: complexify(operator_of(W)))


def _require_operators(name: str, *operators: Any) -> None:
    for operator in operators:
        if not isinstance(operator, LinearOperator):
            raise SpaceMismatchError(
                f"expected {name} of linear operators, got {type(operator).__name__}: wrap it with al.linear_operator"
            )
