"""Copies of the package's source in which a test changes a file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from lesionsam.utils.code import PACKAGE


def package_copy(folder: Path, changes: Mapping[str, Callable[[str], str]] | None = None) -> Path:
    """Copy the package's modules below `folder`, which must be new, and return the package's folder.

    Args:
        changes: module below the package, such as `models.decoder` -> what makes its new text of the old one.
    """
    target = folder / PACKAGE.name
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__", "*.html", "web", "presets"))
    for name, change in (changes or {}).items():
        path = target / f"{name.replace('.', '/')}.py"
        old = path.read_text(encoding="utf-8")
        new = change(old)
        assert new != old, name
        path.write_text(new, encoding="utf-8")
    return target


def reworded(text: str) -> str:
    """Another docstring, comments and blank lines: nothing that runs."""
    quote = text.index('"""') + 3
    return f"# A comment.\n\n{text[:quote]}Reworded. {text[quote:]}\n\n# Another.\n"


def recoded(text: str) -> str:
    """One statement more."""
    return f"{text}\nADDED = 1\n"
