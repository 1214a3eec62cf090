"""FISTA, projected gradients and PDHG: rules of optimality at what is returned, and every way to end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.optimize import nnls
from solver_problems import Peak, of_matrix
from torch import Tensor

import adjointlab as al
from adjointlab.solvers import Info, Solution, fista, pdhg, projected_gradient
from adjointlab.solvers.arithmetic import Vectors
from adjointlab.solvers.fourier import multiplier

D = torch.float64
EPS = torch.finfo(D).eps

SOLVERS: dict[str, Callable[..., Solution]] = {
    "fista": fista,
    "projected_gradient": projected_gradient,
    "pdhg": lambda F, prox, **o: pdhg(F, al.identity(F.domain), prox, **o),
}
every_solver = pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)


def randn(*shape: int, dtype: torch.dtype = D, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def problem(m: int = 12, n: int = 8, dtype: torch.dtype = D) -> tuple[al.LeastSquares, Tensor, Tensor]:
    M, y = randn(m, n, dtype=dtype), randn(m, dtype=dtype, seed=1)
    return al.LeastSquares(of_matrix(M), y), M, y


@every_solver
@pytest.mark.parametrize("start", [None, 3.0])
def test_nonnegative_least_squares(solve: Callable[..., Solution], start: float | None) -> None:
    F, M, y = problem()
    x0 = None if start is None else torch.full((8,), start, dtype=D)
    solution = solve(F, al.prox.nonnegative(), x0=x0, tol=1e-11, maxiter=20_000)
    expected = torch.from_numpy(nnls(M.numpy(), y.numpy())[0])
    assert solution.converged, solution.reason
    assert 0 < int((expected == 0).sum()) < 8
    smallest = float(torch.linalg.eigvalsh(M.T @ M)[0])  # strong convexity turns a subgradient into a distance
    assert torch.dist(solution.x, expected) <= 10 * 1e-11 * (M.T @ y).norm() * float(torch.linalg.cond(M)) ** 2 / min(
        smallest, 1
    )
    assert len(solution.residual_norms) == solution.iterations + 1


@pytest.mark.parametrize("dtype", [D, torch.complex128], ids=str)
@pytest.mark.parametrize("options", [{}, {"step": 10.0}, {"restart": False}], ids=str)
def test_the_rule_of_the_lasso(dtype: torch.dtype, options: dict[str, Any]) -> None:
    F, M, y = problem(10, 16, dtype)
    weight, tol = 1.5, 1e-7
    solution = fista(F, al.prox.l1(weight), tol=tol, maxiter=5000, **options)
    assert solution.converged, solution.reason
    gradient, x = F.gradient(solution.x), solution.x
    on = x != 0
    apart = torch.where(on, gradient + weight * x / x.abs().where(on, 1), torch.zeros_like(gradient))
    apart = torch.where(on, apart, gradient * (1 - weight / gradient.abs()).clamp(min=0))
    assert 0 < int(on.sum()) < 16
    assert apart.norm() <= 1.01 * tol * (M.mH @ y).norm()
    assert float(solution.residual_norms[-1]) == pytest.approx(
        float(apart.norm()), rel=0.1, abs=64 * EPS * float(F(0 * x))
    )


def test_total_variation_of_a_signal_by_its_dual() -> None:
    y, weight = torch.cat([randn(10, seed=2), 3 + randn(10, seed=3)]), 1.0
    F, L = al.LeastSquares(al.identity(al.Space.of(y)), y), al.finite_differences(al.Space.of(y))
    solution = pdhg(F, L, al.prox.l1(weight), tol=1e-8, maxiter=50_000)
    assert solution.converged, solution.reason
    # x = y − Lᴴu with |u| ≤ weight, and u = weight · sign(Lx) where Lx ≠ 0.
    x = solution.x
    u = -(y - x).cumsum(0)[:-1]
    jumps = L(x)[0, :-1]
    assert abs(float((y - x).sum())) <= 1e-6 * float(y.norm())
    assert float(u.abs().max()) <= weight + 1e-6 * float(y.norm())
    assert abs(float((weight * jumps.abs() - u * jumps).sum())) <= 1e-6 * float(y.norm()) ** 2
    assert 0 < int((jumps.abs() > 1e-3).sum()) < 10


def test_total_variation_of_an_image_within_bounds() -> None:
    c = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False, dtype=D).requires_grad_(False)
    c.weight.fill_(1 / 9)
    truth = torch.zeros(1, 1, 12, 12, dtype=D)
    truth[..., 4:8, 3:9] = 1
    A = al.linear_operator(c, truth)
    F, L = al.LeastSquares(A, A(truth) + 0.05 * randn(1, 1, 12, 12)), al.finite_differences(truth)
    prox, tol = al.prox.l1(0.02, dim=0), 1e-6
    solution = pdhg(F, L, prox, bounds=(0, 1), tol=tol, maxiter=20_000)

    def objective(x: Tensor) -> float:
        return float(F(x) + 0.02 * torch.linalg.vector_norm(L(x), dim=0).sum())

    assert solution.converged, solution.reason
    assert solution.x.min() >= 0
    assert solution.x.max() <= 1
    generator = torch.Generator().manual_seed(0)
    least = objective(solution.x)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            other = (solution.x + size * torch.randn(truth.shape, dtype=D, generator=generator)).clamp(0, 1)
            other = other + torch.rand((), dtype=D, generator=generator) * (truth - other)
            assert objective(other) >= least - 10 * tol * (float(F(0 * truth)) + least)


def test_projected_gradients_stay_in_the_set() -> None:
    F, _, _ = problem(20, 12)
    seen: list[Tensor] = []
    projected_gradient(F, (-0.05, 0.1), tol=1e-10, callback=lambda x, info: seen.append(x))
    assert all(bool((x >= -0.05).all()) and bool((x <= 0.1).all()) for x in seen)


@every_solver
def test_each_problem_of_a_batch_by_itself(solve: Callable[..., Solution]) -> None:
    M = randn(6, 4)
    space = al.Space.of((3, 4), dtype=D, batch_dims=1)
    A = al.linear_operator(lambda x: x @ M.T, space)
    y = randn(3, 6, seed=4) * torch.tensor([[1.0], [0.0], [1e3]], dtype=D)
    y[2, 0] = torch.nan
    solution = solve(al.LeastSquares(A, y), al.prox.nonnegative(), tol=1e-10, maxiter=20_000)
    assert solution.converged.tolist() == [True, True, False]
    assert "1 of 3 problems: NaN" in solution.reason
    single = solve(al.LeastSquares(of_matrix(M), y[0]), al.prox.nonnegative(), tol=1e-10, maxiter=20_000)
    assert torch.dist(solution.x[0], single.x) <= 1e-7 * single.x.norm()
    assert not solution.x[1:].any()
    assert solution.x.isfinite().all()
    assert solution.iterations[1] <= 1


def test_pytrees_penalties_weights_and_single_precision() -> None:
    A = al.linear_operator(lambda x: (x["a"] + x["b"][0], x["a"] - 2 * x["b"][0]), {"a": (5,), "b": ((5,),)})
    y = (randn(5).float(), randn(5, seed=1).float())
    F = al.LeastSquares(A, y, weight=(torch.ones(5), torch.full((5,), 2.0)), penalties=[(0.1, al.identity(A.domain))])
    expected = F.solve(tol=1e-7).x
    for solve in (fista, projected_gradient):
        found = solve(F, lambda x, step: x).x
        assert torch.dist(found["a"], expected["a"]) <= 1e-4
        assert torch.dist(found["b"][0], expected["b"][0]) <= 1e-4


@every_solver
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_do_not_matter(solve: Callable[..., Solution], scale: float) -> None:
    M, y = randn(12, 8).float(), randn(12, seed=1).float()
    plain = solve(al.LeastSquares(of_matrix(M), y), al.prox.nonnegative(), tol=1e-5, maxiter=20_000)
    scaled = solve(al.LeastSquares(of_matrix(M), scale * y), al.prox.nonnegative(), tol=1e-5, maxiter=20_000)
    assert plain.converged
    assert scaled.converged
    assert torch.dist(scaled.x / scale, plain.x) <= 1e-2 * plain.x.norm()


@every_solver
def test_callbacks_see_each_step_and_stop(solve: Callable[..., Solution]) -> None:
    F, _, _ = problem()
    seen: list[tuple[Tensor, Info]] = []
    solution = solve(F, al.prox.nonnegative(), callback=lambda x, info: seen.append((x, info)) or len(seen) == 2)
    assert solution.reason == "stopped by the callback"
    assert [info.iteration for _, info in seen] == [1, 2]
    assert [info.residual for _, info in seen] == solution.residual_norms[1:].tolist()
    assert torch.equal(seen[-1][0], solution.x)


def broken(x: Tensor, step: float) -> Tensor:
    raise KeyError("of the user")


@every_solver
@pytest.mark.parametrize(
    ("prox", "options", "reason"),
    [
        (al.prox.nonnegative(), {"maxiter": 1}, "maxiter was reached"),
        (al.prox.nonnegative(), {"maxiter": 0}, "maxiter was reached"),
        (lambda x, step: x * torch.nan, {}, "NaN or infinity"),
        (al.prox.nonnegative(), {"y": torch.full((12,), torch.nan, dtype=D)}, "NaN or infinity"),
        (al.prox.nonnegative(), {"y": torch.zeros(12, dtype=D)}, "converged"),
        (al.prox.nonnegative(), {"tol": 0.0, "maxiter": 50_000}, "converged: as far as the precision"),
    ],
)
def test_every_end_is_told(solve: Callable[..., Solution], prox: Any, options: dict[str, Any], reason: str) -> None:
    _, M, y = problem()
    options = {"y": y, **options}
    solution = solve(al.LeastSquares(of_matrix(M), options.pop("y")), prox, **options)
    assert reason in solution.reason
    assert solution.converged == solution.reason.startswith("converged")
    assert solution.x.isfinite().all()


class Upside:
    """A concave objective, which calls itself least squares."""

    batch_shape = ()

    def __init__(self) -> None:
        self.inner, _, _ = problem()
        self.domain, self.frozen, self.hessian = self.inner.domain, self.inner.frozen, self.inner.hessian

    def gradient(self, x: Tensor) -> Tensor:
        return -self.inner.gradient(x)


def test_what_is_not_convex_is_told() -> None:
    assert "not positive definite" in fista(Upside(), al.prox.nonnegative()).reason
    F, _, _ = problem()
    found = projected_gradient(F, lambda x, step: -x, x0=torch.ones(8, dtype=D))
    assert not found.converged
    assert "uphill" in found.reason


@pytest.mark.parametrize("least", [0.3, 3.3, 33.3, 100.1])
def test_equal_entries_that_the_map_ignores_are_no_negative_curvature(least: float) -> None:
    # The step is to a constant, of which F sees nothing: its curvature is the difference of two sums of equal numbers.
    differences = al.linear_operator(lambda x: x.roll(1, -1) - x, (256, 256))
    y = 1e-3 * randn(256, 256, dtype=torch.float32)
    found = fista(al.LeastSquares(differences, y), lambda x, step: x.clamp(min=least), maxiter=100)
    assert "breakdown" not in found.reason


@pytest.mark.parametrize("value", [0.1, 0.3, 3.3, 33.3])
def test_products_of_equal_entries_are_as_exact_as_said(value: float) -> None:
    a = torch.full((1 << 18,), value)
    vectors = Vectors(al.Space.of((1 << 18,)), ())
    vectors.wide = False
    for b in (a, a * 1.1):
        exact = a.double() @ b.double()
        assert abs(vectors.dot([a], [b]) - exact) < 6e-7 * exact


@every_solver
def test_exceptions_of_the_user_are_not_caught(solve: Callable[..., Solution]) -> None:
    F, _, _ = problem()
    with pytest.raises(KeyError, match="of the user"):
        solve(F, broken)


@every_solver
@pytest.mark.parametrize(
    ("prox", "options", "error", "message"),
    [
        (lambda x, step: x[:3], {}, al.SpaceMismatchError, r"prox\(., step\) to be an element"),
        (lambda x, step: x.float(), {}, al.SpaceMismatchError, r"prox\(., step\) to be an element"),
        (al.prox.nonnegative(), {"tol": -1.0}, ValueError, "tol"),
        (al.prox.nonnegative(), {"maxiter": -1}, ValueError, "maxiter"),
        (al.prox.nonnegative(), {"x0": torch.ones(3, dtype=D)}, al.SpaceMismatchError, "x0"),
        (al.prox.nonnegative(), {"F": torch.ones(3)}, al.SpaceMismatchError, "F to be a least-squares objective"),
    ],
)
def test_refusals(
    solve: Callable[..., Solution], prox: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"F": problem()[0], **options}
    if isinstance(given["F"], Tensor) and solve is SOLVERS["pdhg"]:
        solve = lambda F, prox, **o: pdhg(F, al.identity((3,)), prox, **o)  # noqa: E731
    with pytest.raises(error, match=message):
        solve(given.pop("F"), prox, **given)


def test_more_refusals() -> None:
    F, _, _ = problem()
    with pytest.raises(ValueError, match="step to be a positive number"):
        fista(F, al.prox.nonnegative(), step=0.0)
    with pytest.raises(al.SpaceMismatchError, match="operator L on the domain of F"):
        pdhg(F, al.identity((3,)), al.prox.l1())
    with pytest.raises(al.SpaceMismatchError, match="operator L on the domain of F, got Tensor"):
        pdhg(F, torch.ones(3), al.prox.l1())


@every_solver
def test_nothing_is_changed(solve: Callable[..., Solution]) -> None:
    F, _, y = problem()
    x0, before = torch.ones(8, dtype=D), y.clone()
    found = solve(F, lambda x, step: x, x0=x0)  # which returns what it is given
    assert torch.dist(found.x, F.solve(tol=1e-12).x) <= 1e-3 * found.x.norm()
    assert torch.equal(x0, torch.ones(8, dtype=D))
    assert torch.equal(F.y, before)
    with pytest.raises(ValueError, match="write to a copy"):
        solve(F, lambda x, step: x.clamp_(min=0), x0=x0)
    assert torch.equal(x0, torch.ones(8, dtype=D))
    own = torch.full((8,), 0.5, dtype=D)
    solve(F, lambda x, step: own, maxiter=5)
    assert torch.equal(own, torch.full((8,), 0.5, dtype=D))
    with torch.inference_mode():
        solve(F, al.prox.nonnegative(), maxiter=5)


def test_a_longer_problem_restarts_its_momentum() -> None:
    c = torch.nn.Conv1d(1, 1, 5, padding=2, bias=False, dtype=D).requires_grad_(False)
    c.weight.copy_(torch.tensor([[[1.0, 4, 6, 4, 1]]]) / 16)
    A = al.linear_operator(c, torch.zeros(1, 1, 64, dtype=D))
    F = al.LeastSquares(A, A(randn(1, 1, 64).abs()), penalties=[(1e-3, al.identity(A.domain))])
    with_, without = (fista(F, al.prox.nonnegative(), restart=r, tol=1e-6, maxiter=1000) for r in (True, False))
    assert with_.converged
    assert with_.iterations < without.iterations


@pytest.mark.cpu
@pytest.mark.parametrize("solve", [fista, projected_gradient])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_the_hessian_of_a_cyclic_convolution_is_a_product_of_transforms(
    solve: Callable[..., Solution], batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    c = torch.nn.Conv2d(1, 1, 5, padding=2, padding_mode="circular", bias=False, dtype=D).requires_grad_(False)
    c.weight.copy_(randn(1, 1, 5, 5, seed=4))
    shape = (*(batch or (1,)), 1, 12, 10)
    A, plain = (al.linear_operator(c, shape, batch_dims=len(batch), lowering=on) for on in (True, False))
    assert A.multiplier is not None
    assert plain.multiplier is None
    y, x0, bounds = randn(*shape, seed=5), randn(*shape, seed=6), al.prox.nonnegative()
    F, other = al.LeastSquares(A, y), al.LeastSquares(plain, y)
    gradient, calls = al.LeastSquares.gradient, []
    monkeypatch.setattr(al.LeastSquares, "gradient", lambda self, x: (calls.append(self), gradient(self, x))[1])
    for start in (None, x0):
        found, expected = (solve(f, bounds, x0=start, tol=1e-10, maxiter=20_000) for f in (F, other))
        assert bool(torch.as_tensor(found.converged & expected.converged).all())
        assert torch.dist(found.x, expected.x) <= 1e-6 * expected.x.norm()
    assert calls.count(F) <= 4  # at the first iterates and at zero
    assert calls.count(other) > 20


def test_multipliers_of_products() -> None:
    c = torch.nn.Conv2d(1, 1, 5, padding=2, padding_mode="circular", bias=False, dtype=D).requires_grad_(False)
    A = al.linear_operator(c, (1, 1, 12, 10))
    assert_multiplier(A.gram, A.multiplier.abs().square())
    assert_multiplier(A @ A, A.multiplier.square())
    assert multiplier(al.identity(A.domain) @ A) is None
    assert multiplier(A + A) is None


def assert_multiplier(A: al.LinearOperator, expected: Tensor) -> None:
    K = multiplier(A)
    assert K is not None
    assert torch.dist(K, expected) <= 4 * EPS * expected.norm()


@pytest.mark.parametrize(
    ("name", "measure"),
    [
        ("fista", "norm of a subgradient"),
        ("projected_gradient", "norm of a subgradient"),
        ("pdhg", "relative residual"),
    ],
)
def test_the_account_names_its_norms(name: str, measure: str) -> None:
    F, _, _ = problem()
    solution = SOLVERS[name](F, al.prox.nonnegative(), maxiter=2)
    assert solution.measure == measure
    assert f"{measure} " in str(solution)
    assert "residual norm " in str(al.solvers.cgls(F.A, F.y, maxiter=2))


def test_memory_is_what_the_docstrings_say() -> None:
    c = torch.nn.Conv1d(1, 1, 3, padding=1, bias=False, dtype=D).requires_grad_(False)
    A = al.linear_operator(c, torch.zeros(1, 1, 5000, dtype=D))
    F, L = al.LeastSquares(A, randn(1, 1, 5000)), al.finite_differences(A.domain)
    size = 5000 * 8
    F.gradient(F.y), F.hessian(F.y), L.H(L(F.y))
    for solve, most in ((fista, 8), (projected_gradient, 8)):
        with Peak(size, given=[F.y]) as peak:
            solve(F, al.prox.nonnegative(), maxiter=5)
        assert peak.most[size] <= most + 3, solve  # and a gradient and the projection
    with Peak(size, given=[F.y]) as peak:
        pdhg(F, L, al.prox.l1(0.1), maxiter=5)
    assert peak.most[size] <= 11 + 8 + 5
