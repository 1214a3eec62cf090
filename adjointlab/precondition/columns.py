"""Squared norms of an operator's columns, ``Σᵢ wᵢ |aᵢⱼ|²``: from its entries where they are known, else by probing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from adjointlab import algebra, blocks, operators
from adjointlab.blocks import diagonal_entries
from adjointlab.operators import LinearOperator
from adjointlab.space import Space
from adjointlab.transpose.passes.rows import NotByIndexError, Rows, TooLargeError

Leaves = tuple[Tensor, ...]

_MOST = 1 << 24  # entries of a matrix


def squared_norms(A: LinearOperator, weight: Any | None, domain: Space) -> Tensor | None:
    """Return ``Σᵢ wᵢ |aᵢⱼ|²`` for a domain of one tensor, None where the entries of A are not known."""
    codomain = A.codomain
    if len(domain.specs) > 1 or domain.is_sharded or not domain.specs[0].shape:
        return None
    spec, batch = domain.specs[0], domain.batch_shape
    try:
        matrices = _matrices(A, batch)
    except NotByIndexError:
        return None
    weights = [None] * len(matrices) if weight is None else codomain.leaves(weight, "weight")
    count = spec.numel // math.prod(batch)
    total = torch.zeros(math.prod(batch), count, dtype=torch.float64, device=spec.device)
    for rows, w in zip(matrices, weights, strict=True):
        if w is None:
            each = total.new_ones(1, len(rows.counts)).expand(len(total), -1)
        else:
            each = w.detach().real.double().reshape(len(total), -1)
        twice = _rows_with_sums(rows)
        if len(twice):
            several = rows.take(twice).compact(count)
            total += _sums(several, each.index_select(1, twice), count)
            each = each.index_fill(1, twice, 0)
        total += _sums(rows, each, count)
    return total.reshape(spec.shape)


def _sums(rows: Rows, weights: Tensor, count: int) -> Tensor:
    """Return the sums of weighted squares over columns, one line for each line of weights."""
    squares = rows.value.abs().double().square()
    lines = [squares * line.repeat_interleave(rows.counts) for line in weights]
    found: Tensor = torch.stack([torch.bincount(rows.column, line, count) for line in lines])
    return found


def _rows_with_sums(rows: Rows) -> Tensor:
    """Return the rows that may have several entries for one column: those whose columns do not rise."""
    falls = rows.column.diff() <= 0
    ends = rows.start[1:-1]
    falls[ends[(ends > 0) & (ends < len(rows.column))] - 1] = False
    found: Tensor = (torch.searchsorted(rows.start, falls.nonzero()[:, 0], right=True) - 1).unique()
    return found


def _matrices(A: LinearOperator, batch: tuple[int, ...]) -> list[Rows]:
    """Return the matrices of an operator, one for each leaf of the codomain."""
    if A._side and A.H is not A:
        return [_adjoint(rows, A.codomain) for rows in _matrices(A.H, batch)]
    if A.source is not None:
        return A.source.entries(batch, _MOST)
    made, arguments = A.recipe
    if made is blocks.diagonal and not A.domain.batch_dims:
        return [_single(leaf.detach().reshape(-1)) for leaf in A.domain.leaves(diagonal_entries(A))]
    if made is blocks.identity:
        spec = A.domain.specs[0]
        return [
            _single(torch.ones(spec.numel // math.prod(A.domain.batch_shape), dtype=spec.dtype, device=spec.device))
        ]
    if made is blocks.vstack:
        return [rows for part in arguments[0] for rows in _matrices(part, batch)]
    if made is algebra.multiple_of and not isinstance(arguments[0], Tensor):
        return [rows.of(rows.start, rows.column, arguments[0] * rows.value) for rows in _matrices(arguments[1], batch)]
    if made is operators.product:
        outer, inner = (_matrices(part, batch) for part in arguments)
        if len(inner) == 1:
            return [_product(rows, inner[0]) for rows in outer]
    raise NotByIndexError("another composition")


def _adjoint(rows: Rows, space: Space) -> Rows:
    if len(space.specs) > 1:
        raise NotByIndexError("the adjoint of one of several inputs")
    found = rows.transposed(space.specs[0].numel // math.prod(space.batch_shape))
    return found.of(found.start, found.column, found.value.conj())


def _single(value: Tensor) -> Rows:
    at = torch.arange(len(value) + 1, device=value.device)
    return Rows(at, at[:-1].to(torch.int32), value, _MOST, is_single=True)


def _product(a: Rows, b: Rows) -> Rows:
    if a.is_single and len(a.value) == len(b.counts):
        return b.take(a.column.long()).scaled(a.value)
    if int((b.counts.index_select(0, a.column)).sum()) > _MOST:
        raise TooLargeError("too large for memory")
    return a.applied(b)


def probed_norms(
    gram: Callable[[Leaves], Leaves], space: Space, samples: int, generator: torch.Generator
) -> tuple[list[Tensor], float]:
    """Return the diagonal of a self-adjoint map, for all places of a batch, and its relative error."""
    # A vector that is ±1 at places that are apart and zero elsewhere, times its image, has at these places the entries
    # of the diagonal, but for what couples one to another. The error is that of one such vector with other signs.
    found = [torch.zeros(s.shape, dtype=torch.float64, device=s.device) for s in space.specs]
    gap = size = 0.0
    for at, (total, spec) in enumerate(zip(found, space.specs, strict=True)):
        period = _period(spec.shape[space.batch_dims :], samples)
        for number, place in enumerate(_combs(spec.shape, space.batch_dims, period)):
            estimates = [_seen(gram, space, at, place, generator) for _ in range(1 if number else 2)]
            total[place] = sum(estimates) / len(estimates)
            if not number:
                gap += float((estimates[0] - estimates[1]).square().sum()) / 2
                size += float(total[place].square().sum())
    return found, math.sqrt(gap / size) if size else 0.0


def _period(sizes: Sequence[int], samples: int) -> int:
    """Return the largest distance of places for which so many vectors do."""
    period = 1
    while period < max(sizes, default=1) and _count(sizes, period + 1) <= samples:
        period += 1
    return period


def _count(sizes: Sequence[int], period: int) -> int:
    return math.prod(len(_shifts(n, period)) for n in sizes)


def _shifts(n: int, period: int) -> list[Tensor]:
    """Return sets of places from 0 to n that are so far apart, also around the end, as many as cover all."""
    count = max(1, n // period)
    count -= 1 - count % 2  # aliases of undersampled data are n/2 or n/4 apart
    first = torch.arange(count + 1, device="cpu") * n // count
    return [place[place < first[1:]] for place in (first[:-1] + shift for shift in range(-(-n // count)))]


def _combs(shape: Sequence[int], batch_dims: int, period: int) -> Iterator[tuple[Any, ...]]:
    sizes = shape[batch_dims:]
    for places in itertools.product(*[_shifts(n, period) for n in sizes]):
        yield (*[slice(None)] * batch_dims, *(torch.meshgrid(*places, indexing="ij") if places else ()))


def _seen(
    gram: Callable[[Leaves], Leaves], space: Space, at: int, place: tuple[Any, ...], generator: torch.Generator
) -> Tensor:
    """Return the entries of the diagonal at some places of a leaf, as random signs there show them."""
    leaves = [torch.zeros(s.shape, dtype=s.dtype, device=s.device) for s in space.specs]
    shape = leaves[at][place].shape
    signs = torch.randint(0, 2, shape, generator=generator, device="cpu").mul_(2).sub_(1).to(leaves[at])
    leaves[at][place] = signs
    image = gram(tuple(leaves))[at][place]
    return (image.real * signs.real).double()
