"""Automatic masks against segment_anything's own generator, and the parts that it needs another library for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from segment_anything import SamAutomaticMaskGenerator

from lesionsam.config.load import default_values
from lesionsam.data.sources.synthetic import generate
from lesionsam.inference.auto import AUTO_DEFAULTS, AutoMaskOptions, automatic_masks, without_small_regions
from lesionsam.models.checkpoint import load_sam
from lesionsam.models.sam import Sam

WEIGHTS = Path(__file__).parents[2] / "foundation" / "compact.safetensors"


@pytest.fixture(scope="module")
def compact() -> Sam:
    return load_sam("compact", WEIGHTS)


def theirs(sam: Sam, image: np.ndarray, options: AutoMaskOptions) -> list[Mapping]:
    """segment_anything's answer to the same settings."""
    return SamAutomaticMaskGenerator(sam, **asdict(options)).generate(image)


CASES = {
    "loose": replace(AUTO_DEFAULTS, points_per_side=5, pred_iou_thresh=0.3, stability_score_thresh=0.5),
    "one crop layer": replace(
        AUTO_DEFAULTS,
        points_per_side=4,
        pred_iou_thresh=0.3,
        stability_score_thresh=0.5,
        crop_n_layers=1,
        crop_n_points_downscale_factor=2,
        crop_nms_thresh=0.5,
    ),
    "odd batches, other offset": replace(
        AUTO_DEFAULTS,
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


def test_a_crop_layer_whose_grid_has_no_point_adds_no_mask(compact: Sam) -> None:
    """A layer with 4 / 8 points a side: segment_anything divides by 0 there."""
    image, _ = generate(0, 3, 96)
    options = replace(AUTO_DEFAULTS, points_per_side=4, pred_iou_thresh=0.3, stability_score_thresh=0.3)
    layered = replace(options, crop_n_layers=1, crop_n_points_downscale_factor=8)
    one, two = (automatic_masks(compact, image, each) for each in (options, layered))
    assert len(one) == len(two) > 0


def test_masks_do_not_depend_on_the_batch_of_points(compact: Sam) -> None:
    image, _ = generate(0, 5, 96)
    options = replace(AUTO_DEFAULTS, points_per_side=4, pred_iou_thresh=0.4, stability_score_thresh=0.5)
    one, two = (automatic_masks(compact, image, replace(options, points_per_batch=n)) for n in (16, 3))
    assert len(one) == len(two) > 0
    assert all(np.count_nonzero(a.mask != b.mask) <= 2 for a, b in zip(one, two, strict=True))


def test_thresholds_that_nothing_passes_give_no_mask(compact: Sam) -> None:
    image, _ = generate(0, 3, 64)
    assert automatic_masks(compact, image, replace(AUTO_DEFAULTS, points_per_side=2, pred_iou_thresh=0.999)) == []


def test_no_mask_is_empty_whatever_the_thresholds(compact: Sam) -> None:
    image, _ = generate(0, 3, 64)
    found = automatic_masks(
        compact,
        image,
        replace(AUTO_DEFAULTS, points_per_side=2, pred_iou_thresh=0, stability_score_thresh=0, box_nms_thresh=1),
    )
    assert found
    for each in found:
        assert each.area == np.count_nonzero(each.mask) > 0
        x0, y0, x1, y1 = each.box
        assert each.mask[y0:y1, x0:x1].sum() == each.area
        assert each.patch[[0, -1]].any(1).all()
        assert each.patch[:, [0, -1]].any(0).all()


def test_defaults_are_those_of_the_default_parameters() -> None:
    assert asdict(AUTO_DEFAULTS) == default_values()["auto"]


def test_small_holes_are_filled_and_small_islands_removed() -> None:
    mask = np.zeros((20, 20), bool)
    mask[2:14, 2:14] = True
    mask[5, 5] = False  # a hole of 1
    mask[8:11, 8:11] = False  # a hole of 9
    mask[17, 17:19] = True  # an island of 2
    cleaned = without_small_regions(mask, 5)
    expected = mask.copy()
    expected[5, 5], expected[17, 17:19] = True, False
    assert np.array_equal(cleaned, expected)
    assert np.array_equal(without_small_regions(expected, 5), expected)
    alone = np.zeros((20, 20), bool)
    alone[0, :3], alone[9, 9] = True, True
    assert np.count_nonzero(without_small_regions(alone, 50)) == 3  # the largest island stays


def test_small_regions_are_cleaned_and_their_duplicates_dropped(compact: Sam) -> None:
    image, _ = generate(0, 3, 128)
    options = replace(
        AUTO_DEFAULTS, points_per_side=5, pred_iou_thresh=0.3, stability_score_thresh=0.3, box_nms_thresh=0.9
    )
    before = automatic_masks(compact, image, options)
    after = automatic_masks(compact, image, replace(options, min_mask_region_area=60))
    assert 0 < len(after) <= len(before)
    for each in after:
        assert np.array_equal(without_small_regions(each.mask, 60), each.mask)
    assert any((without_small_regions(each.mask, 60) != each.mask).any() for each in before)
