"""Gradients of volumes that are computed slab by slab are those that they are."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import assert_close, draw, norm
from torch import Tensor, nn

import adjointlab as al
from adjointlab.transpose import pipeline as assemble
from adjointlab.transpose.kernels import select as choice
from adjointlab.transpose.kernels import slabs
from adjointlab.transpose.kernels.convolution import Site, sized
from adjointlab.transpose.runtime import program

pytestmark = pytest.mark.cpu


def of_volume(
    batch: int, channels: tuple[int, int], size: tuple[int, ...], kernel: tuple[int, ...], padding: tuple[int, ...]
) -> tuple[Site, Site]:
    """Return a convolution of a volume, and its transpose."""
    result = tuple(n + 2 * p - k + 1 for n, k, p in zip(size, kernel, padding, strict=True))
    shapes, one, zero = ((channels[0], *size), (channels[1], *result)), (1,) * 3, (0,) * 3
    kind = zero, 1, torch.float32, torch.device("cpu")
    plain = Site(batch, *shapes, kernel, one, padding, one, False, *kind)
    transposed = Site(batch, *shapes[::-1], kernel, one, padding, one, True, *kind)
    return sized(plain), sized(transposed)


@st.composite
def volumes(draw: st.DrawFn) -> tuple[Site, Site]:
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(3))
    padding = tuple(draw(st.integers(0, k - 1)) for k in kernel)
    size = tuple(draw(st.integers(k, 12)) for k in kernel)
    channels = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 8, 20]))
    return of_volume(draw(st.integers(1, 2)), channels, size, kernel, padding)


@given(sites=volumes().filter(lambda sites: slabs.suited(*sites)))
@settings(max_examples=150)
def test_slabs_agree_with_one_after_the_other(sites: tuple[Site, Site]) -> None:
    site, _ = sites
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(site.batch, *shape, generator=generator) for shape in (site.input_shape, site.output_shape))
    first, second = (
        torch.randn(site.output_shape[0], site.input_shape[0], *site.kernel, generator=generator) for _ in range(2)
    )
    data = y.clone()
    found = slabs.gradient(site)(x, y, slabs.gathering(first, site), slabs.scattering(second, site))
    assert torch.equal(y, data)
    assert found.is_contiguous()
    residual = F.conv3d(x.double(), first.double(), padding=site.padding) - y
    exact = F.conv_transpose3d(residual, second.double(), padding=site.padding)
    assert found.shape == exact.shape
    largest = [float(w.abs().sum()) for w in (first, second)]  # at least the operator norms
    scale = largest[1] * (largest[0] * norm(x) + norm(y))
    assert norm(found - exact) <= 16 * torch.finfo(torch.float32).eps * scale


def test_a_slab_fills_a_vector_where_the_depth_allows() -> None:
    assert slabs._sizes(of_volume(1, (1, 8), (48, 48, 48), (3, 3, 3), (1, 1, 1))[0]) == (2, 4, 4, 24)
    assert slabs._sizes(of_volume(1, (1, 8), (47, 48, 48), (3, 3, 3), (1, 1, 1))[0]) == (1, 3, 4, 47)
    assert slabs._sizes(of_volume(1, (1, 32), (48, 48, 46), (3, 3, 3), (1, 1, 1))[0]) == (1, 3, 2, 48)


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 2}, {"stride": (1, 2, 1)}, {"dilation": (1, 1, 2)}, {"padding": (3, 1, 1)}, {"dtype": torch.float64},
        {"transposed": True}, {"device": torch.device("meta")}, {"output_shape": (8, 12, 12, 1)}, {"batch": 0},
    ],
    ids=str,
)  # fmt: skip
def test_other_convolutions_are_not_suited(change: dict[str, object]) -> None:
    first, second = of_volume(1, (2, 8), (12, 12, 12), (3, 3, 3), (1, 1, 1))
    assert slabs.suited(first, second)
    other = sized(first._replace(**change))
    assert not slabs.suited(other, second)
    back = other._replace(input_shape=other.output_shape, output_shape=other.input_shape, transposed=True)
    assert not slabs.suited(other, sized(back))


def test_images_are_not_suited() -> None:
    one = (1,) * 2
    site = sized(
        Site(1, (1, 9, 9), (8, 9, 9), (3, 3), one, one, one, False, (0, 0), 1, torch.float32, torch.device("cpu"))
    )
    back = site._replace(input_shape=site.output_shape, output_shape=site.input_shape, transposed=True)
    assert not slabs.suited(site, sized(back))


def blurred(monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[al.LeastSquares, Tensor, list[int]]:
    """Return an objective whose gradient is computed in the last of all ways, an x, and the numbers of ways so far."""
    ways: list[int] = []

    def last(found: dict[program.Program, object], _: torch.device) -> program.Program:
        ways.append(len(found))
        return list(found)[-1]

    monkeypatch.setattr(choice, "quickest", last)
    module = nn.Conv3d(1, 4, 3, padding=1, **{"bias": False, **options}).requires_grad_(False)
    A = (al.affine_operator if module.bias is not None else al.linear_operator)(module, (2, 1, 8, 9, 10))
    linear = A.linear if module.bias is not None else A
    return al.LeastSquares(A, draw(linear.codomain, 1)), draw(linear.domain, 2), ways


def one_after_the_other(objective: al.LeastSquares, x: Tensor) -> Tensor:
    return objective.A.H(objective.A(x) - objective.y)


def scale(objective: al.LeastSquares, x: Tensor) -> float:
    largest = float(objective.A.module.weight.abs().sum())
    return largest * (largest * norm(x) + norm(objective.y))


def test_gradients_of_volumes_are_computed_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, x, ways = blurred(monkeypatch)
    eps = objective.A.domain.eps
    assert_close(objective.gradient(x), one_after_the_other(objective, x), eps, scale(objective, x))
    assert ways == [2]
    chosen = objective.A.source._derived[()].fused(False, False)
    assert [node.target for node in chosen.graph.body.nodes].count(slabs.gradient) == 1
    objective.y.mul_(2)  # data and kernel are read at every call
    objective.A.module.weight.data.mul_(3)
    assert_close(objective.gradient(x), one_after_the_other(objective, x), eps, scale(objective, x))


def test_where_more_than_the_gradient_is_wanted_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, x, ways = blurred(monkeypatch)
    _, gradient = objective.value_and_gradient(x)  # which needs the residual
    assert_close(gradient, one_after_the_other(objective, x), objective.A.domain.eps, scale(objective, x))
    al.LeastSquares(objective.A, objective.y, objective.y.abs()).gradient(x)  # a weight comes between
    biased, z, more = blurred(monkeypatch, bias=True)
    biased.gradient(z)
    assert ways + more == [1, 1, 1]


def test_slabs_that_are_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = slabs.gradient

    def wrong(site: Site) -> object:
        return lambda x, y, *rest: right(site)(x, -y, *rest)

    monkeypatch.setattr(slabs, "gradient", wrong)
    monkeypatch.setattr(program, "_SITED", {*program._SITED, wrong})
    objective, x, ways = blurred(monkeypatch)
    assert_close(objective.gradient(x), one_after_the_other(objective, x), objective.A.domain.eps, scale(objective, x))
    assert ways == [1]


def test_products_of_transforms_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose", lambda site, **_: "fft")
    module = nn.Conv3d(1, 4, 3, padding=1, bias=False).requires_grad_(False)
    A = al.linear_operator(module, (1, 1, 8, 9, 10))
    seen = []
    monkeypatch.setattr(assemble, "in_slabs", lambda graph, find=assemble.in_slabs: seen.append(find(graph)))
    al.LeastSquares(A, A.codomain.zeros()).gradient(A.domain.zeros())
    assert seen == [None]
