"""How Sphinx builds these pages: make docs. Nothing is fetched from a network while it does."""

from __future__ import annotations

import re

import pyro_affine

project = "pyro_affine"
author = copyright = "pyro_affine contributors"
version = release = pyro_affine.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"pyro_affine {release}"
html_static_path = ["_static"]
html_css_files = ["outputs.css"]

myst_heading_anchors = 3  # so that pages can link to headings

# Tutorials are run by the build. The cache runs again only those whose own code has changed: after a change of the
# package, make docs-clean comes first.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_in_temp = True  # files that a tutorial writes do not stay
nb_execution_timeout = 300  # seconds a cell
nb_merge_streams = True
nb_output_stderr = "remove"  # warnings there name folders of the machine that built the page

autodoc_default_options = {"members": True, "exclude-members": "extra_repr"}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Types of other packages, and the internal ones that a signature may show, have no page here to link to.
nitpick_ignore_regex = [("py:.*", r"(?!pyro_affine\.\w+$).*")]


def _as_plain_text(app, what, name, obj, options, lines):
    """Our docstrings are plain text: |x| is an absolute value, * multiplies, results have no type in front."""
    for index, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(``.*?``)", line)
            parts[::2] = [re.sub(r"([|*])", r"\\\1", part) for part in parts[::2]]  # the others are code
            lines[index] = "".join(parts)
        if lines[index - 1].strip() == "Returns:" if index else what == "property":
            lines[index] = re.sub(r"^( *)", r"\1: ", lines[index])  # an empty type


def _as_python(app, what, name, obj, options, signature, returns):
    """The default that a dataclass makes anew for each instance, written so that the signature can be parsed."""
    return (signature or "").replace("<factory>", "...") or None, returns


def setup(app):
    app.connect("autodoc-process-signature", _as_python)
    app.connect("autodoc-process-docstring", _as_plain_text, priority=400)  # before napoleon
