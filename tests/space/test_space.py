"""Spaces: what is an element, the inner product, coordinates."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from laws import distance, draw, inner, leaves, norm

import adjointlab as al

SPACES = {
    "real": al.Space.of((2, 3), dtype=torch.float64),
    "single": al.Space.of((2, 3), dtype=torch.float32),
    "complex": al.Space.of((2, 3), dtype=torch.complex128),
    "scalar": al.Space.of(torch.zeros((), dtype=torch.float64)),
    "tuple": al.Space.of(((2, 3), (4,)), dtype=torch.float64),
    "mixed": al.Space.of({"c": torch.zeros(3, dtype=torch.complex128), "r": [torch.zeros(2, dtype=torch.float64)]}),
    "half": al.Space.of((4,), dtype=torch.bfloat16),
    "batched": al.Space.of((2, 3), dtype=torch.float64, batch_dims=1),
}

every_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())


@every_space
def test_random_elements_are_elements(space: al.Space) -> None:
    space.check(draw(space))
    space.check(space.zeros())


@every_space
def test_random_elements_follow_the_generator(space: al.Space) -> None:
    assert distance(draw(space, 3), draw(space, 3)) == 0
    assert distance(draw(space, 3), draw(space, 4)) > 0


@every_space
def test_a_generator_leaves_the_global_one_alone(space: al.Space) -> None:
    state = torch.random.get_rng_state()
    draw(space)
    assert torch.equal(torch.random.get_rng_state(), state)


@every_space
def test_what_is_printed_makes_the_same_space(space: al.Space) -> None:
    again = eval(repr(space), {"torch": torch, "Space": al.Space, "TensorSpec": al.TensorSpec})
    assert again == space
    assert [spec.shape for spec in again.specs] == [spec.shape for spec in space.specs]


def test_what_is_printed_makes_the_same_space_where_the_default_device_is_another() -> None:
    names = {"torch": torch, "Space": al.Space, "TensorSpec": al.TensorSpec}
    for space in (al.Space.of((2, 3)), al.Space.of({"a": torch.zeros(()), "b": torch.zeros(2)})):
        with torch.device("meta"):
            assert eval(repr(space), names) == space
            assert eval(repr(al.Space.of((2,))), names) != al.Space.of((2,), device="cpu")


@every_space
def test_zero_has_norm_zero(space: al.Space) -> None:
    assert float(space.norm(space.zeros())) == 0


@every_space
def test_inner_product_is_the_definition(space: al.Space) -> None:
    a, b = draw(space, 1), draw(space, 2)
    assert abs(complex(space.inner(a, b)) - inner(a, b)) <= 16 * torch.finfo(torch.float64).eps * norm(a) * norm(b)


@every_space
def test_inner_product_is_hermitian(space: al.Space) -> None:
    a, b = draw(space, 1), draw(space, 2)
    gap = complex(space.inner(a, b)) - complex(space.inner(b, a)).conjugate()
    assert abs(gap) <= 16 * torch.finfo(torch.float64).eps * norm(a) * norm(b)


@every_space
def test_inner_product_is_a_double_scalar(space: al.Space) -> None:
    value = space.inner(draw(space), draw(space))
    assert value.shape == ()
    assert value.dtype == (torch.complex128 if space.is_complex else torch.float64)


@every_space
def test_norm_comes_from_the_inner_product(space: al.Space) -> None:
    a = draw(space)
    square = complex(space.inner(a, a)).real
    assert abs(float(space.norm(a)) ** 2 - square) <= 16 * torch.finfo(torch.float64).eps * square
    assert space.norm(a).dtype == torch.float64


@every_space
def test_vector_and_element_are_inverse(space: al.Space) -> None:
    a = draw(space)
    assert space.vector(a).shape == (space.size,)
    assert distance(space.element(space.vector(a)), a) == 0


@every_space
def test_size_counts_entries(space: al.Space) -> None:
    assert space.size == sum(leaf.numel() for leaf in leaves(space.zeros()))


@every_space
def test_space_of_an_element_is_the_space(space: al.Space) -> None:
    assert al.Space.of(draw(space), batch_dims=space.batch_dims) == space
    assert al.Space.of(space) == space
    assert hash(al.Space.of(space)) == hash(space)


@every_space
def test_copies_are_equal(space: al.Space) -> None:
    assert copy.deepcopy(space) == space
    assert pickle.loads(pickle.dumps(space)) == space


def test_spaces_differ_by_shape_dtype_structure_and_batch_dims() -> None:
    assert len(set(map(repr, SPACES.values()))) == len(SPACES)
    spaces = list(SPACES.values())
    assert all((a == b) == (a is b) for a in spaces for b in spaces)


def test_inner_product_is_conjugate_in_its_first_argument() -> None:
    space = al.Space.of((1,), dtype=torch.complex128)
    i, one = torch.tensor([1j], dtype=torch.complex128), torch.ones(1, dtype=torch.complex128)
    assert complex(space.inner(i, one)) == -1j


def test_inner_product_is_accumulated_in_double() -> None:
    space = al.Space.of((3,), dtype=torch.float32)
    a = torch.tensor([1e8, 1.0, -1e8])
    assert float(space.inner(a, torch.ones(3))) == 1


def test_norm_does_not_overflow_the_dtype() -> None:
    space = al.Space.of((2,), dtype=torch.float16)
    a = torch.full((2,), 6e4, dtype=torch.float16)
    assert float(space.norm(a)) == pytest.approx(2**0.5 * float(a[0]), rel=16 * torch.finfo(torch.float64).eps)


def test_eps_is_that_of_the_coarsest_leaf() -> None:
    assert SPACES["single"].eps == torch.finfo(torch.float32).eps
    assert al.Space.of((torch.zeros(1), torch.zeros(1, dtype=torch.float64))).eps == torch.finfo(torch.float32).eps
    assert SPACES["complex"].eps == torch.finfo(torch.float64).eps


def test_complex_entries_have_unit_variance() -> None:
    a = draw(al.Space.of((20000,), dtype=torch.complex128))
    # The mean of n independent |a|², each of variance 1, lies within 6 standard deviations of 1.
    assert abs(float(a.abs().square().mean()) - 1) < 6 / 20000**0.5
    assert abs(float(a.real.square().mean()) - 0.5) < 6 / 20000**0.5


def test_spec_is_frozen() -> None:
    spec = al.TensorSpec((2, 3), torch.float32, torch.device("cpu"))
    with pytest.raises(dataclasses.FrozenInstanceError, match="shape"):
        spec.shape = (1,)


def test_space_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="specs"):
        SPACES["real"].specs = ()


def test_dtype_of_a_shape_defaults_to_torchs() -> None:
    assert al.Space.of((2,)).specs[0].dtype == torch.get_default_dtype()


def test_examples_values_are_ignored() -> None:
    assert al.Space.of(torch.full((2,), torch.nan)) == al.Space.of(torch.zeros(2))


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        1.0,
        "text",
        [torch.zeros(2, 3, dtype=torch.float64)],
        (torch.zeros(2, 3, dtype=torch.float64),),
        {"x": torch.zeros(2, 3, dtype=torch.float64)},
        torch.zeros(3, 2, dtype=torch.float64),
        torch.zeros(6, dtype=torch.float64),
        torch.zeros(1, 2, 3, dtype=torch.float64),
        torch.zeros(2, 3),
        torch.zeros(2, 3, dtype=torch.complex128),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(2, 3, dtype=torch.float64, device="meta"),
        torch.zeros(2, 3, dtype=torch.float64).to_sparse(),
    ],
    ids=lambda value: (
        type(value).__name__ + (f"-{value.dtype}-{tuple(value.shape)}" if hasattr(value, "dtype") else "")
    ),
)
def test_what_is_not_an_element_is_refused(wrong) -> None:
    with pytest.raises(al.SpaceMismatchError, match=r"expected x to be an element of .* got"):
        SPACES["real"].check(wrong)


@pytest.mark.parametrize("method", ["inner", "norm", "vector"])
def test_geometry_refuses_what_is_not_an_element(method: str) -> None:
    arguments = (torch.zeros(2),) * (2 if method == "inner" else 1)
    with pytest.raises(al.SpaceMismatchError, match="to be an element"):
        getattr(SPACES["real"], method)(*arguments)


@pytest.mark.parametrize(
    "domain",
    [None, "text", 3, [], (), {}, [None], (2.5, 3), {"a": 1.0}, torch.zeros(3, dtype=torch.int32)],
    ids=str,
)
def test_what_is_not_a_space_is_refused(domain) -> None:
    with pytest.raises(al.SpaceMismatchError, match="expected"):
        al.Space.of(domain)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (-1, 2)], ids=str)
def test_empty_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(al.SpaceMismatchError, match="expected"):
        al.Space.of(shape)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8], ids=str)
def test_integer_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(al.SpaceMismatchError, match="floating-point or complex"):
        al.Space.of((2, 3), dtype=dtype)


@pytest.mark.parametrize("batch_dims", [-1, 3, 1.5, True], ids=str)
def test_impossible_batch_dims_are_refused(batch_dims) -> None:
    with pytest.raises(al.SpaceMismatchError, match="batch"):
        al.Space.of((2, 3), batch_dims=batch_dims)


def test_batched_spaces_take_any_size_in_front() -> None:
    SPACES["batched"].check(torch.zeros(7, 3, dtype=torch.float64))
    with pytest.raises(al.SpaceMismatchError, match="element"):
        SPACES["batched"].check(torch.zeros(2, 4, dtype=torch.float64))


def test_errors_are_the_builtin_kinds() -> None:
    assert issubclass(al.SpaceMismatchError, ValueError)
    assert issubclass(al.NotLinearError, ValueError)
    assert issubclass(al.NotDifferentiableError, RuntimeError)
    assert issubclass(al.AdjointMismatchError, AssertionError)


def test_dictionaries_may_be_filled_in_any_order() -> None:
    A = al.linear_operator(lambda d: {"p": 2 * d["a"], "q": 3 * d["b"]}, {"a": (2,), "b": (3,)})
    assert A({"b": torch.ones(3), "a": torch.ones(2)})["q"].tolist() == [3, 3, 3]
    assert al.check_adjoint(A, lambda v: {"b": 3 * v["q"], "a": 2 * v["p"]}).passed
    with pytest.raises(al.SpaceMismatchError, match="pass an element with the structure of the space"):
        A({"b": torch.ones(3), "c": torch.ones(2)})
