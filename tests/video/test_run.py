"""The files of `lesionsam track`: complete, the same after kill -9, in constant memory, errors in one line."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch

from helpers.clips import box_of, write_boxes, write_clip
from helpers.families import tiny_video_model
from helpers.tiny import tiny_sam
from lesionsam.data.sources.clips import GeneratedClip
from lesionsam.errors import UserError
from lesionsam.formats.rle import decode
from lesionsam.models.checkpoint import save_sam
from lesionsam.models.sam2 import quiet
from lesionsam.utils.images import read_mask
from lesionsam.video import run
from lesionsam.video.run import track

TRACK = "import sys; from lesionsam.cli.app import main; sys.argv = ['lesionsam', *sys.argv[1:]]; main()"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clip.mp4 of 24 frames at uneven times, first.csv with its lesion, model.safetensors."""
    folder = tmp_path_factory.mktemp("clip")
    generated = GeneratedClip(0, 4, num_frames=24, side=96)
    frames = [generated.frame(number) for number in range(24)]
    times = [40 * number + (100 if number > 10 else 0) for number in range(24)]
    write_clip(folder / "clip.mp4", [image for image, _ in frames], times)
    write_boxes(folder / "first.csv", [(0, "0", box_of(frames[0][1]))])
    save_sam(tiny_sam(sharpness=20.0), folder / "model.safetensors", name="compact")
    return folder


def digests(out: Path) -> dict[str, str]:
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != run.STATE
    }


def track_clip(inputs: Path, out: Path, **options: object) -> int:
    given = {"boxes": inputs / "first.csv", "model": inputs / "model.safetensors", "out": out} | options
    return track(inputs / "clip.mp4", **given)  # type: ignore[arg-type]


def test_files_agree_with_each_other_and_with_the_clip(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert track_clip(inputs, out) == 0
    with (out / "tracks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["frame"]) for row in rows] == list(range(24))
    assert [round(1000 * float(row["time"])) for row in rows[9:13]] == [360, 400, 540, 580]
    coco = json.loads((out / "coco.json").read_text())
    assert [image["frame_id"] for image in coco["images"]] == list(range(24))
    assert coco["videos"][0] | {"id": 1} == {"id": 1, "name": "clip.mp4", "width": 96, "height": 72, "length": 24}
    by_image = {one["image_id"]: one for one in coco["annotations"]}
    for row in rows:
        mask = read_mask(out / row["mask"], (96, 72))
        assert mask.sum() == int(row["area"])
        if mask.any():
            assert (decode(by_image[int(row["frame"]) + 1]["segmentation"], 72, 96) == mask).all()
    assert len(by_image) == sum(int(row["area"]) > 0 for row in rows) > 0
    with av.open(str(out / "overlay.mp4")) as container:
        shown = [frame.time for frame in container.decode(video=0)]
    assert len(shown) == 24
    assert np.allclose(shown, [float(row["time"]) for row in rows], atol=1e-3)
    before = digests(out), (out / "tracks.csv").stat().st_mtime_ns
    assert track_clip(inputs, out) == 0
    assert (digests(out), (out / "tracks.csv").stat().st_mtime_ns) == before, "nothing was left to do"


def memory_model(folder: Path) -> Path:
    with quiet():
        tiny_video_model("sam2").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["propagation", "memory"])
def test_a_killed_call_goes_on_to_the_same_files(inputs: Path, tmp_path: Path, kind: str) -> None:
    model = inputs / "model.safetensors" if kind == "propagation" else memory_model(tmp_path / "model")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert track_clip(inputs, whole, model=model) == 0
    words = ["track", str(inputs / "clip.mp4"), "--boxes", str(inputs / "first.csv"), "--model", str(model)]
    program = f"import lesionsam.video.run as run; run.SAVE_EVERY = 5\n{TRACK}"
    process = subprocess.Popen([sys.executable, "-c", program, *words, "--out", str(killed)], cwd=tmp_path)
    deadline = time.monotonic() + 300
    while len(list(killed.glob("masks/*.png"))) < 8 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "coco.json").exists()
    state = torch.load(killed / run.STATE, weights_only=True)
    assert 5 <= state["frames"] < 24
    assert not state["ended"]
    assert track_clip(inputs, killed, model=model) == 0
    assert digests(killed) == digests(whole)


def test_other_inputs_begin_anew_and_other_peoples_files_stay(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    track_clip(inputs, out, overlay=False)
    box = box_of(GeneratedClip(0, 4, num_frames=24, side=96).frame(5)[1])
    later = write_boxes(tmp_path / "later.csv", [(5, "a", box), (9, "b", box)])
    assert track_clip(inputs, out, boxes=later, overlay=False) == 0
    assert "removed the masks of an earlier call" in capsys.readouterr().err
    assert sorted(path.name for path in (out / "masks").iterdir()) == ["a", "b"]
    assert len(list((out / "masks" / "a").iterdir())) == 24 - 5
    assert len(list((out / "masks" / "b").iterdir())) == 24 - 9
    foreign = tmp_path / "foreign"
    (foreign / "masks").mkdir(parents=True)
    with pytest.raises(UserError, match="is not of `lesionsam track`"):
        track_clip(inputs, foreign)


def test_a_damaged_clip_gives_what_comes_before(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    from PIL import Image

    for number in range(4):
        Image.fromarray(GeneratedClip(0, 4, num_frames=24, side=96).frame(number)[0]).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:3000])
    options = {"boxes": inputs / "first.csv", "model": inputs / "model.safetensors", "out": tmp_path / "out"}
    assert track(folder, **options) == 1  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert "2.png: image is truncated" in said
    assert "the files hold the 2 frames before" in said
    assert len((tmp_path / "out" / "tracks.csv").read_text().splitlines()) == 3
    assert track(folder, **options) == 1, "and says so again"  # type: ignore[arg-type]


def test_what_cannot_be_tracked_is_said_in_one_line(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--memory x/y: compact has none"):
        track_clip(inputs, tmp_path / "out", memory="x/y")
    rows = [(0, "a/b", np.array([2.0, 2, 40, 40])), (0, "a b", np.array([2.0, 2, 40, 40]))]
    with pytest.raises(UserError, match="two of a b, a/b make the same folder name"):
        track_clip(inputs, tmp_path / "out", boxes=write_boxes(tmp_path / "two.csv", rows))


def test_predict_names_the_command_for_clips(inputs: Path) -> None:
    from lesionsam.inference.arguments import find_images

    paths, problems = find_images([inputs / "clip.mp4"])
    assert not paths
    assert problems == [f"{inputs / 'clip.mp4'}: is a clip; use `lesionsam track clip.mp4 --boxes BOXES.csv`"]


def test_memory_does_not_grow_with_the_clip(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of 1,000 links to two frames; the resident size after 200 frames and at the end."""
    from PIL import Image

    folder = tmp_path / "frames"
    folder.mkdir()
    generated = GeneratedClip(0, 4, num_frames=24, side=96)
    for number in range(2):
        Image.fromarray(generated.frame(number)[0]).save(tmp_path / f"{number}.png")
    for number in range(1000):
        (folder / f"{number:04d}.png").symlink_to(tmp_path / f"{number % 2}.png")
    process, sizes = psutil.Process(), []
    write_frame = run.write_frame

    def measured(*given: object) -> None:
        if given[2] in (200, 999):
            sizes.append(process.memory_info().rss)
        write_frame(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "write_frame", measured)
    out = tmp_path / "out"
    assert track(folder, boxes=inputs / "first.csv", model=inputs / "model.safetensors", out=out, overlay=False) == 0
    assert len(sizes) == 2
    assert sizes[1] - sizes[0] < 8 << 20  # bytes; 800 frames of 96 x 72 RGB are 16 MB, their features more
