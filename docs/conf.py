"""Sphinx: MyST pages, the furo theme, and nothing from the network at build time or in the browser."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import fedgmr_plugin  # noqa: E402

project = "fedgmr"
author = "The fedgmr authors"
copyright = "2026, the fedgmr authors"
release = version = fedgmr_plugin.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "fedgmr_docs",
    "mathml",
    "plain_docstrings",
]
exclude_patterns = ["_build", "_ext"]
language = "en"

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 4

# Names between single backticks in docstrings link where they can. Names of other packages are not looked up.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [(r"py:(obj|class|exc)", r"(?s)(?!fedgmr_plugin\.).*")]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False

doctest_global_setup = """
import torch
torch.manual_seed(0)
torch.set_num_threads(1)
"""

html_theme = "furo"
html_title = f"fedgmr {release}"
html_static_path = ["_static"]
html_css_files = ["fedgmr.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "tango"
pygments_dark_style = "monokai"
