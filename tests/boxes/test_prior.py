"""The box prior and its outline offset: closed forms, images it must solve, images where colour fails."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from helpers.tiny import LESION, SKIN, Lesion, draw_lesion, iou
from lesionsam.boxes.annotator import simulate_boxes
from lesionsam.boxes.geometry import model_frame_size, pixels_inside
from lesionsam.boxes.prior import (
    COLOUR_CLIP,
    CORE,
    EXTENT_SHARE,
    OFFSETS,
    OUTSIDE,
    RIDGE,
    SHAPE_TIGHTNESS,
    SHAPE_WEIGHT,
    box_prior,
    ellipse_prior,
    elliptical_radius,
    extent,
    fisher_score,
    outline_offset,
    prior_at,
)
from lesionsam.types import Frame
from lesionsam.utils.images import read_image, read_mask

BIG, SMALL, SHAPE = np.array([20.0, 30.0, 100.0, 90.0]), np.array([50.0, 50.0, 70.0, 70.0]), (120, 128)


def shape_term(big: np.ndarray, small: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """What the prior is where colour says nothing, from the formula."""
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    u = (columns - (big[0] + big[2]) / 2) / ((big[2] - big[0]) / 2)
    v = (rows - (big[1] + big[3]) / 2) / ((big[3] - big[1]) / 2)
    prior = 2 * (1 - 1.07 * np.sqrt(u**2 + v**2))
    core = (columns >= small[0]) & (columns < small[2]) & (rows >= small[1]) & (rows < small[3])
    in_big = (columns >= big[0]) & (columns < big[2]) & (rows >= big[1]) & (rows < big[3])
    return np.where(in_big, np.where(core, np.maximum(prior, 1), prior), -3)


# ---- closed forms ----------------------------------------------------------------------------------------------------


def test_a_pixel_is_inside_where_its_centre_is() -> None:
    found = pixels_inside(np.array([1.5, 0.6, 3.5, 2.5]), (4, 5))
    assert found.tolist() == [[False] * 5, [False, True, True, False, False], [False] * 5, [False] * 5]
    assert not pixels_inside(np.array([2.0, 2.0, 2.0, 3.0]), (4, 5)).any()


def test_the_elliptical_radius_is_one_on_the_inscribed_ellipse() -> None:
    radius = elliptical_radius(np.array([0.5, 2.5, 8.5, 6.5]), (9, 9))
    assert radius[4, 4] == 0
    assert [radius[4, 0], radius[4, 8], radius[2, 4], radius[6, 4]] == [1, 1, 1, 1]
    assert radius[2, 0] == pytest.approx(np.sqrt(2))
    assert np.isfinite(elliptical_radius(np.array([3.0, 3.0, 3.0, 3.0]), (9, 9))).all()


def test_the_ellipse_is_zero_on_its_outline() -> None:
    big = np.array([0.0, 0.0, 231.0, 117.0])  # the outline crosses pixel centres at 115.5 +- 100 a shrink of 1.155
    prior = ellipse_prior(big, (117, 231), shrink=1.155)
    assert prior[58, 15] == pytest.approx(0, abs=1e-5)
    assert prior[58, 215] == pytest.approx(0, abs=1e-5)
    assert prior[58, 115] == SHAPE_WEIGHT
    default = ellipse_prior(BIG, SHAPE)
    rows, columns = np.nonzero(default > 0)
    assert [columns.max() + 1 - columns.min(), rows.max() + 1 - rows.min()] == pytest.approx(
        [80 / 1.15, 60 / 1.15], abs=1.5
    )
    assert (default[~pixels_inside(BIG, SHAPE)] == OUTSIDE).all()
    assert (default > 0).sum() == pytest.approx(np.pi / 4 * 80 * 60 / 1.15**2, rel=0.01)


def test_the_fisher_score_is_one_and_minus_one_at_the_means_and_clipped() -> None:
    rng = np.random.default_rng(0)
    features = np.zeros((40, 40, 3))
    first, second = np.zeros((40, 40), bool), np.zeros((40, 40), bool)
    first[:10], second[20:30] = True, True
    a, b = np.array([60.0, 10.0, -5.0]), np.array([30.0, 20.0, 15.0])
    features[first], features[second] = a + rng.normal(0, 3, (400, 3)), b + rng.normal(0, 3, (400, 3))
    mean_a, mean_b = features[first].mean(0), features[second].mean(0)
    features[35], features[36], features[37] = mean_a, mean_b, (mean_a + mean_b) / 2
    features[38], features[39] = mean_a + 9 * (mean_a - mean_b), mean_b - 9 * (mean_a - mean_b)
    score = fisher_score(features, first, second)
    assert score[35:, 0] == pytest.approx([1, -1, 0, COLOUR_CLIP, -COLOUR_CLIP], abs=1e-6)


def test_the_fisher_direction_discounts_the_noisy_channel() -> None:
    rng = np.random.default_rng(0)
    features = np.zeros((50, 50, 2))
    first = np.zeros((50, 50), bool)
    first[:25] = True
    features[..., 0] = np.where(first, 4, -4) + rng.normal(0, 1, (50, 50))
    features[..., 1] = np.where(first, 4, -4) + rng.normal(0, 30, (50, 50))
    score = fisher_score(features, first, ~first)
    variances = np.array(
        [features[first][:, k].var(ddof=1) / 2 + features[~first][:, k].var(ddof=1) / 2 for k in (0, 1)]
    )
    scatter = (np.cov(features[first].T) + np.cov(features[~first].T)) / 2
    assert np.diag(scatter) == pytest.approx(variances)
    difference = features[first].mean(0) - features[~first].mean(0)
    direction = np.linalg.inv(scatter + RIDGE * np.eye(2)) @ difference
    middle = (features[first].mean(0) + features[~first].mean(0)) / 2
    wanted = ((features - middle) @ direction) / (difference @ direction / 2)
    assert score == pytest.approx(np.clip(wanted, -1.5, 1.5), abs=1e-4)
    assert (score > 0)[first].mean() > 0.9, "the noisy channel alone would give .55"


def test_equal_regions_score_zero() -> None:
    same = np.full((10, 10, 3), 7.0)
    first = np.zeros((10, 10), bool)
    first[:5] = True
    assert (fisher_score(same, first, ~first) == 0).all()


def test_extents_are_those_of_the_largest_component() -> None:
    mask = np.zeros((20, 30), bool)
    assert extent(mask).tolist() == [0, 0]
    mask[2:6, 3:13], mask[10, 28] = True, True
    assert extent(mask).tolist() == [10, 4]


# ---- the prior -------------------------------------------------------------------------------------------------------


def lesion_at(seed: int, contrast: float = 1.0, size: tuple[int, int] = SHAPE) -> Lesion:
    return draw_lesion(np.random.default_rng(seed), *size, contrast=contrast)


@pytest.mark.parametrize("seed", range(5))
def test_it_solves_a_dark_lesion_that_is_no_ellipse(seed: int) -> None:
    lesion = lesion_at(seed)
    mask = lesion.mask.copy()
    middle = int((lesion.big[0] + lesion.big[2]) / 2)
    reach = int(lesion.small[2]) + 1
    mask[: int(lesion.small[1]) - 2, middle:] = False  # a quarter of the ellipse is missing: the boxes do not know
    mask[:, reach + 2 :] &= np.arange(SHAPE[0])[:, None] > (lesion.big[1] + lesion.big[3]) / 2
    image = np.clip(
        np.where(mask[..., None], LESION, SKIN) + np.random.default_rng(seed).normal(0, 5, (*SHAPE, 3)), 0, 255
    )
    found = box_prior(image.astype(np.uint8), lesion.big, lesion.small) > 0
    assert iou(found, mask) > 0.9
    assert iou(found, mask) > iou(ellipse_prior(lesion.big, SHAPE) > 0, mask) + 0.1


def test_its_values_keep_their_promises() -> None:
    for seed in range(5):
        lesion = lesion_at(seed, contrast=0.3)
        prior = box_prior(lesion.image, lesion.big, lesion.small)
        assert prior.dtype == np.float32
        assert prior.shape == SHAPE
        assert (prior[pixels_inside(lesion.small, SHAPE)] >= CORE).all()
        assert (prior[~pixels_inside(lesion.big, SHAPE)] == OUTSIDE).all()
        assert prior.max() <= SHAPE_WEIGHT + COLOUR_CLIP


def test_it_is_the_shape_term_plus_the_colour_score() -> None:
    lesion = lesion_at(1)
    prior = box_prior(lesion.image, lesion.big, lesion.small)
    score = prior - shape_term(lesion.big, lesion.small, SHAPE)
    free = pixels_inside(lesion.big, SHAPE) & ~pixels_inside(lesion.small, SHAPE)
    well_inside = free & (elliptical_radius(lesion.big, SHAPE) < 0.6)
    well_outside = free & (elliptical_radius(lesion.big, SHAPE) > 1.1)
    assert np.median(score[well_inside]) == pytest.approx(1, abs=0.1)
    assert np.median(score[well_outside]) == pytest.approx(-1, abs=0.1)
    assert abs(score[free]).max() <= COLOUR_CLIP + 1e-5


def test_where_there_is_no_colour_only_the_shape_speaks() -> None:
    flat = np.full((*SHAPE, 3), 128, np.uint8)
    assert box_prior(flat, BIG, SMALL) == pytest.approx(shape_term(BIG, SMALL, SHAPE), abs=1e-5)


@pytest.mark.parametrize("what", ["no band", "no core", "everything ignored"])
def test_a_band_or_core_too_small_leaves_the_shape(what: str) -> None:
    image = lesion_at(0).image
    big, small, ignore = BIG, SMALL, np.zeros(SHAPE, bool)
    if what == "no band":
        big = np.array([0.0, 0.0, 128.0, 120.0])
    elif what == "no core":
        small = np.array([60.2, 60.2, 61.4, 61.4])
    else:
        ignore[:] = True
    assert box_prior(image, big, small, ignore) == pytest.approx(shape_term(big, small, SHAPE), abs=1e-5)


def test_a_narrow_band_is_still_a_colour_model() -> None:
    lesion = lesion_at(0)
    big = np.array([2.0, 0.0, 128.0, 120.0])  # 2 columns are left outside
    assert np.abs(box_prior(lesion.image, big, lesion.small) - shape_term(big, lesion.small, SHAPE)).max() > 0.5


def test_ignored_pixels_do_not_colour_the_band() -> None:
    lesion = lesion_at(2)
    disturbed, ignore = lesion.image.copy(), np.zeros(SHAPE, bool)
    ignore[:, : int(lesion.big[0]) - 1] = True
    disturbed[:, : int(lesion.big[0]) - 5] = LESION.astype(np.uint8)  # another lesion; the smoothing reaches 4 px
    clean = box_prior(lesion.image, lesion.big, lesion.small, ignore)
    assert box_prior(disturbed, lesion.big, lesion.small, ignore) == pytest.approx(clean, abs=1e-3)
    assert np.abs(box_prior(disturbed, lesion.big, lesion.small) - clean).max() > 0.3


def test_a_few_milliseconds_an_image() -> None:
    lesion = lesion_at(0)
    times = []
    for _ in range(15):
        begun = time.process_time()  # of this process: other work on the machine does not count
        box_prior(lesion.image, lesion.big, lesion.small)
        times.append(time.process_time() - begun)
    assert min(times) < 0.03, f"{min(times) * 1000:.1f} ms"


# ---- the outline offset ----------------------------------------------------------------------------------------------


def cones(looseness: float, count: int = 40, generosity: float = 0.0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Discs whose prior is a cone that is 0 `generosity` px within their outline; big boxes `looseness` too large."""
    rng, priors, boxes = np.random.default_rng(0), [], []
    for _ in range(count):
        radius, centre = rng.uniform(20, 30), rng.uniform(58, 62, 2)
        rows, columns = np.mgrid[:120, :120] + 0.5
        distance = np.hypot(rows - centre[1], columns - centre[0])
        priors.append(((radius - generosity - distance) / 10).astype(np.float32))
        half = radius * (1 + looseness)
        boxes.append(np.array([centre[0] - half, centre[1] - half, centre[0] + half, centre[1] + half]))
    return priors, boxes


def test_the_offset_is_found_on_discs_of_known_looseness() -> None:
    for looseness in (0.1, 0.2, 0.4):
        # The share by which a real outline's extent exceeds a smooth one's counts as looseness here.
        priors, boxes = cones((1 + looseness) / EXTENT_SHARE - 1)
        assert outline_offset(priors, boxes, looseness) == pytest.approx(0, abs=0.06)
        for generosity in (-4.0, 4.0):  # px; a prior that stops 4 px short needs +0.4
            priors, boxes = cones((1 + looseness) / EXTENT_SHARE - 1, generosity=generosity)
            assert outline_offset(priors, boxes, looseness) == pytest.approx(generosity / 10, abs=0.06)


def test_a_wrong_looseness_shifts_it_in_the_known_direction() -> None:
    priors, boxes = cones(1.2 / EXTENT_SHARE - 1)
    found = [outline_offset(priors, boxes, looseness) for looseness in (0.05, 0.2, 0.35)]
    assert found[0] > 0.1, "boxes thought to be tight: the outline must reach farther"
    assert abs(found[1]) < 0.06
    assert found[2] < -0.1
    # A radius r seen as r (1.2 / 1.35) is short of r by 2.8 px at r = 25: 0.28 of a logit in these cones.
    assert found[2] == pytest.approx(-25 * (1 - 1.2 / 1.35) / 10, abs=0.08)


def test_the_offset_stays_within_its_range() -> None:
    priors, boxes = cones(0.2)
    assert outline_offset(priors, boxes, 4.0) == pytest.approx(OFFSETS[0])
    assert outline_offset([p - 5 for p in priors], boxes, 0.0) == pytest.approx(OFFSETS[-1])


def test_big_boxes_cut_by_the_frame_do_not_count() -> None:
    priors, boxes = cones(1.2 / EXTENT_SHARE - 1)
    alone = outline_offset(priors, boxes, 0.2)
    cut = [np.array([0.0, 40.0, 50.0, 80.0])] * 100
    wrong = [np.full((120, 120), -3, np.float32)] * 100
    assert outline_offset([*priors, *wrong], [*boxes, *cut], 0.2) == alone
    assert outline_offset(wrong, cut, 0.2) == 0.0
    padded = [np.pad(p, ((0, 30), (0, 10)), constant_values=-3) for p in priors]
    assert outline_offset(padded, boxes, 0.2, sizes=[(120, 120)] * len(boxes)) == alone
    assert outline_offset(padded, boxes, 0.2, sizes=[(60, 120)] * len(boxes)) == 0.0, "all cut at row 60"


def test_one_odd_image_does_not_move_the_median() -> None:
    priors, boxes = cones(1.2 / EXTENT_SHARE - 1)
    alone = outline_offset(priors, boxes, 0.2)
    priors[0] = np.full((120, 120), -3, np.float32)
    assert outline_offset(priors, boxes, 0.2) == pytest.approx(alone, abs=0.03)


# ---- real images -----------------------------------------------------------------------------------------------------


def test_on_real_images_the_prior_beats_the_ellipse_and_the_offset_does_not_hurt(isic_sample: Path) -> None:
    images = sorted((isic_sample / "images" / "train").glob("*.jpg"))[::15][:60]
    assert len(images) == 60
    rng, side = np.random.default_rng(0), 128
    priors, boxes, masks, ellipses = [], [], [], []
    for path in images:
        mask = read_mask(next((isic_sample / "masks" / "train").glob(f"{path.stem}*.png")), threshold=True)
        pair = simulate_boxes(mask, rng, margin=(0.1, 0.2), core=(0.4, 0.6), jitter=0.05, min_area=16)
        assert pair is not None
        image = read_image(path)
        shape = model_frame_size(image.shape[1], image.shape[0], Frame(side))
        scale = np.array([shape[1] / image.shape[1], shape[0] / image.shape[0]] * 2)
        priors.append(prior_at(image, *pair, np.zeros((0, 4)), shape))
        boxes.append(pair[0] * scale)
        rows, columns = ((np.arange(n) + 0.5) * m / n for n, m in zip(shape, mask.shape, strict=True))
        masks.append(mask[rows.astype(int)][:, columns.astype(int)])
        ellipses.append(ellipse_prior(boxes[-1], shape) > 0)
    offset = outline_offset(priors, boxes, 0.15)
    found = [
        np.mean([iou(p, m) for p, m in zip(predictions, masks, strict=True)])
        for predictions in (
            ellipses,
            [p > 0 for p in priors],
            [(p + offset > 0) & pixels_inside(b, p.shape) for p, b in zip(priors, boxes, strict=True)],
        )
    ]
    ellipse, plain, shifted = found
    assert plain > ellipse + 0.01, found
    assert shifted > ellipse + 0.02, found
    assert shifted > plain - 0.005, found
    assert abs(offset) < 0.5
    assert 0.7 < ellipse < 0.9


def test_the_shape_constants_are_those_of_the_formula() -> None:
    assert (SHAPE_WEIGHT, SHAPE_TIGHTNESS, CORE, OUTSIDE) == (2.0, 1.07, 1.0, -3.0)
