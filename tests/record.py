"""Record what every map of the zoo becomes: verdict, engine, number of ops, kernels, seeded results.

`python tests/record.py FILE.json` writes the record; `python tests/record.py FILE.json --compare OLD.json` says what
has changed since. A change of the engine is to explain each difference.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from operator_zoo import ZOO, Entry
from torch.utils import _pytree as pytree

import adjointlab as al

TOLERANCE = 64  # units of rounding between two ways to compute the same


def numbers(tree: Any) -> list[float]:
    """Return three numbers for each leaf: its norm, and its products with two fixed vectors."""
    found = []
    for leaf in pytree.tree_leaves(tree):
        flat = (
            torch.view_as_real(leaf.detach().resolve_conj()).reshape(-1)
            if leaf.is_complex()
            else leaf.detach().reshape(-1)
        )
        flat = flat.double()
        steps = torch.arange(flat.numel(), dtype=torch.float64)
        found += [float(v) for v in (flat.norm(), flat @ torch.cos(steps), flat @ torch.sin(1.7 * steps))]
    return found


def record(entry: Entry, dtype: torch.dtype, engine: str) -> dict[str, Any]:
    function, domain = entry.build(dtype)
    report = al.check_linearity(function, domain)
    build = al.affine_operator if entry.affine else al.linear_operator
    made = build(function, domain, engine=engine)
    A = made.linear if entry.affine else made
    x, v = (space.randn(torch.Generator().manual_seed(3)) for space in (A.domain, A.codomain))
    lines = str(A.explain()).splitlines()
    return {
        "verdict": report.verdict,
        "engine": A.engine,
        "ops": sum(" = " in line for line in lines),
        "kernels": [line.strip() for line in lines if "kernel" in line],
        "A": numbers(A(x)),
        "A.H": numbers(A.H(v)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--engines", nargs="+", default=["eager", "traced"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    start = time.time()
    for entry in ZOO:
        for dtype in entry.dtypes:
            for engine in options.engines:
                name = f"{entry.name}-{str(dtype).removeprefix('torch.')}-{engine}"
                try:
                    found[name] = record(entry, dtype, engine)
                except (ValueError, RuntimeError, AssertionError) as error:
                    found[name] = {"error": f"{type(error).__name__}: {error}"[:200]}
    options.file.write_text(json.dumps(found, indent=1))
    print(f"{len(found)} maps in {time.time() - start:.0f} s")
    return compare(json.loads(options.compare.read_text()), found) if options.compare else 0


def compare(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print what differs between two records, and return how many maps do."""
    differing = 0
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name, {}), new.get(name, {})
        eps = (
            torch.finfo(torch.float32).eps
            if "float32" in name or "complex64" in name
            else torch.finfo(torch.float64).eps
        )
        lines = []
        for key in sorted(a.keys() | b.keys()):
            u, v = a.get(key), b.get(key)
            if key in {"A", "A.H"} and u and v and len(u) == len(v):
                size = max(map(abs, u), default=0.0)
                same = all(abs(s - t) <= TOLERANCE * eps * (size + abs(s)) for s, t in zip(u, v, strict=True))
            else:
                same = u == v
            if not same:
                lines.append(f"  {key}: {u} -> {v}")
        if lines:
            differing += 1
            print("\n".join([name, *lines]))
    print(f"{differing} of {len(old.keys() | new.keys())} maps differ")
    return differing


if __name__ == "__main__":
    sys.exit(main())
