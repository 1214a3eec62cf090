"""Errors name the way on, and tell faults of the function from those of its argument."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn

import adjointlab as al


@pytest.mark.parametrize(
    ("f", "error", "remedy"),
    [
        (nn.Linear(3, 2), al.NotLinearError, "al.affine_operator"),
        (torch.relu, al.NotLinearError, r"al.jacobian\(f, x0\)"),
        (torch.sin, al.NotLinearError, r"al.jacobian\(f, x0\)"),
        (nn.Dropout(), al.NotLinearError, "eval"),
        (torch.eye(3), al.SpaceMismatchError, "al.matrix"),
        (np.eye(3), al.SpaceMismatchError, "al.matrix"),
        (scipy.sparse.eye_array(3).tocsr(), al.SpaceMismatchError, "al.matrix"),
        (scipy.sparse.linalg.aslinearoperator(np.eye(3)), al.SpaceMismatchError, "adapters.scipy.from_scipy"),
        (3, al.SpaceMismatchError, "pass the map itself"),
    ],
    ids=["bias", "relu", "sin", "dropout", "tensor", "array", "sparse", "scipy's operator", "number"],
)
def test_a_refusal_names_the_way_on(f: Any, error: type[Exception], remedy: str) -> None:
    with pytest.raises(error, match=remedy):
        al.linear_operator(f, (3,))


def _without_name(x: torch.Tensor) -> torch.Tensor:
    return missing * x  # type: ignore[name-defined]  # noqa: F821


def test_faults_of_the_function_are_told_from_those_of_the_argument() -> None:
    fault = r"raised NameError: name 'missing' is not defined; mend the function"
    with pytest.raises(al.SpaceMismatchError, match=fault):
        al.linear_operator(_without_name, (3,))
    with pytest.raises(al.SpaceMismatchError, match=fault):
        al.check_adjoint(_without_name, lambda y: y, domain=(3,))
    with pytest.raises(al.SpaceMismatchError, match="no attribute 'flip'; check the shape and dtype of the domain"):
        al.linear_operator(lambda x: x.flip(0), {"a": (3,)})


D = torch.float64
I3, COMPLEX = al.identity((3,)), torch.zeros(3, dtype=torch.complex64)
REMEDIES = {
    "array": (lambda: I3(np.zeros(3)), r"a NumPy array of shape \(3,\), float64; pass torch.from_numpy"),
    "array as domain": (lambda: al.identity(np.zeros(3)), "got a NumPy array .*: pass torch.from_numpy of it"),
    "complex": (lambda: I3(COMPLEX), "its real part, or use al.complexify"),
    "real": (lambda: al.identity(COMPLEX)(COMPLEX.real), r"convert it with .to\(torch.complex64\)$"),
    "precision": (lambda: I3(torch.zeros(3, dtype=D)), r"or the operator with A.to\(torch.float64\)$"),
    "dtype in words": (lambda: al.TensorSpec((3,), "float32"), "a dtype such as torch.float32, got .* 'float32'"),
    "size": (lambda: al.TensorSpec(3), "sizes of all dimensions as a tuple .*, got 3"),
    "keyword": (lambda: al.linear_operator(lambda x: x, (3,), kwargs={"q": 1}), "argument 'q'; take it out of kwargs"),
    "fixed argument": (lambda: al.linear_operator(lambda x, a: a * x, (3,)), "pass fixed arguments in kwargs"),
    "functions of arrays": (
        lambda: al.check_adjoint(np.diff, lambda y: y, domain=(3,)),
        r"got ndarray: .* al.from_pair\(.*, arrays='numpy'\)",
    ),
    "forward of arrays": (
        lambda: al.linear_operator(np.diff, (3,)),
        r"al.from_pair\(.*, arrays='numpy'\)",
    ),
    "domain in the place of the adjoint": (
        lambda: al.check_adjoint(I3, (3,)),
        "got tuple: .*, and a domain as domain=",
    ),
}


@pytest.mark.parametrize("slip", REMEDIES)
def test_errors_name_the_remedy(slip: str) -> None:
    attempt, remedy = REMEDIES[slip]
    with pytest.raises(al.SpaceMismatchError, match=remedy):
        attempt()


def test_a_pair_of_functions_of_arrays_is_told_where_to_go() -> None:
    with pytest.raises(al.AdjointMismatchError, match=r"got a NumPy array .*: .* arrays='numpy'"):
        al.from_pair(np.diff, lambda y: np.pad(y, (1, 0)) - np.pad(y, (0, 1)), (3,), (2,))


def test_refusals_say_in_words_how_a_map_reads_its_input() -> None:
    with pytest.raises(
        al.NotLinearError, match=r"through a number taken out of it \(by an if, float\(\) or \.item\(\)\)"
    ):
        al.linear_operator(lambda x: x if x.sum() > 0 else 2 * x, (4,))
    with pytest.raises(al.NotLinearError, match="look for a division by zero"):
        al.linear_operator(lambda x: x / x.norm(), (4,))
