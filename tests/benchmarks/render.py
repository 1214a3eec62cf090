"""Render pytest-benchmark's JSON: `python render.py results.json docs` writes docs/benchmarks.md and its figures.

Results on another device than the CPU have a page of their own, docs/benchmarks-cuda.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lead import lead, multiple, ours
from targets import Row, fastest, fastest_equal, latest, ratio, select, targets, to_hand, whole_to_parts

SECTIONS = {
    "rows",
    "strided",
    "gradient",
    "learning",
    "sweep",
    "bare",
    "differences",
    "overhead",
    "memory",
    "import",
    "build",
    "solvers",
    "bounds",
    "preconditioners",
    "maps",
    "kept",
    "subsets",
    "tomography",
    "ordered subsets",
    "jacobians",
    "recurrences",
    "recurrences, memory",
    "grams",
}
_OWN = {
    "adjointlab": "`auto`",
    "cgls": "none",
    "diagonal": "`diagonal`",
    "circulant": "`circulant`",
    "nystrom": "`nystrom`",
}
ABOUT = """\
## How it is measured

`make bench` measures what is on this page and writes it. Compare only numbers of one row: the ways of a row take turns
in one run, so that a machine whose speed changes slows all of them alike. Each number is the median of several runs,
after two runs that do not count. Before a short run, the same way runs for about a millisecond without being timed,
because every library leaves its own threads and data behind. All that can be prepared is ready before the clock starts,
for every way alike: flipped kernels, transforms of kernels, plans, compiled functions. All ways of a row are first
checked to compute the same.
"""


def main(source: str, folder: str) -> None:
    """Render the results in `source` into `folder`; those of a quick or partial run beside their source."""
    results = json.loads(Path(source).read_text())
    rows = [b["extra_info"] for b in results["benchmarks"] if b.get("extra_info", {}).get("section")]
    for row in rows:
        row.setdefault("seconds", {})
    own = results["machine_info"]["adjointlab"]
    on_cpu = own["device"] == "CPU"
    wanted = SECTIONS if on_cpu else {"rows", "gradient", "sweep"}  # a run on a rented device may have no time for more
    complete = wanted <= {row["section"] for row in rows} and not own["quick"]
    name = "benchmarks" if on_cpu else "benchmarks-cuda"
    target = Path(folder) if complete else Path(source).with_suffix("")
    (target / "figures").mkdir(parents=True, exist_ok=True)
    decided = targets(rows)
    from figures import draw

    drawn = draw(rows, target / "figures", name)
    parts = [
        "# Benchmarks\n" if on_cpu else f"# Benchmarks on {own['device']}\n",
        *lead(rows, drawn),
        *_sections(rows, drawn),
        ABOUT,
        _setting(results),
        _targets(decided),
    ]
    (target / f"{name}.md").write_text("\n".join(parts))
    print(f"Rendered into {target}/{name}.md")
    for _, group in decided:
        for t in group:
            verdict = "met" if t.met else "NOT MET"
            print(f"{verdict:8} {t.shown(t.measured):>10} (limit {t.shown(t.limit)})  {t.text}: {t.case}")


def _setting(results: dict[str, Any]) -> str:
    machine = results["machine_info"]
    own, cpu = machine["adjointlab"], machine["cpu"]
    versions = ", ".join(f"{name} {version}" for name, version in own["versions"].items())
    lines = [
        f"- Machine: {cpu.get('brand_raw', 'unknown CPU')}, {cpu.get('count', '?')} cores, "
        f"{own['threads']} threads; {machine['system']} on {machine['machine']}. Device: {own['device']}.",
        f"- Versions: {versions}.",
        f"- Date: {results['datetime'][:10]}.",
        "- Single precision; batch 1 unless a row says otherwise; kernels padded with zeros to keep the size.",
    ]
    if own["device"] != "CPU":
        lines.append("- Every run is waited for, so that what a call costs the processor counts. TF32 is off.")
        lines.append(
            "- The limits below were set for the CPU, whose `conv_transpose` leaves more to gain than cuDNN's."
        )
    if own["remark"]:
        lines.append(f"- {own['remark']}")
    if own["share"] != 1.0:
        lines.append(f"- Each comparison was given {own['share']:g} of its usual time.")
    if own["quick"]:
        lines.insert(0, "- **A quick run, with tiny sizes: it says that everything runs, and nothing about speed.**")
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], body: Iterable[Sequence[str]], align: str = "") -> str:
    """Return a Markdown table: each column to the left or right (`l`, `r`), all but the first to the right."""
    sides = align or "l" + "r" * (len(head) - 1)
    lines = [head, [{"l": ":--", "r": "--:"}[side] for side in sides], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _targets(decided: list[tuple[str, Any]]) -> str:
    body = []
    for theme, group in decided:
        body += [
            (theme, t.text, f"{'≥' if t.least else '≤'} {t.shown(t.limit)}", t.shown(t.measured),
             "met" if t.met else "**not met**", t.case)
            for t in group
        ]  # fmt: skip
    met = sum(line[4] == "met" for line in body)
    head = ("", "target", "limit", "measured", "", "decided by")
    return (
        f"## Targets\n\nEach of these numbers has a limit that we want it to meet; {met} of {len(body)} do.\n\n"
        f"{table(head, body, 'llrrll')}"
    )


def _sections(rows: list[Row], drawn: dict[str, str]) -> Iterable[str]:
    adjoint, forward = (select(rows, "rows", map=name) for name in ("adjoint", "forward"))
    yield from _contenders(adjoint, "The adjoint of a convolution", "A.H(v)", None)
    yield from _contenders(forward, "The convolution itself", "A(x)", drawn.get("forward"))
    yield from _contenders(select(rows, "strided"), "The adjoint of a convolution with a stride", "A.H(v)", None)
    yield from _contenders(select(rows, "recorded"), "The adjoint, replayed from a CUDA graph", "A.H(v)", None)
    yield from _contenders(select(rows, "exported"), "The adjoint as a file for PyTorch alone", "A.H(v)", None)
    if found := select(rows, "gradient"):
        yield "## The gradient of least squares\n"
        yield (
            "`gradient(x)` is compared with `A(x)` and then `A.H(v)`, timed as one: what a gradient consists of.\n"
            "Timed alone, run after run, `A(x)` writes to the memory of its last result, which is in the cache still.\n"
            "Between other work it is not; the last column has the sum of both alone. Before each timed run the same\n"
            "way runs untimed for about four milliseconds, since solvers call a gradient in a loop.\n"
        )
        ways = ("gradient", "parts", "forward", "adjoint")
        body = [
            (
                r["case"],
                *(_ms(r["seconds"][w]) for w in ways),
                *(f"{whole_to_parts(r, alone=a):.2f}" for a in (False, True)),
            )
            for r in found
        ]
        head = ("gradient(x), ms", "A(x), then A.H(v), ms", "A(x) alone, ms", "A.H(v) alone, ms")
        yield table(("case", *head, "gradient / both", "gradient / sum"), body)
    if found := select(rows, "learning"):
        yield "## Gradients in the kernel\n"
        yield "Those of `⟨A(x), v⟩` in x and in the kernel, by `torch.autograd.grad`, as training computes them.\n"
        body = [(r["case"], _ms(r["seconds"]["adjointlab"]), f"{ratio(r, 'module', 'adjointlab'):.2f}") for r in found]
        yield table(("case", "through A, ms", "through the module, in multiples"), body)
    yield from _sweep(rows, drawn)
    yield from _graphs(rows)
    yield from _maps(rows, drawn)
    yield from _jacobians(rows)
    yield from _recurrences(rows)
    yield from _grams(rows)
    yield from _costs(rows)
    yield from _solvers(rows)
    yield from _bounds(rows)
    yield from _preconditioners(rows)


def _contenders(found: list[Row], title: str, label: str, figure: str | None) -> Iterable[str]:
    if not found:
        return
    yield f"## {title}\n"
    yield (
        f"Milliseconds of `{label}`, then every other way in multiples of that: above 1 it is slower than `{label}`. "
        "The fastest other way is bold; a dash means that a library takes one channel only.\n"
    )
    names = list(dict.fromkeys(name for r in found for name in r["seconds"] if name != "adjointlab"))
    body = []
    for r in found:
        best = fastest(r)[0]
        cells = []
        for name in names:
            t = r["seconds"].get(name)
            cell = "–" if t is None else multiple(t / ours(r))
            cells.append(f"**{cell}**" if name == best else cell)
        body.append((r["case"], _ms(ours(r)), *cells))
    yield table(("channels, size, kernel", f"{label}, ms", *names), body)
    if figure:
        yield f"![{title}: times of other ways, in multiples of {label}]({figure})\n"


def _sweep(rows: list[Row], drawn: dict[str, str]) -> Iterable[str]:
    found = latest([r for r in rows if r["section"] == "sweep"])
    if not found:
        return
    yield "## Cost against size\n"
    yield (
        "The default engine against torch's own kernel (`conv_transpose` for the adjoint, `conv` for the forward): "
        "times of native in multiples of ours, so that above 1 we are faster. A native run that would take more than "
        "3 s, predicted from the next smaller size, is left out (`> 3 s`); where native forward and adjoint together "
        "would take more than 2 s, so would the self-check when our operator is built, and the point is left out "
        "altogether (`–`). A point where ours takes more than 1.1 times as long is measured once more at the end, and "
        "counts as it is then: the machine has slow moments that last for seconds. The targets also say how `A(x)` "
        "compares with `c(x)`, the call of the module that A replaces.\n"
    )
    for key in ("sweep2", "sweep3"):
        if key in drawn:
            yield f"![Milliseconds against size, ours solid and torch's own dashed, for each kernel]({drawn[key]})\n"
    groups = dict.fromkeys((r["ndim"], r["batch"], r["channels"]) for r in found)
    for which, label in (("adjoint", "A.H(v)"), ("forward", "A(x)")):
        for ndim, batch, channels in groups:
            part = [r for r in found if (r["ndim"], r["batch"], r["channels"]) == (ndim, batch, channels)]
            part = [r for r in part if r["map"] == which]
            power = {1: "", 2: "²", 3: "³"}[ndim]
            widths = list(dict.fromkeys(r["width"] for r in part))
            at = {(r["size"], r["width"]): r for r in part}
            sizes = sorted({r["size"] for r in part})
            body = [(f"{n}{power}", *(_speedup(at.get((n, w))) for w in widths)) for n in sizes]
            batched = f", batch {batch}" if batch > 1 else ""
            head = (f"`{label}`, {ndim}-D, {channels}{batched}", *(f"{w}{power}" for w in widths))
            yield table(head, body)


def _speedup(row: Row | None) -> str:
    if row is None:
        return ""
    seconds = row["seconds"]
    if "native" in seconds:
        return multiple(seconds["native"] / seconds["adjointlab"])
    return "> 3 s" if seconds else "–"


def _graphs(rows: list[Row]) -> Iterable[str]:
    if found := select(rows, "bare"):
        yield "## Traced adjoints against the bare kernel\n"
        yield "Nothing is lowered here; the question is what the derived graph adds to the one kernel that it needs.\n"
        body = []
        for r in found:
            other = "bare kernel" if "bare kernel" in r["seconds"] else "kept pull-back"
            t = r["seconds"]
            body.append((
                r["case"], _ms(t["traced"]), f"{other}, {_ms(t[other])}", f"{t['traced'] / t[other]:.2f}",
                f"{t['traced'] / t['eager vjp']:.2f}",
            ))  # fmt: skip
        yield table(("case", "A.H(v), ms", "bare kernel or kept pull-back, ms", "ratio", "ratio to eager vjp"), body)
    if found := select(rows, "differences"):
        yield "## Finite differences\n"
        yield (
            "The adjoint of `x ↦ (x[i+1] − x[i], x[:, j+1] − x[:, j])`, the forward written with pads or into a "
            "buffer, the adjoint by hand added up in place or with pads. The copy moves as many bytes as the adjoint "
            "has to read and write: the limit that memory sets.\n"
        )
        names = list(found[0]["seconds"])
        body = [
            (r["case"], *(_ms(r["seconds"][n]) for n in names),
             f"{to_hand(r, 'traced'):.2f}", f"{to_hand(r, 'compiled'):.2f}",
             f"{r['seconds']['compiled'] / r['seconds']['copy']:.1f}")
            for r in found
        ]  # fmt: skip
        head = (
            "case",
            *(f"{n}, ms" for n in names),
            "traced / best by hand",
            "compiled / best by hand, compiled",
            "compiled / copy",
        )
        yield table(head, body)


def _maps(rows: list[Row], drawn: dict[str, str]) -> Iterable[str]:
    if found := select(rows, "maps"):
        yield "## Maps by index\n"
        yield (
            "Milliseconds. `frozen` is the same call within `A.frozen()`, as in solvers: what the operator depends on "
            "is not compared again with what it was. The fastest equal way is that of autograd or the eager forward, "
            "a product with the ready matrix (torch's CSR, indices of 32 bits), `index_add`, small products along each "
            "dimension and others by hand, SciPy's product with the same matrix, which takes one thread, and JAX's "
            "`jit(linear_transpose)` of gathers. An asterisk: the operators of both columns chose different kernels, "
            "which happens where other work disturbs what they measure when they are built.\n"
        )
        if "maps" in drawn:
            yield f"![Milliseconds of the adjoint of each map by index, by four ways]({drawn['maps']})\n"
        for which, label, eager in (("adjoint", "A.H(v)", "autograd"), ("forward", "A(x)", "eager forward")):
            body = [_map(r) for r in found if r["map"] == which]
            head = (
                "map", eager, f"`{label}`", "frozen", "fastest equal way", "", "SciPy", "JAX", f"{eager} / `{label}`",
                "frozen / fastest",
            )  # fmt: skip
            yield table(head, body, "lrrrrlrrrr")
    if found := select(rows, "beside deepinv"):
        yield (
            "Beside deepinv, in the second environment: the adjoint of its `Tomography` interpolates as many values, "
            "at other places.\n"
        )
        ways = ("deepinv", "eager", "adjointlab", "frozen")
        body = [(r["case"], *(_ms(r["seconds"][w]) for w in ways)) for r in found]
        yield table(("map", "deepinv, ms", "autograd, ms", "`A.H(v)`, ms", "frozen, ms"), body)
    if found := select(rows, "kept"):
        yield (
            "To build an operator and call it both ways once, after others in the same process, and what it keeps: its "
            "matrix and that of its adjoint, where they were chosen.\n"
        )
        body = [
            (
                r["case"],
                f"{r['seconds']['adjointlab']:.2f}",
                *(f"{r['kept'][n]:.1f}" if r["kept"][n] else "native" for n in ("A", "A.H")),
            )
            for r in found
        ]
        yield table(("map", "seconds", "matrix of A, MB", "of A.H, MB"), body)
    if found := select(rows, "subsets"):
        yield "`A.rows(slice(0, None, 8))` against A, milliseconds of a call.\n"
        yield table(("", *found[0]["seconds"]), [(r["case"], *map(_ms, r["seconds"].values())) for r in found])
    if found := select(rows, "tomography"):
        yield "Tomography of a disc with 1 % of noise, 50 steps of each, no early stop; `lsqr` has the ready matrix.\n"
        body = [
            (r["case"], "`cgls`" if name == "adjointlab" else name, f"{t:.3f}", f"{t / r['seconds']['adjointlab']:.2f}",
             f"{r['residuals'][name]:.6f}", f"{r['build']:.1f}" if name == "adjointlab" else "–")
            for r in found
            for name, t in r["seconds"].items()
        ]  # fmt: skip
        yield table(("", "", "seconds", "in multiples of ours", "residual", "to build, seconds"), body, "llrrrr")
    if found := select(rows, "ordered subsets"):
        yield "Seconds of `svrg`, with its parts made before, until the residual is that of 50 steps of `cgls`.\n"
        body = [
            (
                r["case"],
                f"{r['subsets']}",
                f"{r['epochs']}",
                *(f"{r['seconds'][n]:.3f}" for n in ("adjointlab", "cgls")),
            )
            for r in found
        ]
        yield table(("", "subsets", "epochs", "`svrg`", "`cgls`"), body, "lrrrr")


def _map(r: Row) -> tuple[str, ...]:
    seconds, (name, best) = r["seconds"], fastest_equal(r)
    cells = [_ms(seconds[way]) for way in ("eager", "adjointlab", "frozen")]
    peers = [_ms(seconds[way]) if way in seconds else "–" for way in ("SciPy", "JAX")]
    ratios = [f"{ratio(r, 'eager', 'adjointlab'):.2f}", f"{seconds['frozen'] / best:.2f}"]
    return (r["case"] + ("" if r["alike"] else " \\*"), *cells, _ms(best), name, *peers, *ratios)


def _jacobians(rows: list[Row]) -> Iterable[str]:
    J, adjoint, point = (select(rows, "jacobians", map=name) for name in ("J", "J.H", "point"))
    if not J:
        return
    yield "## Jacobians\n"
    yield (
        "Milliseconds at one point, within `J.frozen()`, as solvers call it. `torch.func.linearize` gives a function "
        "for `J`, autograd a pull-back for `J.H` that can be kept. A new point is what `J.at(x1)` adds to one call of "
        "each, in calls of f.\n"
    )
    body = []
    for a, b, c in zip(J, adjoint, point, strict=True):
        t, u, w = a["seconds"], b["seconds"], c["seconds"]
        push = t.get("linearize")
        body.append((
            a["case"], _ms(ours(a)), "–" if push is None else _ms(push), _ms(ours(b)), _ms(u["kept pull-back"]),
            "–" if push is None else f"{ours(a) / push:.2f}", f"{ours(b) / u['kept pull-back']:.2f}",
            f"{(ours(c) - w['J and J.H']) / w['f']:.1f}",
        ))  # fmt: skip
    head = (
        "function",
        "`J(d)`",
        "linearize",
        "`J.H(v)`",
        "kept pull-back",
        "J / linearize",
        "J.H / pull-back",
        "point",
    )
    yield table(head, body)


def _recurrences(rows: list[Row]) -> Iterable[str]:
    found = {name: select(rows, "recurrences", map=name) for name in ("A", "A.H", "gradient", "build")}
    if not all(found.values()):
        return
    yield "## Recurrences\n"
    yield (
        f"Milliseconds, for a {found['A'][0]['case']}, one source, a row of receivers. The gradient is that of the "
        "speed and includes a forward; that by the inverse of the step keeps two states. The loop is one in Python, "
        "whose gradient is autograd's. Numbers too small for the format are made zero for all, as Deepwave does.\n"
    )
    names = ("adjointlab", "compiled", "inverse", "loop", "Deepwave")
    body = []
    for which in ("A", "A.H", "gradient"):
        t = found[which][0]["seconds"]
        body.append((f"`{which}`" if which != "gradient" else which, *[_ms(t[n]) if n in t else "–" for n in names]))
    yield table(("", *names), body)
    yield f"A build takes {ours(found['build'][0]):.2f} s.\n"
    memory = next((r for r in rows if r["section"] == "recurrences, memory"), None)
    if memory is not None:
        yield "The most memory that the process takes more than before, in MB, inputs and outputs included:\n"
        counts = list(dict.fromkeys(name.rpartition(", ")[2] for name in memory["bytes"]))
        ways = dict.fromkeys(name.rpartition(", ")[0] for name in memory["bytes"])
        body = [(way, *[f"{memory['bytes'][f'{way}, {count}'] / 1e6:.0f}" for count in counts]) for way in ways]
        yield table(("", *[f"{int(count):,} steps" for count in counts]), body)


def _grams(rows: list[Row]) -> Iterable[str]:
    found = select(rows, "grams")
    if not found:
        return
    yield "## Grams\n"
    yield (
        "Milliseconds of `A.gram(x)`, of A and Aᴴ one after the other, of the gram as one would write it by hand, and "
        "of mrpro's; and how far the first two are apart, in eps of the norm. All within `frozen()`, as solvers call "
        "them. The last column is what `A.gram.explain()` says.\n"
    )
    ways = ("adjointlab", "two maps", "by hand", "mrpro")
    body = [
        (r["case"], *[_ms(r["seconds"][way]) if way in r["seconds"] else "–" for way in ways],
         f"{ratio(r, 'two maps', 'adjointlab'):.2f}", f"{r['eps']:.1f}", r["said"])
        for r in found
    ]  # fmt: skip
    yield table(("case", "gram", "two maps", "by hand", "mrpro", "two maps / gram", "eps", "what is simplified"), body)


def _costs(rows: list[Row]) -> Iterable[str]:
    if found := select(rows, "overhead"):
        yield "## A call\n"
        yield table(
            ("7×7 image, 3² kernel", "µs", "in multiples of `A.H(v)`"),
            [
                ("A.H(v)" if name == "adjointlab" else name, f"{1e6 * t:.1f}", f"{t / r['seconds']['adjointlab']:.2f}")
                for r in found
                for name, t in r["seconds"].items()
            ],
        )
    if held := [r["bytes"] for r in rows if r["section"] == "memory"]:
        yield "## Memory\n"
        yield (
            "Twelve convolutions in a row, 8 channels of 1024²: the most that torch's allocator holds above baseline "
            "during one call.\n"
        )
        body = [(name, f"{b / 2**20:.0f}", f"{b / held[0]['forward']:.2f}") for name, b in held[0].items()]
        yield table(("", "MiB", "in multiples of the forward"), body)
    starts = [*select(rows, "import"), *select(rows, "build")]
    if starts:
        yield "## To begin with\n"
        label = {"import": "import", "build": "build an operator and call `A.H(v)`"}
        body = [(f"{label[r['section']]}: {name}", f"{t:.3f}") for r in starts for name, t in r["seconds"].items()]
        yield table(("in a process of its own", "seconds"), body)


def _solvers(rows: list[Row]) -> Iterable[str]:
    if not (found := select(rows, "solvers")):
        return
    yield "## Deblurring a photograph\n"
    yield (
        "512², a kernel of 11², 50 steps of `al.solvers.cgls`; each peer takes as many steps, of 50 to 150, as it "
        "needs to reach the residual `‖Ax − y‖ / ‖y‖` of ours. One that does not get there does not count. Rows with "
        "deepinv come from the second environment, which is measured where it has been made (`make interop`).\n"
    )
    yield _races(found, "`cgls`")


def _bounds(rows: list[Row]) -> Iterable[str]:
    if not (found := select(rows, "bounds")):
        return
    yield "## Deblurring a photograph that is not negative\n"
    yield (
        "As above, with `x ≥ 0`: 50 steps of `al.solvers.fista`, and the peers' accelerated proximal gradients by as "
        "many steps as they need for its residual. Peers that are not installed are left out.\n"
    )
    yield _races(found, "`fista`")


def _preconditioners(rows: list[Row]) -> Iterable[str]:
    if not (found := select(rows, "preconditioners")):
        return
    yield "## Preconditioners\n"
    yield (
        "`al.solvers.cgls` with each of `al.precondition`, to a gradient of 1e-6 of the first one, in single "
        "precision; the peers solve the same normal equations with the same products, and torchsolve with what one "
        "writes by hand. Seconds contain making the preconditioner. The last column is the gradient at the result, "
        "computed anew: a peer whose one is larger than 2e-6 has stopped by a recurrence, or at 3000 steps. Peers that "
        "are not installed are left out.\n"
    )
    body = [
        (r["case"], _OWN.get(name, name), str(r["steps"][name]),
         f"{t:.3f}", f"{t / r['seconds']['adjointlab']:.2f}", f"{r['gradients'][name]:.0e}")
        for r in found
        for name, t in r["seconds"].items()
    ]  # fmt: skip
    yield table(("", "", "steps", "seconds", "in multiples of `auto`", "gradient"), body, "llrrrr")


def _races(found: list[Row], own: str) -> str:
    body = [
        (r["case"], own if name == "adjointlab" else name, f"{t:.3f}", f"{t / r['seconds']['adjointlab']:.2f}",
         str(r["steps"][name]), f"{r['residuals'][name]:.6f}")
        for r in found
        for name, t in r["seconds"].items()
    ]  # fmt: skip
    return table(("", "", "seconds", "in multiples of ours", "steps", "residual"), body, "llrrrr")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


if __name__ == "__main__":
    main(*sys.argv[1:])
