"""`lesionsam train --seeds`: mean, spread, and which differences are noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers.pipeline import lesionsam, repository_copy
from helpers.report import made_up
from lesionsam.pipeline.seeds import seeds_table, seeds_text

HOW = {"num_bootstrap": 200, "confidence": 0.95}


def parts(gains: list[float], *, masks: bool = True) -> list[pd.DataFrame]:
    """Rows of the same images, with a gain of the adapted model over zero-shot for each seed."""
    found = []
    for seed, gain in enumerate(gains):
        rows = made_up(masks, num_images=30).rows
        score = "iou" if masks else "consistency"
        values = 0.6 + 0.1 * np.sin(rows.groupby(["model", "prompt"]).cumcount())
        rows[score] = values + np.where(rows["model"] == "adapted", gain, 0.0)
        found.append(rows.assign(run=str(seed)))
    return found


def test_mean_and_spread_over_seeds() -> None:
    table = seeds_table(parts([0.10, 0.12, 0.14]), **HOW).set_index("prompt")
    box = table.loc["box"]
    assert box["num_seeds"] == 3
    assert box["difference"] == pytest.approx(0.12)
    assert box["sd"] == pytest.approx(0.02), "of 0.10, 0.12 and 0.14, with n - 1"
    assert box["verdict"] == "better"
    text = seeds_text(table.reset_index(), 3)
    assert "differ by less than 0.057" in text, "2 sqrt(2) 0.02"
    assert "| box " in text


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([-0.1, -0.11, -0.12], "worse"),
        ([0.0, 0.0, 0.0], "noise"),
        ([0.3, -0.2, 0.05], "noise"),  # the seeds spread far more than the mean of 0.05
    ],
)
def test_what_is_noise(gains: list[float], verdict: str) -> None:
    assert set(seeds_table(parts(gains), **HOW)["verdict"]) == {verdict}


def test_without_masks_the_agreement_is_compared() -> None:
    table = seeds_table(parts([0.1, 0.12], masks=False), **HOW)
    assert set(table["score"]) == {"consistency"}
    assert "agreement between prompts" in seeds_text(table, 2)


@pytest.mark.pipeline
def test_seeds_are_trained_once_and_the_first_stays(tmp_path: Path) -> None:
    project = repository_copy(tmp_path / "project")
    lesionsam(project, "prepare")
    done = lesionsam(project, "train", "--seeds", "2")
    assert "2 seeds." in done.stdout
    table = pd.read_csv(project / "results" / "seeds.csv")
    assert set(table["num_seeds"]) == {2}
    assert done.stdout.count("weights in models/adapted/") == 2
    again = lesionsam(project, "train", "--seeds", "2")
    assert again.stdout.count("weights in models/adapted/") == 1, "only the seed of params.yaml, whose result stays"
    pd.testing.assert_frame_equal(table, pd.read_csv(project / "results" / "seeds.csv"))
