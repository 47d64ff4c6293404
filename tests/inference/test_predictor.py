"""What `lesionsam predict` and `Predictor` offer beyond boxes: points, no prompt, all masks, shapes, flags."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.measure import label, regionprops
from typer.testing import CliRunner

from helpers.tiny import ARCHITECTURE, tiny_sam
from lesionsam.boxes.geometry import largest_component_box, loosen
from lesionsam.cli.app import app
from lesionsam.errors import UserError
from lesionsam.formats.coco import load_instances
from lesionsam.formats.rle import decode as decode_rle
from lesionsam.inference import outputs as inference_outputs
from lesionsam.inference.auto import AUTO_DEFAULTS
from lesionsam.inference.decode import DecodeOptions, decode_lesions
from lesionsam.inference.files import predict_files
from lesionsam.inference.image import EncodedImages, ImagePredictor
from lesionsam.inference.lesion import (
    LOOSENESS,
    ZOOM_LOOSENESS,
    ZOOM_SURROUNDINGS,
    LesionSearch,
    candidates,
    find_lesions,
    plausibility,
    trained_without_prompt,
)
from lesionsam.inference.prediction import LesionPrompt, review_reasons
from lesionsam.inference.predictor import Predictor
from lesionsam.inference.rank import SIGNS, agreement, lesion_scores, lesion_signs, smoothed_lab
from lesionsam.inference.zoom import BACKGROUND_LOGIT, decode_zoomed
from lesionsam.metrics import iou_matrix
from lesionsam.models.checkpoint import load_sam, save_sam
from lesionsam.models.sam import Sam, decode, encode
from lesionsam.models.transforms import model_frames
from lesionsam.prompts import TRAINED_WITH
from lesionsam.types import Frame, Prompts
from lesionsam.utils.images import read_image, read_mask

SHARP = 40.0  # of the tiny SAM's logits: masks are then neither empty nor whole
EASY = replace(AUTO_DEFAULTS, points_per_side=3, pred_iou_thresh=0.0, stability_score_thresh=0.0, box_nms_thresh=0.999)
SIZES = {"one": (60, 90), "two": (70, 48)}
WEIGHTS = Path(__file__).parents[2] / "foundation" / "compact.safetensors"
COARSE = replace(ARCHITECTURE, image_size=64, patch_size=8)  # answers of half the frame's side


def picture(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """Weights, two images, boxes and points of their lesions."""
    save_sam(tiny_sam(sharpness=SHARP), tmp_path / "weights.safetensors", name="compact")
    (tmp_path / "images").mkdir()
    for seed, (name, size) in enumerate(SIZES.items()):
        Image.fromarray(picture(*size, seed)).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "boxes.csv").write_text("image_id,big_x0,big_y0,big_x1,big_y1\none,10,8,60,50\ntwo,5,5,40,60\n")
    (tmp_path / "points.csv").write_text(
        "image_id,lesion_id,x,y,label\none,a,30,20,1\none,a,35,25,\none,a,80,50,0\none,b,12.5,40,1\ntwo,0,20,30,1\n"
    )
    return tmp_path


def predict(case: Path, *images: str, source: str = "points", **options: object) -> int:
    chosen = [str(case / name) for name in images] or [str(case / "images")]
    how: dict = {"boxes": case / "boxes.csv"} if source == "boxes" else {source: True}
    how = {"points": case / "points.csv"} if source == "points" else how
    arguments: dict = {"model": case / "weights.safetensors", "out": case / "out", "options": EASY} | how | options
    return predict_files(chosen, **arguments)


def table(case: Path) -> list[dict[str, str]]:
    with (case / "out" / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def stamps(case: Path) -> dict[str, int]:
    return {str(path.relative_to(case)): path.stat().st_mtime_ns for path in (case / "out" / "masks").rglob("*.png")}


# ------------------------------------------------------------------------------------------------------------ points


def test_points_of_a_lesion_are_one_prompt(case: Path) -> None:
    assert predict(case) == 0
    rows = {(row["image_id"], row["lesion_id"]): row for row in table(case)}
    assert list(rows) == [("one", "a"), ("one", "b"), ("two", "0")]
    predictor = ImagePredictor(tiny_sam(sharpness=SHARP))
    predictor.set_image(read_image(case / "images" / "one.png"))
    for lesion, points, labels in (("a", [[30, 20], [35, 25], [80, 50]], [1, 1, 0]), ("b", [[12.5, 40]], [1])):
        logits, quality, _ = predictor.predict(
            np.array(points, float), np.array(labels), multimask_output=False, return_logits=True
        )
        found = read_mask(case / "out" / rows["one", lesion]["mask"])
        sure = np.abs(logits[0]) > 1e-3
        assert np.array_equal(found[sure], logits[0][sure] > 0)
        assert float(rows["one", lesion]["predicted_iou"]) == pytest.approx(quality[0], abs=1e-4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("one,a,90.5,20,1", r"line 2, x: 90.5 lies outside the image 'one' of 90x60 px"),
        ("one,a,30,-1,1", r"line 2, y: -1 lies outside"),
        ("one,a,left,20,1", r"line 2, x: expected a number of pixels, got 'left'"),
        ("one,a,30,20,2", r"line 2, label: expected 1 \(lesion\) or 0 \(not\), got '2'"),
        ("one,a,30,20,0", r"line 2, label: lesion 'a' of 'one' has no point of label 1"),
    ],
)
def test_points_that_cannot_be_meant_are_named(
    case: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    (case / "points.csv").write_text(f"image_id,lesion_id,x,y,label\n{line}\ntwo,0,20,30,1\n")
    assert predict(case, overlays=False) == 1
    faults = capsys.readouterr().err.splitlines()
    assert len(faults) == 1
    assert re.search(message, faults[0])
    assert [row["image_id"] for row in table(case)] == ["two"]  # the rest goes on


def test_an_image_without_points_and_points_without_an_image(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (case / "points.csv").write_text("image_id,x,y\none,30,20\nelsewhere,1,1\n")
    assert predict(case) == 1
    faults, note = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"error: .*two.png: no row of .*points.csv has the image_id 'two'; add its points", faults)
    assert re.fullmatch(r"note: .*points.csv has rows of 1 images that were not given: elsewhere", note)


def test_columns_of_another_table_are_named(case: Path) -> None:
    with pytest.raises(UserError, match="column x is missing"):
        predict(case, source="points", points=case / "boxes.csv")


# ---------------------------------------------------------------------------------------------------------- no prompt


def test_one_lesion_without_a_prompt(case: Path) -> None:
    assert predict(case, source="auto") == 0
    rows = table(case)
    assert [(row["image_id"], row["lesion_id"]) for row in rows] == [("one", "0"), ("two", "0")]
    first = stamps(case)
    save_sam(
        tiny_sam(sharpness=SHARP), case / "weights.safetensors", name="compact", metadata={TRAINED_WITH: "box none"}
    )
    assert predict(case, source="auto") == 0
    assert not first.items() & stamps(case).items()  # other weights, and another way
    for row in table(case):
        (found,) = Predictor(case / "weights.safetensors", auto=EASY).predict(
            case / "images" / f"{row['image_id']}.png", auto=True
        )
        assert np.count_nonzero(found.mask != read_mask(case / "out" / row["mask"])) <= 2


def test_what_the_weights_say_of_themselves() -> None:
    assert trained_without_prompt({TRAINED_WITH: "ring none"})
    assert not trained_without_prompt({TRAINED_WITH: "ring box+core"})
    assert not trained_without_prompt({})


def looked_at_again(sam: Sam, features: torch.Tensor, mask: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Plainly: the answer to a box about the largest piece of an (h, w) mask, 15 % longer."""
    regions = sorted(regionprops(label(mask, connectivity=1)), key=lambda region: region.area)
    y0, x0, y1, x1 = np.array(regions[-1].bbox) * size[0] / mask.shape[0]
    box = loosen(np.array([x0, y0, x1, y1]), LOOSENESS, size)
    low_res, _ = decode(sam, features, Prompts(boxes=torch.tensor(box[None], dtype=torch.float32)))
    return low_res[0, 0]


@pytest.mark.parametrize("per_batch", [64, 5])
def test_the_most_plausible_automatic_mask_is_looked_at_first(per_batch: int) -> None:
    """Against a plain computation over all candidates of the grid; the decoder's own answer is one more candidate."""
    sam, image = tiny_sam(sharpness=SHARP), picture(64, 64, 3)
    frames, sizes = model_frames([image], sam.frame)
    size = int(sizes[0, 0]), int(sizes[0, 1])
    with torch.inference_mode():
        features = encode(sam, sam.normalize(frames, sizes))
        grid = [(x * size[1] / 6, y * size[0] / 6) for y in (1, 3, 5) for x in (1, 3, 5)]
        best = (-1.0, np.zeros((0, 0)))
        for point in grid:
            prompts = Prompts(torch.tensor([[point]]), torch.ones(1, 1, dtype=torch.int64))
            low_res, quality = decode(sam, features, prompts, multimask=True)
            for logits, q in zip(low_res[0], quality[0].tolist(), strict=True):
                rows, columns = torch.nonzero(logits > 0, as_tuple=True)
                if not 0.003 <= len(rows) / logits.numel() <= 0.85:
                    continue
                y, x = (float((where + 0.5).float().mean()) / len(logits) - 0.5 for where in (rows, columns))
                stability = float((logits > 1).sum() / (logits > -1).sum())
                rim = [line > 0 for line in (logits[0], logits[-1], logits[:, 0], logits[:, -1])]
                place = np.exp(-(x * x + y * y) / 0.18) * (1 - float(torch.cat(rim).float().mean())) ** 2
                best = max(best, (q * stability * place, (logits > 0).numpy()), key=lambda b: b[0])
        search = LesionSearch(decode_without_prompt=True, auto=replace(EASY, points_per_batch=per_batch))
        found = candidates(sam, features, frames[0].numpy(), size, search=search)
        assert found is not None
        expected = looked_at_again(sam, features, best[1], size)
        assert torch.allclose(found.logits[0], expected, atol=1e-3)
        own = looked_at_again(sam, features, (decode(sam, features, Prompts())[0][0, 0] > 0).numpy(), size)
        assert torch.allclose(found.logits[-1], own, atol=1e-3)
        (lesion,) = find_lesions(sam, features, frames, [size], search=search)
    chosen = found.masks[int(lesion_scores(found.signs).argmax())]
    box = largest_component_box(chosen)
    assert box is not None
    scale = np.array([size[1] / chosen.shape[1], size[0] / chosen.shape[0]] * 2)
    zoomed, expected_quality = decode_zoomed(
        sam, frames, [size], (box * scale)[None], looseness=ZOOM_LOOSENESS, surroundings=ZOOM_SURROUNDINGS
    )
    assert bool((zoomed > 0).any())
    assert torch.allclose(lesion.low_res, zoomed[0], atol=1e-3)
    assert lesion.predicted_iou == pytest.approx(float(expected_quality), abs=1e-4)
    assert lesion.agreement == pytest.approx(agreement(found.masks, lesion_scores(found.signs)), abs=1e-3)


def test_the_box_of_the_second_decoding_is_around_the_largest_component_and_inside_the_image() -> None:
    mask = np.zeros((20, 30), bool)
    mask[2:4, 1:3] = mask[10:14, 20:30] = mask[14, 19] = True  # the corner of the last touches, but no side does
    box = largest_component_box(mask)
    assert box is not None
    assert box.tolist() == [20, 10, 30, 14]
    assert loosen(box, 0.5, (20, 30)).tolist() == [17.5, 9, 30, 15]
    assert largest_component_box(np.zeros((4, 4), bool)) is None


def test_zooming_on_the_whole_image_changes_nothing() -> None:
    """What is shown reaches beyond the image on every side: nothing is cut off, nothing is enlarged."""
    sam = tiny_sam(sharpness=SHARP, architecture=COARSE)
    side, boxes = sam.side, np.array([[10.0, 12, 30, 24], [4, 20, 20, 40]])
    frames, sizes = model_frames([picture(44, 64, 0), picture(64, 64, 1)], Frame(side))
    parts = [(int(height), int(width)) for height, width in sizes]
    logits, quality = decode_zoomed(sam, frames, parts, boxes, looseness=0.0, surroundings=20.0)
    with torch.inference_mode():
        prompts = Prompts(boxes=torch.tensor(boxes, dtype=torch.float32))
        expected, predicted = decode(sam, encode(sam, sam.normalize(frames, sizes)), prompts)
    for k, (height, width) in enumerate(parts):
        cells = [length * logits.shape[-1] // side for length in (height, width)]
        assert torch.allclose(logits[k, : cells[0], : cells[1]], expected[k, 0, : cells[0], : cells[1]], atol=1e-3)
    assert torch.allclose(quality, predicted[:, 0], atol=1e-5)


@pytest.mark.parametrize("box", [[31.0, 23.1, 31.2, 23.2], [3.0, 23.1, 3.1, 23.2], [0.0, 0.0, 0.1, 0.1]])
def test_zooming_on_a_box_on_the_last_pixel_shows_that_pixel(box: list[float]) -> None:
    """A model frame's image part is rounded: 23 pixels here of an image that ends at 23.4."""
    sam = tiny_sam(sharpness=SHARP)
    frames = torch.zeros((1, 3, 32, 32), dtype=torch.uint8)
    logits, _ = decode_zoomed(sam, frames, [(23, 32)], np.array([box]), looseness=0.0)
    shown = logits[0] > BACKGROUND_LOGIT
    assert shown.any()
    assert not shown.all()


def test_a_zoomed_mask_comes_back_to_its_place() -> None:
    """Against SciPy's interpolation of the answer to the surroundings alone, cut out by hand."""
    sam = tiny_sam(sharpness=SHARP, architecture=COARSE)
    side, image = sam.side, picture(64, 64, 2)
    frames, _ = model_frames([image], Frame(side))
    for box, (x0, y0, x1, y1) in (((20, 24, 40, 34), (15, 14, 45, 44)), ((0, 30, 20, 50), (0, 25, 25, 55))):
        part = frames[0, :, y0:y1, x0:x1].permute(1, 2, 0).numpy()
        shown = side / max(part.shape[:2])
        enlarged, sizes = model_frames([part], Frame(side))
        low, high = np.array(box[:2], float), np.array(box[2:], float)
        middle, half = (low + high) / 2, (high - low) * 0.55
        prompt = np.concatenate([np.maximum(middle - half, 0), middle + half])
        prompt = (prompt - [x0, y0, x0, y0]) * shown
        with torch.inference_mode():
            answer, _ = decode(
                sam,
                encode(sam, sam.normalize(enlarged, sizes)),
                Prompts(boxes=torch.tensor(prompt[None], dtype=torch.float32)),
            )
        found, _ = decode_zoomed(sam, frames, [(side, side)], np.array([box], float), looseness=0.1, surroundings=1.5)
        cell = side / found.shape[-1]
        centres = (np.arange(found.shape[-1]) + 0.5) * cell
        rows, columns = (((centres - low) * shown / cell) - 0.5 for low in (y0, x0))
        expected = ndimage.map_coordinates(
            answer[0, 0].numpy(), np.meshgrid(rows, columns, indexing="ij"), order=1, mode="nearest"
        )
        inside = ((centres >= y0) & (centres < y1))[:, None] & ((centres >= x0) & (centres < x1))
        assert 0 < inside.sum() < inside.size
        assert np.allclose(found[0].numpy(), np.where(inside, expected, BACKGROUND_LOGIT), atol=1e-3)


def test_where_nothing_is_found_the_mask_is_empty_and_said_to_be(case: Path) -> None:
    """No mask passes, and a picture of one colour gives none by colour; the image beside it is answered as ever."""
    sam = tiny_sam(sharpness=SHARP)
    sam.mask_threshold = 1e9
    (one,) = Predictor(sam, auto=EASY).predict(np.full((40, 50, 3), 128, np.uint8), auto=True)
    assert not one.mask.any()
    assert one.review_reasons == ("empty",)


def test_candidates_agree_as_far_as_the_likely_ones_do() -> None:
    masks = np.zeros((3, 4, 4), bool)
    masks[0, :2] = masks[1, :1] = masks[2, 3:] = True  # IoU with the first: 1, 1/2, 0
    assert agreement(masks, np.array([1.0, 1.0 - 0.1 * np.log(2), -9.0])) == pytest.approx((1 + 0.5 * 0.5) / 1.5)
    assert agreement(masks, np.array([1.0, -9.0, -9.0])) == pytest.approx(1)
    (reason,) = review_reasons(masks[0], LesionPrompt(), 0.9, 0.9, 0.5)
    assert reason == "candidates for the lesion disagree: 0.50 below 0.8"


def lesion_on_skin() -> tuple[np.ndarray, np.ndarray]:
    """(64, 64, 3) uint8, a dark disc left of the middle on skin, and its mask."""
    y, x = np.mgrid[:64, :64] + 0.5
    mask = np.hypot(x - 27, y - 32) < 12
    noise = np.random.default_rng(0).normal(0, 3, (64, 64, 1))
    return np.clip(np.where(mask[..., None], (115, 70, 60), (205, 165, 145)) + noise, 0, 255).astype(np.uint8), mask


def test_signs_of_a_mask_are_what_they_say() -> None:
    shown, mask = lesion_on_skin()
    corner = np.zeros_like(mask)
    corner[:8, :16] = True
    signs = dict(
        zip(
            SIGNS,
            lesion_signs(
                np.stack([mask, corner]),
                np.array([0.9, 0.001]),
                np.array([0.8, 0.5]),
                np.stack([mask, ~mask, corner]),
                np.array([3.0, 0.0, 1.0]),
                shown,
                smoothed_lab(shown),
            ).T,
            strict=True,
        )
    )
    assert signs["predicted IoU, log"] == pytest.approx(np.log([0.9, 0.01]))
    assert signs["stability, log"] == pytest.approx(np.log([0.8, 0.5]))
    assert signs["squared distance from the middle"] == pytest.approx([(5 / 64) ** 2, 0.375**2 + 0.4375**2], abs=1e-3)
    assert signs["off the rim, log"] == pytest.approx(np.log([1.0001, 1.0001 - 24 / 256]))
    assert signs["area, log"] == pytest.approx(np.log([mask.mean(), 128 / 4096]))
    assert signs["votes"] == pytest.approx([3 / 4, 1 / 4])  # each mask agrees with itself alone
    difference = np.linalg.norm(
        rgb2lab(np.array([[[115, 70, 60]]], np.uint8)) - rgb2lab(np.array([[[205, 165, 145]]], np.uint8))
    )
    assert signs["distance from skin"][0] == pytest.approx(difference, rel=0.06)
    assert np.exp(signs["contrast, log"][0]) - 1 == pytest.approx(difference, rel=0.06)
    assert signs["contrast, log"][1] < 1
    assert signs["separation"][0] > 5 > 1 > signs["separation"][1]
    assert signs["found again"][0] > 0.9


def test_the_lesion_scores_above_skin_sticker_and_half_of_it() -> None:
    shown, mask = lesion_on_skin()
    sticker, half, frame = np.zeros_like(mask), mask.copy(), np.zeros_like(mask)
    shown[50:, 48:] = (240, 120, 20)
    sticker[50:, 48:] = True
    half[:, 27:] = False
    frame[4:60, 4:60] = True
    masks = np.stack([sticker, half, mask, frame])
    scores = lesion_scores(
        lesion_signs(masks, np.full(4, 0.8), np.full(4, 0.9), masks, np.ones(4), shown, smoothed_lab(shown))
    )
    assert scores.argmax() == 2
    assert iou_matrix(masks, masks).diagonal().tolist() == [1, 1, 1, 1]


def test_a_mask_in_the_middle_that_leaves_the_rim_free_is_more_plausible() -> None:
    masks = torch.zeros(3, 40, 40, dtype=torch.bool)
    masks[0, 15:25, 15:25] = True
    masks[1, :10, 15:25] = True
    values = plausibility(masks).tolist()
    assert values == pytest.approx([1.0, np.exp(-(0.375**2) / (2 * 0.3**2)) * (1 - 10 / 160) ** 2, 0.0])


def test_the_pretrained_compact_model_finds_a_generated_lesion() -> None:
    """By automatic masks alone, more often than not: the foundation has seen no lesion."""
    from lesionsam.data.sources.synthetic import generate

    predictor, scores = Predictor(WEIGHTS), []
    for index in range(8):
        image, mask = generate(0, index, 128)
        (found,) = predictor.predict(image, auto=True)
        scores.append(np.count_nonzero(found.mask & mask) / np.count_nonzero(found.mask | mask))
    assert np.median(scores) > 0.5


# -------------------------------------------------------------------------------------------------------- everything


def test_every_mask_of_an_image_and_resume(case: Path) -> None:
    assert predict(case, source="everything") == 0
    rows = table(case)
    assert {row["image_id"] for row in rows} == {"one", "two"}
    assert len(rows) > 2
    predictor = Predictor(case / "weights.safetensors", auto=EASY)
    expected = {name: predictor.predict(case / "images" / f"{name}.png", everything=True) for name in SIZES}
    for row in rows:
        assert row["mask"] == f"masks/{row['image_id']}/{row['lesion_id']}.png"
        one = expected[row["image_id"]][int(row["lesion_id"])]
        assert np.array_equal(read_mask(case / "out" / row["mask"]), one.mask)
        assert int(row["area"]) == one.area
    first = stamps(case)
    assert predict(case, source="everything") == 0
    assert stamps(case) == first
    gone = next(path for path in first if "/one/" in path)
    (case / gone).unlink()
    assert predict(case, source="everything") == 0
    assert {path for path, stamp in stamps(case).items() if stamp != first[path]} == {p for p in first if "/one/" in p}


def test_an_image_without_any_mask_counts_as_done(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strict = replace(EASY, pred_iou_thresh=0.999999)
    assert predict(case, source="everything", options=strict) == 0
    assert [(row["lesion_id"], row["mask"], row["review_reasons"]) for row in table(case)] == [
        ("", "", "no mask passes the thresholds")
    ] * 2
    capsys.readouterr()
    assert predict(case, source="everything", options=strict) == 0
    assert "2 kept from before" in capsys.readouterr().out


def test_an_image_whose_masks_were_cut_short_is_done_again(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = inference_outputs.write_png, []

    def interrupted(path: Path, pixels: np.ndarray) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(path)
        write(path, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(inference_outputs, "write_png", interrupted)
        with pytest.raises(KeyboardInterrupt):
            predict(case, "images/one.png", source="everything", overlays=False)
    assert not (case / "out" / "predictions.csv").exists()
    assert predict(case, "images/one.png", source="everything", overlays=False) == 0
    assert len(table(case)) > 1


# ------------------------------------------------------------------------------------------------------------ shapes


def test_coco_json_holds_the_masks(case: Path) -> None:
    """Our own reader of COCO gives the PNGs back from the run lengths."""
    assert predict(case) == 0
    rows = [row for row in table(case) if int(row["area"])]
    assert rows
    instances = load_instances(case / "out" / "coco.json")
    assert {each["file_name"] for each in instances.images.values()} == {"one.png", "two.png"}
    assert len(instances.annotations) == len(rows)
    for row, entry in zip(rows, instances.annotations, strict=True):
        image = instances.images[entry["image_id"]]
        mask = read_mask(case / "out" / row["mask"])
        assert np.array_equal(decode_rle(entry["segmentation"], image["height"], image["width"]), mask)
        assert entry["area"] == np.count_nonzero(mask) == int(row["area"])
        assert entry["attributes"] == {"lesion_id": row["lesion_id"]}
        x, y, w, h = entry["bbox"]
        assert mask[y : y + h, x : x + w].sum() == mask.sum()
        drawn = json.loads((case / "out" / "polygons" / (Path(row["mask"]).stem + ".geojson")).read_text())
        assert drawn["type"] == "Feature"
        assert drawn["geometry"]["type"] == "MultiPolygon"


def test_without_shapes_neither_polygons_nor_coco_are_written(case: Path) -> None:
    predict(case, shapes=False, overlays=False)
    assert sorted(path.name for path in (case / "out").iterdir()) == ["masks", "predictions.csv"]


# ---------------------------------------------------------------------------------------------------------- ensemble


def test_an_ensemble_is_the_mean_over_jittered_boxes(case: Path) -> None:
    predict(case, source="boxes", ensemble=1)
    alone = [int(row["area"]) for row in table(case)]
    predict(case, source="boxes", ensemble=4)
    assert [int(row["area"]) for row in table(case)] != alone
    sam, image = tiny_sam(sharpness=SHARP), picture(60, 90, 0)
    images = EncodedImages.of([image], sam.frame).encoded(sam)
    box = np.array([10.0, 8, 60, 50])
    prompt, members = LesionPrompt(box, box), DecodeOptions("box", num_members=2)
    (single,) = decode_lesions(sam, images, [prompt], [0], ["one/0"], DecodeOptions("box"))
    (two,) = decode_lesions(sam, images, [prompt], [0], ["one/0"], members)
    (again,) = decode_lesions(sam, images, [prompt], [0], ["one/0"], members)
    assert np.isnan(single.agreement)
    assert 0 <= two.agreement <= 1
    assert torch.equal(two.low_res, again.low_res)  # jitter depends on the lesion alone
    features = images.known_features
    pair = replace(images[[0, 0]], features=torch.cat([features, features.roll(1, -1)]))
    rows = [1, 0, 1]  # images of a batch, shared by lesions, in any order
    many = decode_lesions(sam, pair, [prompt] * 3, rows, ["one/0", "one/0", "one/1"], members)
    torch.testing.assert_close(many[1].low_res, two.low_res, rtol=0, atol=1e-4)
    assert not torch.allclose(many[0].low_res, two.low_res, atol=1e-2)
    other = 2 * two.low_res - single.low_res  # the second member, which must be the answer to a box near by
    assert not torch.allclose(other, single.low_res)
    assert np.corrcoef(other.flatten(), single.low_res.flatten())[0, 1] > 0.9


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("points", {"ensemble": 3}, "--ensemble: expected 1"),
        ("boxes", {"ensemble": 0}, "--ensemble: expected 1"),
        ("boxes", {"zoom": True, "prompt": "centre"}, "--zoom: enlarges"),
        ("points", {"zoom": True}, "--zoom: enlarges"),
        ("auto", {"zoom": True}, "--zoom: enlarges .* --auto zoom by themselves"),
        ("boxes", {"threshold": 1.0}, "--threshold: expected a probability between 0 and 1, got 1"),
        ("boxes", {"threshold": float("nan")}, "--threshold: expected a probability"),
        ("everything", {"threshold": 0.3}, "--threshold 0.3: automatic masks are cut at 0.5"),
    ],
)
def test_what_a_kind_of_prompt_cannot_be_asked_is_refused_alike_by_both_verbs(
    case: Path, source: str, options: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        predict(case, source=source, **options)
    assert not (case / "out").exists()
    given: dict = {source: True if source in ("everything", "auto") else case / f"{source}.csv"}
    with pytest.raises(UserError, match=message):
        Predictor(case / "weights.safetensors", threshold=options.get("threshold", 0.5)).predict(
            case / "images", **given, **{k: v for k, v in options.items() if k != "threshold"}
        )


# -------------------------------------------------------------------------------------------------------- zoom


def test_around_a_box_as_large_as_the_image_the_zoom_changes_nothing(case: Path) -> None:
    """Around a smaller one it is; and an earlier call's masks are not taken for it."""
    (case / "boxes.csv").write_text("image_id,big_x0,big_y0,big_x1,big_y1\none,0,0,90,60\ntwo,20,20,40,44\n")
    masks, keys = [], []
    for zoom in (False, True):
        predict(case, source="boxes", zoom=zoom)
        masks.append({row["image_id"]: read_mask(case / "out" / row["mask"]) for row in table(case)})
        keys.append({row["key"] for row in table(case)})
    assert np.count_nonzero(masks[0]["one"] != masks[1]["one"]) <= 2
    assert np.count_nonzero(masks[0]["two"] != masks[1]["two"]) > 20
    assert not keys[0] & keys[1]
    assert stamps(case) == (predict(case, source="boxes", zoom=True), stamps(case))[1]


def test_lesions_of_one_image_are_each_zoomed(case: Path) -> None:
    """The same alone as beside another, and in batches of any size."""
    boxes = np.array([[10.0, 8, 60, 50], [50, 20, 80, 55]])
    predictor = Predictor(case / "weights.safetensors")
    together = predictor.predict(picture(60, 90, 0), boxes=boxes, zoom=True)
    for box, one in zip(boxes, together, strict=True):
        (alone,) = predictor.predict(picture(60, 90, 0), boxes=box, zoom=True)
        assert np.count_nonzero(one.mask != alone.mask) <= 2


# ------------------------------------------------------------------------------------------------- worth a look: flags


def test_reasons_to_look() -> None:
    mask = np.zeros((20, 20), bool)
    fine: dict = {"predicted_iou": 0.95, "stability": 0.95, "agreement": 0.95}
    assert review_reasons(mask, LesionPrompt(), **fine) == ("empty",)
    mask[5:15, 5:15] = True
    box, core = np.array([4.0, 4, 16, 16]), np.array([8.0, 8, 12, 12])
    assert review_reasons(mask, LesionPrompt(box, core), **fine) == ()
    assert review_reasons(mask, LesionPrompt(), **fine | {"agreement": float("nan"), "stability": float("nan")}) == ()
    for name, value in {"predicted_iou": 0.3, "stability": 0.4, "agreement": 0.5}.items():
        (reason,) = review_reasons(mask, LesionPrompt(box, core), **fine | {name: value})
        assert f"{value:.2f} below" in reason
    assert (
        review_reasons(mask, LesionPrompt(np.array([4.0, 4, 16, 10]), core[:]), **fine)[0]
        == "50% of the mask outside its box"
    )
    assert review_reasons(mask, LesionPrompt(box, np.array([2.0, 2, 6, 6])), **fine) == (
        "only 6% of what must be lesion is in the mask",
    )
    points = LesionPrompt(points=np.array([[7.0, 7], [1, 1], [18, 18]]), labels=np.array([1, 1, 0]))
    assert review_reasons(mask, points, **fine) == ("only 50% of what must be lesion is in the mask",)


# ----------------------------------------------------------------------------------------------------------- Predictor


def test_predictor_has_the_verbs_of_the_command(case: Path) -> None:
    """The same masks in memory as the command writes, by boxes, points and without a prompt."""
    predictor = Predictor(case / "weights.safetensors", auto=EASY)
    images = case / "images"
    for source, given, more in (
        ("boxes", {"boxes": case / "boxes.csv"}, {}),
        ("boxes", {"boxes": case / "boxes.csv"}, {"zoom": True}),
        ("points", {"points": str(case / "points.csv")}, {}),
        ("auto", {"auto": True}, {}),
    ):
        predict(case, source=source, overlays=False, shapes=False, out=case / "out", **more)
        found = predictor.predict(images, **given, **more)
        rows = table(case)
        assert [(one.image_id, one.lesion_id) for one in found] == [(r["image_id"], r["lesion_id"]) for r in rows]
        for one, row in zip(found, rows, strict=True):
            assert np.count_nonzero(one.mask != read_mask(case / "out" / row["mask"])) <= 2
            assert f"{one.entropy:.3f}" == f"{float(row['entropy']):.3f}"
            assert "; ".join(one.review_reasons) == row["review_reasons"]
        (case / "out" / "predictions.csv").unlink()


def test_predictor_takes_arrays_and_numbers(case: Path) -> None:
    predictor = Predictor(load_sam(None, case / "weights.safetensors"))
    image = read_image(case / "images" / "one.png")
    boxes = [[10, 8, 60, 50], [20, 10, 80, 55]]
    first, second = predictor.predict(image, boxes=boxes)
    assert np.array_equal(first.mask, predictor.predict(image, boxes=boxes[0])[0].mask)
    assert not np.array_equal(first.mask, second.mask)
    by_csv = predictor.predict(case / "images" / "one.png", boxes=case / "boxes.csv")[0]
    assert np.array_equal(first.mask, by_csv.mask)
    (point,) = predictor.predict(image, points=[[30, 20], [80, 50]], labels=[1, 0])
    assert point.prompt.labels.tolist() == [1, 0]
    (core,) = predictor.predict(case / "images" / "one.png", boxes=boxes[0], cores=[20, 20, 40, 40], prompt="centre")
    assert core.prompt.points[0].tolist() == pytest.approx([30, 30])


def test_what_predictor_cannot_do_is_said(case: Path) -> None:
    predictor, image = Predictor(case / "weights.safetensors"), picture(60, 90, 0)
    for message, given in {
        "expected one of --boxes, --points, --auto, --everything, got none": {},
        "got --boxes and --auto": {"boxes": [1, 2, 30, 40], "auto": True},
        "box": {"boxes": [1, 2, 130, 40]},
        "has no name to be found by": {"boxes": case / "boxes.csv"},
        "--prompt: expected one of": {"boxes": [1, 2, 30, 40], "prompt": "tight"},
        "--prompt ring: is made from boxes": {"points": [[3, 4]], "prompt": "ring"},
        "prompt ring: is made from the small boxes; give them as cores": {"boxes": [1, 2, 30, 40], "prompt": "ring"},
        "cores: go with boxes that are numbers; got auto": {"auto": True, "cores": [1, 2, 30, 40]},
        "labels: go with points that are numbers; got boxes": {"boxes": [1, 2, 30, 40], "labels": [1]},
        "expected 1 .* or 0 .*, got '0.6'": {"points": [[3, 4]], "labels": [0.6]},
    }.items():
        with pytest.raises(UserError, match=message):
            predictor.predict(image, **given)
    with pytest.raises(UserError, match="are those of one image, got 2 images"):
        predictor.predict(case / "images", boxes=[1, 2, 30, 40])
    (case / "boxes.csv").write_text("image_id,big_x0,big_y0,big_x1,big_y1\none,10,8,60,50\n")
    with pytest.raises(UserError, match="no row of"):
        predictor.predict(case / "images", boxes=case / "boxes.csv")
    (case / "boxes.csv").write_text("image_id,big_x0,big_y0,big_x1,big_y1\n")
    with pytest.raises(UserError, match=r"boxes\.csv: expected a row for each lesion below the header, got none"):
        predictor.predict(case / "images", boxes=case / "boxes.csv")


@pytest.mark.parametrize(
    ("message", "given"),
    [
        (r"boxes: expected \(4,\) or \(N, 4\) numbers, got \(8,\)", {"boxes": [1, 2, 30, 40] * 2}),
        (r"points: expected \(2,\) or \(N, 2\) numbers, got \(3,\)", {"points": [1, 2, 30]}),
        ("a label for each; got 2 points and 1 labels", {"points": [[3, 4], [5, 6]], "labels": [1]}),
        ("at least one point", {"points": []}),
    ],
)
def test_numbers_that_predictor_cannot_use_are_said(case: Path, message: str, given: dict) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(case / "weights.safetensors").predict(picture(60, 90, 0), **given)


@pytest.mark.parametrize("how", [{"boxes": [1, 2, 30, 40], "zoom": True}, {"everything": True}, {"auto": True}])
def test_arrays_that_are_no_image_are_said_whatever_is_asked(case: Path, how: dict) -> None:
    predictor = Predictor(case / "weights.safetensors", auto=EASY)
    for wrong in (picture(60, 90, 0)[..., 0], picture(60, 90, 0).astype(float)):
        with pytest.raises(ValueError, match=r"image: expected \(H, W, 3\) uint8 RGB"):
            predictor.predict(wrong, **how)
    for several in ([picture(60, 90, 0)] * 2, Image.fromarray(picture(60, 90, 0))):
        with pytest.raises(ValueError, match=r"images: expected one .* array, or files"):
            predictor.predict(several, **how)  # type: ignore[arg-type]


def test_a_second_prompt_costs_no_encoder_pass_and_little_time() -> None:
    """The compact SAM on a CPU, a photograph of usual size: under 100 ms of computing."""
    predictor = Predictor(WEIGHTS)
    passes: list[int] = []
    predictor.sam.image_encoder.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    image = picture(480, 640, 0)
    predictor.predict(image, boxes=[100, 100, 400, 400])
    spent = []
    for k in range(3):
        begun = time.process_time()
        predictor.predict(image, boxes=[100 + k, 100, 400, 400])
        spent.append(time.process_time() - begun)
    assert len(passes) == 1
    assert min(spent) < 0.1


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_asks_for_exactly_one_source(case: Path) -> None:
    base = ["predict", str(case / "images"), "--model", str(case / "weights.safetensors"), "--out", str(case / "out")]
    for given in ([], ["--auto", "--points", str(case / "points.csv")]):
        result = CliRunner().invoke(app, [*base, *given])
        assert result.exit_code != 0
        assert isinstance(result.exception, UserError)
        assert "expected one of --boxes, --points, --auto, --everything" in str(result.exception)
    assert not (case / "out").exists()


def test_a_run_folder_is_a_model_and_params_say_the_thresholds(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lesionsam.config.load import default_text

    run = case / "run"
    run.mkdir()
    (case / "weights.safetensors").rename(run / "best.safetensors")
    text = default_text().replace("points_per_side: 8 ", "points_per_side: 2 ")
    text = text.replace("pred_iou_thresh: 0.7 ", "pred_iou_thresh: 0.0 ").replace(
        "score_thresh: 0.7 ", "score_thresh: 0.0 "
    )
    (case / "params.yaml").write_text(text)
    monkeypatch.chdir(case)
    result = CliRunner().invoke(app, ["predict", "images/one.png", "--everything", "--model", "run", "--out", "out"])
    assert result.exit_code == 0, result.output
    options = replace(EASY, points_per_side=2)
    assert len(table(case)) == len(
        Predictor(run / "best.safetensors", auto=options).predict("images/one.png", everything=True)
    )


def test_a_parameter_file_that_is_named_is_read_or_refused(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(case)
    for source, message in (
        (["--everything"], "nope.yaml: expected a parameter file, found none"),
        (["--boxes", "boxes.csv"], "--params nope.yaml: section auto is read for --auto and"),
    ):
        result = CliRunner().invoke(
            app, ["predict", "images", "--model", "weights.safetensors", "--params", "nope.yaml", *source]
        )
        assert isinstance(result.exception, UserError)
        assert message in str(result.exception)
    (case / "params.yaml").write_text("auto: {}\n")  # is no concern of boxes
    result = CliRunner().invoke(app, ["predict", "images", "--model", "weights.safetensors", "--boxes", "boxes.csv"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_an_output_that_cannot_be_written_to_is_one_line(case: Path, place: str) -> None:
    (case / "taken").write_text("")
    out = case / "taken" if place == "a file" else case / "taken" / "below"
    with pytest.raises(UserError, match=r"taken.*: cannot be written to \(.*\); choose another --out"):
        predict(case, out=out)


def test_killed_and_resumed_ends_with_the_same_files(case: Path) -> None:
    """SIGKILL in the middle, then the same command: everything is there once, nothing half written."""
    for k in range(60):
        os.link(case / "images" / "one.png", case / "images" / f"copy{k:02}.png")
    arguments = [
        "predict",
        "images",
        "--auto",
        "--out",
        "out",
        "--model",
        "weights.safetensors",
        "--no-overlays",
        "--no-shapes",
        "--batch-size",
        "2",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "lesionsam", *arguments],
        cwd=case,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
    )
    masks = case / "out" / "masks"
    while process.poll() is None and (not masks.is_dir() or len(list(masks.glob("*.png"))) < 5):
        time.sleep(0.01)
    process.kill()
    process.wait()
    (masks / ".late.png.0123456789abcdef.tmp").write_bytes(b"half")  # what a kill within a write leaves
    assert predict(case, source="auto", overlays=False, shapes=False, options=AUTO_DEFAULTS) == 0
    assert len(table(case)) == 62
    assert sorted(path.name for path in masks.iterdir()) == sorted(Path(row["mask"]).name for row in table(case))
    whole = read_mask(masks / "one.png")
    for row in table(case):
        if row["image_id"] not in ("one", "two"):
            assert np.array_equal(read_mask(case / "out" / row["mask"]), whole)


def resident() -> int:
    """Memory of this process, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory from /proc")
def test_a_thousand_images_do_not_grow_in_memory(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["image_id,big_x0,big_y0,big_x1,big_y1"]
    for k in range(1000):
        os.link(case / "images" / "one.png", case / "images" / f"copy{k:03}.png")
        rows.append(f"copy{k:03},10,8,60,50")
    (case / "boxes.csv").write_text("\n".join(rows))
    write, sizes = inference_outputs.write_png, []

    def counting(path: Path, pixels: np.ndarray) -> None:
        write(path, pixels)
        sizes.append(resident())

    monkeypatch.setattr(inference_outputs, "write_png", counting)
    monkeypatch.setattr("lesionsam.utils.files.os.fsync", lambda _: None)  # the disk's patience is not what is tested
    assert predict(case, "images/copy*.png", source="boxes", overlays=False, shapes=False, batch_size=16) == 0
    assert len(sizes) == 1000
    assert sizes[-1] - sizes[200] < 8 * 2**20


def test_a_predictor_opens_the_folder_of_a_training_or_an_export(tmp_path: Path) -> None:
    image = np.full((48, 64, 3), 200, np.uint8)
    (tmp_path / "adapted").mkdir()
    shutil.copy(WEIGHTS, tmp_path / "adapted" / "best.safetensors")
    by_folder, by_file = (Predictor(path) for path in (str(tmp_path / "adapted"), WEIGHTS))
    masks = [each.predict(image, boxes=[10, 8, 50, 40])[0].mask for each in (by_folder, by_file)]
    assert np.array_equal(*masks)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such file or folder; expected a weights file, or a folder that holds one"),
        ([], r"expected best.safetensors, .* found none; name the file"),
        (["a.pth", "b.pth"], r"found a.pth, b.pth; name the file"),
    ],
)
def test_a_folder_without_one_weights_file_is_a_line(files: list[str] | None, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).touch()
    with pytest.raises(UserError, match=message):
        Predictor(folder)
