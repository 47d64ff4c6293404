"""Sphinx configuration. `make docs` builds the site into build/docs; it loads nothing from elsewhere."""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent / "src")]

import docstrings  # noqa: E402
import links  # noqa: E402
import reference_pages  # noqa: E402
from sphinx.errors import SphinxError  # noqa: E402

import lesionsam  # noqa: E402

project = "LesionSAM"
author = "The LesionSAM authors"
copyright = f"2026, {author}"
release = version = lesionsam.__version__
REPOSITORY = os.environ.get("DOCS_REPOSITORY", "").rstrip("/")  # address of its web page, for links to source files

highlight_language = "none"  # of blocks that name no language: commands
smartquotes = False  # options begin with two hyphens
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["README.md", "_static"]
nitpicky = True
# Types of other libraries and internal classes in signatures have no page here; links between pages are checked.
nitpick_ignore_regex = [(r"py:.*", r".*")]

myst_heading_anchors = 4  # the anchors that a repository's web page gives
myst_enable_extensions = ["attrs_inline", "deflist"]
nb_execution_mode = os.environ.get("DOCS_EXECUTE", "off")  # off | force: run the tutorials anew
nb_ipywidgets_js = {}  # would come from a CDN
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
default_role = "code"  # single backticks in docstrings
napoleon_use_ivar = True
python_maximum_signature_line_length = 90

html_theme = "furo"
html_title = f"LesionSAM {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
copybutton_exclude = ".linenos, .gp, .go"
if REPOSITORY:
    html_theme_options = {"source_edit_link": f"{REPOSITORY}/edit/main/docs/{{filename}}"}


def setup(app):
    """Write the generated pages before Sphinx looks for pages, and rewrite links as pages are read."""
    app.connect("builder-inited", lambda app: reference_pages.write(DOCS, REPOSITORY))
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", separate_arguments, priority=400)  # before napoleon's 500
    app.connect("build-finished", check_offline)


def read_source(app, docname, source):
    """Put the text of a tracked page in its form for the site."""
    if not docname.startswith((*reference_pages.FOLDERS, "tutorials/")):
        source[0] = links.site_text(source[0], DOCS / f"{docname}.md", REPOSITORY)


def separate_arguments(app, what, name, obj, options, lines):
    """Give each argument of a docstring its own line, as napoleon expects."""
    if what in ("class", "function", "method", "exception"):
        lines[:] = docstrings.separated(lines, docstrings.names_of(obj))


def check_offline(app, error):
    """End the build with an error where a page loads something from a server."""
    if error is None and app.builder.format == "html" and (found := links.loads_from_elsewhere(Path(app.outdir))):
        raise SphinxError("expected a site that opens offline, got " + "; ".join(found[:5]))
