"""Formatting of reports as aligned text, strict JSON, HTML tables and heat maps, with the standard library only."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any

Rows = Sequence[tuple[str, str]]
Grid = tuple[tuple[float, ...], ...]

_CELL = "padding:2px 10px 2px 0;text-align:left;vertical-align:top"
_DARK = (33, 49, 104)  # the colour of the largest entry; zero is white


def aligned(title: str, rows: Rows) -> str:
    """Return a title with two columns below it: names and values."""
    width = max((len(name) for name, _ in rows), default=0)
    indent = " " * (width + 4)
    return "\n".join(
        [title, *(f"  {name:<{width}}  {value.replace(chr(10), chr(10) + indent)}" for name, value in rows)]
    )


def strict_json(record: dict[str, Any], indent: int | None = None) -> str:
    """Return a record as JSON that every parser accepts: NaN and infinities become ``null``."""
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def html_table(title: str, good: bool, rows: Rows, more: str = "") -> str:
    """Return a green or red title and a table of two columns; all text is escaped except ``more``, which is HTML."""
    colour = "#1a7f37" if good else "#b42318"
    return f'<div><strong style="color:{colour}">{html.escape(title)}</strong>{_table(rows)}{more}</div>'


def html_folded(summary: str, rows: Rows) -> str:
    """Return a table of two columns that opens at a click on its summary."""
    return f"<details><summary>{html.escape(summary)}</summary>{_table(rows)}</details>"


def _table(rows: Rows) -> str:
    body = "".join(
        f'<tr><th style="{_CELL};font-weight:normal;opacity:.7">{html.escape(name)}</th>'
        f'<td style="{_CELL};white-space:pre-wrap">{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table>{body}</table>"


def heat_map(title: str, grid: Grid, side: int = 128) -> str:
    """Return a heat map of numbers ≥ 0 as inline SVG: white is zero, the darkest colour the largest number."""
    height, width = len(grid), len(grid[0])
    finite = [value for row in grid for value in row if math.isfinite(value)]
    top = max(finite, default=0.0)
    cell = max(2.0, side / max(height, width))
    squares = []
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            if value == 0.0:
                continue
            share = (value / top if top > 0.0 else 0.0) if math.isfinite(value) else 1.0
            colour = ",".join(str(round(255 + share * (dark - 255))) for dark in _DARK)
            fill = f"rgb({colour})" if math.isfinite(value) else "#b42318"
            place = f'x="{j * cell:.2f}" y="{i * cell:.2f}" width="{cell:.2f}" height="{cell:.2f}"'
            squares.append(f'<rect {place} fill="{fill}"/>')
    w, h = width * cell, height * cell
    label = html.escape(f"{title}, largest {top:.3g}")
    return (
        '<figure style="display:inline-block;vertical-align:top;margin:4px 12px 4px 0">'
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" '
        f'aria-label="{label}" width="{w:.0f}" height="{h:.0f}" viewBox="0 0 {w:.2f} {h:.2f}" '
        f'shape-rendering="crispEdges">'
        f'<rect width="{w:.2f}" height="{h:.2f}" fill="white"/>{"".join(squares)}'
        f'<rect x="0.5" y="0.5" width="{w - 1:.2f}" height="{h - 1:.2f}" fill="none" stroke="#999"/></svg>'
        f'<figcaption style="font-size:smaller;max-width:16em">{label}</figcaption></figure>'
    )
