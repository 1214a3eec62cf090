"""Problems with known solutions, for the tests of the solvers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from laws import norm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import adjointlab as al

DTYPES = [torch.float64, torch.complex128, torch.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
LEAST_SQUARES: dict[str, Callable[..., al.solvers.Solution]] = {
    "cgls": lambda A, y, tol=1e-12, **o: al.solvers.cgls(A, y, tol=tol, **o),
    "lsmr": lambda A, y, tol=1e-12, **o: al.solvers.lsmr(A, y, atol=tol, btol=tol, **o),
}
every_solver = pytest.mark.parametrize("solve", LEAST_SQUARES.values(), ids=LEAST_SQUARES)


def dense(m: int, n: int, dtype: torch.dtype = torch.float64) -> tuple[al.LinearOperator, Tensor]:
    matrix = torch.randn(m, n, dtype=dtype)
    return of_matrix(matrix), matrix


def of_matrix(matrix: Tensor) -> al.LinearOperator:
    """Return the operator of a matrix; eager, since solvers only call it."""
    return al.linear_operator(lambda x: matrix @ x, matrix.new_zeros(matrix.shape[1]), engine="eager")


def positive(n: int, dtype: torch.dtype = torch.float64) -> tuple[al.LinearOperator, Tensor]:
    root = torch.randn(n, n, dtype=dtype)
    matrix = root @ root.mH / n + torch.eye(n)
    return of_matrix(matrix), matrix


def close(found: Tensor, expected: Tensor, matrix: Tensor, tol: float = 1e-12, power: int = 2) -> bool:
    """Return whether an error is what a tolerance and rounding explain: `κ^power (tol + 16 eps)` of the norm."""
    expected = expected.to(found.dtype)
    condition = float(torch.linalg.cond(matrix))
    bound = condition**power * (tol + 16 * torch.finfo(found.dtype).eps) * norm(expected)
    return norm(found - expected) <= bound


def minimiser(matrix: Tensor, y: Tensor, damp: float = 0.0, weight: Tensor | None = None) -> Tensor:
    matrix, y = (
        matrix.to(torch.promote_types(matrix.dtype, torch.float64)),
        y.to(torch.promote_types(y.dtype, torch.float64)),
    )
    w = torch.ones(len(y), dtype=torch.float64) if weight is None else weight
    normal = matrix.mH @ (w[:, None] * matrix) + damp**2 * torch.eye(matrix.shape[1], dtype=torch.float64)
    return torch.linalg.solve(normal, matrix.mH @ (w * y))


class Peak(TorchDispatchMode):
    """The most vectors of each size, and the most bytes, that were alive at once, counted by their storages."""

    def __init__(self, *sizes: int, given: Sequence[Any] = ()) -> None:
        super().__init__()
        self.now, self.most = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)
        self.bytes_now = self.bytes = 0
        # What the caller holds, views of it included, is not the solver's.
        self.seen: dict[int, Any] = {t.untyped_storage()._cdata: None for t in given if isinstance(t, Tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.bytes_now += size
            self.bytes = max(self.bytes, self.bytes_now)
            if size in self.now:
                self.now[size] += 1
                self.most[size] = max(self.most[size], self.now[size])
            self.seen[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        del self.seen[key]
        self.bytes_now -= size
        if size in self.now:
            self.now[size] -= 1
