"""Metrics against scikit-image, brute force over all boundary pairs, and closed forms."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy as scipy_entropy
from skimage import segmentation
from skimage.metrics import hausdorff_distance

from lesionsam import metrics

SHAPE = (23, 31)
MASKS = arrays(bool, SHAPE)
DIAGONAL = float(np.hypot(*SHAPE))


def disc(shape: tuple[int, int], row: float, column: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def brute_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Distance of each of the first's boundary pixels to the nearest of the second's, over all pairs."""
    a, b = (np.argwhere(brute_boundary(mask)) for mask in (first, second))
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).min(1)


def brute_boundary(mask: np.ndarray) -> np.ndarray:
    return segmentation.find_boundaries(np.pad(mask, 1), mode="inner", connectivity=1)[1:-1, 1:-1]


@settings(max_examples=40, deadline=None)
@given(MASKS, MASKS)
def test_overlap_equals_counting_sets_of_pixels(first, second):
    a, b = ({tuple(index) for index in np.argwhere(mask)} for mask in (first, second))
    expected = len(a & b) / len(a | b) if a | b else 1.0
    assert metrics.iou(first, second) == pytest.approx(expected)
    assert metrics.dice(first, second) == pytest.approx(2 * expected / (1 + expected))


@settings(max_examples=40, deadline=None)
@given(MASKS)
def test_boundary_pixels_are_those_of_scikit_image(mask):
    found = np.zeros(SHAPE, bool)
    found[tuple(metrics.boundary_points(mask).astype(int).T)] = True
    np.testing.assert_array_equal(found, brute_boundary(mask))


@settings(max_examples=30, deadline=None)
@given(MASKS, MASKS, st.sampled_from([0.01, 0.05, 0.2]))
def test_boundary_scores_equal_brute_force(first, second, tolerance):
    if not first.any() or not second.any():
        return
    there, back = brute_distances(first, second), brute_distances(second, first)
    precision, recall = (float((d <= tolerance * DIAGONAL).mean()) for d in (there, back))
    assert metrics.boundary_f1(first, second, tolerance) == pytest.approx(
        2 * precision * recall / max(precision + recall, 1e-9)
    )
    assert metrics.hd95(first, second) == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    farthest = float(hausdorff_distance(brute_boundary(first), brute_boundary(second)) or 0)
    assert metrics.hd95(first, second) <= farthest + 1e-9


def test_hd95_of_two_discs_is_the_difference_of_their_radii():
    small, large = disc((200, 240), 100, 120, 40), disc((200, 240), 100, 120, 60)
    assert metrics.hd95(small, large) == pytest.approx(20, abs=1)


def test_a_mask_moved_by_less_than_the_tolerance_has_boundary_f1_one_and_by_much_more_has_little():
    mask = disc((300, 400), 150, 200, 80)  # diagonal 500: 1 % is 5 pixels
    assert metrics.boundary_f1(np.roll(mask, 4, 1), mask, 0.01) == 1.0
    assert metrics.boundary_f1(np.roll(mask, 40, 1), mask, 0.01) < 0.35


@pytest.mark.parametrize(
    ("prediction", "truth", "overlap", "distance"),
    [(False, False, 1.0, 0.0), (False, True, 0.0, DIAGONAL), (True, False, 0.0, DIAGONAL), (True, True, 1.0, 0.0)],
)
def test_empty_and_full_masks_are_defined_and_a_missed_lesion_costs_the_diagonal(prediction, truth, overlap, distance):
    a, b = np.full(SHAPE, prediction), np.full(SHAPE, truth)
    assert metrics.iou(a, b) == metrics.dice(a, b) == metrics.boundary_f1(a, b) == overlap
    assert metrics.hd95(a, b) == pytest.approx(distance)


def test_thresholded_jaccard_and_failures_cut_at_065():
    assert [metrics.thresholded_jaccard(x) for x in (0.64, 0.65, 0.9)] == [0.0, 0.65, 0.9]
    assert metrics.failure_rate(np.array([0.64, 0.65, 0.9, 0.0])) == 0.5
    assert np.isnan(metrics.failure_rate(np.array([])))


def test_entropy_and_probability_equal_scipy_and_stay_finite_at_any_size():
    logits = np.array([-3.0, -0.2, 0.0, 1.7, 12.0])
    p, h = metrics.probabilities_and_entropy(logits)
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-logits)), rtol=1e-12)
    np.testing.assert_allclose(h, [scipy_entropy([x, 1 - x]) for x in p], rtol=1e-9)
    assert metrics.mean_entropy(np.zeros((4, 4))) == pytest.approx(np.log(2))
    p, h = metrics.probabilities_and_entropy(np.array([-1e4, 1e4], np.float32))
    assert p.tolist() == [0.0, 1.0]
    assert h.tolist() == [0.0, 0.0]


def test_calibration_of_a_forecast_that_is_right_as_often_as_it_says_is_zero():
    p = np.repeat([0.25, 0.75], 4)
    y = np.array([1, 0, 0, 0, 1, 1, 1, 0], bool)
    sums = metrics.Calibration.of(p, y)
    assert sums.ece == pytest.approx(0)
    assert sums.brier == pytest.approx(((p - y) ** 2).mean())
    assert metrics.Calibration.of(p, np.zeros(8, bool)).ece == pytest.approx(0.5)


def test_calibration_sums_of_two_images_add_up_to_those_of_both_together():
    rng = np.random.default_rng(0)
    p, y = rng.random(1000), rng.random(1000) < 0.3
    parts = metrics.Calibration.of(p[:300], y[:300]) + metrics.Calibration.of(p[300:], y[300:])
    whole = metrics.Calibration.of(p, y)
    np.testing.assert_allclose(parts.probability_sums, whole.probability_sums)
    np.testing.assert_array_equal(parts.counts, whole.counts)
    edges = np.arange(metrics.NUM_BINS + 1) / metrics.NUM_BINS  # the same by definition, bin by bin
    which = np.digitize(p, edges[1:-1])
    expected = sum(
        (which == k).mean() * abs(p[which == k].mean() - y[which == k].mean()) for k in range(metrics.NUM_BINS)
    )
    assert parts.ece == pytest.approx(expected)
    assert parts.brier == pytest.approx(((p - y) ** 2).mean(), rel=1e-5)


def test_bounding_box_is_half_open_and_none_for_an_empty_mask():
    mask = np.zeros(SHAPE, bool)
    assert metrics.bounding_box(mask) is None
    mask[4:7, 9:20] = True
    found = metrics.bounding_box(mask)
    assert found is not None
    assert found.tolist() == [9, 4, 20, 7]


def test_boundary_scores_of_a_large_image_take_milliseconds():
    truth, prediction = disc((768, 1024), 380, 500, 260), disc((768, 1024), 370, 520, 270)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        metrics.hd95(prediction, truth)
        best = min(best, time.perf_counter() - begun)
    assert best < 0.05  # 3 ms on an idle core; a distance transform takes 100


def test_batched_ious_are_those_of_the_masks_one_by_one():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 6, 5, 7)) < 0.4
    first[0] = second[0] = False
    expected = [metrics.iou(a, b) for a, b in zip(first, second, strict=True)]
    assert expected[0] == 1
    np.testing.assert_allclose(metrics.batch_iou(first, second), expected)
    both = (torch.from_numpy(masks) for masks in (first, second))
    np.testing.assert_allclose(metrics.batch_iou(*both).numpy(), expected, rtol=1e-6)
    matrix = metrics.iou_matrix(first, second)
    np.testing.assert_allclose(matrix.diagonal()[1:], expected[1:], rtol=1e-6)
    assert matrix[0, 0] == 0
    assert matrix[2, 4] == np.float32(metrics.iou(first[2], second[4]))


def test_the_mean_entropy_is_that_of_all_pixels_at_any_magnitude():
    logits = np.array([[0.0, 3.0], [-40.0, 800.0]])
    expected = metrics.probabilities_and_entropy(logits)[1].mean()
    assert metrics.mean_entropy(logits) == pytest.approx(expected, abs=1e-12)


def test_the_mean_entropy_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch):
    logits = np.random.default_rng(0).normal(scale=4, size=(37, 29))
    whole = metrics.mean_entropy(logits)
    monkeypatch.setattr(metrics, "BLOCK", 100)  # the last of eleven has 73 values
    assert metrics.mean_entropy(logits) == pytest.approx(whole, abs=1e-12)
