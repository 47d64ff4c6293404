"""Several pretrained models side by side in the comparison: rows, weights, figures of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from comparison.rows import DEFAULT, models_plan
from comparison.units import ZERO_SHOT, configured, model_weights, read_units, run_unit, summarise
from helpers.families import write_hub_folder
from helpers.pairs import BASE, write_pairs
from lesionsam.config.load import with_values
from lesionsam.data.index import read_index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Index of 6 training and 2 test pairs of generated images."""
    folder = tmp_path_factory.mktemp("pairs")
    return write_pairs(folder, train=6, test=2, dev_fraction=0.4)


def test_each_model_has_its_own_weights_zero_shot_and_adapted_figures(
    index: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_hub_folder("sam2", Path("models/sam2"))
    plan, out = models_plan(["compact", "models/sam2"]), Path("evidence")
    rows = plan.rows(BASE)
    wanted = [f"{name}, {model}" for model in ("compact", "models/sam2") for name in (ZERO_SHOT, DEFAULT)]
    assert [row.name for row in rows] == wanted
    for row in rows:
        weights = root / model_weights(BASE, row.model, out.resolve())
        run_unit(BASE, row, 0, read_index(index), weights, out)
    assert json.loads((out / "weights/models-sam2/weights.json").read_text())["source"] == "models/sam2"
    figures = read_units(out, rows)
    networks = figures[figures["model"].isin(wanted)]
    assert networks.groupby("model")["image_id"].nunique().to_dict() == dict.fromkeys(wanted, 2)
    means = networks[networks["prompt"] == "box"].groupby("model")["iou"].mean()
    assert means.nunique() == 4, "no two rows come from the same weights"
    others = set(figures["model"]) - set(wanted)
    assert others == {"ellipse", "box prior", "box prior + offset"}, "baselines, which are of no model, stand once"
    text = summarise(figures, plan.comparisons)
    assert all(f"| {name} |" in text for name in wanted)
    assert f"| {DEFAULT}, models/sam2 | {ZERO_SHOT}, models/sam2 |" in text
    assert f"| {DEFAULT}, models/sam2 | {DEFAULT}, compact |" in text


def test_a_preset_brings_its_model_and_keeps_the_budget() -> None:
    base = with_values(BASE, {"train.epochs": 3, "train.batch_size": 2})
    row = models_plan(["sam2.1-tiny"]).rows(base)[1]
    config = configured(base, row, 2)
    assert (config.model.name, config.model.checkpoint) == ("sam2.1-tiny", "published")
    assert (config.train.epochs, config.train.batch_size, config.train.precision) == (3, 2, "fp32")
    assert config.train.lr_encoder == 1e-5, "the preset's"
