"""`½‖Ax − y‖²_W + ½ Σ λ ‖Lx − b‖²`: its value and derivatives, and its minimiser by solvers and in closed form."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from laws import assert_close, draw, matrix
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import adjointlab as al

D = torch.float64
EPS = torch.finfo(D).eps


def of(M: Tensor) -> al.LinearOperator:
    return al.linear_operator(lambda x: M @ x, M.new_zeros(M.shape[1]), engine="eager")


def parts(dtype: torch.dtype = D, rows: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, 5), (4, 5), (6, 5), (rows,), (6,)
    (*found,) = (torch.randn(s, dtype=dtype, generator=generator) for s in shapes)
    return *found, torch.rand(rows, dtype=D, generator=generator) + 0.5


def minimiser(A: Tensor, y: Tensor, w: Tensor, terms: list[tuple[Any, Tensor, Tensor]]) -> Tensor:
    normal = A.mH @ (w[:, None] * A) + sum(s * L.mH @ L for s, L, _ in terms)
    return torch.linalg.pinv(normal, hermitian=True) @ (A.mH @ (w * y) + sum(s * L.mH @ b for s, L, b in terms))


@pytest.mark.parametrize("dtype", [D, torch.complex128], ids=str)
def test_value_gradient_and_hessian_have_all_terms(dtype: torch.dtype) -> None:
    A, L, M, y, b, w = parts(dtype)
    F = al.LeastSquares(of(A), y, weight=w, penalties=[(0.3, of(L)), (torch.tensor(0.2, dtype=D), of(M), b)])
    x = draw(F.domain, 3).requires_grad_()

    def size(r: Tensor) -> Tensor:
        return r.abs().square()

    value = ((w * size(A @ x - y)).sum() + 0.3 * size(L @ x).sum() + 0.2 * size(M @ x - b).sum()) / 2
    (gradient,) = torch.autograd.grad(value, x)
    assert_close(F(x).detach(), value.detach(), EPS)
    assert_close(torch.autograd.grad(F(x), x)[0], gradient, EPS)
    assert_close(F.gradient(x).detach(), gradient, EPS)
    assert_close(F.value_and_gradient(x.detach()), (value.detach(), gradient), EPS)
    hessian = F.hessian
    assert_close(hessian(x.detach()), A.mH @ (w * (A @ x.detach())) + 0.3 * L.mH @ (L @ x.detach())
                 + 0.2 * M.mH @ (M @ x.detach()), EPS)  # fmt: skip
    assert al.check_adjoint(hessian).passed


@pytest.mark.parametrize("solver", [None, al.solvers.lsmr], ids=["default", "lsmr"])
@pytest.mark.parametrize("rows", [7, 2], ids=["tall", "wide"])
def test_two_penalties_are_stacked_rows(solver: Any, rows: int) -> None:
    A, L, M, y, b, w = parts(rows=rows)
    options = {} if solver is None else {"solver": solver, "atol": 1e-14, "btol": 1e-14}
    F = al.LeastSquares(of(A), y, weight=w, penalties=[(0.3, of(L)), (0.2, of(M), b)])
    found = F.solve(**options) if options else F.solve(tol=1e-14)
    stack = al.vstack([of(w.sqrt()[:, None] * A), 0.3**0.5 * of(L), 0.2**0.5 * of(M)])
    expected = al.solvers.lsmr(stack, (w.sqrt() * y, torch.zeros(4, dtype=D), 0.2**0.5 * b), atol=1e-14, btol=1e-14)
    exact = minimiser(A, y, w, [(0.3, L, torch.zeros(4, dtype=D)), (0.2, M, b)])
    condition = float(torch.linalg.cond(torch.cat([w.sqrt()[:, None] * A, 0.3**0.5 * L, 0.2**0.5 * M])))
    assert found.converged
    for other in (expected.x, exact):
        assert torch.dist(found.x, other) <= condition**2 * 64 * EPS * exact.norm()
    assert float(found.residual_norms[-1] ** 2 / 2) == pytest.approx(float(F(found.x)), rel=64 * EPS)


def test_of_many_minimisers_the_smallest() -> None:
    A, y = torch.ones(1, 3, dtype=D), torch.ones(1, dtype=D)
    L = torch.tensor([[1.0, -1.0, 0.0]], dtype=D)
    assert_close(al.LeastSquares(of(A), y, penalties=[(2.0, of(L))]).solve(tol=1e-14).x, A[0] / 3, EPS)


def test_an_affine_model_and_no_penalty() -> None:
    layer = nn.Linear(3, 5, dtype=D).requires_grad_(False)
    f, y = al.affine_operator(layer, (3,)), draw(al.Space.of((5,), dtype=D), 1)
    I = al.identity(f.domain)  # noqa: E741
    for number in (0.0, 0.5):
        F = al.LeastSquares(f, y, penalties=[(number, I)] if number else ())
        normal = layer.weight.T @ layer.weight + number * torch.eye(3, dtype=D)
        expected = torch.linalg.solve(normal, layer.weight.T @ (y - layer.bias))
        condition = float(torch.linalg.cond(normal))
        assert torch.dist(F.solve(tol=1e-14).x, expected) <= condition * 64 * EPS * expected.norm()


def test_derivatives_in_everything() -> None:
    *given, w = parts()
    given, w = [*(t[:3, :2] for t in given[:3]), *(t[:3] for t in given[3:])], w[:3]
    strengths = torch.tensor([0.3, 0.2], dtype=D)

    def solve(*given: Tensor) -> Tensor:
        A, L, M, y, b, w, strengths = given
        penalties = [(strengths[0], of(L)), (strengths[1], of(M), b)]
        return al.LeastSquares(of(A), y, weight=w, penalties=penalties).solve(tol=1e-14).x

    assert torch.autograd.gradcheck(solve, [t.requires_grad_() for t in (*given, w, strengths)])


def test_derivatives_of_wide_and_singular_problems() -> None:
    A, L, _, y, _, w = parts(rows=1)
    L = torch.stack([L[0], L[0]])  # of rank one: many minimisers
    inputs = [t.requires_grad_() for t in (A, y, w[:1], torch.tensor(0.3, dtype=D))]

    def solve(A: Tensor, y: Tensor, w: Tensor, strength: Tensor) -> Tensor:
        return al.LeastSquares(of(A), y, weight=w, penalties=[(strength, of(L))]).solve(tol=1e-14).x

    assert torch.autograd.gradcheck(solve, inputs)


@pytest.mark.parametrize("where", ["strength", "damp"])
def test_one_number_for_each_problem_of_a_batch(where: str) -> None:
    c = nn.Conv1d(1, 1, 3, padding=1, bias=False, dtype=D).requires_grad_(False)
    A = al.linear_operator(c, torch.zeros(3, 1, 8, dtype=D), batch_dims=1)
    L = al.finite_differences(A.domain) if where == "strength" else al.identity(A.domain)
    y, numbers = draw(A.codomain, 1), torch.tensor([0.1, 1.0, 10.0], dtype=D)
    if where == "strength":
        F = al.LeastSquares(A, y, penalties=[(numbers, L)])
        found, value = F.solve(tol=1e-14).x, F(y)
        assert F.hessian(y).shape == y.shape
    else:
        found, value = al.LeastSquares(A, y).solve(damp=numbers.sqrt(), tol=1e-14).x, None
    for i, number in enumerate(numbers.tolist()):
        single = al.LeastSquares(A, y[i : i + 1], penalties=[(number, L)])
        expected = single.solve(tol=1e-14).x
        assert torch.dist(found[i : i + 1], expected) <= 1e4 * EPS * expected.norm()
        value = None if value is None else value - single(y[i : i + 1])
    assert value is None or abs(float(value)) <= 64 * EPS * float(y.square().sum())


class Transforms(TorchDispatchMode):
    """Counts Fourier transforms."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_fft_" in str(func)
        return func(*args, **(kwargs or {}))


def circular(size: int, dtype: torch.dtype = D, n: int = 32, **options: Any) -> al.LinearOperator:
    c = nn.Conv2d(1, 1, size, padding=size // 2, padding_mode="circular", bias=False, dtype=dtype)
    c.weight.data.copy_(
        torch.rand(c.weight.shape, generator=torch.Generator().manual_seed(1), dtype=c.weight.dtype.to_real())
    )
    return al.linear_operator(c.requires_grad_(False), torch.zeros(1, 1, n, n, dtype=dtype), **options)


def by_lsmr(F: al.LeastSquares) -> al.solvers.Solution:
    return F.solve(al.solvers.lsmr, atol=1e-15, btol=1e-15, conlim=0)


@pytest.mark.parametrize("size", [3, 15])
@pytest.mark.parametrize("dtype", [torch.float32, D, torch.complex128], ids=str)
def test_circular_deblurring_in_closed_form_takes_five_transforms(size: int, dtype: torch.dtype) -> None:
    A = circular(size, dtype)
    y = draw(A.codomain, 1)
    F = al.LeastSquares(A, y, penalties=[(2.0, al.finite_differences(A.domain, border="circular"))])
    F.solve()
    with Transforms() as transforms:
        found = F.solve()
    assert transforms.count <= 5
    assert (found.iterations, found.converged) == (0, True)
    expected = by_lsmr(F)
    condition = 1e2 * size**2  # of the Hessian, whose smallest eigenvalue is that at the highest frequencies
    assert torch.dist(found.x, expected.x) <= condition * F.domain.eps * expected.x.norm()
    assert torch.allclose(found.residual_norms[-1] ** 2 / 2, F(found.x).double(), rtol=64 * F.domain.eps)


def two_differences(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.roll(-1, -1) - x, x.roll(-1, -2) - x


CYCLIC = {
    "laplacian and b": lambda A: [(0.1, al.laplacian(A.domain, border="circular"), draw(A.domain, 2))],
    "a tuple": lambda A: [(0.1, al.linear_operator(two_differences, A.domain))],
    "one dimension": lambda A: [
        (0.1, al.finite_differences(A.domain, -1, border="circular")),
        (0.1, al.identity(A.domain)),
    ],
    "composed": lambda A: [(0.1, 2 * al.finite_differences(A.domain, border="circular").gram), (1e-3, A.gram)],
}


@pytest.mark.parametrize("penalties", CYCLIC.values(), ids=CYCLIC)
def test_whatever_commutes_with_shifts_has_a_closed_form(penalties: Any) -> None:
    A = circular(5, n=12)
    F = al.LeastSquares(A, draw(A.codomain, 1), penalties=[*penalties(A), (1e-2, al.identity(A.domain))])
    found, expected = F.solve(), by_lsmr(F)
    assert found.iterations == 0
    assert torch.dist(found.x, expected.x) <= 1e6 * EPS * expected.x.norm()


def test_the_closed_form_of_a_singular_problem_is_its_smallest_minimiser() -> None:
    L = al.finite_differences(al.Space.of((4, 6), dtype=D), border="circular")
    A, b = 0.5 * al.laplacian(L.domain, border="circular"), draw(L.codomain, 2)
    F = al.LeastSquares(A, draw(A.codomain, 1), penalties=[(1.0, L, b)])  # nothing sees the mean
    found, expected = F.solve(), by_lsmr(F)
    assert found.iterations == 0
    assert abs(float(found.x.mean())) <= 16 * EPS * found.x.norm()
    assert torch.dist(found.x, expected.x) <= 1e5 * EPS * expected.x.norm()


def mixed(x: Tensor) -> Tensor:
    return x + x.roll(1, -3)


NOT_CYCLIC = {
    "a reflected border": al.finite_differences,
    "zeros": lambda s: al.laplacian(s, border="zero"),
    "a diagonal": lambda s: al.diagonal(1 + torch.rand(s.specs[0].shape).to(s.specs[0].dtype)),
    "conjugates": lambda s: al.linear_operator(lambda x: x.conj(), s) if s.is_complex else al.finite_differences(s),
    "other shapes": lambda s: al.linear_operator(lambda x: x[..., ::2], s),
    "a single pixel": lambda s: (
        al.identity(s)
        + al.diagonal(1e-3 * torch.eye(12, dtype=D).expand(s.specs[0].shape).contiguous().to(s.specs[0].dtype))
    ),
}


@pytest.mark.parametrize("dtype", [D, torch.complex128], ids=str)
@pytest.mark.parametrize("make", NOT_CYCLIC.values(), ids=NOT_CYCLIC)
def test_what_does_not_commute_with_shifts_is_left_to_a_solver(make: Any, dtype: torch.dtype) -> None:
    A = circular(3, dtype, n=12)
    F = al.LeastSquares(A, draw(A.codomain, 1), penalties=[(0.5, make(A.domain)), (0.5, al.identity(A.domain))])
    found, expected = F.solve(tol=1e-14), by_lsmr(F)
    assert found.iterations > 0
    assert torch.dist(found.x, expected.x) <= 1e4 * EPS * expected.x.norm()


def test_a_mixture_of_channels_is_another_dimension() -> None:
    space = al.Space.of((1, 3, 4, 6), dtype=D)
    A, L = al.linear_operator(mixed, space), al.finite_differences(space, border="circular")
    F = al.LeastSquares(A, draw(space, 1), penalties=[(0.3, L)])
    found, expected = F.solve(), by_lsmr(F)
    assert found.iterations == 0
    assert torch.dist(found.x, expected.x) <= 1e5 * EPS * expected.x.norm()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_extreme_data_are_left_to_a_solver(scale: float) -> None:
    A = circular(3, n=4)
    y, L = draw(A.codomain, 1), al.finite_differences(A.domain, border="circular")
    found, plain = (al.LeastSquares(A, c * y, penalties=[(0.5, L)]).solve(tol=1e-12) for c in (scale, 1.0))
    assert found.converged
    assert torch.dist(found.x / scale, plain.x) <= 1e-9 * plain.x.norm()


def test_the_closed_form_of_a_batch() -> None:
    c = nn.Conv2d(2, 2, 3, padding=1, groups=2, padding_mode="circular", bias=False, dtype=D).requires_grad_(False)
    A = al.linear_operator(c, torch.zeros(3, 2, 8, 6, dtype=D), batch_dims=1)
    L, y = al.finite_differences(A.domain, border="circular"), draw(A.codomain.with_batch((4,)), 1)
    F = al.LeastSquares(
        A, y, penalties=[(torch.tensor([0.1, 0.2, 0.4, 0.8], dtype=D), L), (1e-2, al.identity(A.domain))]
    )
    found, expected = F.solve(), by_lsmr(F)
    assert found.iterations.tolist() == [0] * 4
    assert found.converged.all()
    assert found.residual_norms.shape == (1, 4)
    assert torch.dist(found.x, expected.x) <= 1e6 * EPS * expected.x.norm()
    assert_close(found.residual_norms[-1], expected.residual_norms[-1], EPS)


def test_derivatives_of_the_closed_form() -> None:
    c = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False, dtype=D)
    A = al.linear_operator(c, torch.zeros(1, 1, 3, 4, dtype=D))
    L, strength = al.finite_differences(A.domain, border="circular"), torch.tensor(0.3, dtype=D)
    inputs = [t.detach().requires_grad_() for t in (draw(A.codomain, 1), strength, draw(L.codomain, 2))]

    def solve(y: Tensor, strength: Tensor, b: Tensor, _: Tensor) -> Tensor:
        found = al.LeastSquares(A, y, penalties=[(strength, L, b)]).solve()
        assert found.iterations == 0
        return found.x

    assert torch.autograd.gradcheck(solve, [*inputs, c.weight])


def test_data_weights_and_strengths_are_parts_of_the_module() -> None:
    A, L, _, y, _, w = parts()
    learned, fixed, b = nn.Parameter(torch.tensor(0.3, dtype=D)), torch.tensor(0.2, dtype=D), torch.ones(4, dtype=D)
    penalties = [(learned, of(L)), (fixed, of(L), nn.Parameter(b)), (0.1, of(L))]
    F = al.LeastSquares(of(A), nn.Parameter(y), weight=nn.Parameter(w), penalties=penalties)
    names = {name for name, _ in F.named_parameters()}
    assert {"_y_0", "weight.operator_0.entries_0", "penalties.0.strength", "penalties.1.target.entries_0"} <= names
    assert "penalties.1.strength" in dict(F.named_buffers())
    again = copy.deepcopy(F)
    F.solve(tol=1e-12).x.sum().backward()
    assert all(p.grad is not None for p in F.parameters())
    with torch.no_grad():
        learned.fill_(0.0)
        before = again.solve(tol=1e-12).x
    assert torch.equal(again.penalties[0].strength, torch.tensor(0.3, dtype=D))
    M = al.matrix(A.float())
    G = al.LeastSquares(M, y.float(), penalties=[(fixed, al.identity(M.domain), torch.ones(5))]).double()
    assert G.solve().x.dtype is D
    assert before.dtype is D


@pytest.mark.parametrize(
    ("penalties", "error", "message"),
    [
        ((0.1, al.identity((5,))), al.SpaceMismatchError, "put each into brackets"),
        ([(0.1,)], al.SpaceMismatchError, "list of"),
        ([(0.1, torch.eye(5))], al.SpaceMismatchError, "got Tensor"),
        ([(0.1, al.identity((4,)))], al.SpaceMismatchError, r"operators L on .*5"),
        ([(0.1, al.identity((5,)), torch.ones(4))], al.SpaceMismatchError, "expected b"),
        ([(-0.1, al.identity((5,)))], ValueError, "λ to be a finite number of 0 or more"),
        ([(True, al.identity((5,)))], ValueError, "λ"),
        ([(1j, al.identity((5,)))], ValueError, "λ"),
        ([(torch.tensor(-1.0), al.identity((5,)))], ValueError, "λ to be finite"),
        ([(torch.tensor(torch.nan), al.identity((5,)))], ValueError, "λ to be finite"),
        ([(torch.ones(3), al.identity((5,)))], ValueError, "λ to be a number"),
        ([(torch.tensor(1), al.identity((5,)))], ValueError, "λ to be a number"),
    ],
)
def test_penalties_that_do_not_fit(penalties: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        al.LeastSquares(al.identity((5,)), torch.ones(5), penalties=penalties)


def test_a_strength_that_has_become_negative() -> None:
    strength = nn.Parameter(torch.tensor(1.0))
    F = al.LeastSquares(al.identity((5,)), torch.ones(5), penalties=[(strength, al.identity((5,)))])
    with torch.no_grad():
        strength.neg_()
    with pytest.raises(ValueError, match="λ to be finite numbers of 0 or more"):
        F.solve()


def test_batches_have_to_agree() -> None:
    A = al.identity(al.Space.of((2, 5), batch_dims=1))
    with pytest.raises(al.SpaceMismatchError, match="b of the batch sizes"):
        al.LeastSquares(A, torch.ones(2, 5), penalties=[(1.0, A, torch.ones(3, 5))])
    with pytest.raises(ValueError, match="λ to be a number"):
        al.LeastSquares(A, torch.ones(2, 5), penalties=[(torch.ones(3), A)])


def test_the_matrix_of_a_hessian_with_one_strength_each() -> None:
    A = al.identity(al.Space.of((2, 3), dtype=D, batch_dims=1))
    F = al.LeastSquares(A, torch.ones(2, 3, dtype=D), penalties=[(torch.tensor([1.0, 3.0], dtype=D), A)])
    assert_close(matrix(F.hessian, A.domain.zeros()), torch.diag(torch.tensor([2.0] * 3 + [4.0] * 3, dtype=D)), EPS)
