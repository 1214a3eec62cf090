"""How operators between spaces with weights do: random weights for every linear map of the zoo, against dense algebra.

``python -m tests.weighted_study 100`` draws as many weights for each map, and prints what failed; with a second number
n, it takes every n-th map.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import adjointlab as al
from adjointlab.weighted import in_spaces
from tests.laws import coordinates, matrix
from tests.operator_zoo import LINEAR, Entry

TOL = 1e-10  # of the gradient, for cgls
KINDS = ("none", "number", "entries", "broadcast", "wide", "operator")


def positive(shape: tuple[int, ...], draw: torch.Generator, decades: float = 1.0) -> Tensor:
    """Return random numbers over so many decades around one."""
    return 10 ** (decades * (torch.rand(shape, generator=draw, dtype=torch.float64, device="cpu") - 0.5))


class Coupled:
    """``W = R (1 + u uᴴ) R`` on each leaf, with a real diagonal R, and its inverse by Sherman and Morrison."""

    def __init__(self, space: al.Space, draw: torch.Generator) -> None:
        self.space = space
        self.parts = []
        for spec in space.specs:
            u = torch.randn(spec.shape, generator=draw, dtype=spec.dtype, device="cpu").to(spec.device)
            root = positive(spec.shape, draw).to(device=spec.device, dtype=spec.dtype)
            self.parts.append((root, u / torch.linalg.vector_norm(u)))

    def times(self, x: Any) -> Any:
        return self._each(x, lambda leaf, root, u: root * _plus(root * leaf, u, 1.0))

    def divided(self, x: Any) -> Any:
        return self._each(x, lambda leaf, root, u: _plus(leaf / root, u, -0.5) / root)

    def _each(self, x: Any, function: Any) -> Any:
        pairs = zip(self.space.leaves(x), self.parts, strict=True)
        return self.space.unflatten([function(leaf, *part) for leaf, part in pairs])


def _plus(x: Tensor, u: Tensor, factor: float) -> Tensor:
    """Return ``(1 + c u uᴴ) x``."""
    return x + factor * u * (u.conj() * x).sum()


def weighted(space: al.Space, kind: str, draw: torch.Generator) -> al.Space:
    """Return a space with a random weight of a kind."""
    if kind == "none":
        return space
    if kind == "number":
        return al.Space.of(space, weight=float(positive((), draw, 6)))
    if kind == "operator":
        coupled = Coupled(space, draw)
        return al.Space.of(space, weight=(coupled.times, coupled.divided))
    shapes = [spec.shape for spec in space.specs]
    if kind == "broadcast":
        shapes = [tuple(n if i % 2 else 1 for i, n in enumerate(shape)) for shape in shapes]
    weights = [positive(shape, draw, 6 if kind == "wide" else 1) for shape in shapes]
    return al.Space.of(space, weight=space.unflatten(weights))


def root(space: al.Space) -> Tensor:
    """Return ``L`` with ``‖x‖ = ‖Lᵀ x‖₂`` for the real coordinates of x."""
    return torch.linalg.cholesky(matrix(space.weigh, space.zeros()))


def failures(plain: al.LinearOperator, D: Tensor, kinds: tuple[str, str], seed: int) -> Iterator[str]:
    """Yield what is wrong with an operator, and its real matrix, between spaces with random weights."""
    draw = torch.Generator().manual_seed(seed)
    X, Y = (weighted(space, kind, draw) for space, kind in zip((plain.domain, plain.codomain), kinds, strict=True))
    A = in_spaces(plain, X, Y)
    if not al.check_adjoint(A, seed=seed, trials=2).passed:
        yield "dot test"
    left, right = root(Y), root(X)
    whitened = torch.linalg.solve_triangular(right, (left.T @ D).T, upper=False).T
    norm = float(torch.linalg.matrix_norm(whitened, 2))
    if norm == 0:
        return
    found = float(al.operator_norm(A, tol=1e-4, maxiter=2000))
    if not abs(found - norm) <= 2e-4 * norm:
        yield f"operator_norm {found} for {norm}"
    y, x = Y.randn(draw), X.randn(draw)
    size = float(torch.linalg.vector_norm(right.T @ coordinates(x)))
    if not abs(float(X.norm(x)) - size) <= 64 * X.eps * size:
        yield f"norm {float(X.norm(x))} for {size}"
    damp = 0.3 * norm
    stacked = torch.cat([whitened, damp * torch.eye(len(right), dtype=D.dtype)])
    data = torch.cat([left.T @ coordinates(y), torch.zeros(len(right), dtype=D.dtype)])
    u = torch.linalg.lstsq(stacked, data[:, None]).solution[:, 0]
    solution = al.solvers.cgls(A, y, damp=damp, tol=TOL)
    apart = float(torch.linalg.vector_norm(right.T @ coordinates(solution.x) - u))
    start = float(torch.linalg.vector_norm(whitened.T @ (left.T @ coordinates(y))))
    # A gradient g at x leaves an error of at most ‖g‖ / damp²; that of rounding is a few eps ‖A‖ ‖y‖ / damp².
    rounding = 64 * max(X.eps, Y.eps) * norm * float(Y.norm(y))
    if not (solution.converged and apart <= (TOL * start + rounding) / damp**2):
        yield f"cgls {apart:.3g}, {solution.reason}"
    F = al.LeastSquares(A, y)
    at = tuple(leaf.clone().requires_grad_() for leaf in X.leaves(x))
    ours = X.plain.leaves(X.weigh(F.gradient(x)))
    theirs = torch.autograd.grad(F(X.unflatten(at)), at, materialize_grads=True)
    gap = math.hypot(*(float(torch.linalg.vector_norm(a.detach() - b)) for a, b in zip(ours, theirs, strict=True)))
    largest = math.hypot(*(float(torch.linalg.vector_norm(b)) for b in theirs))
    if not gap <= 64 * max(X.eps, Y.eps) * largest:
        yield f"gradient {gap / largest}"


def widest(entry: Entry) -> torch.dtype:
    """Return the widest dtype of an entry, complex where there is one."""
    return next(dtype for dtype in (torch.complex128, torch.float64, *entry.dtypes) if dtype in entry.dtypes)


def study(entry: Entry, seeds: range) -> Iterator[str]:
    """Yield what fails for an entry of the zoo."""
    function, domain = entry.build(widest(entry))
    build = al.affine_operator if entry.affine else al.linear_operator
    built = build(function, domain)
    plain = built.linear if isinstance(built, al.AffineOperator) else built
    D = matrix(plain, plain.domain.zeros())
    for seed in seeds:
        pair = torch.randint(len(KINDS), (2,), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
        kinds = KINDS[pair[0]], KINDS[pair[1]]
        for failure in failures(plain, D, kinds, seed):
            yield f"{entry.name}, weights {kinds} of seed {seed}: {failure}"


def main(draws: int, every: int = 1) -> None:
    """Print all failures, and how many maps were tried."""
    torch.manual_seed(0)
    count = 0
    for number, entry in enumerate(LINEAR[::every]):
        found = list(study(entry, range(number, number + draws)))
        count += len(found)
        sys.stdout.writelines(f"{line}\n" for line in found)
        sys.stdout.flush()
    sys.stdout.write(f"{len(LINEAR[::every])} maps, {draws} random weights each: {count} failures\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
