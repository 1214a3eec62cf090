"""A and Aᴴ are each other's derivative: in their argument and in the parameters, to second order and more."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from built import needs_torch
from laws import assert_close, draw, inner, matrix
from operator_zoo import BY_NAME
from torch import Tensor, nn

import adjointlab as al

pytestmark = pytest.mark.slow
old_compiler = needs_torch("2.10", "torch.compile refuses torch.func.vjp inside of a backward")

every_engine = pytest.mark.parametrize("engine", ["eager", "traced"])
every_side = pytest.mark.parametrize("side", ["A", "H"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])


class ExponentialKernel(nn.Module):
    """A convolution whose kernel is `exp(θ)`: not linear in θ."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(1, 1, 3, dtype=dtype) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.conv1d(x, self.theta.exp(), stride=2, padding=1)


class RealParameter(nn.Module):
    """A complex operator with a real parameter."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.randn(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x * torch.exp(1j * self.phase))


def convolution(dtype: torch.dtype) -> nn.Module:
    return nn.Conv1d(1, 2, 3, stride=2, padding=1, padding_mode="circular", bias=False, dtype=dtype)


def chain(dtype: torch.dtype) -> nn.Module:
    layers = [nn.Conv1d(1, 1, 3, padding=1, bias=False, dtype=dtype) for _ in range(2)]
    return nn.Sequential(*layers, layers[0])


MODULES = {
    "convolution": (convolution, (1, 1, 5)),
    "chain": (chain, (1, 1, 5)),
    "exponential": (ExponentialKernel, (1, 1, 5)),
    "linear": (lambda dtype: nn.Linear(4, 3, bias=False, dtype=dtype), (2, 4)),
}
every_module = pytest.mark.parametrize("name", MODULES)


def make(name: str, dtype: torch.dtype, engine: str = "traced") -> tuple[nn.Module, al.LinearOperator]:
    kind, shape = MODULES[name]
    module = kind(dtype)
    return module, al.linear_operator(module, torch.zeros(shape, dtype=dtype), engine=engine)


def of_parameters(B: al.LinearOperator) -> tuple[list[str], list[Tensor], Callable[..., Any]]:
    """Return names, values and `(x, *values) ↦ B(x)`."""
    named = dict(B.named_parameters())
    names = list(named)

    def run(x: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(B, dict(zip(names, values, strict=True)), (x,))

    return names, [value.detach().clone().requires_grad_() for value in named.values()], run


def plain(module: nn.Module, side: str, A: al.LinearOperator) -> Callable[..., Tensor]:
    """Return `A` or `Aᴴ` by plain autograd, differentiable to any order."""
    if side == "A":
        return module

    def adjoint(y: Tensor) -> Tensor:
        x = torch.zeros(A.domain.specs[0].shape, dtype=A.domain.specs[0].dtype, requires_grad=True)
        (pulled,) = torch.autograd.grad(module(x), x, y, create_graph=True)
        return pulled

    return adjoint


def loss(z: Tensor) -> Tensor:
    return (z.abs().square() * torch.linspace(1, 2, z.numel(), dtype=torch.float64).reshape(z.shape)).sum()


@every_module
@every_dtype
@every_engine
def test_gradcheck_and_gradgradcheck(name: str, dtype: torch.dtype, engine: str) -> None:
    _, A = make(name, dtype, engine)
    for B in (A, A.H):
        _, values, run = of_parameters(B)
        assert torch.autograd.gradcheck(run, (draw(B.domain).requires_grad_(), *values))
        assert torch.autograd.gradgradcheck(run, (draw(B.domain).requires_grad_(), *values))


@every_side
def test_gradcheck_in_a_real_parameter_of_a_complex_operator(side: str) -> None:
    module = RealParameter(torch.complex128)
    A = al.linear_operator(module, torch.zeros(5, dtype=torch.complex128))
    _, values, run = of_parameters(A if side == "A" else A.H)
    assert torch.autograd.gradcheck(run, (draw(A.domain).requires_grad_(), *values))
    assert torch.autograd.gradgradcheck(run, (draw(A.domain).requires_grad_(), *values))


@pytest.mark.parametrize(
    "name", ["rfft-7", "irfft-6", "real-part", "conj", "tuple-output", "finite-differences-in-place"]
)
@every_side
def test_gradcheck_of_real_linear_operators(name: str, side: str) -> None:
    entry = BY_NAME[name]
    function, domain = entry.build(entry.dtypes[-1] if entry.dtypes[-1].is_complex else torch.float64)
    A = al.linear_operator(function, domain, engine="traced")
    B = A if side == "A" else A.H
    x = draw(B.domain)
    inputs = tuple(leaf.requires_grad_() for leaf in (x if isinstance(x, tuple) else (x,)))
    assert torch.autograd.gradcheck(lambda *leaves: B(leaves if isinstance(x, tuple) else leaves[0]), inputs)
    assert torch.autograd.gradgradcheck(lambda *leaves: B(leaves if isinstance(x, tuple) else leaves[0]), inputs)


@every_module
@every_dtype
@every_side
@every_engine
def test_parameter_gradient_is_that_of_plain_autograd(name: str, dtype: torch.dtype, side: str, engine: str) -> None:
    module, A = make(name, dtype, engine)
    B = A if side == "A" else A.H
    x = draw(B.domain)
    found = torch.autograd.grad(loss(B(x)), tuple(module.parameters()))
    expected = torch.autograd.grad(loss(plain(module, side, A)(x)), tuple(module.parameters()))
    assert_close(found, expected, A.domain.eps)


@every_module
@every_dtype
@every_side
def test_second_order_parameter_gradient_is_that_of_plain_autograd(name: str, dtype: torch.dtype, side: str) -> None:
    module, A = make(name, dtype)
    B = A if side == "A" else A.H
    x = draw(B.domain)

    def twice(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(loss(function(x)), tuple(module.parameters()), create_graph=True)
        return torch.autograd.grad(sum(g.abs().square().sum() for g in first), tuple(module.parameters()))

    assert_close(twice(B), twice(plain(module, side, A)), A.domain.eps)


@every_dtype
@every_engine
def test_gradient_of_an_unrolled_network(dtype: torch.dtype, engine: str) -> None:
    module, A = make("exponential", dtype, engine)
    y = draw(A.codomain)

    def unrolled(forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        x = A.domain.zeros()
        for _ in range(3):
            x = x - 0.1 * adjoint(forward(x) - y)
        return torch.autograd.grad(loss(x), tuple(module.parameters()))

    assert_close(unrolled(A, A.H), unrolled(module, plain(module, "H", A)), A.domain.eps)


def test_third_derivative() -> None:
    module, A = make("exponential", torch.float64)
    y = draw(A.codomain)

    def third(function: Callable[[Tensor], Tensor]) -> Tensor:
        value = loss(function(y))
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, module.theta, create_graph=True)
            value = gradient.square().sum()
        return gradient.detach()

    assert_close(third(A.H), third(plain(module, "H", A)), A.domain.eps)


# ---------------------------------------------------------------------------------------------------------- torch.func


@every_dtype
@every_side
@every_engine
def test_vjp(dtype: torch.dtype, side: str, engine: str) -> None:
    _, A = make("convolution", dtype, engine)
    B = A if side == "A" else A.H
    x, v = draw(B.domain, 1), draw(B.codomain, 2)
    _, pull_back = torch.func.vjp(B, x)
    assert_close(pull_back(v)[0], B.H(v), A.domain.eps)


@every_dtype
@every_side
@every_engine
def test_jvp(dtype: torch.dtype, side: str, engine: str) -> None:
    _, A = make("convolution", dtype, engine)
    B = A if side == "A" else A.H
    x, t = draw(B.domain, 1), draw(B.domain, 2)
    value, tangent = torch.func.jvp(B, (x,), (t,))
    assert_close(value, B(x), A.domain.eps)
    assert_close(tangent, B(t), A.domain.eps)


@every_side
@pytest.mark.parametrize("name", ["exponential", "linear"])
def test_jvp_in_parameters(name: str, side: str) -> None:
    module, A = make(name, torch.float64)
    B = A if side == "A" else A.H
    _, values, run = of_parameters(B)
    x = draw(B.domain)
    values = [value.detach() for value in values]
    tangents = [torch.randn_like(value) for value in values]
    _, found = torch.func.jvp(lambda *v: run(x, *v), tuple(values), tuple(tangents))
    # ⟨w, J t⟩ = ⟨Jᵀ w, t⟩ ties forward mode to reverse mode.
    w = draw(B.codomain, 3)
    gradients = torch.autograd.grad(B(x), tuple(module.parameters()), w)
    gap = inner(w, found) - sum(inner(g, t) for g, t in zip(gradients, tangents, strict=True))
    assert abs(gap) <= 16 * A.domain.eps * float(w.norm() * found.norm())


@every_dtype
@every_side
@every_engine
def test_vmap(dtype: torch.dtype, side: str, engine: str) -> None:
    _, A = make("convolution", dtype, engine)
    B = A if side == "A" else A.H
    x = torch.randn(3, *B.domain.specs[0].shape, dtype=dtype)
    expected = torch.stack([B(row) for row in x])
    assert_close(torch.func.vmap(B)(x), expected, A.domain.eps)
    with torch.no_grad():
        assert_close(torch.func.vmap(B)(x), expected, A.domain.eps)


@every_side
@every_engine
def test_grad_through_torch_func(side: str, engine: str) -> None:
    _, A = make("convolution", torch.float64, engine)
    B = A if side == "A" else A.H
    x = draw(B.domain)
    found = torch.func.grad(lambda z: B(z).square().sum() / 2)(x)
    assert_close(found, B.H(B(x)), A.domain.eps)


def test_jacobian_by_torch_func() -> None:
    _, A = make("linear", torch.float64)
    expected = matrix(A, A.domain.zeros())
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        found = jacobian(A)(A.domain.zeros()).reshape(expected.shape)
        assert_close(found, expected, A.domain.eps)


def test_hessian_by_torch_func() -> None:
    _, A = make("linear", torch.float64)
    dense = matrix(A, A.domain.zeros())
    found = torch.func.hessian(lambda x: A(x).square().sum() / 2)(A.domain.zeros()).reshape(8, 8)
    assert_close(found, dense.T @ dense, A.domain.eps)


def test_vmap_of_gradients() -> None:
    _, A = make("convolution", torch.float64)
    x = torch.randn(3, 1, 1, 5, dtype=torch.float64)
    found = torch.func.vmap(torch.func.grad(lambda z: A(z).square().sum() / 2))(x)
    assert_close(found, torch.stack([A.gram(row) for row in x]), A.domain.eps)


def test_per_sample_gradients_of_parameters() -> None:
    _, A = make("exponential", torch.float64)
    _, values, run = of_parameters(A.H)
    y = torch.randn(3, *A.codomain.specs[0].shape, dtype=torch.float64)
    gradient = torch.func.grad(lambda theta, v: run(v, theta).square().sum())
    theta = values[0].detach()
    found = torch.func.vmap(gradient, in_dims=(None, 0))(theta, y)
    assert_close(found, torch.stack([gradient(theta, row) for row in y]), A.domain.eps)


def test_forward_mode_over_reverse_mode() -> None:
    _, A = make("convolution", torch.float64)
    x, t = draw(A.domain, 1), draw(A.domain, 2)
    _, found = torch.func.jvp(torch.func.grad(lambda z: A(z).square().sum() / 2), (x,), (t,))
    assert_close(found, A.gram(t), A.domain.eps)


# ------------------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@old_compiler
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own imports
@pytest.mark.parametrize("name", ["convolution", "exponential"])
def test_compiled_unrolled_loop(name: str) -> None:
    module, A = make(name, torch.float64)
    y = draw(A.codomain)

    def unrolled(data: Tensor) -> Tensor:
        x = torch.zeros(1, 1, 5, dtype=torch.float64)
        for _ in range(3):
            x = x - 0.1 * A.H(A(x) - data)
        return x

    compiled = torch.compile(unrolled, fullgraph=True, backend="aot_eager")
    assert_close(compiled(y), unrolled(y), A.domain.eps)
    found = torch.autograd.grad(loss(compiled(y)), tuple(module.parameters()))
    expected = torch.autograd.grad(loss(unrolled(y)), tuple(module.parameters()))
    assert_close(found, expected, A.domain.eps)


@old_compiler
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("frozen", [True, False])
def test_compiled_code_that_needs_no_gradients(frozen: bool) -> None:
    module, A = make("convolution", torch.float64)
    module.requires_grad_(requires_grad=not frozen)
    x = draw(A.domain)
    compiled = torch.compile(lambda z: A.H(A(z)), fullgraph=True, backend="aot_eager")
    expected = A.gram(x).detach()
    with torch.set_grad_enabled(frozen):
        assert_close(compiled(x), expected, A.domain.eps)
        assert not compiled(x).requires_grad
        with torch.no_grad():
            module.weight.mul_(2)
        assert_close(compiled(x), 4 * expected, A.domain.eps)
    x.requires_grad_()
    (found,) = torch.autograd.grad(compiled(x).square().sum() / 2, x)
    assert_close(found, A.gram(A.gram(x)).detach(), A.domain.eps)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_compiled_code_with_transforms_inside(transform: str, frozen: bool) -> None:
    module, A = make("convolution", torch.float64)
    module.requires_grad_(requires_grad=not frozen)
    function = {
        "grad": torch.func.grad(lambda z: A(z).square().sum()),
        "vmap": lambda z: torch.func.vmap(A.forward)(torch.stack([z, 2 * z])),
        "jvp": lambda z: torch.func.jvp(A, (z,), (3 * z,))[1],
    }[transform]
    x = draw(A.domain)
    assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x), A.domain.eps)


@old_compiler
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_sees_updates() -> None:
    module, A = make("convolution", torch.float64)
    y = draw(A.codomain)
    compiled = torch.compile(lambda v: 1 * A.H(v), fullgraph=True, backend="aot_eager")
    compiled(y)
    with torch.no_grad():
        module.weight.mul_(2)
    assert_close(compiled(y), A.H(y), A.domain.eps)


@old_compiler
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_takes_gradients_in_the_argument() -> None:
    _, A = make("convolution", torch.float64)
    compiled = torch.compile(lambda v: 1 * A.H(v), fullgraph=True, backend="aot_eager")
    y = draw(A.codomain).requires_grad_()
    (found,) = torch.autograd.grad(compiled(y).square().sum() / 2, y)
    assert_close(found, A(A.H(y)), A.domain.eps)


# ------------------------------------------------------------------------------------------------- training and memory


@every_engine
def test_training_through_the_adjoint_lowers_the_loss(engine: str) -> None:
    module, A = make("convolution", torch.float64, engine)
    y, target = draw(A.codomain, 1), draw(A.domain, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        value = (A.H(y) - target).square().sum()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert all(after < before for before, after in itertools.pairwise(losses))


@every_side
@every_engine
def test_training_step_in_place_is_seen(side: str, engine: str) -> None:
    module, A = make("exponential", torch.float64, engine)
    B = A if side == "A" else A.H
    x = draw(B.domain)
    B(x).sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    assert_close(B(x), plain(module, side, A)(x).detach(), A.domain.eps)


def saved(function: Callable[[], Any]) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return kept


@every_module
@every_side
def test_only_the_arguments_are_saved(name: str, side: str) -> None:
    module, A = make(name, torch.float64)
    B = A if side == "A" else A.H
    x = draw(B.domain).requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in (x, *module.parameters(), *module.buffers())}
    assert {t.untyped_storage().data_ptr() for t in saved(lambda: B(x))} <= known


@every_side
def test_a_chain_of_many_convolutions_saves_no_activation(side: str) -> None:
    layers = nn.Sequential(*[nn.Conv1d(1, 1, 3, padding=1, bias=False) for _ in range(8)])
    A = al.linear_operator(layers, (1, 1, 1000))
    B = A if side == "A" else A.H
    x = draw(B.domain).requires_grad_()
    assert sum(t.numel() for t in saved(lambda: B(x)) if t.numel() >= 1000) <= 1000


def test_history_is_kept_apart_from_updates() -> None:
    module, A = make("convolution", torch.float64)
    value = A.H(draw(A.codomain)).sum()
    with torch.no_grad():
        module.weight.mul_(2)
    # What autograd saved was changed in place: it must say so, as for any other op.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_no_history_without_need() -> None:
    module, A = make("convolution", torch.float64)
    module.requires_grad_(False)
    assert A.H(draw(A.codomain)).grad_fn is None


def test_results_can_be_written_to() -> None:
    for function in (lambda x: x, lambda x: x.view(3), lambda x: 2 * x):
        A = al.linear_operator(function, torch.zeros(3, dtype=torch.float64), engine="traced")
        x = torch.ones(3, dtype=torch.float64, requires_grad=True)
        y = A(x * 1)
        y.mul_(2)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert_close(gradient, 2 * A.H(torch.ones(3, dtype=torch.float64)), A.domain.eps)


def test_parts_of_the_domain_may_need_no_gradient() -> None:
    A = al.linear_operator(lambda x, z: x + 2 * z, (torch.zeros(3), torch.zeros(3)), engine="traced")
    x, z = torch.ones(3, requires_grad=True), torch.ones(3)
    (gradient,) = torch.autograd.grad(A((x, z)).sum(), x)
    assert torch.equal(gradient, torch.ones(3))


def test_parts_of_the_codomain_may_be_unused() -> None:
    A = al.linear_operator(lambda x: (x, 2 * x), torch.zeros(3), engine="traced")
    x = torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(A(x)[1].sum(), x)
    assert torch.equal(gradient, torch.full((3,), 2.0))
