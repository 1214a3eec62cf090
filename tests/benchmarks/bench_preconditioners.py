"""Preconditioners: steps and seconds of `cgls` to a gradient of 1e-6 of the first one, beside other libraries.

All solve the same normal equations in single precision, with the same products: torchsolve and torch-linops take the
gram of our operator. torchsolve's conjugate gradients get what one would write by hand: the norms of the columns, or
the inverse of a periodic blur with the mean of the weights. torch-linops makes its Nyström preconditioner itself, as
our `nystrom` does, of the same rank. The seconds contain making the preconditioner. A way counts if the gradient at
what it returns, computed anew, is as small as asked for, up to a factor of two for what rounding makes of recurrences.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from interleave import Comparison
from torch import Tensor, nn

import adjointlab as al

WIDTH, RANK, TOL, MOST = 9, 100, 1e-6, 3000

Made = Callable[[Tensor], Tensor]
Way = Callable[[], tuple[Tensor, int]]  # to the solution, and the number of steps


@dataclass(frozen=True)
class Problem:
    """A forward model with weights and damping, and the preconditioner that one writes by hand."""

    name: str
    A: al.LinearOperator[Any, Any]
    weight: Tensor | None
    damp: float
    by_hand: Callable[[], Made]

    @property
    def options(self) -> dict[str, Any]:
        """What defines the equations, beside A."""
        return {"weight": self.weight, "damp": self.damp}


def blur() -> nn.Module:
    place = torch.arange(float(WIDTH)) - WIDTH // 2
    profile = torch.exp(-place.square() / 8)
    layer = nn.Conv2d(1, 1, WIDTH, padding=WIDTH // 2, bias=False).requires_grad_(False)
    layer.weight.copy_((profile[:, None] * profile / profile.sum() ** 2)[None, None])
    return layer


def periodic(n: int, level: float, damp: float) -> Made:
    """Return the inverse of the equations of a periodic blur with constant weights."""
    spread = torch.zeros(n, n)
    spread[:WIDTH, :WIDTH] = blur().weight[0, 0]
    spectrum = torch.fft.rfft2(spread.roll((-(WIDTH // 2),) * 2, (0, 1))).abs().square()
    inverse = 1 / (level * spectrum + damp**2)
    return lambda s: torch.fft.irfft2(inverse * torch.fft.rfft2(s), s=(n, n))


def masked(n: int) -> Problem:
    mask, layer = (torch.rand(1, 1, n, n) < 0.7).float(), blur()
    A = al.linear_operator(lambda x: mask * layer(x), (1, 1, n, n))
    return Problem(f"deblurring {n}², 70 % of the pixels", A, None, 0.01, lambda: periodic(n, 0.7, 0.01))


def weighted(n: int) -> Problem:
    weight, A = 10 ** (3 * torch.rand(1, 1, n, n) - 2), al.linear_operator(blur(), (1, 1, n, n))
    level = float(weight.mean())
    return Problem(f"deblurring {n}², weights at random", A, weight, 0.01, lambda: periodic(n, level, 0.01))


def rising(n: int) -> Problem:
    weight, A = torch.linspace(0.1, 2, n).expand(1, 1, n, n).clone(), al.linear_operator(blur(), (1, 1, n, n))
    weight[..., n // 4 : n // 2, n // 3 : 3 * n // 4] = 0
    level = float(weight.mean())
    return Problem(f"deblurring {n}², rising weights and a hole", A, weight, 0.01, lambda: periodic(n, level, 0.01))


def sensitive(n: int) -> Problem:
    sensitivity, layer = torch.logspace(0, -2, n), blur()
    A = al.linear_operator(lambda x: layer(sensitivity * x), (1, 1, n, n))
    energy = float(layer.weight.square().sum())
    return Problem(
        f"scaled columns, a blur of {n}²", A, None, 0.003, lambda: lambda s: s / (energy * sensitivity**2 + 0.003**2)
    )


def sparse(n: int) -> Problem:
    rows = torch.arange(n * n // 2).repeat_interleave(8)
    columns, scale = torch.randint(0, n * n // 4, rows.shape), 10 ** (4 * torch.rand(n * n // 4) - 2)
    values = torch.randn(rows.shape) * scale[columns]
    M = torch.sparse_coo_tensor(
        torch.stack([rows, columns]), values, (n * n // 2, n * n // 4), check_invariants=True
    ).coalesce()
    norms = torch.zeros(n * n // 4).index_add(0, M.indices()[1], M.values().square())
    A = al.matrix(M.to_sparse_csr())
    return Problem(f"scaled columns, a sparse matrix of {n * n // 4:,}", A, None, 1e-3, lambda: lambda s: s / norms)


def gridding(n: int, *, density: bool) -> Problem:
    """Return radial samples of an image: twice the transform, and Kaiser–Bessel sums of four by four values."""
    spokes, taps, size = int(math.pi / 2 * n), 4, 2 * n
    angle, radius = torch.arange(spokes) * math.pi / spokes, torch.arange(size) / 2 - n / 2
    k = torch.stack([torch.outer(angle.sin(), radius), torch.outer(angle.cos(), radius)], -1).reshape(-1, 2)
    at, beta = 2 * k + n, 2.34 * taps
    near = (at - taps / 2).ceil().long()[:, None] + torch.arange(taps)[None, :, None]
    window = torch.special.i0(beta * (1 - ((at[:, None] - near) * 2 / taps).square()).clamp_min(0).sqrt()) / taps
    values = (window[:, :, None, 0] * window[:, None, :, 1]).flatten(1)
    index = (near[:, :, None, 0] % size * size + near[:, None, :, 1] % size).flatten(1)
    root = (beta**2 - (math.pi * taps * (torch.arange(n) - n / 2) / size).square()).sqrt()
    correction = (root / root.sinh())[:, None] * (root / root.sinh())

    def forward(x: Tensor) -> Tensor:
        padded = torch.fft.ifftshift(nn.functional.pad(correction * x, (n // 2,) * 4))
        grid = torch.fft.fftshift(torch.fft.fft2(padded, norm="ortho"))
        return (grid.reshape(-1)[index] * values).sum(-1)

    A = al.linear_operator(forward, torch.zeros(n, n, dtype=torch.complex64))
    weight = k.norm(dim=-1).clamp_min(0.125) * 2 / n if density else None
    name = f"radial samples of {n}², " + ("with density weights" if density else "without weights")
    return Problem(name, A, weight, 0.01, lambda: ramp(n, density=density))


def ramp(n: int, *, density: bool) -> Made:
    """Return the division by how densely frequencies are sampled."""
    f = torch.fft.fftfreq(n) * n
    radius = (f[:, None].square() + f.square()).sqrt()
    spectrum = torch.where(radius <= n / 2, 1.0 if density else n / 2 / radius.clamp_min(0.5), 0.0)
    inverse = 1 / (spectrum + 0.01**2)
    return lambda s: torch.fft.ifft2(inverse * torch.fft.fft2(s))


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "masked": masked,
    "weighted": weighted,
    "rising": rising,
    "sensitive": sensitive,
    "sparse": sparse,
    "radial": lambda n: gridding(n // 2, density=False),
    "density": lambda n: gridding(n // 2, density=True),
}


def by_cgls(problem: Problem, y: Tensor, make: Callable[..., Any] | None) -> Way:
    def run() -> tuple[Tensor, int]:
        M = None if make is None else make(problem.A, **problem.options)
        found = al.solvers.cgls(problem.A, y, precondition=M, tol=TOL, maxiter=MOST, **problem.options)
        return found.x, int(found.iterations)

    return run


def by_torchsolve(normal: Made, right: Tensor, make: Callable[[], Made] | None, damp: float) -> Way:
    from torchsolve import Regularizer, conjugate_gradient

    def run() -> tuple[Tensor, int]:
        M = None if make is None else make()
        found = conjugate_gradient(
            normal, right, regularizers=[Regularizer(damp**2)], preconditioner=M, max_iter=MOST, rtol=TOL,
            warn_indefinite=False,
        )  # fmt: skip
        return found.solution, found.iterations

    return run


def by_linops(normal: Made, right: Tensor, damp: float) -> Way:
    from linops.cg import CG
    from linops.linops import LinearOperator, Symmetric
    from linops.nystrom_precondition import NystromPreconditioner, construct_approximation

    flat, count = torch.view_as_real(right).reshape(-1) if right.is_complex() else right.reshape(-1), [0]

    def image(v: Tensor) -> Tensor:
        return torch.view_as_complex(v.reshape(*right.shape, 2)) if right.is_complex() else v.reshape(right.shape)

    class Gram(LinearOperator):
        def __init__(self) -> None:
            super().__init__()
            self._adjoint, self._shape = Symmetric, (len(flat),) * 2

        def _matmul_impl(self, v: Tensor) -> Tensor:
            count[0] += 1
            found = normal(image(v))
            return (torch.view_as_real(found) if found.is_complex() else found).reshape(-1)

    def run() -> tuple[Tensor, int]:
        gram = Gram()
        sketch = construct_approximation(gram, RANK, RANK, 1, 1e30)  # a tolerance that the first sketch meets
        M = NystromPreconditioner(sketch, damp**2)
        count[0] = 0
        x = CG(lambda v: gram @ v + damp**2 * v, M, rtol=TOL, maxiter=MOST)(flat)
        return image(x), count[0] // 3  # each step takes three products

    return run


def ways_of(problem: Problem, y: Tensor) -> tuple[dict[str, Way], dict[str, str]]:
    """Return every way to solve a problem, ours first, and why some are skipped."""
    A, skipped = problem.A, dict[str, str]()
    F = al.LeastSquares(A, y, weight=problem.weight)
    normal, right = F.hessian, A.H(y if problem.weight is None else problem.weight * y)
    found: dict[str, Way] = {
        "adjointlab": by_cgls(problem, y, al.precondition.auto),
        "cgls": by_cgls(problem, y, None),
        "diagonal": by_cgls(problem, y, al.precondition.diagonal),
        "circulant": by_cgls(problem, y, al.precondition.circulant),
        "nystrom": by_cgls(problem, y, lambda A, **given: al.precondition.nystrom(A, RANK, **given)),
    }
    try:
        found["torchsolve CG"] = by_torchsolve(normal, right, None, problem.damp)
        found["torchsolve CG, by hand"] = by_torchsolve(normal, right, problem.by_hand, problem.damp)
    except ImportError:
        skipped["torchsolve"] = "not installed"
    try:
        found["torch-linops Nyström"] = by_linops(normal, right, problem.damp)
    except ImportError:
        skipped["torch-linops"] = "not installed"
    return found, skipped


@pytest.mark.filterwarnings("ignore:the squared norms of the columns")  # of maps that overlap far
@pytest.mark.parametrize("name", PROBLEMS)
def test_preconditioners(name: str, quick: bool, compare: Comparison, device: torch.device) -> None:
    if device.type != "cpu" or quick:
        pytest.skip("the peers run on the CPU" if device.type != "cpu" else "has no small size")
    torch.manual_seed(0)
    problem = PROBLEMS[name](128)
    y = problem.A(problem.A.domain.randn())
    y = y + 0.01 * y.abs().square().mean().sqrt() * problem.A.codomain.randn()
    wide = al.LeastSquares(problem.A, y, weight=problem.weight)
    first = float(problem.A.domain.norm(wide.gradient(problem.A.domain.zeros())))
    ways, skipped = ways_of(problem, y)
    steps, gradients, making = {}, {}, {}
    for way, run in ways.items():
        try:
            x, steps[way] = run()
        except torch.linalg.LinAlgError as error:  # of torch-linops, whose factor is not positive
            skipped[way] = str(error).splitlines()[0]
            continue
        gradients[way] = float((wide.gradient(x) + problem.damp**2 * x).norm()) / first
    for way, make in (("adjointlab", al.precondition.auto), ("circulant", al.precondition.circulant)):
        start = time.perf_counter()
        make(problem.A, **problem.options)
        making[way] = time.perf_counter() - start
    timed = {way: run for way, run in ways.items() if way in gradients}
    compare(
        timed, share=1.0, most=3, skipped=skipped, section="preconditioners", case=problem.name, steps=steps,
        gradients=gradients, making=making,
    )  # fmt: skip
    assert gradients["adjointlab"] <= 2 * TOL
