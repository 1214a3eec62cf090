"""Maps made to deceive: what must not be proved, what must still be traced, and errors that say what happened."""

from collections.abc import Callable, Iterator

import pytest
import torch
from laws import with_backward
from torch import Tensor, nn

import adjointlab as al

pytestmark = pytest.mark.slow

D = torch.float64


@torch.library.custom_op("adjointlab_adversaries::saturate", mutates_args=())
def saturate(x: Tensor) -> Tensor:
    """Once x, up to 10⁴."""
    return x.clamp(-1e4, 1e4)


@saturate.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


saturate.register_autograd(lambda ctx, g: g)

BEYOND = 1e9  # far beyond what random numbers reach
HIDDEN = {
    "comparison": lambda x: x + (x > BEYOND),
    "scaled comparison": lambda x: x + 1e5 * (x.abs() > BEYOND),
    "truncation": lambda x: x + (x / BEYOND).trunc(),
    "rounding": lambda x: x + (x / BEYOND).round(),
    "remainder": lambda x: torch.fmod(x, BEYOND),
    "fraction": lambda x: BEYOND * (x / BEYOND).frac(),
    "integer division": lambda x: x + torch.div(x, BEYOND, rounding_mode="trunc"),
    "cast to integers": lambda x: x + (x / BEYOND).to(torch.int64),
    "position of the largest": lambda x: x + 1e-300 * x.argmax(),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_steps_that_autograd_takes_for_constants_are_no_proof(name: str) -> None:
    report = al.check_linearity(HIDDEN[name], torch.zeros(3, dtype=D))
    assert report.verdict == "supported"
    assert "autograd does not see all of it" in str(report)
    assert "the map is affine" not in str(report)


def test_a_custom_op_that_saturates_far_away_is_refuted() -> None:
    assert al.check_linearity(saturate, torch.zeros(3, dtype=D)).verdict == "refuted"


@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
def test_integers_shaped_like_the_input_hide_nothing(kind: torch.dtype) -> None:
    assert al.check_linearity(lambda x: x * torch.ones_like(x, dtype=kind), torch.zeros(3, dtype=D)).verdict == "proved"


UNDEFINED_AT_ZERO = {
    "norm": lambda x: 3 * x / x.norm(),
    "root of the square": lambda x: (x * x).sqrt(),
    "deviation": lambda x: x / x.std(),
}


@pytest.mark.parametrize("name", UNDEFINED_AT_ZERO)
def test_what_reads_the_input_is_named_though_the_derivative_at_zero_is_nan(name: str) -> None:
    report = al.check_linearity(UNDEFINED_AT_ZERO[name], torch.zeros(3, dtype=D))
    assert report.verdict == "refuted"
    assert "div" in report.reads_input


def test_what_autograd_refuses_is_reported_and_raised() -> None:
    def refuse(v: Tensor) -> Tensor:
        raise RuntimeError("no derivative here")

    refusing, x = with_backward(lambda w: 2 * w, refuse), torch.zeros(3)
    report = al.check_linearity(refusing, x)
    assert not report.differentiable
    assert report.verdict == "supported"
    assert "no derivative here" in str(report)
    with pytest.raises(al.NotDifferentiableError, match="autograd"):
        al.linear_operator(refusing, x)
    A = al.linear_operator(refusing, x, derivative="forward")
    assert torch.equal(A.H(torch.ones(3)), torch.full((3,), 2.0))


def test_what_autograd_has_no_derivative_of_has_an_adjoint() -> None:
    def scatter(x: Tensor) -> Tensor:  # torch has no derivative of this for complex numbers
        return torch.select_scatter(x.expand(2, 3), 2 * x, 0, 0)

    x = torch.zeros(3, dtype=torch.complex128)
    with pytest.raises(al.NotDifferentiableError, match="select_scatter does not support automatic differentiation"):
        al.linear_operator(scatter, x)
    A = al.linear_operator(scatter, x, derivative="forward")
    assert torch.equal(A.H(torch.ones(2, 3, dtype=x.dtype)), torch.full((3,), 3.0, dtype=x.dtype))


class Masked(nn.Module):
    """A forward that uses a constant mask in one of several ways."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.use = use
        self.register_buffer("mask", torch.tensor([True, False, True, True, False, False]))

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.mask)


def written(x: Tensor, mask: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[mask] = 2 * x[mask]
    return y


def spread(x: Tensor, mask: Tensor) -> Tensor:
    y = x.new_zeros(3, 6)
    y[1:, ~mask] += x[mask]
    return y


MASKS = {
    "written": written,
    "spread": spread,
    "selected": lambda x, mask: x.masked_select(mask),
    "selected from many": lambda x, mask: (x.outer(x.new_ones(6))).masked_select(mask),
    "put": lambda x, mask: x.new_zeros(6).index_put((mask,), x[:3], accumulate=True),
}


@pytest.mark.parametrize("dtype", [D, torch.complex128], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_constant_masks_are_traced_and_their_changes_seen(name: str, dtype: torch.dtype) -> None:
    module = Masked(MASKS[name])
    operator = al.linear_operator(module, torch.zeros(6, dtype=dtype))
    assert operator.engine == "traced"
    assert al.check_linearity(module, operator.domain).verdict == "proved"
    for mask in (module.mask, ~module.mask):
        module.mask.copy_(mask)
        x = operator.domain.randn(torch.Generator().manual_seed(0))
        assert torch.equal(operator(x), module(x))
        assert al.check_adjoint(operator).passed


def test_a_tensor_cached_under_a_transform_is_read_at_every_call() -> None:
    class Caching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "ramp"):
                self.ramp = torch.arange(1.0, 4.0, dtype=D)
            return self.ramp * x

    module, x = Caching(), torch.ones(3, dtype=D)
    torch.func.vjp(module, x)  # leaves a wrapper of functorch behind
    operator = al.linear_operator(module, x)
    assert operator.H(x).tolist() == [1.0, 2.0, 3.0]
    module.ramp = torch.full((3,), 7.0, dtype=D)
    assert operator(x).tolist() == operator.H(x).tolist() == [7.0, 7.0, 7.0]


@pytest.fixture
def every_warning() -> Iterator[None]:
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.usefixtures("every_warning")
def test_a_forward_that_records_gradients_by_itself_is_no_cause_for_warnings(engine: str) -> None:
    layer = nn.Conv1d(1, 1, 3, padding=1, bias=False, dtype=D)

    def adjoint(x: Tensor) -> Tensor:
        z = torch.zeros(1, 1, 8, dtype=D, requires_grad=True)
        with torch.enable_grad():
            y = layer(z)
        return torch.autograd.grad(y, z, x, create_graph=True)[0]

    x = torch.ones(1, 1, 8, dtype=D)
    operator = al.linear_operator(adjoint, x, engine=engine)
    assert torch.allclose(operator.H(x), layer(x))
