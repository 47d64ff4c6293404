"""The public API: every name of a package's face imports, stays lazy, and is the one that type checkers see."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lesionsam
from repo.import_graph import ROOT, imported_names, module_files

TOP = ["Predictor", "ImagePredictor", "Prediction", "predict_files", "load_sam", "Sample", "box_prior", "__version__"]
FACES = {
    name: ast.parse(path.read_text(encoding="utf-8"))
    for name, path in module_files().items()
    if path.name == "__init__.py" and "lazy_names" in path.read_text(encoding="utf-8")
}


def public(face: ast.Module) -> list[str]:
    """Return `__all__` of a parsed `__init__`."""
    for node in face.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    pytest.fail("no __all__")


def test_the_top_package_has_its_promised_names() -> None:
    assert sorted(lesionsam.__all__) == sorted(TOP)


@pytest.mark.parametrize("face", FACES)
def test_every_public_name_imports_and_is_what_the_type_checker_sees(face: str) -> None:
    package = importlib.import_module(face)
    typed = {
        alias.name: node.module
        for block in FACES[face].body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names = public(FACES[face])
    assert sorted({*names} - {"__version__"}) == sorted(typed)
    assert set(names) <= set(dir(package))
    for name, module in typed.items():
        assert getattr(package, name) is getattr(importlib.import_module(str(module)), name)


@pytest.mark.parametrize("face", FACES)
def test_no_public_name_is_a_submodule(face: str) -> None:
    """Importing a submodule binds its name in the package, which would replace a function of that name."""
    folder = module_files()[face].parent
    submodules = {path.stem for path in folder.glob("*.py")} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }
    assert not submodules & set(public(FACES[face]))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lesionsam' has no attribute 'Predicter'"):
        lesionsam.Predicter  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Predicter'"):
        exec("from lesionsam import Predicter")  # noqa: S102


def test_importing_every_face_imports_neither_torch_nor_numpy() -> None:
    program = (
        f"import sys; sys.path.insert(0, 'src'); import {', '.join(FACES)}; "
        "print(*sorted({'torch', 'numpy', 'pydantic', 'typer'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_the_project_imports_from_modules_and_not_from_faces() -> None:
    """An import through a face would hide the module from dvc.yaml's deps and from the digest of the code."""
    paths = [*module_files().values(), *(ROOT / "stages").glob("*.py"), *(ROOT / "src").glob("*.py")]
    through = {
        f"{Path(path).relative_to(ROOT)}: {face}.{name}"
        for path in paths
        if path.name != "__init__.py"
        for face, tree in FACES.items()
        for name in public(tree)
        if f"{face}.{name}" in imported_names(path) and name != "__version__"
    }
    assert not through
