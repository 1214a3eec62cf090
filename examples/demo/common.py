"""The parts' common code: gradient steps ``x ← x − Aᴴ(A x − y)/‖A‖²``, their report, and helpers for figures."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import adjointlab as al


@dataclass(frozen=True)
class Stage:
    """Where a part of the demonstration prints and draws, and whether it should be short."""

    console: Console
    output: Path
    quick: bool

    def title(self, text: str) -> None:
        """Print a heading."""
        self.console.print()
        self.console.rule(f"[bold]{text}", align="left")


@dataclass(frozen=True)
class Recovery:
    """One reconstruction: what was measured, what came out, and the numbers that say how good it is."""

    name: str
    truth: Tensor
    data: Tensor
    start: Tensor
    result: Tensor
    objective: tuple[float, ...]
    norm: float
    dot_error: float
    eps: float
    exact: bool
    seconds: float

    @property
    def error_before(self) -> float:
        """``‖x₀ − x‖ / ‖x‖`` of the starting point."""
        return _relative_error(self.start, self.truth)

    @property
    def error_after(self) -> float:
        """``‖x̂ − x‖ / ‖x‖`` of the result."""
        return _relative_error(self.result, self.truth)

    @property
    def monotone(self) -> bool:
        """Whether ``F`` decreased at every step."""
        return all(b < a for a, b in zip(self.objective, self.objective[1:], strict=False))

    @property
    def passed(self) -> bool:
        """Whether the adjoint is exact, ``F`` decreased at every step, and the error became smaller."""
        return self.exact and self.monotone and self.error_after < self.error_before


def _relative_error(x: Tensor, truth: Tensor) -> float:
    return float(torch.linalg.vector_norm(x - truth) / torch.linalg.vector_norm(truth))


def gaussian(*sigmas: float) -> Tensor:
    """Return the separable Gaussian kernel of sum 1, ``Σ k = 1``, with 2⌈2σ⌉ + 1 taps along each axis.

    Parameters
    ----------
    *sigmas : float
        Width along each axis, in pixels.

    Returns
    -------
    Tensor
        One dimension per width.

    Examples
    --------
    >>> gaussian(0.8, 1.6).shape
    torch.Size([5, 9])
    """
    kernel = torch.ones(())
    for sigma in sigmas:
        reach = math.ceil(2 * sigma)
        t = torch.arange(-reach, reach + 1) / sigma
        kernel = kernel[..., None] * torch.softmax(-t.square() / 2, 0)
    return kernel


def blur(conv: type[nn.Module], *sigmas: float, **options: Any) -> nn.Module:
    """Return a convolution of one channel with a Gaussian kernel, padded by half of the kernel."""
    kernel = gaussian(*sigmas)
    sizes = tuple(kernel.shape)
    c = conv(1, 1, sizes, padding=tuple(n // 2 for n in sizes), bias=False, **options)
    c.weight = nn.Parameter(kernel[None, None], requires_grad=False)
    return c


def recover(
    stage: Stage, name: str, A: al.LinearOperator, *, truth: Tensor, data: Tensor, start: Tensor, steps: int
) -> Recovery:
    """Return the result of ``x ← x − Aᴴ(A x − y)/‖A‖²``, and print how it went.

    Parameters
    ----------
    stage : Stage
        Where to print.
    name : str
        The name of the operator.
    A : LinearOperator
        The forward model.
    truth, data, start : Tensor
        The true x (known here, as the data are simulated), the data y, and the first x.
    steps : int
        Number of gradient steps.

    Returns
    -------
    Recovery
        The result and its numbers.
    """
    begin = time.perf_counter()
    report = al.check_adjoint(A)
    stage.console.print(str(report), markup=False)
    norm = float(al.operator_norm(A, tol=1e-3))
    problem = al.LeastSquares(A, data)
    x = start
    objective = []
    for _ in track(
        range(steps),
        f"{steps} gradient steps",
        console=stage.console,
        transient=True,
        disable=not stage.console.is_terminal,
    ):
        value, gradient = problem.value_and_gradient(x)
        objective.append(float(value))
        x = x - gradient / norm**2
    objective.append(float(problem(x)))
    recovery = Recovery(
        name=name,
        truth=truth,
        data=data,
        start=start,
        result=x,
        objective=tuple(objective),
        norm=norm,
        dot_error=float(report.error),
        eps=A.domain.eps,
        exact=bool(report.passed),
        seconds=time.perf_counter() - begin,
    )
    _print(stage, recovery)
    return recovery


def _print(stage: Stage, r: Recovery) -> None:
    steps = len(r.objective) - 1
    down = "decreased at every step" if r.monotone else "did [bold red]not[/] decrease at every step"
    stage.console.print(
        f"{steps} steps x ← x − cᴴ(c x − y)/‖c‖² with ‖c‖ = {r.norm:.3f}: F(x) {down}, "
        f"from {r.objective[0]:.4g} to {r.objective[-1]:.4g};\n"
        f"the relative error ‖x − x_true‖/‖x_true‖ went from {r.error_before:.2%} to {r.error_after:.2%} "
        f"({r.seconds:.1f} s)"
    )


def show(axes: Any, image: Tensor, title: str, **options: Any) -> Any:
    """Draw a real image without ticks; ``options`` go to ``imshow``."""
    picture = axes.imshow(image.detach().numpy(), **{"cmap": "gray", "interpolation": "nearest", **options})
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    return picture


def scale(axes: Any, picture: Any) -> None:
    """Draw a colour bar just below an image."""
    axes.figure.colorbar(picture, cax=axes.inset_axes((0.05, -0.09, 0.9, 0.045)), orientation="horizontal")


def curve(axes: Any, recovery: Recovery) -> None:
    """Draw ``F`` against the number of steps."""
    objective = recovery.objective
    title = "F decreases at every step" if recovery.monotone else "F"
    axes.semilogy(range(len(objective)), objective, color="tab:blue")
    axes.set_title(title, fontsize=10)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("gradient step")
    axes.set_ylabel("F(x) = ½‖c x − y‖²")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


@contextmanager
def drawn(stage: Stage, name: str, height: float, recovery: Recovery, **options: Any) -> Iterator[dict[str, Any]]:
    """Give the panels a to f of a figure whose panel F shows ``F``, then write it; ``options`` are the grid's."""
    figure = Figure(figsize=(11, height), layout="constrained")
    panels = figure.subplot_mosaic([["a", "b", "c", "F"], ["d", "e", "f", "F"]], width_ratios=[1, 1, 1, 1.2], **options)
    curve(panels["F"], recovery)
    yield panels
    save(stage, figure, name)


def save(stage: Stage, figure: Figure, name: str) -> None:
    """Write the figure as a PNG."""
    figure.savefig(stage.output / name, dpi=150)
