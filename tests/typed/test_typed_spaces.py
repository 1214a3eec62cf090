"""Types of spaces: mypy and pyright read these tests, and pytest runs them."""

from typing import assert_type

import pytest
import torch
from torch import Tensor, nn

import adjointlab as al


def test_an_example_tensor_or_a_shape_has_tensors() -> None:
    shapes = al.Space.of((2, 3)), al.Space.of([2, 3]), al.Space.of(al.TensorSpec((2, 3)))
    for space in (*shapes, al.Space.of(torch.zeros(2, 3))):
        assert_type(space, al.Space[Tensor])
        assert_type(space.zeros(), Tensor)
        assert_type(space.element(space.vector(space.randn())), Tensor)
        assert space.randn().shape == (2, 3)


def test_a_parameter_has_tensors_and_no_parameters() -> None:
    assert_type(al.Space.of(nn.Parameter(torch.zeros(3))), al.Space[Tensor])


def test_a_shape_of_a_tensor_is_a_shape() -> None:
    assert_type(al.Space.of(torch.zeros(2, 3).shape).randn(), Tensor)


def test_pairs_and_dictionaries_of_shapes_are_those_of_tensors() -> None:
    pair = al.Space.of(((2,), (3,))).randn()
    assert_type(pair, tuple[Tensor, Tensor])
    assert isinstance(pair, tuple)
    named = al.Space.of({"image": (2, 3), "offset": (1,)}).randn()
    assert_type(named, dict[str, Tensor])
    assert isinstance(named, dict)


def test_an_example_has_elements_of_its_own_type() -> None:
    triple = al.Space.of((torch.zeros(1), torch.zeros(2), torch.zeros(3))).zeros()
    assert_type(triple, tuple[Tensor, Tensor, Tensor])
    assert isinstance(triple, tuple)
    nested = al.Space.of([(torch.zeros(1), torch.zeros(2))]).zeros()
    assert_type(nested, list[tuple[Tensor, Tensor]])
    assert isinstance(nested[0], tuple)


def test_inner_products_take_elements_of_the_space() -> None:
    pairs = al.Space.of(((2,), (3,)))
    assert_type(pairs.inner(pairs.zeros(), pairs.zeros()), Tensor)
    with pytest.raises(al.SpaceMismatchError, match="expected a to be an element"):
        pairs.norm(torch.zeros(2))  # type: ignore[arg-type]
