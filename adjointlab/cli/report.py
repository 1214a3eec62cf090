"""The outcome for one target, as text, JSON and HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adjointlab.cli.target import one_line

PASSED, FAILED, UNUSABLE = 0, 1, 2
_STATUS = {PASSED: "passed", FAILED: "failed", UNUSABLE: "unusable"}


@dataclass(frozen=True)
class Outcome:
    """The outcome for one target: an exit code, and the result as text, as a JSON record and as HTML."""

    code: int
    text: str
    record: dict[str, Any]
    html: str = ""
    target: str = ""

    @property
    def status(self) -> str:
        """The status behind the target, if it was checked or written."""
        if "output" in self.record:
            return ": written"
        return "" if "explanation" in self.record else f": {_STATUS[self.code]}"

    @property
    def headline(self) -> str:
        """The target and, if it was checked, the status."""
        return f"{one_line(self.target)}{self.status}"

    def as_json(self) -> dict[str, Any]:
        """Return the record that ``--json`` writes."""
        return {"target": self.target, "status": _STATUS[self.code], "exit_code": self.code, **self.record}


def page(*reports: Any) -> str:
    """Return reports as HTML; a report without an HTML form is shown as text."""
    parts = []
    for report in reports:
        own = getattr(report, "_repr_html_", None)
        parts.append(own() if own else f"<pre>{html.escape(str(report))}</pre>")
    return "\n".join(parts)


def plain(value: Any) -> Any:
    """Return a record with numbers that are not finite as text, for JSON has none."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def document(outcomes: Sequence[Outcome]) -> str:
    """Return one HTML page with all outcomes."""
    style = "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em}pre{white-space:pre-wrap}"
    sections = [
        f"<section><h2><code>{html.escape(one_line(o.target))}</code>{o.status}</h2>\n"
        f"{o.html or '<p>' + html.escape(o.record.get('message', '')) + '</p>'}</section>"
        for o in outcomes
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>adjointlab</title>'
        f"<style>{style}</style></head>\n<body><h1>adjointlab</h1>\n{''.join(sections)}\n</body></html>\n"
    )
