"""The report of a test of a derivative: a frozen value with text, HTML and JSON forms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from adjointlab.reporting import Curve, log_plot
from adjointlab.verify.printed import Report


@dataclass(frozen=True)
class DerivativeReport(Report):
    """The result of a test of the Jacobian J of f at x₀; made by :func:`check_derivative`.

    It prints as three lines; ``details()`` returns all of it as text.

    Attributes
    ----------
    passed : bool
        Whether J and ``J.H`` agree with f and with each other, and f has no kink at x₀.
    slope : float
        The slope of Taylor's remainder ``‖f(x₀ + h d) − f(x₀) − h J d‖`` over h, in logarithms: 2 or more if J is
        right, 1 if not. It is that of the direction and leaf where it is least, and NaN if the remainder is rounding
        only, as it is for a linear f.
    error : float
        The largest difference between an entry of ``J d`` and finite differences, in units of the largest entry of its
        leaf; that of the worst entry, whose ratio of error to tolerance is largest.
    tolerance : float
        What truncation and rounding of the finite differences explain of it.
    dot_error, dot_tolerance : float
        The same of ``|⟨J d, v⟩ − ⟨d, Jᴴ v⟩|``, in units of ``max(‖J d‖‖v‖, ‖d‖‖Jᴴ v‖)``.
    eps : float
        Unit roundoff of the coarser space.
    directions : int
        Number of directions d, random and in every leaf of x₀ alone.
    calls : int
        Number of calls of f.
    worst : str
        The direction and the entry to which ``error`` and ``tolerance`` belong.
    notes : tuple of str
        Further remarks.
    diagnosis : str
        The mistake in words; empty if the test passed.
    figure : tuple of (str, tuple of (h, remainder))
        Taylor's remainder for each direction, in the leaf of f with the least slope.
    """

    kind: ClassVar[str] = "derivative"
    passed: bool
    slope: float
    error: float
    tolerance: float
    dot_error: float
    dot_tolerance: float
    eps: float
    directions: int
    calls: int
    worst: str = ""
    notes: tuple[str, ...] = ()
    diagnosis: str = ""
    figure: tuple[Curve, ...] = field(default=(), repr=False)

    def _rows(self) -> list[tuple[str, str]]:
        known = f"{self.slope:.2f} of Taylor's remainder (2 is right)"
        slope = "none: the remainder is rounding only" if math.isnan(self.slope) else known
        return [
            ("error", f"{self.error:.1e} (J d against differences), where their errors explain {self.tolerance:.1e}"),
            ("slope", slope),
        ]

    def _detailed(self) -> list[tuple[str, str]]:
        return [
            *self._rows(),
            ("worst entry", self.worst or "none"),
            ("dot test", f"{self.dot_error:.1e} (J.H against J), where rounding explains {self.dot_tolerance:.1e}"),
            ("directions", f"{self.directions}, with {self.calls} calls of f"),
            *(("note", note) for note in self.notes),
        ]

    def _picture(self) -> str:
        points = [point for _, curve in self.figure for point in curve if point[1] > 0]
        if not points:
            return ""
        (first, last), top = (max(points)[0], min(points)[0]), max(y for _, y in points)
        guides = [(f"slope {n}", ((first, top), (last, top * (last / first) ** n))) for n in (1, 2)]
        return log_plot("‖f(x₀ + h d) − f(x₀) − h J d‖", "step h", self.figure, guides)
