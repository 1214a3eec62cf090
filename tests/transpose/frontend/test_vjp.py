"""The eager engine: the reference, also where torch.func refuses."""

from __future__ import annotations

import pytest
import torch
from laws import assert_close, draw, operator
from operator_zoo import BY_NAME, OldStyle, reverse
from torch import nn

import adjointlab as al

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["old-style-function", "custom-op", "sparse-csr"])
def test_what_torch_func_refuses_goes_through_autograd(name: str) -> None:
    entry = BY_NAME[name]
    function, domain = entry.build(torch.float64)
    A = al.linear_operator(function, domain, engine="eager")
    assert A.engine == "eager"
    assert "torch.autograd.grad" in A.explain()


@pytest.mark.parametrize("name", ["conv2d", "rfft-7", "dict-domain"])
def test_torch_func_comes_first(name: str) -> None:
    A = operator(BY_NAME[name], torch.float64, "eager")
    assert "torch.autograd.grad" not in A.explain()


@pytest.mark.parametrize("function", [lambda x: OldStyle.apply(x, 2.5), reverse], ids=["old-style", "custom-op"])
def test_fallback_works_without_gradients_enabled(function) -> None:
    A = al.linear_operator(function, torch.zeros(2, 3, dtype=torch.float64), engine="eager")
    y = draw(A.codomain)
    with torch.no_grad():
        quiet = A.H(y)
    assert_close(quiet, A.H(y), A.domain.eps)


def test_pull_back_is_never_stale() -> None:
    layer = nn.Conv1d(1, 1, 3, bias=False, dtype=torch.float64)
    A = al.linear_operator(layer, (1, 1, 6), engine="eager")
    y = draw(A.codomain)
    before = A.H(y)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert_close(A.H(y), 2 * before, A.domain.eps)


def test_eager_batch_norm_buffers_are_left_alone() -> None:
    norm = nn.BatchNorm1d(2, dtype=torch.float64).eval()
    before = [buffer.clone() for buffer in norm.buffers()]
    A = al.affine_operator(norm, (4, 2), engine="eager").linear
    A.H(draw(A.codomain))
    assert all(map(torch.equal, before, norm.buffers()))


def test_compiled_engine_agrees_with_the_eager_one() -> None:
    function, domain = BY_NAME["finite-differences"].build(torch.float64)
    A = al.linear_operator(function, domain).compile(backend="aot_eager")
    assert A.engine == "compiled"
    assert A.H.engine == "compiled"
    y = draw(A.codomain)
    assert_close(A.H(y), operator(BY_NAME["finite-differences"], torch.float64, "eager").H(y), A.domain.eps)
