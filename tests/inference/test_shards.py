"""Predictions in shards: what is merged equals what a single process writes, byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.cli import lesionsam
from helpers.tiny import tiny_sam
from lesionsam.errors import UserError
from lesionsam.inference import shards
from lesionsam.inference.auto import AUTO_DEFAULTS
from lesionsam.inference.files import predict_files
from lesionsam.inference.run import PredictRun
from lesionsam.inference.shards import Shard, merge_shards
from lesionsam.models.checkpoint import save_sam

EASY = replace(AUTO_DEFAULTS, points_per_side=2, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=0.999)
LESIONS = {"a": 1, "b": 2, "c": 1, "d": 3, "e": 1, "f": 1, "g": 2, "h": 1, "i": 1}  # image -> boxes on it
# Ends as by kill -9 when it is to write one mask more than so many.
KILLED = """
import os, sys
from pathlib import Path
from lesionsam.inference import outputs, shards
from lesionsam.inference.files import predict_files
case, left = Path(sys.argv[1]), [None] * int(sys.argv[2])
write = outputs.write_png
outputs.write_png = lambda path, pixels: write(path, pixels) if left and not left.pop() else os._exit(9)
shards.BLOCK_IMAGES = 2
predict_files([case / "images"], model=case / "weights.safetensors", boxes=case / "boxes.csv", out=case / "out",
              batch_size=3, shard=shards.Shard.parse(sys.argv[3]))
"""


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights, nine images of several sizes, and their boxes."""
    monkeypatch.setattr(shards, "BLOCK_IMAGES", 2)
    save_sam(tiny_sam(sharpness=40.0), tmp_path / "weights.safetensors", name="compact")
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    lines = ["image_id,lesion_id,big_x0,big_y0,big_x1,big_y1"]
    for k, (name, count) in enumerate(LESIONS.items()):
        pixels = rng.integers(0, 256, (70 + k, 96, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
        lines += [f"{name},{n},{10 + 8 * n},{9 + n},{55 + 8 * n},{52 + n}" for n in range(count)]
    (tmp_path / "boxes.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def predict(case: Path, out: str = "out", shard: str = "", **options: object) -> int:
    how: dict = {"boxes": case / "boxes.csv", "batch_size": 3, "options": EASY} | options
    own = Shard.parse(shard) if shard else None
    return predict_files([case / "images"], model=case / "weights.safetensors", out=case / out, shard=own, **how)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {}),
        (3, {"zoom": True, "shapes": False}),
        (5, {"boxes": None, "everything": True, "overlays": False}),  # more shards than batches
        (2, {"boxes": None, "auto": True}),
    ],
    ids=["boxes", "zoom", "everything", "auto"],
)
def test_merged_shards_equal_a_single_process(
    case: Path, count: int, options: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    (case / "images" / "broken.png").write_bytes(b"no image")
    with (case / "boxes.csv").open("a") as file:
        file.write("broken,0,1,1,5,5\nb,2,90,5,120,30\nc,0,1,1,9,9\nelsewhere,0,1,1,9,9\n")
    assert predict(case, "whole", **options) == 1
    alone = sorted(capsys.readouterr().err.splitlines())
    for k in range(count, 0, -1):
        predict(case, shard=f"{k}/{count}", **options)
    assert sorted(capsys.readouterr().err.splitlines()) == alone  # each fault is named once
    assert merge_shards(case / "out") == 1
    assert contents(case / "out") == contents(case / "whole")
    num_faults = 3 if options.get("boxes", True) else 1
    assert capsys.readouterr().out.rstrip().endswith(f"; {num_faults} faults, named by the shards")
    assert merge_shards(case / "out") == 0
    assert "nothing to merge" in capsys.readouterr().out


@pytest.mark.parametrize("num_masks", [0, 1, 3, 5])
def test_a_killed_shard_goes_on_and_gives_the_same_bytes(case: Path, num_masks: int) -> None:
    predict(case, "whole")
    predict(case, shard="1/2")
    arguments = [str(case), str(2 * num_masks + 1), "2/2"]  # a mask and a picture each; cut between the two
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    with pytest.raises(UserError, match=r"shards unfinished: 2/2; run the same command with --shard 2/2"):
        merge_shards(case / "out")
    assert predict(case, shard="2/2") == 0
    assert merge_shards(case / "out") == 0
    assert contents(case / "out") == contents(case / "whole")


def test_a_shard_that_is_run_again_makes_only_what_is_missing(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict(case, "whole")
    for shard in ("1/2", "2/2"):
        predict(case, shard=shard)
    (case / "out" / "masks" / "b_0.png").unlink()
    with pytest.raises(UserError, match=r"b_0\.png: the mask of a finished shard is gone; run the shards again"):
        merge_shards(case / "out")
    before = {path: path.stat().st_mtime_ns for path in (case / "out" / "masks").iterdir()}
    capsys.readouterr()
    assert predict(case, shard="1/2") == 0
    assert "shard 1/2: 1 masks written" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    merge_shards(case / "out")
    assert contents(case / "out") == contents(case / "whole")


def test_shards_that_do_not_belong_together_are_refused(case: Path) -> None:
    with pytest.raises(UserError, match="no such folder; expected the --out of"):
        merge_shards(case / "out")
    (case / "out").mkdir()
    with pytest.raises(UserError, match=r"no shards to merge; .* --shard I/N --out .*out"):
        merge_shards(case / "out")
    predict(case, shard="1/3")
    with pytest.raises(UserError, match=r"shards missing: 2/3, 3/3; run the same command with --shard 2/3"):
        merge_shards(case / "out")
    with pytest.raises(UserError, match=r"holds shards of another division, such as 000001-of-000003, expected 2 sh"):
        predict(case, shard="1/2")
    with pytest.raises(UserError, match=r"holds shards that are not merged; `lesionsam predict --merge .*out` joins"):
        predict(case)
    with pytest.raises(UserError, match=r"begun with another list of images or another --batch-size"):
        predict(case, shard="1/3", batch_size=2)
    predict(case, shard="2/3", threshold=0.6)
    predict(case, shard="3/3")
    with pytest.raises(UserError, match=r"shard 2/3 was predicted with another threshold: expected 0.5 as of shard 1,"):
        merge_shards(case / "out")
    (case / "images" / "i.png").rename(case / "images" / "j.png")
    (case / "boxes.csv").write_text((case / "boxes.csv").read_text().replace("i,", "j,"))
    with pytest.raises(UserError, match=r"000003-of-000003: was begun with another list of images"):
        predict(case, shard="3/3")
    predict(case, shard="2/3")
    with pytest.raises(UserError, match=r"shard 2/3 was predicted with another prompts file"):
        merge_shards(case / "out")
    (case / "out" / "shards" / "000001-of-000004").mkdir()
    with pytest.raises(UserError, match=r"holds shards of 3 and of 4; remove the folders that are not wanted"):
        merge_shards(case / "out")
    predict(case, "whole")
    with pytest.raises(UserError, match=r"predictions\.csv: belongs to a prediction that is whole; leave --shard out"):
        predict(case, "whole", shard="1/2")


def test_a_changed_option_is_predicted_anew(case: Path) -> None:
    predict(case, "whole", threshold=0.6)
    for shard, threshold in (("1/2", 0.5), ("1/2", 0.6), ("2/2", 0.6)):
        predict(case, shard=shard, threshold=threshold)
    merge_shards(case / "out")
    assert contents(case / "out") == contents(case / "whole")


def test_a_shard_runs_once_at_a_time_and_beside_others(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lesionsam.utils.locks.HANDOVER_SECONDS", 0.1)
    work, refused = PredictRun.work, []

    def work_and_call_others(self: PredictRun, jobs: list) -> None:
        work(self, jobs)
        if not refused:
            refused.append("1/2")
            for call, message in (
                (lambda: predict(case, shard="1/2"), r"shard 1/2 of .*out is already running as pid \d+ since"),
                (lambda: predict(case), r"another process writes there; wait for it, or choose another --out"),
                (lambda: merge_shards(case / "out"), r"another process writes there; a shard is running"),
            ):
                with pytest.raises(UserError, match=message):
                    call()
            assert predict(case, shard="2/2") == 0

    monkeypatch.setattr(PredictRun, "work", work_and_call_others)
    assert predict(case, shard="1/2") == 0
    assert merge_shards(case / "out") == 0
    predict(case, "whole")
    assert contents(case / "out") == contents(case / "whole")


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "-1/3", "1/x", "²/3", ""])
def test_a_shard_out_of_range(text: str) -> None:
    with pytest.raises(UserError, match=r"--shard: expected I/N with I from 1 to N, such as 2/8, got '"):
        Shard.parse(text)


def test_every_image_is_in_one_shard() -> None:
    for num_images in (0, 1, 7, 24, 25):
        for count in (1, 2, 5, 9):
            parts = [list(range(num_images))[Shard(k, count).part(num_images, 4)] for k in range(1, count + 1)]
            assert [image for part in parts for image in part] == list(range(num_images))
            assert all(part[0] % 4 == 0 for part in parts if part)


def test_the_command_line_with_devices_and_a_list(
    case: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(case, "whole", batch_size=2)
    names = [str(case / "images" / f"{name}.png") for name in LESIONS]
    (case / "list.txt").write_text("\n".join(names) + "\n\n")
    call = ["predict", "--list", str(case / "list.txt"), "--boxes", str(case / "boxes.csv"), "--device", "cpu"]
    call += ["--model", str(case / "weights.safetensors"), "--out", str(case / "out"), "--batch-size", "2"]

    assert lesionsam(monkeypatch, *call, "--devices", "2") == 0
    assert contents(case / "out") == contents(case / "whole")
    for wrong, message in {
        ("--shard", "1/2", "--devices", "2"): "--shard and --devices: expected one of the two",
        ("--devices", "0"): "--devices: expected a number from 1 to 1024, or auto, got '0'",
        ("--devices", "2", "--device", "cuda"): "--devices 2: expected at most 0, the number of GPUs here",
        ("--merge", str(case / "out")): "--merge: expected the folder of the shards alone",
        ("--list", str(case / "none.txt")): "no such file; expected one with an image per line",
    }.items():
        assert lesionsam(monkeypatch, *call, *wrong) == 2
        assert message in capsys.readouterr().err
    (case / "boxes.csv").write_text("image_id,big_x0,big_y0,big_x1,big_y1\n")
    assert lesionsam(monkeypatch, *call[:-4], "--out", str(case / "other"), "--devices", "2") == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f"error: {case / 'boxes.csv'}: expected a row for each lesion below the header, got none"]


def test_the_state_of_a_shard_is_readable(case: Path) -> None:
    predict(case, shard="2/3")
    state = json.loads((case / "out/shards/000002-of-000003/shard.json").read_text())
    assert (state["shard"], state["of"], state["num_images"], state["finished"], state["faults"]) == (2, 3, 9, True, 0)
    (case / "out/shards/000002-of-000003/shard.json").write_text("[]")
    with pytest.raises(UserError, match=r"not a shard's state of this version; remove .*000002-of-000003 and run"):
        predict(case, shard="2/3")
