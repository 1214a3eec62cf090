"""The demonstration: minimise ``F(x) = ½‖c x − y‖²`` on real data by its gradient ``cᴴ(c x − y)``.

Needs the extra ``adjointlab[demo]``. In a clone, ``make demo`` and ``adjointlab demo`` run it.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .common import Recovery, Stage
from .mri import deblur_volume, reconstruct_coils
from .photograph import deblur_photograph
from .seed import seed_question

__all__ = ["FIGURES", "run"]

FIGURES = ("convtranspose.png", "photograph.png", "mri_blur.png", "mri_coils.png")


def run(output: Path, *, quick: bool = False, console: Console | None = None) -> bool:
    """Check ``⟨c x, y⟩ = ⟨x, cᴴ y⟩``, then recover a photograph and an MRI volume by ``x ← x − cᴴ(c x − y)/‖c‖²``.

    Parameters
    ----------
    output : Path
        Folder for the figures; it must exist.
    quick : bool
        Small images and few steps.
    console : rich.console.Console, optional
        Where the report is printed; standard output if not given.

    Returns
    -------
    bool
        Whether every adjoint was exact, every objective decreased at every step, and every error became smaller.
    """
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:  # a pipe has no width, and tables should not be folded to 80 columns
            console = Console(highlight=False, width=118)
    begin = time.perf_counter()
    stage = Stage(console, output, quick)
    with torch.random.fork_rng(devices=[]):
        passed = seed_question(stage)
        recoveries = [deblur_photograph(stage), deblur_volume(stage), reconstruct_coils(stage)]
    _summary(stage, recoveries)
    passed &= all(recovery.passed for recovery in recoveries)
    verdict = "[bold green]everything holds[/]" if passed else "[bold red]something does not hold[/]"
    console.print(
        f"{verdict}; {time.perf_counter() - begin:.0f} s; figures in {output}: {', '.join(FIGURES)}", soft_wrap=True
    )
    return passed


def _summary(stage: Stage, recoveries: list[Recovery]) -> None:
    table = Table(title="Summary", title_justify="left")
    table.add_column("c", no_wrap=True)
    for name in ("dot test", "‖c‖", "F before", "F after", "error before", "error after", "steps", "time"):
        table.add_column(name, justify="right")
    for r in recoveries:
        table.add_row(
            r.name,
            f"{r.dot_error / r.eps:.2g} eps",
            f"{r.norm:.3f}",
            f"{r.objective[0]:.4g}",
            f"{r.objective[-1]:.4g}",
            f"{r.error_before:.2%}",
            f"{r.error_after:.2%}",
            f"{len(r.objective) - 1}",
            f"{r.seconds:.1f} s",
        )
    stage.console.print(table)
