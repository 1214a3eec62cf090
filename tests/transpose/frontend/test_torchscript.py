"""TorchScript is traced through: its graphs, run operation by operation, do what its own interpreter does."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple  # noqa: UP035  # TorchScript knows these

import pytest
import torch
from laws import assert_close, seeded
from torch import Tensor, nn

import adjointlab as al

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated", "ignore::torch.jit.TracerWarning"),
]

N = 6


class Loops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(N, N, bias=False) for _ in range(2)])
        self.register_buffer("weights", torch.linspace(1, 2, N))
        self.count = 3

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weights
        for layer in self.layers:
            y = layer(y)
        for i in range(self.count):
            if i % 2 == 0:  # noqa: SIM108  # a branch, as TorchScript has them
                y = y + torch.roll(y, [i], [0])
            else:
                y = y - x
        total, step = torch.zeros_like(y), 0
        while step < y.size(0):
            total[step] = y[: step + 1].sum()
            step += 2
        return total


class Lists(nn.Module):
    def forward(self, x: Tensor, scale: float = 2.0, extra: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        parts: List[Tensor] = []  # noqa: UP006
        for i in range(len(x.shape) + 2):
            parts.append(x[i::3] * float(i + 1))  # noqa: PERF401  # a list that grows
        known: Dict[str, Tensor] = {"a": parts[0], "b": parts[1]}  # noqa: UP006
        pair: Tuple[Tensor, int] = (known["a"], len(parts))  # noqa: UP006
        first, count = pair
        if extra is not None:
            first = first + extra[: first.size(0)]
        sizes = [first.numel(), parts[-1].numel()]
        matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float32)
        both = matrix @ torch.stack([first, parts[-1]])
        return scale * torch.cat([both.reshape(-1), first / count, parts[0][: sizes[1]]])


class Written(nn.Module):
    """Lists and dictionaries that are written to."""

    def forward(self, x: Tensor) -> Tensor:
        parts: List[Tensor] = [x, 2 * x]  # noqa: UP006
        parts += [3 * x]
        parts.extend([x.flip(0), 5 * x])
        parts.insert(1, 6 * x)
        parts[0] = parts.pop() - x
        known: Dict[str, Tensor] = {}  # noqa: UP006
        for i, part in enumerate(parts):
            known["even" if i % 2 == 0 else str(i)] = part
        total = torch.zeros_like(x)
        for part in known.values():
            total += part
        return total if "even" in known else x


class Sorted(nn.Module):
    """A list is sorted, which nothing here does."""

    def forward(self, x: Tensor) -> Tensor:
        order = [2, 0, 1]
        order.sort()
        return x * float(order[0] + 1)


class Forked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        later = torch.jit.fork(halves, x, 2)
        return torch.jit.wait(later) + x


@torch.jit.script
def halves(x: Tensor, count: int) -> Tensor:
    return x / count


class Complex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.fft(x.to(torch.complex64), norm="ortho")
        assert y.dim() == 1, "one dimension"
        return torch.view_as_real(y * torch.exp(-0.5j * torch.arange(y.shape[0], device=y.device)))


CASES = {
    "loops": Loops,
    "lists": Lists,
    "forked": Forked,
    "written": Written,
    "complex": Complex,
}


def checked(function: Any, reference: Any, **options: Any) -> al.LinearOperator:
    A = al.linear_operator(function, (N,), **options)
    assert A.engine == "traced", A.explain()
    x = A.domain.randn(seeded(0))
    assert_close(A(x), reference(x).detach(), A.domain.eps)
    assert al.check_adjoint(A).passed
    return A


@pytest.mark.parametrize("case", CASES)
def test_scripted_modules(case: str) -> None:
    module = CASES[case]().requires_grad_(False)
    scripted = torch.jit.script(module)
    checked(scripted, scripted)
    checked(lambda x: 2 * scripted(x), lambda x: 2 * module(x))


@pytest.mark.parametrize("case", CASES)
def test_traced_modules(case: str) -> None:
    module = CASES[case]().requires_grad_(False)
    traced = torch.jit.trace(module, torch.ones(N), check_trace=False)
    checked(traced, traced)


def test_arguments_by_name_and_by_default() -> None:
    scripted, extra = torch.jit.script(Lists()), torch.zeros(N)
    checked(scripted, lambda x: scripted(x, 3.0), kwargs={"scale": 3.0})
    checked(lambda x: scripted(x, extra=extra), lambda x: scripted(x, 2.0, extra))


def test_parameters_are_followed_and_learn() -> None:
    scripted = torch.jit.script(Loops())
    A = al.linear_operator(scripted, (N,))
    assert A.engine == "traced"
    x, v = A.domain.randn(seeded(0)), A.codomain.randn(seeded(1))
    weight = dict(scripted.named_parameters())["layers.0.weight"]
    found, expected = (torch.autograd.grad((f(x) * v).sum(), weight)[0] for f in (A, scripted))
    assert_close(found, expected, A.domain.eps)
    with torch.no_grad():
        weight.mul_(3)
    assert_close(A(x), scripted(x), A.domain.eps)


def test_a_list_that_is_changed_in_place_by_torchscript_itself_is_not_traced() -> None:
    A = al.linear_operator(torch.jit.script(Sorted()), (N,))
    assert A.engine == "eager"
    assert "of a list" in A.explain()
    assert torch.equal(A(torch.ones(N)), torch.ones(N))


class Endless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        i = 0
        while i < 200000:
            i += 1
        return x * i


def test_a_loop_without_an_end_in_sight_is_not_traced() -> None:
    A = al.linear_operator(torch.jit.script(Endless()), (N,))
    assert A.engine == "eager"
    assert "a loop of more than 100,000 steps" in A.explain()
    assert torch.equal(A(torch.ones(N)), 200000 * torch.ones(N))


class Branching(nn.Module):
    """Decides by dtype and device, which TorchScript writes as numbers."""

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * x if x.dtype == torch.float64 else 3 * x
        if y.device == torch.device("cpu") and y.dtype != torch.complex64:
            y = 5 * y
        return y.to(x.dtype) + torch.zeros(x.size(0), dtype=x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_branches_by_dtype_and_device(dtype: torch.dtype) -> None:
    scripted = torch.jit.script(Branching())
    A = al.linear_operator(scripted, al.TensorSpec((N,), dtype))
    assert A.engine == "traced", A.explain()
    x = A.domain.randn(seeded(0))
    assert_close(A(x), Branching()(x), A.domain.eps)


def test_a_function_that_is_not_linear_is_refused() -> None:
    @torch.jit.script
    def rectified(x: Tensor) -> Tensor:
        return torch.relu(x) if bool(x.sum() > 0) else x

    with pytest.raises(al.NotLinearError, match="expected a linear map"):
        al.linear_operator(rectified, (N,))
    with pytest.raises(al.NotLinearError, match="expected a linear map"):
        al.linear_operator(torch.jit.trace(nn.ReLU(), torch.ones(N)), (N,))
