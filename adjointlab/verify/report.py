"""What a dot-product test found: a frozen value that prints, shows in notebooks and serialises."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adjointlab.reporting import Grid, aligned, heat_map, html_table, strict_json


@dataclass(frozen=True)
class AdjointReport:
    """The outcome of a dot-product test; made by :func:`check_adjoint`.

    Attributes
    ----------
    passed : bool
        Whether the error stayed within the tolerance in every pair.
    error : float
        ``|⟨Ax, y⟩ − ⟨x, By⟩| / max(‖Ax‖‖y‖, ‖x‖‖By‖)`` of the pair that exceeds its tolerance most, or comes nearest to
        it; NaN if there was no number to compare.
    tolerance : float
        What rounding may explain of that.
    eps : float
        Unit roundoff of the coarser space.
    trials : int
        Number of random draws of x and of y.
    diagnosis : str
        What is wrong, in words; empty if the test passed.
    pairs : int
        Number of pairs (x, y) compared, random and structured (impulses, constants).
    worst : str
        Which pair ``error`` and ``tolerance`` are of.
    missed_row_probability : float
        Probability that the random pairs miss an error confined to one row: a row of typical norm, wholly wrong.
    vacuous : bool
        Whether A and B were zero on every draw: nothing was compared.
    notes : tuple of str
        What else a reader should know.
    figure : tuple of (str, grid of floats)
        Magnitudes of an impulse response of B, of what it should be, and of the difference; empty if the test passed.
    """

    passed: bool
    error: float
    tolerance: float
    eps: float
    trials: int
    diagnosis: str = ""
    pairs: int = 0
    worst: str = ""
    missed_row_probability: float = 1.0
    vacuous: bool = False
    notes: tuple[str, ...] = ()
    figure: tuple[tuple[str, Grid], ...] = field(default=(), repr=False)

    @property
    def _title(self) -> str:
        return f"adjoint test {'passed' if self.passed else 'FAILED'}{', but it was vacuous' if self.vacuous else ''}"

    def _rows(self) -> list[tuple[str, str]]:
        rows = [("diagnosis", self.diagnosis)] if self.diagnosis else []
        return [
            *rows,
            ("error", f"{self.error:.3e}  ({self.error / self.eps:.3g} eps)"),
            ("tolerance", f"{self.tolerance:.3e}  ({self.tolerance / self.eps:.3g} eps)"),
            ("worst pair", self.worst or "none"),
            ("pairs", f"{self.pairs} of x and y, from {self.trials} random draws of each, impulses and constants"),
            ("missed row", f"probability {self.missed_row_probability:.1e} to miss an error in one row"),
            *(("note", note) for note in self.notes),
        ]

    def __str__(self) -> str:
        return aligned(self._title, self._rows())

    def _repr_html_(self) -> str:
        maps = "".join(heat_map(name, grid) for name, grid in self.figure)
        return html_table(self._title, self.passed, self._rows(), f"<div>{maps}</div>" if maps else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values; the figure stays out."""
        return {
            "passed": self.passed,
            "error": self.error,
            "tolerance": self.tolerance,
            "eps": self.eps,
            "trials": self.trials,
            "pairs": self.pairs,
            "worst": self.worst,
            "missed_row_probability": self.missed_row_probability,
            "vacuous": self.vacuous,
            "notes": list(self.notes),
            "diagnosis": self.diagnosis,
        }

    def to_json(self, indent: int | None = None) -> str:
        """Return :meth:`to_dict` as JSON; numbers that are not finite become ``null``."""
        return strict_json(self.to_dict(), indent)


__all__ = ["AdjointReport"]
