"""Is `ConvTranspose` the adjoint of a convolution? Try every padding mode and stride, and show it in README.md.

`python docs/padding.py` draws `docs/figures/padding.png` and writes what it shows into README.md, between its markers,
so that no number there is typed by hand. It needs matplotlib: `.venv` has it after `make env`.
"""

import re
from pathlib import Path

import torch
from torch import nn

import adjointlab as al

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- padding -->\n).*?(<!-- /padding -->)", re.DOTALL)
MODES = ("zeros", "circular", "reflect", "replicate")
STRIDES = (1, 2, 3)
SIZES = {1: 12, 2: 12, 3: 6}  # of the input, by the number of its dimensions
Cases = dict[tuple[int, str, int], tuple[str, bool]]


def compare(dims: int, mode: str, stride: int) -> tuple[str, bool]:
    """Return what `ConvTranspose` with the same settings is, and whether the derived adjoint passes the dot test."""
    c = getattr(nn, f"Conv{dims}d")(1, 2, 3, stride, padding=1, padding_mode=mode, dtype=torch.float64)
    A = al.affine_operator(c, (1, 1, *[SIZES[dims]] * dims)).linear
    y = A.codomain.randn(torch.Generator().manual_seed(0))
    right = []
    for extra in range(stride):  # every output_padding that there is
        transpose = getattr(nn, f"ConvTranspose{dims}d")
        guess = transpose(2, 1, 3, stride, padding=1, output_padding=extra, bias=False, dtype=torch.float64)
        guess.weight = c.weight
        found, expected = guess(y), A.H(y)
        right.append(found.shape == expected.shape and torch.allclose(found, expected))
    verdict = "right" if right[0] else "found" if any(right) else "wrong"
    return verdict, al.check_adjoint(A, trials=2).passed


def cases() -> Cases:
    """Return what was found for every number of dimensions, padding mode and stride."""
    return {(d, mode, stride): compare(d, mode, stride) for d in SIZES for mode in MODES for stride in STRIDES}


def summary(found: Cases) -> str:
    """Return what README says of the cases."""
    verdicts = [verdict for verdict, _ in found.values()]
    passed = sum(derived for _, derived in found.values())
    count = "all" if passed == len(found) else passed
    return (
        f"*`ConvTranspose` with the settings of the convolution is its adjoint in {verdicts.count('right')} of "
        f"{len(verdicts)} cases, with another\n`output_padding` in {verdicts.count('found')} more, and never in the "
        f"other {verdicts.count('wrong')}. The derived adjoint is right in {count}.* (`python docs/padding.py`)\n"
    )


def draw(found: Cases, file: Path) -> None:
    """Draw the cases as a grid of squares."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.style.use(ROOT / "notebooks" / "adjointlab.mplstyle")
    looks = {
        "right": ("#2f6db3", "✓", "the adjoint"),
        "found": ("#9cc3e6", "(✓)", "with another output_padding"),
        "wrong": ("#d9622b", "✗", "never the adjoint"),
    }
    figure, panels = plt.subplots(1, 4, figsize=(9.5, 2.9), sharey=True)
    titles = {**{dims: f"ConvTranspose{dims}d" for dims in SIZES}, 0: "A.H, in 1, 2 and 3 dimensions"}
    for axes, (dims, title) in zip(panels, titles.items(), strict=True):
        for row, mode in enumerate(MODES):
            for stride in STRIDES:
                verdict = found[dims, mode, stride][0] if dims else "wrong"
                if not dims and all(found[d, mode, stride][1] for d in SIZES):
                    verdict = "right"
                colour, sign, _ = looks[verdict]
                axes.add_patch(plt.Rectangle((stride - 0.46, row - 0.46), 0.92, 0.92, color=colour))
                ink = "black" if verdict == "found" else "white"
                axes.text(stride, row, sign, ha="center", va="center", color=ink, fontsize=11)
        axes.set(xlim=(0.4, 3.6), ylim=(3.6, -0.6), title=title)
        axes.set_xticks(STRIDES, [f"stride {stride}" for stride in STRIDES])
        axes.set_yticks(range(len(MODES)), MODES)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("padding mode")
    handles = [
        plt.Rectangle((0, 0), 1, 1, color=colour, label=f"{sign}  {label}") for colour, sign, label in looks.values()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.savefig(file, dpi=160)


def main() -> None:
    found = cases()
    draw(found, ROOT / "docs" / "figures" / "padding.png")
    readme = ROOT / "README.md"
    readme.write_text(BLOCK.sub(lambda block: block[1] + summary(found) + block[2], readme.read_text()))


if __name__ == "__main__":
    main()
