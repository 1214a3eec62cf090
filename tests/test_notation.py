"""What an operator prints: an expression in letters, and what the letters stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import adjointlab as al


def square(*layers: nn.Module) -> al.LinearOperator:
    return al.linear_operator(nn.Sequential(*layers) if len(layers) > 1 else layers[0], (1, 1, 6, 6))


A = square(nn.Conv2d(1, 1, 3, padding=1, bias=False))
B = square(nn.Flatten(), nn.Unflatten(1, (1, 6, 6)))
I = al.identity(A.domain)  # noqa: E741

WRITTEN: dict[str, Callable[[], al.LinearOperator]] = {
    "A": lambda: A,
    "Aᴴ": lambda: A.H,
    "Aᵀ": lambda: A.T,
    "(Aᵀ)ᴴ": lambda: A.T.H,
    "(Aᴴ)ᵀ": lambda: A.H.T,
    "2 A + B": lambda: 2 * A + B,
    "(2 A + B)ᴴ": lambda: (2 * A + B).H,
    "A − B": lambda: A - B,
    "A − (A + B)": lambda: A - (A + B),
    "−(A + B)": lambda: -(A + B),
    "A (−B)": lambda: A @ -B,
    "−0.5 A + B": lambda: -0.5 * A + B,
    "(A + B) Aᴴ": lambda: (A + B) @ A.H,
    "Aᴴ A": lambda: A.gram,
    "A B Aᴴ": lambda: A @ B @ A.H,
    "A · 3": lambda: A * 3,
    "c A": lambda: torch.tensor(2.0) * A,
    "A / c": lambda: A / torch.tensor(2.0),
    "I + A": lambda: I + A,
    "vstack(A, B)": lambda: al.vstack([A, B]),
    "vstack(A, A, A, …, B)": lambda: al.vstack([A] * 6 + [B]),
    "hstack(A, −B)ᴴ": lambda: al.hstack([A, -B]).H,
    "block_diag(A + B, A)": lambda: al.block_diag([A + B, A]),
    "A B": lambda: al.diagonal(torch.ones(2)) @ al.diagonal(torch.zeros(2)),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_an_operator_is_written_as_in_mathematics(text: str) -> None:
    first, *_ = repr(WRITTEN[text]()).splitlines()
    assert first.startswith(f"LinearOperator {text}: ")


def test_the_letters_are_explained() -> None:
    operator = al.vstack([A, B.H])
    assert repr(operator) == (
        "LinearOperator vstack(A, Bᴴ): (1, 1, 6, 6) float32 → ((1, 1, 6, 6) float32, (1, 1, 6, 6) float32)\n"
        "  A = Conv2d(1, 1, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)\n"
        "  B = Sequential(\n"
        "    (0): Flatten(start_dim=1, end_dim=-1)\n"
        "    (1): Unflatten(dim=1, unflattened_size=(1, 6, 6))\n"
        "  )"
    )


def test_functions_matrices_and_affine_maps_are_named() -> None:
    def differences(x: torch.Tensor) -> torch.Tensor:
        return x.diff()

    assert "A = the function differences" in repr(al.linear_operator(differences, (5,)))
    assert "A = the lambda at test_notation.py:" in repr(al.linear_operator(lambda x: 2 * x, (5,)))
    assert "A = the dense matrix of 2 × 3 entries" in repr(al.matrix(torch.ones(2, 3)))
    assert "A = diag(d) for d in (2,) float32" in repr(al.diagonal(torch.ones(2)))
    pair = al.from_pair(torch.neg, torch.neg, (3,), (3,))
    assert "A = the function neg, with the adjoint the function neg" in repr(pair)
    affine = al.affine_operator(nn.Linear(3, 2), (1, 3), batch_dims=1)
    assert repr(affine) == (
        "AffineOperator f, f(x) = A x + f(0): (*, 3) float32 → (*, 2) float32\n"
        "  f = Linear(in_features=3, out_features=2, bias=True)"
    )
    assert "A = the linear part of Linear" in repr(affine.H)


def test_an_operator_inside_of_a_network_is_written_in_its_place() -> None:
    text = repr(nn.Sequential(A, nn.ReLU()))
    assert "(0): LinearOperator A: (1, 1, 6, 6)" in text


def test_the_account_of_the_adjoint_is_about_the_adjoint() -> None:
    forward, backward = A.explain(), A.H.explain()
    assert "adjoint program:" in forward
    assert "cost of A: " in forward
    assert "cost of Aᴴ: " in forward
    assert "program of Aᴴ, whose own adjoint is A:" in backward
    assert "cost of A: " not in backward
    assert backward.splitlines()[0].startswith("LinearOperator Aᴴ: ")


def test_the_account_of_a_sum_has_each_part_once() -> None:
    text = (2 * A + B + A.H @ A).explain()
    assert "made of 2 operators" in text
    assert text.count("cost of A:") == text.count("cost of Bᴴ:") == 1


def test_the_account_counts_operations_and_memory() -> None:
    c = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    text = al.linear_operator(c, (1, 1, 32, 32), lowering=False).explain()
    count = 2 * 9 * 32 * 32  # a multiplication and an addition for each tap and output
    moved = 4 * (2 * 32 * 32 + 9)
    assert f"cost of A: about {count / 1e3:.3g} k operations a call, and {moved / 1e3:.3g} kB read and written" in text
    assert f"cost of Aᴴ: about {count / 1e3:.3g} k operations a call" in text
    assert "memory kept between calls: 0 B for A, 4 B for Aᴴ" in text  # a zero, which stands for the image
    mask = torch.rand(32, 32)
    kept = al.linear_operator(lambda x: mask.cumsum(0) * x, (32, 32)).explain()
    assert "# kept between calls" in kept
    assert "memory kept between calls: 8.19 kB for A, 8.19 kB for Aᴴ" in kept  # the sums, and the mask to compare with
