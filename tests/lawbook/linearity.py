"""Laws of the report on linearity."""

from __future__ import annotations

from laws import Case, in_widest_dtype, is_every_tenth, law, no_side_effects, once

import adjointlab as al
from adjointlab.linearity import LinearityReport, assess


def assert_right(report: LinearityReport, case: Case) -> None:
    assert report.is_affine
    # An offset refutes linearity; that the map is affine may be proved all the same.
    allowed = {"proved"} if case.entry.proved else {"proved", "supported"}
    assert report.verdict in (allowed | {"refuted"} if case.entry.affine else allowed), report
    if case.entry.proved:
        assert any("does not read the input" in each for each in report.evidence), report


@law(in_widest_dtype, once)
def verdict_on_linearity(case: Case) -> None:
    source = case.A.source
    with no_side_effects(source.callable):
        assert_right(assess(source, source.nominal), case)


@law(in_widest_dtype, once, is_every_tenth)
def verdict_on_linearity_before_an_operator_is_made(case: Case) -> None:
    function, domain = case.build()
    with no_side_effects(function, domain):
        report = al.check_linearity(function, domain)
    assert_right(report, case)
