"""The wheel, installed as a user would, works in a folder far from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from package.fresh import prepare
from repo.import_graph import ROOT

pytestmark = pytest.mark.package


def run(*arguments: str | Path, folder: Path, code: int = 0) -> str:
    """Run a program without the repository on its path; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built from a copy of the sources: setuptools writes beside them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"),
        *("--wheel-dir", out, source),
        folder=out,
    )
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of an environment that holds the wheel and sees the test environment's libraries."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, folder=place)
    # A path file of another environment adds its folder, and not that folder's own path files: no editable install.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return place / "bin"


def test_the_wheel_holds_every_shipped_file_and_no_test(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    ours = {path.relative_to(source).as_posix() for path in (source / "lesionsam").rglob("*") if path.is_file()}
    assert {name for name in ours if "__pycache__" not in name} == {n for n in names if n.startswith("lesionsam/")}
    assert "lesionsam/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"lesionsam"}


def test_predict_works_far_from_the_repository(installed: Path, tmp_path: Path) -> None:
    prepare(tmp_path)
    assert run(installed / "lesionsam", "--version", folder=tmp_path).startswith("lesionsam 0.")
    run(
        *(installed / "lesionsam", "predict", "photo", "--boxes", "boxes.csv", "--model", "model", "--device", "cpu"),
        folder=tmp_path,
    )
    assert [path.name for path in (tmp_path / "predictions" / "masks").iterdir()] == ["a.png"]
    place = run(installed / "python", "-c", "import lesionsam; print(lesionsam.__file__)", folder=tmp_path)
    assert Path(place.strip()).is_relative_to(installed.parent)


def test_a_missing_extra_ends_in_one_line(installed: Path, tmp_path: Path) -> None:
    prepare(tmp_path)
    program = (
        "import sys; sys.modules['fastapi'] = sys.modules['uvicorn'] = None; from lesionsam.cli.app import main; main()"
    )
    said = run(installed / "python", "-c", program, "annotate", "photo", folder=tmp_path, code=2)
    assert said in [f"error: {name} is not installed; install lesionsam[annotate]\n" for name in ("uvicorn", "fastapi")]
