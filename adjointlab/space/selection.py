"""Rows of a tensor: ``y ↦ y[index]`` along one dimension, whose adjoint puts them among zeros."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adjointlab.errors import SpaceMismatchError
from adjointlab.space.space import Space
from adjointlab.tree import SINGLE

Rows = tuple[int, ...]


def window(rows: Rows) -> tuple[int, int, int] | None:
    """Return start, stop and step of rows that are evenly spaced and in order; None for others."""
    start, step = rows[0], rows[1] - rows[0] if len(rows) > 1 else 1
    stop = rows[-1] + 1
    return (start, stop, step) if step > 0 and rows == tuple(range(start, stop, step)) else None


def _nested(rows: Rows, size: int) -> tuple[int, slice, slice] | None:
    """Return the length of blocks, which of them, and which rows of each, if these are the same in all."""
    count = next((i for i in range(2, len(rows)) if rows[i] - rows[i - 1] != rows[1] - rows[0]), len(rows))
    each = rows[count] - rows[0] if count < len(rows) else 0
    if each <= 0 or size % each:
        return None
    blocks, inside = tuple(row // each for row in rows[::count]), tuple(row % each for row in rows[:count])
    if rows != tuple(block * each + row for block in blocks for row in inside):
        return None
    found = window(blocks), window(inside)
    return None if None in found else (each, slice(*found[0]), slice(*found[1]))  # type: ignore[misc]


@dataclass(frozen=True)
class Selection:
    """The rows of a tensor along a dimension, in their order; a single one may lose that dimension, as ``y[3]`` does.

    ``size`` is how many there are to choose from.
    """

    dim: int
    rows: Rows
    size: int
    drops: bool = False
    _window: Any = field(init=False, repr=False, compare=False)
    _nested: Any = field(init=False, repr=False, compare=False)
    _index: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found = window(self.rows)
        nested = None if found else _nested(self.rows, self.size)
        index = None if found or nested else torch.tensor(self.rows)
        vars(self).update(_window=found, _nested=nested, _index=index)  # it is frozen

    def __call__(self, y: Tensor) -> Tensor:
        """Return the rows of y: a view of it where they are evenly spaced."""
        before = (slice(None),) * self.dim
        if self._window is not None:
            found = y[(*before, slice(*self._window))]
        elif self._nested is not None:  # copied by blocks, which is faster than row by row
            each, blocks, inside = self._nested
            found = y.unflatten(self.dim, (-1, each))[(*before, blocks, inside)].flatten(self.dim, self.dim + 1)
        else:
            found = y.index_select(self.dim, self._index.to(y.device))
        return found.squeeze(self.dim) if self.drops else found

    def scattered(self, part: Tensor) -> Tensor:
        """Return the tensor with these rows, and zeros elsewhere; rows that are chosen several times are added."""
        part = part.unsqueeze(self.dim) if self.drops else part
        shape = (*part.shape[: self.dim], self.size, *part.shape[self.dim + 1 :])
        return part.new_zeros(shape).index_add(self.dim, torch.tensor(self.rows, device=part.device), part)

    def of(self, space: Space) -> Space:
        """Return the space of the rows of its elements."""
        (spec,) = space.specs
        count = () if self.drops else (len(self.rows),)
        shape = (*spec.shape[: self.dim], *count, *spec.shape[self.dim + 1 :])
        rows = replace(space, specs=(replace(spec, shape=shape),), weight=None)
        if space.weight is None:
            return rows
        if not space.weight.is_diagonal:
            raise SpaceMismatchError(
                f"expected rows of a space whose weights are numbers, got {space}: its weight is an operator, which "
                "does not act on rows by themselves"
            )
        (entries,), k = space.weight.entries, space.batch_dims
        return Space.of(rows, weight=self(entries.expand(spec.shape))[(0,) * k], batch_dims=k)

    def __str__(self) -> str:
        if self.drops:
            return f"row {self.rows[0]} along dimension {self.dim}"
        few, at = window(self.rows), list(self.rows[:4])
        if few is None:
            text = f"[{', '.join(map(str, at))}{', …' * (len(self.rows) > len(at))}]"
        else:
            text = f"{few[0]}:{few[1]}" + f":{few[2]}" * (few[2] > 1)
        return f"rows {text} along dimension {self.dim}"


def selection(index: Any, dim: int, space: Space) -> Selection:
    """Return the rows that an index means of the elements of a space; raise where it means none."""
    dim, n = _dimension(dim, space)
    if isinstance(index, slice):
        return _selected(dim, range(n)[index], n)
    if isinstance(index, Tensor):
        index = index.detach().cpu().numpy()
    if not isinstance(index, (bool, str, bytes)) and hasattr(index, "__index__") and not getattr(index, "shape", ()):
        return _selected(dim, [index], n, drops=True)
    array = torch.as_tensor(_listed(index))
    whole = not (array.is_floating_point() or array.is_complex() or array.dtype == torch.uint8)  # a mask, to torch
    if array.ndim != 1 or (array.numel() and not whole):
        raise IndexError(
            f"expected rows as a slice, a list or tensor of integers, or a mask, all of one dimension, got {index!r}"
        )
    if array.dtype == torch.bool:
        if len(array) != n:
            raise IndexError(
                f"expected a mask of {n} entries, one for each row along dimension {dim}, got {len(array)}"
            )
        array = array.nonzero()[:, 0]
    return _selected(dim, array.tolist(), n)


def pieces(n: int, dim: int, space: Space) -> list[Selection]:
    """Return ``n`` pieces of the rows along a dimension, one after the other, as ``torch.tensor_split`` cuts them."""
    dim, size = _dimension(dim, space)
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= size:
        raise ValueError(
            f"expected a number of pieces from 1 to {size}, the number of rows along dimension {dim}, got {n!r}"
        )
    return [Selection(dim, tuple(part.tolist()), size) for part in torch.arange(size).tensor_split(n)]


def _listed(index: Any) -> Any:
    if hasattr(index, "__array__"):
        return index
    if not isinstance(index, (list, tuple, range)):
        raise IndexError(
            f"expected rows as a slice, a list or tensor of integers, or a mask, got {type(index).__name__}"
        )
    return list(index)


def _dimension(dim: int, space: Space) -> tuple[int, int]:
    """Return a dimension of a space of tensors, counted from the first, and its size."""
    if space.structure is not SINGLE and space.structure != SINGLE:
        raise SpaceMismatchError(
            f"expected a codomain of one tensor, got {space}: take the rows of a part, or of a map that returns one "
            "tensor"
        )
    if space.is_sharded:
        raise SpaceMismatchError(
            f"expected a codomain on one process, got {space}: build the map of the rows by itself"
        )
    shape, k = space.specs[0].shape, space.batch_dims
    at = operator.index(dim) + len(shape) * (dim < 0)
    if not 0 <= at < len(shape):
        raise SpaceMismatchError(f"expected a dimension of the shape {shape}, got dim={dim}")
    if at < k:
        raise SpaceMismatchError(
            f"expected a dimension behind the {k} of the batch, which have any size, got dim={dim} of {space}: choose "
            f"dim={k} or more"
        )
    return at, shape[at]


def _selected(dim: int, index: Sequence[int], n: int, *, drops: bool = False) -> Selection:
    rows = tuple(map(operator.index, index))
    if not rows:
        raise IndexError(f"expected at least one of the {n} rows along dimension {dim}, got none")
    wrong = next((row for row in rows if not -n <= row < n), None)
    if wrong is not None:
        raise IndexError(
            f"expected rows from {-n} to {n - 1} along dimension {dim}, which has {n} of them, got {wrong}"
        )
    return Selection(dim, tuple(row % n for row in rows), n, drops)
