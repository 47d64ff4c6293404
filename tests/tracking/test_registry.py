"""Registering a tracked run's model and finding it again, in a real SQLite store that a run was really sent to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers.registry import train
from helpers.tiny import tiny_sam
from lesionsam.cli.app import app
from lesionsam.errors import UserError
from lesionsam.models.checkpoint import load_sam, save_sam
from lesionsam.report.runs import open_runs
from lesionsam.tracking import registry
from lesionsam.tracking.mlflow_upload import Uploader
from lesionsam.tracking.registry import promote, resolve_model
from lesionsam.tracking.spool import Spool, spool_root
from lesionsam.tracking.tracker import Tracker

mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: no registry")
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:::(mlflow|sqlalchemy|alembic)"),
]
TABLE = "60 test images.\n\n**Mean IoU**\n\n| a | b |\n|---|---|\n| adapted | .8 |\n"
NO_RUN = "0123456789abcdef" * 2


def send(root: Path) -> None:
    """Ship all that waits, in this process."""
    for spool in Spool.all(root):
        uploader = Uploader(spool, replace_gone=True)
        while uploader.upload():
            pass


def evaluate(root: Path, folder: Path, objective: float, table: str = TABLE) -> None:
    """What the evaluate stage adds to it."""
    results = root / "results"
    results.mkdir(exist_ok=True)
    (results / "table.md").write_text(table)
    (results / "summary.json").write_text("{}")
    tracker = Tracker.reopen(folder, uri="", experiment="tests", root=root, send=False)
    tracker.log({"test/adapted.objective": objective, "test/adapted.box.miou": 0.75}, 0)
    for name in ("table.md", "summary.json"):
        tracker.log_artifact(results / name, "evaluation")
    tracker.close()
    send(root)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository root with two runs, `one` and `two`, sent and evaluated, and `three`, sent but not evaluated."""
    root = tmp_path_factory.mktemp("store")
    (root / ".git").mkdir()
    for seed, name in enumerate(("one", "two", "three")):
        train(root, root / name, seed=seed)
        send(root)
    evaluate(root, root / "one", 0.7)
    evaluate(root, root / "two", 0.8)
    return root


@pytest.fixture
def project(store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(store)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return store


def test_promoted_models_are_found_by_alias_version_and_run(project: Path) -> None:
    first = promote("one")
    assert (first.version, first.previous, first.is_new, first.objective) == ("1", None, True, 0.7)
    second = promote("two")
    assert (second.version, second.previous, second.previous_objective) == ("2", "1", 0.7)
    for name, folder in (
        (f"runs:/{first.run_id}", "one"),
        (first.run_id, "one"),
        ("models:/lesionsam/1", "one"),
        ("models:/lesionsam@champion", "two"),
        ("models:/lesionsam/2", "two"),
    ):
        found = resolve_model(name)
        assert found.read_bytes() == (project / folder / "best.safetensors").read_bytes(), name
        load_sam("compact", found)
    local_id = json.loads((project / "two" / "run.json").read_bytes())["local_id"]
    assert resolve_model(local_id) == resolve_model("models:/lesionsam@champion")

    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    version = client.get_model_version("lesionsam", "2")
    assert version.description == TABLE.strip()
    assert version.tags["test.adapted.box.miou"] == "0.75"
    assert version.tags["weights.sha256"] == registry.sha256_file(project / "two" / "best.safetensors")
    assert {"method", "model", "params.digest"} <= set(version.tags)

    again = promote(first.run_id, alias="champion")  # back to the first, by run id: no third version
    assert (again.version, again.is_new, again.previous, again.previous_objective) == ("1", False, "2", 0.8)
    assert len(client.search_model_versions("name = 'lesionsam'")) == 2


def test_an_evaluation_repeated_since_shows_in_the_version(project: Path) -> None:
    promote("two", alias="table")
    long = TABLE + "\n" + "x" * 6000
    evaluate(project, project / "two", 0.85, long)
    promote("two", alias="table")
    client = mlflow.MlflowClient(f"sqlite:///{project}/mlflow.db")
    version = client.get_model_version_by_alias("lesionsam", "table")
    assert version.tags["test.adapted.objective"] == "0.85"
    assert version.description == TABLE.strip(), "cut by whole paragraphs to what MLflow takes"
    evaluate(project, project / "two", 0.8)
    promote("two", alias="table")


def test_files_and_folders_need_no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "some" / "weights.pth"
    weights.parent.mkdir()
    weights.write_bytes(b"1")
    assert resolve_model(weights) == weights
    assert resolve_model("some") == Path("some/weights.pth")
    (tmp_path / "some" / "best.safetensors").write_bytes(b"2")
    assert resolve_model("some") == Path("some/best.safetensors")
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models:/lesionsam@nobody", "no such alias; there are: .*other"),
        ("models:/lesionsam/99", "no such version"),
        ("models:/stranger@champion", "no such registered model"),
        ("models:/lesionsam", "expected a weights file"),
        (NO_RUN, "not known at sqlite:"),
        ("nothing.pth", "no such file, folder or run"),
        ("models/adapted", "`dvc repro` trains one"),
        (".", "expected best.safetensors, .* found none"),
    ],
)
def test_what_cannot_be_found_is_one_line(project: Path, text: str, words: str) -> None:
    promote("one", alias="other")
    with pytest.raises(UserError, match=words) as caught:
        resolve_model(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("run", "alias", "words"),
    [
        ("three", "champion", "has no evaluation, .*run `dvc repro evaluate`"),
        (NO_RUN, "champion", "not known at"),
        ("nowhere", "champion", "expected a folder with a run.json"),
        ("results", "champion", "no run.json, so its training was not tracked"),
        ("one", "latest", "--alias: expected letters"),
        ("one", "v3", "--alias: expected letters"),
        ("one", "a b", "--alias: expected letters"),
    ],
)
def test_what_cannot_be_promoted_is_one_line(project: Path, run: str, alias: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        promote(run, alias=alias)


def test_weights_that_the_run_did_not_log_are_refused(project: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(project / "one", other)
    save_sam(tiny_sam(9), other / "best.safetensors", name="compact")
    with pytest.raises(UserError, match=r"not the weights that run .* logged"):
        promote(other)


def test_no_store_and_a_dead_server_are_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".git").mkdir()
    with pytest.raises(UserError, match="no such MLflow database"):
        resolve_model("models:/lesionsam@champion")
    assert not (tmp_path / "mlflow.db").exists(), "asking makes no store"
    (tmp_path / "params.yaml").write_text("tracking:\n  uri: http://127.0.0.1:9\n")
    with pytest.raises(UserError, match=r"MLflow at http://127\.0\.0\.1:9: .*look at tracking\.uri"):
        resolve_model("models:/lesionsam@champion")
    train(tmp_path, tmp_path / "run", seed=0)
    meta = spool_root(tmp_path)
    assert list(meta.iterdir())
    monkeypatch.setattr(registry, "sync", lambda root: 0)  # what it would try, test_tracking shows
    with pytest.raises(UserError, match="entries are not on the MLflow server yet"):
        promote("run")


def test_the_command_says_what_it_did(project: Path) -> None:
    promote("one", alias="said")
    done = CliRunner().invoke(app, ["promote", "--run", "two", "--alias", "said"])
    assert done.exit_code == 0
    assert "models:/lesionsam@said is version" in done.output
    assert "mean IoU of ring, centre and box 0.800" in done.output
    assert "it was version" in done.output


def test_an_evaluation_comes_out_of_mlflow(project: Path, tmp_path: Path) -> None:
    """For `lesionsam compare`; these runs logged no per_image.csv, as old ones did not."""
    one, three = (json.loads((project / name / "run.json").read_text())["local_id"] for name in ("one", "three"))
    registry.fetch_evaluation(one, tmp_path / "got")
    assert (tmp_path / "got" / "evaluation" / "table.md").read_text() == TABLE
    with pytest.raises(UserError, match="has no evaluation; run `dvc repro evaluate`"):
        registry.fetch_evaluation(three, tmp_path / "none")
    with pytest.raises(UserError, match=f"run {NO_RUN}: not known"):
        registry.fetch_evaluation(NO_RUN, tmp_path / "none")
    with (
        pytest.raises(UserError, match=r"its evaluation is not whole, without per_image.csv"),
        open_runs([one, three], project),
    ):
        pass
