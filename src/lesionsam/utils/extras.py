"""Which extra of the package brings a library."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires


def extras_with(library: str) -> list[str]:
    """Return the extras of the installed package that name this library; none for one that every installation has."""
    try:
        requirements = requires("lesionsam") or []
    except PackageNotFoundError:  # run from the sources
        return []
    pattern = re.compile(rf"{re.escape(library)}\b(?![-_.]\w).*extra == ['\"]([\w-]+)['\"]", re.IGNORECASE)
    return sorted(match[1] for text in requirements if (match := pattern.match(text)))


def missing_library(error: ModuleNotFoundError) -> str | None:
    """Return one line that names the extra to install for a failed import; None if no extra brings the library."""
    library = (error.name or "").partition(".")[0]
    extras = extras_with(library)
    if not extras:
        return None
    return f"{library} is not installed; install {' or '.join(f'lesionsam[{extra}]' for extra in extras)}"
