"""How a page of benchmarks begins: the figure of adjoints, and what it means to a user."""

from __future__ import annotations

from collections.abc import Iterable

from targets import Row, fastest, select


def lead(rows: list[Row], drawn: dict[str, str]) -> Iterable[str]:
    """Begin a page: the figure of adjoints, and what it means to a user."""
    found = select(rows, "rows", map="adjoint")
    if not found:
        return
    if "adjoint" in drawn:
        yield f"![Dots on a logarithmic axis: times of other ways, in multiples of A.H(v)]({drawn['adjoint']})\n"
        yield (
            "*The adjoint of a convolution by other means. A dot at 10× takes ten times as long as `A.H(v)`; a dot to "
            "the left of the line is faster.*\n"
        )
    yield "This means for you:\n"
    yield (
        f"- **Instead of autograd**, which is what you have without any work: it takes {_span(found, 'eager vjp')} as "
        "long as `A.H(v)`.\n"
        "- **Instead of `conv_transpose`**, which is the adjoint for zero padding only: it takes "
        f"{_span(found, 'conv_transpose')} as long.\n"
        "- **Instead of the fastest way that we know**, another one in each case, written by hand: it takes "
        f"{_span(found)} as long. It is faster than `A.H(v)` in {sum(fastest(r)[1] < ours(r) for r in found)} of "
        f"{len(found)} cases.\n"
        "- Below are the tables, [how it is measured](#how-it-is-measured), and the [targets](#targets) that we have "
        "set, met or not.\n"
    )


def ours(row: Row) -> float:
    """Return the seconds of our way."""
    return float(row["seconds"]["adjointlab"])


def _span(found: list[Row], way: str | None = None) -> str:
    times = sorted(
        (r["seconds"][way] if way else fastest(r)[1]) / ours(r) for r in found if not way or way in r["seconds"]
    )
    return f"{multiple(times[0])} to {multiple(times[-1])} times"


def multiple(value: float) -> str:
    """Return a ratio of times as it is shown."""
    return f"{value:.{2 if value < 10 else 0}f}"
