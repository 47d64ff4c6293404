"""`lesionsam doctor` on folders in every state, and outside any; it never raises."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers.registry import train
from lesionsam.cli import doctor
from lesionsam.cli.app import app
from lesionsam.cli.doctor import NOTE, OK, PROBLEM, Finding, examine, next_step, pinned, without_password
from lesionsam.config.load import default_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_dvc(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dvc status` takes seconds; the test that wants it puts it back."""
    monkeypatch.setitem(doctor.LOOKS, "dvc", lambda root: iter([(OK, "every stage is up to date")]))


def found(root: Path, what: str) -> list[Finding]:
    return [finding for finding in examine(root) if finding.what == what]


def project(root: Path, **changes: str) -> Path:
    """A folder with params.yaml, some lines of it exchanged."""
    text = default_text()
    for old, new in changes.items():
        before, after = new.split(" -> ")
        assert before in text, old
        text = text.replace(before, after, 1)
    (root / "params.yaml").write_text(text)
    (root / "foundation").mkdir(exist_ok=True)
    (root / "foundation" / "compact.safetensors").write_bytes(b"1")
    return root


def test_an_empty_folder_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    findings = examine(tmp_path)
    assert [finding for finding in findings if finding.state == PROBLEM] == []
    assert {finding.what for finding in findings} == set(doctor.LOOKS)
    assert doctor.print_findings(findings, next_step(tmp_path, findings)) == 0
    assert "next: lesionsam preset demo" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [], "looking changes nothing"


def test_a_fresh_project_is_told_to_train(tmp_path: Path) -> None:
    root = project(tmp_path)
    findings = examine(root)
    assert next_step(root, findings) == "make demo, or dvc repro"
    assert found(root, "params")[0].text == "synthetic data, compact, method contrastive"
    assert found(root, "data")[0].text == "none yet"
    assert [finding.text for finding in found(root, "weights")] == ["pretrained: none yet", "adapted: none yet"]


def test_a_finished_project_is_summed_up(tmp_path: Path) -> None:
    root = project(tmp_path)
    for folder in ("data/raw", "models/pretrained", "models/adapted", "results", "report"):
        (root / folder).mkdir(parents=True)
    (root / "data/raw/index.csv").write_text("image_id,split,mask_path\na,train,x\nb,dev,\n")
    (root / "data/boxes.csv").write_text("image_id\na\nb\n")
    (root / "models/pretrained/weights.json").write_text(json.dumps({"name": "compact", "source": "foundation"}))
    (root / "models/adapted/best.safetensors").write_bytes(b"1")
    (root / "models/adapted/run.json").write_text(json.dumps({"run_id": "abc"}))
    (root / "results/summary.json").write_text("{}")
    assert found(root, "data")[0].text == "1 train, 1 dev images, 1 with masks; boxes of 2 lesions"
    assert [finding.text for finding in found(root, "weights")] == [
        "pretrained: compact from foundation",
        "adapted: models/adapted/best.safetensors, run abc, evaluated",
    ]
    assert "lesionsam export --all" in next_step(root, examine(root))


def test_problems_come_first_and_set_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = project(
        tmp_path,
        device="device: auto -> device: cuda:3",
        epochs="epochs: 15 -> epochs: 1x",
        checkpoint="compact.safetensors -> nowhere.safetensors",
    )
    assert "train.epochs" in found(root, "params")[0].text
    assert found(root, "weights")[0].text == "model.checkpoint: foundation/nowhere.safetensors is not there"
    project(tmp_path, device="device: auto -> device: cuda:3")
    import torch

    if not torch.cuda.is_available():
        assert [finding.state for finding in found(root, "params")] == [OK, PROBLEM]
    (root / ".git").mkdir()
    monkeypatch.chdir(root)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    (root / "params.yaml").write_text("data: [")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "PROBLEM  params" in done.output


def test_packages_are_held_against_the_lock(tmp_path: Path) -> None:
    text = (
        "numpy==2.4.6 \\\n    --hash=sha256:0\ntorch==0.0.1 ; sys_platform != 'none' \\\n    --hash=sha256:0\n"
        "Not.A_package==1.0\nonly-elsewhere==3 ; sys_platform == 'none'\n# comment\nbad line ===\n"
    )
    assert pinned(text) == {"numpy": "2.4.6", "torch": "0.0.1", "not-a-package": "1.0"}
    (tmp_path / "requirements.lock").write_text(text)
    (finding,) = found(tmp_path, "packages")
    assert finding.state == NOTE
    assert "not installed: not-a-package" in finding.text
    assert "(not 0.0.1)" in finding.text
    lines = pinned((ROOT / "requirements.lock").read_text())
    assert len(lines) > 100
    assert lines["segment-anything"] == "1.0"


def test_missing_packages_are_lines_not_tracebacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name in ("torch", "rich") else "1")
    assert found(tmp_path, "packages")[0] == Finding("packages", PROBLEM, "missing: torch, rich", "make setup")
    assert "cannot be looked at: ModuleNotFoundError" in found(tmp_path, "gpu")[0].text
    assert "psutil" in found(tmp_path, "memory")[0].text
    assert next_step(tmp_path, examine(tmp_path)) == "make setup"


def test_the_tracking_store_and_what_waits_for_it(tmp_path: Path) -> None:
    root = project(tmp_path)
    assert "the first training makes it" in found(root, "tracking")[0].text
    database = sqlite3.connect(root / "mlflow.db")
    database.execute("CREATE TABLE runs (a)")
    database.execute("CREATE TABLE experiments (a)")
    database.execute("CREATE TABLE alembic_version (version_num)")
    database.execute("INSERT INTO runs VALUES (1)")
    database.execute("CREATE TABLE registered_model_aliases (name, alias, version)")
    database.execute("INSERT INTO registered_model_aliases VALUES ('lesionsam', 'champion', 2)")
    database.commit()
    database.close()
    train(root, root / "run", seed=0)
    first, second = found(root, "tracking")
    assert first.text.endswith("1 runs; models:/lesionsam@champion is version 2")
    assert second.text.endswith("of 1 runs are not sent yet")
    database = sqlite3.connect(root / "mlflow.db")
    database.execute("INSERT INTO alembic_version VALUES ('f4a9b2c7d1e6')")
    database.commit()
    database.close()
    first = found(root, "tracking")[0]
    assert (first.state, "made by a newer MLflow (schema revision f4a9b2c7d1e6" in first.text) == (PROBLEM, True)
    assert first.remedy.startswith("install that MLflow")
    (root / "mlflow.db").write_bytes(b"no database" * 20)
    first = found(root, "tracking")[0]
    assert (first.state, "is not an SQLite database" in first.text) == (PROBLEM, True)


def test_an_input_side_that_the_patch_does_not_divide_is_a_problem(tmp_path: Path) -> None:
    root = project(tmp_path, name="name: compact -> name: vit_b", side="image_size: 0 -> image_size: 1000")
    assert "expected a multiple of 16 (vit_b), got 1000; the nearest are 992 and 1008" in found(root, "params")[0].text


def test_a_dead_server_is_a_problem_and_its_password_a_secret(tmp_path: Path) -> None:
    root = project(tmp_path, uri='uri: "" -> uri: http://me:secret@127.0.0.1:9')
    (finding,) = found(root, "tracking")
    assert finding.state == PROBLEM
    assert "http://127.0.0.1:9 does not answer" in finding.text
    assert "secret" not in str(finding)
    assert without_password("http://127.0.0.1:9/x") == "http://127.0.0.1:9/x"


def test_too_little_disk_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lesionsam.utils.files.free_disk_bytes", lambda path: 1e9)
    (tmp_path / "params.yaml").write_text("data: {source: isic2018}\n")
    assert found(tmp_path, "disk")[0].text == "1.0 GB free; all of isic2018 may take 40.8 GB"


@pytest.mark.skipif(shutil.which("dvc") is None, reason="needs dvc")
def test_dvc_says_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.LOOKS, "dvc", doctor._dvc)
    assert found(tmp_path, "dvc")[0].text == "no dvc.yaml here: not a working folder"
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n")
    (tmp_path / "dvc.yaml").write_text("stages:\n  one:\n    cmd: 'true'\n    deps: [a]\n    outs: [b]\n")
    (tmp_path / "a").write_text("1")
    assert found(tmp_path, "dvc") == [Finding("dvc", NOTE, "changed since they ran, or never run: one", "dvc repro")]
    (tmp_path / "dvc.yaml").write_text("stages: [\n")
    assert found(tmp_path, "dvc")[0].state == PROBLEM
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\n<<<<<<< HEAD\nstages: {}\n=======\nstages: {}\n>>>>>>> other\n")
    (finding,) = found(tmp_path, "dvc")
    assert finding.state == PROBLEM
    assert "dvc.lock line 2: expected YAML, got the marker <<<<<<< of a merge conflict" in finding.text
    assert finding.remedy == "git checkout --ours dvc.lock, then dvc repro"
