"""The shared part of reports of tests: text, HTML and JSON forms of a frozen value, and the error of a failed one."""

from __future__ import annotations

from typing import Any, ClassVar

from adjointlab.errors import AdjointMismatchError
from adjointlab.reporting import Rows, aligned, html_details, html_table, strict_json


class Report:
    """A test's result. A subclass is a frozen dataclass with ``notes`` and a ``figure``, and says what its rows are."""

    kind: ClassVar[str]  # of test
    passed: bool
    diagnosis: str

    @property
    def _title(self) -> str:
        return f"{self.kind} test passed" if self.passed else f"{self.kind} test FAILED: {self.diagnosis}"

    def _rows(self) -> Rows:
        """Return the rows that are printed."""
        raise NotImplementedError

    def _detailed(self) -> Rows:
        """Return the rows of all that the test has seen."""
        raise NotImplementedError

    def _picture(self) -> str:
        """Return the figure as HTML."""
        raise NotImplementedError

    def __str__(self) -> str:
        return aligned(self._title, self._rows())

    def details(self) -> str:
        """Return all that the test has seen, as text; the glossary of the documentation explains the terms."""
        return aligned(self._title, self._detailed())

    @property
    def failure(self) -> str:
        """The message of an error for a failed test: the diagnosis in the first line, then the details."""
        return f"{self.diagnosis}\n{aligned(f'{self.kind} test FAILED', self._detailed())}"

    def require(self) -> None:
        """Raise ``AdjointMismatchError``, with this report as its attribute ``report``, if the test failed."""
        if not self.passed:
            error = AdjointMismatchError(self.failure)
            error.report = self  # type: ignore[attr-defined]
            raise error

    def _repr_html_(self) -> str:
        picture, more = self._picture(), html_details(self._detailed())
        shown = f"<div>{picture}</div>{more}" if picture else more
        return html_table(self._title, self.passed, self._rows(), shown)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary of plain values, without the figure."""
        record = {**vars(self), "notes": list(vars(self)["notes"])}
        del record["figure"]
        return record

    def to_json(self, indent: int | None = None) -> str:
        """Return :meth:`to_dict` as JSON; numbers that are not finite become ``null``."""
        return strict_json(self.to_dict(), indent)
