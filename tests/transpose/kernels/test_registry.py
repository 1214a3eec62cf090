"""Every kernel computes the same convolution, about as accurately as the native one."""

import math

import pytest
import torch
from built import BY_NAME, needs_torch, square
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adjointlab.transpose.kernels import polyphase
from adjointlab.transpose.kernels.convolution import ConvSpec, sized
from adjointlab.transpose.kernels.registry import available, bound


@st.composite
def specs(draw: st.DrawFn) -> ConvSpec:
    """Draw a convolution of any kind that PyTorch takes."""
    dims = draw(st.integers(1, 3))
    transposed = draw(st.booleans())

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups = draw(st.integers(1, 3))
    c_in, c_out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kernel, stride, dilation, padding = each(1, 4), each(1, 3), each(1, 2), each(0, 4)
    extra = tuple(
        draw(st.integers(0, max(s, d) - 1)) if transposed else 0 for s, d in zip(stride, dilation, strict=True)
    )
    size = each(7, 10)
    out = [
        (n - 1) * s - 2 * p + d * (k - 1) + e + 1 if transposed else (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, s, p, d, k, e in zip(size, stride, padding, dilation, kernel, extra, strict=True)
    ]
    if min(out) < 1:
        padding = (0,) * dims
        out = [
            (n - 1) * s + d * (k - 1) + e + 1 if transposed else (n - d * (k - 1) - 1) // s + 1
            for n, s, d, k, e in zip(size, stride, dilation, kernel, extra, strict=True)
        ]
    shapes = (2, (c_in, *size), (c_out, *out), kernel)
    kind = (torch.float64, torch.get_default_device())
    return sized(ConvSpec(*shapes, stride, padding, dilation, transposed, extra, groups, *kind))


def problem(spec: ConvSpec, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator(spec.device).manual_seed(1)
    c_in, c_out = spec.input_shape[0], spec.output_shape[0]
    first, second = (c_in, c_out // spec.groups) if spec.transposed else (c_out, c_in // spec.groups)
    shapes = [(spec.batch, *spec.input_shape), (first, second, *spec.kernel), (c_out,)]
    x, weight, bias = (torch.randn(s, generator=draw, dtype=dtype or spec.dtype, device=spec.device) for s in shapes)
    return x, weight, bias


def run(name: str, spec: ConvSpec, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kernel = BY_NAME[name]
    ready = weight if kernel.prepack is None else kernel.bind_prepack(spec)(weight)
    assert bound(kernel.bind(spec)) == (kernel, spec)
    return kernel.bind(spec)(x, ready, bias)


def names(spec: ConvSpec) -> set[str]:
    return {kernel.name for kernel in available(spec)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(spec=specs())
@settings(max_examples=80, deadline=None)
def test_kernels_agree(spec: ConvSpec, dtype: torch.dtype) -> None:
    spec = spec._replace(dtype=dtype)
    x, weight, bias = problem(spec)
    exact = run("native", spec, x.double(), weight.double(), bias.double())
    assert exact.shape[1:] == spec.output_shape
    terms = math.prod(spec.kernel) * spec.input_shape[0]
    for name in {*names(spec), "fft"} - {"native"}:
        found = run(name, spec, x, weight, bias)
        assert found.dtype == dtype
        assert found.shape == exact.shape
        assert found.is_contiguous()
        scale = float(x.norm() * weight.norm())
        assert float((found - exact).abs().max()) <= 4 * math.sqrt(terms) * torch.finfo(dtype).eps * scale


@given(spec=specs())
@settings(max_examples=40, deadline=None)
def test_products_of_transforms_have_the_same_shape_on_accelerators(spec: ConvSpec) -> None:
    elsewhere = spec._replace(device=torch.device("meta"))
    x, weight, bias = (tensor.to("meta") for tensor in problem(spec))
    found = run("fft", elsewhere, x, weight, bias)
    assert found.shape[1:] == spec.output_shape
    assert found.is_contiguous()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "dims"), [(512, 9, 1), (64, 3, 2), (64, 7, 2), (128, 11, 2), (16, 3, 3), (24, 5, 3)]
)
def test_lowered_kernels_are_at_most_four_times_less_accurate(n: int, k: int, dims: int, transposed: bool) -> None:
    spec = square(n, k, dims, transposed=transposed)
    x, weight, _ = problem(spec)
    exact = run("native", spec._replace(dtype=torch.float64), x.double(), weight.double(), None)
    errors = {name: float((run(name, spec, x, weight, None) - exact).norm()) for name in names(spec)}
    assert max(errors.values()) <= 4 * errors["native"]


def test_few_terms_are_no_work_for_a_transform() -> None:
    assert "fft" not in names(square(512, 3, 2, transposed=True))
    assert "fft" in names(square(512, 11, 2, transposed=True))


def test_half_precision_stays_native() -> None:
    assert names(square(64, 11, 2, transposed=False, dtype=torch.bfloat16)) == {"native"}


@needs_torch("2.10", "such a convolution with a bias ends the process")
def test_a_kernel_of_one_entry_is_not_dilated() -> None:
    """With a bias, oneDNN reads past the end of the image, and may crash."""
    spec = ConvSpec(
        2, (1, 8, 2), (1, 7, 2), (2, 1), (1, 3), (0, 1), (1, 4), False, (0, 0), 1, torch.float32, torch.device("cpu")
    )
    x, weight, bias = problem(sized(spec))
    assert "polyphase" in names(sized(spec))
    expected = run("native", spec, x, weight, bias)
    for _ in range(20):
        assert torch.allclose(run("polyphase", sized(spec), x, weight, bias), expected, atol=1e-6)


@given(spec=specs().filter(lambda spec: spec.transposed and spec.groups == 1))
@settings(max_examples=40, deadline=None)
def test_phases_share_the_taps_of_a_stride(spec: ConvSpec) -> None:
    """Each tap is in the kernel of one of as many neighbouring outputs as the stride counts, and once there."""
    _, weight, _ = problem(spec)
    taps = math.prod(spec.kernel) * spec.input_shape[0] * spec.output_shape[0]
    assert int((polyphase.phase_kernels(weight, spec) != 0).sum()) == taps * math.prod(spec.phases) // math.prod(
        spec.stride
    )


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_phases_are_for_single_precision(dtype: torch.dtype) -> None:
    assert "polyphase" in names(square(64, 5, 2, transposed=False))
    assert "polyphase" not in names(square(64, 5, 2, transposed=False, dtype=dtype))


@pytest.mark.parametrize("shape", [(1, 1, 6, 5), (3, 1, 4, 5, 6), (2, 2, 6, 5), (1, 6, 5)])
def test_images_of_one_channel_are_in_both_orders(shape: tuple[int, ...]) -> None:
    image = torch.randn(shape)
    found = polyphase.channels_last(image)
    assert found.is_contiguous()
    assert torch.equal(found, image)
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    if order is not None and shape[1] == 1:
        assert found.stride() == torch.empty(shape, memory_format=order).stride()
    else:
        assert found is image
