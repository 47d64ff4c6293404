"""What a second call into the same folder makes of the first one's files, however that one ended or was asked."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.tiny import tiny_sam
from lesionsam.errors import UserError
from lesionsam.inference import files as inference
from lesionsam.inference.auto import AUTO_DEFAULTS
from lesionsam.inference.files import predict_files
from lesionsam.models.checkpoint import save_sam
from lesionsam.utils.images import read_mask

EASY = replace(AUTO_DEFAULTS, points_per_side=3, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=0.999)
HEADER = "image_id,lesion_id,big_x0,big_y0,big_x1,big_y1\n"
BOX = "10,8,60,50\n"
# Ends as by kill -9 when the first table after the first mask is due.
KILLED = """
import os, sys
from pathlib import Path
from lesionsam.inference.files import predict_files
from lesionsam.inference.outputs import PredictionFolder
case, save = Path(sys.argv[1]), PredictionFolder.save_table
PredictionFolder.save_table = lambda self: os._exit(9) if (self.out / "masks" / "one.png").is_file() else save(self)
predict_files([case / "one.png"], model=case / "weights.safetensors", boxes=case / "one.csv", out=case / "out",
              threshold=0.0001)
"""


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """Weights and two images."""
    save_sam(tiny_sam(sharpness=40.0), tmp_path / "weights.safetensors", name="compact")
    for seed, name in enumerate(("one", "one_1")):
        pixels = np.random.default_rng(seed).integers(0, 256, (60, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "one.csv").write_text(f"{HEADER}one,0,{BOX}")
    return tmp_path


def again(case: Path, image: str = "one.png", boxes: str | None = None, **options: object) -> int:
    if boxes is not None:
        (case / "boxes.csv").write_text(HEADER + boxes)
        options["boxes"] = case / "boxes.csv"
    how: dict = {"out": case / "out", "options": EASY} | options
    return predict_files([case / image], model=case / "weights.safetensors", **how)


def rows(case: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (case / "out/predictions.csv").open(newline="") as file:
        return {(row["image_id"], row["lesion_id"]): row for row in csv.DictReader(file)}


def coco(case: Path) -> dict:
    return json.loads((case / "out/coco.json").read_text())


def test_masks_of_a_killed_call_with_other_options_are_not_taken_for_this_ones(case: Path) -> None:
    again(case, boxes=f"one,0,{BOX}")
    before = read_mask(case / "out/masks/one.png")
    (case / "one.csv").write_text((case / "boxes.csv").read_text())
    done = subprocess.run([sys.executable, "-c", KILLED, str(case)], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert (read_mask(case / "out/masks/one.png") != before).any()  # the killed call got that far
    again(case, boxes=f"one,0,{BOX}")
    np.testing.assert_array_equal(read_mask(case / "out/masks/one.png"), before)


def test_an_images_rows_are_those_that_its_last_call_asked_for(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again(case, everything=True)
    assert len(rows(case)) > 1
    again(case, auto=True)
    assert [row["mask"] for row in rows(case).values()] == ["masks/one.png"]
    again(case, boxes=f"one,a,{BOX}one,b,{BOX}")
    capsys.readouterr()
    again(case, boxes=f"one,c,{BOX}")  # in place of the one without a prompt: the same file, another lesion
    assert "note: removed 2 masks of earlier calls on these images" in capsys.readouterr().err
    assert list(rows(case)) == [("one", "c")]
    assert [path.name for path in (case / "out/masks").rglob("*.png")] == ["one.png"]


def test_a_name_that_another_images_mask_has_is_refused_before_anything_is_written(case: Path) -> None:
    again(case, "one_1.png", boxes=f"one_1,0,{BOX}")
    before = (case / "out/masks/one_1.png").read_bytes()
    with pytest.raises(UserError, match=r"one_1\.png: is the mask of one_1/0, of an earlier call.*--out"):
        again(case, boxes=f"one,1,{BOX}one,2,{BOX}")
    assert list(rows(case)) == [("one_1", "0")]
    assert (case / "out/masks/one_1.png").read_bytes() == before


def test_all_masks_of_two_images_never_share_a_folder(case: Path) -> None:
    (case / "one.png").rename(case / "a b.png")
    (case / "one_1.png").rename(case / "a_b.png")
    with pytest.raises(UserError, match="its masks would be in masks/a_b/, as those of a b"):
        again(case, "*.png", everything=True)
    assert not (case / "out").exists()
    again(case, "a b.png", everything=True)
    with pytest.raises(UserError, match="is the mask of a b/0, of an earlier call, and one of a_b"):
        again(case, "a_b.png", everything=True)


@pytest.mark.parametrize("options", [{"shapes": False, "threshold": 0.9}, {}], ids=["no shapes", "broken image"])
def test_coco_json_never_tells_of_masks_that_are_gone(case: Path, options: dict) -> None:
    again(case, boxes=f"one,0,{BOX}")
    assert len(coco(case)["annotations"]) == 1
    if not options:
        (case / "one.png").write_bytes(b"no image")
    again(case, boxes=f"one,0,{BOX}", **options)
    assert not [path.name for path in (case / "out").glob("coco*.json")]


def test_coco_json_knows_the_files_of_earlier_calls(case: Path) -> None:
    again(case, boxes=f"one,0,{BOX}")
    again(case, "one_1.png", boxes=f"one_1,0,{BOX}")
    assert [image["file_name"] for image in coco(case)["images"]] == ["one.png", "one_1.png"]


def test_two_calls_at_once_do_not_write_one_table(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = ["first"]
    work = inference.PredictRun.work

    def work_and_call_again(self: inference.PredictRun, jobs: list) -> None:
        work(self, jobs)
        if begun.pop() == "first":  # what it has done is not in the table on disk yet
            begun.append("second")
            with pytest.raises(UserError, match="out: another process writes there; wait for it, or choose"):
                again(case, "one_1.png", boxes=f"one_1,0,{BOX}")

    monkeypatch.setattr(inference.PredictRun, "work", work_and_call_again)
    again(case, boxes=f"one,0,{BOX}")
    begun.append("third")
    assert again(case, "one_1.png", boxes=f"one_1,0,{BOX}") == 0
    assert list(rows(case)) == [("one", "0"), ("one_1", "0")]
