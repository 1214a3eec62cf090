"""Linear operations of every kind, by name: each makes itself for a tensor of a given shape and dtype.

An operation takes a `Draw` and returns a function of one tensor; those on trees take the list of leaves. It may raise
`UnsuitableError`, or torch may refuse the function that it returned: the generator then draws again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Function = Callable[[Any], Any]


class UnsuitableError(Exception):
    """The operation cannot take what it was given."""


class Draw:
    """Random numbers for an operation on a tensor of a given shape and dtype."""

    def __init__(self, rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.rng, self.shape, self.dtype = rng, shape, dtype
        self.generator = torch.Generator().manual_seed(rng.getrandbits(32))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def integer(self, low: int, high: int) -> int:
        if high < low:
            raise UnsuitableError
        return self.rng.randint(low, high)

    def choice(self, *among: Any) -> Any:
        return self.rng.choice(among)

    def dim(self, at_least: int = 1) -> int:
        """Return a dimension of at least some size, counted from the front or from the back."""
        found = [d for d, n in enumerate(self.shape) if n >= at_least]
        if not found:
            raise UnsuitableError
        d = self.rng.choice(found)
        return d - len(self.shape) if self.rng.random() < 0.5 else d

    def order(self, n: int) -> list[int]:
        return self.rng.sample(range(n), n)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtype, generator=self.generator, device="cpu")

    def real(self, *shape: int) -> Tensor:
        return self.randn(*shape, dtype=self.dtype.to_real())

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) > 0.4

    def index(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator)

    def factors(self, count: int) -> tuple[int, ...]:
        """Return so many sizes whose product is the number of entries."""
        sizes, rest = [1] * count, self.numel
        for p in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59):
            while rest % p == 0:
                sizes[self.rng.randrange(count)] *= p
                rest //= p
        return tuple(sizes)

    def image(self, dims: int) -> tuple[int, ...]:
        """Return sizes `(batch, channels, *image)`."""
        batch_and_channels = self.choice(1, 1, 2)
        sizes = self.factors(dims + batch_and_channels - 1)
        return (1,) * (2 - batch_and_channels + 1) + sizes if batch_and_channels == 1 else (1, *sizes)


def require_real(draw: Draw) -> None:
    """Refuse complex tensors, of which autograd has no derivative of the operation."""
    if draw.dtype.is_complex:
        raise UnsuitableError


@dataclass(frozen=True)
class Operation:
    name: str
    make: Callable[[Draw], Function]
    on_tree: bool = False


TABLE: dict[str, Operation] = {}


def op(make: Callable[[Draw], Function]) -> Callable[[Draw], Function]:
    """Register an operation on a tensor under the name of the function that makes it."""
    name = make.__name__.strip("_")
    assert name not in TABLE
    TABLE[name] = Operation(name, make)
    return make


def tree_op(make: Callable[[Draw], Function]) -> Callable[[Draw], Function]:
    """Register an operation on the list of leaves, which returns any tree."""
    name = make.__name__.strip("_")
    assert name not in TABLE
    TABLE[name] = Operation(name, make, on_tree=True)
    return make


def plain(name: str, function: Callable[..., Any], **options: Any) -> None:
    """Register a function without constants."""
    assert name not in TABLE
    TABLE[name] = Operation(name, lambda draw: lambda x: function(x, **options))


def by_parts(draw: Draw, function: Function) -> Function:
    """Return a function of real tensors as one of complex ones: of the real and of the imaginary part."""
    if not draw.dtype.is_complex:
        return function
    return lambda x: torch.complex(function(x.real), function(x.imag))


def as_complex(draw: Draw, function: Function) -> Function:
    """Return a function of complex tensors as one of real ones, made complex in one of three ways."""
    if draw.dtype.is_complex:
        return function
    way = draw.choice("to", "complex", "unit")
    dtype = draw.dtype.to_complex()
    if way == "to":
        return lambda x: function(x.to(dtype))
    if way == "unit":
        return lambda x: function(x * (0.6 + 0.8j))
    return lambda x: function(torch.complex(x, x.flip(0) if x.ndim else -x))


def as_real(draw: Draw, function: Function) -> Function:
    """Return a function of real tensors as one of complex ones, of a part of them."""
    if not draw.dtype.is_complex:
        return function
    if draw.choice(True, False):
        return lambda x: function(x.real)
    return lambda x: function(x.imag)


def number(draw: Draw) -> float:
    return draw.choice(-2.5, -1.0, 0.5, 1.5, 3.0)


# ---------------------------------------------------------------------------------------------------------- elementwise


@op
def scale_by_number(draw):
    c = number(draw)
    return lambda x: c * x


@op
def scale_by_integer(draw):
    c = draw.choice(-3, 2)
    return lambda x: x * c


@op
def scale_by_complex_number(draw):
    c = complex(number(draw), number(draw))
    return lambda x: c * x


@op
def scale_by_complex_tensor(draw):
    c = draw.randn(*draw.shape, dtype=draw.dtype.to_complex())
    return lambda x: x * c.conj() if c.numel() % 2 else c * x


@op
def scale_by_tensor(draw):
    c = draw.randn(*draw.shape)
    return lambda x: c * x


@op
def scale_broadcast(draw):
    c = draw.randn(*[n if draw.choice(True, False) else 1 for n in draw.shape])
    return lambda x: x * c


@op
def scale_to_larger(draw):
    c = draw.randn(2, *[n if draw.choice(True, False) else 1 for n in draw.shape])
    return lambda x: x * c


@op
def divide(draw):
    c = draw.real(*draw.shape).abs() + 0.5
    return lambda x: x / c


@op
def divide_by_number(draw):
    c = draw.choice(2, -0.7)
    return lambda x: x / c


@op
def complex_of_constant_parts(draw):
    c = draw.real(*draw.shape)
    return as_complex(draw, lambda x: torch.complex(x.real * c, x.imag + x.real))


@op
def add_with_alpha(draw):
    return lambda x: torch.add(x, x.flip(0) if x.ndim else x, alpha=3)


@op
def subtract_mean(draw):
    d = draw.dim()
    return lambda x: x - x.mean(d, keepdim=True)


@op
def addcmul(draw):
    c = draw.randn(*draw.shape)
    return lambda x: torch.addcmul(x, x, c, value=0.5)


@op
def addcdiv(draw):
    c = draw.real(*draw.shape).abs() + 1
    return lambda x: torch.addcdiv(x, x, c.to(x.dtype), value=-2)


@op
def lerp(draw):
    w = draw.choice(0.25, 0.75)
    return lambda x: torch.lerp(x, -2 * x, w)


@op
def rsub(draw):
    return lambda x: 0 - x


plain("negate", torch.neg)
plain("clone", torch.clone)
plain("positive", torch.positive)
plain("add_to_itself", lambda x: x + x + 2 * x)
plain("times_one_and_zero", lambda x: 1 * x + 0 * x)
plain("difference_of_parts", lambda x: x.real - x.imag if x.is_complex() else x - x / 2)


# -------------------------------------------------------------------------------------------------------------- complex


@op
def real(draw):
    return as_complex(draw, lambda x: x.real)


@op
def imag(draw):
    return as_complex(draw, lambda x: x.imag)


@op
def torch_real(draw):
    return as_complex(draw, lambda x: torch.real(1j * x))


@op
def conj(draw):
    return as_complex(draw, lambda x: x.conj())


@op
def conj_physical(draw):
    return as_complex(draw, torch.conj_physical)


@op
def conj_transpose(draw):
    sizes = draw.factors(2)
    return as_complex(draw, lambda x: x.reshape(sizes).mH)


@op
def hermitian_part(draw):
    def function(x):
        x = x.reshape(-1)
        return x + x.flip(0).conj()

    return as_complex(draw, function)


@op
def view_as_real(draw):
    return as_complex(draw, torch.view_as_real)


@op
def view_as_complex(draw):
    return as_real(draw, lambda x: torch.view_as_complex(torch.stack([x, 2 * x], -1)))


@op
def complex_of_two(draw):
    return as_real(draw, lambda x: torch.complex(x, x.flip(0) if x.ndim else x))


@op
def to_complex(draw):
    return as_real(draw, lambda x: x.to(x.dtype.to_complex()))


@op
def write_real_part(draw):
    def function(x):
        x = x.clone()
        x.real.mul_(3)
        return x

    return as_complex(draw, function)


@op
def write_imaginary_part(draw):
    def function(x):
        x = 1j * x
        x.imag[...] = x.real
        return x

    return as_complex(draw, function)


# ---------------------------------------------------------------------------------------------------------------- views


@op
def permute(draw):
    order = draw.order(len(draw.shape))
    return lambda x: x.permute(order)


@op
def reshape(draw):
    sizes = draw.factors(draw.integer(1, 4))
    return lambda x: x.reshape(sizes)


@op
def reshape_inferred(draw):
    first = draw.factors(2)[0]
    return lambda x: x.reshape(first, -1)


@op
def view_of_contiguous(draw):
    sizes = draw.factors(3)
    return lambda x: x.contiguous().view(sizes)


@op
def flatten(draw):
    return lambda x: x.flatten()


@op
def unflatten(draw):
    sizes = draw.factors(2)
    return lambda x: x.reshape(-1).unflatten(0, sizes)


@op
def transpose(draw):
    d, e = draw.dim(), draw.dim()
    return lambda x: x.transpose(d, e)


@op
def matrix_transpose(draw):
    sizes = draw.factors(3)
    return lambda x: x.reshape(sizes).mT


@op
def movedim(draw):
    d, e = draw.dim(), draw.dim()
    return lambda x: x.movedim(d, e)


@op
def swapaxes(draw):
    d, e = draw.dim(), draw.dim()
    return lambda x: torch.swapaxes(x, d, e)


@op
def slice_with_step(draw):
    d, step = draw.dim() % len(draw.shape), draw.choice(1, 2, 3)
    start = draw.integer(0, draw.shape[d] - 1)
    index = (slice(None),) * d + (slice(start, None, step),)
    return lambda x: x[index]


@op
def slice_of_negatives(draw):
    d = draw.dim(2) % len(draw.shape)
    index = (..., slice(-draw.shape[d], -1), *[slice(None)] * (len(draw.shape) - d - 1))
    return lambda x: x[index]


@op
def index_none_and_ellipsis(draw):
    return lambda x: x[None, ..., None]


@op
def narrow(draw):
    d = draw.dim()
    start = draw.integer(0, draw.shape[d] - 1)
    length = draw.integer(1, draw.shape[d] - start)
    return lambda x: x.narrow(d, start, length)


@op
def select(draw):
    d = draw.dim()
    i = draw.integer(-draw.shape[d], draw.shape[d] - 1)
    return lambda x: x.select(d, i)


@op
def unfold_view(draw):
    d = draw.dim()
    size = draw.integer(1, min(3, draw.shape[d]))
    step = draw.choice(1, 2)
    return lambda x: x.unfold(d, size, step)


@op
def expand(draw):
    n = draw.choice(2, 3)
    return lambda x: x.expand(n, *x.shape)


@op
def broadcast_to(draw):
    return lambda x: torch.broadcast_to(x.unsqueeze(-1), (*x.shape, 2))


@op
def expand_and_sum(draw):
    d = draw.dim()
    return lambda x: x.unsqueeze(0).expand(3, *x.shape).sum(d)


@op
def chunk(draw):
    d = draw.dim(2)
    return lambda x: x.chunk(2, d)[0]


@op
def split(draw):
    d = draw.dim(2)
    n = draw.shape[d]
    k = draw.integer(1, n - 1)
    return lambda x: torch.cat(x.split([k, n - k], d)[::-1], d)


@op
def tensor_split(draw):
    d = draw.dim(2)
    return lambda x: x.tensor_split(2, d)[-1]


@op
def unbind(draw):
    d = draw.dim()
    return lambda x: sum(2 * part for part in x.unbind(d))


@op
def stack(draw):
    d = draw.dim()
    return lambda x: torch.stack([x, -2 * x], d)


@op
def cat(draw):
    d = draw.dim()
    return lambda x: torch.cat([x, x.flip(d), x], d)


@op
def hstack(draw):
    return lambda x: torch.hstack([x, 2 * x])


@op
def vstack_and_dstack(draw):
    return lambda x: torch.dstack([torch.vstack([x, -x])])


@op
def column_stack(draw):
    return lambda x: torch.column_stack([x.reshape(-1), 3 * x.reshape(-1)])


@op
def block_diag(draw):
    return lambda x: torch.block_diag(x.reshape(-1)[:3], x.reshape(-1)[-2:])


@op
def flip(draw):
    d = draw.dim()
    return lambda x: x.flip(d)


@op
def flip_of_all(draw):
    return lambda x: x.flip(list(range(x.ndim)))


@op
def rot90(draw):
    sizes, k = draw.factors(2), draw.choice(1, 2, 3)
    return lambda x: torch.rot90(x.reshape(sizes), k)


@op
def roll(draw):
    d, k = draw.dim(), draw.integer(-3, 3)
    return lambda x: x.roll(k, d)


@op
def roll_flattened(draw):
    k = draw.integer(-3, 3)
    return lambda x: x.roll(k)


plain("squeeze", torch.squeeze)
plain("atleast_2d", torch.atleast_2d)


@op
def unsqueeze(draw):
    d = draw.dim()
    return lambda x: x.unsqueeze(d)


@op
def diagonal(draw):
    sizes, k = draw.factors(2), draw.choice(0, 0, 1, -1)
    return lambda x: x.reshape(sizes).diagonal(k)


@op
def diag_embed(draw):
    k = draw.choice(0, 1, -1)
    return lambda x: torch.diag_embed(x.reshape(-1), k)


@op
def diagflat(draw):
    return torch.diagflat


@op
def trace(draw):
    sizes = draw.factors(2)
    return lambda x: x.reshape(sizes).trace()


@op
def tril(draw):
    s, k = draw.factors(2), draw.choice(0, -1, 1)
    return lambda x: x.reshape(s).tril(k)


@op
def triu(draw):
    s, k = draw.factors(3), draw.choice(0, -1, 1)
    return lambda x: x.reshape(s).triu(k)


@op
def repeat(draw):
    return lambda x: x.repeat(2, *[1] * x.ndim)


@op
def repeat_interleave(draw):
    d = draw.dim()
    return lambda x: x.repeat_interleave(2, d)


@op
def repeat_interleave_by_counts(draw):
    d = draw.dim()
    counts = draw.index(3, draw.shape[d])
    counts[0] = 1
    total = int(counts.sum())
    return lambda x: x.repeat_interleave(counts, d, output_size=total)


@op
def tile(draw):
    return lambda x: torch.tile(x, (2,))


@op
def as_strided(draw):
    n = draw.numel
    if n < 3:
        raise UnsuitableError
    return lambda x: x.contiguous().as_strided((2, n - 1), (1, 1))


@op
def channel_shuffle(draw):
    sizes = draw.factors(3)
    return lambda x: x.reshape(1, *sizes).transpose(1, 2).flatten(1, 2)


@op
def memory_format(draw):
    sizes = draw.factors(4)
    return lambda x: x.reshape(sizes).contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------------------------- pads


@op
def pad_constant(draw):
    sizes = tuple(draw.integer(0, 2) for _ in range(2 * min(2, len(draw.shape))))
    return lambda x: F.pad(x, sizes)


@op
def pad_crop(draw):
    if draw.shape[-1:] < (3,):
        raise UnsuitableError
    return lambda x: F.pad(x, (-1, 1))


def _pad(mode):
    def make(draw):
        dims = draw.choice(1, 2, 3)
        sizes = draw.image(dims)
        amount = tuple(draw.integer(0, min(2, n - (mode == "reflect"))) for n in sizes[:1:-1] for _ in range(2))
        return lambda x: F.pad(x.reshape(sizes), amount, mode=mode)

    make.__name__ = f"pad_{mode}"
    return op(make)


_pad("reflect")
_pad("replicate")
_pad("circular")


@op
def zero_pad_module(draw):
    sizes, pad = draw.image(2), nn.ZeroPad2d((1, 0, 0, 1))
    return lambda x: pad(x.reshape(sizes))


# ------------------------------------------------------------------------------------------------------------- indexing


@op
def index_select(draw):
    d = draw.dim()
    index = draw.index(draw.shape[d], 3)
    return lambda x: x.index_select(d, index)


@op
def index_by_list(draw):
    n = draw.numel
    index = [draw.integer(-n, n - 1) for _ in range(3)]
    return lambda x: x.reshape(-1)[index]


@op
def index_by_pairs(draw):
    a, b = draw.factors(2)
    i, j = draw.index(a, 4), draw.index(b, 4)
    return lambda x: x.reshape(a, b)[i, j]


@op
def index_by_grid(draw):
    a, b = draw.factors(2)
    i, j = draw.index(a, 2, 1), draw.index(b, 1, 3)
    return lambda x: x.reshape(a, b)[i, j]


@op
def index_around_slice(draw):
    a, b, c = draw.factors(3)
    i, j = draw.index(a, 2), draw.index(c, 2)
    return lambda x: x.reshape(a, b, c)[i, :, j]


@op
def index_by_mask(draw):
    mask = draw.mask(*draw.shape)
    return lambda x: x[mask]


@op
def masked_select(draw):
    mask = draw.mask(draw.numel)
    mask[0] = True
    return lambda x: x.reshape(-1).masked_select(mask)


@op
def gather(draw):
    a, b = draw.factors(2)
    index = draw.index(b, a, 3)
    return lambda x: x.reshape(a, b).gather(1, index)


@op
def take_along_dim(draw):
    a, b = draw.factors(2)
    index = draw.index(a, 2, b)
    return lambda x: torch.take_along_dim(x.reshape(a, b), index, 0)


@op
def take(draw):
    index = draw.index(draw.numel, 2, 3)
    return lambda x: x.take(index)


@op
def masked_fill(draw):
    mask = draw.mask(*draw.shape)
    return lambda x: x.masked_fill(mask, 0)


@op
def masked_scatter(draw):
    mask = draw.mask(draw.numel)
    return lambda x: torch.zeros_like(x).reshape(-1).masked_scatter(mask, x.reshape(-1))


@op
def where_else_zero(draw):
    mask = draw.mask(*draw.shape)
    return lambda x: torch.where(mask, x, 0)


@op
def where_else_other(draw):
    mask = draw.mask(*draw.shape)
    return lambda x: torch.where(mask, 2 * x, -x)


@op
def where_broadcast(draw):
    mask = draw.mask(2, *[1] * len(draw.shape))
    return lambda x: torch.where(mask, x, x.new_zeros(()))


# --------------------------------------------------------------------------------------------------- sums, differences


@op
def cumsum(draw):
    d = draw.dim()
    return lambda x: x.cumsum(d)


@op
def reverse_cumsum(draw):
    d = draw.dim()
    return lambda x: x.flip(d).cumsum(d).flip(d)


@op
def sum_over_dim(draw):
    d, keep = draw.dim(), draw.choice(True, False)
    return lambda x: x.sum(d, keepdim=keep)


@op
def sum_over_dims(draw):
    sizes = draw.factors(3)
    return lambda x: x.reshape(sizes).sum((0, -1))


plain("sum_of_all", torch.sum)
plain("mean_of_all", torch.mean)


@op
def mean_over_dim(draw):
    d, keep = draw.dim(), draw.choice(True, False)
    return lambda x: x.mean(d, keepdim=keep)


@op
def sum_to_size(draw):
    return lambda x: x.reshape(-1, 1).sum_to_size(1, 1) + x.reshape(-1, 1)


@op
def diff(draw):
    d = draw.dim(2)
    return lambda x: x.diff(dim=d)


@op
def diff_twice_prepended(draw):
    return lambda x: torch.diff(x.reshape(-1), n=2, prepend=x.reshape(-1)[:2])


@op
def gradient(draw):
    d = draw.dim(2)
    return lambda x: torch.gradient(x, dim=d)[0]


@op
def trapezoid(draw):
    d = draw.dim(2)
    return lambda x: torch.trapezoid(x, dx=0.5, dim=d)


@op
def cumulative_trapezoid(draw):
    d = draw.dim(2)
    return lambda x: torch.cumulative_trapezoid(x, dim=d)


# ------------------------------------------------------------------------------------------------------------- products


@op
def matmul_left(draw):
    a, b = draw.factors(2)
    c = draw.randn(3, a)
    return lambda x: c @ x.reshape(a, b)


@op
def matmul_right(draw):
    c = draw.randn(draw.shape[-1], 2) if draw.shape else None
    if c is None:
        raise UnsuitableError
    return lambda x: x @ c


@op
def matmul_both(draw):
    a, b = draw.factors(2)
    c, d = draw.randn(2, a), draw.randn(2, b)
    return lambda x: torch.linalg.multi_dot([c, x.reshape(a, b), d.mH])


@op
def matrix_vector(draw):
    c = draw.randn(4, draw.numel)
    return lambda x: torch.mv(c, x.reshape(-1))


@op
def batched_matmul(draw):
    a, b, c = draw.factors(3)
    m = draw.randn(a, 2, b)
    return lambda x: torch.bmm(m, x.reshape(a, b, c))


@op
def matmul_broadcast(draw):
    a, b = draw.factors(2)
    m = draw.randn(2, 1, 2, a)
    return lambda x: m @ x.reshape(a, b)


@op
def complex_matrix(draw):
    c = draw.randn(3, draw.numel, dtype=draw.dtype.to_complex())
    return lambda x: c @ x.reshape(-1).to(c.dtype)


@op
def einsum(draw):
    a, b, c = draw.factors(3)
    m = draw.randn(b, 2, a)
    return lambda x: torch.einsum("bka,abc->kc", m, x.reshape(a, b, c))


@op
def einsum_conj(draw):
    a, b = draw.factors(2)
    m = draw.randn(a, b)
    return lambda x: torch.einsum("ij,ij->i", m.conj(), x.reshape(a, b))


@op
def einsum_diagonal(draw):
    n = math.isqrt(draw.numel)
    return lambda x: torch.einsum("ii->i", x.reshape(-1)[: n * n].reshape(n, n))


@op
def bilinear(draw):
    a, b = draw.factors(2)
    z, w = draw.real(a, 2), draw.real(3, b, 2)
    return by_parts(draw, lambda x: F.bilinear(x.reshape(a, b), z, w))


@op
def bilinear_module(draw):
    a, b = draw.factors(2)
    layer, z = nn.Bilinear(2, b, 2, bias=False, dtype=draw.dtype.to_real()), draw.real(a, 2)
    return by_parts(draw, lambda x: layer(z, x.reshape(a, b)))


@op
def kron_left(draw):
    c = draw.randn(2, 2)
    return lambda x: torch.kron(c, x)


@op
def kron_right(draw):
    c = draw.randn(3)
    return lambda x: torch.kron(x, c)


@op
def outer(draw):
    c = draw.randn(3)
    return lambda x: torch.outer(x.reshape(-1), c)


@op
def tensordot(draw):
    a, b, c = draw.factors(3)
    m = draw.randn(2, c, a)
    return lambda x: torch.tensordot(m, x.reshape(a, b, c), dims=([2, 1], [0, 2]))


@op
def inner(draw):
    if not draw.shape:
        raise UnsuitableError
    c = draw.randn(2, draw.shape[-1])
    return lambda x: torch.inner(x, c)


@op
def vecdot(draw):
    a, b = draw.factors(2)
    c = draw.randn(a, b)
    return lambda x: torch.linalg.vecdot(c, x.reshape(a, b))


@op
def cross(draw):
    c = draw.randn(3)
    return lambda x: torch.linalg.cross(x.reshape(-1, 1).expand(-1, 3), c.expand(x.numel(), 3))


@op
def addmm(draw):
    a, b = draw.factors(2)
    m = draw.randn(a, a)
    return lambda x: torch.addmm(x.reshape(a, b), m, x.reshape(a, b), beta=2, alpha=-1)


@op
def baddbmm(draw):
    a, b, c = draw.factors(3)
    m = draw.randn(a, b, b)
    return lambda x: torch.baddbmm(x.reshape(a, b, c), m, x.reshape(a, b, c), alpha=0.5)


@op
def addmv_and_addr(draw):
    n = draw.numel
    m, v, zero = draw.randn(n, n), draw.randn(2), torch.zeros(n, 2, dtype=draw.dtype)
    return lambda x: torch.addr(zero, torch.addmv(x.reshape(-1), m, x.reshape(-1)), v)


@op
def linear_layer(draw):
    a, b = draw.factors(2)
    layer = nn.Linear(b, 3, bias=False, dtype=draw.dtype)
    return lambda x: layer(x.reshape(a, b))


@op
def linear_function(draw):
    a, b = draw.factors(2)
    w = draw.randn(2, b)
    return lambda x: F.linear(x.reshape(a, b), w)


@op
def solve(draw):
    a, b = draw.factors(2)
    m = draw.randn(a, a) + 4 * torch.eye(a, dtype=draw.dtype)
    return lambda x: torch.linalg.solve(m, x.reshape(a, b))


@op
def solve_triangular(draw):
    a, b = draw.factors(2)
    m = draw.randn(a, a).tril(-1) / 4 + torch.eye(a, dtype=draw.dtype)
    return lambda x: torch.linalg.solve_triangular(m, x.reshape(a, b), upper=False)


@op
def cholesky_solve(draw):
    a, b = draw.factors(2)
    m = draw.randn(a, a).tril(-1) / 4 + torch.eye(a, dtype=draw.dtype)
    return lambda x: torch.cholesky_solve(x.reshape(a, b), m)


@op
def inverse_of_constant(draw):
    a, b = draw.factors(2)
    m = draw.randn(a, a) + 4 * torch.eye(a, dtype=draw.dtype)
    return lambda x: torch.linalg.inv(m) @ x.reshape(a, b)


# --------------------------------------------------------------------------------------------------------- convolutions


def _kernel_settings(draw, sizes, mode):
    """Return a kernel that fits an image, with settings."""
    groups = draw.choice(*[g for g in (1, 2, 3) if sizes[1] % g == 0])
    padding = [draw.integer(0, 1) if mode != "reflect" or n > 1 else 0 for n in sizes[2:]]
    dilation = [draw.integer(1, 2) for _ in sizes[2:]]
    kernel = []
    for n, p, d in zip(sizes[2:], padding, dilation, strict=True):
        fits = [k for k in (1, 2, 3) if d * (k - 1) + 1 <= n + 2 * p]
        kernel.append(draw.choice(*fits))
    return tuple(kernel), {
        "stride": tuple(draw.integer(1, 2) for _ in sizes[2:]), "padding": tuple(padding),
        "dilation": tuple(dilation), "groups": groups,
    }  # fmt: skip


def _convolution(dims, mode="zeros"):
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

    def make(draw):
        sizes = draw.image(dims)
        kernel, settings = _kernel_settings(draw, sizes, mode)
        out = settings["groups"] * draw.integer(1, 2)
        options = {"bias": False, "padding_mode": mode, "dtype": draw.dtype, **settings}
        layer = kinds[dims](sizes[1], out, kernel, **options)
        return lambda x: layer(x.reshape(sizes))

    make.__name__ = f"conv{dims}d" + (f"_{mode}" if mode != "zeros" else "")
    return op(make)


def _transposed(dims):
    kinds = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

    def make(draw):
        sizes = draw.image(dims)
        kernel, settings = _kernel_settings(draw, sizes, "zeros")
        settings["output_padding"] = tuple(
            draw.integer(0, max(s, d) - 1) for s, d in zip(settings["stride"], settings["dilation"], strict=True)
        )
        out = settings["groups"] * draw.integer(1, 2)
        layer = kinds[dims](sizes[1], out, kernel, bias=False, dtype=draw.dtype, **settings)
        return lambda x: layer(x.reshape(sizes))

    make.__name__ = f"conv_transpose{dims}d"
    return op(make)


for _dims in (1, 2, 3):
    _convolution(_dims)
    _transposed(_dims)
for _mode in ("reflect", "replicate", "circular"):
    _convolution(1, _mode)
    _convolution(2, _mode)


@op
def conv_same(draw):
    sizes = draw.image(2)
    w = draw.randn(2, sizes[1], 3, 1)
    return lambda x: F.conv2d(x.reshape(sizes), w, padding="same")


@op
def conv_unbatched(draw):
    _, *sizes = draw.image(1)
    w = draw.randn(2, sizes[0], 1)
    return lambda x: F.conv1d(x.reshape(sizes), w)


@op
def conv_depthwise(draw):
    sizes = draw.image(2)
    w = draw.randn(sizes[1], 1, 2, 2)
    return lambda x: F.conv2d(x.reshape(sizes), w, padding=1, groups=sizes[1])


@op
def conv_complex_kernel(draw):
    sizes = draw.image(1)
    w = draw.randn(2, sizes[1], 2, dtype=draw.dtype.to_complex())
    return lambda x: F.conv1d(x.reshape(sizes).to(w.dtype), w, padding=1)


# -------------------------------------------------------------------------------------------------- pooling, resampling


def _on_image(name, dims, function):
    """Register a function of real images, with what it is to draw."""

    def make(draw):
        sizes = draw.image(dims)
        inner = function(draw, sizes)
        return by_parts(draw, lambda x: inner(x.reshape(sizes)))

    make.__name__ = name
    return op(make)


def _sizes(draw, sizes, least=1):
    return tuple(draw.integer(least, max(least, min(2 * n, 4))) for n in sizes[2:])


def _pool(kind):
    def function(draw, sizes):
        kernel = tuple(draw.integer(1, min(n, 3)) for n in sizes[2:])
        ceil, counted = draw.choice(True, False), draw.choice(True, False)
        stride = tuple(draw.integer(1, 2) for _ in kernel)
        layer = kind(kernel, stride, tuple(k // 2 for k in kernel), ceil_mode=ceil, count_include_pad=counted)
        return layer

    return function


def _interpolated(mode, least=1, **options):
    def function(draw, sizes):
        to = _sizes(draw, sizes, least)
        return lambda x: F.interpolate(x, to, mode=mode, **options)

    return function


def _sampled(dims, **options):
    def function(draw, sizes):
        grid = 1.3 * draw.real(sizes[0], *[2] * dims, dims).tanh()
        return lambda x: F.grid_sample(x, grid, **options)

    return function


_on_image("avg_pool1d", 1, _pool(nn.AvgPool1d))
_on_image("avg_pool2d", 2, _pool(nn.AvgPool2d))
_on_image("avg_pool3d", 3, _pool(nn.AvgPool3d))
_on_image("adaptive_avg_pool1d", 1, lambda draw, sizes: nn.AdaptiveAvgPool1d(_sizes(draw, sizes)[0]))
_on_image("adaptive_avg_pool2d", 2, lambda draw, sizes: nn.AdaptiveAvgPool2d(_sizes(draw, sizes)))
_on_image("adaptive_avg_pool3d", 3, lambda draw, sizes: nn.AdaptiveAvgPool3d(_sizes(draw, sizes)))
_on_image("interpolate_nearest", 2, _interpolated("nearest"))
_on_image("interpolate_nearest_exact", 1, _interpolated("nearest-exact"))
_on_image("interpolate_linear", 1, _interpolated("linear"))
_on_image("interpolate_bilinear", 2, _interpolated("bilinear", align_corners=False))
_on_image("interpolate_bilinear_corners", 2, _interpolated("bilinear", align_corners=True))
# torch's derivative to one column is wrong, and the operator is refused.
_on_image("interpolate_antialias", 2, _interpolated("bilinear", least=2, antialias=True))
_on_image("interpolate_bicubic", 2, _interpolated("bicubic"))
_on_image("interpolate_trilinear", 3, _interpolated("trilinear"))
_on_image("interpolate_area", 2, _interpolated("area"))
_on_image("interpolate_by_factor", 2, lambda draw, sizes: lambda x: F.interpolate(x, scale_factor=1.5))
_on_image("grid_sample_bilinear", 2, _sampled(2, align_corners=False))
_on_image("grid_sample_border", 2, _sampled(2, align_corners=True, padding_mode="border"))
_on_image("grid_sample_reflection", 2, _sampled(2, align_corners=False, padding_mode="reflection"))
_on_image("grid_sample_nearest", 2, _sampled(2, align_corners=False, mode="nearest"))
_on_image("grid_sample_bicubic", 2, _sampled(2, align_corners=False, mode="bicubic"))
_on_image("grid_sample_3d", 3, _sampled(3, align_corners=False))


def _rotated(draw, sizes):
    theta = draw.real(sizes[0], 2, 3) / 2

    def function(x):
        grid = F.affine_grid(theta, [*sizes[:2], 2, 3], align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    return function


_on_image("affine_grid", 2, _rotated)


@op
def pixel_shuffle(draw):
    if draw.numel % 4:
        raise UnsuitableError
    return lambda x: F.pixel_shuffle(x.reshape(1, 4, -1, 1), 2)


@op
def pixel_unshuffle(draw):
    if draw.numel % 4:
        raise UnsuitableError
    return lambda x: F.pixel_unshuffle(x.reshape(1, 1, 2, -1), 2)


@op
def unfold_patches(draw):
    sizes = draw.image(2)
    kernel = tuple(draw.integer(1, min(2, n)) for n in sizes[2:])
    return lambda x: F.unfold(x.reshape(sizes), kernel, stride=2, padding=1)


@op
def fold(draw):
    n = draw.numel
    if n % 2 or n > 24:
        raise UnsuitableError
    return lambda x: F.fold(x.reshape(1, 2, -1), (1, n // 2 + 1), (1, 2))


# ------------------------------------------------------------------------------------------------------------- Fourier


def _fourier(name, function, *, of="complex", dims=0, sized=False):
    def make(draw):
        norm = draw.choice(None, "ortho", "forward", "backward")
        options = {"norm": norm}
        if dims:
            shape = draw.factors(dims + draw.integer(0, 1))
        else:
            shape = draw.factors(2)
            options["dim"] = draw.choice(-1, 0)
        if sized and draw.choice(True, False):
            options["n"] = draw.integer(1, 7)
        wrap = as_real if of == "real" else as_complex if of == "complex" else lambda draw, f: f
        return wrap(draw, lambda x: function(x.reshape(shape), **options))

    make.__name__ = name
    return op(make)


_fourier("fft", torch.fft.fft, sized=True)
_fourier("fft_of_any", torch.fft.fft, of="any")
_fourier("ifft", torch.fft.ifft, sized=True)
_fourier("ifft_of_any", torch.fft.ifft, of="any")
_fourier("rfft", torch.fft.rfft, of="real", sized=True)
_fourier("irfft", torch.fft.irfft, sized=True)
_fourier("irfft_of_any", torch.fft.irfft, of="any", sized=True)
_fourier("hfft", torch.fft.hfft, sized=True)
_fourier("ihfft", torch.fft.ihfft, of="real", sized=True)
_fourier("fft2", torch.fft.fft2, dims=2)
_fourier("ifft2", torch.fft.ifft2, dims=2)
_fourier("fftn", torch.fft.fftn, dims=1)
_fourier("ifftn", torch.fft.ifftn, dims=2)
_fourier("rfft2", torch.fft.rfft2, of="real", dims=2)
_fourier("irfft2", torch.fft.irfft2, dims=2)
_fourier("rfftn", torch.fft.rfftn, of="real", dims=2)
_fourier("irfftn", torch.fft.irfftn, dims=2)
_fourier("hfft2", torch.fft.hfft2, dims=2)
_fourier("ihfft2", torch.fft.ihfft2, of="real", dims=2)


@op
def fftshift(draw):
    d = draw.dim()
    return lambda x: torch.fft.fftshift(x, d)


@op
def ifftshift(draw):
    return torch.fft.ifftshift


@op
def fourier_multiplier(draw):
    n = draw.numel
    c = draw.real(n)
    return as_real(draw, lambda x: torch.fft.irfft(torch.fft.rfft(x.reshape(-1)) * torch.fft.rfft(c), n=n))


@op
def centred_fft(draw):
    sizes = draw.factors(2)
    return lambda x: torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(x.reshape(sizes)), norm="ortho"))


@op
def stft(draw):
    n, onesided = draw.choice(2, 4), not draw.dtype.is_complex and draw.choice(True, False)
    window, normalized = draw.real(n).abs() + 0.1, draw.choice(True, False)
    mode = draw.choice("constant", "reflect") if draw.numel > n else "constant"

    def function(x):
        return torch.stft(
            x.reshape(-1), n, hop_length=n // 2, window=window, return_complex=True, onesided=onesided,
            normalized=normalized, pad_mode=mode,
        )  # fmt: skip

    return function


@op
def istft(draw):
    if draw.numel % 3:
        raise UnsuitableError
    window = torch.ones(4, dtype=draw.dtype.to_real())
    return as_complex(draw, lambda x: torch.istft(x.reshape(3, -1), 4, hop_length=2, window=window))


# ------------------------------------------------------------------------------------------------------------- in place


@op
def write_slice(draw):
    return lambda x: _written(torch.zeros_like(x.reshape(-1)), slice(None, None, 2), x.reshape(-1)[::2])


def _written(target, index, value):
    target[..., index] = value
    return target


@op
def write_indices(draw):
    n = draw.numel
    index = draw.order(n)[: max(1, n // 2)]
    return lambda x: _written(x.reshape(-1).clone(), index, -2 * x.reshape(-1)[: len(index)])


@op
def write_mask(draw):
    mask = draw.mask(draw.numel)
    return lambda x: _written(x.reshape(-1).clone(), mask, 0)


@op
def write_row_of_zeros(draw):
    sizes = draw.factors(2)

    def function(x):
        x = 2 * x.reshape(sizes)
        x[-1].zero_()
        return x

    return function


@op
def write_through_view(draw):
    sizes = draw.factors(2)

    def function(x):
        x = x.reshape(sizes).clone()
        x.mT[0].mul_(3)
        x.view(-1)[-1:].add_(x.view(-1)[:1])
        return x

    return function


@op
def write_overlapping_parts(draw):
    def function(x):
        x = x.reshape(-1).clone()
        x[1:] = x[:-1].clone() + x[1:]
        return x

    return function


@op
def write_constant_then_subtract(draw):
    c = draw.randn(draw.numel)

    def function(x):
        target = c.clone()
        target += x.reshape(-1)
        target -= c
        return target

    return function


@op
def add_in_place(draw):
    return lambda x: x.clone().add_(x.flip(0) if x.ndim else x, alpha=2)


@op
def subtract_in_place(draw):
    return lambda x: (2 * x).sub_(x.mean())


@op
def multiply_in_place(draw):
    c = draw.randn(*draw.shape)
    return lambda x: x.clone().mul_(c).neg_()


@op
def divide_in_place(draw):
    return lambda x: x.clone().div_(0.8)


@op
def augmented_assignment(draw):
    def function(x):
        y = x.clone()
        y += x
        y *= 0.5
        y -= 3 * x
        y /= 2
        return y

    return function


@op
def triangle_in_place(draw):
    s = draw.factors(2)
    return lambda x: x.reshape(s).clone().tril_()


@op
def transposed_in_place(draw):
    sizes = draw.factors(2)

    def function(x):
        y = x.reshape(sizes).clone()
        return y.t_().add_(1.5 * x.reshape(sizes).mT)

    return function


@op
def index_add_in_place(draw):
    n = draw.numel
    index = draw.index(3, n)
    return lambda x: x.new_zeros(3).index_add_(0, index, x.reshape(-1), alpha=2)


@op
def index_add(draw):
    a, b = draw.factors(2)
    index = draw.index(b, 2)
    return lambda x: x.reshape(a, b).index_add(1, index, x.reshape(a, b)[:, :1].expand(a, 2))


@op
def index_copy_in_place(draw):
    a, b = draw.factors(2)
    index = torch.tensor(draw.order(a + 1)[:a])
    return lambda x: x.new_zeros(a + 1, b).index_copy_(0, index, x.reshape(a, b))


@op
def index_fill(draw):
    d = draw.dim()
    index = draw.index(draw.shape[d], 1)
    return lambda x: x.index_fill(d, index, 0)


@op
def scatter_add_in_place(draw):
    n = draw.numel
    index = draw.index(4, n)
    return lambda x: x.new_zeros(4).scatter_add_(0, index, x.reshape(-1))


@op
def scatter(draw):
    n = draw.numel
    index = torch.tensor(draw.order(n + 1)[:n])
    return lambda x: x.new_zeros(n + 1).scatter(0, index, x.reshape(-1))


@op
def scatter_reduce_sum(draw):
    require_real(draw)
    n = draw.numel
    index = draw.index(3, n)
    return lambda x: x.new_zeros(3).scatter_reduce(0, index, x.reshape(-1), reduce="sum")


@op
def copy_into_zeros(draw):
    def function(x):
        target = torch.zeros(2, *x.shape, dtype=x.dtype)
        target[1].copy_(x)
        target[0].copy_(target[1].flip(0) if x.ndim else 3 * target[1])
        return target

    return function


@op
def copy_broadcast(draw):
    return lambda x: x.new_zeros(2, *x.shape).copy_(x)


@op
def copy_real_into_complex(draw):
    def function(x):
        return torch.zeros(x.shape, dtype=x.dtype.to_complex()).copy_(x).mul_(1 + 2j)

    return as_real(draw, function)


@op
def index_put_accumulated(draw):
    n = draw.numel
    index = draw.index(3, n)
    return lambda x: x.new_zeros(3).index_put_((index,), x.reshape(-1), accumulate=True)


@op
def index_put(draw):
    a, b = draw.factors(2)
    i, j = torch.tensor(draw.order(a)[:1]), torch.tensor(draw.order(b)[:1])
    return lambda x: x.reshape(a, b).index_put((i, j), x.reshape(-1)[:1] * 3)


@op
def slice_scatter(draw):
    require_real(draw)
    a, b = draw.factors(2)
    return lambda x: torch.slice_scatter(x.new_zeros(a + 2, b), x.reshape(a, b), 0, 1, a + 1)


@op
def select_scatter(draw):
    require_real(draw)
    a, b = draw.factors(2)
    return lambda x: torch.select_scatter(x.reshape(a, b), x.reshape(a, b).sum(0), 0, a - 1)


@op
def diagonal_scatter(draw):
    n = draw.numel
    return lambda x: torch.diagonal_scatter(x.new_zeros(n, n), x.reshape(-1))


@op
def as_strided_scatter(draw):
    n = draw.numel
    return lambda x: torch.as_strided_scatter(x.new_zeros(2 * n), x.reshape(-1), (n,), (2,), 1)


@op
def written_in_a_loop(draw):
    def function(x):
        x, target = x.reshape(-1), x.new_zeros(x.numel())
        for i in range(x.numel()):
            target[i] = x[: i + 1].sum() if i % 2 else x[-i - 1]
        return target

    return function


@op
def out_argument(draw):
    def function(x):
        target = torch.empty_like(x)
        target.copy_(2 * x)
        return target + x

    return function


# ----------------------------------------------------------------------------------------------- Python, own functions


@op
def recurrence(draw):
    c = draw.choice(0.5, -0.75)

    def function(x):
        x, state, states = x.reshape(-1), 0, []
        for value in x:
            state = c * state + value
            states.append(state)
        return torch.stack(states)

    return function


@op
def loop_of_matrices(draw):
    n = draw.numel
    ms = [draw.randn(n, n) / n for _ in range(3)]

    def function(x):
        x = x.reshape(-1)
        for m in ms:
            x = x + m @ x
        return x

    return function


@op
def branch_on_shape(draw):
    def function(x):
        if x.ndim > 1 and x.shape[-1] % 2:
            return x.transpose(0, -1)
        return -x if x.numel() > 4 else x[None]

    return function


@op
def comprehension_over_dims(draw):
    return lambda x: torch.cat([x.movedim(d, 0).reshape(-1) for d in range(max(1, x.ndim))][:2]) if x.ndim else x[None]


@op
def sequential_modules(draw):
    a, b = draw.factors(2)
    options = {"bias": False, "dtype": draw.dtype}
    net = nn.Sequential(nn.Linear(b, 3, **options), nn.Identity(), nn.Flatten(0), nn.Linear(3 * a, 2, **options))
    return lambda x: net(x.reshape(a, b))


@op
def dropout_in_eval(draw):
    layer = nn.Sequential(nn.Dropout(), nn.Linear(draw.numel, 3, bias=False, dtype=draw.dtype)).eval()
    return lambda x: layer(x.reshape(-1))


class Tripled(torch.autograd.Function):
    """`x ↦ 3 x`."""

    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, v):
        return 3 * v


class Weighted(torch.autograd.Function):
    """`x ↦ c x` with a constant c, complex where x is."""

    @staticmethod
    def forward(ctx, x, c):
        ctx.save_for_backward(c)
        return c * x

    @staticmethod
    def backward(ctx, v):
        (c,) = ctx.saved_tensors
        return c.conj() * v, None


class Differences(torch.autograd.Function):
    """`x ↦ x[1:] - x[:-1]`, written in NumPy's way on a vector."""

    @staticmethod
    def forward(ctx, x):
        return x[1:] - x[:-1]

    @staticmethod
    def backward(ctx, v):
        return F.pad(v, (1, 0)) - F.pad(v, (0, 1))


@op
def own_function(draw):
    return Tripled.apply


@op
def own_function_with_constant(draw):
    c = draw.randn(*draw.shape)
    return lambda x: Weighted.apply(x, c)


@op
def own_function_of_vectors(draw):
    if draw.numel < 2:
        raise UnsuitableError
    return lambda x: Differences.apply(x.reshape(-1))


@op
def own_function_twice(draw):
    return lambda x: Tripled.apply(x) - Tripled.apply(Tripled.apply(x))


@op
def vmapped(draw):
    a, b = draw.factors(2)
    c = draw.randn(b)
    return lambda x: torch.vmap(lambda row: row * c)(x.reshape(a, b))


@op
def checkpointed(draw):
    from torch.utils.checkpoint import checkpoint

    return lambda x: checkpoint(lambda z: 2 * z.cumsum(0) if z.ndim else 2 * z, x, use_reentrant=False)


# ---------------------------------------------------------------------------------------------------------------- trees


@tree_op
def to_tuple(draw):
    return lambda leaves: (leaves[0], 2 * leaves[0].flip(0) if leaves[0].ndim else leaves[0], *leaves[1:])


@tree_op
def to_dictionary(draw):
    return lambda leaves: {"b": leaves[0], "a": [-leaf for leaf in leaves]}


@tree_op
def to_nested(draw):
    return lambda leaves: [leaves[-1], {"x": (leaves[0], leaves[0].sum()), "y": [3 * leaves[-1]]}]


@tree_op
def same_leaf_twice(draw):
    return lambda leaves: (*leaves, leaves[0])


@tree_op
def reversed_leaves(draw):
    return lambda leaves: tuple(leaves[::-1])


@tree_op
def first_leaf(draw):
    return lambda leaves: leaves[0]


@tree_op
def merged_leaves(draw):
    return lambda leaves: torch.cat([leaf.reshape(-1) for leaf in leaves])


@tree_op
def sum_of_leaves(draw):
    return lambda leaves: sum(leaf.sum() * k for k, leaf in enumerate(leaves, 1))
