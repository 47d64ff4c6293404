"""`lesionsam predict` on files, good and bad, in one go and in several; the Predictor's memory. Parity: test_parity."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lesionsam.cli.app import app
from lesionsam.errors import UserError
from lesionsam.inference import outputs as inference_outputs
from lesionsam.inference import run as inference_run
from lesionsam.inference.arguments import Source, find_images
from lesionsam.inference.auto import AUTO_DEFAULTS
from lesionsam.inference.files import predict_files
from lesionsam.inference.image import ImagePredictor
from lesionsam.inference.jobs import plan
from lesionsam.metrics import mean_entropy
from lesionsam.models.checkpoint import build_sam, save_sam
from lesionsam.models.compact import CompactArchitecture
from lesionsam.models.sam import Sam

TINY = CompactArchitecture(image_size=64, patch_size=8, width=32, depth=2, num_heads=2, prompt_width=32, decoder_mlp=64)
HEADER = "image_id,lesion_id,big_x0,big_y0,big_x1,big_y1,small_x0,small_y0,small_x1,small_y1"
ROWS = {
    ("wide", "0"): (20, 10, 90, 60, 40, 25, 60, 45),
    ("tall", "0"): (5, 20, 30, 90, 12, 40, 20, 60),
    ("two", "left"): (2, 3, 40, 60, 15, 20, 25, 40),
    ("two", "right"): (45.5, 8.25, 99, 70, 60, 30, 75, 50),
}
SIZES = {"wide": (77, 131), "tall": (101, 40), "two": (80, 100)}  # (height, width)


def tiny_sam(seed: int = 0) -> Sam:
    torch.manual_seed(seed)
    return build_sam("compact", architecture=TINY)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_csv(path: Path, rows: dict[tuple[str, str], tuple[float, ...]], header: str = HEADER) -> Path:
    lines = [",".join(map(str, (*key, *box))) for key, box in rows.items()]
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A folder with weights, three images of four lesions, and their boxes."""
    save_sam(tiny_sam(), tmp_path / "weights.safetensors", name="compact")
    (tmp_path / "images").mkdir()
    for k, (name, size) in enumerate(SIZES.items()):
        Image.fromarray(picture(*size, seed=k)).save(tmp_path / "images" / f"{name}.png")
    write_csv(tmp_path / "boxes.csv", ROWS)
    return tmp_path


def predict(case: Path, *images: str, **options: object) -> int:
    chosen = [str(case / name) for name in images] or [str(case / "images")]
    arguments: dict = {
        "boxes": case / "boxes.csv",
        "model": case / "weights.safetensors",
        "out": case / "out",
        "batch_size": 2,
    } | options
    return predict_files(chosen, **arguments)


def table(case: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (case / "out" / "predictions.csv").open(newline="") as file:
        return {(row["image_id"], row["lesion_id"]): row for row in csv.DictReader(file)}


def masks(case: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((case / "out" / "masks").iterdir())}


def stamps(case: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted((case / "out" / "masks").iterdir())}


def test_every_lesion_gets_mask_overlay_and_row(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(case) == 0
    assert list(masks(case)) == ["tall.png", "two_left.png", "two_right.png", "wide.png"]
    assert {path.name for path in (case / "out" / "overlays").iterdir()} == set(masks(case))
    assert sorted(path.name for path in (case / "out").iterdir()) == [
        "coco.json",
        "index.html",
        "masks",
        "overlays",
        "polygons",
        "predictions.csv",
    ]
    told = capsys.readouterr().err  # on a slow machine also the progress
    assert not [line for line in told.splitlines() if not line.startswith("predicting: ")]
    predictor = ImagePredictor(tiny_sam())
    for (image_id, lesion_id), row in table(case).items():
        image = np.asarray(Image.open(case / "images" / f"{image_id}.png"))
        predictor.set_image(image)
        box = np.array(ROWS[image_id, lesion_id][:4])
        logits, quality, _ = predictor.predict(box=box, multimask_output=False, return_logits=True)
        found = Image.open(case / "out" / row["mask"])
        assert found.mode == "L"
        pixels = np.asarray(found)
        assert pixels.shape == SIZES[image_id]
        assert set(np.unique(pixels)) <= {0, 255}
        sure = np.abs(logits[0]) > 1e-4
        assert np.array_equal(pixels[sure] == 255, logits[0][sure] > 0)
        assert int(row["area"]) == np.count_nonzero(pixels)
        assert (int(row["width"]), int(row["height"])) == SIZES[image_id][::-1]
        assert float(row["predicted_iou"]) == pytest.approx(quality[0], abs=1e-4)
        assert float(row["entropy"]) == pytest.approx(mean_entropy(logits[0]), abs=1e-4)
    assert len(table(case)) == 4


def test_large_images_are_decoded_one_at_a_time(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is decoded when the files of the one before are written, whatever the batch; small ones are read ahead."""
    events: list[str] = []
    read, write = inference_run.read_image, inference_outputs.PredictionFolder.write

    def reading(path: Path) -> np.ndarray:
        events.append("read")
        return read(path)

    def writing(*args: Any, **options: Any) -> tuple[object, ...]:
        events.append("write")
        return write(*args, **options)

    monkeypatch.setattr(inference_run, "read_image", reading)
    monkeypatch.setattr(inference_outputs.PredictionFolder, "write", writing)
    assert predict(case, batch_size=8) == 0
    expected = masks(case)
    assert events == ["read"] * 3 + ["write"] * 4
    events.clear()
    monkeypatch.setattr(inference_run, "HELD_PIXELS", 1)
    assert predict(case, batch_size=8, out=case / "again") == 0
    assert " ".join(events) == "read write read write write read write", "of the images tall, two and wide"
    assert {path.name: path.read_bytes() for path in (case / "again" / "masks").iterdir()} == expected


@pytest.mark.parametrize("prompt", ["box", "box+core", "core", "centre", "ring"])
def test_prompts_do_not_depend_on_the_batch(case: Path, prompt: str) -> None:
    predict(case, prompt=prompt, batch_size=1, overlays=False)
    alone = table(case)
    for path in (case / "out").rglob("*.*"):
        path.unlink()
    predict(case, prompt=prompt, batch_size=8, overlays=False)
    assert alone.keys() == table(case).keys()
    for key, row in table(case).items():
        assert float(row["predicted_iou"]) == pytest.approx(float(alone[key]["predicted_iou"]), abs=2e-4)
        assert abs(int(row["area"]) - int(alone[key]["area"])) <= 2
    assert not (case / "out" / "overlays").is_dir() or not list((case / "out" / "overlays").iterdir())


def test_the_prompt_and_its_threshold_matter(case: Path) -> None:
    areas = {}
    for options in ({"prompt": "box"}, {"prompt": "centre"}, {"threshold": 0.3}, {"threshold": 0.7}):
        predict(case, overlays=False, **options)
        areas[str(options)] = [int(row["area"]) for row in table(case).values()]
    box, centre, low, high = areas.values()
    assert box != centre
    assert all(a >= b >= c for a, b, c in zip(low, box, high, strict=True))
    assert sum(low) > sum(box) > sum(high)


def test_faults_are_named_and_cost_no_other_image_its_mask(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = (case / "images" / "wide.png").read_bytes()
    (case / "images" / "cut.png").write_bytes(image[: len(image) // 2])
    (case / "images" / "page.jpg").write_text("<html>404</html>")
    (case / "images" / "rowless.png").write_bytes(image)
    Image.fromarray(picture(2, 2000)).save(case / "images" / "thin.png")
    write_csv(
        case / "boxes.csv",
        ROWS
        | {
            ("cut", "0"): ROWS["wide", "0"],
            ("page", "0"): ROWS["wide", "0"],
            ("two", "outside"): (50, 5, 120, 60, 60, 20, 70, 30),
            ("two", "reversed"): (50, 5, 20, 60, 30, 20, 40, 30),
            ("thin", "0"): (0, 0, 2, 2, 0, 0, 1, 1),
            ("elsewhere", "0"): ROWS["wide", "0"],
        },
    )
    assert predict(case, "images", "none.png") == 1
    assert list(masks(case)) == ["tall.png", "two_left.png", "two_right.png", "wide.png"]
    assert len(table(case)) == 4
    lines = capsys.readouterr().err.splitlines()
    named = ["none.png", "rowless.png", "cut.png", "page.jpg", "thin.png", "line 8, big_x1", "line 9, big_x0"]
    for what in named:
        assert sum(line.startswith("error: ") and what in line for line in lines) == 1, (what, lines)
    assert [line for line in lines if line.startswith("note: ")] == [
        f"note: {case / 'boxes.csv'} has rows of 1 images that were not given: elsewhere"
    ]
    assert len(lines) == len(named) + 1


def test_a_second_call_does_only_what_is_missing_or_has_changed(case: Path) -> None:
    predict(case)
    first, rows = stamps(case), table(case)
    predict(case)
    assert stamps(case) == first
    assert table(case) == rows
    (case / "out" / "masks" / "wide.png").unlink()
    Image.fromarray(picture(*SIZES["tall"], seed=9)).save(case / "images" / "tall.png")
    predict(case)
    again = stamps(case)
    assert {name for name in first if again[name] != first[name]} == {"wide.png", "tall.png"}
    write_csv(case / "boxes.csv", ROWS | {("wide", "0"): (10, 10, 90, 60, 40, 25, 60, 45)})
    predict(case)
    assert {name for name in first if stamps(case)[name] != again[name]} == {"wide.png"}
    save_sam(tiny_sam(seed=1), case / "weights.safetensors", name="compact")
    before = stamps(case)
    predict(case)
    assert not before.items() & stamps(case).items()


def test_of_two_lesions_of_an_image_only_the_missing_one_is_done(
    case: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(case, "images/two.png")
    first, rows = stamps(case), table(case)
    (case / "out" / "masks" / "two_left.png").unlink()
    capsys.readouterr()
    assert predict(case, "images/two.png") == 0
    assert "1 masks written" in (said := capsys.readouterr().out)
    assert "1 kept from before" in said
    assert {name for name in first if stamps(case)[name] != first[name]} == {"two_left.png"}
    assert table(case) == rows
    again = stamps(case)
    write_csv(case / "boxes.csv", ROWS | {("two", "right"): (50, 10, 99, 70, 60, 30, 75, 50)})
    predict(case, "images/two.png")
    assert {name for name in again if stamps(case)[name] != again[name]} == {"two_right.png"}
    write_csv(case / "boxes.csv", ROWS | {("two", "right"): (50, 10, 199, 70, 60, 30, 75, 50)})
    assert predict(case, "images/two.png") == 1  # outside the image: its mask goes, the other lesion's stays
    assert stamps(case) == {"two_left.png": again["two_left.png"]}


def test_an_earlier_calls_images_stay_in_the_table(case: Path) -> None:
    predict(case, "images/wide.png")
    assert list(table(case)) == [("wide", "0")]
    predict(case, "images/tall.png")
    assert list(table(case)) == [("wide", "0"), ("tall", "0")]


def test_outdated_masks_go_when_the_image_can_no_longer_be_read(case: Path) -> None:
    predict(case)
    (case / "images" / "two.png").write_bytes(b"")
    assert predict(case) == 1
    assert list(masks(case)) == ["tall.png", "wide.png"]
    assert set(table(case)) == {("wide", "0"), ("tall", "0")}


def test_an_interrupted_call_keeps_what_it_did(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predict(case, out=case / "whole", overlays=False)
    write, written = inference_outputs.write_png, []

    def interrupted(path: Path, pixels: np.ndarray) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(inference_outputs, "write_png", interrupted)
        with pytest.raises(KeyboardInterrupt):
            predict(case, overlays=False)
    assert [Path(row["mask"]).name for row in table(case).values()] == written
    assert written == ["tall.png", "two_left.png"]  # of two lesions of one image, one is there
    kept = stamps(case)
    assert predict(case, overlays=False) == 0
    assert kept.items() <= stamps(case).items()
    whole = {path.name: path.read_bytes() for path in (case / "whole" / "masks").iterdir()}
    assert masks(case) == whole


def test_boxes_without_cores(case: Path) -> None:
    header = ",".join(HEADER.split(",")[:6])
    write_csv(case / "boxes.csv", {key: box[:4] for key, box in ROWS.items()}, header)
    assert predict(case, prompt="box") == 0
    with pytest.raises(UserError, match="column small_x0 is missing"):
        predict(case, prompt="centre")


def test_lesions_are_counted_where_the_csv_does_not_name_them(case: Path) -> None:
    lines = [HEADER.replace("lesion_id,", "")] + [",".join(map(str, (key[0], *box))) for key, box in ROWS.items()]
    (case / "boxes.csv").write_text("\n".join(lines))
    assert predict(case, overlays=False) == 0
    assert list(masks(case)) == ["tall.png", "two_0.png", "two_1.png", "wide.png"]


def test_ids_may_carry_the_ending_and_sizes_must_agree(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = HEADER.replace("lesion_id", "lesion_id,width,height")
    rows = {("wide.png", "0"): (131, 77, *ROWS["wide", "0"]), ("tall.png", "0"): (101, 40, *ROWS["tall", "0"])}
    write_csv(case / "boxes.csv", rows, header)
    assert predict(case, "images/wide.png", "images/tall.png", overlays=False) == 1
    assert list(masks(case)) == ["wide.png.png"]
    assert "width: got 101, but image 'tall.png' is 40x101 px" in capsys.readouterr().err


def test_images_come_from_files_folders_and_patterns(case: Path) -> None:
    folder = case / "images"
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "deeper").mkdir()
    os.link(folder / "wide.png", folder / "deeper" / "more.PNG")
    every = [folder / f"{name}.png" for name in ("tall", "two", "wide")]
    assert find_images([folder]) == (every, [])
    assert find_images([str(folder / "t*.png"), folder]) == (every, [])
    assert find_images([str(folder / "**" / "*")])[0] == [folder / "deeper" / "more.PNG", *every]
    paths, problems = find_images([folder / "wide.png", case / "out", str(folder / "x*.png"), folder / "wide.png"])
    assert paths == [folder / "wide.png"]
    assert len(problems) == 2
    (case / "empty").mkdir()
    assert "folder without images" in find_images([case / "empty"])[1][0]


def test_a_link_that_leads_nowhere_is_a_fault_and_no_silence(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (case / "images" / "lost.png").symlink_to(case / "moved-away.png")
    assert (
        predict_files(
            [case / "images"],
            model=case / "weights.safetensors",
            auto=True,
            out=case / "out",
            options=replace(AUTO_DEFAULTS, points_per_side=2),
        )
        == 1
    )
    assert f"error: {case / 'images' / 'lost.png'}: no such file; expected an image, and the link" in (
        capsys.readouterr().err
    )


def test_names_that_cannot_be_kept_apart_are_refused(case: Path) -> None:
    (case / "other").mkdir()
    os.link(case / "images" / "wide.png", case / "other" / "wide.png")
    paths = [case / "images" / "wide.png", case / "other" / "wide.png"]
    with pytest.raises(UserError, match=r"other.wide\.png.*stands for .*images"):
        plan(paths, Source("boxes", case / "boxes.csv", "centre"))
    os.link(case / "images" / "wide.png", case / "images" / "two_left.png")
    write_csv(case / "boxes.csv", ROWS | {("two_left", "0"): ROWS["wide", "0"]})
    with pytest.raises(UserError, match=r"would be two_left\.png"):
        predict(case)
    write_csv(case / "boxes.csv", {("wide", "../a b"): ROWS["wide", "0"], ("wide", "c"): ROWS["wide", "0"]})
    jobs, _, _ = plan(paths[:1], Source("boxes", case / "boxes.csv", "centre"))
    assert [lesion.file_name for lesion in jobs[0].lesions] == ["wide_.._a_b", "wide_c"]


def test_a_row_that_stands_twice_is_named_and_the_first_taken(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (case / "boxes.csv").open("a") as file:
        file.write("wide,0,1,1,5,5,2,2,3,3\n")
    assert predict(case) == 1
    assert "line 6, lesion_id: 'wide' has a lesion '0' already" in capsys.readouterr().err
    assert len(table(case)) == 4


def test_nothing_that_can_be_predicted(case: Path) -> None:
    for message, call in {
        "expected one of ring": lambda: predict(case, prompt="tight"),
        "--threshold: expected a probability": lambda: predict(case, threshold=1.0),
        "--batch-size: expected at least 1": lambda: predict(case, batch_size=0),
        "no such image": lambda: predict(case, "none.png"),
        "no such weights file": lambda: predict(case, model=case / "none.safetensors"),
    }.items():
        with pytest.raises(UserError, match=message):
            call()
    assert not (case / "out").exists()
    (case / "out").mkdir()
    (case / "out" / "predictions.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a table of `lesionsam predict`"):
        predict(case)
    assert (case / "out" / "predictions.csv").read_text() == "a,b\n1,2\n"


def test_the_command_line_passes_everything_on_and_the_exit_code_back(case: Path) -> None:
    arguments = [
        "predict",
        str(case / "images" / "*.png"),
        "--boxes",
        str(case / "boxes.csv"),
        "--weights",
        str(case / "weights.safetensors"),
        "--out",
        str(case / "out"),
        "--prompt",
        "box+core",
        "--threshold",
        "0.4",
        "--batch-size",
        "3",
        "--no-overlays",
        "--device",
        "cpu",
    ]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert len(masks(case)) == 4
    assert not (case / "out" / "overlays").exists()
    assert CliRunner().invoke(app, [*arguments, str(case / "none.png")]).exit_code == 1
    before = masks(case)
    assert CliRunner().invoke(app, [*arguments, "--prompt", "box", "--zoom"]).exit_code == 0
    assert masks(case).keys() == before.keys()
    refused = CliRunner().invoke(app, [*arguments, "--zoom"])
    assert isinstance(refused.exception, UserError), "the prompt is box+core"


# --------------------------------------------------------------------------------------------------------- Predictor


def counted(sam: Sam) -> Callable[[], int]:
    """How often the encoder has run."""
    passes: list[int] = []
    sam.image_encoder.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    return lambda: len(passes)


def test_an_image_that_comes_back_is_not_encoded_again() -> None:
    sam = tiny_sam()
    passes, predictor = counted(sam), ImagePredictor(sam, num_cached=2)
    images = [picture(40, 60), picture(60, 40), picture(40, 60, seed=1)]
    box = np.array([5.0, 6, 30, 35])
    answers = []
    for k in (0, 1, 0, 1):
        predictor.set_image(images[k])
        answers.append(predictor.predict(box=box, multimask_output=False)[2])
        predictor.predict(point_coords=np.array([[3.0, 4]]), point_labels=np.array([1]))
    assert passes() == 2
    assert np.array_equal(answers[0], answers[2])
    assert np.array_equal(answers[1], answers[3])
    assert not np.array_equal(answers[0], answers[1])
    predictor.set_image(images[2])
    assert passes() == 3
    predictor.set_image(images[0])  # the one that was used longest ago has gone
    assert passes() == 4
    predictor.reset_image()
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(box=box)
    predictor.set_image(images[0])
    assert passes() == 5


def test_images_of_the_same_bytes_but_another_shape_are_not_mixed_up() -> None:
    predictor = ImagePredictor(tiny_sam())
    image = picture(30, 60)
    masks_of = []
    for shape in ((30, 60, 3), (60, 30, 3)):
        predictor.set_image(image.reshape(shape))
        masks_of.append(predictor.predict(box=np.array([2.0, 3, 20, 25]))[0])
    assert (masks_of[0].shape, masks_of[1].shape) == ((3, 30, 60), (3, 60, 30))


def test_what_the_predictor_cannot_use_is_said() -> None:
    predictor = ImagePredictor(tiny_sam())
    for image in (picture(8, 9)[..., 0], picture(8, 9).astype(np.float32), np.zeros((8, 9, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8"):
            predictor.set_image(image)
    predictor.set_image(picture(8, 9))
    with pytest.raises(ValueError, match="both or neither"):
        predictor.predict(point_coords=np.array([[1.0, 2]]))
    with pytest.raises(ValueError, match=r"expected \(2, 2\)"):
        predictor.predict(point_coords=np.array([[1.0, 2]]), point_labels=np.array([1, 0]))
    with pytest.raises(ValueError, match=r"expected \(4,\) XYXY"):
        predictor.predict(box=np.array([[1.0, 2, 3, 4]]))
