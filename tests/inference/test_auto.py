"""Automatic masks against segment_anything's own generator, and the parts that it needs another library for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator

from lesionsam.config.load import default_values
from lesionsam.data.sources.synthetic import generate
from lesionsam.inference.auto import (
    AUTO,
    AutoOptions,
    automatic_masks,
    crop_boxes,
    mask_boxes,
    near_crop_edge,
    point_grid,
    stability_scores,
    without_small_regions,
)
from lesionsam.models.checkpoint import load_sam
from lesionsam.models.sam import Sam

WEIGHTS = Path(__file__).parents[2] / "foundation" / "compact.safetensors"


@pytest.fixture(scope="module")
def compact() -> Sam:
    return load_sam("compact", WEIGHTS)


def theirs(sam: Sam, image: np.ndarray, options: AutoOptions) -> list[Mapping]:
    """segment_anything's answer to the same settings."""
    return SamAutomaticMaskGenerator(sam, **asdict(options)).generate(image)


CASES = {
    "loose": replace(AUTO, points_per_side=5, pred_iou_thresh=0.3, stability_score_thresh=0.5),
    "one crop layer": replace(
        AUTO,
        points_per_side=4,
        pred_iou_thresh=0.3,
        stability_score_thresh=0.5,
        crop_n_layers=1,
        crop_n_points_downscale_factor=2,
        crop_nms_thresh=0.5,
    ),
    "odd batches, other offset": replace(
        AUTO,
        points_per_side=5,
        points_per_batch=7,
        pred_iou_thresh=0.3,
        stability_score_thresh=0.2,
        stability_score_offset=2.0,
        box_nms_thresh=0.4,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_same_masks_as_segment_anythings_generator(compact: Sam, case: str) -> None:
    image, _ = generate(0, 3, 240)
    expected, found = theirs(compact, image, CASES[case]), automatic_masks(compact, image, CASES[case])
    assert len(found) == len(expected) >= 2
    for ours, other in zip(found, expected, strict=True):
        assert np.count_nonzero(ours.mask != other["segmentation"]) <= 2  # a logit within rounding of the threshold
        assert abs(ours.area - other["area"]) <= 2
        assert ours.predicted_iou == pytest.approx(other["predicted_iou"], abs=1e-4)
        assert ours.stability == pytest.approx(other["stability_score"], abs=1e-3)
        assert ours.point == pytest.approx(other["point_coords"][0])
        x0, y0, x1, y1 = ours.crop_box
        assert [x0, y0, x1 - x0, y1 - y0] == other["crop_box"]
        x0, y0, x1, y1 = ours.box  # half-open; theirs ends with the last row and column
        assert [x0, y0, x1 - x0 - 1, y1 - y0 - 1] == pytest.approx(other["bbox"], abs=1)


def test_masks_do_not_depend_on_the_batch_of_points(compact: Sam) -> None:
    image, _ = generate(0, 5, 96)
    options = replace(AUTO, points_per_side=4, pred_iou_thresh=0.4, stability_score_thresh=0.5)
    one, two = (automatic_masks(compact, image, replace(options, points_per_batch=n)) for n in (16, 3))
    assert len(one) == len(two) > 0
    assert all(np.count_nonzero(a.mask != b.mask) <= 2 for a, b in zip(one, two, strict=True))


def test_thresholds_that_nothing_passes_give_no_mask(compact: Sam) -> None:
    image, _ = generate(0, 3, 64)
    assert automatic_masks(compact, image, replace(AUTO, points_per_side=2, pred_iou_thresh=0.999)) == []


def test_no_mask_is_empty_whatever_the_thresholds(compact: Sam) -> None:
    image, _ = generate(0, 3, 64)
    found = automatic_masks(
        compact, image, replace(AUTO, points_per_side=2, pred_iou_thresh=0, stability_score_thresh=0, box_nms_thresh=1)
    )
    assert found
    for each in found:
        assert each.area == np.count_nonzero(each.mask) > 0
        x0, y0, x1, y1 = each.box
        assert each.mask[y0:y1, x0:x1].sum() == each.area
        assert each.patch[[0, -1]].any(1).all()
        assert each.patch[:, [0, -1]].any(0).all()


def test_defaults_are_those_of_the_default_parameters() -> None:
    assert asdict(AUTO) == default_values()["auto"]


# ------------------------------------------------------------------------------------------------------------- parts


def test_points_are_the_middles_of_equal_cells() -> None:
    assert point_grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


def test_crops_cover_the_image_and_overlap() -> None:
    boxes = crop_boxes((90, 120), 2, 0.3)
    assert [layer for _, layer in boxes] == [0, *[1] * 4, *[2] * 16]
    for wanted in (1, 2):
        covered = np.zeros((90, 120), int)
        for (x0, y0, x1, y1), layer in boxes:
            if layer == wanted:
                covered[y0:y1, x0:x1] += 1
        assert covered.min() == 1
        assert covered.max() == 4


def test_stability_is_the_iou_of_two_cuts() -> None:
    """A ramp of logits -4 to 4 in steps of 1: 3 of 9 lie above +1, 5 above -1 (strictly)."""
    ramp = torch.arange(-4.0, 5.0)[None, None].expand(1, 2, 9)
    assert stability_scores(ramp, 0.0, 1.0).tolist() == pytest.approx([3 / 5])
    assert stability_scores(torch.full((1, 2, 2), -9.0), 0.0, 1.0).isnan().all()


def test_boxes_end_with_the_masks_last_row_and_column() -> None:
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 1:4, 2:7] = True
    assert mask_boxes(masks).tolist() == [[2, 1, 6, 3], [0, 0, 0, 0]]


def test_masks_cut_by_a_crop_but_not_by_the_image_are_told() -> None:
    crop, size = torch.tensor([0, 0, 100, 100]), (100, 200)
    boxes = torch.tensor([[30, 30, 60, 60], [30, 30, 95, 60], [5, 5, 60, 60]])
    assert near_crop_edge(boxes, crop, size).tolist() == [False, True, False]


def test_small_holes_are_filled_and_small_islands_removed() -> None:
    mask = np.zeros((20, 20), bool)
    mask[2:14, 2:14] = True
    mask[5, 5] = False  # a hole of 1
    mask[8:11, 8:11] = False  # a hole of 9
    mask[17, 17:19] = True  # an island of 2
    cleaned, changed = without_small_regions(mask, 5)
    expected = mask.copy()
    expected[5, 5], expected[17, 17:19] = True, False
    assert changed
    assert np.array_equal(cleaned, expected)
    same, changed = without_small_regions(expected, 5)
    assert not changed
    assert np.array_equal(same, expected)
    alone = np.zeros((20, 20), bool)
    alone[0, :3], alone[9, 9] = True, True
    assert np.count_nonzero(without_small_regions(alone, 50)[0]) == 3  # the largest island stays


def test_small_regions_are_cleaned_and_their_duplicates_dropped(compact: Sam) -> None:
    image, _ = generate(0, 3, 128)
    options = replace(AUTO, points_per_side=5, pred_iou_thresh=0.3, stability_score_thresh=0.3, box_nms_thresh=0.9)
    before = automatic_masks(compact, image, options)
    after = automatic_masks(compact, image, replace(options, min_mask_region_area=60))
    assert 0 < len(after) <= len(before)
    for each in after:
        assert not without_small_regions(each.mask, 60)[1]
    assert any(without_small_regions(each.mask, 60)[1] for each in before)
