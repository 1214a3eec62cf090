"""The public names, whatever is imported first."""

import importlib.metadata
import subprocess
import sys

import pytest

import adjointlab as al


def python(code: str) -> str:
    """Return what a new process prints."""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_every_public_name_exists() -> None:
    assert all(hasattr(al, name) for name in al.__all__)
    assert al.__all__ == sorted(al.__all__)
    assert set(al.__all__) <= set(dir(al))


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'linear_transpose'"):
        al.linear_transpose  # noqa: B018


def test_version_is_that_of_the_distribution() -> None:
    assert al.__version__ == importlib.metadata.version("adjointlab")
    assert "__version__" in dir(al)


def test_without_a_distribution_there_is_no_version() -> None:
    code = """
import importlib.metadata
def version(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = version
import adjointlab as al
print(getattr(al, "__version__", "none"))
"""
    assert python(code) == "none"


def test_version_needs_no_torch() -> None:
    code = """
import sys
before = set(sys.modules)
import adjointlab as al
light = set(sys.modules) - before
al.__version__
print(sorted({"torch", "numpy"} & set(sys.modules)), "importlib.metadata" in light)
"""
    assert python(code) == "[] False"


@pytest.mark.slow
def test_import_is_light_and_functions_are_not_hidden_by_modules() -> None:
    """One process imports torch; of each module, it then has a copy of its own import adjointlab from there."""
    code = """
import os, sys
from importlib import import_module
import adjointlab.errors
assert "torch" not in sys.modules
import torch
before = set(sys.modules)
firsts = ["errors", "derive", "solvers", "verify", "affine"]
for first in firsts:
    if os.fork() == 0:
        import_module(f"adjointlab.{first}")
        import adjointlab as al
        modules = {"precondition", "prox", "solvers"}
        assert not [n for n in al.__all__ if n not in modules and not callable(getattr(al, n))], first
        heavy = {"scipy", "pylops", "deepinv", "matplotlib", "pytest", "hypothesis", "typer", "torch._dynamo"}
        assert not heavy & (set(sys.modules) - before), first
        os._exit(0)
print(sum(os.wait()[1] == 0 for _ in firsts))
"""
    assert python(code) == "5"
