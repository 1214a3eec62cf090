"""The wheel, installed where nothing else is, works with torch and numpy alone."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.parser import BytesParser
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.packaging, pytest.mark.slow]


def run(*command: str | Path) -> str:
    """Standard output of a command; its whole output when it fails.

    `PYTHON*` variables are dropped: they would let this environment into the empty one.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def normalized(name: str) -> str:
    """A distribution's name as the package index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built with the build backend of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel):
    """The wheel's METADATA, parsed."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return BytesParser().parsebytes(archive.read(name))


@pytest.fixture(scope="module")
def empty_python(wheel, tmp_path_factory):
    """The interpreter of an environment that holds the wheel and what it requires, and nothing else."""
    folder = tmp_path_factory.mktemp("empty") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check")
    run(*pip, "torch==2.13.0")
    run(*pip, "-c", ROOT / ".ci" / "constraints.txt", wheel)
    yield python
    shutil.rmtree(folder)  # it holds a whole torch


def requirements(metadata, *, optional):
    """Names of the distributions required for an extra (optional=True) or always."""
    lines = [line for line in metadata.get_all("Requires-Dist") if ("extra ==" in line) == optional]
    return {normalized(re.match(r"[\w.-]+", line).group()) for line in lines} - {"adjointlab"}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folders = {name.split("/")[0] for name in names}
    assert {re.sub(r"-.*\.dist-info$", ".dist-info", folder) for folder in folders} == {
        "adjointlab",
        "adjointlab.dist-info",
    }
    assert not [name for name in names if "demo/" in name], "the demonstration belongs to the repository"
    assert "adjointlab/py.typed" in names, "the marker that lets type checkers read the annotations is missing"


def test_source_archive_holds_the_demonstration(tmp_path):
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, ROOT)
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"examples/demo/__init__.py", "adjointlab/__init__.py", "tests/demo/test_demo.py", "CITATION.cff"} <= names


def test_metadata_tell_what_the_package_is(metadata):
    assert (
        metadata["Version"] == re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    )
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().startswith("# adjointlab\n")
    assert "License-Expression" in metadata


def test_runtime_requirements_are_torch_and_numpy(metadata):
    assert requirements(metadata, optional=False) == {"torch", "numpy"}


def test_installed_alone_it_imports_silently_and_brings_nothing_optional(empty_python, metadata):
    # One test, so that parallel workers never build this environment twice.
    run(empty_python, "-m", "pip", "check", "--disable-pip-version-check")
    listed = json.loads(run(empty_python, "-m", "pip", "list", "--format=json", "--disable-pip-version-check"))
    installed = {normalized(package["name"]) for package in listed}
    assert {"adjointlab", "torch", "numpy"} <= installed
    assert not installed & requirements(metadata, optional=True)
    # -I: neither the working directory nor the user's site-packages can lend a hand. -W error: no warning either.
    origin = run(empty_python, "-I", "-W", "error", "-c", "import adjointlab; print(adjointlab.__file__)")
    assert Path(origin.strip()).is_relative_to(empty_python.parents[1])


def test_import_pulls_in_no_optional_library():
    """Here, where the optional libraries are installed: importing adjointlab leaves them alone.

    What torch imports by itself where it finds it (tqdm) does not count.
    """
    optional = {"scipy", "pylops", "deepinv", "matplotlib", "skimage", "nibabel", "typer", "rich", "tqdm"}
    optional |= {"pytest", "_pytest", "hypothesis"}
    script = """
        import json, sys
        import numpy, torch
        before = set(sys.modules)
        import adjointlab
        print(json.dumps(sorted(set(sys.modules) - before)))
    """
    added = {name.split(".")[0] for name in json.loads(run(sys.executable, "-I", "-c", dedent(script)))}
    assert "adjointlab" in added
    assert not added & optional
