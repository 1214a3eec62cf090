r"""The dot-product test's statistic: ``|⟨Ax, y⟩ − ⟨x, By⟩|``, and how much of it rounding explains."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from typing import Any, TypeVar

import torch
from torch import Tensor

from adjointlab.space import Space

Tensors = tuple[Tensor, ...]
T = TypeVar("T")

DOT_UNITS = 4  # rounding errors up to this many units of eps pass without being measured, see dot_gap
SIGMAS = 8  # how many times a measured rounding error passes

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
    r"""Return ``|⟨Ax, y⟩ − ⟨x, By⟩|`` and what rounding may explain of it, both in units of ``‖Ax‖‖y‖``.

    Note: how much rounding explains
    --------------------------------
    With e the rounding error of ``Ax`` and f that of ``By``, a correct adjoint leaves the gap ``⟨e, y⟩ − ⟨x, f⟩``.
    A *random* y does not know e, so ``⟨e, y⟩`` is normal with the standard deviation ``‖e‖``, smaller by ``√n`` than
    the ``‖e‖‖y‖`` of the worst case; half precision needs that factor, or errors of some percent would pass.
    ``‖e‖`` is taken to be ``DOT_UNITS · eps ‖Ax‖``: one rounding makes it about ``0.3 eps ‖Ax‖``, so this is more than
    ten standard deviations, and of long chains some hundred roundings. Where a gap exceeds that, the caller measures
    the noise (:func:`rounding_noise`) and asks again.

    Parameters
    ----------
    domain, codomain : Space
        Of x and of y.
    x, at_x, y, at_y : tuple of Tensor
        Leaves of x, ``Ax``, y and ``By``.
    exact : bool
        Whether imaginary parts count; if not, the inner product is ``Re⟨·, ·⟩``.
    noise : tuple of float
        What is known besides about ``‖e‖`` and ``‖f‖``.
    random : tuple of bool
        Whether x and y are draws of independent normal numbers.
    norms : tuple of float, optional
        The norms of x, y, ``Ax`` and ``By``, if they are known.

    Returns
    -------
    tuple of float
        The gap and the allowance, both divided by ``max(‖Ax‖‖y‖, ‖x‖‖By‖)``.
    """
    difference = _inner(codomain, at_x, y) - _inner(domain, x, at_y)
    gap = abs(difference) if exact else abs(difference.real)
    if norms is None:
        norms = (norm(x, domain), norm(y, codomain), norm(at_x, codomain), norm(at_y, domain))
    norm_x, norm_y, norm_ax, norm_by = norms
    scale = max(norm_ax * norm_y, norm_x * norm_by)
    if scale == 0.0:
        return 0.0, DOT_UNITS * max(domain.eps, codomain.eps)
    eps = max(domain.eps, codomain.eps)
    tiny = [max(torch.finfo(s.dtype).tiny for s in space.specs) * space.size**0.5 for space in (codomain, domain)]
    e = max(DOT_UNITS * eps * norm_ax, noise[0], tiny[0]) * (min(1.0, norm_y) if random[1] else norm_y)
    f = max(DOT_UNITS * eps * norm_by, noise[1], tiny[1]) * (min(1.0, norm_x) if random[0] else norm_x)
    return gap / scale, math.hypot(e, f) / scale


def rounding_noise(
    function: Callable[[Tensors], Tensors], space: Space, codomain: Space, x: Tensors, at_x: Tensors, *, seed: int = 0
) -> float:
    """Return ``‖e‖`` as measured, e being the rounding error of a linear function at x, cancellation inside included.

    The result is compared at ``s x`` and at x moved by rounding. A linear function differs there by its rounding errors
    alone, which are other numbers of the same size. One that is not linear differs by more, but s is so close to one
    that this is a sixtieth of what the dot test sees of it.

    Parameters
    ----------
    function : callable
        From leaves to leaves.
    space, codomain : Space
        Of x and of its image.
    x, at_x : tuple of Tensor
        Where to measure, and the image.
    seed : int
        Of the rounding-sized moves.

    Returns
    -------
    float
        The largest of three measurements.
    """
    wide = [t.to(_WIDE[t.is_complex()]) for t in at_x]
    generator = torch.Generator().manual_seed(seed)
    steps = space.leaves(space.with_batch(x[0].shape[: space.batch_dims]).randn(generator))
    moved = [
        (1.0, tuple(t * (1 + torch.finfo(t.dtype).eps * r) for t, r in zip(x, steps, strict=True))),
        *((s, tuple(t * s for t in x)) for s in (65 / 64, 127 / 128)),  # exact in every dtype, but no power of two
    ]
    largest = 0.0
    for s, z in moved:
        differences = [t.to(w.dtype) - s * w for t, w in zip(function(z), wide, strict=True)]
        largest = max(largest, norm(tuple(differences), codomain))
    return largest


def norm(leaves: Tensors, space: Space | None = None) -> float:
    """Return ``‖a‖`` of the element with the given leaves, summed in double precision, and over processes if any."""
    lengths = [torch.linalg.vector_norm(t, dtype=_WIDE[t.is_complex()]) for t in leaves]
    if space is not None and space.is_sharded:
        return math.sqrt(float(space.total([length.square() for length in lengths])))
    return math.hypot(*map(float, lengths))


class _FullPrecision(ContextDecorator):
    """Have float32 be float32 in a block, where torch's settings allow less: TF32 has 11 bits, bfloat16 has 8.

    What compares two ways to compute the same is about the mathematics, and 32 units of TF32 would hide three per cent.
    For convolutions on CUDA, torch's default is TF32. The settings are those of the process: the first block that is
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
    """Set torch to full precision, and return what sets it back."""
    backends: Any = torch.backends  # whose types leave some of these out
    cudnn, cuda, mkldnn = backends.cudnn, backends.cuda, backends.mkldnn
    newer = (cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.conv, mkldnn.matmul)
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


__all__ = ["DOT_UNITS", "SIGMAS", "dot_gap", "full_precision", "norm", "rounding_noise"]
