"""The report of a dot-product test: a frozen value with text, HTML and JSON forms."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from adjointlab.reporting import Grid, heat_map
from adjointlab.verify.printed import Report


@dataclass(frozen=True)
class AdjointReport(Report):
    """The result of a test of ``⟨Ax, y⟩ = ⟨x, By⟩``; made by :func:`check_adjoint`.

    It prints as two lines; ``details()`` returns all of it as text.

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
    asked : bool
        Whether ``tolerance`` is one that was asked for, in place of what rounding can explain.
    diagnosis : str
        The mistake in words; empty if the test passed.
    figure : tuple of (str, grid of floats)
        Magnitudes of an impulse response of B, of the right response, and of their difference; empty if the test
        passed.
    """

    kind: ClassVar[str] = "adjoint"
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
    asked: bool = False

    def within(self, tol: float | None) -> AdjointReport:
        """Return the report judged by an accuracy that was asked for, where that is coarser than rounding.

        Parameters
        ----------
        tol : float, optional
            The largest error that passes; as it is, if not given.

        Returns
        -------
        AdjointReport
            This report, or one that passed, with a note of what rounding explains.

        Raises
        ------
        ValueError
            If ``tol`` is not between 0 and 1.
        """
        if tol is not None and not 0 < tol < 1:
            raise ValueError(f"expected tol between 0 and 1, got {tol}")
        if tol is None or self.passed or not self.error <= tol:
            return self
        notes = (*self.notes, f"more than rounding explains ({self.tolerance:.1e}), and within tol={tol:g}")
        return replace(self, passed=True, tolerance=tol, diagnosis="", figure=(), notes=notes, asked=True)

    @property
    def _title(self) -> str:
        return super()._title + ", but it was vacuous: A and B are zero on every draw" * (self.passed and self.vacuous)

    def _rows(self) -> list[tuple[str, str]]:
        if not self.pairs:
            return []
        pairs = f"largest of {self.pairs} pairs of x and y" if self.pairs != 1 else "of one pair of x and y"
        bound = f"{self.tolerance:.1e} was asked for" if self.asked else f"rounding explains {self.tolerance:.1e}"
        return [("error", f"{self.error:.1e} ({pairs}), where {bound}")]

    def _detailed(self) -> list[tuple[str, str]]:
        return [
            ("error", f"{self.error:.3e}  ({self.error / self.eps:.3g} eps)"),
            ("tolerance", f"{self.tolerance:.3e}  ({self.tolerance / self.eps:.3g} eps)"),
            ("worst pair", self.worst or "none"),
            ("pairs", f"{self.pairs} of x and y, from {self.trials} random draws of each, impulses and constants"),
            ("missed row", f"probability {self.missed_row_probability:.1e} to miss an error in one row"),
            *(("note", note) for note in self.notes),
        ]

    __repr__ = Report.__str__

    def _picture(self) -> str:
        return "".join(heat_map(name, grid) for name, grid in self.figure)
