"""Public names of a package, imported when they are first used (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_names(package: str, **modules: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package whose names are imported on first use.

    `__getattr__, __dir__ = lazy_names(__name__, table="read_boxes write_boxes")`

    Type checkers read the package's `if TYPE_CHECKING` imports instead; tests/package compares the two.

    Args:
        package: the package's `__name__`. modules: module below the package, with `__` for a dot -> its public names,
            separated by spaces.
    """
    homes = {name: module.replace("__", ".") for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
