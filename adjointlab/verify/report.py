"""The report of a dot-product test: a frozen value with text, HTML and JSON forms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adjointlab.reporting import Grid, aligned, heat_map, html_folded, html_table, strict_json


@dataclass(frozen=True)
class AdjointReport:
    """The result of a test of ``⟨Ax, y⟩ = ⟨x, By⟩``; made by :func:`check_adjoint`.

    It prints as two lines; :meth:`details` returns all of it as text.

    Attributes
    ----------
    passed : bool
        Whether the error stayed within the tolerance in every pair.
    error : float
        ``|⟨Ax, y⟩ − ⟨x, By⟩| / max(‖Ax‖‖y‖, ‖x‖‖By‖)`` of the worst pair, whose ratio of error to tolerance is
        largest; NaN if no pair was compared.
    tolerance : float
        The largest error that rounding can explain, for the worst pair.
    eps : float
        Unit roundoff of the coarser space.
    trials : int
        Number of random draws of x and of y.
    pairs : int
        Number of pairs (x, y) compared, random and structured (impulses, constants).
    worst : str
        Name of the worst pair, to which ``error`` and ``tolerance`` belong.
    missed_row_probability : float
        Probability that the random pairs miss an error in one row of A with the norm of a typical row.
    vacuous : bool
        Whether A and B were zero on every draw, so that the test means nothing.
    notes : tuple of str
        Further remarks, such as measured rounding errors.
    diagnosis : str
        The mistake in words; empty if the test passed.
    figure : tuple of (str, grid of floats)
        Magnitudes of an impulse response of B, of the right response, and of their difference; empty if the test
        passed.
    """

    passed: bool
    error: float
    tolerance: float
    eps: float
    trials: int
    pairs: int = 0
    worst: str = ""
    missed_row_probability: float = 1.0
    vacuous: bool = False
    notes: tuple[str, ...] = ()
    diagnosis: str = ""
    figure: tuple[tuple[str, Grid], ...] = field(default=(), repr=False)

    @property
    def _title(self) -> str:
        if self.passed:
            return "adjoint test passed" + ", but it was vacuous: A and B are zero on every draw" * self.vacuous
        return f"adjoint test FAILED: {self.diagnosis}"

    def _rows(self) -> list[tuple[str, str]]:
        pairs = f"largest of {self.pairs} pairs of x and y" if self.pairs != 1 else "of one pair of x and y"
        return [("error", f"{self.error:.1e} ({pairs}), where rounding explains {self.tolerance:.1e}")]

    def _detailed(self) -> list[tuple[str, str]]:
        return [
            ("error", f"{self.error:.3e}  ({self.error / self.eps:.3g} eps)"),
            ("tolerance", f"{self.tolerance:.3e}  ({self.tolerance / self.eps:.3g} eps)"),
            ("worst pair", self.worst or "none"),
            ("pairs", f"{self.pairs} of x and y, from {self.trials} random draws of each, impulses and constants"),
            ("missed row", f"probability {self.missed_row_probability:.1e} to miss an error in one row"),
            *(("note", note) for note in self.notes),
        ]

    def __str__(self) -> str:
        return aligned(self._title, self._rows())

    def details(self) -> str:
        """Return all that the test has seen, as text; the glossary of the documentation explains the terms."""
        return aligned(self._title, self._detailed())

    @property
    def failure(self) -> str:
        """The message of an error for a failed test: the diagnosis in the first line, then the details."""
        return f"{self.diagnosis}\n{aligned('adjoint test FAILED', self._detailed())}"

    def _repr_html_(self) -> str:
        maps = "".join(heat_map(name, grid) for name, grid in self.figure)
        more = html_folded("details", self._detailed())
        return html_table(self._title, self.passed, self._rows(), f"<div>{maps}</div>{more}" if maps else more)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary of plain values, without the figure."""
        record = {**vars(self), "notes": list(self.notes)}
        del record["figure"]
        return record

    def to_json(self, indent: int | None = None) -> str:
        """Return :meth:`to_dict` as JSON; numbers that are not finite become ``null``."""
        return strict_json(self.to_dict(), indent)
