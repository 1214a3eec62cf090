"""Arithmetic of batched vectors with one scalar per problem: ``⟨a, b⟩``, ``y ← y + αx``, ``y ← x + αy``.

A vector is a list of real tensors, one for each leaf (a complex leaf becomes pairs of real numbers), so that
``Re⟨·, ·⟩``, for which every derived adjoint is the adjoint, is a plain sum of products. A scalar is a ``float64``
tensor with the shape of the free leading dimensions: each entry of a batch is a separate problem.

Products of float32 are summed in single precision over blocks of 4096 entries, squares over 256, and the sums of the
blocks in double. The relative error of a squared norm is then about 1e-8, and up to 6e-7 where all entries are equal:
less is useless, since each iteration rounds every entry by 6e-8. ``vector_norm`` sums squares in one pass (0.02 ms at
512²; a sum in double takes 0.2 ms). Other products are summed piece by piece, so that no temporary has the size of a
vector. Products of two numbers of size 1e-19 underflow in float32; if the data are that small, or very large, every
product is computed in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adjointlab.space import Space

Vector = list[Tensor]

_BLOCK = 4096
_SQUARES = 256  # numbers whose squares vector_norm adds up: equal ones all round the same way
_PIECE = 1 << 17  # number of products in memory at a time
_SAFE = (1e-12, 1e12)  # sizes of entries whose products fit into float32, with room for six digits of convergence


def as_vector(leaves: Sequence[Tensor]) -> Vector:
    """Return real views of the leaves; a leaf is copied only if it is lazily conjugated or negated."""
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t.resolve_neg() for t in leaves]


class Vectors:
    """Arithmetic of elements of ``space`` whose free leading dimensions have the sizes ``batch``."""

    def __init__(self, space: Space, batch: tuple[int, ...]) -> None:
        self.space = space.with_batch(batch)
        self.batch = batch
        self.device = self.space.specs[0].device
        self.largest = min(torch.finfo(spec.dtype).max for spec in self.space.specs)
        self.wide = True  # until choose_precision has seen the size of the data

    def vector(self, element: Any) -> Vector:
        """Return an element as a vector, without a copy if possible."""
        return as_vector(self.space.leaves(element))

    def element(self, vector: Vector) -> Any:
        """Return a vector as an element that shares its memory."""
        pairs = zip(vector, self.space.specs, strict=True)
        return self.space.unflatten([torch.view_as_complex(v) if spec.is_complex else v for v, spec in pairs])

    def zeros(self) -> Vector:
        """Return the zero vector."""
        return self.vector(self.space.zeros())

    def copy(self, x: Vector) -> Vector:
        """Return a contiguous copy, which the caller may overwrite."""
        return [v.clone(memory_format=torch.contiguous_format) for v in x]

    def scalar(self, value: float) -> Tensor:
        """Return ``value`` for every problem."""
        return torch.full(self.batch, value, dtype=torch.float64, device=self.device)

    def choose_precision(self, *norms: Tensor) -> None:
        """Compute every product in double precision if entries of root mean square ``norm / √n`` need it."""
        if self.space.weight is not None:  # the norm does not tell the size of the entries
            return
        size = torch.stack(norms) / self.space.size**0.5
        self.wide = bool(((size > 0) & ~((size > _SAFE[0]) & (size < _SAFE[1]))).any())

    def dot(self, a: Vector, b: Vector) -> Tensor:
        """Return ``Re⟨a, b⟩`` for every problem, in the inner product of the space."""
        weight = self.space.weight
        if weight is None:
            return self._plain_dot(a, b)
        weighted = weight.times(self.space.leaves(self.element(b)), wide=True)
        total = self._plain_dot(a, as_vector(weighted))
        return total.clamp(min=0) if a is b else total

    def _plain_dot(self, a: Vector, b: Vector) -> Tensor:
        terms = []
        for u, v in zip(a, b, strict=True):
            flat_u, flat_v = u.reshape(*self.batch, -1), v.reshape(*self.batch, -1)
            wide = self.wide or torch.finfo(u.dtype).bits < 32 or u.dtype != v.dtype
            term = _squares(flat_u) if u is v and not wide else _products(flat_u, flat_v, wide)
            terms.append(term.to(self.device))
        return self.space.total(terms)

    def weigh(self, a: Vector) -> Vector:
        """Return ``Wa``; without a weight, a itself."""
        return a if self.space.weight is None else self.vector(self.space.weigh(self.element(a)))

    def unweigh(self, a: Vector) -> Vector:
        """Return ``W⁻¹a``; without a weight, a itself."""
        return a if self.space.weight is None else self.vector(self.space.unweigh(self.element(a)))

    def norm(self, a: Vector) -> Tensor:
        """Return ``‖a‖`` for every problem."""
        return self.dot(a, a).sqrt()

    def largest_entry(self, a: Vector) -> Tensor:
        """Return the largest absolute value for every problem, on this process."""
        entries = [v.abs().reshape(*self.batch, -1).amax(-1).to(self.device, torch.float64) for v in a]
        return torch.stack(entries).amax(0)

    def scale_to_one(self, a: Vector) -> float:
        """Return a power of two that brings vectors of extreme size to about one; 1 for all others."""
        # Products of three numbers that need no scale neither overflow nor underflow.
        if self.space.is_sharded:
            size = float(self._plain_dot(a, a).sqrt().amax()) / self.space.size**0.5
        else:
            size = float(self.largest_entry(a).amax())
        tiny = max(torch.finfo(spec.dtype).tiny for spec in self.space.specs)
        if size == 0 or not size < math.inf or tiny ** (1 / 3) <= size <= self.largest ** (1 / 3):
            return 1.0
        return 2.0 ** -round(math.log2(size))

    def holds(self, alpha: Tensor) -> Tensor:
        """Return the problems whose scalar is finite, also after a cast to the dtype of the vectors."""
        return alpha.abs() <= self.largest

    def add(self, y: Vector, alpha: Tensor, x: Vector) -> None:
        """Set ``y ← y + αx``."""
        for u, v in zip(y, x, strict=True):
            u.addcmul_(v, self._for(alpha, u))

    def update(self, y: Vector, x: Vector, alpha: Tensor) -> None:
        """Set ``y ← x + αy``, in one pass."""
        for u, v in zip(y, x, strict=True):
            torch.addcmul(v, u, self._for(alpha, u), out=u)

    def approach(self, y: Vector, alpha: Tensor, x: Vector) -> None:
        """Set ``y ← y + α(x − y)``, in one pass."""
        for u, v in zip(y, x, strict=True):
            u.lerp_(v, self._for(alpha, u))

    def plus(self, y: Vector, alpha: Tensor, x: Vector) -> Vector:
        """Return ``y + αx``, in separate memory."""
        return [torch.addcmul(u, v, self._for(alpha, u)) for u, v in zip(y, x, strict=True)]

    def scaled(self, x: Vector, alpha: Tensor) -> Vector:
        """Return ``αx``, in separate memory."""
        return [v * self._for(alpha, v) for v in x]

    def scale(self, y: Vector, alpha: Tensor) -> None:
        """Set ``y ← αy``."""
        for u in y:
            u.mul_(self._for(alpha, u))

    def fill(self, y: Vector, where: Tensor, value: float = 0) -> None:
        """Set ``y ← value`` in the problems ``where``, even if y is NaN there."""
        for u in y:
            u.masked_fill_(where.to(u.device).reshape(self.batch + (1,) * (u.ndim - len(self.batch))), value)

    def _for(self, alpha: Tensor, like: Tensor) -> Tensor:
        alpha = alpha.to(device=like.device, dtype=like.dtype)
        return alpha.reshape(self.batch + (1,) * (like.ndim - len(self.batch))) if self.batch else alpha


def times(x: Vector, factor: float) -> Vector:
    """Return ``cx`` for a number c; x itself for one."""
    return x if factor == 1 else [factor * v for v in x]


def _squares(u: Tensor) -> Tensor:
    """Return ``Σ u²`` over the last dimension, in double."""
    whole = u.shape[-1] - u.shape[-1] % _BLOCK
    if u.dtype == torch.float64:
        norm: Tensor = torch.linalg.vector_norm(u, dim=-1)
        return norm.square()
    if not whole:
        return _products(u, u, wide=True)
    norms = torch.linalg.vector_norm(u[..., :whole].unflatten(-1, (-1, _SQUARES)), dim=-1)
    total: Tensor = norms.double().square().sum(-1)
    return total if whole == u.shape[-1] else total + _products(u[..., whole:], u[..., whole:], wide=True)


def _products(u: Tensor, v: Tensor, wide: bool) -> Tensor:
    """Return ``Σ uv`` over the last dimension, in double precision; ``wide`` also computes the products in double."""
    problems = max(1, u.shape[:-1].numel())
    length = max(1, _PIECE // problems)
    length = length - length % _BLOCK or length
    total = u.new_zeros(u.shape[:-1], dtype=torch.float64)
    for a, b in zip(u.split(length, -1), v.split(length, -1), strict=True):
        if wide or a.shape[-1] % _BLOCK or u.dtype == torch.float64:
            total = total + torch.linalg.vecdot(a.double(), b.double())
        else:
            blocks = torch.linalg.vecdot(a.unflatten(-1, (-1, _BLOCK)), b.unflatten(-1, (-1, _BLOCK)))
            total = total + blocks.sum(-1, dtype=torch.float64)
    return total
