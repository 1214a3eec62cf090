"""Spaces with weights: inner products, adjoints, norms, solvers and gradients; what is no weight is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from laws import assert_close, seeded
from operator_zoo import LINEAR, Entry
from torch import Tensor, nn

import adjointlab as al
from adjointlab import spectral
from tests.weighted_study import study

F64, C128 = torch.float64, torch.complex128


def positive(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=seeded(seed), dtype=F64) + 0.5


def dense(space: al.Space) -> Tensor:
    """Return the matrix of the weight of a space of one tensor."""
    return al.to_dense(al.LinearOperator(space.weigh, space.weigh, space.plain, space.plain))


def blurred(n: int = 6, dtype: torch.dtype = F64) -> tuple[al.LinearOperator, al.LinearOperator]:
    """Return a positive matrix and its inverse, as operators."""
    M = torch.eye(n, dtype=dtype) * 3 + torch.randn(n, n, generator=seeded(1), dtype=dtype) / n
    W = M.mH @ M
    return al.matrix(W), al.matrix(torch.linalg.inv(W))


def weighted_matrix(dtype: torch.dtype = F64) -> tuple[al.LinearOperator, Tensor]:
    """Return an operator between spaces with weights, one an operator, and its matrix."""
    M = torch.randn(7, 6, generator=seeded(2), dtype=dtype)
    X, Y = (
        al.Space.of((6,), dtype=dtype, weight=blurred(dtype=dtype)),
        al.Space.of((7,), dtype=dtype, weight=positive(7)),
    )
    return al.matrix(M, X, Y), M


@pytest.mark.parametrize("entry", LINEAR[::24], ids=lambda entry: entry.name)
def test_the_zoo_with_random_weights(entry: Entry) -> None:
    assert list(study(entry, range(2))) == []


@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
def test_the_adjoint_is_that_of_dense_algebra(dtype: torch.dtype) -> None:
    A, M = weighted_matrix(dtype)
    WX, WY = dense(A.domain), dense(A.codomain)
    assert_close(al.to_dense(A), M, A.domain.eps)
    assert_close(al.to_dense(A.H), torch.linalg.solve(WX, M.mH @ WY), A.domain.eps, factor=256)
    assert A.H.H is A
    assert A.H.domain == A.codomain
    roots = torch.linalg.cholesky(WY), torch.linalg.cholesky(WX)
    values = torch.linalg.svdvals(roots[0].mH @ M @ torch.linalg.inv(roots[1]).mH)
    assert float(al.operator_norm(A, tol=1e-8)) == pytest.approx(float(values[0]), rel=1e-7)
    assert float(spectral.condition_number(A)) == pytest.approx(float(values[0] / values[-1]), rel=1e-9)
    y = A.codomain.randn(seeded(3))
    expected = torch.linalg.solve(M.mH @ WY @ M + 0.25 * WX, M.mH @ WY @ y)
    for found in (al.solvers.cgls(A, y, damp=0.5, tol=1e-13), al.solvers.lsmr(A, y, damp=0.5, atol=1e-14, btol=1e-14)):
        assert_close(found.x, expected, A.domain.eps, factor=1e4)
    assert_close(al.solvers.cg(A.gram, A.H(y), tol=1e-13).x, al.solvers.cgls(A, y, tol=1e-13).x, 1e-10)


def test_the_algebra_goes_on_working() -> None:
    A, _ = weighted_matrix()
    D = al.diagonal(positive(6, seed=5), A.domain)
    identity = al.identity(A.domain)
    for B in (A.T, A.gram, A @ A.H, 2.0 * A - A / 3, A @ D, al.vstack([A, A]), al.hstack([A, A]), D + identity,
              al.block_diag([A, al.identity((3,)).to(F64)])):  # fmt: skip
        assert al.check_adjoint(B).passed, str(B)
    assert al.vstack([A, A]).codomain == al.Space.of((A.codomain, A.codomain))
    with pytest.raises(al.SpaceMismatchError, match="weight"):
        A @ al.identity(A.domain.plain)
    with pytest.raises(al.SpaceMismatchError, match=r"use A\.H"):
        _ = weighted_matrix(C128)[0].T


def test_derivatives_stay_those_of_autograd() -> None:
    A, _ = weighted_matrix()
    x, y = A.domain.randn(seeded(1)).requires_grad_(), A.codomain.randn(seeded(2)).requires_grad_()
    assert torch.autograd.gradcheck(A, x, check_forward_ad=True)
    assert torch.autograd.gradcheck(A.H, y, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(A.gram, x)
    assert_close(torch.func.vmap(A.H)(torch.stack([y, 2 * y])), torch.stack([A.H(y), 2 * A.H(y)]), A.domain.eps)


def test_pairs_between_spaces_with_weights() -> None:
    A, M = weighted_matrix()
    numpy = M.cpu().numpy()
    forward = lambda x: torch.from_numpy(numpy @ x.detach().cpu().numpy()).to(x.device)  # noqa: E731
    plain = lambda y: torch.from_numpy(numpy.T @ y.detach().cpu().numpy()).to(y.device)  # noqa: E731
    B = al.from_pair(forward, lambda y: A.domain.unweigh(plain(A.codomain.weigh(y))), A.domain, A.codomain)
    x, y = A.domain.randn(seeded(1)).requires_grad_(), A.codomain.randn(seeded(2)).requires_grad_()
    assert torch.autograd.gradcheck(B, x, check_forward_ad=True)
    assert torch.autograd.gradcheck(B.H, y)
    assert torch.autograd.gradgradcheck(B.gram, x)
    with pytest.raises(al.AdjointMismatchError, match="weights of the spaces are missing"):
        al.from_pair(forward, plain, A.domain, A.codomain)


def test_gradients_of_least_squares_are_riesz_representatives() -> None:
    A, _ = weighted_matrix()
    y, x = A.codomain.randn(seeded(1)), A.domain.randn(seeded(2))
    for weight in (None, positive(7, seed=4)):
        F = al.LeastSquares(A, y, weight=weight)
        tracked = x.clone().requires_grad_()
        (euclidean,) = torch.autograd.grad(F(tracked), tracked)
        value, gradient = F.value_and_gradient(x)
        assert_close(A.domain.weigh(gradient), euclidean, A.domain.eps)
        assert_close(A.domain.unweigh(euclidean), gradient, A.domain.eps, factor=64)
        r = A(x) - y
        assert_close(value, A.codomain.inner(r, r if weight is None else weight * r) / 2, A.domain.eps)
        h = A.domain.randn(seeded(3))
        assert_close(F.hessian(h), F.gradient(x + h) - F.gradient(x), A.domain.eps, factor=256)
    Y = al.Space.of((6,), dtype=F64, weight=blurred())
    with pytest.raises(al.SpaceMismatchError, match="self-adjoint in"):
        al.LeastSquares(al.identity(Y), Y.zeros(), weight=positive(6))


@pytest.mark.parametrize("dtype", [F64, C128], ids=str)
def test_solutions_are_differentiated_right(dtype: torch.dtype) -> None:
    A, M = weighted_matrix(dtype)
    weight = positive(7, seed=4)

    def solution(matrix: Tensor, y: Tensor, damp: Tensor, weight: Tensor) -> Tensor:
        B = al.linear_operator(lambda x: matrix @ x, A.domain, codomain=A.codomain, engine="eager", check=False)
        return al.solvers.cgls(B, y, damp=damp, weight=weight, tol=1e-14).x

    inputs = (M, A.codomain.randn(seeded(1)), torch.tensor(0.5, dtype=F64), weight)
    for given in inputs:
        given.requires_grad_()
    assert torch.autograd.gradcheck(solution, inputs, fast_mode=True)

    def system(matrix: Tensor, b: Tensor) -> Tensor:
        B = al.linear_operator(lambda x: matrix @ x, A.domain, codomain=A.codomain, engine="eager", check=False)
        return al.solvers.cg(B.gram, b, tol=1e-14).x

    assert torch.autograd.gradcheck(system, (M, A.domain.randn(seeded(1)).requires_grad_()), fast_mode=True)


def test_spaces_carry_their_weight() -> None:
    w = positive(4, 3)
    space = al.Space.of((2, 4, 3), dtype=F64, batch_dims=1, weight=w)
    assert space == al.Space.of(space.plain, weight=w[None])
    assert space != space.plain
    assert len({space, copy.deepcopy(space), pickle.loads(pickle.dumps(space))}) == 1
    w.mul_(2)  # the space has a copy
    a = space.randn(seeded(1))
    assert_close(space.inner(a, a), (w / 2 * a.square()).sum(), space.eps)
    assert space.with_batch((5,)).weight == space.weight
    assert al.Space.of((3,), weight=1.0) == al.Space.of((3,))
    assert al.Space.of((3,), weight=2.0) == al.Space.of((3,), weight=torch.full((3,), 2.0))
    assert "weight=2" in repr(al.Space.of((3,), weight=2.0))
    nested = al.Space.of({"a": (3,), "b": (space.plain, al.Space.of((2,), weight=3.0))})
    assert (
        float(nested.inner(one := nested.unflatten([torch.ones_like(t) for t in nested.leaves(nested.zeros())]), one))
        == 33
    )
    assert nested.plain.weight is None


def test_operators_take_their_weights_along() -> None:
    c = nn.Conv1d(1, 1, 3, padding=1, dtype=F64)
    X, Y = (al.Space.of((1, 1, 6), dtype=F64, weight=positive(6, seed=k)) for k in (1, 2))
    f = al.affine_operator(c, X, codomain=Y)
    for g in (f, copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert g.linear.domain == X
        assert g.codomain == Y
    g = copy.deepcopy(f).float()
    assert g.H.domain == al.Space.of((1, 1, 6), dtype=torch.float32, weight=positive(6, seed=2).float())
    assert al.check_adjoint(g).passed
    A = copy.deepcopy(weighted_matrix()[0])
    assert A.domain == weighted_matrix()[0].domain  # equal, not the same
    assert al.check_adjoint(A.to(torch.float32)).passed
    assert weighted_matrix()[0].domain.plain.specs[0].dtype == F64


def test_adapters_give_the_adjoint_of_plain_vectors() -> None:
    scipy = pytest.importorskip("adjointlab.adapters.scipy")
    A, M = weighted_matrix()
    y = A.codomain.randn(seeded(1))
    assert_close(torch.from_numpy(scipy.to_scipy(A.cpu()).rmatvec(y.cpu().numpy())), (M.mT @ y).cpu(), A.domain.eps)


@pytest.mark.parametrize(
    ("weight", "match"),
    [
        (0.0, "positive finite"),
        (-1, "positive finite"),
        (float("inf"), "positive finite"),
        (float("nan"), "positive finite"),
        (1e-60, "positive finite"),  # which is zero in float32
        (True, "positive real numbers, got bool"),
        (1j, "positive real numbers, got complex"),
        ("2", "positive real numbers, got str"),
        (torch.ones(6, dtype=torch.complex64), r"pass its \.real"),
        (torch.ones(6, dtype=torch.bool), "positive real numbers"),
        (torch.ones(5), r"broadcasts to \(6,\)"),
        (torch.ones(2, 6), r"broadcasts to \(6,\)"),
        (torch.tensor([1.0, 1, 1, 0, 1, 1]), "positive finite"),
        ([1.0, 2.0], "positive real numbers, got list"),
        ({"a": 1.0}, "positive real numbers, got dict"),
        (lambda x: x, "inverse beside the operator"),
        ((lambda x: -x, lambda x: -x), "is not positive"),
        ((lambda x: 2 * x, lambda x: 3 * x), r"W_inverse\(W\(x\)\) is not x"),
        ((lambda x: x.roll(1), lambda x: x.roll(-1)), "⟨Wx, z⟩ is not"),
        ((lambda x: x + 1, lambda x: x - 1), "is not Wx"),
        ((lambda x: x[1:], lambda x: x), "expected Wx to be"),
        ((lambda x: 2 * x.detach(), lambda x: x / 2), "autograd does not see through W: "),
        ((lambda x: x * float(x.numpy().size), lambda x: x / 6), "autograd does not see through W: "),
        ((lambda x: 2 * x, lambda x: x.detach() / 2), "autograd does not see through W_inverse: "),
    ],
)
def test_what_is_no_weight_is_refused(weight: Any, match: str) -> None:
    with pytest.raises(al.SpaceMismatchError, match=match):
        al.Space.of((6,), dtype=torch.float32, weight=weight)


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(al.SpaceMismatchError, match="free dimensions"):
        al.Space.of((4, 3), weight=positive(4, 3), batch_dims=0).with_batch_dims(1)
    with pytest.raises(al.SpaceMismatchError, match="space without a weight"):
        al.Space.of((5,), dtype=F64, weight=blurred(6))
    with pytest.raises(al.SpaceMismatchError, match="leave it out"):
        al.linear_operator(lambda x: 2 * x, (3,), codomain=al.Space.of((4,), weight=2.0))
    with pytest.raises(al.SpaceMismatchError, match="weight for each leaf"):
        al.Space.of(((3,), (2,)), weight=positive(3))
    W, inverse = blurred()
    fixed = al.identity(al.Space.of((6,), dtype=F64, weight=(W, inverse.forward)))  # a function: nothing moves it
    with pytest.raises(al.SpaceMismatchError, match="expected x to be an element"):
        fixed.to(torch.float32)
    assert fixed.domain.specs[0].dtype == F64


def test_checks_see_wrong_adjoints() -> None:
    A, _ = weighted_matrix()
    assert al.check_adjoint(A, lambda y: 2 * A.H(y)).diagnosis == "Aᴴ is 2.000 × too large"
    assert (
        "weights of the spaces are missing"
        in al.check_adjoint(A, lambda y: A.domain.weigh(A.H(A.codomain.unweigh(y)))).diagnosis
    )
    report = al.check_adjoint(A, lambda y: A.H(y.mul_(2)))
    assert "writes to its argument" in report.diagnosis
    assert al.check_linearity(lambda x: 2 * x, A.domain).verdict == "proved"


def test_rows_of_an_operator_between_weighted_spaces_have_the_weights_of_their_rows() -> None:
    v, w = (torch.rand(n, dtype=torch.float64) + 0.5 for n in (8, 7))
    X, Y = al.Space.of((8,), dtype=torch.float64, weight=v), al.Space.of((7,), dtype=torch.float64, weight=w)
    A, D = al.linear_operator(lambda x: x.diff(), X, codomain=Y), torch.eye(8, dtype=torch.float64).diff(dim=0)
    y = torch.randn(7, dtype=torch.float64)
    for part, rows in ((A.rows([3, 0, 3]), [3, 0, 3]), (A.split(2)[1], [4, 5, 6]), (A.gram.rows([1]).H.H, None)):
        al.assert_adjoint(part)
        if rows is not None:
            torch.testing.assert_close(part.H(y[rows]), D[rows].T @ (w * y)[rows] / v)
    al.assert_adjoint(A.H.rows(slice(0, 8, 3)))
    pair = (al.diagonal(w), al.diagonal(1 / w))
    of_pair = al.linear_operator(lambda x: x.diff(), X.plain, codomain=al.Space.of(Y.plain, weight=pair))
    with pytest.raises(al.SpaceMismatchError, match="whose weights are numbers"):
        of_pair.rows([0])


KINDS = ("none", "number", "entries", "operator")


def spaced(n: int, kind: str, dtype: torch.dtype, seed: int = 0) -> al.Space:
    weights = {"none": None, "number": 2.5, "entries": positive(n, seed=seed), "operator": blurred(n, dtype)}
    return al.Space.of((n,), dtype=dtype, weight=weights[kind])


def matrix_between(kinds: tuple[str, str], shape: tuple[int, int], dtype: torch.dtype) -> al.LinearOperator:
    M = torch.randn(*shape, generator=seeded(shape[0]), dtype=dtype)
    return al.matrix(M, spaced(shape[1], kinds[0], dtype, 1), spaced(shape[0], kinds[1], dtype, 2))


def require_weighted(A: al.LinearOperator, WX: Tensor, WY: Tensor) -> None:
    """Raise unless an operator has these weights, its adjoint, its copies, and the solutions that follow."""
    for space, W in ((A.domain, WX), (A.codomain, WY)):
        assert_close(dense(space), W, space.eps, factor=256)
    for B in (A, copy.deepcopy(A), pickle.loads(pickle.dumps(A)), copy.deepcopy(A).float()):
        al.assert_adjoint(B)
        assert B.codomain.plain.specs[0].dtype == A.codomain.specs[0].dtype or B.domain != A.domain
    M = al.to_dense(A)
    if len(M) > len(M[0]):
        L, y = torch.linalg.cholesky(WY).mH, A.codomain.randn(seeded(4))
        expected = torch.linalg.lstsq(L @ M, (L @ y.reshape(-1))[:, None]).solution[:, 0]
        assert_close(al.solvers.cgls(A, y, tol=1e-13).x.reshape(-1), expected, A.domain.eps, factor=1e6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS[::3])
def test_operators_on_larger_elements_have_the_weights_of_these(kind: str, other: str) -> None:
    A, B = matrix_between((kind, other), (5, 4), F64), matrix_between((other, kind), (3, 2), F64)
    X, Y, eye = dense(A.domain), dense(A.codomain), torch.eye(3, dtype=F64)
    require_weighted(al.kron(A, B), torch.kron(X, dense(B.domain)), torch.kron(Y, dense(B.codomain)))
    require_weighted(al.map(A, 0, 3), torch.kron(eye, X), torch.kron(eye, Y))
    require_weighted(al.map(A, -1, 3), torch.kron(X, eye), torch.kron(Y, eye))
    free = al.map(A)
    al.assert_adjoint(free)
    assert free.H.codomain.with_batch((2,)).weight == free.domain.weight
    C = al.complexify(A)
    assert C.is_complex_linear
    al.assert_adjoint(C)
    assert_close(dense(C.domain), X.to(C128), A.domain.eps, factor=64)
    Z = matrix_between((kind, other), (5, 4), C128)
    al.assert_adjoint(Z.real_view)
    x = Z.domain.randn(seeded(5))
    assert_close(Z.real_view.domain.norm(torch.view_as_real(x)), Z.domain.norm(x), Z.domain.eps)


def test_weights_of_batches_are_put_where_the_dimension_of_slices_is() -> None:
    w = positive(4, 1)
    space = al.Space.of((2, 4, 3), dtype=F64, batch_dims=1, weight=w)
    A = al.linear_operator(lambda x: 2 * x, space, codomain=space)
    for dim, expected in ((1, w[None]), (2, w[:, None]), (-1, w[:, :, None])):
        M = al.map(A, dim, 5)
        assert M.domain == al.Space.of(M.domain.plain, weight=expected)
        al.assert_adjoint(M)
    Z = matrix_between(("operator", "none"), (3, 3), C128)
    F = al.linear_operator(torch.fft.rfft, spaced(4, "none", F64))
    with pytest.raises(al.SpaceMismatchError, match="of one dtype, where a weight is an operator"):
        al.kron(Z, F)


def test_recurrences_between_spaces_with_weights() -> None:
    state, inputs = al.Space.of((6,), dtype=F64, weight=blurred()), al.Space.of((5, 6), dtype=F64, weight=positive(6))

    def step(u: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * u.roll(1) + i, u.diff()

    A = al.recurrence(step, state, inputs=inputs, initial=True, final=True)
    assert A.domain == al.Space.of((state, inputs))
    assert A.codomain == al.Space.of((state, al.Space.of((5, 5), dtype=F64)))
    for B in (A, copy.deepcopy(A), copy.deepcopy(A).float(), al.recurrence(step, state, inputs=inputs)):
        al.assert_adjoint(B)
    plain = al.recurrence(step, state.plain, inputs=inputs.plain, initial=True, final=True)
    y = A.codomain.randn(seeded(1))
    expected = A.domain.unweigh(plain.H(A.codomain.weigh(y)))
    for found, leaf in zip(A.H(y), expected, strict=True):
        assert_close(found, leaf, A.domain.eps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_preconditioners_know_the_weights_of_spaces(kind: str, weighted: bool) -> None:
    X, Y = al.Space.of((20,), dtype=F64, weight=positive(20) ** 4), spaced(30, kind, F64)
    M = torch.randn(30, 20, generator=seeded(3), dtype=F64) * torch.logspace(0, 2, 20, dtype=F64)
    A = al.matrix(M, X, Y)
    W: Any = positive(30, seed=7) if weighted else None
    if weighted and kind == "operator":
        W = 3 * al.identity(Y)
    y, options = Y.randn(seeded(4)), {"weight": W, "damp": 0.1}
    plain = al.solvers.cgls(A, y, tol=1e-10, **options)
    makers = al.precondition.diagonal, al.precondition.auto, lambda A, **o: al.precondition.nystrom(A, 10, **o)
    for P in (*[make(A, **options) for make in makers], al.precondition.circulant(A, **options)):
        al.assert_adjoint(P)
        al.assert_adjoint(copy.deepcopy(P))
        assert P.domain == P.codomain == X
        found = al.solvers.cgls(A, y, tol=1e-10, precondition=P, **options)
        assert X.norm(found.x - plain.x) <= 1e-7 * X.norm(plain.x)
    for P in [make(A, **options) for make in makers]:
        assert al.solvers.cgls(A, y, tol=1e-10, precondition=P, **options).iterations < 0.7 * plain.iterations
    assert al.solvers.cgls(A, y, tol=1e-10, precondition="auto", **options).iterations < 0.7 * plain.iterations
    if kind != "operator":  # the norms of the columns are exact
        N = al.to_dense(A.gram if W is None else A.H @ al.diagonal(W, Y) @ A)
        ones = torch.ones(20, dtype=F64)
        assert_close(al.precondition.diagonal(A, **options)(ones), 1 / (N.diagonal() + 0.01), X.eps, factor=64)


def test_preconditioners_of_batches_with_weights() -> None:
    c = nn.Conv1d(1, 1, 5, padding=2, bias=False, dtype=F64).requires_grad_(False)
    X, Y = (al.Space.of((3, 1, 32), dtype=F64, batch_dims=1, weight=positive(32, seed=k)) for k in (1, 2))
    A = al.linear_operator(c, X, codomain=Y, batch_dims=1)
    y, damp = A(X.randn(seeded(1))), torch.tensor([0.1, 0.2, 0.3], dtype=F64)
    plain = al.solvers.cgls(A, y, damp=damp, tol=1e-10)
    found = al.solvers.cgls(A, y, damp=damp, tol=1e-10, precondition="auto")
    assert_close(found.x, plain.x, X.eps, factor=1e7)


def test_what_knows_no_weights_refuses_them() -> None:
    X = spaced(6, "operator", F64)
    A = al.identity(X)
    for make in (
        lambda: al.precondition.nystrom(A, 2), lambda: al.precondition.diagonal(A),
        lambda: al.solvers.cgls(A, A.codomain.randn(), precondition="auto"),
    ):  # fmt: skip
        with pytest.raises(al.SpaceMismatchError, match="whose weight is an operator: give M as a function"):
            make()


def test_a_tensor_without_dimensions_is_the_weight_of_all_leaves() -> None:
    specs = {"a": (2,), "b": (3,)}
    assert al.Space.of(specs, weight=torch.tensor(2.0)) == al.Space.of(specs, weight=2.0)
    assert al.Space.of(specs, weight=2.0) == al.Space.of(specs, weight={"a": 2.0, "b": torch.tensor(2.0)})
    with pytest.raises(al.SpaceMismatchError, match="positive"):
        al.Space.of(specs, weight=torch.tensor(-2.0))


@pytest.mark.parametrize("weight", [2.0, torch.tensor(2.0), torch.tensor(2.0, dtype=F64)])
def test_numbers_weigh_data_of_a_weighted_space(weight: Any) -> None:
    A, _ = weighted_matrix()
    y, x = A.codomain.randn(seeded(3)), A.domain.randn(seeded(4))
    F, G = (al.LeastSquares(A, y, w) for w in (weight, torch.full((7,), 2.0, dtype=F64)))
    assert_close(F(x), G(x), A.domain.eps)
    assert_close(F.gradient(x), G.gradient(x), A.domain.eps)
    found, expected = (al.solvers.cgls(A, y, weight=f.weight, damp=0.1, tol=1e-12).x for f in (F, G))
    assert_close(found, expected, A.domain.eps, factor=64)
