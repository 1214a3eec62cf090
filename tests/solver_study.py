"""Tables of the guides on preconditioning and on the gram: steps of ``cgls``, and errors of its solutions.

``python -m tests.solver_study`` prints them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import adjointlab as al

SIZE, RANK = 128, 100


def blur(mode: str = "zeros") -> nn.Module:
    """Return a Gaussian blur of 9² pixels."""
    place = torch.arange(9.0) - 4
    profile = torch.exp(-(place**2) / 8)
    layer = nn.Conv2d(1, 1, 9, padding=4, padding_mode=mode, bias=False).requires_grad_(False)
    layer.weight.copy_((profile[:, None] * profile / profile.sum() ** 2)[None, None])
    return layer


def radial(n: int = 32, spokes: int = 24) -> Callable[[Tensor], Tensor]:
    """Return Fourier samples along spokes, as a product with their matrix."""
    angles = torch.arange(spokes) * math.pi / spokes
    radii = torch.arange(n) - n / 2
    k = torch.stack([torch.outer(angles.cos(), radii), torch.outer(angles.sin(), radii)], -1).reshape(-1, 2)
    pixels = torch.cartesian_prod(*[torch.arange(float(n)) - n / 2] * 2)
    matrix = torch.polar(torch.full((len(k), n * n), 1 / n), -2 * math.pi / n * (k @ pixels.mT))
    return lambda x: matrix @ x.reshape(-1)


def problems() -> Iterator[tuple[str, al.LinearOperator[Any, Any], Tensor | None, float]]:
    """Yield name, operator, weight and damping."""
    shape, draw = (1, 1, SIZE, SIZE), torch.Generator().manual_seed(0)
    A = al.linear_operator(blur(), shape)
    mask = (torch.rand(shape, generator=draw) < 0.7).float()
    yield "70 % of the blurred pixels, `damp=0.01`", al.diagonal(mask) @ A, None, 0.01
    yield "weights from 0.01 to 10, at random", A, 10 ** (3 * torch.rand(shape, generator=draw) - 2), 0.01
    rising = torch.linspace(0.1, 2, SIZE).expand(shape).clone()
    rising[..., 30:90, 40:100] = 0
    yield "weights that rise, and a hole", A, rising, 0.01
    yield "reflected border, `damp=0.003`", al.linear_operator(blur("reflect"), shape), None, 0.003
    sensitivity, layer = torch.logspace(0, -2, SIZE), blur()
    yield "sensitivities from 1 to 0.01", al.linear_operator(lambda x: layer(sensitivity * x), shape), None, 0.003
    image = torch.zeros(32, 32, dtype=torch.complex64)
    yield "radial samples, without weights", al.linear_operator(radial(), image), None, 0.01


def steps() -> Iterator[list[str]]:
    """Yield the steps of ``cgls`` to ``tol=1e-5`` for each problem and preconditioner."""
    makers = al.precondition.diagonal, al.precondition.circulant, al.precondition.auto
    for name, A, weight, damp in problems():
        draw = torch.Generator().manual_seed(1)
        x = A.domain.randn(draw)
        y = A(x) + 0.01 * A.codomain.randn(draw)
        given: dict[str, Any] = {"weight": weight, "damp": damp}
        found = [None, *[make(A, **given) for make in makers], al.precondition.nystrom(A, RANK, **given)]
        solutions = [al.solvers.cgls(A, y, tol=1e-5, maxiter=3000, precondition=M, **given) for M in found]
        assert all(solution.converged for solution in solutions), name
        yield [name, *[str(solution.iterations) for solution in solutions]]


def errors() -> Iterator[list[str]]:
    """Yield the relative errors of ``cgls``, and with ``normal=True``, on dense matrices of a given condition."""
    for condition in (10, 100, 1000):
        row = [str(condition)]
        for dtype in (torch.float32, torch.float64):
            draw = torch.Generator().manual_seed(2)
            u, v = (torch.linalg.qr(torch.randn(n, 60, dtype=torch.float64, generator=draw))[0] for n in (80, 60))
            wide = (u * torch.logspace(0, -math.log10(condition), 60, dtype=torch.float64)) @ v.mT
            y = torch.randn(80, dtype=torch.float64, generator=draw).to(dtype)
            given = wide.to(dtype)
            exact = torch.linalg.lstsq(given.double(), y.double()[:, None]).solution[:, 0]
            for normal in (False, True):
                x = al.solvers.cgls(al.matrix(given), y, tol=0, normal=normal).x
                row.append(f"{float((x.double() - exact).norm() / exact.norm()):.0e}")
        yield row


def _printed(head: list[str], rows: Iterator[list[str]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |", flush=True)  # noqa: T201


if __name__ == "__main__":
    _printed(["problem", "plain", "`diagonal`", "`circulant`", "`auto`", f"`nystrom`, rank {RANK}"], steps())
    single, double = ([f"`cgls`, {name}", f"`normal=True`, {name}"] for name in ("float32", "float64"))
    _printed(["condition of A", *single, *double], errors())
