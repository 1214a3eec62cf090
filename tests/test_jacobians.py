"""Jacobians against ``torch.func.jacrev`` of the function on real coordinates, and what else operators are."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import adjointlab as al
from adjointlab.errors import NotDifferentiableError, SpaceMismatchError
from tests.built import needs_torch
from tests.nonlinear_zoo import ZOO, Case

D = torch.float64
EPS = torch.finfo(D).eps


def coordinates(space: al.Space, x: Any) -> Tensor:
    """Return the real coordinates of an element as one vector."""
    real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in space.leaves(x)]
    return torch.cat([t.reshape(-1) for t in real])


def dense(case: Case, x: Any) -> Tensor:
    """Return the matrix of the derivative in real coordinates, by ``torch.func.jacrev``."""
    space = al.Space.of(x)
    reals = [torch.view_as_real(t) if t.is_complex() else t for t in space.leaves(x)]

    def function(*parts: Tensor) -> Tensor:
        leaves = [torch.view_as_complex(t) if s.is_complex else t for t, s in zip(parts, space.specs, strict=True)]
        element = space.unflatten(leaves)
        found = pytree.tree_leaves(case.function(*element) if type(element) is tuple else case.function(element))
        return torch.cat([(torch.view_as_real(t) if t.is_complex() else t).reshape(-1) for t in found])

    # Row by row: before torch 2.10, vmap fails in the backward of grid_sample.
    jacrev = torch.func.jacrev(function, argnums=tuple(range(len(reals))), chunk_size=1)
    parts = jacrev(*[t.clone() for t in reals])
    return torch.cat([part.reshape(part.shape[0], -1) for part in parts], 1)


def assert_is_derivative(J: al.Jacobian, matrix: Tensor) -> None:
    """Assert that J is a matrix and ``J.H`` its transpose, in real coordinates, within rounding."""
    d, v = J.domain.randn(torch.Generator().manual_seed(1)), J.codomain.randn(torch.Generator().manual_seed(2))
    pairs = [
        (coordinates(J.codomain, J(d)), matrix @ coordinates(J.domain, d)),
        (coordinates(J.domain, J.H(v)), matrix.T @ coordinates(J.codomain, v)),
    ]
    size = torch.linalg.matrix_norm(matrix)
    for found, expected in pairs:
        assert torch.dist(found, expected) <= 64 * EPS * size * max(matrix.shape) ** 0.5


@pytest.mark.parametrize("name", ZOO)
def test_it_is_the_derivative_here_and_elsewhere(name: str) -> None:
    case = ZOO[name]
    x, elsewhere = case.point(), case.point(seed=1)
    J = al.jacobian(case.function, x)
    assert J.engine == "traced"
    assert_is_derivative(J, dense(case, x))
    K = J.at(elsewhere)
    assert_is_derivative(K, dense(case, elsewhere))
    assert_is_derivative(J, dense(case, x))
    expected = case.function(*elsewhere) if type(elsewhere) is tuple else case.function(elsewhere)
    for found, leaf in zip(J.codomain.leaves(K.value), pytree.tree_leaves(expected), strict=True):
        assert torch.dist(found, leaf) <= 8 * EPS * torch.linalg.vector_norm(leaf)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("dims", [2, 3])
def test_registration_in_image_and_displacements(dims: int, mode: str) -> None:
    if (dims, mode) == (3, "bicubic"):
        pytest.skip("PyTorch has none")
    shape = (2, 3, *[5] * dims)
    grid = nn.functional.affine_grid(torch.eye(dims, dims + 1, dtype=D).repeat(2, 1, 1), shape, align_corners=False)

    def warp(image: Tensor, moved: Tensor) -> Tensor:
        return nn.functional.grid_sample(image, grid + moved, mode=mode, align_corners=False)

    x = point(*shape), 0.1 * point(*grid.shape, seed=1)
    J = al.jacobian(warp, x)
    assert J.engine == "traced"
    assert_is_derivative(J, dense(Case(warp, []), x))
    part = al.jacobian(lambda d: warp(x[0], d), x[1])
    assert_is_derivative(part, dense(Case(lambda d: warp(x[0], d), ()), x[1]))


def test_of_a_function_that_is_not_holomorphic_it_is_real_linear() -> None:
    z = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)
    assert al.jacobian(lambda z: z**2, z).is_complex_linear
    assert not al.jacobian(lambda z: z.conj() * z, z).is_complex_linear


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def point(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def test_parameters_that_change_are_followed_and_the_point_is_a_copy() -> None:
    f, x = network(), point(3)
    J = al.jacobian(f, x)
    case = Case(f, (3,))
    before = x.clone()
    with torch.no_grad():
        f[0].weight.mul_(2)
        x.add_(1)
    assert_is_derivative(J, dense(case, before).detach())
    assert torch.equal(J.value, f(before))
    assert torch.equal(J.point, before)


def test_the_jacobian_in_parameters() -> None:
    f, x, v = network(), point(3), point(2, seed=1)
    J = al.jacobian(f, dict(f.named_parameters()), kwargs={"input": x})
    expected = torch.autograd.grad(f(x), list(f.parameters()), v)
    for found, leaf in zip(J.H(v).values(), expected, strict=True):
        assert torch.dist(found, leaf) <= 8 * EPS * torch.linalg.vector_norm(leaf)
    part = {"0.weight": f[0].weight}
    assert al.jacobian(f, part, kwargs={"input": x}).domain.size == 12


def test_derivatives_of_it_in_the_point_and_in_parameters() -> None:
    f, x = network(), point(3)
    J = al.jacobian(f, x.requires_grad_())
    d, v = point(3, seed=1).requires_grad_(), point(2, seed=2).requires_grad_()
    y = point(3, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda y, d: J.at(y)(d), (y, d))
    assert torch.autograd.gradgradcheck(lambda y, d: J.at(y)(d), (y, d))
    assert torch.autograd.gradcheck(lambda y, v: J.at(y).H(v), (y, v))
    assert torch.autograd.gradcheck(lambda y: J.at(y).value, (y,))
    weight = f[0].weight

    def pushed(w: Tensor) -> Tensor:
        g = lambda x: torch.func.functional_call(f, {"0.weight": w}, (x,))  # noqa: E731
        return torch.func.jvp(g, (x,), (d,))[1].sum()

    (found,) = torch.autograd.grad(J(d).sum(), [weight])
    (expected,) = torch.autograd.grad(pushed(weight), [weight])
    assert torch.dist(found, expected) <= 64 * EPS * torch.linalg.vector_norm(expected)


def product_with_sum(x: Tensor) -> Tensor:
    return torch.sin(x) * x.sum()


def test_nothing_is_derived_again_at_points_that_require_gradients() -> None:
    J, d = al.jacobian(product_with_sum, point(3)), point(3, seed=1)
    (derivation,) = J.source.current()
    y = point(3, seed=2).requires_grad_()
    K = J.at(y)
    (found,) = torch.autograd.grad(K(d).sum(), [y])
    (expected,) = torch.autograd.grad(torch.func.jvp(product_with_sum, (y,), (d,))[1].sum(), [y])
    assert torch.dist(found, expected) <= 64 * EPS * torch.linalg.vector_norm(expected)
    assert [other.programs for other in K.source.current()] == [derivation.programs]


def test_points_inside_of_transforms() -> None:
    J, x, d = al.jacobian(product_with_sum, point(3)), point(3, seed=1), point(3, seed=2)

    def pushed(x: Tensor) -> Tensor:
        return torch.func.jvp(product_with_sum, (x,), (d,))[1]

    def pulled(x: Tensor) -> Tensor:
        return torch.func.vjp(product_with_sum, x)[1](d)[0]

    pairs = [(pushed, lambda x: J.at(x)(d)), (pulled, lambda x: J.at(x).H(d))]
    pairs.append((product_with_sum, lambda x: J.at(x).value))
    for reference, ours in pairs:
        for transform in (torch.func.jacrev, torch.func.jacfwd, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
            expected = transform(reference)(x)
            assert torch.dist(transform(ours)(x), expected) <= 64 * EPS * torch.linalg.vector_norm(expected)
        each = torch.stack([x, 2 * x])
        assert torch.dist(torch.vmap(ours)(each), torch.vmap(reference)(each)) <= 64 * EPS * each.norm()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap])
def test_points_inside_of_transforms_that_would_not_be_seen_are_refused(transform: Any) -> None:
    J, d = al.jacobian(product_with_sum, point(3), engine="eager"), point(3, seed=2)
    x = point(3) if transform is torch.func.grad else point(2, 3)
    for use in (lambda K: K(d).sum(), lambda K: K.H(d).sum()):
        with pytest.raises(NotDifferentiableError, match="expected a graph of f"):
            transform(lambda x, use=use: use(J.at(x)))(x)
        with pytest.raises(NotDifferentiableError, match="expected x0 outside of transforms"):
            transform(lambda x, use=use: use(al.jacobian(product_with_sum, x)))(x)


def test_it_is_an_operator_as_others() -> None:
    f, x = network().requires_grad_(False), point(3)
    J, matrix = al.jacobian(f, x), dense(Case(network(), (3,)), x).detach()
    assert J.H.H is J
    assert al.check_adjoint(J).passed
    for copied in (copy.deepcopy(J), pickle.loads(pickle.dumps(J))):
        assert_is_derivative(copied, matrix)
        assert torch.equal(copied.value, J.value)
    assert torch.dist(al.to_dense(J.gram), matrix.T @ matrix) <= 64 * EPS * torch.linalg.matrix_norm(matrix) ** 2
    assert torch.dist(torch.vmap(J)(torch.eye(3, dtype=D)), matrix.T) <= 64 * EPS * torch.linalg.matrix_norm(matrix)
    single = copy.deepcopy(J).float()
    assert single.at(torch.ones(3))(torch.ones(3)).dtype == single.value.dtype == torch.float32
    solution = al.solvers.cgls(J, J(torch.ones(3, dtype=D)), tol=1e-12)
    assert solution.converged


def test_batches_are_samples() -> None:
    x = point(3, 4)
    J = al.jacobian(lambda x: torch.sin(x).cumsum(1), x, batch_dims=1)
    assert J.domain.batch_dims == J.codomain.batch_dims == 1
    assert torch.equal(J.at(torch.zeros(2, 4, dtype=D))(torch.ones(2, 4, dtype=D))[1], torch.arange(1.0, 5, dtype=D))
    with pytest.raises(SpaceMismatchError, match="of the batch size of the point"):
        J(point(2, 4))


class Written(torch.autograd.Function):
    """A square with a backward of its own, by Python's numbers forwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.tensor([number * number for number in x.tolist()], dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * v


class Once(Written):
    """The same, with such a backward as well."""

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return torch.tensor([2 * a * b for a, b in zip(ctx.saved_tensors[0].tolist(), v.tolist(), strict=True)])


def test_where_there_is_no_graph_autograd_serves() -> None:
    J = al.jacobian(Written.apply, point(3))
    assert J.engine == "eager"
    for x in (point(3), point(3, seed=1)):
        assert_is_derivative(J.at(x), torch.diag(2 * x))
        assert torch.equal(J.at(x).value, x**2)
    y = point(3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: J.at(y)(torch.ones(3, dtype=D)), (y,))


@pytest.mark.parametrize(
    ("f", "x", "error", "message"),
    [
        (torch.sqrt, torch.zeros(2), NotDifferentiableError, "NaN or infinite there"),
        (nn.Dropout(), torch.ones(5), NotDifferentiableError, "eval"),
        (Once.apply, torch.ones(2), NotDifferentiableError, "differentiable operations"),
        (torch.argmax, torch.ones(2), SpaceMismatchError, "int64"),
        (3, torch.ones(2), SpaceMismatchError, "expected an nn.Module or a function"),
        (torch.sin, [1, 2], SpaceMismatchError, "expected x0"),
        (nn.Linear(3, 2), torch.ones(2), SpaceMismatchError, "but it raised"),
    ],
)
def test_what_has_no_derivative_is_refused(f: Any, x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        al.jacobian(f, x)


@needs_torch("2.10", "torch.compile around operators with gradients")
def test_within_torch_compile() -> None:
    J = al.jacobian(torch.sin, point(4))
    step = torch.compile(lambda d: J.H(J(d)), fullgraph=True, backend="aot_eager")
    d = point(4, seed=1)
    assert torch.dist(step(d), J.H(J(d))) <= 8 * EPS


def test_residuals_are_computed_once_for_a_point_and_take_no_more_than_autograd() -> None:
    x = point(64, 64)
    J = al.jacobian(lambda x: torch.exp(x.sin()) * x.cos(), x)
    K = J.at(x + 1)
    kept = {}
    for A in (J, K):
        (derivation,) = A.source.current()
        state = tuple(source.read() for source in derivation.state)
        kept[A] = derivation.residuals(state)
        J(x), K(x), J.H(x), K.H(x)
        assert all(a is b for a, b in zip(derivation.residuals(state), kept[A], strict=True))
    assert not torch.equal(kept[J][0], kept[K][0])
    saved = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = x.clone().requires_grad_()
        z = torch.exp(y.sin()) * y.cos()
    assert z.requires_grad
    assert sum(t.nbytes for t in kept[J]) <= sum(saved.values())


def test_what_is_detached_in_the_function_stays_so_in_derivatives() -> None:
    w, d = point(3).requires_grad_(), point(3, seed=1)
    found = [
        torch.autograd.grad(al.jacobian(lambda x: x * w.detach() * w, point(3, seed=2), engine=engine)(d).sum(), w)[0]
        for engine in ("auto", "eager")
    ]
    assert torch.equal(found[0], w.detach() * d)
    assert torch.equal(found[1], found[0])


def test_results_may_be_written_to() -> None:
    J = al.jacobian(torch.exp, point(3))
    expected = J(torch.ones(3, dtype=D)).clone()
    J.value.zero_()
    J.point.zero_()
    assert torch.equal(J(torch.ones(3, dtype=D)), expected)
    assert torch.equal(J.value, expected)


def test_points_that_nobody_holds_are_freed() -> None:
    scale = nn.Parameter(torch.ones(3, dtype=D))
    for f in (torch.exp, network(), lambda x: scale * x.exp()):
        J = al.jacobian(f, point(3))
        J(point(3))
        derivation = J.source.nominal
        gc.collect()
        gc.disable()  # with the last name of them, not some time later
        try:
            for k in range(3):
                K = J.at(point(3, seed=k))
                K(point(3)), K.H(K.value)
                leaf = weakref.ref(K.source.callable.point[0])
                del K
                assert leaf() is None
        finally:
            gc.enable()
        assert len(derivation.residuals._kept) == 1


def test_the_adjoint_may_be_all_that_is_held() -> None:
    f = network()
    adjoint = al.jacobian(f, point(3)).H
    J = adjoint.H
    assert type(J) is al.Jacobian
    assert J.H is adjoint
    assert adjoint.H is J
    assert torch.equal(J.value, f(point(3)))
    assert [name for name, _ in J.named_parameters()] == [name for name, _ in adjoint.named_parameters()]
    assert torch.equal(pickle.loads(pickle.dumps(adjoint)).H.value, J.value)


def test_a_point_that_was_reached_by_many_is_as_another() -> None:
    scale = nn.Parameter(torch.ones(3, dtype=D))
    J = al.jacobian(lambda x: scale * x.exp(), point(3))
    for k in range(1200):  # more than Python has frames
        J = J.at(point(3, seed=k))
    assert_is_derivative(J, torch.diag(point(3, seed=1199).exp()))
    J.parameter_0 = nn.Parameter(2 * torch.ones(3, dtype=D))
    assert_is_derivative(J, torch.diag(2 * point(3, seed=1199).exp()))


@pytest.mark.parametrize("f", [torch.linalg.cholesky, torch.linalg.inv])
def test_a_point_that_the_function_refuses_is_refused(f: Any) -> None:
    J = al.jacobian(f, torch.eye(2, dtype=D))
    with pytest.raises(torch.linalg.LinAlgError, match="linalg"):
        J.at(torch.diag(torch.tensor([-1.0, 0.0], dtype=D)))


def test_it_is_built_in_the_dtypes_of_the_function() -> None:
    f, x = nn.Linear(3, 3), torch.rand(3)
    with torch.autocast("cpu", torch.bfloat16):
        J = al.jacobian(f, x)
    assert J.codomain.specs[0].dtype == J(x).dtype == J.value.dtype == torch.float32


def test_a_function_that_is_refused_is_left_as_it_was() -> None:
    norm = nn.BatchNorm1d(3)
    with pytest.raises(NotDifferentiableError, match="eval"):
        al.jacobian(norm, torch.rand(4, 3))
    assert int(norm.num_batches_tracked) == 0
    assert norm.running_mean is not None
    assert not norm.running_mean.any()


def test_tied_parameters_together_and_apart() -> None:
    first, second = nn.Linear(3, 3, bias=False).double(), nn.Linear(3, 3, bias=False).double()
    second.weight = first.weight
    f, x, v = nn.Sequential(first, nn.Tanh(), second), point(3), point(3, seed=1)
    together = al.jacobian(f, dict(f.named_parameters()), kwargs={"input": x}).H(v)["0.weight"]
    apart = al.jacobian(f, dict(f.named_parameters(remove_duplicate=False)), kwargs={"input": x}).H(v)
    assert torch.dist(apart["0.weight"] + apart["2.weight"], together) <= 64 * EPS * torch.linalg.vector_norm(together)


def test_a_point_of_inference_mode_and_one_that_is_written_to() -> None:
    linear = nn.Linear(3, 2)
    with torch.inference_mode():
        J = al.jacobian(linear, torch.rand(3))
    assert J.engine == "traced"
    J(torch.ones(3)).sum().backward()
    assert torch.equal(linear.weight.grad, torch.ones(2, 3))

    def writes(x: Tensor) -> Tensor:
        x.mul_(2)
        return x**2

    for engine in ("auto", "eager"):
        assert_is_derivative(al.jacobian(writes, point(3), engine=engine), torch.diag(8 * point(3)))


def test_it_is_written_as_J() -> None:
    J, A = al.jacobian(torch.sin, torch.ones(3)), al.matrix(torch.eye(3))
    spaces = "(3,) float32 → (3,) float32"
    assert repr(J) == f"Jacobian J: {spaces}\n  J = the Jacobian of the function sin at a point"
    assert repr(J.H).startswith(f"LinearOperator Jᴴ: {spaces}")
    assert repr(J.gram).startswith(f"LinearOperator Jᴴ J: {spaces}")
    assert repr(J.H @ J.at(torch.zeros(3))).startswith("LinearOperator Jᴴ K: ")
    assert repr(A @ J @ A.H).startswith("LinearOperator A J Aᴴ: ")
    for account in (J.explain(), J.gram.explain()):
        assert "cost of J: " in account
        assert "memory kept between calls: 0 B for J, 0 B for Jᴴ" in account
