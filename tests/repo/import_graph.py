"""Which modules of the project a file really imports, at whatever depth, read from the source: for dvc.yaml.

`python tests/repo/import_graph.py` prints the module deps that every stage of dvc.yaml must name;
`--write` puts them there.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lesionsam"
SOURCE = ROOT / "src"

# Run by stages, but no part of what they give: a tweak of the logging or of a message must not train again.
NOT_DEPS = {f"{PACKAGE}.tracking.{name}" for name in ("tracker", "tensorboard", "lineage")} | {f"{PACKAGE}.errors"}


def module_files() -> dict[str, Path]:
    """Dotted name -> file of every module of the package; `__init__` files go by their package's name."""
    found = {}
    for path in sorted((SOURCE / PACKAGE).rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _statements(node: ast.AST, *, top_level_only: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif _is_type_checking(child) or (
            top_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        ):
            continue
        else:
            yield from _statements(child, top_level_only=top_level_only)


@cache
def imported_names(path: Path, *, top_level_only: bool = False) -> frozenset[str]:
    """Absolute dotted names that the file imports, functions included; `from a import b` gives both a and a.b.

    Names needed by the type checker only do not count.
    """
    package = path.relative_to(SOURCE).parent.parts if path.is_relative_to(SOURCE) else ()
    names: set[str] = set()
    for statement in _statements(ast.parse(path.read_text(encoding="utf-8")), top_level_only=top_level_only):
        if isinstance(statement, ast.Import):
            names.update(alias.name for alias in statement.names)
            continue
        base = package[: len(package) - statement.level + 1] if statement.level else ()
        origin = ".".join((*base, *(statement.module or "").split("."))).strip(".")
        names.add(origin)
        names.update(f"{origin}.{alias.name}" for alias in statement.names)
    return frozenset(names)


def project_imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Modules of the package that the file imports by itself; the bare packages around them do not count."""
    modules = module_files()
    names = imported_names(path, top_level_only=top_level_only)
    packages = {name for name, file in modules.items() if file.name == "__init__.py"}
    return {name for name in names if name in modules and name not in packages}


def closure(path: Path, *, without: frozenset[str] = frozenset()) -> set[str]:
    """Modules of the package that run when the file does, not looking behind those in `without`."""
    modules, seen, todo = module_files(), set(), sorted(project_imports(path))
    while todo:
        name = todo.pop()
        if name in seen or name in without:
            continue
        seen.add(name)
        todo.extend(project_imports(modules[name]) - seen)
    return seen


def stage_deps(script: str) -> list[str]:
    """The stage's script, its modules and the templates they name, for dvc.yaml: sorted, relative to the root."""
    modules = module_files()
    files = [modules[name] for name in closure(ROOT / script, without=frozenset(NOT_DEPS))]
    shipped = [path for path in (SOURCE / PACKAGE).rglob("*") if path.is_file() and not path.suffix.startswith(".py")]
    sources = [path.read_text(encoding="utf-8") for path in files]
    named = [path for path in shipped if any(f'"{path.name}"' in source for source in sources)]
    return sorted([script, *(path.relative_to(ROOT).as_posix() for path in [*files, *named])])


def rewritten(text: str) -> str:
    """dvc.yaml with the code among every stage's deps as `stage_deps` finds it; all else as it stands."""
    lines: list[str] = []
    deps: set[str] = set()
    stage = ""
    for line in text.splitlines():
        if line.startswith("  ") and line[2] != " ":
            stage = line.strip().rstrip(":")
        code = line.startswith(("      - src/", "      - stages/"))
        if line == "    deps:":
            deps = {f"      - {dep}" for dep in stage_deps(f"stages/{stage}.py")}
        elif deps and not line.startswith("      - "):  # the list ends here
            begun = max(k for k, known in enumerate(lines) if known == "    deps:") + 1
            lines[begun:] = sorted({*lines[begun:], *deps})
            deps = set()
        if not code:
            lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        (ROOT / "dvc.yaml").write_text(rewritten((ROOT / "dvc.yaml").read_text(encoding="utf-8")), encoding="utf-8")
    for stage in sorted((ROOT / "stages").glob("*.py")):
        lines = "\n".join(f"      - {dep}" for dep in stage_deps(f"stages/{stage.name}"))
        sys.stdout.write(f"{stage.stem}:\n{lines}\n\n")
