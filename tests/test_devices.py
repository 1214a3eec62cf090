"""Tensors are made where the domain is: torch's default device is the user's, and may be another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import adjointlab as al
from adjointlab import spectral


@pytest.fixture(scope="module")
def device() -> torch.device:
    """The device of the suite, asked for before there is another default."""
    return torch.get_default_device()


@pytest.fixture(scope="module")
def A(device: torch.device) -> al.LinearOperator:
    with torch.device("meta"):
        return al.linear_operator(blur(device), (1, 1, 12, 10))


@pytest.fixture(autouse=True)
def _nothing_by_default(device: torch.device) -> Iterator[None]:
    """Have tensors without a device made on one where they are of no use."""
    with torch.device("meta"):
        yield


def blur(device: torch.device) -> nn.Module:
    return nn.Conv2d(1, 1, 5, padding=2, bias=False, device=device)


def gradient(A: al.LinearOperator) -> Tensor:
    return al.LeastSquares(A, A.codomain.randn()).gradient(A.domain.randn())


USES: dict[str, Callable[[al.LinearOperator], object]] = {
    "forward": lambda A: A(A.domain.randn()),
    "adjoint": lambda A: A.H(A.codomain.randn(torch.Generator().manual_seed(0))),
    "gradient": gradient,
    "check": lambda A: al.check_adjoint(A).passed,
    "diagnosis": lambda A: al.check_adjoint(A, adjoint=lambda v: A.H(v).flip(-1)).diagnosis,
    "permutation": lambda A: al.check_adjoint(A, adjoint=lambda v: A.H(v).roll(1, -1)).diagnosis,
    "linearity": lambda A: al.check_linearity(lambda x: A(x) + 0, A.domain).verdict,
    "not linear": lambda A: al.check_linearity(torch.relu, A.domain).verdict,
    "norm": al.operator_norm,
    "condition": spectral.condition_number,
    "trace": lambda A: spectral.estimate_trace(A.gram, samples=2),
    "diagonal": lambda A: spectral.estimate_diagonal(A.gram, samples=2),
    "matrix": al.to_dense,
    "cg": lambda A: al.solvers.cg(A.gram, A.domain.randn(), maxiter=3).x,
    "cgls": lambda A: al.solvers.cgls(A, A.codomain.randn(), maxiter=3).x,
    "lsmr": lambda A: al.solvers.lsmr(A, A.codomain.randn(), maxiter=3).x,
}


@pytest.mark.parametrize("use", USES)
def test_the_default_device_is_not_used(use: str, A: al.LinearOperator) -> None:
    found = USES[use](A)
    assert not (isinstance(found, Tensor) and found.is_meta)


def test_kernels_are_measured_where_the_domain_is(device: torch.device) -> None:
    module = nn.Conv2d(1, 1, 11, padding=5, padding_mode="circular", device=device, bias=False)
    A = al.linear_operator(module, (1, 1, 64, 64), autotune=True)
    assert A.engine == "traced", A.explain()
    assert A.H.domain.specs[0].device.type == device.type


def there_is(kind: str) -> bool:
    return bool(getattr(torch, kind).is_available())


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_a_smoke_test_on_other_devices(kind: str) -> None:
    if not there_is(kind):
        pytest.skip(f"there is no {kind} here")
    A = al.linear_operator(blur(torch.device(kind)), (1, 1, 12, 10), check=kind != "mps")
    x, y = A.domain.randn(), A.codomain.randn()
    c = blur(torch.device("cpu"))
    c.load_state_dict({name: t.cpu() for name, t in A.module.state_dict().items()})
    B = al.linear_operator(c, (1, 1, 12, 10))
    torch.testing.assert_close(A(x).cpu(), B(x.cpu()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(A.H(y).cpu(), B.H(y.cpu()), rtol=1e-4, atol=1e-4)
