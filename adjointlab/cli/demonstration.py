"""Where the demonstration is: ``examples/demo`` beside the package, in a clone. The wheel does not hold it."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import adjointlab

CLONE = Path(adjointlab.__file__).parents[1]
_NAME = "adjointlab_demo"  # the folder's own name, demo, may be somebody else's


def load(root: Path = CLONE) -> ModuleType:
    """Return the package ``examples/demo`` of a clone, imported: of the folder that holds the package by default."""
    source = root / "examples" / "demo" / "__init__.py"
    # Of an installed package the folder is site-packages, where another project may have left its examples.
    if not (source.is_file() and (root / "pyproject.toml").is_file()):
        raise FileNotFoundError(
            "it is not installed with the package. It is the folder examples/demo of adjointlab's repository: "
            "clone the repository and run `make demo` in it"
        )
    if _NAME in sys.modules:
        return sys.modules[_NAME]
    spec = spec_from_file_location(_NAME, source, submodule_search_locations=[str(source.parent)])
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[_NAME] = module  # its own modules import one another through this name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[_NAME]
        raise
    return module
