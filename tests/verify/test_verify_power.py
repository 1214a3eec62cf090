"""A small part of the mutation study; `make power` runs the whole of it and writes docs/verification_power.md."""

from __future__ import annotations

import pytest
import torch
from verify_power import BUGS, OPERATORS, ROUNDING, STUDIED, built, false_alarms, mutants, page

FEW = ("grouped dilated convolution", "circular convolution", "sensitivity maps", "two leaves", "cancellation inside")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", STUDIED, ids=str)
def test_bugs_above_rounding_are_detected(dtype: torch.dtype) -> None:
    trials = list(mutants(built([dtype], FEW), seeds=1, explain=False))
    assert len(trials) > 20
    assert not [trial for trial in trials if trial.size >= 2 * ROUNDING and not trial.detected]
    assert sum(trial.detected for trial in trials) >= 0.8 * len(trials)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*STUDIED, torch.float16], ids=str)
def test_correct_adjoints_raise_no_alarm(dtype: torch.dtype) -> None:
    for _, draws, alarms in false_alarms(built([dtype], FEW), 50):
        assert draws == 50
        assert alarms == 0


def test_study_is_as_broad_as_it_says() -> None:
    assert len(BUGS) >= 12
    for dtype in STUDIED:
        assert sum(dtype in dtypes for _, dtypes in OPERATORS.values()) >= 10


@pytest.mark.slow
def test_page_is_complete() -> None:
    operators = list(built([torch.float64], ["weights"]))
    text = page(list(mutants(operators, seeds=1)), list(false_alarms(operators, 50)), 1)
    assert "Missed above rounding: none." in text
    assert "**0 in 50 random draws**" in text
