"""Engines: what is in force, how it falls back, and that building costs no memory."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from laws import seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import adjointlab as al

pytestmark = pytest.mark.slow


def blur() -> nn.Conv2d:
    return nn.Conv2d(1, 1, 5, padding=2, padding_mode="circular", bias=False, dtype=torch.float64).requires_grad_(False)


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    return float((a - b).norm()) <= 32 * torch.finfo(a.dtype).eps * float(a.norm())


def test_compiled_engine_agrees_with_eager() -> None:
    module = blur()
    eager = al.linear_operator(module, (1, 1, 16, 16), engine="eager")
    compiled = al.linear_operator(module, (1, 1, 16, 16), engine="compiled")
    x = eager.domain.randn(torch.Generator().manual_seed(0))
    assert compiled.engine == compiled.H.engine == "compiled"
    assert agree(eager(x), compiled(x))
    assert agree(eager.H(x), compiled.H(x))


def test_compile_switches_in_place() -> None:
    operator = al.linear_operator(blur(), (1, 1, 12, 12))
    adjoint = operator.H
    assert operator.engine == "traced"
    assert operator.compile(backend="aot_eager") is operator
    assert adjoint.engine == "compiled"


@pytest.mark.parametrize("options", [{"dynamic": True}, {"fullgraph": False, "backend": "aot_eager"}], ids=str)
def test_options_of_the_compiler(options: dict[str, object]) -> None:
    operator = al.linear_operator(blur(), (1, 1, 12, 12)).compile(**options)
    assert operator.engine == "compiled", operator.explain()


def test_compiled_engine_without_a_compiler_falls_back_and_says_why() -> None:
    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        raise RuntimeError("no C++ compiler here")

    operator = al.linear_operator(blur(), (1, 1, 12, 12)).compile(backend=backend)
    assert operator.engine == "traced"
    assert "torch.compile failed" in operator.explain()
    assert "no C++ compiler here" in operator.explain()


def test_a_compiler_that_is_wrong_is_not_used() -> None:
    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        return lambda *tensors: [1.01 * out for out in module(*tensors)]

    operator = al.linear_operator(blur(), (1, 1, 12, 12)).compile(backend=backend)
    assert operator.engine == "traced"
    assert "differs from the user's" in operator.explain()


def test_compiled_engine_does_not_recompile_for_every_batch_size() -> None:
    compiled = 0

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        nonlocal compiled
        compiled += 1
        return module.forward

    module = blur()
    operator = al.linear_operator(module, (2, 1, 8, 8), batch_dims=1).compile(backend=backend)
    for batch in (3, 4):
        operator.H(torch.ones(batch, 1, 8, 8, dtype=torch.float64))
    after = compiled
    for batch in (5, 6, 9):
        v = torch.randn(batch, 1, 8, 8, dtype=torch.float64, generator=seeded(batch))
        assert agree(torch.func.vjp(module, v)[1](v)[0], operator.H(v))
    assert operator.engine == "compiled"
    assert compiled == after


class _Largest(TorchDispatchMode):
    """Remember the largest real tensor that any op makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and type(t) is torch.Tensor and t.device.type == "cpu":
                self.numel = max(self.numel, t.untyped_storage().nbytes())
        return out


def test_operators_larger_than_memory_can_be_built_without_a_check() -> None:
    module = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect", bias=False), nn.AvgPool2d(2))
    operator = al.linear_operator(module, (1, 1, 1 << 20, 1 << 20), check=False)  # four terabytes
    assert operator.engine == "traced"
    assert operator.codomain.specs[0].shape == (1, 1, 1 << 19, 1 << 19)


def test_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="expected engine to be one of auto, eager, traced, compiled, got 'fast'"):
        al.linear_operator(blur(), (1, 1, 8, 8), engine="fast")


def test_a_function_that_changes_at_every_call_ends_up_eager() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * x

    module = Counting()
    operator = al.linear_operator(module, (3,))
    x = torch.ones(3)
    for step in range(12):
        module.scale = float(step)
        assert torch.equal(operator(x), step * x)
        assert torch.equal(operator.H(x), step * x)
    assert operator.engine == "eager"
    assert "changes from call to call" in operator.explain()


def test_operators_are_built_in_threads_side_by_side() -> None:
    modules = [torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        operators = list(pool.map(lambda module: al.linear_operator(module, (1, 1, 8, 8)), modules))
    assert [operator.engine for operator in operators] == ["traced"] * 8


@pytest.mark.parametrize("front_end", [True, False])
def test_what_a_forward_keeps_for_later_has_values(front_end: bool) -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([1.0, 2.0, 3.0]))
            self.kept, self.last = {}, None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mask = self.mask * 1.0
            if "ramp" not in self.kept:
                self.kept["ramp"] = torch.arange(3.0)
            self.last = x + 1
            if not front_end and self.mask.sum() < 0:  # which PyTorch's front end refuses
                return 2 * x
            return self.mask * self.kept["ramp"] * x

    module = Keeping()
    A, x = al.linear_operator(module, (3,)), torch.ones(3)
    expected = torch.tensor([0.0, 2.0, 6.0])
    assert torch.equal(module(x), expected)
    assert torch.equal(A(x), expected)
    assert torch.equal(A.H(x), expected)
    for tensor in (module.mask, module.last, module.kept["ramp"]):
        assert type(tensor) is torch.Tensor
    assert module.mask.tolist() == [1.0, 2.0, 3.0]


def test_what_is_kept_for_batch_sizes_is_bounded() -> None:
    operator = al.linear_operator(lambda x: x.cumsum(-1), (1, 3), batch_dims=1)
    for size in range(1, 60):
        assert torch.equal(operator(torch.ones(size, 3))[-1], torch.tensor([1.0, 2.0, 3.0]))
    assert len(operator.source._derivations) <= 17
