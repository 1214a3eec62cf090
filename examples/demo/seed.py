"""The question that started it: is ``ConvTranspose`` the adjoint of ``Conv``? With zero padding and stride 1 it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

import adjointlab as al

from .common import Stage, gaussian, save, show

_CONV: dict[int, type[nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSE: dict[int, type[nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_MODES = ("zeros", "circular", "reflect", "replicate")


@dataclass(frozen=True)
class _Case:
    """A convolution, the ``ConvTranspose`` of the same settings, and whether that is its adjoint."""

    name: str
    conv: dict[str, Any]
    transpose: dict[str, Any]
    right: bool
    channels: tuple[int, int] = (1, 1)


_CASES = (
    _Case("padding=1", {"padding": 1}, {"padding": 1}, True),
    _Case("3→8 channels, padding=1", {"padding": 1}, {"padding": 1}, True, (3, 8)),
    _Case("padding=2, dilation=2", {"padding": 2, "dilation": 2}, {"padding": 2, "dilation": 2}, True),
    _Case("padding=1, stride=2", {"stride": 2, "padding": 1}, {"stride": 2, "padding": 1}, False),
    _Case(
        "padding=1, stride=2; + output_padding=1",
        {"stride": 2, "padding": 1},
        {"stride": 2, "padding": 1, "output_padding": 1},
        True,
    ),
    *(
        _Case(f"padding=1, {mode!r} padding_mode", {"padding": 1, "padding_mode": mode}, {"padding": 1}, False)
        for mode in _MODES[1:]
    ),
)


def _pair(dims: int, case: _Case, kernel: int = 3) -> tuple[nn.Module, nn.Module]:
    """Return a convolution and the transposed convolution with the same weights, in double precision."""
    few, many = case.channels
    c = _CONV[dims](few, many, kernel, bias=False, dtype=torch.float64, **case.conv)
    t = _TRANSPOSE[dims](many, few, kernel, bias=False, dtype=torch.float64, **case.transpose)
    t.weight = c.weight
    return c, t


def seed_question(stage: Stage) -> bool:
    """Compare the derived ``cᴴ`` with ``ConvTranspose``, by ``⟨c x, y⟩ = ⟨x, cᴴ y⟩`` and value by value.

    Parameters
    ----------
    stage : Stage
        Where to print and draw.

    Returns
    -------
    bool
        Whether the derived adjoint was always exact, and ``ConvTranspose`` exactly where expected.
    """
    stage.title("1  Is ConvTranspose the adjoint of Conv?")
    torch.manual_seed(0)
    with torch.no_grad():
        equal = _equal_inner_products(stage)
        expected = _where_it_stops(stage)
        _draw(stage)
    return equal and expected


def _equal_inner_products(stage: Stage) -> bool:
    table = Table(title="With the same weights, c = ConvNd(1, 1, 3, padding=1) in float64: it is", title_justify="left")
    for name in ("c", "⟨c x, y⟩", "⟨x, ConvTranspose y⟩", "⟨x, cᴴ y⟩, derived", "‖ConvTranspose y − cᴴ y‖ / ‖cᴴ y‖"):
        table.add_column(name, justify="left" if name == "c" else "right")
    equal = True
    for dims, size in ((2, 64), (3, 24)):
        c, t = _pair(dims, _CASES[0])
        A = al.linear_operator(c, (1, 1, *[size] * dims))
        x, y = A.domain.randn(), A.codomain.randn()
        derived, theirs = A.H(y), t(y)
        difference = float(A.domain.norm(derived - theirs) / A.domain.norm(derived)) / A.domain.eps
        products = (A.codomain.inner(A(x), y), A.domain.inner(x, theirs), A.domain.inner(x, derived))
        table.add_row(f"Conv{dims}d, {size}^{dims}", *(f"{float(p):.13f}" for p in products), f"{difference:.2f} eps")
        equal &= difference < 16
    stage.console.print(table)
    return equal


def _where_it_stops(stage: Stage) -> bool:
    table = Table(title="Elsewhere it stops being the adjoint, and the derived cᴴ does not", title_justify="left")
    table.add_column("c, kernel_size=3", no_wrap=True)
    table.add_column("ConvTranspose is", no_wrap=True)
    table.add_column("its dot-test error", justify="right")
    table.add_column("of the derived cᴴ", justify="right")
    expected = True
    for dims, size in ((2, 64), (3, 16)):
        for case in _CASES:
            c, t = _pair(dims, case)
            A = al.linear_operator(c, (1, case.channels[0], *[size] * dims))
            derived = al.check_adjoint(A)
            shape = tuple(t(A.codomain.zeros()).shape)
            if shape != A.domain.specs[0].shape:
                right, verdict, error = False, f"wrong shape, {' × '.join(map(str, shape[2:]))}", "–"
            else:
                theirs = al.check_adjoint(A, adjoint=t)
                right, error = theirs.passed, f"{theirs.error / A.domain.eps:.2g} eps"
                verdict = "the adjoint" if right else "wrong values"
            colour = "green" if right else "red"
            own, mark = ("green", "") if derived.passed else ("red", "FAILED: ")
            table.add_row(
                f"Conv{dims}d, {case.name}",
                f"[{colour}]{verdict}[/]",
                error,
                f"[{own}]{mark}{derived.error / A.domain.eps:.2f} eps[/]",
            )
            expected &= bool(derived.passed) and right == case.right
        table.add_section()
    stage.console.print(table)
    return expected


def _draw(stage: Stage) -> None:
    """Draw ``|ConvTranspose y − cᴴ y|`` of one y for every padding mode."""
    size, kernel = 32, 7
    weights = gaussian(1.2, 1.2).to(torch.float64)
    y = torch.rand(1, 1, size, size, dtype=torch.float64)
    differences: list[Tensor] = []
    for mode in _MODES:
        case = _Case(mode, {"padding": kernel // 2, "padding_mode": mode}, {"padding": kernel // 2}, mode == "zeros")
        c, t = _pair(2, case, kernel)
        nn.init.zeros_(c.get_parameter("weight")).add_(weights)
        A = al.linear_operator(c, y)
        differences.append((t(y) - A.H(y)).abs()[0, 0])
    figure = Figure(figsize=(11, 3.5), layout="constrained")
    figure.suptitle(
        "|ConvTranspose2d y − cᴴ y| for one y: equal with zero padding, wrong at the border otherwise", fontsize=11
    )
    panels = figure.subplots(1, len(_MODES))
    top = max(float(d.max()) for d in differences)
    for axes, mode, difference in zip(panels, _MODES, differences, strict=True):
        largest = float(difference.max())
        title = f"padding_mode={mode!r}\nlargest difference {largest:.1g}"
        picture = show(axes, difference, title, cmap="magma", vmin=0, vmax=top)
    figure.colorbar(picture, ax=panels, shrink=0.85, pad=0.01)
    save(stage, figure, "convtranspose.png")
