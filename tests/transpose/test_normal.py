"""AᴴA of a convolution as one convolution, and gradients that are made with it."""

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trace import ops_of
from torch import Tensor, nn

import adjointlab as al
from adjointlab.transpose import choice, kernels, normal, program
from adjointlab.transpose.fuse import residual_and_gradient
from adjointlab.transpose.lower import as_transposed
from adjointlab.transpose.simplify import simplify

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
aten = torch.ops.aten


@pytest.fixture
def preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what is here taken wherever it agrees, as if it were the quickest."""
    monkeypatch.setattr(choice, "quickest", lambda ways, _: list(ways)[-1])


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """Draw a convolution of stride one that is padded with zeros, and an image that just has room for its borders."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    kernel, padding, more = (tuple(draw(st.integers(*ends)) for _ in range(dims)) for ends in ((1, 5), (0, 3), (0, 3)))
    size = [max(2 * max(0, k - 1 - p), k - 2 * p, 1) + n for k, p, n in zip(kernel, padding, more, strict=True)]
    c_in, c_out = (groups * draw(st.integers(1, 2)) for _ in range(2))
    module = CONV[dims](c_in, c_out, kernel, padding=padding, groups=groups, bias=False, dtype=torch.float64)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    module.weight.data.normal_(generator=generator)
    return module.requires_grad_(requires_grad=False), torch.randn(2, c_in, *size, generator=generator).double()


def gram(module: Any, x: Tensor) -> Tensor:
    """Return ``AᴴA x`` by the parts of this room."""
    kernel, cut = module.kernel_size, normal._cut(module.kernel_size, module.padding)
    around = [k - 1 for k in kernel]
    ones, zeros = [1] * len(kernel), [0] * len(kernel)
    spread = normal.autocorrelation(module.weight, module.groups)
    whole = torch.convolution(x, spread, None, ones, around, ones, False, zeros, module.groups)
    dims = [n for n, q in enumerate(cut) if q]
    for along in (s for count in range(1, len(dims) + 1) for s in itertools.combinations(dims, count)):
        matrices = normal.border(module.weight, module.groups, module.padding, along)
        whole = normal.less_border(whole, x, matrices, kernel, cut, along)
    return whole


@given(convolutions())
@settings(max_examples=150)
def test_a_convolution_and_its_transpose_are_one_convolution_less_the_border(drawn: tuple[nn.Module, Tensor]) -> None:
    module, x = drawn
    y, back = torch.func.vjp(module, x)
    (expected,) = back(y)
    # Sums of so many products each, of entries of either sign.
    terms = module.weight[0].numel() * module.weight.shape[0]
    scale = float(module.weight.abs().sum()) ** 2 * float(x.abs().max())
    assert float((gram(module, x) - expected).abs().max()) <= 8 * terms**0.5 * torch.finfo(x.dtype).eps * scale


def test_without_what_the_border_cuts_off_it_were_wrong() -> None:
    module = nn.Conv2d(1, 2, 3, padding=1, bias=False, dtype=torch.float64).requires_grad_(requires_grad=False)
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = nn.functional.conv2d(x, normal.autocorrelation(module.weight, 1), padding=2)
    difference = (whole - gram(module, x)).abs()
    assert float(difference[..., 1:-1, 1:-1].max()) < 1e-14
    assert float(difference.max()) > 1e-3


def objective(module: nn.Module, x: Tensor) -> al.LeastSquares:
    A = al.affine_operator(module, x) if getattr(module, "bias", None) is not None else al.linear_operator(module, x)
    return al.LeastSquares(A, A.codomain.randn(torch.Generator().manual_seed(5)))


def expected(F: al.LeastSquares, x: Tensor) -> Tensor:
    with torch.no_grad():
        return F.A.H(F.A(x) - F.y)


def assert_right(F: al.LeastSquares, x: Tensor, units: int = 32) -> None:
    wanted = expected(F, x)
    assert float((F.gradient(x) - wanted).norm()) <= units * F.A.domain.eps * float(wanted.norm())


def taken(F: al.LeastSquares, x: Tensor) -> list[str]:
    """Return the kernels of the graph that gradients are computed with."""
    F.gradient(x)
    (source,) = {id(s): s for s in (getattr(F.A, "source", None), getattr(F.A, "_source", None)) if s}.values()
    found = source._derived[source.domain.batch_shape].fused(False, False)
    graph = getattr(found, "_keeping", found).graph
    return [getattr(n.target, "__name__", "") for n in graph.body.nodes if n.op == "call_function"]


CASES = {
    "2d": (nn.Conv2d(2, 5, 3, padding=1), (2, 9, 8)),
    "bias": (nn.Conv2d(2, 5, 3, padding=1, bias=True), (2, 9, 8)),
    "valid": (nn.Conv2d(1, 9, (3, 2), bias=False), (1, 9, 8)),
    "full": (nn.Conv2d(1, 3, 3, padding=2, bias=False), (1, 6, 5)),
    "groups": (nn.Conv2d(4, 12, 3, padding=1, groups=2, bias=False), (4, 9, 8)),
    "1d": (nn.Conv1d(1, 4, 9, padding=4, bias=True), (1, 40)),
    "3d": (nn.Conv3d(1, 32, 3, padding=1, bias=False), (1, 6, 7, 8)),
}


@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_parts(name: str) -> None:
    module, shape = CASES[name]
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    F = objective(module.double().requires_grad_(requires_grad=False), x)
    for _ in range(3):
        assert_right(F, x)
        x = x + 1
    assert "autocorrelation" in taken(F, x)
    assert ("less_border" in taken(F, x)) == (name != "full")


@pytest.mark.usefixtures("preferred")
def test_data_and_kernels_are_seen_when_they_change() -> None:
    module, shape = CASES["2d"]
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    F = objective(module.double().requires_grad_(requires_grad=False), x)
    for change in (F.y.data.neg_, lambda: F.y[0, 0, 0, 0].add_(1), lambda: module.weight.data[1, 1, 2].mul_(-2)):
        F.gradient(x).fill_(7.0)  # results are the caller's
        assert_right(F, x)
        change()
        assert_right(F, x)
    other = al.LeastSquares(F.A, F.A.codomain.randn())
    for one in (F, other, F):
        assert_right(one, x)


@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize("kept", [True, False])
def test_the_adjoint_of_the_data_is_kept_while_there_is_memory(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_KEPT", 2 * 3 * 5 * 9 * 8 if kept else 100)
    module, shape = CASES["2d"]
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    F = objective(module.double().requires_grad_(requires_grad=False), x)
    counts = [sum(name == "aten::convolution" for name in ops_of(F.gradient, x)) for _ in range(5)]
    assert counts[3:] == ([1, 1] if kept else [2, 2])
    assert_right(F, x)


@pytest.mark.usefixtures("preferred")
def test_nothing_is_kept_for_data_that_are_new_in_every_call() -> None:
    module, shape = CASES["2d"]
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    F = objective(module.double().requires_grad_(requires_grad=False), x)
    G = al.LeastSquares(F.A, F.A.codomain.randn())
    for one in (F, G, F, G):
        assert_right(one, x)
    for one in (F, G, F, G):
        assert sum(name == "aten::convolution" for name in ops_of(one.gradient, x)) == 2
    with torch.inference_mode():  # where tensors have no version
        y = F.y.clone()
        wanted = F.A.H(F.A(x) - y)
        for _ in range(4):
            assert torch.allclose(al.least_squares_gradient(F.A, x, y), wanted)


@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize("shape", [(3, 64, 40, 3), (1, 16, 64, 5)])
def test_rounding_is_that_of_the_parts(shape: tuple[int, ...]) -> None:
    c_in, c_out, size, width = shape
    module = nn.Conv2d(c_in, c_out, width, padding=width // 2, bias=False).requires_grad_(requires_grad=False)
    x = torch.randn(1, c_in, size, size, generator=torch.Generator().manual_seed(1))
    F = objective(module, x)
    wide = objective(copy.deepcopy(module).double(), x.double())
    for y in (F.y.clone(), F.A(x)):  # far from the solution, and at it, where Ax − y is rounding only
        F.y.copy_(y)
        wide.y.copy_(y)
        exact = expected(wide, x.double())
        terms = float(wide.A.H(wide.A(x.double())).norm())  # what the two sides of the difference are like
        own, parts = (float((g.double() - exact).norm()) / terms for g in (F.gradient(x), expected(F, x)))
        assert own <= max(4 * parts, 4 * F.A.domain.eps)
    assert "autocorrelation" in taken(F, x)


def rewritten(module: nn.Module, x: Tensor, **options: Any) -> bool:
    """Return whether a gradient is rewritten."""
    A = al.linear_operator(module, x)
    forward, pruned = A.source._derived[A.domain.batch_shape].graphs
    graph = residual_and_gradient(forward, pruned.graph, **{"weighted": False, "residual": False, **options})
    return normal.by_autocorrelation(as_transposed(simplify(graph))) is not None


PLAIN = {"kernel_size": 3, "padding": 1, "bias": False, "dtype": torch.float64}


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"stride": 2}, 9),
        ({"dilation": 2, "padding": 2}, 9),
        ({"padding_mode": "reflect"}, 9),
        ({"dtype": torch.complex128}, 9),
        ({"kernel_size": 7, "padding": 0}, 11),  # strips of six on each side: they overlap
        ({"kernel_size": 9, "padding": 4}, 16),  # the strips read more than is saved
    ],
    ids=str,
)
def test_other_convolutions_are_left_alone(settings: dict[str, Any], size: int) -> None:
    x = torch.randn(1, 1, size, size, dtype=settings.get("dtype", torch.float64))
    assert rewritten(nn.Conv2d(1, 3, **PLAIN), torch.randn(1, 1, 9, 9, dtype=torch.float64))
    assert not rewritten(nn.Conv2d(1, 3, **{**PLAIN, **settings}), x)


@pytest.mark.parametrize("options", [{"weighted": True}, {"residual": True}], ids=str)
def test_weighted_and_wanted_residuals_are_left_alone(options: dict[str, bool]) -> None:
    assert not rewritten(nn.Conv2d(1, 3, **PLAIN), torch.randn(1, 1, 9, 9, dtype=torch.float64), **options)


def test_the_transpose_of_another_convolution_is_left_alone() -> None:
    one, other = nn.Conv2d(1, 1, **PLAIN), nn.Conv2d(1, 1, **PLAIN)
    x = torch.randn(1, 1, 9, 9, dtype=torch.float64)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = one, other

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv_transpose2d(self.one(x) - x, self.other.weight, padding=1)

    assert not rewritten(Twice(), x)


@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize("part", ["autocorrelation", "border"])
def test_what_is_wrong_is_not_used(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(normal, part)
    monkeypatch.setattr(normal, part, lambda *arguments: 1.001 * right(*arguments))
    module, shape = CASES["2d"]
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    F = objective(module.double().requires_grad_(requires_grad=False), x)
    assert_right(F, x)
    assert "autocorrelation" not in taken(F, x)


# -- cyclic convolutions -----------------------------------------------------------------------------------------------


@pytest.fixture
def transformed(preferred: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all convolutions be products of transforms."""
    monkeypatch.setattr(choice, "choose", lambda site, **_: kernels.transformed(site))


def circular(**settings: object) -> tuple[al.LeastSquares, Tensor]:
    """Return an objective whose gradient is by transforms, and an x."""
    module = nn.Conv2d(2, 2, 9, padding=4, **{"padding_mode": "circular", "groups": 2, "bias": False, **settings})
    x = torch.randn(3, 2, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return objective(module.double().requires_grad_(requires_grad=False), x), x


def transforms(F: al.LeastSquares, x: Tensor) -> int:
    """Return how many transforms a gradient takes: those of real numbers, one for each."""
    for _ in range(2):
        F.gradient(x)
    return sum(name in {"aten::_fft_r2c", "aten::_fft_c2r"} for name in ops_of(F.gradient, x))


@pytest.mark.usefixtures("transformed")
@pytest.mark.parametrize("groups", [1, 2])
def test_a_cyclic_gradient_takes_two_transforms(groups: int) -> None:
    F, x = circular(groups=groups)
    assert transforms(F, x) == 2
    assert_right(F, x)
    value, gradient = F.value_and_gradient(x)
    assert float((gradient - expected(F, x)).norm()) <= 32 * F.A.domain.eps * float(gradient.norm())
    assert float(value) == pytest.approx(float(F(x)), rel=1e-14)
    with torch.no_grad():  # data and kernel are seen at every call
        F.y.mul_(2)
        F.A.module.weight.mul_(3)
    assert_right(F, x)
    assert transforms(F, x) == 2


@pytest.mark.usefixtures("transformed")
@pytest.mark.parametrize("settings", [{"padding_mode": "zeros"}, {"stride": 2}, {"padding_mode": "reflect"}], ids=str)
def test_other_gradients_take_four(settings: dict[str, object]) -> None:
    assert transforms(*circular(**settings)) == 4


@pytest.mark.usefixtures("transformed")
def test_a_weighted_gradient_takes_four() -> None:
    F, x = circular()
    assert transforms(al.LeastSquares(F.A, F.y, F.y.abs()), x) == 4


@pytest.mark.usefixtures("transformed")
@pytest.mark.parametrize("alpha", [1, 2])
def test_only_differences_of_data_are_taken_apart(alpha: int) -> None:
    F, x = circular()
    inner, number = F.A.module, 3.0 if alpha == 1 else torch.ones(3, 2, 20, 24, dtype=torch.float64)
    A = al.affine_operator(lambda x: inner(torch.sub(inner(x), number, alpha=alpha)), x)
    F = al.LeastSquares(A, F.y)
    wanted = A.linear.H(A(x) - F.y)
    assert float((F.gradient(x) - wanted).norm()) <= 32 * A.domain.eps * float(wanted.norm())


@pytest.mark.usefixtures("transformed")
def test_a_square_of_spectra_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    F, x = circular()
    right = normal.composed
    monkeypatch.setattr(normal, "composed", lambda second, first: -right(second, first))
    assert transforms(F, x) == 4
    assert_right(F, x)
