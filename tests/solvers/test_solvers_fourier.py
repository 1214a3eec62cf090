"""Cyclic convolutions are solved in the basis that makes them diagonal: the same steps, without a transform in them."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from laws import assert_close, draw, norm, seeded
from solver_problems import Peak, every_solver
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import adjointlab as al

pytestmark = pytest.mark.slow


def convolution(
    shape: tuple[int, ...] = (12, 10), width: int = 5, channels: int = 1, dtype: torch.dtype = torch.float64, **o: Any
) -> nn.Module:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 1]
    options = {"padding": width // 2, "padding_mode": "circular", "bias": False, "groups": channels} | o
    layer = kind(channels, options.pop("out", channels), width, **options).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=seeded(3)))
    return layer


@functools.cache
def large() -> al.LinearOperator:
    return make((512, 512), dtype=torch.float32)


@functools.cache
def made(shape: tuple[int, ...], channels: int, width: int) -> al.LinearOperator:
    """Return an operator on a batch of two, made once: for tests that leave it as it is."""
    return make(shape, 2, channels, width=width)


def make(shape: tuple[int, ...] = (12, 10), batch: int = 1, channels: int = 1, **o: Any) -> al.LinearOperator:
    free = o.pop("batch_dims", 0)
    layer = convolution(shape, channels=channels, **o)
    return al.linear_operator(layer, (batch, channels, *shape), batch_dims=free)


# -------------------------------------------------------------------------------------------------------- multiplier


@pytest.mark.parametrize(("channels", "dtype"), [(1, torch.float64), (3, torch.float32)])
@pytest.mark.parametrize(
    ("shape", "width"),
    [
        ((16,), 15),
        ((15,), 15),
        ((12, 10), 5),
        ((10, 15), 5),
        ((9, 7), 7),
        ((12, 10), 6),
        ((6, 5, 8), 3),
        ((4, 6, 9), 3),
    ],
)
def test_multiplier_is_the_operator_in_fourier_space(
    shape: tuple[int, ...], width: int, channels: int, dtype: torch.dtype
) -> None:
    padding = "same" if width % 2 == 0 else width // 2
    A = make(shape, 2, channels, width=width, dtype=dtype, padding=padding)
    K = A.multiplier
    dims = tuple(range(2, 2 + len(shape)))

    def product(x: Tensor, factor: Tensor) -> Tensor:
        return torch.fft.irfftn(factor * torch.fft.rfftn(x, dim=dims), s=shape, dim=dims)

    x, y = draw(A.domain, 1), draw(A.codomain, 2)
    assert_close(product(x, K), A(x), A.domain.eps)
    assert_close(product(y, K.conj()), A.H(y), A.domain.eps)
    assert torch.equal(A.H.multiplier, K.conj())
    assert not A.H.multiplier.is_conj()


def test_multiplier_is_that_of_the_present_kernel() -> None:
    layer = convolution()
    A = al.linear_operator(layer, (1, 1, 12, 10))
    before = A.multiplier
    with torch.no_grad():
        layer.weight.mul_(2)
    assert_close(A.multiplier, 2 * before, A.domain.eps)
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    assert not A.multiplier.any()
    assert not A.multiplier.requires_grad


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (convolution(padding_mode="zeros"), (1, 1, 12, 10)),
        (convolution(padding_mode="reflect"), (1, 1, 12, 10)),
        (convolution(stride=2), (1, 1, 12, 10)),
        (convolution(channels=2, groups=1), (1, 2, 12, 10)),
        (convolution(out=2), (1, 1, 12, 10)),
        (convolution(), (1, 1, 13, 10)),
        (convolution(dtype=torch.complex128), (1, 1, 12, 10)),
        (nn.Sequential(convolution(), convolution()), (1, 1, 12, 10)),
        (nn.Sequential(convolution(), nn.AvgPool2d(1)), (1, 1, 12, 10)),
        (nn.Flatten(), (1, 1, 12, 10)),
    ],
    ids=["zeros", "reflect", "stride", "mixed", "out", "prime", "complex", "two", "pool", "none"],
)
def test_other_maps_have_none(module: nn.Module, shape: tuple[int, ...]) -> None:
    dtype = next((p.dtype for p in module.parameters()), torch.float64)
    A = al.linear_operator(module, torch.zeros(shape, dtype=dtype))
    assert A.multiplier is None
    assert A.H.multiplier is None


def test_what_is_only_claimed_to_be_linear_has_none() -> None:
    A = al.linear_operator(convolution(bias=True), (1, 1, 12, 10), check=False)
    assert A.multiplier is None


def test_compiled_operators_have_the_same() -> None:
    layer = convolution()
    A, B = (al.linear_operator(layer, (1, 1, 12, 10), engine="traced") for _ in range(2))
    A.compile(backend="aot_eager")
    assert A.engine == "compiled"
    assert torch.equal(A.multiplier, B.multiplier)


def test_other_engines_and_compositions_have_none() -> None:
    layer = convolution()
    dynamic = al.linear_operator(layer, (1, 1, 12, 10), batch_dims=1).compile(backend="aot_eager")
    assert dynamic.engine == "compiled", dynamic.explain()
    assert dynamic.multiplier is None
    for options in ({"lowering": False}, {"engine": "eager"}):
        assert al.linear_operator(layer, (1, 1, 12, 10), **options).multiplier is None
    A = make()
    assert (A.gram.multiplier, (2 * A).multiplier, al.identity((3,)).multiplier) == (None, None, None)
    pair = al.linear_operator(lambda x: {"y": layer(x["x"])}, {"x": (1, 1, 12, 10)})
    assert pair.multiplier is None


# ----------------------------------------------------------------------------------------------------------- solvers


def both_ways(solve: Any, A: Any, y: Any, **options: Any) -> tuple[Any, Any]:
    """Return the solutions in Fourier space and out of it: of a multiple of A nobody knows that it is a convolution."""
    affine = isinstance(A, al.AffineOperator)
    plain, data = (1 * A.linear, y - A.offset) if affine else (1 * A, y)
    assert plain.multiplier is None
    return solve(A, y, **options), solve(plain, data, **options)


def alike(found: Any, expected: Any) -> None:
    """Assert that two solutions took the same steps; rounding grows with each."""
    assert found.x.is_contiguous()
    assert (found.converged, found.iterations, found.reason) == (
        expected.converged, expected.iterations, expected.reason,
    )  # fmt: skip
    assert norm(found.x - expected.x) <= 1e-9 * norm(expected.x)
    assert torch.allclose(found.residual_norms, expected.residual_norms, rtol=1e-9)


@every_solver
@pytest.mark.parametrize("damp", [0.0, 0.3])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(("shape", "channels"), [((15,), 1), ((12, 10), 1), ((9, 7), 3), ((4, 6, 9), 2)])
def test_same_steps(solve, damp: float, started: bool, shape: Any, channels: int) -> None:
    A = made(shape, channels, 3 if len(shape) == 3 else 5)
    assert A.multiplier is not None
    x0 = draw(A.domain, 5) if started else None
    alike(*both_ways(solve, A, draw(A.codomain, 4), damp=damp, x0=x0, maxiter=6))


@every_solver
def test_minimiser(solve) -> None:
    A = make(batch=2, channels=2)
    y = draw(A.codomain, 4)
    found = solve(A, y, damp=0.5, tol=1e-13)
    assert found.converged
    assert norm(A.H(A(found.x) - y) + 0.25 * found.x) <= 1e-11 * norm(A.H(y))


def test_conjugate_gradients() -> None:
    layer = convolution()
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0, 2, 1:4] = torch.tensor([0.3, 1.0, 0.3])  # of a positive spectrum
    A = al.linear_operator(layer, (1, 1, 12, 10))
    b = draw(A.domain, 4)
    alike(*both_ways(al.solvers.cg, A, b, maxiter=5))
    found = al.solvers.cg(A, b, tol=1e-13)
    assert found.converged
    assert norm(A(found.x) - b) <= 1e-12 * norm(b)


def test_the_adjoint_is_solved_likewise() -> None:
    A = make().H
    alike(*both_ways(al.solvers.cgls, A, draw(A.codomain, 4), maxiter=6))


def test_offset_of_an_affine_operator() -> None:
    A = al.affine_operator(convolution(bias=True), (1, 1, 12, 10))
    assert A.linear.multiplier is not None
    alike(*both_ways(al.solvers.cgls, A, draw(A.codomain, 4), maxiter=6))


def test_every_problem_of_a_batch_by_itself() -> None:
    A = make(batch_dims=1)
    y = torch.randn(4, 1, 12, 10, dtype=torch.float64, generator=seeded(1))
    y[1] = 0
    y[2, 0, 3, 3] = torch.nan
    found, expected = both_ways(al.solvers.cgls, A, y, maxiter=7, tol=1e-9)
    assert found.iterations.tolist() == expected.iterations.tolist() == [7, 0, 0, 7]
    assert found.reason == expected.reason
    assert found.x.isfinite().all()
    assert norm(found.x - expected.x) <= 1e-9 * norm(expected.x)
    with pytest.raises(al.SpaceMismatchError, match="batch sizes of the data"):
        al.solvers.cgls(A, y, x0=torch.zeros(2, 1, 12, 10, dtype=torch.float64))


def test_weights_stay_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    A = make()
    w = draw(A.codomain, 6).abs()
    monkeypatch.setattr(type(A), "multiplier", property(lambda self: pytest.fail("was asked for")))
    assert al.solvers.cgls(A, draw(A.codomain, 4), weight=w, maxiter=3).iterations == 3


@every_solver
def test_callback_sees_elements_of_the_domain(solve) -> None:
    A = make()
    seen: list[Tensor] = []

    def callback(x: Tensor, _info: al.solvers.Info) -> bool:
        A.domain.check(x)
        seen.append(x)
        return len(seen) == 3

    found = solve(A, draw(A.codomain, 4), maxiter=9, callback=callback)
    assert found.iterations == 3
    assert_close(seen[-1], found.x, A.domain.eps)
    seen[-1].zero_()  # a copy
    assert found.x.any()


@every_solver
def test_derivatives(solve) -> None:
    layer = convolution()
    A = al.linear_operator(layer, (1, 1, 12, 10))
    y, v = draw(A.codomain, 4).requires_grad_(), draw(A.domain, 5)

    def gradients(A: al.LinearOperator, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(solve(A, y, damp=0.5).x, (y, layer.weight), v)

    for a, b in zip(*both_ways(gradients, A, y), strict=True):
        assert norm(a - b) <= 1e-8 * norm(b)


class Transforms(TorchDispatchMode):
    """Counts Fourier transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count["fft" in str(func)] += 1
        return func(*args, **(kwargs or {}))


@every_solver
def test_no_step_transforms(solve) -> None:
    A = make((64, 64))
    y = draw(A.codomain, 4)
    A.multiplier  # noqa: B018  # the first time, it is measured
    counts = []
    for steps in (2, 12):
        with Transforms() as transforms:
            solve(A, y, maxiter=steps)
        counts.append(transforms.count[True])
    assert counts[0] == counts[1] > 0


def test_extreme_sizes() -> None:
    A = make((64, 64), dtype=torch.float32)
    y = draw(A.codomain, 4) + 1
    expected = al.solvers.cgls(A, y, maxiter=8, tol=0)
    for scale in (2.0**-83, 2.0**83):  # rounds nothing by itself, but has sums made in double
        found = al.solvers.cgls(A, scale * y, maxiter=8, tol=0)
        each = 8 * torch.finfo(torch.float32).eps  # of each of the eight steps
        assert norm(found.x / scale - expected.x) <= 8 * each * norm(expected.x)


@pytest.mark.parametrize("damp", [0.0, 0.5])
@pytest.mark.parametrize("given", [(), ("x0",), ("callback",), ("x0", "callback")], ids="+".join)
@every_solver
def test_memory(solve, given: tuple[str, ...], damp: float) -> None:
    A = large()
    y, x0 = A.codomain.randn(), A.domain.randn()
    options: dict[str, Any] = {"x0": x0, "callback": lambda x, info: None}
    with torch.no_grad(), Peak(given=(y, x0)) as peak:
        solve(A, y, damp=damp, maxiter=4, tol=1e-6, **{key: options[key] for key in given})
    assert peak.bytes <= 9.1 * y.nbytes  # a spectrum has two columns more
