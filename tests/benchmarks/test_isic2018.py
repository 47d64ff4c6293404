"""The comparison on ISIC 2018 from its archives to the table, with small ones from a local server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from comparison.isic2018 import estimated_hours
from helpers.isic import challenge
from helpers.web_server import Site, serve

ROWS = "zero-shot"


@pytest.fixture(scope="module")
def out(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign of one row, run twice: the second time everything is there."""
    folder = tmp_path_factory.mktemp("campaign") / "out"
    site = Site()
    site.files = challenge("isic2018", {"train": 8, "dev": 3, "test": 4})
    command = [
        *(sys.executable, str(root / "benchmarks/comparison/isic2018.py"), "--out", str(folder), "--only", ROWS),
        *("--model", "compact", "--checkpoint", str(root / "foundation/compact.safetensors"), "--epochs", "1"),
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with serve(site) as running:
        for more in (["--estimate"], []):
            done = subprocess.run(
                [*command, "--base-url", running.url, *more],
                cwd=root,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-2000:]
            assert "1 trainings and evaluations; 8, 3, 4 images to train, select and report on" in done.stdout
            assert (folder / "table-controls.md").exists() == (not more)
    return folder


def test_the_official_splits_are_trained_and_reported_on(out: Path) -> None:
    figures = pd.read_csv(out / "units" / "zero-shot.seed0.csv")
    networks = figures[figures["model"] == "zero-shot"]
    assert networks["image_id"].nunique() == 4
    assert set(networks["prompt"]) == {"none", "ring", "centre", "box", "zoom", "box+core"}
    assert json.loads((out / "weights" / "weights.json").read_text())["name"] == "compact"
    table = (out / "table-controls.md").read_text()
    assert "Mean Dice:" in table
    assert "Mean 95 % Hausdorff distance, pixels:" in table


def test_the_estimate_counts_steps_and_evaluations() -> None:
    measured = {"step": 4.0, "evaluate": 6.0, "encode": 1.0}  # of two images each, but the encoder's of one
    counts = {"train": 100, "dev": 10, "test": 20}
    one = estimated_hours([(True, "")], counts, 3, measured)
    assert one == pytest.approx((3 * (100 * 2 + 10) + 20 * 3) / 3600)
    assert estimated_hours([(False, "")], counts, 3, measured) == pytest.approx(20 * 3 / 3600)
    assert estimated_hours([(True, "published")], counts, 3, measured) == pytest.approx((30 * 210 + 60) / 3600)
