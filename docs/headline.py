"""Put the headline of docs/benchmarks.md into README.md, between its markers, so that no number there is typed by hand.

`python docs/headline.py` is run by `make bench` and `make docs`.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- benchmark -->\n).*?(<!-- /benchmark -->)", re.DOTALL)


def headline(page: str) -> str:
    """Return what README says about speed, from the benchmarks page; nothing but a pointer if it has no results."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")
    ]
    rows = [(row[1], row[3], row[5]) for row in cells if len(row) == 6]
    machine = re.search(r"^- Machine: (.*)$", page, re.MULTILINE)
    date = re.search(r"^- Date: (.*)\.$", page, re.MULTILINE)
    lines = []
    for text, measured, case in rows:
        times = measured.removesuffix(" ×")
        if text.startswith("faster than `conv_transpose`"):
            lines.append(f"| adjoint of a convolution {case} | `conv_transpose` | {times} × |")
        elif text.startswith("faster than `jax"):
            lines.append(f"| {case} of convolutions, geometric mean | `jax.jit(jax.linear_transpose)` | {times} × |")
    if not lines or machine is None or date is None:
        return "Not measured in this checkout: `make bench` measures, and writes [the results](docs/benchmarks.md).\n"
    table = "\n".join(["| | against | faster by |", "|:--|:--|--:|", *lines])
    return (
        f"{table}\n\n"
        f"Measured on {date[1]} ({machine[1].rstrip('.')}); `make bench` measures again.\n"
        "[All results](docs/benchmarks.md), with the targets that are not met.\n"
    )


def main() -> None:
    readme, page = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
    block = headline(page.read_text() if page.exists() else "")
    readme.write_text(BLOCK.sub(lambda found: found[1] + block + found[2], readme.read_text()))


if __name__ == "__main__":
    main()
