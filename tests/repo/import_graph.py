"""Which modules of the project a file really imports, at whatever depth, read from the source: for dvc.yaml.

`python tests/repo/import_graph.py` prints the code that every stage of dvc.yaml must depend on;
`--write` puts it there.
"""

from __future__ import annotations

import sys
import textwrap
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lesionsam"
SOURCE = ROOT / "src"
sys.path[:0] = [str(SOURCE)]

from lesionsam.utils import code  # noqa: E402


def module_files() -> dict[str, Path]:
    """Dotted name -> file of every module of the package; `__init__` files go by their package's name."""
    return _module_files(SOURCE)


@cache
def _module_files(source: Path) -> dict[str, Path]:
    found = {}
    for path in sorted((source / PACKAGE).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(path: Path, *, top_level_only: bool = False) -> frozenset[str]:
    """Absolute dotted names that the file imports; see `lesionsam.utils.code.imported_names`."""
    return code.imported_names(path, SOURCE / PACKAGE, top_level_only=top_level_only)


def project_imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Modules of the package that the file imports by itself; the bare packages around them do not count."""
    modules = module_files()
    names = imported_names(path, top_level_only=top_level_only)
    packages = {name for name, file in modules.items() if file.name == "__init__.py"}
    return {name for name in names if name in modules and name not in packages}


def stage_modules(stage: str) -> set[str]:
    """Modules below the package that the stage's script runs and that make its result."""
    imports = code.package_imports(ROOT / "stages" / f"{stage}.py", SOURCE / PACKAGE)
    return set(code.closure(*imports, without=code.NO_RESULT))


def stage_deps(stage: str) -> list[str]:
    """Paths of the code that a stage depends on, relative to the root, sorted.

    A package is named as a folder where the stage runs at least four fifths of the modules in it, or where it ships
    other files too; elsewhere modules are named one by one.
    """
    needed, files = stage_modules(stage), code.module_files(SOURCE / PACKAGE)
    deps = {f"stages/{stage}.py"}
    for name in needed:
        folder = files[name].parent
        inside = {other for other, path in files.items() if path.is_relative_to(folder)}
        whole = folder != SOURCE / PACKAGE and (ships_files(folder) or len(inside & needed) >= 0.8 * len(inside))
        deps.add((folder if whole else files[name]).relative_to(ROOT).as_posix())
    return sorted(dep for dep in deps if not any(dep.startswith(f"{other}/") for other in deps))


def ships_files(folder: Path) -> bool:
    """Whether a package itself, and not one inside it, holds other files than modules, such as templates."""
    others = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyi", ".pyc")]
    return any(next(up for up in path.parents if (up / "__init__.py").exists()) == folder for path in others)


def is_code(dep: str) -> bool:
    """Whether a dep of dvc.yaml is code, and no data."""
    return dep.startswith(("src/", "stages/"))


def rewritten(text: str) -> str:
    """dvc.yaml with the code among every stage's deps as `stage_deps` finds it; all else as it stands."""
    stage, parts = "", text.split("    deps: [")
    for k, part in enumerate(parts[:-1]):
        stage = [line for line in part.splitlines() if line.startswith("  ") and line[2] != " "][-1].strip(" :")
        listed, rest = parts[k + 1].split("]", 1)
        data = [dep.strip() for dep in listed.split(",") if not is_code(dep.strip())]
        lines = textwrap.wrap(
            ", ".join([*data, *stage_deps(stage)]) + "]",
            width=120,
            initial_indent="    deps: [",
            subsequent_indent="      ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        parts[k + 1] = "\n".join(lines).removeprefix("    deps: [") + rest
    return "    deps: [".join(parts)


if __name__ == "__main__":
    target = ROOT / "dvc.yaml"
    if "--write" in sys.argv:
        target.write_text(rewritten(target.read_text(encoding="utf-8")), encoding="utf-8")
    for script in sorted((ROOT / "stages").glob("*.py")):
        sys.stdout.write(f"{script.stem}:\n" + "".join(f"  {dep}\n" for dep in stage_deps(script.stem)) + "\n")
