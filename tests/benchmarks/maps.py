"""Linear maps that read by index, and every way at hand to compute them and their adjoints.

What reads by index is given as a table: for each entry of the result, places in x and the weights of what is there.
Tables, and the matrices made of them, are ready before anything is timed.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from contenders import Skipped, Ways, imported
from scipy import sparse
from torch import Tensor

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Map:
    """A linear map with an argument, equal ways by hand, and SciPy's matrix and the table where it has them."""

    case: str
    forward: Function
    x: Tensor
    forwards: dict[str, Function] = field(default_factory=dict)
    adjoints: dict[str, Function] = field(default_factory=dict)
    matrix: Any = None  # for each channel, if there are several
    table: tuple[Tensor, Tensor] | None = None

    @functools.cached_property
    def v(self) -> Tensor:
        """An argument of the adjoint."""
        found = self.forward(self.x)
        return draw(*found.shape, dtype=found.dtype)


def adjoint_ways(m: Map) -> tuple[Ways, Skipped]:
    """Return what computes the adjoint of a map at v, but for the operators."""
    ways: Ways = {"eager": eager_adjoint(m)}
    if m.matrix is not None:
        ways["CSR"] = functools.partial(by_csr(m.matrix.T), m.v)
    ways |= {name: functools.partial(run, m.v) for name, run in m.adjoints.items()}
    return _with_libraries(m, ways, adjoint=True)


def forward_ways(m: Map) -> tuple[Ways, Skipped]:
    """Return what computes a map at x, but for the operators."""
    ways: Ways = {"eager": lambda: m.forward(m.x)}
    if m.matrix is not None:
        ways["CSR"] = functools.partial(by_csr(m.matrix), m.x)
    ways |= {name: functools.partial(run, m.x) for name, run in m.forwards.items()}
    return _with_libraries(m, ways, adjoint=False)


def eager_adjoint(m: Map) -> Callable[[], Tensor]:
    """Return the adjoint as autograd computes it: the forward, and then back through it."""

    def by_vjp() -> Tensor:
        return torch.func.vjp(m.forward, m.x)[1](m.v)[0]

    @torch.enable_grad()
    def by_grad() -> Tensor:
        x = m.x.detach().requires_grad_()
        return torch.autograd.grad(m.forward(x), x, m.v)[0]

    try:
        by_vjp()
    except RuntimeError:  # torch.func refuses the layout CSR
        return by_grad
    return by_vjp


def _with_libraries(m: Map, ways: Ways, *, adjoint: bool) -> tuple[Ways, Skipped]:
    skipped: Skipped = {}
    if m.matrix is None:
        skipped["SciPy"] = "there is no matrix at hand"
    else:
        ways["SciPy"] = _scipy(m, adjoint)
    if m.table is None:
        skipped["JAX"] = "for gathers only"
    elif (jax := imported("jax", "cpu")) is None:
        skipped["JAX"] = "not installed"
    else:
        ways["JAX"] = _jax(jax, m, m.table, adjoint)
    return ways, skipped


def _scipy(m: Map, adjoint: bool) -> Callable[[], Any]:
    M = m.matrix.T if adjoint else m.matrix
    u = (m.v if adjoint else m.x).reshape(-1, M.shape[1]).numpy()
    return lambda: [M @ each for each in u]


def _jax(jax: Any, m: Map, table: tuple[Tensor, Tensor], adjoint: bool) -> Callable[[], Any]:
    index, weights = (jax.numpy.asarray(t.numpy()) for t in (table[0].int(), table[1]))
    u = jax.numpy.asarray((m.v if adjoint else m.x).reshape(-1).numpy())

    def forward(index: Any, weights: Any, x: Any) -> Any:
        return (x[index] * weights).sum(-1)

    def transpose(index: Any, weights: Any, v: Any) -> Any:
        x = jax.ShapeDtypeStruct((m.x.numel(),), u.dtype)
        return jax.linear_transpose(functools.partial(forward, index, weights), x)(v)[0]

    run = jax.jit(transpose if adjoint else forward)
    return lambda: run(index, weights, u).block_until_ready()


# -- tables and matrices -----------------------------------------------------------------------------------------------


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def draw_index(most: int, *shape: int) -> Tensor:
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(1))


def around(places: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the pixels around places (…, d), numbered, and their weights: linear along each dimension, 0 outside."""
    sizes = torch.tensor(shape)
    near = places.floor().long()[..., None, :] + torch.tensor(list(itertools.product((0, 1), repeat=len(shape))))
    weights = (1 - (places[..., None, :] - near).abs()).prod(-1)
    inside = ((near >= 0) & (near < sizes)).all(-1)
    return numbered(near.clamp_min(0).minimum(sizes - 1), shape), weights * inside


def numbered(places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the numbers of the entries at places (…, d) of a tensor of a shape."""
    return (places * torch.tensor([math.prod(shape[d + 1 :]) for d in range(len(shape))])).sum(-1)


def pixels(grid: Tensor, n: int) -> Tensor:
    """Return the places of a grid on an image of n², rows first."""
    return ((grid.flip(-1) + 1) * n - 1) / 2


def matrix_of(index: Tensor, weights: Tensor, columns: int) -> sparse.csr_array:
    """Return the matrix of a table; of a row, entries at one place are added."""
    rows, each = index.shape
    start, column = np.arange(rows + 1, dtype=np.int32) * each, index.reshape(-1).numpy().astype(np.int32)
    found = sparse.csr_array((weights.reshape(-1).numpy().copy(), column, start), shape=(rows, columns))
    found.sum_duplicates()
    found.eliminate_zeros()
    return found


def csr(M: Any, index: torch.dtype = torch.int32) -> Tensor:
    """Return a matrix of SciPy as torch's CSR."""
    rows = M.tocsr()
    start, column, value = (torch.from_numpy(part) for part in (rows.indptr, rows.indices, rows.data))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return torch.sparse_csr_tensor(start.to(index), column.to(index), value, rows.shape, check_invariants=False)


def by_csr(M: Any) -> Function:
    """Return the product of a matrix with each channel."""
    ready = csr(M)

    def run(u: Tensor) -> Tensor:
        if u.numel() == ready.shape[1]:
            return ready @ u.reshape(-1)
        return torch.stack([ready @ each for each in u.reshape(-1, ready.shape[1])])

    return run


def by_products(along: Tensor) -> dict[str, Function]:
    """Return the products with a small matrix along the last two dimensions, dense and sparse."""
    left, right, rows = along.contiguous(), along.mT.contiguous(), csr(sparse.csr_array(along.numpy()))

    def of_image(image: Tensor) -> Tensor:
        return (rows @ (rows @ image).mT.contiguous()).mT

    def by_sparse(x: Tensor) -> Tensor:
        return torch.stack([of_image(image) for image in x.reshape(-1, *x.shape[-2:])])

    return {"small products": lambda x: left @ x @ right, "small sparse products": by_sparse}


# -- matrices, gathers and samples -------------------------------------------------------------------------------------


def matrix(layout: str, rows: int, columns: int, each: int) -> Map:
    part = columns // each  # a row has one entry in each part of the columns
    M = matrix_of(torch.arange(each) * part + draw_index(part, rows, each), draw(rows, each), columns)
    S = csr(M, torch.int64)  # as torch itself makes them
    S = S if layout == "CSR" else S.to_sparse_coo().coalesce()
    return Map(f"{layout} matrix, {rows:,} × {columns:,}, {each} a row", lambda x: S @ x, draw(columns), matrix=M)


def radon(n: int, angles: int) -> Map:
    theta = torch.arange(angles) * (math.pi / angles)
    cos, sin, zero = theta.cos(), theta.sin(), torch.zeros_like(theta)
    rotations = torch.stack([cos, -sin, zero, sin, cos, zero], dim=-1).reshape(-1, 2, 3)

    def grid() -> Tensor:
        return F.affine_grid(rotations, [angles, 1, n, n], align_corners=False)

    def forward(image: Tensor) -> Tensor:
        return F.grid_sample(image.expand(angles, -1, -1, -1), grid(), align_corners=False).sum(-2)

    table = (t.transpose(1, 2).reshape(angles * n, 4 * n) for t in around(pixels(grid(), n), (n, n)))
    return Map(f"Radon, {n}², {angles} angles", forward, draw(1, 1, n, n), matrix=matrix_of(*table, n * n))


def warp(channels: int, n: int) -> Map:
    y, x = torch.meshgrid(torch.linspace(-1, 1, n), torch.linspace(-1, 1, n), indexing="ij")
    grid = torch.stack([x + 0.1 * (3 * y).sin(), y + 0.1 * (4 * x).cos()], -1)[None]
    table = (t.reshape(n * n, 4) for t in around(pixels(grid, n), (n, n)))

    def forward(image: Tensor) -> Tensor:
        return F.grid_sample(image, grid, align_corners=False)

    return Map(f"warp, {channels} × {n}²", forward, draw(1, channels, n, n), matrix=matrix_of(*table, n * n))


def by_table(case: str, index: Tensor, weights: Tensor, shape: tuple[int, ...], summed: int) -> Map:
    """Return what gathers entries and weights them, and adds up over the last `summed` dimensions."""
    rows, columns = math.prod(index.shape[: index.ndim - summed]), math.prod(shape)
    dims = tuple(range(-summed, 0))

    def forward(x: Tensor) -> Tensor:
        found = x.reshape(-1)[index] * weights
        return found.sum(dims) if dims else found

    flat, factors = index.reshape(-1), weights.reshape(rows, -1)

    def index_add(v: Tensor) -> Tensor:
        return v.new_zeros(columns).index_add_(0, flat, (v.reshape(-1, 1) * factors).reshape(-1))

    table = index.reshape(rows, -1), factors
    M = matrix_of(*table, columns)
    return Map(case, forward, draw(*shape), adjoints={"index_add": index_add}, matrix=M, table=table)


def gather(count: int, n: int) -> Map:
    return by_table(f"gather, {count:,} of {n}²", draw_index(n * n, count), draw(count), (n, n), 0)


def ray_sum(rays: int, samples: int, n: int) -> Map:
    index = draw_index(n * n, rays, samples)
    return by_table(f"ray sum, {rays:,} × {samples} of {n}²", index, draw(rays, samples), (n, n), 1)


def fan_beam(n: int, views: int, detectors: int, samples: int) -> Map:
    index, weights = around(_rays(n, views, detectors, samples), (n, n))
    return by_table(f"fan beam, {n}², {views} × {detectors} rays", index, weights, (n, n), 2)


def cone_beam(n: int, views: int, detectors: int, samples: int) -> Map:
    plane = _rays(n, views, detectors, samples)[:, None].expand(-1, detectors, -1, -1, -1)
    # Heights along a ray, from 0 at the source to that of its pixel.
    height = torch.linspace(-1.3 * n, 1.3 * n, detectors)[:, None] * torch.linspace(1.25, 2.75, samples) / 4
    height = (height + (n - 1) / 2)[:, None, :, None].expand(views, -1, detectors, -1, -1)
    index, weights = around(torch.cat([height, plane], -1), (n, n, n))
    return by_table(f"cone beam, {n}³, {views} × {detectors}² rays", index, weights, (n, n, n), 2)


def _rays(n: int, views: int, detectors: int, samples: int) -> Tensor:
    """Return places along the rays from a source that turns around an image to a line of detectors behind it."""
    turn = torch.arange(views) * (2 * math.pi / views)
    away, across = torch.stack([turn.cos(), turn.sin()], -1), torch.stack([-turn.sin(), turn.cos()], -1)
    source = 2.0 * n * away[:, None]
    pixel = torch.linspace(-1.3 * n, 1.3 * n, detectors)[:, None] * across[:, None] - source
    part = torch.linspace(1.25, 2.75, samples)[:, None] / 4
    return source[..., None, :] + part * (pixel - source)[..., None, :] + (n - 1) / 2


# -- images, cubes and frequencies -------------------------------------------------------------------------------------


def resized(mode: str, channels: int, n: int, m: int) -> Map:
    settings = {} if mode == "nearest" else {"align_corners": False, "antialias": m < n}

    def forward(x: Tensor, width: int = m) -> Tensor:
        return F.interpolate(x, size=(m, width), mode=mode, **settings)

    # Images of four columns, which stay alone: each is a column of an identity.
    along = forward(torch.eye(n)[None, :, :, None].repeat(1, 1, 1, 4), 4)[0, :, :, 0].mT
    by = f"× {m // n}" if m > n else f"antialiased ÷ {n // m}"
    adjoints = by_products(along.mT)
    if mode == "nearest":
        adjoints["avg_pool2d"] = lambda v: F.avg_pool2d(v, m // n, divisor_override=1)
    case = f"{mode} {by}, {channels} × {n}²"
    return Map(case, forward, draw(1, channels, n, n), by_products(along), adjoints)


def pooled(width: int, n: int) -> Map:
    def repeated(v: Tensor) -> Tensor:
        return (v / width**2).repeat_interleave(width, -2).repeat_interleave(width, -1)

    def expanded(v: Tensor) -> Tensor:
        m = n // width
        return (v / width**2).reshape(m, 1, m, 1).expand(m, width, m, width).reshape(n, n)

    def mean(x: Tensor) -> Tensor:
        return x.reshape(n // width, width, n // width, width).mean((1, 3))

    adjoints = {"repeat_interleave": repeated, "expand": expanded}
    return Map(
        f"avg_pool2d({width}), {n}²", lambda x: F.avg_pool2d(x, width), draw(1, 1, n, n), {"mean": mean}, adjoints
    )


def wavelets(n: int, levels: int) -> Map:
    """Daubechies' wavelets with four taps, of period n: rows and columns of what is left, level after level."""
    root = math.sqrt(3)
    low = torch.tensor([1 + root, 3 + root, 3 - root, 1 - root]) / math.sqrt(32)
    high = low.flip(0) * torch.tensor([1, -1, 1, -1])
    sizes = [n >> level for level in range(levels)]
    tables = {m: (2 * torch.arange(m // 2)[:, None] + torch.arange(4)) % m for m in sizes}

    def along(x: Tensor) -> Tensor:
        near = x[..., tables[x.shape[-1]]]
        return torch.cat([(near * low).sum(-1), (near * high).sum(-1)], -1)

    def by_slices(v: Tensor) -> Tensor:
        a, d = v.chunk(2, -1)
        before, beside = a.roll(1, -1), d.roll(1, -1)
        even, odd = (low[j] * a + low[j + 2] * before + high[j] * d + high[j + 2] * beside for j in (0, 1))
        return torch.stack([even, odd], -1).flatten(-2)

    def adjoint(v: Tensor) -> Tensor:
        out = v.clone()
        for m in reversed(sizes):
            out[:m, :m] = by_slices(by_slices(out[:m, :m]).mT).mT
        return out

    def forward(x: Tensor) -> Tensor:
        out = x.clone()
        for m in sizes:
            out[:m, :m] = along(along(out[:m, :m]).mT).mT
        return out

    matrices = {m: along(torch.eye(m)).mT.contiguous() for m in sizes}

    def by_matrices(u: Tensor, *, transposed: bool) -> Tensor:
        out = u.clone()
        for m in reversed(sizes) if transposed else sizes:
            W = matrices[m].mT if transposed else matrices[m]
            out[:m, :m] = W @ out[:m, :m] @ W.mT
        return out

    forwards = {"small products": functools.partial(by_matrices, transposed=False)}
    adjoints = {"slices": adjoint, "small products": functools.partial(by_matrices, transposed=True)}
    return Map(f"wavelets, {n}², {levels} levels", forward, draw(n, n), forwards, adjoints)


def coded_aperture(bands: int, n: int) -> Map:
    mask = (draw(n, n) > 0).float()

    def forward(cube: Tensor) -> Tensor:
        shifted = cube.new_zeros(bands, n, n + bands - 1)
        for i, band in enumerate(mask * cube):
            shifted[i, :, i : i + n] = band
        return shifted.sum(0)

    def added(cube: Tensor) -> Tensor:
        out = cube.new_zeros(n, n + bands - 1)
        for i, band in enumerate(mask * cube):
            out[:, i : i + n] += band
        return out

    def windows(v: Tensor) -> Tensor:
        return v.unfold(1, n, 1).movedim(1, 0) * mask

    return Map(f"coded aperture, {bands} × {n}²", forward, draw(bands, n, n), {"added": added}, {"windows": windows})


def nonuniform_fourier(n: int, count: int, width: int) -> Map:
    """Frequencies between those of an FFT of twice the size: from the width² around each, weighted by a bell."""
    places = 2 * n * torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
    square = torch.tensor(list(itertools.product(range(-width // 2, width // 2), repeat=2)))
    near = places.ceil().long()[:, None] + square
    weights = torch.exp(-((places[:, None] - near) ** 2).sum(-1))
    index = numbered(near % (2 * n), (2 * n, 2 * n))
    at = torch.linspace(-0.5, 0.5, n)
    roll_off = torch.exp(2 * (at[:, None] ** 2 + at**2))
    rows = csr(matrix_of(index, weights, 4 * n * n))
    columns = csr(matrix_of(index, weights, 4 * n * n).T)

    def grid(x: Tensor) -> Tensor:
        return torch.fft.fft2(roll_off * x, s=(2 * n, 2 * n)).reshape(-1)

    def image(spread: Tensor) -> Tensor:
        return torch.fft.ifft2(spread.reshape(2 * n, 2 * n), norm="forward")[:n, :n] * roll_off

    def index_add(v: Tensor) -> Tensor:
        return image(v.new_zeros(4 * n * n).index_add_(0, index.reshape(-1), (v[:, None] * weights).reshape(-1)))

    def product(M: Tensor, u: Tensor) -> Tensor:  # real and imaginary parts beside one another
        return torch.view_as_complex(M @ torch.view_as_real(u))

    def forward(x: Tensor) -> Tensor:
        return (grid(x)[index] * weights).sum(-1)

    adjoints = {"CSR": lambda v: image(product(columns, v)), "index_add": index_add}
    case, x = f"nonuniform FFT, {n}², {count:,} × {width}²", draw(n, n, dtype=torch.complex64)
    return Map(case, forward, x, {"CSR": lambda x: product(rows, grid(x))}, adjoints)
