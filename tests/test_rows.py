"""Rows of operators: ``A.rows(i) x = (A x)[i]``, whatever A is made of; alive, differentiable, and no more work."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import scipy.sparse as ss
import torch
from laws import assert_close, dot_error, draw
from torch import Tensor, nn

import adjointlab as al
from adjointlab import LinearOperator, Space
from adjointlab.space.selection import selection

INDICES: dict[str, Any] = {
    "a slice": slice(1, 5, 2),
    "a slice backwards": slice(None, None, -1),
    "a list": [4, 0, 4, -1],
    "a tensor": torch.tensor([3, 1]),
    "a range": range(2, 4),
    "a mask": torch.tensor([True, False, True, True, False, False]),
    "an array": ss.eye(6).tocsr().indices[:2],
    "rows of blocks": [0, 1, 3, 4],
    "one row": 2,
    "the last row": -1,
}


class Fan(nn.Module):
    """A convolution, a product with a buffer and a sum, with six rows that know nothing of each other."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 6, 3, padding=1, bias=False, dtype=dtype)
        self.register_buffer("mask", torch.rand(6, 7, dtype=dtype, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x)[0] * self.mask).roll(2, 1)


def fan(**options: Any) -> tuple[Fan, al.LinearOperator]:
    torch.manual_seed(0)
    module = Fan()
    return module, al.linear_operator(module, (1, 1, 7), **options)


shared = functools.cache(fan)  # for tests that leave it as it is


def indexed(y: Tensor, index: Any, dim: int) -> Tensor:
    if (isinstance(index, slice) and (index.step or 1) < 0) or isinstance(index, range):
        index = list(range(y.shape[dim])[index]) if isinstance(index, slice) else list(index)
    return y[(slice(None),) * dim + (index,)]


def assert_rows(part: Any, A: Any, index: Any, dim: int = 0) -> None:
    """Assert that a part is rows of A, and that its adjoint is theirs."""
    x, eps = draw(A.domain), A.domain.eps
    assert_close(part(x), indexed(A(x), index, dim), eps)
    v = draw(part.codomain, 1)
    among = torch.zeros_like(A(x)).requires_grad_()
    (zeros,) = torch.autograd.grad(indexed(among, index, dim), among, v)
    assert_close(part.H(v), A.H(zeros), eps, factor=64)
    assert dot_error(part, part.H, x, v, real=True) <= 16 * eps


@pytest.mark.parametrize("name", INDICES)
def test_every_kind_of_index(name: str) -> None:
    index, y = INDICES[name], draw(al.Space.of((2, 6, 3)))
    rows = selection(index, 1, al.Space.of((2, 6, 3)))
    assert torch.equal(rows(y), indexed(y, index, 1))
    v = draw(rows.of(al.Space.of((2, 6, 3))), 1)
    assert (
        abs(torch.vdot(rows(y).reshape(-1), v.reshape(-1)) - torch.vdot(y.reshape(-1), rows.scattered(v).reshape(-1)))
        < 1e-5
    )


@pytest.mark.parametrize(("index", "dim"), [([4, 0, 4, -1], 0), (slice(1, 5, 2), 0), (2, 0), ([6, 0], -1)])
def test_rows_and_their_adjoint(index: Any, dim: int) -> None:
    _, A = shared()
    assert_rows(A.rows(index, dim), A, index, dim % 2)


@pytest.mark.parametrize("engine", ["eager", "traced"])
def test_engines(engine: str) -> None:
    _, A = fan(engine=engine)
    part = A.rows([1, 4])
    assert part.engine == engine
    assert_rows(part, A, [1, 4])
    said = "selected from the whole result" if engine == "eager" else "computed by themselves"
    assert f"rows 1:5:3 along dimension 0: {said}" in part.explain()


def test_what_is_computed_whole_is_said() -> None:
    A = al.linear_operator(lambda x: x.cumsum(0), (6,))
    assert "but for what is computed whole: cumsum" in A.rows([0, 3]).explain()


def test_only_these_rows_are_computed() -> None:
    _, A = shared()
    part = A.rows([1, 2])
    shapes = [
        node.meta["val"].shape for node in part.source.nominal.graphs["linear"].body.nodes if node.op == "call_function"
    ]
    assert all(shape.numel() <= 2 * 7 for shape in shapes)


def test_split_is_all_rows_in_order() -> None:
    _, A = shared()
    x, parts = draw(A.domain), A.split(4)
    assert [len(part.codomain.zeros()) for part in parts] == [2, 2, 1, 1]
    assert_close(torch.cat([part(x) for part in parts]), A(x), A.domain.eps)
    y = draw(A.codomain)
    assert_close(
        sum(part.H(v) for part, v in zip(parts, y.tensor_split(4), strict=True)), A.H(y), A.domain.eps, factor=64
    )


def test_rows_of_rows() -> None:
    _, A = shared()
    part = A.rows([5, 3, 1]).rows([2, 0])
    assert_rows(part, A, [1, 5])
    assert "of these" in part.explain()


def test_state_is_followed() -> None:
    module, A = fan()
    part = A.rows([4, 1])
    with torch.no_grad():
        module.conv.weight.mul_(2)
    module.mask = module.mask + 1
    assert_rows(part, A, [4, 1])
    module.conv = nn.Conv1d(1, 6, 3, padding=1, bias=False, dtype=torch.float64)
    assert_rows(part, A, [4, 1])
    assert torch.equal(part(draw(A.domain)), module(draw(A.domain))[[4, 1]])


class Masked(nn.Module):
    """A product with a buffer, of which rows are read apart."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.rand(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return self.mask * x


CHANGES: dict[str, Callable[[Masked], Any]] = {
    "in place": lambda m: m.mask.mul_(2),
    "through .data": lambda m: m.mask.data.mul_(2),
    "through NumPy": lambda m: m.mask.numpy().__imul__(2),
    "other memory": lambda m: setattr(m.mask, "data", 2 * m.mask),
    "memory that is freed": lambda m: [setattr(m.mask, "data", k * torch.ones_like(m.mask)) for k in range(1, 9)],
    "set_": lambda m: m.mask.set_(3 * m.mask),
    "another tensor": lambda m: setattr(m, "mask", 2 * m.mask),
    "load_state_dict": lambda m: m.load_state_dict({"mask": 2 * m.mask}),
    "load_state_dict, assigned": lambda m: m.load_state_dict({"mask": 2 * m.mask}, assign=True),
    "other strides": lambda m: setattr(m.mask, "data", (2 * m.mask).T.contiguous().T),
}


@pytest.mark.parametrize("index", [slice(1, 6, 2), slice(2, 5), [5, 0, 1], 3])
@pytest.mark.parametrize("change", CHANGES)
def test_rows_of_the_state_are_as_the_state_is(change: str, index: Any) -> None:
    module, x = Masked(), torch.ones(1, 7, dtype=torch.float64)
    part = al.linear_operator(module, x).rows(index)
    part(x), part.H(part(x))  # rows of the state are known by now
    CHANGES[change](module)
    for _ in range(2):
        assert torch.equal(part(x), module.mask[index])
        assert torch.equal(part.H(part(x)), (module.mask[index] ** 2).reshape(-1, 7).sum(0, keepdim=True))
        module.mask.mul_(2)


def test_rows_of_the_state_are_not_taken_again() -> None:
    part = al.linear_operator(Masked(), torch.ones(1, 7, dtype=torch.float64)).rows(slice(0, None, 2))
    (rows,) = [source for source in part.source.nominal.state if source.name.startswith("rows")]
    assert rows.read() is rows.read()


def test_parameters_are_shared_and_learned() -> None:
    module, A = fan()
    part = A.rows([4, 1])
    assert {id(p) for p in part.parameters()} == {id(p) for p in A.parameters()}
    x, v = draw(part.domain), draw(part.codomain, 1)
    for function, given in ((part, x), (part.H, v)):
        (found,) = torch.autograd.grad(function(given).square().sum(), module.conv.weight)
        whole = (
            indexed(A(x), [4, 1], 0)
            if function is part
            else A.H(torch.zeros(6, 7, dtype=v.dtype).index_add(0, torch.tensor([4, 1]), v))
        )
        (expected,) = torch.autograd.grad(whole.square().sum(), module.conv.weight)
        assert_close(found, expected, A.domain.eps, factor=64)


def test_batch_dimensions_are_free_and_no_rows() -> None:
    A = al.linear_operator(nn.Conv1d(2, 4, 3, bias=False), (1, 2, 6), batch_dims=1)
    part = A.rows([3, 0], dim=1)
    x = torch.randn(5, 2, 6)
    assert_close(part(x), A(x)[:, [3, 0]], A.domain.eps)
    assert part.H(part(x)).shape == x.shape
    with pytest.raises(al.SpaceMismatchError, match="behind the 1 of the batch"):
        A.rows([0])


def test_affine_operators() -> None:
    f = al.affine_operator(nn.Linear(3, 6, dtype=torch.float64), (3,))
    part = f.rows([5, 0])
    x = draw(f.domain)
    assert_close(part(x), f(x)[[5, 0]], f.domain.eps)
    assert_close(part.offset, f.offset[[5, 0]], f.domain.eps)
    assert_rows(part.linear, f.linear, [5, 0])
    assert_rows(f.linear.rows([5, 0]), f.linear, [5, 0])
    assert_close(torch.cat([p(x) for p in f.split(3)]), f(x), f.domain.eps)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
def test_copies(clone: Callable[[Any], Any]) -> None:
    _, A = shared()
    part = A.rows([4, 1])
    again = clone(part)
    x = draw(A.domain)
    assert torch.equal(again(x), part(x))
    with torch.no_grad():
        next(again.parameters()).zero_()
    assert not again(x).any()
    assert part(x).any()


def test_they_move() -> None:
    _, A = fan()
    part = A.rows([4, 1]).to(torch.float32)
    assert part(torch.ones(1, 1, 7)).dtype == part.H(torch.ones(2, 7)).dtype == torch.float32


def test_the_algebra_takes_rows_of_its_parts() -> None:
    M, N = (torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    A, C = (LinearOperator(m.mv, m.mT.mv, *map(Space.of, (m[0], m[:, 0]))) for m in (M, N))
    B, D = al.diagonal(draw(A.domain)), al.diagonal(draw(A.codomain))
    products = (A @ B, A + 2 * C, A - A @ B, A / 3, A * 2, -A, D @ A, A.H.T @ B, (B.H @ A.H).H, (A.H + C.H).H)
    for whole in (*products, A.H @ A, A.H, A.T, (A @ B).H, (A + C).H, (2 * A).H, (A / torch.tensor(2.0)).H):
        rows = [2, 0] if len(whole.codomain.zeros()) == 3 else [4, 1]
        part = whole.rows(rows)
        assert_rows(part, whole, rows)
        assert f"rows {rows} along dimension 0" in part.explain()
    for part in (A @ B).rows([4, 1]).parts:
        assert part.codomain.size <= 3  # and not the product first


def test_pairs_are_selected_after() -> None:
    A = al.from_pair(lambda x: torch.cat([x, 2 * x]), lambda y: y[:3] + 2 * y[3:], (3,), (6,))
    part = A.rows([4, 1])
    assert_rows(part, A, [4, 1])
    assert "rows [4, 1] along dimension 0" in str(part)
    assert torch.equal(
        pickle.loads(pickle.dumps(al.identity((6,)).rows([4, 1])))(torch.arange(6.0)), torch.tensor([4.0, 1.0])
    )


@pytest.mark.parametrize("layout", ["dense", "coo", "csr"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_matrices_lose_their_other_rows(layout: str) -> None:
    dense = torch.where(torch.rand(8, 5, generator=torch.Generator().manual_seed(0)) > 0.6, 1.0, 0.0).double()
    dense[3], dense[:, 2] = 0, 3
    dense[3] = 0
    M = {"dense": dense, "coo": dense.to_sparse(), "csr": dense.to_sparse_csr()}[layout]
    A = al.matrix(M, domain=(5,), codomain=(2, 4))
    for rows, dim in (([1], 0), ([3, 0], 1)):
        part = A.rows(rows, dim)
        assert_rows(part, A, rows, dim)
        assert "whole" not in part.explain()
    if layout != "dense":  # other places of the entries are seen
        values = M.values()
        values.mul_(2)
        assert_rows(part, A, [3, 0], 1)


def test_errors_say_what_was_expected() -> None:
    _, A = shared()
    for index, said in (
        ([6], "rows from -6 to 5 along dimension 0, which has 6 of them, got 6"),
        (-7, "got -7"),
        ([], "at least one of the 6 rows"),
        (slice(3, 3), "at least one of the 6 rows"),
        (torch.tensor([True, False]), "a mask of 6 entries"),
        ([0.5], "a list or tensor of integers"),
        ([[0, 1]], "all of one dimension"),
        (None, "got NoneType"),
        ({0, 1}, "got set"),
        (torch.tensor([1, 0], dtype=torch.uint8), "a list or tensor of integers"),
        ("rows", "a slice, a list or tensor of integers"),
        (True, "got bool"),
        (1.0, "got float"),
    ):
        with pytest.raises(IndexError, match=said):
            A.rows(index)
    for dim in (2, -3):
        with pytest.raises(al.SpaceMismatchError, match=r"expected a dimension of the shape \(6, 7\)"):
            A.rows([0], dim)
    for n in (0, 7, True, 2.0):
        with pytest.raises(ValueError, match="a number of pieces from 1 to 6"):
            A.split(n)  # type: ignore[arg-type]
    with pytest.raises(al.SpaceMismatchError, match="a codomain of one tensor"):
        al.vstack([A, A]).rows([0])
    with pytest.raises(al.SpaceMismatchError, match="a dimension of the shape"):
        al.linear_operator(torch.sum, (3,)).rows([0])


def test_an_index_is_as_it_was_given() -> None:
    _, A = shared()
    index, mask = torch.tensor([1, 2]), torch.zeros(6, dtype=torch.bool)
    mask[3] = True
    first, second = A.rows(index), A.rows(mask)
    index.zero_()
    mask.fill_(True)
    assert_rows(first, A, [1, 2])
    assert_rows(second, A, [3])


def test_functions_with_attributes_of_these_names_are_what_they_are() -> None:
    class Chosen:
        selection = "mine"

        def __call__(self, x: Tensor) -> Tensor:
            return torch.ops.aten.neg(x) * SCALE

    ops, SCALE = torch.ops, torch.full((3,), 2.0)
    before = set(vars(ops))
    A = al.linear_operator(Chosen(), (3,), engine="eager")
    assert "a Chosen" in repr(A)
    assert A.rows([2])(torch.ones(3)).tolist() == [-2.0]
    assert set(vars(ops)) == before
