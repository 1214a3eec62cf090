"""Functions that no graph is made of: how often they are called, and when a pull-back may be kept."""

import contextlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from laws import assert_close, draw, seeded
from torch import nn

import adjointlab as al

calls: Counter[str] = Counter()


class Running(torch.autograd.Function):
    """A running sum through NumPy, with its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        numbers = np.cumsum(x.detach().numpy(), -1)  # raises where tensors have no values
        calls["forward"] += 1
        return torch.from_numpy(numbers)

    @staticmethod
    def backward(ctx: Any, v: torch.Tensor) -> torch.Tensor:
        calls["backward"] += 1
        return torch.from_numpy(np.cumsum(v.detach().numpy()[..., ::-1], -1)[..., ::-1].copy())


class Projector(nn.Module):
    """The running sum of x times weights."""

    def __init__(self, *, learned: bool = False, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        weights = torch.linspace(1, 2, 12, dtype=dtype)
        self.weights = nn.Parameter(weights) if learned else weights
        self.gain = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * Running.apply(self.weights * x)


def counted(function: Any, *arguments: Any) -> tuple[int, int]:
    """Return how often a call runs the forward, and how often the backward."""
    calls.clear()
    function(*arguments)
    return calls["forward"], calls["backward"]


def projector(module: Any, engine: str = "auto", **options: Any) -> al.LinearOperator:
    domain = al.TensorSpec((12,), options.pop("dtype", torch.float64))
    A = al.linear_operator(module, domain, engine=engine, **options)
    assert A.engine == "eager"
    return A


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize("build", [al.linear_operator, al.affine_operator])
def test_a_build_takes_three_calls_and_two_of_the_backward(build: Any, engine: str) -> None:
    assert counted(lambda: build(Projector(), al.TensorSpec((12,), torch.float64), engine=engine)) == (3, 2)


def test_an_adjoint_takes_one_backward_and_a_gradient_one_of_each() -> None:
    A = projector(Projector())
    x, y = draw(A.domain), draw(A.codomain)
    F = al.LeastSquares(A, y)
    weight = torch.rand(12, dtype=torch.float64, generator=seeded(0))
    with_weight = al.LeastSquares(A, y, weight=weight)
    for _ in range(2):
        assert counted(A.H, y) == (0, 1)
        assert counted(A, x) == (1, 0)
        assert counted(F.gradient, x) == (1, 1)
        assert counted(with_weight.gradient, x) == (1, 1)
    assert_close(F.gradient(x), A.H(A(x) - y), A.domain.eps)
    assert_close(with_weight.gradient(x), A.H(weight * (A(x) - y)), A.domain.eps)


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_solvers_run_one_forward_and_one_backward_a_step(engine: str) -> None:
    A = projector(Projector(), engine)
    y = draw(A.codomain)
    forward, backward = counted(lambda: al.solvers.cgls(A, y, maxiter=6, tol=0.0))
    assert forward <= 8
    assert backward <= 8


def test_the_eager_engine_keeps_nothing_between_calls() -> None:
    A = projector(Projector(), "eager")
    assert counted(A.H, draw(A.codomain)) == (1, 1)
    with A.frozen():
        assert counted(A.H, draw(A.codomain)) == (1, 1)
        assert counted(A.H, draw(A.codomain)) == (0, 1)
    assert counted(A.H, draw(A.codomain)) == (1, 1)


CHANGES = {
    "weights in place": lambda m: m.weights.mul_(3),
    "weights through data": lambda m: m.weights.data.mul_(3),
    "weights replaced": lambda m: setattr(m, "weights", 3 * m.weights),
    "a number": lambda m: setattr(m, "gain", 3.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("closed_over", [False, True])
def test_a_kept_pull_back_is_made_again_after_a_change(change: Any, closed_over: bool) -> None:
    module = Projector()
    A = projector((lambda x: module(x)) if closed_over else module)  # noqa: PLW0108  # a closure is the point
    v = draw(A.codomain)
    before = A.H(v)
    change(module)
    assert_close(A.H(v), 3 * before, A.domain.eps)
    assert counted(A.H, v) == (0, 1)


def test_a_tensor_that_a_function_names_is_watched() -> None:
    weights = torch.linspace(1, 2, 12, dtype=torch.float64)
    A = projector(lambda x: Running.apply(weights * x))
    v = draw(A.codomain)
    before = A.H(v)
    weights.mul_(3)
    assert_close(A.H(v), 3 * before, A.domain.eps)
    weights = weights / 3
    assert_close(A.H(v), before, A.domain.eps)


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_gradients_in_parameters_pass_through(engine: str) -> None:
    module = Projector(learned=True)
    A = projector(module, engine)
    x, v = draw(A.domain), draw(A.codomain)
    for result, other in ((A.H(v), x), (A(x), v)):
        (found,) = torch.autograd.grad((result * other).sum(), module.weights)
        assert_close(found, x * A.H(v).detach() / module.weights.detach(), A.domain.eps, factor=64)
    F = al.LeastSquares(A, v)
    (found,) = torch.autograd.grad(F.gradient(x).sum(), module.weights)
    assert found.abs().sum() > 0
    with torch.no_grad():
        assert not A.H(v).requires_grad
    assert A.H(v).requires_grad


def test_derivatives_in_the_argument_pass_through() -> None:
    A = projector(Projector())
    x, v = draw(A.domain).requires_grad_(), draw(A.codomain).requires_grad_()
    (found,) = torch.autograd.grad(A.H(v), v, x.detach())
    assert_close(found, A(x).detach(), A.domain.eps)
    (found,) = torch.autograd.grad(A(x), x, v.detach())
    assert_close(found, A.H(v).detach(), A.domain.eps)


SHAPES = {
    "a dictionary": lambda y: {"a": y},
    "a tuple": lambda y: (y,),
    "larger": lambda y: y.expand(12, 12),
    "smaller": lambda y: y[:1],
}


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("other", SHAPES.values(), ids=SHAPES.keys())
def test_results_of_another_structure_or_shape_are_refused(other: Any, frozen: bool, engine: str) -> None:
    """A black box may change in ways that nobody watches: what it returns is looked at whenever it is called."""
    ways = iter([])
    A = projector(lambda x: next(ways, lambda y: y)(Running.apply(x)), engine)
    x, y = draw(A.domain), draw(A.codomain)
    F = al.LeastSquares(A, y)
    with A.frozen() if frozen else contextlib.nullcontext():
        A.H(y)
        for call in (lambda: A(x), lambda: F.gradient(x), lambda: F.value_and_gradient(x)):
            ways = iter([other])
            with pytest.raises(al.SpaceMismatchError, match="the function has changed"):
                call()
            ways = iter([])
            call()


def test_what_is_kept_is_said() -> None:
    assert "pull-back: kept" in projector(Projector()).explain()
    assert "pull-back: kept" not in projector(Projector(), "eager").explain()


def test_a_large_pull_back_is_not_kept() -> None:
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            many = x.expand(100, 12)
            for _ in range(3):
                many = torch.linspace(1, 2, 12, dtype=x.dtype) * many * torch.ones(100, 12, dtype=x.dtype)
            return Running.apply(many.mean(0))

    A = projector(Wide())
    assert counted(A.H, draw(A.codomain)) == (1, 1)
    assert counted(A.H, draw(A.codomain)) == (1, 1)


def test_in_inference_mode() -> None:
    A = projector(Projector())
    v = draw(A.codomain)
    expected = A.H(v)
    with torch.inference_mode():
        assert_close(A.H(v), expected, A.domain.eps)
        assert_close(A.H(v.clone()), expected, A.domain.eps)


def test_a_complex_map_is_told_to_be_complex_linear() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, conjugate: bool) -> torch.Tensor:
            ctx.conjugate = conjugate
            calls["forward"] += 1  # which no front end traces
            numbers = x.detach().numpy()
            return torch.from_numpy(2j * (numbers.conj() if conjugate else numbers))

        @staticmethod
        def backward(ctx: Any, v: torch.Tensor) -> Any:
            numbers = -2j * v.detach().resolve_conj().numpy()
            return torch.from_numpy(numbers.conj() if ctx.conjugate else numbers), None

    for conjugate in (False, True):
        A = projector(lambda x, c=conjugate: Twice.apply(x, c), dtype=torch.complex128)
        assert A.is_complex_linear is not conjugate
        assert al.check_adjoint(A).passed


def by_numpy(function: Any, slope: Any) -> Any:
    """Return a function through NumPy with the derivative that it claims."""

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.x = x.detach().numpy()
            return torch.from_numpy(np.asarray(function(ctx.x)))

        @staticmethod
        def backward(ctx: Any, v: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(slope(ctx.x) * v.detach().numpy())

    return Opaque.apply


generator = np.random.default_rng(0)
NOT_LINEAR = {
    "saturates": (lambda x: np.clip(x, -1e3, 1e3), lambda x: (np.abs(x) < 1e3) * 1.0),
    "saturates, and claims not to": (lambda x: np.clip(x, -1e3, 1e3), lambda x: 1.0),
    "threshold": (lambda x: x * (np.abs(x) > 1e-3), lambda x: (np.abs(x) > 1e-3) * 1.0),
    "threshold, and claims none": (lambda x: x * (np.abs(x) > 0.1), lambda x: 1.0),
    "rounds": (np.round, lambda x: 1.0),
    "sign of the sum": (lambda x: np.sign(x.sum()) * x, lambda x: np.sign(x.sum())),
    "normalised": (lambda x: x / (np.linalg.norm(x) + 1e-30), lambda x: 1 / (np.linalg.norm(x) + 1e-30)),
    "rectifies where the sum is positive": (
        lambda x: np.maximum(x, 0) if x.sum() > 0 else x,
        lambda x: (x > 0) * 1.0 if x.sum() > 0 else 1.0,
    ),
    "rectifies where the sum is negative": (
        lambda x: np.maximum(x, 0) if x.sum() < 0 else x,
        lambda x: (x > 0) * 1.0 if x.sum() < 0 else 1.0,
    ),
    "rectifies": (lambda x: np.maximum(x, 0), lambda x: (x > 0) * 1.0),
    "square": (lambda x: x**2, lambda x: 2 * x),
    "random": (lambda x: x * (generator.random(12) > 0.5), lambda x: 1.0),
    "not finite": (lambda x: x / 0.0, lambda x: np.inf),
    "an offset": (lambda x: x + 1e-9, lambda x: 1.0),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")
def test_functions_that_are_not_linear_are_refused(name: str) -> None:
    function = by_numpy(*NOT_LINEAR[name])
    with pytest.raises(al.NotLinearError, match="expected a linear map"):
        al.linear_operator(function, al.TensorSpec((12,), torch.float64))


def test_a_wrong_backward_is_refused() -> None:
    with pytest.raises(al.NotDifferentiableError, match="dot test"):
        al.linear_operator(by_numpy(lambda x: 2 * x, lambda x: 2.001), al.TensorSpec((12,), torch.float64))
