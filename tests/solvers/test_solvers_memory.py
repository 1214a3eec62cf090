"""Solvers and norms: how many vectors they hold, and how often the host waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from solver_problems import Peak
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import adjointlab as al

M, N = 700_000, 500_000  # vectors beside which scalars, and products in pieces, are small


def longer(dtype: torch.dtype, problems: int = 0) -> al.LinearOperator:
    """Return an operator that takes no memory but for its result."""
    m, n = (k // max(1, problems) for k in (M, N))
    batch = (problems,) if problems else ()

    def forward(x: Tensor) -> Tensor:
        return torch.cat([x, x[..., : m - n]], -1)

    def adjoint(y: Tensor) -> Tensor:
        x = y[..., :n].clone()
        x[..., : m - n] += y[..., n:]
        return x

    spaces = (al.Space.of((*batch, k), dtype=dtype, batch_dims=len(batch)) for k in (n, m))
    return al.LinearOperator(forward, adjoint, *spaces)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "problems"), [(torch.float32, 0), (torch.float32, 10), (torch.float64, 2), (torch.complex64, 0)], ids=str
)
@pytest.mark.parametrize("damp", [0.0, 0.5])
@pytest.mark.parametrize("given", [(), ("weight",), ("x0",), ("weight", "x0"), ("callback",)], ids="+".join)
@pytest.mark.parametrize("name", ["cgls", "lsmr"])
def test_memory_of_least_squares(
    name: str, given: tuple[str, ...], damp: float, dtype: torch.dtype, problems: int
) -> None:
    A = longer(dtype, problems)
    y = A.codomain.randn()
    options: dict[str, Any] = {
        "weight": torch.rand(y.shape, dtype=dtype.to_real()),
        "x0": A.domain.randn(),
        "callback": lambda x, info: None,
    }
    options = {key: options[key] for key in given}
    n, m = N * dtype.itemsize, M * dtype.itemsize
    with torch.no_grad(), Peak(n, m, given=(y, *options.values())) as peak:
        solution = getattr(al.solvers, name)(A, y, damp=damp, maxiter=4, **options)
    assert (torch.as_tensor(solution.iterations) > 1).all()
    assert 2 <= peak.most[n] <= 6
    assert 1 <= peak.most[m] <= 3
    assert peak.bytes <= 6 * n + 3 * m


def test_memory_of_cg() -> None:
    space = al.Space.of(torch.zeros(5000).double())
    A = al.LinearOperator(lambda x: 2 * x, lambda x: 2 * x, space, space)
    b = torch.randn(5000, dtype=torch.float64)
    with torch.no_grad(), Peak(8 * 5000, given=(b,)) as peak:
        al.solvers.cg(A, b, maxiter=4)
    assert 3 <= peak.most[8 * 5000] <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_memory_of_the_norm(dtype: torch.dtype) -> None:
    A = longer(dtype)
    n, m = N * dtype.itemsize, M * dtype.itemsize
    with Peak(n, m, given=()) as peak:
        al.operator_norm(A)
    assert 1 <= peak.most[n] <= 3
    assert 1 <= peak.most[m] <= 3
    assert peak.bytes <= 6 * n


class Waits(TorchDispatchMode):
    """Counts how often a number is taken from the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["cg", "cgls", "lsmr"])
def test_a_step_waits_for_the_device_once(name: str) -> None:
    A = al.diagonal(torch.linspace(1, 50, 60, dtype=torch.float64))
    counts = []
    for steps in (5, 15):
        with torch.no_grad(), Waits() as waits:
            assert getattr(al.solvers, name)(A, torch.ones(60, dtype=torch.float64), maxiter=steps).iterations == steps
        counts.append(waits.count)
    assert counts[1] - counts[0] == 10
