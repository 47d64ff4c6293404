"""Arguments of docstrings that share a line, one a line on the site."""

from __future__ import annotations

import importlib
import sys

from repo.import_graph import ROOT

DOCS = str(ROOT / "docs")
sys.path[:0] = [DOCS] if DOCS not in sys.path else []
docstrings = importlib.import_module("docstrings")


def test_arguments_that_share_a_line_are_separated() -> None:
    lines = [
        "Do it.",
        "",
        "Args:",
        "    path: a file. size: (width, height), pixels; note: it is",
        "        checked. big, small: boxes.",
        "Returns:",
        "    path: as given. size: too.",
    ]
    assert docstrings.separated(lines, {"path", "size", "big", "small"}) == [
        "Do it.",
        "",
        "Args:",
        "    path: a file.",
        "    size: (width, height), pixels; note: it is checked.",
        "    big, small: boxes.",
        "Returns:",
        "    path: as given. size: too.",
    ]


def test_names_are_those_of_arguments_and_attributes() -> None:
    from lesionsam.types import Frame

    assert docstrings.names_of(Frame) == {"side", "squash"}
    assert docstrings.names_of(docstrings.separated) >= {"lines", "names"}
