"""The command line, which checks ``⟨A x, y⟩ = ⟨x, Aᴴ y⟩`` for the operator that a ``TARGET`` names.

A ``TARGET`` is ``import.path:name`` or ``import.path:name(literal, name=literal)``, with attributes after that, as in
``torch.nn:Conv3d(1, 1, 3, padding=1, bias=False)``.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line: the console script ``adjointlab``."""
    try:
        from adjointlab.cli.app import app
    except ModuleNotFoundError as missing:
        if missing.name not in {"typer", "rich"}:
            raise
        sys.stderr.write(f'error: the command line needs {missing.name}: pip install "adjointlab[cli]"\n')
        sys.exit(2)
    app(prog_name="adjointlab")
