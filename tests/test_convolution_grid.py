"""Convolutions of every kind: the derived adjoint is exact, and linearity is proved."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import assert_close, frobenius, matrix, norm
from operator_zoo import CONVOLUTIONS, TRANSPOSED
from torch import nn

import adjointlab as al
from adjointlab.linearity import assess

DTYPES = (torch.float64, torch.complex128, torch.float32, torch.complex64)
MODES = ("zeros", "reflect", "replicate", "circular")


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


def configuration(choose: Choose) -> Configuration:
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
    return Configuration(transposed, dims, choose(DTYPES), options, size)


@st.composite
def configurations(draw: Callable[..., Any]) -> Configuration:
    return configuration(lambda choices: draw(st.sampled_from(choices)))


SAMPLE = [configuration(random.Random(seed).choice) for seed in range(80)]


def assert_equals_the_module(A: al.LinearOperator, conv: Configuration) -> None:
    dense = conv.matrix()
    assert_close(matrix(A, conv.domain()), dense, A.domain.eps, frobenius(dense))
    assert_close(matrix(A.H, A.codomain.zeros()), dense.T.contiguous(), A.domain.eps, frobenius(dense))


@pytest.mark.slow
def test_traced_operator_and_adjoint_are_exact_and_95_percent_are_proved_linear() -> None:
    verdicts: Counter[str] = Counter()

    @settings(max_examples=24)
    @given(configurations())
    def each(conv: Configuration) -> None:
        A = conv.linear("traced")
        assert A.engine == "traced"
        assert_equals_the_module(A, conv)
        if not conv.options["bias"]:
            verdicts[assess(A.source, A.source.nominal).verdict] += 1

    each()
    assert verdicts["proved"] >= 0.95 * verdicts.total() >= 12, verdicts


@pytest.mark.slow
@settings(max_examples=8)
@given(configurations())
def test_eager_operator_and_adjoint_are_exact(conv: Configuration) -> None:
    assert_equals_the_module(conv.linear("eager"), conv)


@pytest.mark.slow
@settings(max_examples=4)
@given(configurations())
def test_offset_is_that_of_the_module(conv: Configuration) -> None:
    conv.options["bias"] = True
    module, x = conv.module(), torch.randn(conv.domain().shape, dtype=conv.dtype)
    f = al.affine_operator(module, conv.domain())
    scale = frobenius(conv.matrix()) * norm(x) + norm(module(conv.domain()))
    assert_close(f(x), module(x).detach(), f.domain.eps, scale)


def test_sample_has_every_kind() -> None:
    assert {conv.dims for conv in SAMPLE} == {1, 2, 3}
    assert {conv.options.get("padding_mode") for conv in SAMPLE} == {*MODES, None}
    assert {conv.dtype for conv in SAMPLE} == set(DTYPES)
    assert {"same", "valid", 0, 1} <= {conv.options["padding"] for conv in SAMPLE}
    assert any(max(conv.options.get("output_padding", (0,))) > 0 for conv in SAMPLE)
