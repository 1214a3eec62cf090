"""How the documentation is built: `make docs`. No page loads anything from another host."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "adjointlab"
author = "the adjointlab authors"
copyright = "the adjointlab authors, BSD-3-Clause"
version = release = installed("adjointlab")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb", "sphinx_copybutton", "mathml"]
exclude_patterns = ["_build", "_extensions", "jupyter_execute", "**/.ipynb_checkpoints"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

# Notebooks are shown as they were executed by `make notebooks`.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a notebook's cells may skip a level

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "adjointlab"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#2456a0", "color-brand-content": "#2456a0"},
    "dark_css_variables": {"color-brand-primary": "#8fb8f0", "color-brand-content": "#8fb8f0"},
}
html_show_sphinx = False
templates_path: list[str] = []
pygments_style = "friendly"
pygments_dark_style = "native"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autodoc_mock_imports = ["deepinv", "mrpro"]  # run beside the second torch only
autodoc_typehints = "none"  # docstrings state the types
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Note: how much rounding explains", "notes")]
add_module_names = False

# Every reference must resolve; the types of parameters are prose, in which only our own names are links.
nitpicky = True
nitpick_ignore_regex = [("py:class", r"(?!adjointlab\.).*")]
toc_object_entries_show_parents = "hide"
