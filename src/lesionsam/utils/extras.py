"""Which extra of the package brings a library."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires


def missing_library(error: ModuleNotFoundError) -> str | None:
    """Return one line that names the extra to install for a failed import; None if no extra brings the library."""
    library = (error.name or "").partition(".")[0]
    try:
        requirements = requires("lesionsam") or []
    except PackageNotFoundError:  # run from the sources
        return None
    pattern = re.compile(rf"{library.replace('_', '[-_]')}\b(?![-_.]\w).*extra == ['\"]([\w-]+)['\"]", re.IGNORECASE)
    extras = sorted(f"lesionsam[{match[1]}]" for text in requirements if (match := pattern.match(text)))
    return f"{library} is not installed; install {' or '.join(extras)}" if extras else None
