"""The evidence's sets of rows: each a valid configuration, few masks for as many steps, one table, one picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from comparison.charts import curve, draw_labels, masks_worth
from comparison.rows import DEFAULT_BLIND, MASKS, SETS
from comparison.units import ZERO_SHOT, Row, configured, costs, few, summarise, unit_path
from helpers.tiny import tiny_data
from lesionsam.config.load import default_values, validate
from lesionsam.evaluation.columns import PRIOR_OFFSET
from lesionsam.evaluation.statistics import LABEL_FREE, METRICS

BASE = validate(default_values())


@pytest.mark.parametrize("name", SETS)
def test_every_row_of_every_set_is_a_valid_configuration_with_a_file_of_its_own(name: str, tmp_path: Path) -> None:
    plan = SETS[name]
    for rows in (plan.rows(BASE), plan.tuning(BASE)):
        assert len({unit_path(tmp_path, row, 0) for row in rows}) == len(rows)
        for row in rows:
            assert configured(BASE, row, 1).train.seed == 1
    names = {row.name for row in plan.rows(BASE)}
    names |= {PRIOR_OFFSET + row.name.removeprefix(ZERO_SHOT) for row in plan.rows(BASE) if not row.trains}
    assert {one for pair in plan.comparisons for one in pair} <= names


def test_the_strategies_train_what_they_say() -> None:
    found = {row.name: configured(BASE, row, 0) for row in SETS["strategies"].rows(BASE)}
    encoders = {
        name.removeprefix("supervised, "): config.model.encoder
        for name, config in found.items()
        if name.startswith("supervised")
    }
    assert encoders == {
        "decoder": "none",
        "last 2 blocks": "blocks",
        "adapters": "adapter",
        "LoRA": "lora",
        "tuned": "blocks",
    }
    assert getattr(found["supervised, last 2 blocks"].model, "unfreeze_last_k", None) == 2


def test_no_row_of_the_labels_set_selects_by_masks() -> None:
    rows = [row for row in SETS["labels"].rows(BASE) if row.trains]
    assert [row.masks for row in rows] == [0, *MASKS, 0]
    assert all(configured(BASE, row, 0).train.select == "label_free" for row in rows)


def test_few_masks_make_as_many_steps_and_grow_within_a_seed() -> None:
    data = tiny_data(12)
    chosen = {count: few(data, count, seed=0) for count in (3, 5)}
    for count, small in chosen.items():
        assert len(small) == len(data)
        assert len(set(small.ids)) == count
        for k in (0, 7):
            whole = data.batch([data.ids.index(small.ids[k])])
            mine = small.batch([k])
            assert (mine.images == whole.images).all()
            assert (mine.big_boxes == whole.big_boxes).all()
            assert mine.ids == whole.ids
        assert np.bincount([sorted(set(small.ids)).index(one) for one in small.ids]).min() >= 12 // count
    assert set(chosen[3].ids) < set(chosen[5].ids)
    assert set(few(data, 5, seed=1).ids) != set(chosen[5].ids)


def figures(scores: dict[str, float], prompts: tuple[str, ...] = ("ring", "centre", "box")) -> pd.DataFrame:
    """Long format as `comparison.units.read_units` gives it: 12 images, two seeds, every prompt."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.02, 12)
    table = pd.DataFrame(
        [
            {
                "model": model,
                "run": str(run),
                "prompt": prompt,
                "image_id": f"i{k}",
                "lesion_id": "0",
                "iou": score + noise[k] + 0.001 * run,
            }
            for model, score in scores.items()
            for run in range(2)
            for prompt in prompts
            for k in range(12)
        ]
    )
    return table.assign(**dict.fromkeys((*METRICS[1:], *LABEL_FREE), 0.5))


def test_how_many_masks_two_boxes_are_worth_is_read_off_the_curve() -> None:
    scores = {"supervised, 10 masks": 0.6, "supervised, 100 masks": 0.7, "supervised, all masks": 0.8}
    mine = curve(figures(scores), 1000).query("prompt == 'box'")
    assert mine["masks"].tolist() == [10, 100, 1000]
    low, middle, high = mine["miou"]
    assert masks_worth(mine, (low + middle) / 2) == f"about {np.sqrt(10 * 100):.0f}"
    assert masks_worth(mine, (middle + high) / 2) == f"about {np.sqrt(100 * 1000):.0f}"
    assert masks_worth(mine, low) == "fewer than 10"
    assert masks_worth(mine, high + 0.01) == "more than 1000"
    dip = mine.assign(miou=[0.6, 0.55, 0.8])
    assert masks_worth(dip, 0.6) == "fewer than 10", "a dip of the curve is no second crossing"


def test_the_picture_is_drawn_whole(tmp_path: Path) -> None:
    scores = {"supervised, 10 masks": 0.6, "supervised, all masks": 0.8, DEFAULT_BLIND: 0.7, "zero-shot": 0.5}
    worth = draw_labels(tmp_path / "labels.png", figures(scores), DEFAULT_BLIND, 90)
    assert worth == dict.fromkeys(("ring", "centre", "box"), "about 30")
    with Image.open(tmp_path / "labels.png") as picture:
        assert picture.size[0] > 1000
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_parameters_and_seconds_stand_in_the_same_table(tmp_path: Path) -> None:
    rows = [Row("a", seeds=2), Row("b", seeds=2)]
    for seed, seconds in enumerate((2.0, 4.0)):
        path = unit_path(tmp_path, rows[0], seed).with_suffix(".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"trained_parameters": 12345, "seconds_per_epoch": seconds}))
    cost = costs(tmp_path, rows)
    assert cost == {"a": ("12,345", "3.0")}
    lines = summarise(figures({"a": 0.6, "b": 0.7}), [("a", "b")], cost).splitlines()
    heads = "| row | seeds | trained parameters | s per epoch | none | ring | centre | box | zoom | box+core |"
    assert lines[0].startswith(heads)
    assert lines[2].startswith("| a | 2 | 12,345 | 3.0 |  | 0.6")
    assert lines[3].startswith("| b | 2 |  |  |  | 0.7")
    plain = summarise(figures({"a": 0.6, "b": 0.7}), [("a", "b")]).splitlines()
    assert (
        plain[0] == "| row | seeds | none | ring | centre | box | zoom | box+core | failures (box) | box minus none |"
    )
    assert all(line.count("|") == plain[0].count("|") for line in plain[1:4])


def test_how_far_no_prompt_is_from_the_box_is_a_paired_difference() -> None:
    table = figures({"a": 0.6, "b": 0.7}, ("none", "box"))
    table.loc[(table["model"] == "a") & (table["prompt"] == "none"), "iou"] -= 0.1
    lines = summarise(table, []).splitlines()
    assert lines[2].endswith("| +0.100 [+0.100, +0.100] |")
    assert lines[3].endswith("| +0.000 [+0.000, +0.000] |")
