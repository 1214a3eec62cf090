"""What follows from the sizes of a convolution: lengths for transforms, and which outputs are computed together."""

import math

import pytest
from built import square
from hypothesis import given
from hypothesis import strategies as st

from adjointlab.transpose.kernels.convolution import fast_length, sized, smooth, spectra_meet


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("width", [3, 4, 17, 500])
@pytest.mark.parametrize("channels", [1, 3, 20])
def test_phases_fill_a_vector_with_channels(width: int, channels: int, dims: int) -> None:
    spec = square(width, 3, dims, transposed=False)
    phases = sized(spec._replace(output_shape=(channels, *[width] * dims))).phases
    room = 1 << int(math.log2(max(1, width / 2))) * dims  # at most half of the outputs of a dimension are neighbours
    assert math.prod(phases) == min(room, max(1, 1 << int(math.log2(16 / channels)))) if channels < 16 else 1
    assert all(2 * c <= width for c in phases if c > 1)


@pytest.mark.parametrize(
    ("n", "k", "dims", "phases"),
    [(64, 3, 2, (1, 16)), (512, 11, 2, (4, 4)), (128, 3, 3, (4, 4, 1)), (999, 9, 1, (16,))],
)
def test_blocks_of_phases_are_compact_where_that_pays(n: int, k: int, dims: int, phases: tuple[int, ...]) -> None:
    assert square(n, k, dims, transposed=False).phases == phases


def test_of_equal_blocks_the_outer_one_is_taken() -> None:
    spec = sized(square(48, 3, 3, transposed=False)._replace(output_shape=(8, 48, 48, 48)))
    assert spec.phases == (2, 1, 1)


@pytest.mark.parametrize(("stride", "total"), [((2, 2), 16), ((3, 1), 12), ((1, 5), 10), ((7, 7), 49)])
def test_outputs_between_those_of_a_stride_are_phases(stride: tuple[int, int], total: int) -> None:
    spec = square(40, 3, 2, transposed=True)._replace(stride=stride, padding=(0, 0))
    spec = sized(spec._replace(output_shape=(1, *[39 * s + 3 for s in stride])))
    assert math.prod(spec.phases) == total
    assert all(c % s == 0 for c, s in zip(spec.phases, stride, strict=True))


@given(st.integers(1, 5000))
def test_fast_lengths_are_the_next_even_smooth_numbers(n: int) -> None:
    length = fast_length(n)
    assert length % 2 == 0
    assert smooth(length)
    assert not any(smooth(k) for k in range(n + n % 2, length, 2))


@given(st.integers(1, 2_000))
def test_smooth_numbers_are_made_of_small_primes(n: int) -> None:
    primes = [p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, math.isqrt(p) + 1))]
    assert smooth(n) is (max(primes, default=1) <= 11)


def test_spectra_meet_where_all_of_the_image_between_is_transformed() -> None:
    first, second = square(64, 5, 2, transposed=False), square(64, 5, 2, transposed=True)
    cyclic = [spec._replace(fft_size=(64, 64)) for spec in (first, second)]
    assert spectra_meet(*cyclic)
    assert not spectra_meet(first, second)
    assert not spectra_meet(cyclic[0]._replace(stride=(2, 1)), cyclic[1])
    assert not spectra_meet(cyclic[0], cyclic[1]._replace(fft_size=(64, 72)))
