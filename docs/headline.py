"""Put the headline of docs/benchmarks.md into README.md, between its markers, so that no number there is typed by hand.

`python docs/headline.py` is run by `make bench` and `make docs`.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- benchmark -->\n).*?(<!-- /benchmark -->)", re.DOTALL)


def headline(page: str) -> str:
    """Return what README says about speed, from the benchmarks page; nothing but a pointer if it has no results."""
    section = re.search(r"^## The adjoint of a convolution$.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    machine = re.search(r"^- Machine: (.*)$", page, re.MULTILINE)
    date = re.search(r"^- Date: (.*)\.$", page, re.MULTILINE)
    if not section or not machine or not date:
        return "Not measured in this checkout: `make bench` measures, and writes [the results](docs/benchmarks.md).\n"
    table = [line.strip("| ").split(" | ") for line in section[0].splitlines() if line.startswith("|")]
    names, rows = table[0], table[2:]
    lines = []
    for row in rows:
        times = dict(zip(names, row, strict=True))
        best = next(f"{time.strip('*')} ({name})" for name, time in times.items() if time.startswith("**"))
        others = (times[name].strip("*") for name in ("eager vjp", "conv_transpose", "JAX"))
        lines.append(f"| {row[0]} | {' | '.join(others)} | {best} |")
    return (
        "| adjoint of a convolution | autograd | `conv_transpose` | `jit(jax.linear_transpose)` | fastest other way |\n"
        "|:--|--:|--:|--:|--:|\n" + "\n".join(lines) + "\n\n"
        f"Measured on {date[1]} ({machine[1].rstrip('.')}); `make bench` measures again.\n"
        "[All results](docs/benchmarks.md), with the targets that are not met.\n"
    )


def main() -> None:
    readme, page = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
    block = headline(page.read_text() if page.exists() else "")
    readme.write_text(BLOCK.sub(lambda found: found[1] + block + found[2], readme.read_text()))


if __name__ == "__main__":
    main()
