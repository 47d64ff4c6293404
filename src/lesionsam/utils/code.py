"""Identity of code: a digest over what a module runs, which neither comments nor docstrings nor layout change.

Resumed trainings, caches and dvc.yaml ask one question: did the code change that makes this result? The answer is the
import closure of a module within the package, read from the source without importing anything.

    >>> from lesionsam.utils.code import NO_RESULT, code_digest
    >>> len(code_digest("data.frames", without=NO_RESULT))
    64
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# Packages and modules that run beside the work and change no result. Values of parameters are compared on their own,
# so that the code that reads and checks them (`config`) does not count.
MODEL_LIBRARIES = ("segment-anything", "transformers", "timm")  # that run a SAM
NO_RESULT = ("config", "errors", "tracking", "utils.code", "utils.processes", "utils.progress")


def code_digest(*modules: str, without: Iterable[str] = (), package: Path | None = None) -> str:
    """Return the SHA-256, 64 hex digits, of all code that the modules run.

    Args:
        modules, without, package: see `closure`.
    """
    digests = module_digests(*modules, without=without, package=package)
    return hashlib.sha256("".join(f"{name} {value}\n" for name, value in digests.items()).encode()).hexdigest()


def module_digests(*modules: str, without: Iterable[str] = (), package: Path | None = None) -> dict[str, str]:
    """Return module name -> SHA-256 of its code, for the modules and everything they import; sorted by name.

    Args:
        modules, without, package: see `closure`.
    """
    files = module_files(package or PACKAGE)
    return {name: source_digest(files[name]) for name in closure(*modules, without=without, package=package)}


def closure(*modules: str, without: Iterable[str] = (), package: Path | None = None) -> list[str]:
    """Return the modules and all that they import from the package, directly or not, in functions too; sorted.

    Imports under `if TYPE_CHECKING` do not count. `__init__` files hold no code of their own and do not count.

    Args:
        modules: dotted names below the package, such as `models.decoder`.
        without: modules or packages that are left out, with whatever only they import.
        package: folder of the package; None: of the one that runs.
    Raises:
        ValueError: no such module.
    """
    package = package or PACKAGE
    files, left_out = module_files(package), tuple(without)
    for name in left_out:
        if name not in files and not any(known.startswith(f"{name}.") for known in files):
            raise ValueError(f"without: expected a module or package of {package.name}, got {name!r}")
    seen: set[str] = set()
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name not in files:
            raise ValueError(f"expected a module of {package.name}, got {name!r}")
        if name in seen or is_in(name, left_out):
            continue
        seen.add(name)
        todo += package_imports(files[name], package)
    return sorted(seen)


def is_in(module: str, places: Iterable[str]) -> bool:
    """Return whether a module is one of the places (`utils.code`) or lies in one of them (`tracking`)."""
    return any(module == place or module.startswith(f"{place}.") for place in places)


@cache
def module_files(package: Path) -> dict[str, Path]:
    """Return dotted name below the package -> source file, without the `__init__` files; sorted by name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        if path.name != "__init__.py":
            found[".".join(path.relative_to(package).with_suffix("").parts)] = path
    return found


@cache
def package_imports(path: Path, package: Path) -> tuple[str, ...]:
    """Return the modules of the package, as dotted names below it, that a file imports by itself; sorted."""
    start = f"{package.name}."
    names = {name.removeprefix(start) for name in imported_names(path, package) if name.startswith(start)}
    return tuple(sorted(names & module_files(package).keys()))


@cache
def imported_names(path: Path, package: Path, *, top_level_only: bool = False) -> frozenset[str]:
    """Return the absolute dotted names that a file imports; `from a import b` gives both a and a.b.

    Args:
        path: inside or outside the package. top_level_only: leave out imports in functions.
    """
    parents = path.relative_to(package.parent).parent.parts if path.is_relative_to(package) else ()
    names: set[str] = set()
    for statement in _imports(_parsed(path), top_level_only):
        if isinstance(statement, ast.Import):
            names.update(alias.name for alias in statement.names)
            continue
        base = parents[: len(parents) - statement.level + 1] if statement.level else ()
        origin = ".".join((*base, *(statement.module or "").split("."))).strip(".")
        names.add(origin)
        names.update(f"{origin}.{alias.name}" for alias in statement.names)
    return frozenset(names)


def _imports(node: ast.AST, top_level_only: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield from _imports(ast.Module([other], []), top_level_only)
        elif not (top_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            yield from _imports(child, top_level_only)


@cache
def source_digest(path: Path) -> str:
    """Return the SHA-256, 64 hex digits, of a Python file's syntax tree without docstrings; comments are not in it."""
    digest = hashlib.sha256()
    for part in _tokens(_parsed(path)):
        digest.update(part.encode() + b"\n")
    return digest.hexdigest()


def _tokens(node: object) -> Iterator[str]:
    """The tree as text, the same under every Python version: empty fields, which versions add, are left out."""
    if isinstance(node, ast.AST):
        yield type(node).__name__
        for name, value in ast.iter_fields(node):
            if name == "body" and _has_docstring(node):
                value = value[1:]
            if value is not None and value != []:
                yield name
                yield from _tokens(value)
        yield ")"
    elif isinstance(node, list):
        for each in node:
            yield from _tokens(each)
    else:
        yield repr(node)


def _has_docstring(node: ast.AST) -> bool:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
        return False
    first = node.body[0]
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), str(path))


def library_versions(*packages: str) -> str:
    """Return "name version" of the installed ones of some packages, whose code makes results too."""
    found = []
    for package in packages:
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)
