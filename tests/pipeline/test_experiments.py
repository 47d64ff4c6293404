"""`dvc exp run --temp` with images that git ignores, and `dvc plots`, in a copy of the repository."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from ruamel.yaml import YAML

from helpers.pipeline import ROOT, lesionsam, repository_copy, run
from lesionsam.evaluation.plots import write_plots
from lesionsam.evaluation.tables import write_results
from lesionsam.experiment.history import History
from lesionsam.pipeline.paths import archives_folder

from helpers.report import made_up  # isort: skip

EXPERIMENT = ("dvc", "exp", "run", "--temp", "--name", "own", "-S", "train.epochs=3")


def own_project(folder: Path) -> Path:
    """A project on three own images without masks, one a split, committed; git ignores images and boxes."""
    repository_copy(folder)
    rows = []
    for k, split in enumerate(("train", "val", "test")):
        path = folder / "own" / "images" / split / f"image{k}.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (60, 50), (200, 150 + k, 120)).save(path)
        rows.append([path.stem, 0, 10, 10, 40, 40, 20, 20, 30, 30])
    names = [f"{box}_{corner}" for box in ("big", "small") for corner in ("x0", "y0", "x1", "y1")]
    with (folder / "own" / "boxes.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image_id", "lesion_id", *names], *rows])
    lesionsam(folder, "preset", "folder-csv")
    run(folder, "git", "commit", "--quiet", "--all", "--message", "own data")
    return folder


@pytest.mark.pipeline
def test_an_experiment_beside_the_workspace_sees_own_images(tmp_path: Path) -> None:
    project = own_project(tmp_path / "project")
    refused = run(project, *EXPERIMENT, "boxes", check=False)
    assert refused.returncode
    told = refused.stdout + refused.stderr
    assert "expected own/boxes.csv, own/images in the copy of the project" in told
    assert "give `dvc exp run` also --copy-paths own/boxes.csv --copy-paths own/images" in told
    assert "Traceback" not in told

    paths = [part for path in ("own/images", "own/boxes.csv") for part in ("--copy-paths", path)]
    done = run(project, *EXPERIMENT, *paths, "boxes")
    assert "3 lesions with two boxes: train 1, dev 1, test 1" in done.stdout
    assert run(project, "git", "status", "--porcelain", "params.yaml").stdout == "", "the workspace keeps its values"
    assert not (project / "data" / "boxes.csv").exists()
    shown = json.loads(run(project, "dvc", "exp", "show", "--json").stdout)
    assert '"epochs": 3' in json.dumps(shown), "the experiment has its own"


def test_an_experiments_copy_uses_the_projects_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, copy = tmp_path / "project", tmp_path / "project" / ".dvc" / "tmp" / "exps" / "x"
    copy.mkdir(parents=True)
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.chdir(project)
    assert archives_folder() == Path(".archives")
    monkeypatch.chdir(copy)
    assert archives_folder() == project / ".archives", "no checkpoint is fetched again"
    monkeypatch.delenv("DVC_ROOT")
    assert archives_folder() == Path(".archives")


def plotted(folder: Path) -> dict[str, list[dict[str, object]]]:
    """Plot -> its data points, as `dvc plots show` gives them to a page."""
    shown = json.loads(run(folder, "dvc", "plots", "show", "--json").stdout)
    assert not shown.get("errors"), shown["errors"]
    found = {}
    for name, pages in shown["data"].items():
        content = pages[0].get("content")
        found[name] = content["data"]["values"] if isinstance(content, dict) else pages
    return found


@pytest.mark.parametrize("masks", [True, False], ids=["masks", "no masks"])
def test_dvc_draws_curves_tables_and_pictures(tmp_path: Path, masks: bool) -> None:
    run(tmp_path, "git", "init", "--quiet")
    run(tmp_path, "dvc", "init", "--quiet")
    results, adapted = tmp_path / "results", tmp_path / "models" / "adapted"
    write_results(results, made_up(masks), num_bootstrap=20, confidence=0.95, settings={})
    frames = [pd.read_csv(results / f"{name}.csv") for name in ("table", "jitter", "calibration")]
    write_plots(results / "plots", *frames)
    for picture in (results / "overlays" / "sheet.png", adapted / "overlays" / "epoch_0001.png"):
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(picture)
    history = History(adapted / "history.csv")
    for epoch in (1, 2):
        scores = {f"dev_{name}": 0.2 for name in ("ring", "centre", "box", "objective") if masks}
        history.log({"epoch": epoch, "train_loss": 1 / epoch, "dev_label_free": 0.9} | scores, epoch)
    whole = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    YAML().dump({"plots": whole["plots"]}, tmp_path / "dvc.yaml")
    found = plotted(tmp_path)
    bars = {str(p["row"]): float(str(p["score"])) for p in found["Test images, score by prompt and model"]}
    table = frames[0].set_index(["model", "prompt"])
    score = "miou" if masks else "consistency"
    assert bars["box, adapted"] == pytest.approx(table.loc[("adapted", "box"), score], abs=1e-5)
    assert {str(p["epoch"]) for p in found["Training loss by epoch"]} == {"1", "2"}
    curves = {str(p["field"]) for p in found["Development images, mean IoU and label-free score by epoch"]}
    assert "label_free" in curves
    if masks:
        jitter = found["Test images, mean IoU by jitter of the boxes"]
        assert {"adapted_box", "zero_shot_box"} <= {str(p["field"]) for p in jitter}
        confidences = {float(str(p["confidence"])) for p in found["Test images, calibration with the big box"]}
        assert all(0 < value < 1 for value in confidences)
    assert str(Path("results/overlays/sheet.png")) in found
    shutil.rmtree(tmp_path / ".dvc")
