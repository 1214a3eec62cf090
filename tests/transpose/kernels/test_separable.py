"""Interpolation and mean pooling are products along dimensions: forwards, transposed, in every way to multiply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from laws import assert_close
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from adjointlab.transpose.kernels import separable

aten = torch.ops.aten
MODES = {
    "nearest": (1, 2, 3),
    "nearest-exact": (1, 2, 3),
    "linear": (1,),
    "bilinear": (2,),
    "trilinear": (3,),
    "bicubic": (2,),
}


class _Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the calls of separable operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in separable.SEPARABLE:
            self.calls.append((func.overloadpacket, args, func(*args, **(kwargs or {}))))
            return self.calls[-1][-1]
        return func(*args, **(kwargs or {}))


def _assert_products(function: Any, x: Tensor) -> None:
    """Assert that a function and its transpose are the products along dimensions that they are said to be."""
    x, eps = x.requires_grad_(), torch.finfo(x.dtype).eps
    with _Recorded() as recorded:
        y = function(x)
        if y.requires_grad:
            torch.autograd.grad(y, x, torch.randn_like(y))
    assert recorded.calls
    for packet, (source, *rest), expected in recorded.calls:
        parts = separable.factors(packet, source, rest)
        assert parts is not None
        assert all(m.shape == (expected.shape[d], source.shape[d]) for d, m in parts)
        if not parts:
            assert_close(source, expected, eps)
        for run in separable.ways(parts, source.shape, expected.shape) if parts else ():
            found = run(source.detach())
            assert found.is_contiguous()
            assert_close(found, expected.detach(), eps)


@given(st.data(), st.sampled_from(list(MODES)), st.booleans(), st.booleans(), st.booleans())
def test_interpolation(data: Any, mode: str, corners: bool, by_size: bool, antialias: bool) -> None:
    dims = data.draw(st.sampled_from(MODES[mode]))
    n = data.draw(st.lists(st.integers(2, 9), min_size=dims, max_size=dims))
    options: dict[str, Any] = {"mode": mode}
    if not mode.startswith("nearest"):
        options["align_corners"] = corners
    if mode in {"bilinear", "bicubic"}:
        options["antialias"] = antialias
    if by_size:
        options["size"] = data.draw(st.lists(st.integers(1, 12), min_size=dims, max_size=dims))
    else:
        options["scale_factor"] = data.draw(st.lists(st.floats(0.5, 3.0), min_size=dims, max_size=dims))
        # PyTorch's own backward is wrong where a factor leaves the size as it is.
        assume(all(f == 1 or int(size * f) != size for size, f in zip(n, options["scale_factor"], strict=True)))
    # PyTorch's own antialiased interpolation is wrong where results are one column wide, its backward with factors.
    assume(not options.get("antialias") or (by_size and 1 not in options["size"]))
    shape = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 3)))
    _assert_products(lambda x: F.interpolate(x, **options), torch.randn(*shape, *n, dtype=torch.float64))


@given(st.data(), st.integers(2, 3), st.booleans(), st.booleans())
def test_mean_pools(data: Any, dims: int, ceil: bool, counts: bool) -> None:
    each = lambda low, high: data.draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims))  # noqa: E731
    n, kernel, stride = each(3, 9), each(1, 3), each(1, 4)
    padding = [data.draw(st.integers(0, k // 2)) for k in kernel]
    divisor = data.draw(st.sampled_from([None, 1, 5]))
    pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
    batch = data.draw(st.sampled_from([(), (2,)]))
    x = torch.randn(*batch, 2, *n, dtype=torch.float64)
    _assert_products(lambda x: pool(x, kernel, stride, padding, ceil, counts, divisor), x)


@given(st.data(), st.integers(2, 3))
def test_pools_to_a_size(data: Any, dims: int) -> None:
    n, m = (data.draw(st.lists(st.integers(1, 9), min_size=dims, max_size=dims)) for _ in range(2))
    assume(m != [1] * dims)  # that is a mean, to PyTorch
    pool = F.adaptive_avg_pool2d if dims == 2 else F.adaptive_avg_pool3d
    _assert_products(lambda x: pool(x, m), torch.randn(2, 3, *n, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_entries_are_those_of_the_dtype(dtype: torch.dtype) -> None:
    # Where rounding decides (2.3 in float64), PyTorch's own backward is not the adjoint of its forward.
    _assert_products(lambda x: F.interpolate(x, scale_factor=(1.7, 2.31)), torch.randn(1, 1, 57, 33, dtype=dtype))


def test_not_a_number_stays_where_it_was() -> None:
    x = torch.randn(1, 2, 8, 8)
    x[0, 1, 3, 4] = torch.nan
    bicubic = (aten.upsample_bicubic2d, ([19, 23], False))  # no weight of which is zero
    for packet, args in (bicubic, (aten.avg_pool2d, ([2, 2],)), (aten.upsample_nearest2d, ([16, 16],))):
        expected = packet.default(x, *args)
        parts = separable.factors(packet, x, args)
        assert parts is not None
        for run in separable.ways(parts, x.shape, expected.shape):
            assert torch.equal(run(x).isnan(), expected.isnan())


def test_one_long_dimension_is_no_small_matrix() -> None:
    x = torch.empty(1, 1, 1 << 20, device="meta")
    assert separable.factors(aten.upsample_linear1d, x, ([1 << 21], False)) is None


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128], ids=str)
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_dense_products_leave_what_is_not_finite_where_it_is(dtype: torch.dtype, number: float) -> None:
    parts = [(1, torch.eye(6, 4, dtype=dtype) * 2), (2, torch.eye(3, 5, dtype=dtype) + 0)]
    sparse, *_, small = separable.ways(parts, (3, 4, 5), (3, 6, 3))
    assert small.__name__ == "small_products"
    x = torch.randn(3, 4, 5, dtype=dtype)
    assert_close(small(x), sparse(x), torch.finfo(dtype).eps)
    x[1, 2, 1] = number
    assert not sparse(x).isfinite().all()
    assert torch.equal(small(x).isfinite(), sparse(x).isfinite())


class Seen(TorchDispatchMode):
    """Notes the operations that run, as a trace does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.cpu
def test_dense_products_look_at_no_value_in_a_trace() -> None:
    parts = [(1, torch.eye(6, 4) * 2), (2, torch.eye(3, 5) + 0)]
    *_, small = separable.ways(parts, (3, 4, 5), (3, 6, 3))
    x = torch.randn(3, 4, 5)
    with Seen() as seen:
        found = small(x)
    assert seen.calls
    assert aten._local_scalar_dense.default not in seen.calls
    assert_close(found, small(x), torch.finfo(x.dtype).eps)
