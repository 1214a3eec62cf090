"""Whatever `linear_operator` is given, it works or raises one of its own errors."""

import os
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adjointlab as al

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "50"))
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
NUMBERS = st.sampled_from([torch.float32, torch.float64, torch.complex64, torch.bfloat16, torch.half])
TENSORS = st.builds(
    lambda shape, dtype: torch.zeros(shape, dtype=dtype), st.lists(st.integers(1, 4), max_size=4), NUMBERS
)
FITTING = st.one_of(TENSORS, st.tuples(TENSORS, TENSORS), st.dictionaries(st.text(max_size=2), TENSORS, max_size=2))
OWN = (al.SpaceMismatchError, al.NotLinearError, al.NotDifferentiableError)


def refused(error: Exception) -> str:
    assert len(str(error)) > 20, "expected an error that says what is wrong"
    return "refused"


@pytest.mark.slow
def test_any_argument_gives_an_operator_or_one_clear_error() -> None:
    outcomes: Counter[str] = Counter()

    @given(
        function=st.sampled_from(FUNCTIONS),
        domain=st.one_of(DOMAINS, FITTING),
        batch_dims=st.sampled_from([0, 0, 0, 1, 2, -1, "1", None]),
        kwargs=st.sampled_from([None, None, {}, {"dim": 0}]),
    )
    @settings(max_examples=EXAMPLES, deadline=None)
    def each(function, domain, batch_dims, kwargs) -> None:
        try:
            operator = al.linear_operator(function, domain, batch_dims=batch_dims, kwargs=kwargs)
        except OWN as error:
            outcomes[refused(error)] += 1
        else:
            x = operator.domain.randn(torch.Generator().manual_seed(0))
            operator.codomain.check(operator(x))
            operator.domain.check(operator.H(operator(x)))
            outcomes["made"] += 1

    each()
    assert min(outcomes["made"], outcomes["refused"]) > 0, outcomes


LINEAR = [
    lambda x: x, lambda x: 2 * x, lambda x: x.flip(0), lambda x: x.sum(), lambda x: x[0], lambda x: x.cumsum(-1),
    lambda x: x.mT, lambda x: x.real, lambda x: [x, {"a": -x}], lambda x, z: x + z, lambda x, z: (z, x), torch.fft.fft,
    nn.Conv1d(1, 1, 3, padding=1, bias=False), nn.Identity(), lambda x: x.double(), lambda x: x.conj(),
]  # fmt: skip


@pytest.mark.slow
def test_linear_functions_on_any_domain_pass_the_check() -> None:
    outcomes: Counter[str] = Counter()

    @given(
        function=st.sampled_from(LINEAR),
        domain=FITTING,
        batch_dims=st.sampled_from([0, 0, 1]),
        engine=st.sampled_from(["auto", "eager", "traced", "steam"]),
        check=st.booleans(),
    )
    @settings(max_examples=EXAMPLES, deadline=None)
    def each(function, domain, batch_dims, engine, check) -> None:
        try:
            operator = al.linear_operator(function, domain, batch_dims=batch_dims, engine=engine, check=check)
        except (*OWN, ValueError) as error:
            outcomes[refused(error)] += 1
        else:
            report = al.check_adjoint(operator, trials=2)
            assert report.passed, report
            outcomes["passed"] += 1

    each()
    assert min(outcomes["passed"], outcomes["refused"]) > EXAMPLES / 20, outcomes


@pytest.mark.slow
def test_any_adjoint_gives_a_report_or_one_clear_error() -> None:
    outcomes: Counter[str] = Counter()

    @given(function=st.sampled_from(LINEAR), adjoint=st.sampled_from([*FUNCTIONS, *LINEAR]), domain=FITTING)
    @settings(max_examples=EXAMPLES, deadline=None)
    def each(function, adjoint, domain) -> None:
        try:
            report = al.check_adjoint(function, adjoint, domain=domain, trials=2)
        except OWN as error:
            outcomes[refused(error)] += 1
        else:
            assert report.passed == (report.diagnosis == "")
            assert str(report)
            assert report._repr_html_()
            assert report.to_json()
            outcomes["passed" if report.passed else "failed"] += 1

    each()
    assert min(outcomes["passed"], outcomes["failed"], outcomes["refused"]) > 0, outcomes
