"""Sphinx configuration of `make docs`. PyTerrier's own site builds the same pages from the installed package."""

import os
import sys

sys.path[:0] = [os.path.abspath(".."), os.path.abspath(".")]

project = "pyterrier_lit"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "directives"]
default_role = "code"  # docstrings mark code with single backticks
html_theme = "furo"
html_title = project
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
pygments_dark_style = "github-dark"  # furo's default underlines module names, which hides their underscores
copybutton_selector = "div:not(.highlight-text) > div.highlight > pre"  # outputs get no copy button

autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!pyterrier_lit).*")]  # names of other packages have no pages here
