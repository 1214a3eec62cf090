"""Sparse matrices in a forward: traced where a module or a name holds them, and followed as they change."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from built import first_way, operator
from laws import assert_close
from torch import Tensor, nn

import adjointlab as al

# Torch warns once in a process that makes sparse tensors.
pytestmark = [
    pytest.mark.cpu,
    *[pytest.mark.filterwarnings(f"ignore:Sparse {what}") for what in ("CS[CR] tensor", "invariant checks")],
]
LAYOUTS = {"COO": torch.sparse_coo, "CSR": torch.sparse_csr, "CSC": torch.sparse_csc}


def drawn(seed: int, layout: str = "CSR", *, shape: tuple[int, int] = (6, 5)) -> Tensor:
    """Return a sparse matrix with two entries in each row."""
    draw = torch.Generator().manual_seed(seed)
    places = torch.stack([torch.randperm(shape[1], generator=draw)[:2] for _ in range(shape[0])])
    dense = torch.zeros(shape, dtype=torch.float64).scatter(
        1, places, torch.randn(shape[0], 2, generator=draw).double()
    )
    return dense.to_sparse(layout=LAYOUTS[layout])


class Holding(nn.Module):
    """A product with a buffer."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix @ x


def assert_is(A: al.LinearOperator, dense: Tensor) -> None:
    x, y = A.domain.randn(), A.codomain.randn()
    assert_close(A(x), dense @ x, 1e-15)
    assert_close(A.H(y), dense.mT @ y, 1e-15)


def replaced_values_and_places(matrix: Tensor, other: Tensor) -> None:
    matrix.copy_(other)


def replaced_data(matrix: Tensor, other: Tensor) -> None:
    matrix.data = other


def moved_places(matrix: Tensor, other: Tensor) -> None:
    read = {
        torch.sparse_coo: Tensor._indices,
        torch.sparse_csr: Tensor.col_indices,
        torch.sparse_csc: Tensor.row_indices,
    }
    read[matrix.layout](matrix).copy_(read[matrix.layout](other))


def loaded(matrix: Tensor, other: Tensor) -> None:
    Holding(matrix).load_state_dict({"matrix": other})


@pytest.mark.parametrize("choose_map", [None, first_way], ids=["gathers", "maps"])
@pytest.mark.parametrize("layout", ["COO", "CSR"])
@pytest.mark.parametrize("change", [replaced_values_and_places, replaced_data, moved_places, loaded])
def test_other_places_in_the_same_tensor(change: Callable[..., None], layout: str, choose_map: Any) -> None:
    matrix = drawn(0, layout)
    options = {} if choose_map is None else {"choose_map": choose_map}
    A = operator(Holding(matrix), al.TensorSpec((5,), torch.float64), None, **options)
    assert A.engine == "traced"
    assert_is(A, matrix.to_dense())
    change(matrix, drawn(1, layout))
    assert_is(A, matrix.to_dense())
    matrix.copy_(drawn(2, layout))
    assert_is(A, matrix.to_dense())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_takes_the_place_of_a_matrix(layout: str) -> None:
    module = Holding(drawn(0, layout))
    A = al.linear_operator(module, al.TensorSpec((5,), torch.float64))
    for other in (drawn(1, layout), drawn(2, "COO"), drawn(3).to_dense(), drawn(4, layout)):
        module.matrix = other
        assert_is(A, other if other.layout is torch.strided else other.to_dense())


S = drawn(0)
HELD = types.SimpleNamespace(S=drawn(0), scale=2.0)
TABLE: dict[str, Any] = {"S": drawn(0), "scale": 2.0}


def test_names_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, scale = drawn(0), 2.0

    def by_closure(x: Tensor) -> Tensor:
        return scale * (inner @ x)

    cases: list[tuple[Callable[[Tensor], Tensor], Callable[[], Any]]] = [
        (by_closure, lambda: by_closure.__closure__[0].cell_contents),
        (lambda x: S @ x, lambda: S),
        (lambda x: HELD.scale * (HELD.S @ x), lambda: HELD.scale * HELD.S.to_dense()),
        (lambda x: TABLE["scale"] * (TABLE["S"] @ x), lambda: TABLE["scale"] * TABLE["S"].to_dense()),
    ]
    operators = [al.linear_operator(function, al.TensorSpec((5,), torch.float64)) for function, _ in cases]
    assert {A.engine for A in operators} == {"traced"}
    inner, scale = drawn(1), 3.0
    monkeypatch.setitem(globals(), "S", drawn(1))
    monkeypatch.setattr(HELD, "S", drawn(1))
    monkeypatch.setattr(HELD, "scale", 3.0)
    monkeypatch.setitem(TABLE, "S", drawn(1))
    monkeypatch.setitem(TABLE, "scale", 3.0)
    for A, factor in zip(operators, (3, 1, 3, 3), strict=True):
        assert_is(A, factor * drawn(1).to_dense())


def test_a_matrix_that_nobody_holds_is_left_to_pytorch() -> None:
    places = torch.tensor([[0, 1, 5], [4, 2, 0]])

    def made_at_each_call(x: Tensor) -> Tensor:
        return torch.sparse_coo_tensor(places, torch.ones(3, dtype=x.dtype), (6, 5)) @ x

    assert al.linear_operator(made_at_each_call, al.TensorSpec((5,), torch.float64)).engine == "eager"


def test_values_that_are_learned_and_not_coalesced_have_a_gradient() -> None:
    weight = nn.Parameter(drawn(0, "COO"))
    A = al.matrix(weight)
    x, y = A.domain.randn(), A.codomain.randn()
    (A(x) @ y).backward()
    torch.optim.SGD([weight], lr=0.1).step()
    assert not weight.is_coalesced()
    for value in (A(x) @ y, A.H(y) @ x):
        (gradient,) = torch.autograd.grad(value, [weight])
        expected = torch.outer(y, x) * (gradient.to_dense() != 0)
        assert_close(gradient.to_dense(), expected, 1e-15)
        assert gradient.to_dense().count_nonzero() == 12
    assert_is(A, weight.detach().to_dense())


def test_in_inference_mode_nothing_is_kept_that_has_no_gradient() -> None:
    module = Holding(drawn(0))
    A = al.linear_operator(module, al.TensorSpec((5,), torch.float64))
    module.matrix = drawn(1)
    with torch.inference_mode():
        A(torch.ones(5, dtype=torch.float64))
    x = torch.ones(5, dtype=torch.float64, requires_grad=True)
    A(x).sum().backward()
    assert_close(x.grad, drawn(1).to_dense().sum(0), 1e-15)


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_adjoints_in_inference_mode(engine: str) -> None:
    matrix = drawn(0)
    A = al.linear_operator(lambda x: matrix @ x, al.TensorSpec((5,), torch.float64), engine=engine)
    y = A.codomain.randn()
    with torch.inference_mode():
        found, inside = A.H(y), A.H(y.clone())
    assert_close(found, matrix.to_dense().mT @ y, 1e-15)
    assert_close(inside, found, 1e-15)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transforms(layout: str) -> None:
    matrix = drawn(0, layout)
    A = al.linear_operator(lambda x: matrix @ x, al.TensorSpec((5,), torch.float64))
    x, dense = torch.randn(4, 5, dtype=torch.float64), matrix.to_dense()
    assert_close(torch.vmap(A)(x), x @ dense.mT, 1e-15)
    assert_close(torch.func.jvp(A, (x[0],), (x[1],))[1], dense @ x[1], 1e-15)
    assert_close(torch.func.vjp(A, x[0])[1](A(x[1]))[0], dense.mT @ dense @ x[1], 1e-15)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_columns_are_columns(layout: str) -> None:
    matrix = drawn(0, layout)
    A = operator(lambda x: matrix @ x, al.TensorSpec((5, 3), torch.float64), None, choose_map=first_way)
    assert "sparse map 6 × 5 with 12 entries" in str(A.explain())
    assert_is(A, matrix.to_dense())
