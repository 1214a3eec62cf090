"""The figures of docs/benchmarks.md: every way in multiples of ours, and cost against size."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from targets import Row, fastest_equal, latest, select

COLOURS = {
    "eager vjp": "#7f7f7f", "convolution_backward": "#a05a2c", "conv_transpose": "#d1495b", "conv": "#d1495b",
    "flipped conv": "#edae49", "FFT": "#00798c", "JAX": "#7b4fa6", "PyLops": "#5b8c3e", "SciPy": "#30638e",
    "deepinv": "#e377c2",
}  # fmt: skip
STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True, "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8, "axes.axisbelow": True, "legend.frameon": False, "figure.dpi": 150,
    "savefig.bbox": "tight", "savefig.facecolor": "white",
}  # fmt: skip


def draw(rows: list[Row], folder: Path, page: str) -> dict[str, str]:
    """Draw what there are measurements for; return the figures' paths relative to the page, by name."""
    import matplotlib as mpl

    mpl.use("Agg")
    drawn = {}
    with mpl.rc_context(STYLE):
        for which in ("adjoint", "forward"):
            if found := select(rows, "rows", map=which):
                drawn[which] = _save(_ratios(found, which), folder, f"{page}-{which}")
        for ndim in (2, 3):
            found = latest(select(rows, "sweep", ndim=ndim, batch=1, channels="1→1"))
            if found:
                drawn[f"sweep{ndim}"] = _save(_costs(found, ndim), folder, f"{page}-sweep-{ndim}d")
        if found := select(rows, "maps", map="adjoint"):
            drawn["maps"] = _save(_maps(found), folder, f"{page}-maps")
    return drawn


def _save(figure: Any, folder: Path, name: str) -> str:
    from matplotlib import pyplot as plt

    path = folder / f"{name}.png"
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    return f"figures/{path.name}"


def _ratios(found: list[Row], which: str) -> Any:
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for r in found for name in r["seconds"] if name != "adjointlab"))
    figure, axes = plt.subplots(figsize=(8.5, 0.72 * len(found) + 1.6))
    for i, r in enumerate(found):
        own = r["seconds"]["adjointlab"]
        if i % 2:
            axes.axhspan(i - 0.5, i + 0.5, color="#f3f3f3", zorder=0)
        for name in names:
            if name in r["seconds"]:
                axes.scatter(r["seconds"][name] / own, _beside(i, names, name), s=40, edgecolor="white", linewidth=0.7,
                             color=COLOURS.get(name, "black"), zorder=3)  # fmt: skip
    axes.axvline(1, color="black", linewidth=1.6, zorder=2)
    call = {"adjoint": "A.H(v)", "forward": "A(x)"}[which]
    axes.annotate(call, (1, 1.01), xycoords=("data", "axes fraction"), ha="center", va="bottom", weight="bold")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_yticks(range(len(found)), [r["case"] for r in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"time in multiples of {call}: to the right is slower")
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=COLOURS.get(n, "black"), label=n) for n in names]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _beside(i: int, names: Collection[str], name: str) -> float:
    """Return the height of a point of row i: each way has its own, so that equal times do not hide each other."""
    return i + 0.8 * ((list(names).index(name) + 0.5) / len(names) - 0.5)


def _costs(found: list[Row], ndim: int) -> Any:
    from matplotlib import pyplot as plt

    power = {2: "²", 3: "³"}[ndim]
    widths = sorted({r["width"] for r in found})
    colours = {w: plt.get_cmap("viridis")(0.9 * i / max(1, len(widths) - 1)) for i, w in enumerate(widths)}
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.4), sharey=True, layout="constrained")
    for axes, which, label, native in (
        (panels[0], "adjoint", "adjoint: A.H(v)", "conv_transpose"),
        (panels[1], "forward", "forward: A(x)", "conv"),
    ):
        for w in widths:
            part = sorted((r for r in found if r["width"] == w and r["map"] == which), key=lambda r: r["size"])
            for way, line in (("native", "--"), ("adjointlab", "-")):
                points = [(r["size"], 1e3 * r["seconds"][way]) for r in part if way in r["seconds"]]
                if points:
                    axes.plot(*zip(*points, strict=True), line, marker="o", markersize=3.5, color=colours[w],
                              linewidth=2 if way == "adjointlab" else 1.1)  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(f"{label} against {native}")
        sizes = sorted({r["size"] for r in found})
        axes.set_xticks(sizes, [f"{n}{power}" for n in sizes])
        axes.minorticks_off()
        axes.set_xlabel("image" if ndim == 2 else "volume")
    panels[0].set_ylabel("milliseconds")
    handles = [plt.Line2D([], [], color=colours[w], linewidth=2.5, label=f"{w}{power} kernel") for w in widths]
    handles += [
        plt.Line2D([], [], color="#444444", linewidth=2, label="adjointlab"),
        plt.Line2D([], [], color="#444444", linewidth=1.1, linestyle="--", label="native"),
    ]
    panels[1].legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _maps(found: list[Row]) -> Any:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 0.5 * len(found) + 1.4))
    ways = {  # the way, its colour and size
        "autograd": (lambda r: r["seconds"]["eager"], "#7f7f7f", 46),
        "A.H(v)": (lambda r: r["seconds"]["adjointlab"], "#edae49", 46),
        "A.H(v), frozen": (lambda r: r["seconds"]["frozen"], "#d1495b", 46),
        "fastest equal way": (lambda r: fastest_equal(r)[1], "#00798c", 46),
    }
    for i in range(1, len(found), 2):
        axes.axhspan(i - 0.5, i + 0.5, color="#f3f3f3", zorder=0)
    for label, (seconds, colour, size) in ways.items():
        heights = [_beside(i, ways, label) for i in range(len(found))]
        axes.scatter([1e3 * seconds(r) for r in found], heights, s=size, color=colour, label=label, zorder=3,
                     edgecolor="white", linewidth=0.7)  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_yticks(range(len(found)), [r["case"] for r in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("milliseconds of the adjoint: to the right is slower")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
