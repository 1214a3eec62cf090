"""Formatting of reports as aligned text, strict JSON, HTML tables and heat maps, with the standard library only."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any

Rows = Sequence[tuple[str, str]]
Grid = tuple[tuple[float, ...], ...]
Curve = tuple[str, tuple[tuple[float, float], ...]]

_CELL = "padding:2px 10px 2px 0;text-align:left;vertical-align:top"
_MAP_SIDE = 128  # pixels of the longer side of a heat map
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


def html_details(rows: Rows) -> str:
    """Return a table of two columns that opens at a click on the word details."""
    return f"<details><summary>details</summary>{_table(rows)}</details>"


def _table(rows: Rows) -> str:
    body = "".join(
        f'<tr><th style="{_CELL};font-weight:normal;opacity:.7">{html.escape(name)}</th>'
        f'<td style="{_CELL};white-space:pre-wrap">{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table>{body}</table>"


def heat_map(title: str, grid: Grid) -> str:
    """Return a heat map of numbers ≥ 0 as inline SVG: white is zero, the darkest colour the largest number."""
    height, width = len(grid), len(grid[0])
    finite = [value for row in grid for value in row if math.isfinite(value)]
    top = max(finite, default=0.0)
    cell = max(2.0, _MAP_SIDE / max(height, width))
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


def log_plot(title: str, x_label: str, curves: Sequence[Curve], guides: Sequence[Curve]) -> str:
    """Return curves of positive numbers on logarithmic axes as inline SVG; guides are dashed and named."""
    shown = [[(math.log10(x), math.log10(y)) for x, y in curve if x > 0 and y > 0] for _, curve in (*curves, *guides)]
    points = [point for curve in shown[: len(curves)] for point in curve]
    if not points:
        return ""
    (left, right), (bottom, top) = [(math.floor(min(axis)), math.ceil(max(axis))) for axis in zip(*points, strict=True)]
    bottom, top, right = min(bottom, top - 1), max(top, bottom + 1), max(right, left + 1)
    margin, width, height = 44, 300.0, 240.0

    def place(x: float, y: float) -> tuple[float, float]:
        return margin + (x - left) / (right - left) * width, 8 + (top - y) / (top - bottom) * height

    parts = []
    for ends, sign in ((range(left, right + 1), "x"), (range(bottom, top + 1), "y")):
        for exponent in ends[:: max(1, -(-len(ends) // 6))]:
            u, v = place(exponent, bottom) if sign == "x" else place(left, exponent)
            u, v, anchor = (u, v + 15, "middle") if sign == "x" else (u - 5, v + 4, "end")
            power = f'10<tspan dy="-4" font-size="8">{str(exponent).replace("-", "−")}</tspan>'
            parts.append(f'<text x="{u:.1f}" y="{v:.1f}" text-anchor="{anchor}">{power}</text>')
    for number, ((name, _), curve) in enumerate(zip((*curves, *guides), shown, strict=True)):
        is_guide = number >= len(curves)
        line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in curve)
        look = 'stroke="#888" stroke-dasharray="4 3"' if is_guide else 'stroke="rgb(33,49,104)" stroke-width="1.6"'
        parts.append(f'<polyline points="{line}" fill="none" {look} clip-path="url(#frame)"/>')
        if is_guide and curve:
            (x, y), (x_end, y_end) = curve[0], curve[-1]
            part = min(1.0, (y - bottom) / (y - y_end)) if y > y_end else 1.0  # of it is seen
            u, v = place(x + 0.85 * part * (x_end - x), y + 0.85 * part * (y_end - y))
            parts.append(
                f'<text x="{u - 4:.1f}" y="{v - 5:.1f}" text-anchor="end" fill="#666">{html.escape(name)}</text>'
            )
        else:
            spots = [place(*point) for point in curve]
            parts.extend(f'<circle cx="{u:.1f}" cy="{v:.1f}" r="2.2" fill="rgb(33,49,104)"/>' for u, v in spots)
    frame = f'x="{margin}" y="8" width="{width:.1f}" height="{height:.1f}"'
    w, h, label = margin + width + 12, height + 48, html.escape(title)
    return (
        '<figure style="display:inline-block;vertical-align:top;margin:4px 12px 4px 0">'
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" width="{w:.0f}" height="{h:.0f}" '
        f'viewBox="0 0 {w:.0f} {h:.0f}" font-family="sans-serif" font-size="11" fill="currentColor">'
        f'<clipPath id="frame"><rect {frame}/></clipPath><rect {frame} fill="none" stroke="#999"/>{"".join(parts)}'
        f'<text x="{margin + width / 2:.0f}" y="{h - 6:.0f}" text-anchor="middle">{html.escape(x_label)}</text></svg>'
        f'<figcaption style="font-size:smaller;max-width:24em">{label}</figcaption></figure>'
    )
