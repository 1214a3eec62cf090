"""What is not linear, or not an element, is refused with a clear error and no side effect."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import ENGINES, draw, no_side_effects
from torch import nn

import adjointlab as al

D = torch.float64
every_engine = pytest.mark.parametrize("engine", ENGINES)


class WrongBackward(torch.autograd.Function):
    """Twice x, with the backward of once x."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g


class Counter(nn.Module):
    """Each call scales by one more: a hidden state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.calls * x


class RunningBuffer(nn.Module):
    """Each call changes a buffer that the result depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones((), dtype=D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.gain.mul_(2)
        return self.gain * x


class NanWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((6,), torch.nan, dtype=D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x


def _spectral_norm_in_training() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3, bias=False, dtype=D))


def _partly_detached(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[..., :3], 2 * x[..., 3:].detach()], -1)


# name: (how to make it, shape, the error, what its message says)
NOT_LINEAR: dict[str, tuple[Callable[[], Any], tuple[int, ...], str]] = {
    "relu": (lambda: torch.relu, (2, 6), "relu|threshold"),
    "relu-module": (lambda: nn.Sequential(nn.Linear(6, 4, bias=False, dtype=D), nn.ReLU()), (2, 6), "relu|threshold"),
    "leaky-relu": (lambda: F.leaky_relu, (2, 6), "relu"),
    "max-pool1d": (lambda: nn.MaxPool1d(2), (1, 1, 6), "linear"),
    "max-pool2d": (lambda: nn.MaxPool2d(2), (1, 1, 4, 4), "max_pool"),
    "max-pool3d": (lambda: nn.MaxPool3d(2), (1, 1, 4, 4, 4), "max_pool"),
    "square": (lambda: lambda x: x * x, (2, 6), "mul"),
    "product-of-parts": (lambda: lambda x: x[:1] * x[1:], (2, 6), "mul"),
    "matrix-square": (lambda: lambda x: x @ x, (3, 3), "linear"),
    "layer-norm": (lambda: nn.LayerNorm(6, dtype=D), (2, 6), "layer_norm"),
    "group-norm": (lambda: nn.GroupNorm(2, 4, dtype=D), (2, 4, 3), "norm|mul"),
    "softmax": (lambda: lambda x: x.softmax(-1), (2, 6), "softmax"),
    "abs": (lambda: torch.abs, (2, 6), "abs|sgn|mul"),
    "norm": (lambda: lambda x: x.norm(), (2, 6), "norm|linear"),
    "sine": (lambda: torch.sin, (2, 6), "sin|cos|mul"),
    "clamp": (lambda: lambda x: x.clamp(min=-0.5), (2, 6), "clamp|linear"),
    "sort": (lambda: lambda x: x.sort().values, (2, 6), "sort|linear"),
    "median": (lambda: lambda x: x.median(-1).values, (2, 6), "median|linear"),
    "masked-by-itself": (lambda: lambda x: x * (x > 0), (2, 6), "linear"),
    "where-on-itself": (lambda: lambda x: torch.where(x > 0, x, 2 * x), (2, 6), "linear"),
    "grid-from-input": (
        lambda: lambda x: F.grid_sample(x, x.reshape(1, 2, 2, 2), align_corners=False),
        (1, 2, 2, 2),
        "grid_sampler|linear",
    ),
    "scaled-by-its-sum": (lambda: lambda x: x * x.sum().item(), (2, 6), "item|number|local_scalar"),
    "branch-on-its-sum": (lambda: lambda x: x if x.sum() > 0 else -x, (2, 6), "bool|number|nonzero|local_scalar"),
    "scaled-by-detached-norm": (lambda: lambda x: x / x.detach().norm(), (2, 6), "linear"),
    "floor": (lambda: torch.floor, (2, 6), "linear|floor"),
    "round": (lambda: torch.round, (2, 6), "linear|round"),
    "sign": (lambda: torch.sign, (2, 6), "linear|sign"),
    "straight-through": (lambda: lambda x: x + (x.round() - x).detach(), (2, 6), "linear|detach"),
    "batch-norm-train": (lambda: nn.BatchNorm1d(6, dtype=D), (4, 6), r"eval\(\)"),
    "batch-norm-train-no-stats": (
        lambda: nn.BatchNorm1d(6, track_running_stats=False, dtype=D),
        (4, 6),
        "batch_norm|linear",
    ),
    "instance-norm": (lambda: nn.InstanceNorm1d(2, dtype=D), (1, 2, 5), "norm|mul"),
    "dropout": (lambda: nn.Dropout(0.5), (2, 6), r"eval\(\)|random"),
    "dropout-functional": (lambda: lambda x: F.dropout(x, 0.5), (2, 6), "random"),
    "dropout2d": (lambda: nn.Sequential(nn.Dropout2d(0.5)), (2, 3, 2, 2), r"eval\(\)|random"),
    "noise": (lambda: lambda x: x + torch.randn_like(x), (2, 6), "random"),
    "counter": (Counter, (2, 6), "state|calls|repeated|determin"),
    "running-buffer": (RunningBuffer, (2, 6), "gain"),
    "spectral-norm-train": (_spectral_norm_in_training, (2, 6), r"eval\(\)|_u|_v"),
    "nan-weights": (NanWeights, (2, 6), "finite|NaN|nan"),
    "infinite": (lambda: lambda x: x / 0, (2, 6), "finite|NaN|nan|inf"),
    "bias": (lambda: nn.Linear(6, 3, dtype=D), (2, 6), "affine_operator"),
    "conv-bias": (lambda: nn.Conv2d(1, 1, 3, dtype=D), (1, 1, 4, 4), "affine_operator"),
    "constant": (lambda: lambda x: x + 1, (2, 6), "affine_operator"),
    "tiny-constant": (lambda: lambda x: x + 1e-9, (2, 6), "affine_operator"),
}
NOT_DIFFERENTIABLE: dict[str, tuple[Callable[[], Any], tuple[int, ...], str]] = {
    "detached": (lambda: lambda x: 2 * x.detach(), (2, 6), "detach"),
    "partly-detached": (lambda: _partly_detached, (2, 6), "detach"),
    "through-numpy": (lambda: lambda x: torch.as_tensor(2 * x.detach().cpu().numpy()), (2, 6), "detach|numpy"),
    "no-grad": (lambda: torch.no_grad()(lambda x: 2 * x), (2, 6), "detach|no_grad"),
    "wrong-backward": (lambda: WrongBackward.apply, (2, 6), "backward"),
    "detached-scale": (lambda: lambda x: x + x.detach(), (2, 6), "detach"),
}
ALL = {**NOT_LINEAR, **NOT_DIFFERENTIABLE}
OPS = "relu|threshold|max_pool|mul|norm|softmax|item|nonzero"
NAMES_OPS = {name for name, (_, _, message) in NOT_LINEAR.items() if re.search(OPS, message)}


@every_engine
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_not_linear(name: str, engine: str) -> None:
    make, shape, message = NOT_LINEAR[name]
    function = make()
    if engine == "eager" and name in NAMES_OPS:  # without a graph there are no ops to name
        message = "linear"
    with no_side_effects(function, draws=name in DRAWING), pytest.raises(al.NotLinearError, match=message):
        al.linear_operator(function, torch.zeros(shape, dtype=D), engine=engine)


@every_engine
@pytest.mark.parametrize("name", NOT_DIFFERENTIABLE)
def test_not_differentiable(name: str, engine: str) -> None:
    make, shape, message = NOT_DIFFERENTIABLE[name]
    function = make()
    with no_side_effects(function), pytest.raises(al.NotDifferentiableError, match=message):
        al.linear_operator(function, torch.zeros(shape, dtype=D), engine=engine)


DRAWING = ("dropout", "dropout-functional", "dropout2d", "noise")
AFFINE = ("bias", "conv-bias", "constant", "tiny-constant")
READING = {"relu": "threshold", "square": "mul", "layer-norm": "layer_norm", "softmax": "softmax", "sine": "mul"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_report_refutes_with_a_counterexample_and_names_the_ops_that_read_the_input(name: str) -> None:
    make, shape, _ = ALL[name]
    function = make()
    with no_side_effects(function, draws=name in DRAWING):
        report = al.check_linearity(function, torch.zeros(shape, dtype=D))
    if name in NOT_LINEAR:
        assert report.verdict == "refuted"
        assert report.is_affine == (name in AFFINE)
        assert report.counterexample is not None
    else:  # numbers cannot tell a detached map from an attached one, so that only the proof is excluded
        assert report.verdict != "proved"
    assert READING.get(name, "") in "; ".join(report.reads_input)


def test_affine_operator_refuses_what_is_not_affine() -> None:
    with pytest.raises(al.NotLinearError, match=r"mul|relu|threshold"):
        al.affine_operator(torch.relu, (2, 3))


def test_training_batch_norm_keeps_its_buffers() -> None:
    norm = nn.BatchNorm2d(2, dtype=D)
    before = [buffer.clone() for buffer in norm.buffers()]
    with pytest.raises(al.NotLinearError, match="eval"):
        al.linear_operator(norm, (3, 2, 4, 4))
    assert all(map(torch.equal, before, norm.buffers()))
    assert norm.training


def test_culprit_submodule_is_named() -> None:
    network = nn.Sequential(nn.Linear(6, 6, bias=False, dtype=D), nn.Sequential(nn.Dropout(0.5)))
    with pytest.raises(al.NotLinearError, match=r"1\.0|Dropout|dropout"):
        al.linear_operator(network, (2, 6))


def test_nonlinearity_of_small_size_is_seen() -> None:
    with pytest.raises(al.NotLinearError, match="linear"):
        al.linear_operator(lambda x: x + 1e-6 * x**3, torch.zeros(2, 6, dtype=D))


def test_nonlinearity_far_from_zero_is_seen() -> None:
    with pytest.raises(al.NotLinearError, match="linear"):
        al.linear_operator(lambda x: x.clamp(-1e3, 1e3), torch.zeros(2, 6, dtype=D))


def test_nonlinearity_close_to_zero_is_seen() -> None:
    with pytest.raises(al.NotLinearError, match="linear"):
        al.linear_operator(lambda x: F.softshrink(x, 1e-3), torch.zeros(2, 6, dtype=D))


def test_one_nonlinear_entry_of_many_is_seen() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        out[17] = x[17].abs()
        return out

    with pytest.raises(al.NotLinearError, match="linear"):
        al.linear_operator(function, torch.zeros(4096, dtype=D))


def test_check_can_be_turned_off() -> None:
    A = al.linear_operator(lambda x: x + 2 * x.detach(), (3,), check=False, engine="eager")
    assert torch.equal(A(torch.ones(3)), torch.full((3,), 3.0))


# --------------------------------------------------------------------------------------------- what is not an element


def conv() -> nn.Conv2d:
    return nn.Conv2d(1, 1, 3, bias=False)


DOMAINS = {
    "none": None,
    "text": "image",
    "number": 3,
    "empty-tuple": (),
    "empty-list": [],
    "empty-dict": {},
    "list-of-none": [None],
    "empty-shape": (1, 1, 0, 4),
    "empty-tensor": torch.zeros(1, 1, 0, 4),
    "integers": torch.zeros(1, 1, 4, 4, dtype=torch.int64),
    "booleans": torch.zeros(1, 1, 4, 4, dtype=torch.bool),
    "module": nn.Identity(),
}


@every_engine
@pytest.mark.parametrize("name", DOMAINS)
def test_unusable_domain(name: str, engine: str) -> None:
    with pytest.raises(al.SpaceMismatchError, match="expected"):
        al.linear_operator(conv(), DOMAINS[name], engine=engine)


@pytest.mark.parametrize("name", DOMAINS)
def test_unusable_domain_of_a_check(name: str) -> None:
    with pytest.raises(al.SpaceMismatchError, match="expected"):
        al.check_linearity(conv(), DOMAINS[name])


ELEMENTS = {
    "none": None,
    "number": 1.0,
    "list": [torch.zeros(1, 1, 4, 5)],
    "tuple": (torch.zeros(1, 1, 4, 5),),
    "nested-list": torch.zeros(1, 1, 4, 5).tolist(),
    "shape": torch.zeros(1, 1, 5, 4),
    "unbatched": torch.zeros(1, 4, 5),
    "batch": torch.zeros(2, 1, 4, 5),
    "double": torch.zeros(1, 1, 4, 5, dtype=torch.float64),
    "half": torch.zeros(1, 1, 4, 5, dtype=torch.float16),
    "complex": torch.zeros(1, 1, 4, 5, dtype=torch.complex64),
    "integers": torch.zeros(1, 1, 4, 5, dtype=torch.int64),
    "meta": torch.zeros(1, 1, 4, 5, device="meta"),
    "empty": torch.zeros(0, 1, 4, 5),
}


@functools.cache
def convolution(shape: tuple[int, ...], engine: str) -> al.LinearOperator:
    return al.linear_operator(conv(), shape, engine=engine)


@every_engine
@pytest.mark.parametrize("name", ELEMENTS)
def test_unusable_argument(name: str, engine: str) -> None:
    A = convolution((1, 1, 4, 5), engine)
    with pytest.raises(al.SpaceMismatchError, match="expected x to be an element"):
        A(ELEMENTS[name])


@every_engine
@pytest.mark.parametrize("name", ELEMENTS)
def test_unusable_argument_of_the_adjoint(name: str, engine: str) -> None:
    A = convolution((1, 1, 6, 7), engine)
    with pytest.raises(al.SpaceMismatchError, match=r"expected . to be an element"):
        A.H(None if name == "none" else ELEMENTS[name] if name != "shape" else torch.zeros(1, 1, 6, 7))


def test_wrong_argument_of_algebra() -> None:
    A = al.linear_operator(conv(), (1, 1, 4, 5))
    for B in (A.gram, 2 * A, A + A, al.vstack([A, A]), -A, A.T.T):
        with pytest.raises(al.SpaceMismatchError, match="to be an element"):
            B(torch.zeros(1, 1, 4, 4))


def test_module_on_another_device_than_the_domain() -> None:
    with pytest.raises(al.SpaceMismatchError, match="meta"):
        al.linear_operator(conv(), torch.zeros(1, 1, 4, 4, device="meta"))


def test_module_of_another_dtype_than_the_domain() -> None:
    with pytest.raises(al.SpaceMismatchError, match="float64"):
        al.linear_operator(conv(), torch.zeros(1, 1, 4, 4, dtype=torch.float64))


def test_module_that_does_not_take_the_shape() -> None:
    with pytest.raises((al.SpaceMismatchError, RuntimeError), match="3"):
        al.linear_operator(conv(), (1, 3, 4, 4))


def test_integer_output_is_refused() -> None:
    with pytest.raises((al.SpaceMismatchError, al.NotLinearError), match="int64"):
        al.linear_operator(lambda x: x.argsort(), (3,))


def test_output_that_is_no_tensor_is_refused() -> None:
    with pytest.raises((al.SpaceMismatchError, al.NotLinearError), match="expected"):
        al.linear_operator(lambda x: None, (3,))


def test_empty_output_is_refused() -> None:
    with pytest.raises((al.SpaceMismatchError, al.NotLinearError), match="empty"):
        al.linear_operator(lambda x: x[:0], (3,))


def test_output_whose_shape_depends_on_the_input_is_refused() -> None:
    with pytest.raises((al.SpaceMismatchError, al.NotLinearError), match=r"shape|linear|element"):
        al.linear_operator(lambda x: x[x > 0], torch.zeros(40, dtype=D))


def test_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="engine"):
        al.linear_operator(conv(), (1, 1, 4, 4), engine="magic")


def test_what_is_not_callable_is_refused() -> None:
    with pytest.raises((TypeError, ValueError), match=r"callable|function|module"):
        al.linear_operator(torch.zeros(3, 3), (3,))


def test_nothing_is_broadcast() -> None:
    A = al.linear_operator(lambda x: 2 * x, (3, 3))
    with pytest.raises(al.SpaceMismatchError, match="element"):
        A(torch.zeros(3))
    with pytest.raises(al.SpaceMismatchError, match="element"):
        A.H(torch.zeros(()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_calls_pass_nonfinite_values_on(value: float) -> None:
    A = al.linear_operator(lambda x: 2 * x, (3,))
    x = torch.tensor([1.0, value, 2])
    assert torch.equal(A.H(x).isfinite(), x.isfinite())


def test_refused_build_leaves_arguments_alone() -> None:
    x = torch.randn(2, 6, dtype=D, requires_grad=True)
    with no_side_effects(lambda: None, x), pytest.raises(al.NotLinearError, match="mul"):
        al.linear_operator(lambda z: z * z, x)


def test_module_that_writes_to_its_argument_is_harmless() -> None:
    A = al.linear_operator(lambda x: x.mul_(2), torch.zeros(3, dtype=D))
    x = draw(A.domain)
    with no_side_effects(lambda: None, x):
        assert torch.equal(A(x), 2 * x)
        assert torch.equal(A.H(x), 2 * x)
