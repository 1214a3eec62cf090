"""Whatever `linear_operator` is given, it works or raises one of its own errors."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adjointlab as al

FUNCTIONS = [
    None, 3, "conv", object(), [torch.relu], nn.Conv1d(1, 1, 3, bias=False), nn.Conv2d(1, 2, 2), nn.Identity(),
    nn.ReLU(), nn.BatchNorm1d(2), nn.Dropout(), nn.Linear(4, 3, dtype=torch.complex64), lambda: 1,
    lambda x: None, lambda x: 3,
    lambda x: "x", lambda x: (), lambda x: {"a": x}, lambda x: x.long(), lambda x: x.sum(), lambda x: x / 0,
    lambda x: x.nonexistent, lambda x, y: x, lambda x: 1 / 0, lambda x: x.numpy(), lambda x: x[0], torch.fft.fft, print,
]  # fmt: skip
SIZES = st.integers(-1, 5)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.complex64, torch.int64, torch.bool, torch.half])
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 4),
    st.floats(),
    st.text(max_size=3),
    st.lists(SIZES, max_size=4).map(tuple),
    st.builds(lambda shape, dtype: torch.zeros(shape, dtype=dtype), st.lists(st.integers(0, 4), max_size=4), DTYPES),
)
DOMAINS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=2).map(tuple), st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=3,
)
OWN = (al.SpaceMismatchError, al.NotLinearError, al.NotDifferentiableError)


@given(
    function=st.sampled_from(FUNCTIONS),
    domain=DOMAINS,
    batch_dims=st.sampled_from([0, 0, 0, 1, 2, -1, "1", None]),
    kwargs=st.sampled_from([None, None, {}, {"dim": 0}]),
)
@settings(max_examples=150, deadline=None)
def test_any_argument_gives_an_operator_or_one_clear_error(function, domain, batch_dims, kwargs) -> None:
    try:
        operator = al.linear_operator(function, domain, batch_dims=batch_dims, kwargs=kwargs)
    except OWN:
        return
    x = operator.domain.randn(torch.Generator().manual_seed(0))
    operator.codomain.check(operator(x))
    operator.domain.check(operator.H(operator(x)))
