"""Which modules and libraries an import of a module brings, read from the source once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from repo.import_graph import imported_names, module_files


@cache
def _modules() -> dict[str, Path]:
    return {name: path for name, path in module_files().items() if path.name != "__init__.py"}


def reached(module: str, *, late: bool = False) -> set[str]:
    """Return the module and the project's modules that importing it imports; `late`: also inside functions."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(imported_names(_modules()[name], top_level_only=not late) & _modules().keys())
    return seen


def libraries(module: str, *, late: bool = False) -> set[str]:
    """Return the top-level names that those modules import, the standard library's included."""
    return {
        name.split(".")[0]
        for one in reached(module, late=late)
        for name in imported_names(_modules()[one], top_level_only=not late)
    }
