"""Metrics of one mask, image by image, in the frame of the arrays that are given (original pixels in the evaluation).

Nothing is pooled over images and nothing is dropped: a missed lesion counts as IoU 0 and as a Hausdorff distance of the
whole image diagonal. Conventions where a mask is empty: both empty -> IoU, Dice and boundary F1 are 1 and the distance
is 0; one empty -> 0, 0, 0 and the diagonal.

Boundary pixels are the mask's own pixels with at least one of their four neighbours outside it (beyond the frame counts
as outside). Distances are between pixel centres, found by a k-d tree over boundary pixels: exact, and some milliseconds
for a megapixel where a distance transform takes a hundred.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from scipy.spatial import cKDTree

if TYPE_CHECKING:  # tables and pictures are made without torch
    import torch

Array = TypeVar("Array", "np.ndarray", "torch.Tensor")

FAILURE = 0.65  # IoU below which a mask counts as failed; the threshold of ISIC 2018's own score
BOUNDARY_TOLERANCE = 0.01  # of boundary F1, as a share of the diagonal
NUM_BINS = 15  # of the reliability curve, equal width in probability
BLOCK = 1 << 22  # values whose entropy is computed at once; its temporary arrays are five times as large


def iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Return the intersection over union of two (H, W) bool masks; 1 if both are empty."""
    both, either = np.count_nonzero(prediction & truth), np.count_nonzero(prediction | truth)
    return both / either if either else 1.0


def batch_iou(first: Array, second: Array) -> Array:
    """Return the IoU of N pairs of masks, two (N, H, W) bool arrays or tensors -> (N,); 1 where both are empty."""
    first, second = first.reshape(len(first), -1), second.reshape(len(second), -1)
    both, either = (first & second).sum(1), (first | second).sum(1)
    empty = either == 0
    return (both + empty) / (either + empty)  # pyright: ignore[reportReturnType]


def iou_matrix(masks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the IoU of each mask with each other, (M, H, W), (K, H, W) bool -> (M, K) float32; 0 if both are empty."""
    a, b = (each.reshape(len(each), -1).astype(np.float32) for each in (masks, others))
    both = a @ b.T
    return both / np.maximum(a.sum(1)[:, None] + b.sum(1) - both, 1)


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Return 2 |A and B| / (|A| + |B|) of two (H, W) bool masks; 1 if both are empty."""
    total = np.count_nonzero(prediction) + np.count_nonzero(truth)
    return 2 * np.count_nonzero(prediction & truth) / total if total else 1.0


def thresholded_jaccard(value: float, threshold: float = FAILURE) -> float:
    """Return ISIC 2018's score of one image: its IoU, or 0 if that is below the threshold (arXiv:1902.03368)."""
    return value if value >= threshold else 0.0


def failure_rate(ious: np.ndarray, threshold: float = FAILURE) -> float:
    """Return the share of images whose IoU is below the threshold; NaN for no images."""
    ious = np.asarray(ious, float)
    return float((ious < threshold).mean()) if ious.size else float("nan")


def bounding_box(mask: np.ndarray) -> np.ndarray | None:
    """Return the bounding box of an (H, W) bool mask, (4,) float64 XYXY, half-open; None if it is empty."""
    rows = np.flatnonzero(mask.any(1))
    if rows.size == 0:
        return None
    columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)


def boundary_points(mask: np.ndarray) -> np.ndarray:
    """Return the boundary pixels of an (H, W) bool mask, (N, 2) float64 row, column; (0, 2) if it is empty."""
    box = bounding_box(mask)
    if box is None:
        return np.zeros((0, 2))
    x0, y0, x1, y1 = box.astype(int)
    crop = np.zeros((y1 - y0 + 2, x1 - x0 + 2), bool)
    crop[1:-1, 1:-1] = mask[y0:y1, x0:x1]
    inner = crop[1:-1, 1:-1]
    surrounded = crop[:-2, 1:-1] & crop[2:, 1:-1] & crop[1:-1, :-2] & crop[1:-1, 2:]
    return np.argwhere(inner & ~surrounded) + np.array([y0, x0], float)


@dataclass(frozen=True)
class Outline:
    """The boundary of a mask with its search tree; the truth's is built once for all prompts and models.

    Attributes:
        points: (N, 2) float64 row, column. shape: (H, W) of the image.
    """

    points: np.ndarray
    shape: tuple[int, int]

    @classmethod
    def of(cls, mask: np.ndarray) -> Outline:
        """Return the outline of an (H, W) bool mask."""
        return cls(boundary_points(mask), (mask.shape[0], mask.shape[1]))

    @cached_property
    def tree(self) -> cKDTree:
        """Nearest-neighbour search over the points."""
        return cKDTree(self.points, balanced_tree=False, compact_nodes=False)

    @property
    def diagonal(self) -> float:
        """Length of the image diagonal, pixels."""
        return float(np.hypot(*self.shape))

    def distances_to(self, other: Outline) -> np.ndarray:
        """Return (N,) distances of these points to the nearest of the other outline, pixels; neither is empty."""
        return np.asarray(other.tree.query(self.points)[0])


def boundary_scores(prediction: Outline, truth: Outline, tolerance: float = BOUNDARY_TOLERANCE) -> tuple[float, float]:
    """Return boundary F1 and HD95 of two outlines of one image.

    F1 is the harmonic mean of the share of the prediction's boundary within `tolerance` x diagonal of the truth's and
    the share of the truth's within that of the prediction's (Csurka et al. 2013). HD95 is the larger of the two
    directed 95th percentiles, pixels; the diagonal where one mask is empty.

    Returns:
        (boundary_f1, hd95).
    """
    if not len(prediction.points) and not len(truth.points):
        return 1.0, 0.0
    if not len(prediction.points) or not len(truth.points):
        return 0.0, truth.diagonal
    there, back = prediction.distances_to(truth), truth.distances_to(prediction)
    reach = tolerance * truth.diagonal
    precision, recall = float((there <= reach).mean()), float((back <= reach).mean())
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return f1, float(max(np.percentile(there, 95), np.percentile(back, 95)))


def boundary_f1(prediction: np.ndarray, truth: np.ndarray, tolerance: float = BOUNDARY_TOLERANCE) -> float:
    """Return the boundary F1 of two (H, W) bool masks, tolerance as a share of the diagonal; see `boundary_scores`."""
    return boundary_scores(Outline.of(prediction), Outline.of(truth), tolerance)[0]


def hd95(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Return the 95th percentile Hausdorff distance of two (H, W) bool masks, pixels; see `boundary_scores`."""
    return boundary_scores(Outline.of(prediction), Outline.of(truth))[1]


def probabilities_and_entropy(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sigmoid and binary entropy [nats, at most 0.693] of logits of any shape, stable at any magnitude.

    With e = exp(-|x|): p = 1 / (1 + e) or e / (1 + e), and the entropy is log(1 + e) + |x| e / (1 + e).
    """
    size = np.abs(logits)
    e = np.exp(-size)
    small = e / (1 + e)  # probability of the less likely class
    return np.where(logits > 0, 1 - small, small), np.log1p(e) + size * small


def mean_entropy(logits: np.ndarray) -> float:
    """Return the mean binary entropy [nats] over all pixels of the logits, an array of any shape."""
    flat = logits.reshape(-1)
    blocks = [flat[low : low + BLOCK] for low in range(0, flat.size, BLOCK)]
    return float(np.average([_block_entropy(block) for block in blocks], weights=[block.size for block in blocks]))


def _block_entropy(logits: np.ndarray) -> float:
    size = np.abs(logits)
    e = np.exp(-size)
    return float((np.log1p(e) + size * (e / (1 + e))).mean())  # as above, without the probabilities: half the time


@dataclass(frozen=True)
class Calibration:
    """Sums over pixels from which the reliability curve, ECE and Brier score follow; they add up over images.

    Attributes:
        counts, probability_sums, truth_sums: (num_bins,) float64 by predicted probability of lesion.
        squared_error: sum over pixels of (p - y)^2.
    """

    counts: np.ndarray
    probability_sums: np.ndarray
    truth_sums: np.ndarray
    squared_error: float

    @classmethod
    def of(cls, probabilities: np.ndarray, truth: np.ndarray, num_bins: int = NUM_BINS) -> Calibration:
        """Return the sums of one image: probabilities (...) float in [0, 1] and truth (...) bool of the same shape."""
        p, y = probabilities.ravel(), truth.ravel()
        bins = np.minimum((p * num_bins).astype(np.intp), num_bins - 1)
        split = np.bincount(bins + num_bins * y, minlength=2 * num_bins).reshape(2, num_bins).astype(float)
        sums = np.bincount(bins, weights=p, minlength=num_bins)
        error = np.subtract(p, y, dtype=np.float32)
        return cls(split.sum(0), sums, split[1], float(np.dot(error, error)))

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(
            self.counts + other.counts,
            self.probability_sums + other.probability_sums,
            self.truth_sums + other.truth_sums,
            self.squared_error + other.squared_error,
        )

    @property
    def ece(self) -> float:
        """Return the expected calibration error, the mean over pixels of |accuracy - confidence| of their bin."""
        total = self.counts.sum()
        return float(np.abs(self.truth_sums - self.probability_sums).sum() / total) if total else float("nan")

    @property
    def brier(self) -> float:
        """Return the mean over pixels of (p - y)^2; NaN without pixels."""
        total = self.counts.sum()
        return float(self.squared_error / total) if total else float("nan")
