"""Regions by index become sparse maps where these are chosen, and stay up to date with what they depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from built import affine, first_way, last_way, needs_torch, operator
from laws import assert_close
from torch import Tensor, nn
from torch.nn import functional as F

import adjointlab as al
from adjointlab.transpose.passes.compose import residual_and_gradient
from adjointlab.transpose.passes.convolutions import kernels_of
from adjointlab.transpose.passes.maps_by_index import maps_by_index

pytestmark = pytest.mark.cpu
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class Rays(nn.Module):
    """Weighted sums of entries along rays."""

    def __init__(self, dtype: torch.dtype = torch.float64, size: int = 49) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("places", torch.randint(0, size, (5, 6), generator=draw))
        self.weights = nn.Parameter(torch.randn(5, 6, dtype=dtype, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(-2)[..., self.places] * self.weights).sum(-1)


def mapped(function: Any, domain: Any, *, last: bool = False, **options: Any) -> al.LinearOperator:
    return operator(function, domain, None, choose_map=last_way if last else first_way, **options)


def lines(A: al.LinearOperator) -> list[str]:
    return [line for line in str(A.explain()).splitlines() if line.startswith("kernel:")]


def eager(function: Callable[[Any], Any], x: Tensor, y: Tensor) -> Tensor:
    return torch.func.vjp(function, x)[1](y)[0]


def assert_same(A: al.LinearOperator, function: Callable[[Any], Any], eps: float = 1e-15) -> None:
    x, y = A.domain.randn(), A.codomain.randn()
    with torch.no_grad():
        assert_close(A(x), function(x), eps)
        assert_close(A.H(y), eager(function, x, y), eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (1,)])
def test_rays(dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    rays = Rays(dtype)
    for last in (False, True):
        A = mapped(rays, al.TensorSpec((*batch, 7, 7), dtype), last=last)
        forward, adjoint = lines(A)
        assert "sparse map 5 × 49" in forward
        assert "sparse map 49 × 5" in adjoint
        assert_same(A, rays, A.domain.eps)


@pytest.mark.parametrize(
    "change",
    [
        lambda rays: rays.weights.data.mul_(2),
        lambda rays: rays.weights.detach().numpy().fill(0.5),
        lambda rays: rays.places.copy_(rays.places.flip(0)),
        lambda rays: rays.places.fill_(3),
        lambda rays: setattr(rays, "places", rays.places + 1),
        lambda rays: rays.load_state_dict(Rays(size=20).state_dict()),
    ],
)
def test_what_a_map_depends_on_may_change(change: Callable[[Rays], object]) -> None:
    rays = Rays()
    A = mapped(rays, (7, 7))
    assert_same(A, rays)
    change(rays)
    assert_same(A, rays)


class Many(nn.Module):
    """Sums of so many entries that their weights are read where they are."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("places", torch.randint(0, 5000, (700, 100), generator=draw))
        self.weights = nn.Parameter(torch.randn(700, 100, dtype=dtype, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        return (x[self.places] * self.weights).sum(-1)


def changed(many: Many, weights: Tensor) -> None:
    many.weights = nn.Parameter(weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_many_weights_are_read_where_they_are(dtype: torch.dtype) -> None:
    many = Many(dtype)
    A = mapped(many, al.TensorSpec((5000,), dtype))
    called = {
        name: [getattr(node.target, "__name__", "") for node in A.source.nominal.programs[name][0].graph.body.nodes]
        for name in ("linear", "adjoint")
    }
    assert "with_entries" in called["linear"]
    assert "with_entries" not in called["adjoint"]  # which adds them in another order
    for change in (
        lambda: None,
        lambda: many.weights.data.mul_(2),
        lambda: many.weights.detach().numpy().fill(0.5),
        lambda: many.places.copy_(many.places.flip(0)),
        lambda: changed(many, many.weights.detach().clone() * 3),
        lambda: changed(many, many.weights.detach().conj()),
        lambda: changed(many, torch.randn(100, 700, dtype=dtype).mT),
        lambda: many.weights.data[1:2, 7].fill_(torch.nan),
    ):
        change()
        x, y = A.domain.randn(), A.codomain.randn()
        with torch.no_grad():
            assert torch.equal(A(x).isnan(), many(x).isnan())
            assert_close(A(x).nan_to_num(), many(x).nan_to_num(), 1e-15)
            assert_close(A.H(y).nan_to_num(), eager(many, x, y).nan_to_num(), 1e-15)


def test_many_weights_have_gradients() -> None:
    many = Many()
    A, x, v = mapped(many, al.TensorSpec((5000,), torch.float64)), torch.randn(5000).double(), torch.randn(700).double()
    expected = torch.autograd.grad((many(x) * v).sum(), many.weights)[0]
    for value in ((A(x) * v).sum(), (x * A.H(v)).sum()):
        assert_close(torch.autograd.grad(value, many.weights)[0], expected, 1e-15)


def test_frozen_operators_keep_their_map() -> None:
    rays = Rays()
    A = mapped(rays, (7, 7))
    x = A.domain.randn()
    before = A(x)
    with A.frozen(), torch.no_grad():
        assert torch.equal(A(x), before)
        rays.weights.mul_(2)
        assert torch.equal(A(x), before)
    assert_close(A(x), 2 * before, 1e-15)


def test_a_map_that_changes_at_every_call_is_left_to_pytorch() -> None:
    rays = Rays()
    A = mapped(rays, (7, 7))
    x, y = A.domain.randn(), A.codomain.randn()
    for _ in range(6):
        with torch.no_grad():
            rays.weights.normal_()
            assert_close(A(x), rays(x), 1e-15)
            assert_close(A.H(y), eager(rays, x, y), 1e-15)
    program = A.source.nominal.programs["adjoint"][0]
    state = tuple(source.read() for source in program.graph.state)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(program.run(*state, y), program.whole(*state, y), strict=True))


def test_gradients_are_those_of_autograd() -> None:
    rays = Rays()
    A = mapped(rays, (7, 7))
    x, y = A.domain.randn().requires_grad_(), A.codomain.randn().requires_grad_()
    expected = torch.autograd.grad(rays(x) @ y, [x, y, rays.weights])
    for value in (A(x) @ y, (A.H(y) * x).sum()):
        for found, wanted in zip(torch.autograd.grad(value, [x, y, rays.weights]), expected, strict=True):
            assert_close(found, wanted, 1e-15)
    assert torch.autograd.gradgradcheck(lambda x, w: (A(x) * w).sum().square(), (x, y))
    batch = torch.randn(4, 7, 7, dtype=torch.float64)
    assert_close(torch.vmap(A)(batch), rays(batch), 1e-15)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_gradients_in_a_grid(mode: str) -> None:
    grid = (torch.rand(1, 4, 5, 2, dtype=torch.float64) * 2.2 - 1.1).requires_grad_()
    sample = lambda x: F.grid_sample(x, grid, mode=mode, align_corners=False)  # noqa: E731
    A = mapped(sample, al.TensorSpec((1, 2, 6, 7), torch.float64))
    assert_same(A, sample)
    x, y = A.domain.randn(), A.codomain.randn()
    (expected,) = torch.autograd.grad((sample(x) * y).sum(), [grid])
    for value in ((A(x) * y).sum(), (A.H(y) * x).sum()):
        (found,) = torch.autograd.grad(value, [grid])
        assert_close(found, expected, 1e-15)


def test_other_batch_sizes() -> None:
    rays = Rays()
    A = mapped(rays, torch.zeros(2, 7, 7, dtype=torch.float64), batch_dims=1)
    for size in (2, 5, 1):
        x, y = torch.randn(size, 7, 7, dtype=torch.float64), torch.randn(size, 5, dtype=torch.float64)
        assert_close(A(x), rays(x), 1e-15)
        assert_close(A.H(y), eager(rays, x, y), 1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_as_it_is(dtype: torch.dtype) -> None:
    places = torch.arange(9).flip(0)
    assert not lines(mapped(lambda x: x.reshape(-1)[places], al.TensorSpec((3, 3), dtype)))
    assert not lines(mapped(nn.AvgPool2d(2), al.TensorSpec((1, 1, 4, 4), dtype)))


def test_small_operations_stay_as_they_are() -> None:
    assert not lines(al.linear_operator(Rays(torch.float32), (7, 7)))


def test_lowering_turns_maps_off() -> None:
    assert not lines(mapped(Rays(torch.float32), (7, 7), lowering=False))


def test_a_map_that_is_too_large_is_said_to_be() -> None:
    every = torch.arange(144).expand(80, 144)
    indexed = al.linear_operator(lambda x: x.reshape(-1)[every].sum(-1), (12, 12))
    grid = torch.rand(1, 10, 10, 2) * 1.6 - 0.8
    sampled = al.linear_operator(lambda x: F.grid_sample(x, grid, "bicubic", align_corners=False), (1, 1, 12, 12))
    unfolded = al.linear_operator(lambda x: F.unfold(x, 3), (1, 1, 12, 12))
    for A, limit, said in (
        (indexed, 300, "sparse map"),
        (unfolded, 300, "input and result"),
        (sampled, 300, "memory"),
    ):
        graph = maps_by_index(A.source.nominal.graphs["function"], first_way, lambda _, limit=limit: limit)
        (line,) = kernels_of(graph)
        assert said in line  # of the first, there are more places in the state


def test_integer_masks_and_empty_rows() -> None:
    mask = torch.tensor([True, False, True, False])
    for function, domain in (
        (lambda x: x[mask], (4,)),
        (lambda x: x.masked_fill(mask, 0)[torch.tensor([-1, 0, 0, 3])], (4,)),
        (lambda x: x.new_zeros(6, dtype=x.dtype).index_add(0, torch.tensor([5, 0, 5, 1]), x), (4,)),
        (lambda x: torch.index_put(x.new_zeros(3, 3), (torch.tensor([0, 2]), torch.tensor([1, -1])), x[:2]), (4,)),
    ):
        assert_same(mapped(function, al.TensorSpec(domain, torch.float64)), function)


def test_not_a_number_stays_where_it_was() -> None:
    grid = torch.rand(1, 4, 5, 2, dtype=torch.float64) * 2.2 - 1.1
    sample = lambda x: F.grid_sample(x, grid, align_corners=False)  # noqa: E731
    for function, domain in ((sample, (1, 1, 6, 7)), (Rays(), (7, 7))):
        A = mapped(function, al.TensorSpec(domain, torch.float64))
        for B, f in ((A, function), (A.H, lambda y, f=function, A=A: eager(f, A.domain.zeros(), y))):
            x = B.domain.randn()
            x.view(-1)[0] = torch.nan
            with torch.no_grad():
                assert torch.equal(B(x).isnan(), f(x).isnan())


def test_pools_before_samples() -> None:
    grid = torch.rand(1, 3, 4, 2, dtype=torch.float64) * 2 - 1
    sample = lambda x: F.grid_sample(F.avg_pool2d(x, 2), grid, align_corners=False)  # noqa: E731
    A = mapped(sample, al.TensorSpec((1, 1, 8, 8), torch.float64))
    assert_same(A, sample)
    assert {"avg_pool2d" in line for line in lines(A)} == {True, False}


FLAT = al.TensorSpec((9,), torch.float64)
PLACES = torch.tensor([4, 0, -1, 4])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[PLACES] / torch.tensor([3, 2, 1, 7]),
        lambda x: torch.add(x[PLACES], x[PLACES.flip(0)], alpha=0.1),
        lambda x: x[PLACES] * torch.ones(4, dtype=torch.float32),
        lambda x: x[PLACES].sum(dtype=torch.float64),
        lambda x: torch.where(torch.tensor([True, False, True, True]), x[PLACES], torch.zeros(4, dtype=torch.int64)),
        lambda x: torch.cat([x, torch.zeros(3, dtype=torch.float64)])[PLACES],
        lambda x: x[PLACES] - x[PLACES.flip(0)],
        lambda x: x[PLACES].expand(3, 4).mean((0, 1)),
        lambda x: x[PLACES] * 1j,
        lambda x: (x[PLACES] * 1j)[PLACES % 4],
        lambda x: x.float()[PLACES].double(),
        lambda x: F.embedding(PLACES % 3, x.reshape(3, 3)),
    ],
)
def test_arithmetic_is_that_of_pytorch(function: Callable[[Tensor], Tensor]) -> None:
    A = mapped(function, FLAT)
    x = A.domain.randn()
    assert A.engine == "traced"
    assert_close(A(x), function(x), A.codomain.eps)
    al.assert_adjoint(A)


def test_numbers_beside_the_input_that_were_zero() -> None:
    for dtype in (torch.int64, torch.float64):
        beside, mask = torch.zeros(9, dtype=dtype), torch.arange(9) % 2 == 0
        A = operator_of(lambda x, b=beside, m=mask: torch.where(m, x, b)[PLACES])
        x = A.domain.randn()
        beside.fill_(41)
        assert_close(A(x), torch.where(mask, x, beside)[PLACES], 1e-15)


def operator_of(function: Callable[[Tensor], Tensor]) -> al.AffineOperator:
    return affine(function, FLAT, None, choose_map=first_way)


@pytest.mark.parametrize(
    ("function", "state"),
    [
        (lambda x, w: x[:, :, [3, 0, 1]] * w, torch.ones(2, 3, 1)),
        (
            lambda x, w: F.grid_sample(x.unsqueeze(2), w.expand(2, 1, 4, 2), align_corners=False),
            torch.zeros(2, 1, 1, 2),
        ),
        (lambda x, w: x[:, :, [3, 0, 1]] * w, torch.zeros(2, 3, 1)),
    ],
)
def test_what_was_the_same_along_the_batch_may_differ(function: Callable[..., Tensor], state: Tensor) -> None:
    state = state.double()
    apply = lambda x: function(x, state)  # noqa: E731
    A = mapped(apply, al.TensorSpec((2, 3, 4), torch.float64))
    assert_same(A, apply)
    state.copy_(torch.rand(state.shape, generator=torch.Generator().manual_seed(0)) - 0.5)
    for _ in range(3):
        assert_same(A, apply)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 1e30])
@needs_torch("2.10", "grid_sample reads outside of the image at such numbers, which ends the process")
def test_grids_with_extreme_numbers(dims: int, mode: str, padding: str, number: float) -> None:
    if mode == "bicubic" and dims == 3:
        pytest.skip("PyTorch has none")
    draw = torch.Generator().manual_seed(0)
    grid = torch.rand(1, *(3, 4, 5)[:dims], dims, dtype=torch.float64, generator=draw) * 2 - 1
    sample = lambda x: F.grid_sample(x, grid, mode, padding, align_corners=False)  # noqa: E731
    A = mapped(sample, al.TensorSpec((1, 2, *(5, 4, 6)[:dims]), torch.float64))
    x = A.domain.randn()
    grid.view(-1)[3] = number
    with torch.no_grad():
        assert torch.allclose(A(x), sample(x), rtol=1e-13, equal_nan=True)


def test_a_state_that_changes_while_its_map_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from adjointlab.transpose.passes import maps_by_index as maps

    rays, made = Rays(), maps._matrix
    A = mapped(rays, (7, 7))

    def slowly(*arguments: Any) -> Tensor:
        matrix = made(*arguments)
        with torch.no_grad():
            rays.weights.fill_(0.5)  # as another thread might
        return matrix

    monkeypatch.setattr(maps, "_matrix", slowly)
    x = A.domain.randn()
    with torch.no_grad():
        rays.weights.fill_(3)
        A(x)
        assert_close(A(x), rays(x), 1e-15)


def test_solvers_of_a_map_that_changes_at_every_step() -> None:
    rays = Rays()
    A = mapped(rays, (7, 7))
    for _ in range(6):
        with torch.no_grad():
            rays.weights.normal_()
        y = A.codomain.randn()
        found = al.solvers.cgls(A, y, maxiter=20, tol=1e-12).x
        assert_close(rays(found), y, 1e-9)


def test_gradients_of_least_squares_have_both_maps() -> None:
    rays = Rays()
    A = mapped(rays, (7, 7))
    x, y = A.domain.randn(), A.codomain.randn()
    objective = al.LeastSquares(A, y)
    assert_close(objective.gradient(x), A.H(A(x) - y), 1e-15)
    forward, adjoint = (A.source.nominal.graphs[name] for name in ("function", "adjoint"))
    graph = maps_by_index(residual_and_gradient(forward, adjoint, weighted=False, residual=False), first_way)
    assert sum("sparse map" in line for line in kernels_of(graph)) == 2


@pytest.mark.parametrize("layout", ["COO", "CSR", "CSC", "BSR"])
def test_sparse_matrices_in_a_forward(layout: str) -> None:
    draw = torch.Generator().manual_seed(0)
    dense = torch.randn(8, 12, dtype=torch.float64, generator=draw) * (torch.rand(8, 12, generator=draw) < 0.4)
    make = {"COO": Tensor.to_sparse, "CSR": Tensor.to_sparse_csr, "CSC": Tensor.to_sparse_csc}
    sparse = dense.to_sparse_bsr((4, 4)) if layout == "BSR" else make[layout](dense)
    for product, domain in ((lambda x: sparse @ x, (12,)), (lambda x: sparse @ x.reshape(12, -1), (3, 4, 2))):
        A = mapped(product, al.TensorSpec(domain, torch.float64))
        assert [line.startswith("kernel: sparse map") for line in lines(A)] == [True, True]
        x, y = A.domain.randn(), A.codomain.randn()
        assert_close(A(x), dense @ x.reshape(12, *y.shape[1:]), 1e-15)
        assert_close(A.H(y), (dense.mT @ y).reshape(domain), 1e-15)
    values = sparse._values() if layout == "COO" else sparse.values()
    values.mul_(3)
    assert_close(A.H(y), 3 * (dense.mT @ y).reshape(domain), 1e-15)
