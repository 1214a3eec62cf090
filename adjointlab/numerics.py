r"""Rounding: how far two results of one computation may be apart, and the dot test's ``|⟨Ax, y⟩ − ⟨x, By⟩|``.

This is the only place with a tolerance.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from typing import Any, TypeVar

import torch
from torch import Tensor

from adjointlab import compat
from adjointlab.space import Space

Tensors = tuple[Tensor, ...]
T = TypeVar("T")

# Rounding is allowed this many units of eps times the norms at hand: long sums and transforms use a handful.
UNITS = 16
DOT_UNITS = 4  # rounding errors up to this many units of eps pass without being measured, see dot_gap
SIGMAS = 8  # how many times a measured rounding error passes
MULTIPLES = (65 / 64, 127 / 128)  # exact in every dtype, but no powers of two: rounding is another one there

_BLOCKS = 64  # of a leaf, in a sketch
_BLOCK = 1 << 17  # entries that are converted at once
_MANY = 1 << 14  # entries from which on only memory is compared, which is ten times as fast as tensors
_memcmp = ctypes.CDLL("msvcrt" if os.name == "nt" else None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_WIDE = {True: torch.complex128, False: torch.float64}


def dot_gap(  # noqa: PLR0917  # two spaces and two pairs
    domain: Space,
    codomain: Space,
    x: Tensors,
    at_x: Tensors,
    y: Tensors,
    at_y: Tensors,
    *,
    exact: bool,
    noise: tuple[float, float] = (0.0, 0.0),
    random: tuple[bool, bool] = (True, True),
    norms: tuple[float, float, float, float] | None = None,
) -> tuple[float, float]:
    """Return ``|⟨Ax, y⟩ − ⟨x, By⟩|``, and what rounding explains of it, in units of ``max(‖Ax‖‖y‖, ‖x‖‖By‖)``.

    With e the rounding error of ``Ax`` and f that of ``By``, a correct adjoint leaves the gap ``⟨e, y⟩ − ⟨x, f⟩``.
    A *random* y does not know e, so ``⟨e, y⟩`` is normal with the standard deviation ``‖e‖``, smaller by ``√n`` than
    the ``‖e‖‖y‖`` of the worst case; half precision needs that factor, or errors of some percent would pass.
    ``‖e‖`` is taken to be ``DOT_UNITS · eps ‖Ax‖``: one rounding makes it about ``0.3 eps ‖Ax‖``, so this is more than
    ten standard deviations, and of long chains some hundred roundings. Where a gap exceeds that, the caller measures
    the noise (:func:`rounding_noise`) and asks again.

    If not ``exact``, imaginary parts do not count. ``noise`` bounds ``‖e‖`` and ``‖f‖`` from below; ``random`` tells
    whether x and y are draws of independent normal numbers; ``norms`` are those of x, y, ``Ax`` and ``By``, if known.
    """
    difference = _inner(codomain, at_x, y) - _inner(domain, x, at_y)
    gap = abs(difference) if exact else abs(difference.real)
    if norms is None:
        norms = (norm(x, domain), norm(y, codomain), norm(at_x, codomain), norm(at_y, domain))
    norm_x, norm_y, norm_ax, norm_by = norms
    scale = max(norm_ax * norm_y, norm_x * norm_by)
    if scale == 0.0:
        return 0.0, DOT_UNITS * max(domain.eps, codomain.eps)
    return gap / scale, dot_bound(domain, codomain, norms, noise=noise, random=random) / scale


def dot_bound(
    domain: Space,
    codomain: Space,
    norms: tuple[float, float, float, float],
    *,
    noise: tuple[float, float] = (0.0, 0.0),
    random: tuple[bool, bool] = (True, True),
    units: float = DOT_UNITS,
) -> float:
    """Return the part of ``|⟨Ax, y⟩ − ⟨x, By⟩|`` that rounding explains, given the norms of x, y, ``Ax`` and ``By``."""
    norm_x, norm_y, norm_ax, norm_by = norms
    eps = max(domain.eps, codomain.eps)
    tiny = [max(torch.finfo(s.dtype).tiny for s in space.specs) * space.size**0.5 for space in (codomain, domain)]
    e = max(units * eps * norm_ax, noise[0], tiny[0]) * (min(1.0, norm_y) if random[1] else norm_y)
    f = max(units * eps * norm_by, noise[1], tiny[1]) * (min(1.0, norm_x) if random[0] else norm_x)
    return math.hypot(e, f)


def rounding_noise(
    function: Callable[[Tensors], Tensors], space: Space, codomain: Space, x: Tensors, at_x: Tensors
) -> float:
    """Return ``‖e‖`` as measured, e being the rounding error of a linear function at x, cancellation inside included.

    The result is compared at ``s x`` and at x moved by rounding. A linear function differs there by its rounding errors
    alone, which are other numbers of the same size. One that is not linear differs by more, but s is so close to one
    that this is a sixtieth of what the dot test sees of it. The result is the largest of three measurements.
    """
    images = [wide(t) for t in at_x]
    steps = space.leaves(space.with_batch(x[0].shape[: space.batch_dims]).randn(torch.Generator().manual_seed(0)))
    moved = [(1.0, nudged(x, steps)), *((s, tuple(t * s for t in x)) for s in MULTIPLES)]
    largest = 0.0
    for s, z in moved:
        differences = [t.to(w.dtype) - s * w for t, w in zip(function(z), images, strict=True)]
        largest = max(largest, norm(tuple(differences), codomain))
    return largest


def nudged(leaves: Tensors, steps: Tensors) -> Tensors:
    """Return the leaves moved by rounding, each entry by so many units of it."""
    return tuple(t * (1 + torch.finfo(t.dtype).eps * r) for t, r in zip(leaves, steps, strict=True))


def norm(leaves: Tensors, space: Space | None = None) -> float:
    """Return ``‖a‖`` of the element with the given leaves, summed in double precision, and over processes if any."""
    lengths = [_length(t.detach()) for t in leaves]
    if space is not None and space.is_sharded:
        return math.sqrt(float(space.total([length.square() for length in lengths])))
    return math.hypot(*map(float, lengths))


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in double precision."""
    return tensor.to(_WIDE[tensor.is_complex()])


def eps_of(leaves: Sequence[Tensor]) -> float:
    """Return the unit roundoff of the coarsest leaf."""
    return max(float(torch.finfo(t.dtype).eps) for t in leaves)


def safe_scale(leaves: Sequence[Tensor]) -> float:
    """Return a power of two that leaves can be multiplied with and stay finite: 2²⁰, or what they leave room for."""
    largest = max((float(torch.linalg.vector_norm(t.detach(), math.inf)) for t in leaves if t.numel()), default=0.0)
    bound = min(float(torch.finfo(t.dtype).max) for t in leaves) / max(largest, 1.0)
    return 2.0 ** max(0, min(20, int(math.log2(max(bound, 1.0))) - 4))


def perturbed(leaves: Tensors) -> Tensors:
    """Return the leaves changed at random by one unit of rounding."""
    draw = torch.Generator().manual_seed(1)
    eps = eps_of(leaves)
    return tuple(t * (1 + eps * torch.randn(t.shape, generator=draw, device="cpu").to(t)) for t in leaves)


def allowance(units: float, eps: float) -> float:
    """Return the part of a norm that rounding explains: at most 1/16, which is 64 eps of float16 and 8 of bfloat16."""
    return min(units * eps, 1 / 16)


def relative_gap(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the largest ``‖eᵢ − fᵢ‖ / ‖eᵢ‖`` of expected and found leaves, infinite where only eᵢ is zero."""
    largest = 0.0
    for a, b in zip(expected, found, strict=True):
        difference, scale = norm((a.detach() - b.detach(),)), norm((a.detach(),))
        gap = difference / scale if scale else math.inf if difference else 0.0
        largest = math.inf if math.isnan(gap) else max(largest, gap)  # NaN agrees with nothing
    return largest


def commutes_with_i(function: Callable[[Tensors], Tensors], x: Tensors, codomain: Space) -> bool:
    """Return whether ``f(ix) = i f(x)`` in every leaf, to rounding, for a real-linear function of complex leaves."""
    left, at_x = function(tuple(1j * t for t in x)), function(x)
    gaps = [norm((a - 1j * b,)) for a, b in zip(left, at_x, strict=True)]
    units = allowance(UNITS, eps_of((*x, *at_x)))
    bounds = [units * max(norm((a,)), norm((b,))) for a, b in zip(left, at_x, strict=True)]
    if codomain.every(all(gap <= bound for gap, bound in zip(gaps, bounds, strict=True))):
        return True
    # Rounding that is larger, by cancellation or a coarser dtype inside, shows at multiples of x that are not powers of
    # two. A part that is only real-linear does not.
    for s in MULTIPLES:
        moved = function(tuple(s * t for t in x))
        noise = [SIGMAS * norm((a - s * b,)) for a, b in zip(moved, at_x, strict=True)]
        bounds = [max(bound, extra) for bound, extra in zip(bounds, noise, strict=True)]
    # However noisy it is, a map with f(ix) = i f(x) to no digit at all does not commute.
    bounds = [min(bound, norm((a,)) / 16) for bound, a in zip(bounds, left, strict=True)]
    return codomain.every(all(gap <= bound for gap, bound in zip(gaps, bounds, strict=True)))


def sketch(leaf: Tensor, direction: Tensor) -> Tensor:
    """Return ``Σ conj(aᵢ) dᵢ`` over each of some blocks of a leaf, in double precision.

    With normal numbers dᵢ, ``‖sketch(a) − sketch(b)‖`` is ``‖a − b‖`` in the mean, and takes hardly any memory.
    """
    a, d = leaf.detach().reshape(-1), direction.detach().reshape(-1)
    wide, size = _WIDE[a.is_complex() or d.is_complex()], max(1, -(-a.numel() // _BLOCKS))
    pairs = zip(a.split(size), d.split(size), strict=True)
    return torch.stack([torch.vdot(s.to(wide), t.to(wide)) for s, t in pairs])


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, NaN being equal to NaN; of large ones, whether they are bit for bit.

    ``b`` may be a copy on the CPU: to fetch a small tensor takes half as long as to have an accelerator compare it.
    """
    if b.is_cpu and not a.is_cpu:
        a = a.cpu()
    if a.dtype is not b.dtype or a.shape != b.shape or a.layout is not b.layout:
        return False
    if a.layout is not torch.strided:
        return a is b or all(map(same, parts_of(a), parts_of(b)))
    if _is_memory(a) and _is_memory(b):
        is_same = not _memcmp(a.data_ptr(), b.data_ptr(), a.nbytes)
        if is_same or a.numel() >= _MANY:
            return is_same
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def parts_of(matrix: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors that a sparse one is made of; a dense one itself."""
    if matrix.layout is torch.strided:
        return (matrix,)
    matrix = matrix.detach()
    if matrix.layout is torch.sparse_coo:
        return matrix._indices(), matrix._values()
    if matrix.layout in {torch.sparse_csr, torch.sparse_bsr}:
        return matrix.crow_indices(), matrix.col_indices(), matrix.values()
    return matrix.ccol_indices(), matrix.row_indices(), matrix.values()


def _is_memory(tensor: Tensor) -> bool:
    """Return whether a tensor is a block of memory, and nothing else."""
    lazy = tensor.is_conj() or tensor.is_neg() or compat.is_wrapped(tensor)
    return tensor.is_cpu and tensor.is_contiguous() and not lazy


def _length(leaf: Tensor) -> Tensor:
    """Return the norm of a leaf in double precision, block by block: torch would convert all of it at once."""
    wide = _WIDE[leaf.is_complex()]
    blocks = leaf.reshape(-1).split(_BLOCK) if leaf.dtype is not wide else (leaf,)
    lengths = [torch.linalg.vector_norm(block, dtype=wide) for block in blocks]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(lengths))
    return whole


class _FullPrecision(ContextDecorator):
    """Have float32 be float32 in a block, where torch's settings allow less: TF32 has 11 bits, bfloat16 has 8.

    Two ways to compute the same are compared as mathematics, and 32 units of TF32 would hide three per cent. For
    convolutions on CUDA, torch's default is TF32. The settings are those of the process: the first block that is
    entered, in whatever thread, changes them, and the last one that is left restores them.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._restore: Callable[[], None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._restore = _set_full_precision()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._restore is not None:
                self._restore()


full_precision = _FullPrecision()


def _set_full_precision() -> Callable[[], None]:
    """Set torch to full precision, and return the function that sets it back."""
    backends: Any = torch.backends  # whose types leave some of these out
    cudnn, cuda, mkldnn = backends.cudnn, backends.cuda, backends.mkldnn
    parts = [(cudnn, "conv"), (cudnn, "rnn"), (cuda, "matmul"), (mkldnn, "conv"), (mkldnn, "matmul")]
    # Since torch 2.9: before that, the older settings are all there is.
    settings: list[Any] = [getattr(part, name, None) for part, name in parts]
    newer = [setting for setting in settings if hasattr(setting, "fp32_precision")]
    before = [setting.fp32_precision for setting in newer]
    # torch has older settings besides, and wants both to say the same.
    convolutions = _readable(lambda: cudnn.allow_tf32)
    products = _readable(torch.get_float32_matmul_precision)

    def set_to(convolutions: bool | None, products: str | None, precisions: Sequence[str]) -> None:
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        if products is not None:
            torch.set_float32_matmul_precision(products)
        for setting, precision in zip(newer, precisions, strict=True):
            setting.fp32_precision = precision

    set_to(convolutions and False, products and "highest", ["ieee"] * len(newer))
    return lambda: set_to(convolutions, products, before)


def _readable(older: Callable[[], T]) -> T | None:
    """Return one of torch's older settings; None where the newer ones have been set, under which it cannot be read."""
    try:
        return older()
    except RuntimeError:
        return None


def _inner(space: Space, a: Tensors, b: Tensors) -> complex:
    """Return ``⟨a, b⟩`` in double precision, summed pairwise: float64 itself deserves sums better than its own."""
    wide = _WIDE[space.is_complex]
    terms = [(s.detach().to(wide).conj() * t.detach().to(wide)).sum() for s, t in zip(a, b, strict=True)]
    return complex(space.total(terms)) if space.is_sharded else complex(sum(map(complex, terms)))
