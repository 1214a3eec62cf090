"""Faults found by trying to break the engine, each with the law that it broke."""

import copy
import functools

import pytest
import torch
from laws import assert_close, seeded, with_backward
from torch import Tensor, nn

import adjointlab as al

pytestmark = pytest.mark.slow

X = torch.randn(1, 1, 12, generator=seeded(0))
SCALE = 2.0


def conv() -> nn.Conv1d:
    return nn.Conv1d(1, 1, 3, padding=1, bias=False).requires_grad_(False)


def follows(operator: al.LinearOperator, function: object) -> bool:
    """Return whether A and Aᴴ are those of the function as it is now."""
    expected, pull_back = torch.func.vjp(function, X)
    return torch.allclose(operator(X), expected) and torch.allclose(operator.H(X), pull_back(X)[0])


class Held(nn.Module):
    """A forward that reads one attribute in one of many ways."""

    factor = 2.0

    def __init__(self, held: object = None) -> None:
        super().__init__()
        self.held = held
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        held = self.held
        if isinstance(held, dict):
            x = x * held["mask"]
        elif isinstance(held, list):
            for item in held:
                x = item * x
        elif held is not None:
            x = x * held.value
        return x * self.factor * SCALE if self.mask is None else x * self.mask


class Value:
    def __init__(self, value: object) -> None:
        self.value = value


def replace_submodule(m: nn.Module) -> None:
    m[0] = conv()


def append_submodule(m: nn.Module) -> None:
    m.append(conv())


CHANGES = {
    "submodule": (lambda: nn.Sequential(conv(), conv()), replace_submodule),
    "submodule added": (lambda: nn.Sequential(conv(), conv()), append_submodule),
    "dict": (lambda: Held({"mask": torch.ones(12)}), lambda m: setattr(m, "held", {"mask": torch.full((12,), 3.0)})),
    "object": (lambda: Held(Value(2.0)), lambda m: setattr(m, "held", Value(3.0))),
    "list": (lambda: Held([2.0, 3.0]), lambda m: setattr(m, "held", [2.0])),
    "list appended": (lambda: Held([2.0, 3.0]), lambda m: m.held.append(5.0)),
    "attribute appears": (Held, lambda m: setattr(m, "factor", 7.0)),
    "buffer appears": (Held, lambda m: setattr(m, "mask", torch.full((12,), 3.0))),
    "hook": (conv, lambda m: m.register_forward_hook(lambda module, inputs, output: 2 * output)),
    "forward": (conv, lambda m: setattr(m, "forward", lambda x: 3 * x)),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changes_of_structure_are_seen(case: str) -> None:
    make, change = CHANGES[case]
    module = make()
    operator = al.linear_operator(module, X)
    assert operator.engine == "traced"
    assert follows(operator, module)
    change(module)
    assert follows(operator, module)


def test_changes_of_globals_and_classes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Held()
    operator = al.linear_operator(module, X)
    monkeypatch.setitem(globals(), "SCALE", 5.0)
    assert follows(operator, module)
    monkeypatch.setattr(Held, "factor", 3.0)
    assert follows(operator, module)


def test_tied_tensors_may_part() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = torch.full((12,), 2.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.a * self.b * x

    module = Tied()
    operator = al.linear_operator(module, X)
    module.b = torch.full((12,), 5.0)
    assert follows(operator, module)


def test_changes_are_seen_under_transforms() -> None:
    module = Held(Value(2.0))
    operator = al.linear_operator(module, X)
    operator(X)
    module.held.value = 3.0
    assert torch.allclose(torch.vmap(operator)(X[None])[0], module(X))
    assert torch.allclose(torch.vmap(operator.H)(X[None])[0], module(X))


straight_through = with_backward(torch.sign, lambda g: g)


class Binary(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return straight_through(w)


def test_parameters_get_the_gradient_that_autograd_gives_them() -> None:
    module = nn.Conv1d(1, 1, 3, padding=1, bias=False)
    nn.utils.parametrize.register_parametrization(module, "weight", Binary())
    operator = al.linear_operator(module, X)
    weight = module.parametrizations.weight.original
    expected = torch.autograd.grad(module(X).sum(), weight)[0]
    assert torch.allclose(torch.autograd.grad(operator(X).sum(), weight)[0], expected)
    assert operator.engine == "eager"
    assert "gradient in" in operator.explain()


def test_parameters_of_an_offset_get_it_too() -> None:
    module = nn.Conv1d(1, 1, 3, padding=1)
    nn.utils.parametrize.register_parametrization(module, "bias", Binary())
    operator = al.affine_operator(module, X)
    wanted = tuple(module.parameters())
    for a, b in zip(*(torch.autograd.grad(f(X).sum(), wanted) for f in (operator, module)), strict=True):
        assert torch.allclose(a, b)
    assert operator.engine == "eager"


@pytest.mark.parametrize("factor", [1.3, 0.0])
def test_parameters_get_it_in_half_precision_too(factor: float) -> None:
    scaled = with_backward(torch.clone, lambda g: factor * g)
    w = torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    operator = al.linear_operator(lambda x: x * scaled(w), torch.zeros(8, dtype=torch.bfloat16))
    v = torch.ones(8, dtype=torch.bfloat16)
    assert torch.equal(torch.autograd.grad(operator(v).sum(), w)[0], factor * v)


def test_a_graph_of_the_user_outlives_the_check() -> None:
    theta = torch.ones(6, requires_grad=True)
    w = theta.exp()
    operator = al.linear_operator(lambda x: w * x + theta * x, (6,))
    operator(torch.ones(6)).sum().backward()
    assert torch.allclose(theta.grad, theta.detach().exp() + 1)


def test_gradients_in_parameters_share_no_memory() -> None:
    a, b = torch.ones(4, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    operator = al.linear_operator(lambda x: x * (a + b.view(4)), (4,))
    for _ in range(2):
        operator(torch.ones(4)).sum().backward()
    assert torch.equal(a.grad, torch.full((4,), 2.0))
    assert torch.equal(b.grad, torch.full((2, 2), 2.0))


def test_a_parameter_that_has_become_lazy_is_seen() -> None:
    module = nn.Conv1d(1, 1, 3, bias=False, dtype=torch.complex64).requires_grad_(False)
    operator = al.linear_operator(module, (1, 1, 8))
    x = operator.domain.randn()
    operator(x)
    module.weight = nn.Parameter(module.weight.detach().conj(), requires_grad=False)
    assert torch.allclose(operator(x), module(x))


def test_results_share_no_memory_inside_of_transforms() -> None:
    operator = al.linear_operator(lambda x: x[:, 2:-2], (3, 10))
    x = torch.randn(5, 3, 10)
    before = x.clone()
    torch.vmap(operator)(x).zero_()
    torch.compile(lambda x: operator(x).zero_(), backend="eager")(x[0])
    assert torch.equal(x, before)


def test_forward_mode_twice() -> None:
    class Exponential(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linspace(-1, 1, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.w.exp() * x

    z = torch.ones(6)
    operator = al.linear_operator(Exponential(), z)
    w = operator.module.w.detach()

    def f(w: Tensor) -> Tensor:
        return torch.func.functional_call(operator, {"module.w": w}, (z,)).sum()

    assert torch.allclose(torch.func.jacfwd(torch.func.jacfwd(f))(w), torch.diag(w.exp()))


def test_results_may_be_written_to() -> None:
    operator = al.linear_operator(lambda a, s: 2 * a, (torch.ones(4), torch.ones(1)))
    operator.H(torch.ones(4))[1].add_(5)
    assert float(operator.H(torch.ones(4))[1]) == 0
    matrix = torch.arange(4.0).reshape(2, 2)
    affine = al.affine_operator(lambda a: (2 * a, matrix.t(), matrix @ matrix), torch.ones(4))
    for index in (1, 2):
        affine(torch.ones(4))[index].zero_()
    assert torch.equal(matrix, torch.arange(4.0).reshape(2, 2))
    assert torch.equal(affine(torch.ones(4))[2], matrix @ matrix)
    reshaped = al.linear_operator(lambda x: x.reshape(3, 4), (12,))
    v = torch.ones(3, 4)
    reshaped.H(v).zero_()
    assert torch.equal(v, torch.ones(3, 4))


EPS = torch.finfo(torch.float32).eps


class Product(nn.Module):
    """A map whose ops are all those that autocast computes in half of the bits."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.a @ self.b)


@pytest.mark.parametrize("engine", ["eager", "traced", "auto", "compiled"])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_changes_nothing(engine: str, inside: bool) -> None:
    module = Product()
    plain = al.linear_operator(module, (5, 5), engine="eager")
    with torch.autocast(
        torch.get_default_device().type, dtype=torch.bfloat16, enabled=inside
    ):  # nor does it where an operator is built
        operator = al.linear_operator(module, (5, 5), engine=engine)
        affine = al.affine_operator(lambda x: module(x) + 1, (5, 5), engine="auto" if engine == "compiled" else engine)
    assert operator.codomain == affine.codomain == plain.codomain
    x, y = torch.randn(5, 5), torch.randn(5, 5)

    def results() -> list[Tensor]:
        F = al.LeastSquares(operator, y)
        with torch.no_grad():
            return [
                operator(x), operator.H(y), operator.gram(x), F(x), F.gradient(x), *F.value_and_gradient(x),
                affine(x), affine.H(y), *[s(operator, y, damp=1.0).x for s in (al.solvers.cgls, al.solvers.lsmr)],
                al.operator_norm(operator), al.to_dense(operator), torch.func.vmap(operator)(torch.stack([x, y])),
            ]  # fmt: skip

    expected, leaf = results(), x.clone().requires_grad_()
    for _ in range(2):
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            found, tracked = results(), operator.H(operator(leaf))
        assert [t.dtype for t in found] == [t.dtype for t in expected]
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, EPS)
        gradients = torch.autograd.grad(tracked, (leaf, module.a), y)  # after autocast, as PyTorch asks for
        assert_close(gradients, torch.autograd.grad(plain.H(plain(leaf)), (leaf, module.a), y), EPS)
    assert_close(operator(x), plain(x), EPS)


def test_autocast_changes_nothing_of_a_pair_by_hand() -> None:
    matrix = torch.randn(5, 5)
    space = al.Space.of((5,))
    A = al.LinearOperator(lambda x: matrix @ x, lambda y: matrix.T @ y, space, space)
    x = torch.randn(5)
    expected = [A(x), A.H(x), A.gram(x), al.solvers.cgls(A, x, damp=1.0).x, al.to_dense(A)]
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        found = [A(x), A.H(x), A.gram(x), al.solvers.cgls(A, x, damp=1.0).x, al.to_dense(A)]
        assert al.check_adjoint(A).passed
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, EPS)


HIDDEN = {
    "saturates far away": lambda x: x + (x.clamp(-10, 10) - x).detach(),
    "bends far away": lambda x: x + (x * (x.abs() > 50)).detach(),
    "jumps": lambda x: x + (x.abs() > 8).detach().float(),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_autograd_cannot_see_is_not_proved(name: str) -> None:
    assert al.check_linearity(HIDDEN[name], (12,)).verdict != "proved"


def test_a_map_that_alternates_is_not_proved() -> None:
    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flag = False

        def forward(self, x: Tensor) -> Tensor:
            self.flag = not self.flag
            return x if self.flag else 2 * x

    module = Alternating()
    assert al.check_linearity(module, (12,)).verdict == "refuted"


def test_copies_have_the_current_values_and_spaces() -> None:
    d = al.diagonal(torch.ones(3))
    d.load_state_dict({"operator_0.entries_0": 2 * torch.ones(3)}, assign=True)
    assert torch.equal(copy.deepcopy(d)(torch.ones(3)), 2 * torch.ones(3))
    for operator in (al.identity(X), al.linear_operator(conv(), X), al.affine_operator(nn.Conv1d(1, 1, 3), X)):
        moved = copy.deepcopy(operator.to(torch.float64).eval())
        assert moved.domain == operator.domain
        assert moved.domain.specs[0].dtype == torch.float64
        assert moved.training is False
        assert moved(X.double()).dtype == torch.float64


@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_arguments_are_not_written_to(engine: str) -> None:
    def f(x: Tensor) -> Tensor:
        x.data.mul_(2)
        return x * 1

    x = torch.ones(3)
    al.linear_operator(f, x, engine=engine, check=False)(x)
    assert torch.equal(x, torch.ones(3))


def test_writing_to_the_input_in_place() -> None:
    operator = al.linear_operator(lambda x: x.mul_(2), (3,))
    assert torch.equal(operator(torch.ones(3)), 2 * torch.ones(3))
    assert torch.equal(operator.H(torch.ones(3)), 2 * torch.ones(3))


def test_forwards_with_a_cache_keep_it_clean() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache: dict[int, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] not in self.cache:
                self.cache[x.shape[-1]] = torch.linspace(0, 1, x.shape[-1])
            return x * self.cache[x.shape[-1]]

    module = Caching()
    operator = al.linear_operator(module, (12,))
    x = torch.ones(12)
    for _ in range(2):
        assert torch.equal(operator(x), torch.linspace(0, 1, 12))
        assert type(module(x)) is Tensor


def test_a_map_that_is_zero_nearby_is_reported() -> None:
    assert al.check_linearity(nn.Hardshrink(30.0), (12,)).verdict == "refuted"


def test_the_transpose_moves_with_the_operator() -> None:
    operator = al.linear_operator(conv(), X)
    assert operator.T.domain.specs[0].dtype == torch.float32
    operator.to(torch.float64)
    assert operator.T(X.double()).dtype == torch.float64


def test_changed_output_shape_is_an_error() -> None:
    module = conv()
    operator = al.linear_operator(module, X)
    module.stride = (2,)
    for _ in range(10):  # refused as often as it is asked for
        with pytest.raises(al.SpaceMismatchError, match="build the operator anew"):
            operator(X)
    module.stride = (1,)
    assert follows(operator, module)


def test_compiled_programs_do_not_share_a_recompile_limit() -> None:
    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        return module.forward

    for _ in range(6):
        operator = al.linear_operator(conv(), X).compile(backend=backend, fullgraph=True)
        assert operator.engine == "compiled"
        operator(X)


def test_partial_with_a_changed_keyword() -> None:
    options = {"factor": 2.0}
    function = functools.partial(lambda x, options: options["factor"] * x, options=options)
    operator = al.linear_operator(function, X)
    options["factor"] = 3.0
    assert torch.equal(operator(X), 3 * X)


def test_a_map_that_is_no_longer_linear_is_refused_until_it_is() -> None:
    module = nn.Dropout().eval()
    operator = al.linear_operator(module, X)
    module.train()
    for _ in range(10):
        with pytest.raises(al.NotLinearError, match="not linear any more"):
            operator.H(X)
    module.eval()
    assert follows(operator, module)
    assert operator.engine == "traced"


def test_a_mask_or_number_that_changed_is_seen_inside_of_transforms() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([True, False, True, False]))
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[self.mask] * float(self.scale)

    module = Masked()
    operator = al.linear_operator(module, (4,))
    assert operator.engine == "traced"
    x = torch.arange(4.0)
    module.scale.fill_(3.0)
    assert torch.func.vmap(operator)(x[None]).tolist() == [[0.0, 6.0]]
    module.mask.copy_(torch.tensor([False, True, False, True]))
    assert torch.func.vmap(operator)(x[None]).tolist() == [[3.0, 9.0]]
    assert torch.func.jvp(operator, (x,), (x,))[1].tolist() == [3.0, 9.0]
