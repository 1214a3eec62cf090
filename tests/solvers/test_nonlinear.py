"""Non-linear least squares: the gradient of the objective at what is returned, and every way to end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import adjointlab as al
from adjointlab.errors import SpaceMismatchError
from adjointlab.solvers import Info, Solution, gauss_newton, levenberg_marquardt
from adjointlab.solvers.objective import Inner, Iterate, Objective

D = torch.float64
EPS = torch.finfo(D).eps
TIMES = torch.arange(6, dtype=D)
START = torch.tensor([1.0, 1.0], dtype=D)
Solver = Callable[..., Solution]
both = pytest.mark.parametrize("solver", [gauss_newton, levenberg_marquardt])


def decay(p: Tensor) -> Tensor:
    return p[0] * torch.exp(-p[1] * TIMES)


def data(noise: float = 0.1) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return 2 * torch.exp(-0.5 * TIMES) + noise * torch.randn(6, dtype=D, generator=draw)


def rosenbrock(x: Tensor) -> Tensor:
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


@both
def test_data_without_noise_are_explained(solver: Solver) -> None:
    solution = solver(decay, data(0), START, tol=1e-12)
    assert solution.converged
    assert torch.dist(solution.x, torch.tensor([2.0, 0.5], dtype=D)) < 1e-9
    assert solution.residual_norms[-1] < 1e-9 * solution.residual_norms[0]
    assert len(solution.residual_norms) == solution.iterations + 1


@both
def test_a_curved_valley(solver: Solver) -> None:
    solution = solver(rosenbrock, torch.zeros(2, dtype=D), torch.tensor([-1.2, 1.0], dtype=D), tol=1e-10)
    assert solution.converged
    assert torch.dist(solution.x, torch.ones(2, dtype=D)) < 1e-6
    assert (solution.residual_norms.diff() <= 0).all()


@both
def test_the_gradient_of_the_whole_objective_vanishes(solver: Solver) -> None:
    y, w, b = data(), torch.arange(1.0, 7, dtype=D), torch.tensor([[1.0, 0.3]], dtype=D)
    L = al.linear_operator(lambda x: x[None] * 2, START)
    found = solver(decay, y, START, weight=w, damp=0.2, penalties=[(0.3, L, b), (0.1, L)], tol=1e-12)

    def objective(x: Tensor) -> Tensor:
        terms = (w * (decay(x) - y) ** 2).sum(), 0.04 * (x**2).sum(), 0.3 * ((L(x) - b) ** 2).sum()
        return (sum(terms) + 0.1 * (L(x) ** 2).sum()) / 2

    gradient = torch.func.grad(objective)
    assert found.converged
    assert gradient(found.x).norm() <= 1e-7 * gradient(START).norm()
    assert float(found.residual_norms[-1] ** 2 / 2) == pytest.approx(float(objective(found.x)), rel=16 * EPS)


SOLVED: dict[str, dict[str, Any]] = {
    "by the gram": {"normal": True},
    "without the gram": {"normal": False},
    "with M": {"precondition": lambda s: s / torch.tensor([4.0, 30.0], dtype=D)},
    "with M and the gram": {"normal": True, "precondition": lambda s: s / torch.tensor([4.0, 30.0], dtype=D)},
    "with M of each point": {"precondition": "auto"},
    "with M of each point and the gram": {"normal": True, "precondition": "auto"},
}


@both
@pytest.mark.parametrize("terms", [{}, {"weight": torch.arange(1.0, 7, dtype=D), "damp": 0.2}, {"penalties": True}])
@pytest.mark.parametrize("way", SOLVED)
def test_steps_may_be_solved_in_other_ways(solver: Solver, terms: dict[str, Any], way: str) -> None:
    L = al.linear_operator(lambda x: x[None] * 2, START)
    options = {"penalties": [(0.3, L, torch.tensor([[1.0, 0.3]], dtype=D))]} if "penalties" in terms else terms
    y, expected = data(), solver(decay, data(), START, tol=1e-10, **options)
    found = solver(decay, y, START, tol=1e-10, **options, **SOLVED[way])
    assert found.converged
    assert torch.dist(found.x, expected.x) <= 1e-7


def test_where_rounding_stops_the_gram_the_operator_goes_on() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 20, generator=draw, dtype=D))[0] for n in (40, 20))
    matrix, x = left @ torch.diag(torch.logspace(0, -3, 20, dtype=D)) @ right, torch.randn(20, generator=draw)
    J = al.jacobian(lambda z: matrix.float() @ z, torch.zeros(20))
    at = Iterate(Objective(matrix.float() @ x, None, ()), J, J.point)
    gaps = [torch.dist(at.step(1e-9, Inner(1000, normal)), x) / x.norm() for normal in (None, False, True)]
    assert gaps[0] <= 4 * gaps[1]
    assert gaps[2] > 100 * gaps[0]  # the gram alone


@both
@pytest.mark.parametrize("normal", [False, True])
def test_a_preconditioner_saves_steps_of_the_linear_solver(solver: Solver, normal: bool) -> None:
    units = torch.logspace(0, 4, 20, dtype=D)

    def f(x: Tensor) -> Tensor:
        return units * (x + 0.1 * x.sin())

    start, y = torch.zeros(20, dtype=D), f(torch.ones(20, dtype=D))
    options = {"tol": 1e-8, "inner": 2, "normal": normal, "maxiter": 30}
    assert solver(f, y, start, precondition="auto", **options).converged
    assert not solver(f, y, start, **options).converged


@both
@pytest.mark.parametrize("normal", [False, True])
@pytest.mark.parametrize(
    ("M", "reason"),
    [
        (lambda s: -s, "M is not positive definite"),
        (lambda s: torch.tensor([[1.0, 3.0], [0.0, 1.0]], dtype=D) @ s, "M is not self-adjoint"),
        (lambda s: torch.nan * s, "what the preconditioner M returned"),
    ],
)
def test_what_is_no_preconditioner_is_told(solver: Solver, M: Any, reason: str, normal: bool) -> None:
    found = solver(decay, data(), START, precondition=M, normal=normal)
    assert not found.converged
    assert reason in found.reason
    assert torch.equal(found.x, START)


@both
def test_phases_from_magnitudes_in_a_dictionary(solver: Solver) -> None:
    draw = torch.Generator().manual_seed(1)
    masks = torch.exp(2j * torch.pi * torch.rand(6, 8, 8, dtype=D, generator=draw))
    truth = torch.randn(8, 8, dtype=torch.complex128, generator=draw)

    def f(m: dict[str, Tensor]) -> Tensor:
        return torch.fft.fft2(masks * m["x"], norm="ortho").abs().square()

    y = f({"x": truth})
    start = {"x": truth + 0.1 * torch.randn(8, 8, dtype=torch.complex128, generator=draw)}
    solution = solver(f, y, start, tol=1e-10)
    assert solution.residual_norms[-1] <= 1e-6 * solution.residual_norms[0]
    phase = (solution.x["x"].conj() * truth).sum()
    assert torch.dist(solution.x["x"] * phase / phase.abs(), truth) < 1e-4 * truth.norm()


@both
def test_derivatives_of_the_minimum(solver: Solver) -> None:
    a, y, w = torch.tensor(1.1, dtype=D), data(), torch.arange(1.0, 7, dtype=D)
    number, damp, b = torch.tensor(0.1, dtype=D), torch.tensor(0.2, dtype=D), torch.tensor([1.0, 0.3], dtype=D)
    L = al.identity(al.Space.of(START))

    def minimum(*given: Tensor) -> Tensor:
        a, y, w, number, damp, b = given
        f = lambda x: a * decay(x)  # noqa: E731
        return solver(f, y, START, weight=w, damp=damp, penalties=[(number, L, b)], tol=1e-13).x

    inputs = [t.requires_grad_() for t in (a, y, w, number, damp, b)]
    assert torch.autograd.gradcheck(minimum, inputs)


def test_a_minimum_that_is_not_isolated_has_no_derivative() -> None:
    y = torch.ones(2, dtype=D, requires_grad=True)
    x = gauss_newton(lambda x: torch.stack([x.sum(), x.sum() ** 2]), y, START, tol=1e-12).x
    with pytest.warns(RuntimeWarning, match="not isolated"):
        x[0].backward()
    assert y.grad is not None
    assert y.grad.isnan().all()


@both
def test_a_jacobian_is_not_derived_again(solver: Solver) -> None:
    J = al.jacobian(decay, START)
    assert torch.equal(solver(J, data(), 2 * START).x, solver(decay, data(), 2 * START).x)


@both
def test_callbacks_see_each_step_and_stop(solver: Solver) -> None:
    seen: list[tuple[Tensor, Info]] = []
    solution = solver(decay, data(), START, callback=lambda x, info: seen.append((x, info)) or len(seen) == 2)
    assert solution.reason == "stopped by the callback"
    assert not solution.converged
    assert [info.iteration for _, info in seen] == [1, 2]
    assert torch.equal(seen[-1][0], solution.x)
    assert float(seen[-1][1].residual) == float(solution.residual_norms[-1])


class Turned(torch.autograd.Function):
    """A square whose backward has the wrong sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return -2 * ctx.saved_tensors[0] * v


@both
@pytest.mark.parametrize(
    ("f", "x0", "options", "reason"),
    [
        (Turned.apply, START, {}, "no step along the direction"),
        (decay, START, {"maxiter": 1}, "maxiter was reached"),
        (lambda x: torch.cat([x.sqrt(), x, x]), 0 * START + 1e-300, {"maxiter": 3}, ""),
        (lambda x: torch.cat([x.log(), x, x]), START, {}, ""),
    ],
)
def test_every_end_is_told(solver: Solver, f: Any, x0: Tensor, options: dict[str, Any], reason: str) -> None:
    solution = solver(f, -torch.ones_like(f(x0)), x0, **options)
    assert reason in solution.reason
    assert solution.x.isfinite().all()
    if reason:
        assert not solution.converged


@both
def test_data_that_are_not_finite(solver: Solver) -> None:
    solution = solver(decay, torch.full((6,), torch.nan, dtype=D), START)
    assert solution.reason.startswith("NaN or infinity")
    assert torch.equal(solution.x, START)


@both
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"y": torch.ones(3, dtype=D)}, SpaceMismatchError, "expected y"),
        ({"penalties": [(1.0, torch.eye(2))]}, SpaceMismatchError, "expected penalties"),
        ({"penalties": [(-1.0, al.identity(al.Space.of(START)))]}, ValueError, "λ"),
        ({"weight": -torch.ones(6, dtype=D)}, SpaceMismatchError, "weights of 0 or more"),
        ({"maxiter": -1}, ValueError, "maxiter"),
        ({"inner": 0}, ValueError, "inner to be an integer of 1 or more"),
        ({"precondition": 2.0}, SpaceMismatchError, "expected a preconditioner"),
        ({"precondition": al.identity((3,))}, SpaceMismatchError, "maps the domain of A"),
        ({"precondition": 2.0, "normal": True}, SpaceMismatchError, "expected a preconditioner"),
        ({"penalties": (0.25, al.identity(al.Space.of(START)))}, SpaceMismatchError, "put each into brackets"),
        ({"damp": torch.tensor([0.5, 0.5])}, ValueError, "damp to be one number"),
        ({"damp": torch.tensor(torch.nan)}, ValueError, "damp"),
        ({"tol": -1.0}, ValueError, "tol"),
        ({"damp": -1.0}, ValueError, "damp"),
    ],
)
def test_what_does_not_fit_is_refused(
    solver: Solver, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"y": data(), **options}
    with pytest.raises(error, match=message):
        solver(decay, x0=START, **given)


@pytest.mark.parametrize("tau", [1e-12, 1e8, 1e200])
def test_a_step_that_damping_keeps_short_is_no_convergence(tau: float) -> None:
    y = torch.tensor([4.0, 9.0], dtype=D)
    solution = levenberg_marquardt(lambda x: x**2, y, START, tau=tau, maxiter=500, tol=1e-10)
    assert not solution.converged or torch.dist(solution.x, y.sqrt()) < 1e-8


@both
def test_steps_end_where_rounding_does(solver: Solver) -> None:
    t = torch.linspace(0, 3, 20, dtype=D)
    f = lambda p: p[0] * torch.exp(-1.3 * p[1] * t) + p[2]  # noqa: E731
    solution = solver(f, f(torch.tensor([2.0, 0.7, 0.3], dtype=D)), torch.tensor([1.0, 1.0, 0.0], dtype=D), tol=0.0)
    assert solution.converged
    assert solution.iterations < 40
    assert (solution.residual_norms.diff() <= EPS).all()


@both
@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_units_do_not_matter(solver: Solver, unit: float) -> None:
    y = unit * torch.tensor([4.0, 9.0])
    solution = solver(lambda x: unit * x**2, y, torch.ones(2))
    assert solution.converged
    assert torch.dist(solution.x, torch.tensor([2.0, 3.0])) < 1e-3


@both
def test_a_callback_gets_a_copy(solver: Solver) -> None:
    solution = solver(decay, data(0), START, tol=1e-12, callback=lambda x, info: bool(x.zero_().any()))
    assert torch.dist(solution.x, torch.tensor([2.0, 0.5], dtype=D)) < 1e-9


def test_a_valley_of_minima_is_seen_from_near_it() -> None:
    y = torch.tensor([1.0, 2.0], dtype=D, requires_grad=True)
    x = gauss_newton(lambda x: torch.stack([x[0] * x[1], (x[0] * x[1]) ** 2]), y, torch.tensor([1.0, 2.0], dtype=D)).x
    with pytest.warns(RuntimeWarning, match="not isolated"):
        (found,) = torch.autograd.grad(x[0], y)
    assert found.isnan().all()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_cotangents_of_extreme_size(scale: float) -> None:
    y = torch.tensor([4.0, 9.0, 1.0], dtype=D, requires_grad=True)
    f = lambda x: torch.stack([x[0] ** 2, x[1] ** 2, x.sum()])  # noqa: E731
    x = gauss_newton(f, y, START, tol=1e-10).x
    (expected,) = torch.autograd.grad(x.sum(), y, retain_graph=True)
    (found,) = torch.autograd.grad(scale * x.sum(), y)
    assert torch.dist(found / scale, expected) <= 1e-9 * expected.norm()
