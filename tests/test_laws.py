"""Every law on every operator of the zoo: one test for each operator, dtype and engine."""

from __future__ import annotations

import re

import pytest
import torch
from lawbook import adjoint, affine, algebra, least_squares, linearity, passes, spectral, verify
from laws import ENGINES, LAWS, Case, Law, cases, check
from operator_zoo import AFFINE, BY_NAME, LINEAR, TRIED, ZOO, Entry

BOOK = (adjoint, affine, algebra, least_squares, linearity, passes, spectral, verify)


# The eager engine does in every dtype what autograd does: one of them shows that the rest around it is right.
@pytest.mark.parametrize(
    ("entry", "dtype", "engine"),
    [
        pytest.param(*case.values, engine, id=f"{case.id}-{engine}")
        for engine in ENGINES
        for case in cases(ZOO)
        if case.values[1] in (TRIED[case.values[0].name][-1:] if engine == "eager" else TRIED[case.values[0].name])
    ],
)
def test_laws(entry: Entry, dtype: torch.dtype, engine: str, pytestconfig: pytest.Config) -> None:
    # Where one dtype is tested, it is the one that laws choose which hold in any.
    check(Case(entry.only(dtype) if pytestconfig.getoption("--quick") else entry, dtype, engine))


def test_zoo_names_are_unique() -> None:
    assert len({entry.name for entry in ZOO}) == len(ZOO) == len(LINEAR) + len(AFFINE)


# --------------------------------------------------------------------------------------------------------- the registry


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_every_law_applies_to_some_operator(law: Law) -> None:
    assert any(law.applies(Case(*case.values, engine)) for case in cases(ZOO) for engine in ENGINES)


def test_every_chapter_has_laws_and_names_are_unique() -> None:
    assert {law.statement.__module__ for law in LAWS} == {chapter.__name__ for chapter in BOOK}
    assert len({law.name for law in LAWS}) == len(LAWS) >= 45


CASE = Case(BY_NAME["conv1d"], torch.float64, "traced")


def holds(case: Case) -> None:
    assert case is CASE


def fails(case: Case) -> None:
    assert case is not CASE, "this one is wrong"


def fails_too(case: Case) -> None:
    assert case.A.H is case.A, "and this one"


def raises(case: Case) -> None:
    raise ZeroDivisionError("of the law itself")


def registered(*statements) -> list[Law]:
    return [Law(statement, ()) for statement in statements]


def test_all_laws_that_fail_are_named() -> None:
    pattern = (
        r"2 laws do not hold:\nfails \(test_laws.py:\d+\): this one is wrong.*\nfails_too \(test_laws.py:\d+\): and"
    )
    with pytest.raises(pytest.fail.Exception, match=re.compile(pattern, re.DOTALL)):
        check(CASE, registered(fails, holds, fails_too))


def test_other_exceptions_say_in_which_law() -> None:
    with pytest.raises(ZeroDivisionError, match="of the law itself") as caught:
        check(CASE, registered(fails, raises))
    (note,) = caught.value.__notes__
    assert note.startswith("raised by the law raises\nbroken before: fails (")


def test_laws_that_do_not_apply_are_not_tried() -> None:
    check(CASE, [Law(fails, (lambda case: case.dtype == torch.float32,)), *registered(holds)])


def test_laws_draw_the_same_random_numbers_in_any_order() -> None:
    drawn = []

    def draws(case: Case) -> None:
        drawn.append(float(torch.rand(())))

    check(CASE, registered(draws, holds, draws))
    assert drawn[0] == drawn[1]
