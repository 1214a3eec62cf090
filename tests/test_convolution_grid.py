"""Convolutions of every kind: the derived adjoint is exact, and linearity is proved."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import ENGINES, assert_close, dot_error, draw, frobenius, matrix, norm
from operator_zoo import CONVOLUTIONS, TRANSPOSED
from torch import nn

import adjointlab as al

MODES = ("zeros", "reflect", "replicate", "circular")
every_engine = pytest.mark.parametrize("engine", ENGINES)


@dataclass(frozen=True)
class Configuration:
    """A convolution and the size of its input."""

    transposed: bool
    dims: int
    dtype: torch.dtype
    options: dict[str, Any]
    size: tuple[int, ...]

    def module(self) -> nn.Module:
        kinds = TRANSPOSED if self.transposed else CONVOLUTIONS
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return kinds[self.dims](dtype=self.dtype, **self.options)

    def domain(self) -> torch.Tensor:
        return torch.zeros(1, self.options["in_channels"], *self.size, dtype=self.dtype)

    def linear(self, engine: str) -> al.LinearOperator:
        make = al.affine_operator if self.options["bias"] else al.linear_operator
        made = make(self.module(), self.domain(), engine=engine)
        return made.linear if self.options["bias"] else made

    def raw(self) -> Callable[[torch.Tensor], torch.Tensor]:
        module = self.module()
        if self.options["bias"]:
            module.bias = None
        return module

    def matrix(self) -> torch.Tensor:
        return matrix(self.raw(), self.domain())


Choose = Callable[[Sequence[Any]], Any]


def configuration(choose: Choose, dtypes: Sequence[torch.dtype] = (torch.float64, torch.complex128)) -> Configuration:
    """Return a valid configuration; `choose` takes one of several."""
    dims, transposed = choose((1, 2, 3)), choose((False, False, True))
    groups = choose((1, 1, 2))
    kernel = tuple(choose((1, 2, 3, 4)[: 5 - dims]) for _ in range(dims))
    dilation = tuple(choose((1, 1, 2, 3)[: 5 - dims]) for _ in range(dims))
    stride = tuple(choose((1, 2, 3)) for _ in range(dims))
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    options: dict[str, Any] = {
        "in_channels": groups * choose((1, 2)),
        "out_channels": groups * choose((1, 2)),
        "groups": groups,
        "bias": choose((False, False, True)),
        "kernel_size": kernel,
        "dilation": dilation,
    }
    smallest = [r + 1 for r in reach]
    if transposed:
        padding = tuple(choose((0, 1, 2)) for _ in range(dims))
        options["output_padding"] = tuple(choose(range(max(s, d))) for s, d in zip(stride, dilation, strict=True))
        # The output, (n − 1) s − 2 p + reach + output_padding + 1, has at least one entry.
        smallest = [max(1, -((r - 2 * p) // s) + 1) for r, p, s in zip(reach, padding, stride, strict=True)]
    else:
        options["padding_mode"] = choose(MODES)
        padding = choose(("same", "valid", 0, 1, "tuple", "tuple"))
        if padding == "same":
            stride = (1,) * dims
            smallest = [r // 2 + 2 for r in reach]
        elif padding == "tuple":
            padding = tuple(choose((0, 1, 2)) for _ in range(dims))
        if padding not in ("same", "valid"):
            pads = padding if isinstance(padding, tuple) else (padding,) * dims
            # Room for the kernel, and enough entries to reflect or wrap.
            smallest = [max(r + 1 - 2 * p, p + 1, 1) for r, p in zip(reach, pads, strict=True)]
    options["padding"], options["stride"] = padding, stride
    size = tuple(n + choose((0, 1, 2)[: 4 - dims]) for n in smallest)
    return Configuration(transposed, dims, choose(dtypes), options, size)


@st.composite
def configurations(draw: Callable[..., Any], **options: Any) -> Configuration:
    return configuration(lambda choices: draw(st.sampled_from(choices)), **options)


SAMPLE = [configuration(random.Random(seed).choice) for seed in range(80)]


@pytest.mark.slow
@every_engine
@settings(max_examples=25)
@given(configurations())
def test_adjoint_is_the_conjugate_transpose(engine: str, conv: Configuration) -> None:
    A = conv.linear(engine)
    dense = conv.matrix()
    assert_close(matrix(A.H, A.codomain.zeros()), dense.T.contiguous(), A.domain.eps, frobenius(dense))


@pytest.mark.slow
@every_engine
@settings(max_examples=25)
@given(configurations())
def test_dot_product(engine: str, conv: Configuration) -> None:
    A = conv.linear(engine)
    x, y = draw(A.domain, 1), draw(A.codomain, 2)
    assert dot_error(A, A.H, x, y, real=False) <= 16 * A.domain.eps


@pytest.mark.slow
@every_engine
@settings(max_examples=10)
@given(configurations(dtypes=(torch.float32, torch.complex64)))
def test_dot_product_in_single_precision(engine: str, conv: Configuration) -> None:
    A = conv.linear(engine)
    x, y = draw(A.domain, 1), draw(A.codomain, 2)
    assert dot_error(A, A.H, x, y, real=False) <= 16 * A.domain.eps


@pytest.mark.slow
@settings(max_examples=12)
@given(configurations())
def test_forward_is_the_module(conv: Configuration) -> None:
    module, x = conv.module(), torch.randn(conv.domain().shape, dtype=conv.dtype)
    make = al.affine_operator if conv.options["bias"] else al.linear_operator
    f = make(module, conv.domain())
    scale = frobenius(conv.matrix()) * norm(x) + norm(module(conv.domain()))
    assert_close(f(x), module(x).detach(), f.domain.eps, scale)


@pytest.mark.slow
@settings(max_examples=12)
@given(configurations())
def test_engines_agree(conv: Configuration) -> None:
    eager, traced = conv.linear("eager"), conv.linear("traced")
    y = draw(eager.codomain)
    assert_close(traced.H(y), eager.H(y), eager.domain.eps, frobenius(conv.matrix()) * norm(y))


@pytest.mark.slow
def test_95_percent_of_the_sample_are_proved() -> None:
    linear = [conv for conv in SAMPLE if not conv.options["bias"]][:40]
    assert len(linear) == 40
    others = [c for c in linear if al.check_linearity(c.module(), c.domain()).verdict != "proved"]
    assert len(others) <= 2, others


@pytest.mark.slow
def test_traced_engine_serves_the_sample() -> None:
    others = [conv for conv in SAMPLE[:30] if conv.linear("traced").engine != "traced"]
    assert not others, others


def test_sample_has_every_kind() -> None:
    assert {conv.dims for conv in SAMPLE} == {1, 2, 3}
    assert {conv.options.get("padding_mode") for conv in SAMPLE} == {*MODES, None}
    assert {conv.dtype for conv in SAMPLE} == {torch.float64, torch.complex128}
    assert {"same", "valid", 0, 1} <= {conv.options["padding"] for conv in SAMPLE}
    assert any(max(conv.options.get("output_padding", (0,))) > 0 for conv in SAMPLE)
