"""The identity of code: what a module runs, and none of what does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.package_copy import package_copy, recoded, reworded
from lesionsam.experiment.resume import TRAINING
from lesionsam.utils.code import NO_RESULT, PACKAGE, closure, code_digest, module_digests, module_files, source_digest


def write_package(folder: Path, **modules: str) -> Path:
    """A package `made` of some modules; the dots of their names are `__`."""
    package = folder / "made"
    for name, text in modules.items():
        path = package / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    return package


def digest_of(folder: Path, text: str) -> str:
    folder.mkdir()
    (folder / "one.py").write_text(text)
    return source_digest(folder / "one.py")


CODE = '"""Words."""\nX = 1\n\n\ndef f(a, b=2):\n    """More."""\n    return "# no comment", a + b\n'


@pytest.mark.parametrize(
    "other",
    [
        '"""Other words."""\nX = 1\ndef f(a, b=2):\n  return "# no comment", a + b\n',
        "# A comment.\nX = (1)\ndef f(a, b=2,):\n    'Single.'\n    return ('# no comment', a + b)  # why\n",
    ],
)
def test_docstrings_comments_and_layout_do_not_count(tmp_path: Path, other: str) -> None:
    assert digest_of(tmp_path / "a", CODE) == digest_of(tmp_path / "b", other)


@pytest.mark.parametrize(
    ("old", "new"),
    [("X = 1", "X = 2"), ("X = 1", "X = 1.0"), ("a + b", "b + a"), ("b=2", "b=3"), ("# no comment", "#no comment")],
)
def test_what_runs_counts(tmp_path: Path, old: str, new: str) -> None:
    assert digest_of(tmp_path / "a", CODE) != digest_of(tmp_path / "b", CODE.replace(old, new))


def test_a_text_that_is_no_docstring_counts(tmp_path: Path) -> None:
    assert digest_of(tmp_path / "a", 'X = """a"""\n') != digest_of(tmp_path / "b", 'X = """b"""\n')


def test_closure_follows_imports_in_functions_and_relative_ones_but_not_those_for_types(tmp_path: Path) -> None:
    package = write_package(
        tmp_path,
        top="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from made import never\n"
        "else:\n    import made.other\n"
        "def late():\n    from made.deep import low\n",
        never="",
        other="",
        deep__low="from . import beside\nfrom ..far import NAME\nimport numpy\n",
        deep__beside="from made import top\n",
        far="NAME = 1\n",
        apart="",
    )
    assert closure("top", package=package) == ["deep.beside", "deep.low", "far", "other", "top"]
    assert closure("top", without=("deep",), package=package) == ["other", "top"]
    assert closure("top", without=("deep.beside", "far"), package=package) == ["deep.low", "other", "top"]


def test_unknown_names_are_errors(tmp_path: Path) -> None:
    package = write_package(tmp_path, one="")
    with pytest.raises(ValueError, match="expected a module of made, got 'two'"):
        code_digest("one", "two", package=package)
    with pytest.raises(ValueError, match="without: expected a module or package of made, got 'tw'"):
        code_digest("one", without=("tw",), package=package)


def test_the_module_that_changed_can_be_named(tmp_path: Path) -> None:
    old, new = (
        write_package(tmp_path / name, one="from made import two\n", two=text)
        for name, text in (("a", "X = 1\n"), ("b", "X = 2\n"))
    )
    before, after = module_digests("one", package=old), module_digests("one", package=new)
    assert [name for name in before if before[name] != after[name]] == ["two"]
    assert code_digest("one", package=old) != code_digest("one", package=new)


def test_the_closure_holds_what_python_loads() -> None:
    """The oracle is Python itself: the modules that are there once the training's module is imported."""
    program = (
        f"import sys; import lesionsam.{TRAINING}; "
        "print(*(n for n, m in sys.modules.items() if n.startswith('lesionsam.') and not hasattr(m, '__path__')))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    loaded = {name.removeprefix("lesionsam.") for name in done.stdout.split()}
    faces_only = {"utils.lazy"}  # `__init__` files import it, which do not count
    assert loaded <= set(closure(TRAINING)) | faces_only
    assert {"training.loop", "models.decoder", "losses"} <= loaded


def test_every_module_is_in_the_training_or_not_by_its_imports_alone(tmp_path: Path) -> None:
    """Every file of a copy is changed; what the training's identity then says has changed are the modules it runs."""
    names = module_files(PACKAGE)
    changed = package_copy(tmp_path / "changed", dict.fromkeys(names, recoded))
    before, after = (module_digests(TRAINING, without=NO_RESULT, package=package) for package in (PACKAGE, changed))
    assert {name for name in before if before[name] != after[name]} == set(closure(TRAINING, without=NO_RESULT))
    reached = closure(TRAINING, without=NO_RESULT)
    assert {"training.loop", "methods.contrastive", "utils.images", "models.attention"} <= set(reached)
    assert not [name for name in reached if name.startswith(("sweep.", "report.", "annotation.", "inference.", "cli."))]
    worded = package_copy(tmp_path / "worded", dict.fromkeys(names, reworded))
    assert module_digests(TRAINING, without=NO_RESULT, package=worded) == before


def test_an_installed_copy_gives_the_same_digest(tmp_path: Path) -> None:
    """Wherever the package lies, and under another working folder."""
    package_copy(tmp_path)
    program = f"from lesionsam.utils.code import *; print(code_digest({TRAINING!r}, without=NO_RESULT))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == code_digest(TRAINING, without=NO_RESULT)
