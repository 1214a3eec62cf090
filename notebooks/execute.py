"""Run the notebooks and keep what they print and draw.

`python notebooks/execute.py` runs every `notebooks/*.py` that is a notebook and writes the `.ipynb` beside it;
`--check` writes into `build/notebooks` instead; names choose some of them: `python notebooks/execute.py 01 quickstart`.
A notebook ends in assertions, so that running it is a test of it.
"""

import argparse
import sys
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names; all notebooks if none is given")
    parser.add_argument("--check", action="store_true", help="leave the committed notebooks as they are")
    options = parser.parse_args()
    output = HERE.parent / "build" / "notebooks" if options.check else HERE
    output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for source in sorted(HERE.glob("[0-9]*.py")):
        if options.names and not any(name in source.stem for name in options.names):
            continue
        begin = time.perf_counter()
        notebook = read(source)
        try:
            nbclient.NotebookClient(
                notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
            ).execute()
        except nbclient.exceptions.CellExecutionError as error:
            print(error, file=sys.stderr)
            failed += 1
        tidy(notebook)
        nbformat.write(notebook, output / f"{source.stem}.ipynb")
        print(f"{source.stem}: {time.perf_counter() - begin:.0f} s", flush=True)
    return failed


def read(source: Path) -> nbformat.NotebookNode:
    """Return the notebook of a source, with cell ids that depend on nothing but the position."""
    notebook = jupytext.read(source, fmt="py:percent")
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"
        cell.source = cell.source.strip("\n")
        # The title of a cell that draws, `# %% A photograph, and …`, says what is seen, for those who cannot see it.
        if "title" in cell.metadata:
            cell.metadata = nbformat.from_dict({"mystnb": {"image": {"alt": cell.metadata.title}}})
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    return notebook


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Drop what differs between equal runs: times of execution."""
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k != "execution"})
    notebook.metadata["language_info"] = nbformat.from_dict({"name": "python"})


if __name__ == "__main__":
    sys.exit(main())
