"""What a function depends on besides its argument is read at every call: no update is ever lost."""

from __future__ import annotations

import collections
import functools
import types

import numpy as np
import pytest
import torch
from built import needs_torch
from laws import assert_close, draw, seeded
from torch import nn

import adjointlab as al
from adjointlab.numerics import same

pytestmark = pytest.mark.slow

every_engine = pytest.mark.parametrize("engine", ["eager", "auto"])
GLOBAL = torch.ones(3)
GLOBAL_NUMBER = 2.0


def follows(function, change, engine: str, shape: tuple[int, ...] = (3,)) -> None:
    """Assert that A and Aᴴ before and after a change are those that are made before and after it."""
    A = al.linear_operator(function, shape, engine=engine)
    x, y = draw(A.domain, 1), draw(A.codomain, 2)
    first = (A(x), A.H(y))
    with torch.no_grad():  # calls like the one before take a shorter way: it must see the change as well
        assert_close([(A(x), A.H(y)) for _ in range(2)], [first, first], A.domain.eps)
    change()
    fresh = al.linear_operator(function, shape, engine="eager")
    expected = (fresh(x), fresh.H(y))
    assert not torch.equal(expected[1], first[1]), "the change must change the operator"
    with torch.no_grad():
        assert_close((A(x), A.H(y)), expected, A.domain.eps)
    assert_close((A(x), A.H(y)), expected, A.domain.eps)


def conv() -> nn.Conv1d:
    return nn.Conv1d(1, 1, 3, padding=1, bias=False)


def _no_grad_copy(target: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(torch.randn_like(target))


@every_engine
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: _no_grad_copy(layer.weight),
        lambda layer: layer.weight.data.mul_(-2),
        lambda layer: setattr(layer.weight, "data", torch.randn(1, 1, 3)),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(1, 1, 3))),
        lambda layer: layer.load_state_dict({"weight": torch.randn(1, 1, 3)}),
        pytest.param(lambda layer: layer.weight.detach().numpy().fill(3.0), marks=pytest.mark.cpu),
        lambda layer: layer.weight.data[0, 0, 1:].zero_(),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(3, 1, 1).permute(1, 2, 0))),
    ],
    ids=["copy_", "data.mul_", "data=", "new-parameter", "load", "numpy", "data-slice", "new-strides"],
)
def test_weight(change, engine: str) -> None:
    layer = conv()
    follows(layer, lambda: change(layer), engine, (1, 1, 7))


@every_engine
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam], ids=lambda kind: kind.__name__)
def test_training_step(optimizer, engine: str) -> None:
    layer = conv()
    step = optimizer(layer.parameters(), lr=0.1)

    def train() -> None:
        layer(torch.ones(1, 1, 7)).square().sum().backward()
        step.step()

    follows(layer, train, engine, (1, 1, 7))


@every_engine
def test_large_weight(engine: str) -> None:
    layer = nn.Linear(300, 300, bias=False)
    follows(layer, lambda: layer.weight.data.mul_(2), engine, (300,))


@every_engine
def test_module_attribute(engine: str) -> None:
    class Scaled(nn.Module):
        scale = 2.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * x

    module = Scaled()
    module.scale = 3.0
    follows(module, lambda: setattr(module, "scale", 5.0), engine)


@every_engine
def test_class_attribute(engine: str) -> None:
    class Scaled(nn.Module):
        scale = 2.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * x

    follows(Scaled(), lambda: setattr(Scaled, "scale", 5.0), engine)


class Plain:
    """Objects whose classes are changed."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(x)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @property
    def factor(self) -> float:
        return 2.0


class Other(Plain):
    """The same with another scale."""

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return 7 * x


@every_engine
@needs_torch("2.10", "PyTorch's front end takes a class to stay as it is")
def test_call_of_a_class_replaced(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    follows(Plain(), lambda: monkeypatch.setattr(Plain, "__call__", lambda self, x: 3 * x), engine)


def test_a_refresh_sees_what_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's front end takes the methods of a class to stay as they are, but for the one that is called."""
    A, x = al.linear_operator(Plain(), (3,)), torch.ones(3)
    monkeypatch.setattr(Plain, "scaled", lambda self, x: 5 * x)
    assert torch.equal(A.refresh()(x), 5 * x)
    assert torch.equal(A.H(x), 5 * x)


@every_engine
@needs_torch("2.10", "PyTorch's front end takes a class to stay as it is")
def test_property_of_a_class_replaced(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Plain()
    follows(lambda x: plain.factor * x, lambda: monkeypatch.setattr(Plain, "factor", property(lambda _: 3.0)), engine)


@every_engine
def test_class_of_an_object_assigned(engine: str) -> None:
    plain = Plain()
    follows(plain, lambda: setattr(plain, "__class__", Other), engine)


@every_engine
def test_class_of_an_object_inside_of_an_operator(engine: str) -> None:
    plain = Plain()
    inner = al.linear_operator(plain, (3,))
    follows(lambda x: 2 * inner(x), lambda: setattr(plain, "__class__", Other), engine)


@every_engine
def test_tensor_under_another_name(engine: str) -> None:
    tensors = {"a": torch.tensor(2.0)}

    def rename() -> None:
        tensors["b"] = 2 * tensors.pop("a")

    follows(lambda x: sum(tensors.values()) * x, rename, engine)


def test_a_change_and_back_between_batches_of_another_size() -> None:
    class Scaled(nn.Module):
        scale = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * x

    module = Scaled()
    A = al.linear_operator(module, (2, 3), batch_dims=1)
    x = torch.ones(5, 3)
    for scale in (2.0, 1.0, 2.0, 1.0):
        module.scale = scale
        assert torch.equal(A(x), scale * x)
        assert torch.equal(A(x), scale * x)


@every_engine
def test_tensor_attribute_that_is_no_buffer(engine: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = torch.ones(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mask * x

    module = Masked()
    follows(module, lambda: setattr(module, "mask", torch.arange(3.0)), engine)


@every_engine
def test_number_read_from_a_buffer(engine: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale.item()

    module = Scaled()
    follows(module, lambda: module.scale.mul_(3), engine)


@every_engine
def test_number_computed_from_a_buffer(engine: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kernel", torch.tensor([1.0, 2.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (2 * self.kernel).sum().item()

    module = Scaled()
    follows(module, lambda: module.kernel.mul_(3), engine)


@every_engine
def test_branch_on_a_buffer(engine: str) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sign", torch.tensor(1.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flip(-1) if self.sign > 0 else 2 * x

    module = Branch()
    follows(module, module.sign.neg_, engine)


@every_engine
def test_index_in_a_buffer(engine: str) -> None:
    index = torch.tensor([0, 1, 2])
    follows(lambda x: x[index], lambda: index.copy_(torch.tensor([2, 2, 0])), engine)


@every_engine
def test_boolean_mask(engine: str) -> None:
    mask = torch.tensor([True, False, True])
    follows(lambda x: x[mask], lambda: mask.copy_(torch.tensor([True, True, False])), engine)


@every_engine
def test_closure_tensor_in_place(engine: str) -> None:
    weight = torch.ones(3)
    follows(lambda x: weight * x, lambda: weight.mul_(2), engine)


@every_engine
def test_closure_variable_rebound(engine: str) -> None:
    weight = torch.ones(3)

    def change() -> None:
        nonlocal weight
        weight = torch.arange(3.0)

    follows(lambda x: weight * x, change, engine)


@every_engine
def test_closure_number_rebound(engine: str) -> None:
    scale = 2.0

    def change() -> None:
        nonlocal scale
        scale = 3.0

    follows(lambda x: scale * x, change, engine)


@every_engine
def test_closure_module_replaced(engine: str) -> None:
    layer = conv()

    def change() -> None:
        nonlocal layer
        layer = conv()

    follows(lambda x: 2 * layer(x), change, engine, (1, 1, 7))


@every_engine
def test_global_tensor(engine: str) -> None:
    GLOBAL.fill_(1)
    follows(lambda x: GLOBAL * x, lambda: GLOBAL.mul_(2), engine)


@every_engine
def test_global_number(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    follows(lambda x: GLOBAL_NUMBER * x, lambda: monkeypatch.setitem(globals(), "GLOBAL_NUMBER", 7.0), engine)


def _helper(x: torch.Tensor) -> torch.Tensor:
    return GLOBAL_NUMBER * x


@every_engine
def test_global_number_of_a_helper(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    follows(lambda x: 1.0 * _helper(x), lambda: monkeypatch.setitem(globals(), "GLOBAL_NUMBER", 7.0), engine)


@every_engine
def test_list_of_tensors(engine: str) -> None:
    weights = [torch.ones(3), torch.ones(3)]
    follows(lambda x: weights[0] * x + weights[1] * x, lambda: weights.__setitem__(1, torch.arange(3.0)), engine)


@every_engine
def test_list_that_grows(engine: str) -> None:
    weights = [torch.ones(3)]
    follows(lambda x: sum(w * x for w in weights), lambda: weights.append(torch.arange(3.0)), engine)


@every_engine
def test_dict_of_numbers(engine: str) -> None:
    options = {"scale": 2.0}
    follows(lambda x: options["scale"] * x, lambda: options.update(scale=3.0), engine)


@every_engine
def test_dict_that_grows(engine: str) -> None:
    options: dict[str, float] = {}
    follows(lambda x: options.get("scale", 1.0) * x, lambda: options.update(scale=3.0), engine)


@every_engine
def test_plain_object(engine: str) -> None:
    settings = types.SimpleNamespace(scale=2.0)
    follows(lambda x: settings.scale * x, lambda: setattr(settings, "scale", 3.0), engine)


@every_engine
def test_new_attribute(engine: str) -> None:
    module = nn.Module()
    module.forward = lambda x: getattr(module, "scale", 1.0) * x
    follows(module, lambda: setattr(module, "scale", 3.0), engine)


@every_engine
def test_numpy_array_in_place(engine: str) -> None:
    weight = np.ones(3, dtype=np.float32)
    follows(lambda x: torch.from_numpy(weight).to(x.device) * x, lambda: weight.fill(2.0), engine)


@every_engine
def test_numpy_array_replaced(engine: str) -> None:
    module = nn.Module()
    module.weight = np.ones(3, dtype=np.float32)
    module.forward = lambda x: torch.from_numpy(module.weight).to(x.device) * x
    follows(module, lambda: setattr(module, "weight", np.arange(3, dtype=np.float32)), engine)


@every_engine
def test_submodule_replaced(engine: str) -> None:
    chain = nn.Sequential(conv(), conv())
    follows(chain, lambda: chain.__setitem__(0, conv()), engine, (1, 1, 7))


@every_engine
def test_submodule_appended(engine: str) -> None:
    chain = nn.Sequential(conv())
    follows(chain, lambda: chain.append(conv()), engine, (1, 1, 7))


@every_engine
def test_parametrized_weight(engine: str) -> None:
    layer = nn.utils.parametrizations.weight_norm(conv())
    original = layer.parametrizations.weight.original0
    follows(layer, lambda: _no_grad_copy(original), engine, (1, 1, 7))


@every_engine
def test_tied_weight(engine: str) -> None:
    first, second = conv(), conv()
    second.weight = first.weight
    follows(nn.Sequential(first, second), lambda: _no_grad_copy(first.weight), engine, (1, 1, 7))


@every_engine
def test_view_of_a_tensor(engine: str) -> None:
    base = torch.ones(2, 3)
    view = base[1]
    follows(lambda x: view * x, lambda: base.mul_(2), engine)


@every_engine
def test_partial(engine: str) -> None:
    weight = torch.ones(3)
    follows(functools.partial(torch.mul, weight), lambda: weight.mul_(2), engine)


@every_engine
def test_default_argument(engine: str) -> None:
    def function(x: torch.Tensor, weight: torch.Tensor = torch.ones(3)) -> torch.Tensor:  # noqa: B008
        return weight * x

    follows(function, lambda: function.__defaults__[0].mul_(2), engine)


@every_engine
def test_bound_method(engine: str) -> None:
    class Physics:
        def __init__(self) -> None:
            self.mask = torch.ones(3)

        def measure(self, x: torch.Tensor) -> torch.Tensor:
            return self.mask * x

    physics = Physics()
    follows(physics.measure, lambda: setattr(physics, "mask", torch.arange(3.0)), engine)


@every_engine
def test_nested_closures(engine: str) -> None:
    weight = torch.ones(3)

    def inner(x: torch.Tensor) -> torch.Tensor:
        return weight * x

    def outer(x: torch.Tensor) -> torch.Tensor:
        return inner(x) + x

    follows(outer, lambda: weight.mul_(2), engine)


@every_engine
def test_many_changes(engine: str) -> None:
    module = nn.Module()
    module.scale = 1.0
    module.forward = lambda x: module.scale * x
    A = al.linear_operator(module, (3,), engine=engine)
    y = torch.ones(3)
    for number in range(20):
        module.scale = float(number)
        assert torch.equal(A.H(y), number * y)


@every_engine
def test_gradient_reaches_closed_over_tensors(engine: str) -> None:
    weight = torch.ones(3, requires_grad=True)
    A = al.linear_operator(lambda x: weight * x, (3,), engine=engine)
    y = torch.arange(3.0)
    (found,) = torch.autograd.grad(A.H(y).sum(), weight)
    assert_close(found, y, A.domain.eps)


@every_engine
def test_gradient_reaches_a_graph_behind_a_tensor(engine: str) -> None:
    theta = torch.zeros(3, requires_grad=True)
    module = nn.Module()
    module.weight = theta.exp()
    module.forward = lambda x: module.weight * x
    A = al.linear_operator(module, (3,), engine=engine)
    (found,) = torch.autograd.grad(A.H(torch.arange(3.0)).sum(), theta)
    assert_close(found, torch.arange(3.0), A.domain.eps)


@every_engine
@pytest.mark.parametrize("part", ["__code__", "__defaults__", "__kwdefaults__"])
def test_function_reloaded_in_place(part: str, engine: str) -> None:
    def forward(x, c=2.0, *, d=1.0):
        return c * x + d * x.flip(0)

    def other(x, c=3.0, *, d=-1.0):
        return c * x - d * x.roll(1)

    follows(forward, lambda: setattr(forward, part, getattr(other, part)), engine)


@every_engine
def test_queue(engine: str) -> None:
    factors = collections.deque([1.0, 2.0])
    follows(lambda x: factors[0] * x + factors[1] * x.flip(0), factors.reverse, engine)


@every_engine
def test_number_of_an_imported_module(engine: str) -> None:
    config = types.ModuleType("config")
    config.scale = 2.0
    scope = {"config": config}
    exec("def forward(x): return config.scale * x", scope)
    follows(scope["forward"], lambda: setattr(config, "scale", 3.0), engine)


def test_what_a_function_has_cached_is_no_part_of_a_trace() -> None:
    @functools.lru_cache
    def window(n: int) -> torch.Tensor:
        return torch.linspace(1, 2, n)

    A = al.linear_operator(lambda x: window(len(x)) * x, (3,))
    assert A.engine == "traced"
    assert type(window(3)) is torch.Tensor
    assert_close(A(torch.ones(3)), window(3), A.domain.eps)


class _Halved(nn.Module):
    """Two thirds of it are hidden from autograd, as in a straight-through estimator."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden = self.w * 2
        return (self.w + hidden) * x


def test_unfrozen_parameters_have_the_gradient_of_autograd() -> None:
    layer = _Halved().requires_grad_(False)
    A = al.linear_operator(layer, (3,))
    x = torch.randn(3)
    A(x)
    layer.requires_grad_(True)
    (found,) = torch.autograd.grad(A(x).sum(), layer.w)
    (expected,) = torch.autograd.grad(layer(x).sum(), layer.w)
    assert_close(found, expected, A.domain.eps)


def test_lazy_modules_have_to_run_once() -> None:
    with pytest.raises(al.SpaceMismatchError, match="run the module once before"):
        al.linear_operator(nn.LazyLinear(3, bias=False), (2,))


# -- the order of things, and what is inside of an operator ------------------------------------------------------------


class Chained(nn.Module):
    """Two linear maps, one after the other, in the order in which something holds them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        generator = seeded(0)
        parts = {name: torch.randn(3, 3, generator=generator) for name in "ab"}
        self.kind = kind
        if kind == "modules":
            self.parts = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in parts})
        elif kind == "ordered":
            self.parts = collections.OrderedDict(parts)
        elif kind == "attributes":
            self.parts = types.SimpleNamespace(**parts)
        elif kind == "dict":
            self.parts = parts
        else:
            for name, part in parts.items():
                self.register_buffer(name, part)

    def contents(self):
        """Return the dict that holds the parts."""
        if self.kind == "buffers":
            return self._buffers
        return vars(self.parts) if self.kind == "attributes" else self.parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.contents().values():
            x = part(x) if isinstance(part, nn.Module) else part @ x
        return x

    def turn(self) -> None:
        """Put the first part behind the second."""
        parts = self.contents()
        if self.kind == "ordered":
            parts.move_to_end("a")
        else:
            parts["a"] = parts.pop("a")


@every_engine
@pytest.mark.parametrize("kind", ["modules", "buffers", "dict"])
def test_order(kind: str, engine: str) -> None:
    module = Chained(kind).requires_grad_(requires_grad=False)
    follows(module, module.turn, engine)


class Growing:
    """A matrix, times what a list, a dict and an attribute hold, if anything."""

    def __init__(self) -> None:
        self.factors: list[float] = []
        self.weights = {"a": 0.5}
        self.labels: set[float] = set()
        self.matrix = torch.randn(3, 3, generator=seeded(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.matrix @ x
        for factor in (*self.factors, *self.weights.values(), *self.labels):
            y = factor * y
        return getattr(self, "gain", 1.0) * y


@every_engine
@pytest.mark.parametrize(
    "change",
    [
        lambda o: o.factors.append(3.0),
        lambda o: o.weights.update(b=3.0),
        lambda o: o.labels.add(3.0),
        lambda o: setattr(o, "gain", 3.0),
    ],
    ids=["list", "dict", "set", "attribute"],
)
def test_what_an_operator_inside_of_a_function_depends_on_grows(change, engine: str) -> None:
    map_ = Growing()
    inner = al.linear_operator(map_.forward, (3,), engine=engine)
    inner(inner.domain.zeros())
    follows(lambda x: 2 * inner(x), lambda: change(map_), engine)


def test_modes_of_a_call_are_no_part_of_what_an_operator_depends_on() -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
    A, made = al.linear_operator(layer, (1, 1, 5, 6)), []
    x, derivation = draw(A.domain, 1), A.source.nominal
    for mode in (torch.no_grad(), torch.inference_mode(), torch.device("cpu"), Noting(made)):
        with mode:
            A(x), A.H(x)
    assert A.source.nominal is derivation
    assert made, "the mode sees what the operator runs"
    outer = al.linear_operator(lambda v: 2 * A.H(v), (1, 1, 5, 6))
    assert outer.engine == "traced"
    assert A.source.nominal is derivation


class Noting(torch.overrides.TorchFunctionMode):
    """Keeps the names of the functions that are called."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@every_engine
def test_an_operator_inside_of_a_function_need_not_be_called_to_be_seen_to_change(engine: str) -> None:
    map_ = Growing()
    inner = al.linear_operator(map_.forward, (3,), engine=engine)
    A = al.linear_operator(lambda x: 2 * inner(x), (3,))
    outer = al.linear_operator(lambda x: 2 * A(x), (3,))
    x, y = draw(A.domain, 1), draw(A.codomain, 2)
    A(x), A.H(y), outer(x), outer.H(y)
    map_.factors.append(3.0)
    assert_close(outer.H(y), 4 * al.linear_operator(map_.forward, (3,)).H(y), A.domain.eps)
    assert_close(A(x), 2 * map_.forward(x), A.domain.eps)


LARGE = 1 << 15


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int32, torch.bool]
)
@pytest.mark.parametrize("size", [9, LARGE, LARGE + 1])
def test_tensors_are_the_same_where_no_entry_differs(dtype: torch.dtype, size: int) -> None:
    a = (10 * torch.randn(size, generator=seeded(0))).to(dtype)
    assert same(a, a.clone())
    assert same(a[1:], a.clone()[1:])
    for place in (0, size // 2, size - 1):
        b = a.clone()
        b[place] = ~b[place] if dtype == torch.bool else 3 * b[place] + 1
        assert not same(a, b)
    assert not same(a, torch.cat([a, a]))
    assert not same(a.reshape(1, -1), a)


def test_whatever_their_memory_is_like_tensors_are_compared_by_value() -> None:
    a = torch.randn(2, LARGE, dtype=torch.complex64, generator=seeded(0))
    assert same(a.T, a.T.clone(memory_format=torch.contiguous_format))
    assert same(a.conj(), a.conj().resolve_conj())
    assert not same(a.conj(), a)
    assert same(a.conj().imag, -a.imag)  # lazily negative
    gap = a.real.clone()
    gap[0, 5] = torch.nan
    assert same(gap, gap.clone())
    assert not same(gap, a.real)
    parameter = nn.Parameter(a.real.clone())
    assert same(parameter, a.real.clone())
