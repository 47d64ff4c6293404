"""A copied or moved project keeps its artifacts to itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.registry import train
from lesionsam.cli.doctor import examine
from lesionsam.tracking.registry import promote, resolve_model
from lesionsam.tracking.store import foreign_artifacts, settle_artifacts
from lesionsam.tracking.tracker import Tracker, sync

mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: nothing to track with")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:::(mlflow|sqlalchemy|alembic)"),
]


def files(root: Path) -> dict[str, bytes]:
    """Artifacts and database of a project."""
    found = [path for path in (root / "mlartifacts").rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in (*found, root / "mlflow.db")}


def evaluate(root: Path, folder: Path) -> None:
    """Add a table to a run, as the evaluate stage does."""
    (root / "table.md").write_text("| a |\n|---|\n", encoding="utf-8")
    (root / "summary.json").write_text("{}", encoding="utf-8")
    tracker = Tracker.reopen(folder, uri="", experiment="tests", root=root, send=False)
    for name in ("table.md", "summary.json"):
        tracker.log_artifact(root / name, "evaluation")
    tracker.close()


def tracked_doctor(root: Path) -> str:
    return " ".join(finding.text for finding in examine(root) if finding.what == "tracking")


def test_a_copy_writes_into_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    original, copy = tmp_path / "an original", tmp_path / "copy"
    (original / ".git").mkdir(parents=True)
    train(original, original / "one", seed=0)
    sync(original)
    evaluate(original, original / "one")  # waits, unsent, in the copy too
    shutil.copytree(original, copy)
    before = files(original)

    monkeypatch.chdir(copy)
    assert "this project was copied or moved" in tracked_doctor(copy)
    train(copy, copy / "two", seed=1)
    sync(copy)
    assert files(original) == before, "neither artifacts nor database of the original change"
    assert "copied or moved" not in tracked_doctor(copy)

    client = mlflow.MlflowClient(f"sqlite:///{copy / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert len(runs) == 2
    for run in runs:
        assert run.info.artifact_uri.startswith((copy / "mlartifacts").as_uri() + "/")
    assert promote(copy / "one").version == "1", "what waited in the copy was sent to the copy's run"
    assert copy in resolve_model("models:/lesionsam@champion").parents
    sync(original)
    assert list((original / "mlartifacts").rglob("table.md")), "the original sends its own"
    assert foreign_artifacts(original) == []


def test_a_moved_project_takes_its_artifacts_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    old, new = tmp_path / "old", tmp_path / "new"
    (old / ".git").mkdir(parents=True)
    train(old, old / "one", seed=0)
    evaluate(old, old / "one")
    sync(old)
    command = [sys.executable, "-m", "lesionsam", "promote", "--run", "one"]  # MLflow remembers places in a process
    subprocess.run(command, cwd=old, check=True)
    shutil.move(old, new)
    monkeypatch.chdir(new)
    weights = resolve_model("models:/lesionsam@champion")
    assert new in weights.parents
    assert weights.is_file()
    assert not old.exists()


def test_a_place_chosen_on_purpose_stays(tmp_path: Path) -> None:
    project, store = tmp_path / "project", tmp_path / "big disk" / "mlartifacts"
    project.mkdir()
    store.mkdir(parents=True)
    client = mlflow.MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    client.create_experiment("tests", store.as_uri())
    assert settle_artifacts(project) == []
    assert client.get_experiment_by_name("tests").artifact_location == store.as_uri()
