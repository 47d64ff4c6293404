"""Register two pictures of the same skin by what surrounds the lesion: a turn and a shift, with scikit-image.

Key points (SIFT, Lowe 2004) outside the lesions are matched, and RANSAC fits the transform.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage
from skimage.color import rgb2gray
from skimage.exposure import equalize_adapthist
from skimage.feature import SIFT, match_descriptors
from skimage.measure import ransac
from skimage.transform import EuclideanTransform, SimilarityTransform, resize

SIDE = 512  # longer side of the pictures that key points are found in, pixels
MIN_MATCHES = 8  # that agree
TOLERANCE = 2.0  # pixels of the small picture
CLEARANCE = 0.02  # around a lesion in which no key point counts, in sides of the picture
SEED = 0  # of RANSAC
MAX_RATIO = 0.85  # of the distances to the best and second-best descriptor


@dataclass(frozen=True)
class Registration:
    """How a later picture lies on an earlier one.

    Attributes:
        matrix: (3, 3), pixels of the later picture -> pixels of the earlier one. scale: of lengths; 1 if rigid.
        angle: degrees, clockwise as pictures are shown. num_matches: key points that agree.
        residual: root mean square of their distances, pixels of the earlier picture.
    """

    matrix: np.ndarray
    scale: float
    angle: float
    num_matches: int
    residual: float


def register(
    earlier: np.ndarray, later: np.ndarray, masks: tuple[np.ndarray, np.ndarray], *, any_scale: bool = False
) -> Registration | None:
    """Register two pictures of the same lesion.

    Args:
        earlier, later: (H, W, 3) uint8 RGB. masks: their lesions, (H, W) bool, which take no part.
        any_scale: the magnification may differ.
    Returns:
        None where fewer than `MIN_MATCHES` key points agree.
    """
    found = []
    for image, mask in zip((earlier, later), masks, strict=True):
        points, descriptors, scale = _key_points(image, mask)
        if len(points) < MIN_MATCHES:
            return None
        found.append((points, descriptors, scale))
    (first, first_words, scale), (second, second_words, _) = found
    pairs = match_descriptors(first_words, second_words, cross_check=True, max_ratio=MAX_RATIO)
    if len(pairs) < MIN_MATCHES:
        return None
    target, source = first[pairs[:, 0]], second[pairs[:, 1]]
    kind = SimilarityTransform if any_scale else EuclideanTransform
    model, agree = ransac(
        (source, target), kind, min_samples=3, residual_threshold=TOLERANCE / scale, max_trials=2000, rng=SEED
    )
    if not model or agree is None or np.sum(agree) < MIN_MATCHES:
        return None
    agree = np.asarray(agree)
    residual = float(np.sqrt((model.residuals(source[agree], target[agree]) ** 2).mean()))
    size = float(model.scale) if any_scale else 1.0
    return Registration(np.asarray(model.params), size, float(np.degrees(model.rotation)), int(agree.sum()), residual)


def _key_points(image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return (N, 2) XY of key points outside a mask, image pixels; their descriptors; the small picture's scale."""
    scale = min(1.0, SIDE / max(image.shape[:2]))
    shape = round(image.shape[0] * scale), round(image.shape[1] * scale)
    grey = equalize_adapthist(resize(rgb2gray(image), shape, anti_aliasing=True), clip_limit=0.02)
    finder: Any = SIFT(upsampling=1)
    try:
        finder.detect_and_extract(grey)
    except RuntimeError:  # skimage's way to say that there are none
        return np.zeros((0, 2)), np.zeros((0, 128)), scale
    near = ndimage.binary_dilation(mask, iterations=max(1, round(CLEARANCE * max(mask.shape))))
    points = (finder.positions[:, ::-1] + 0.5) / scale
    columns, rows = np.clip(points.astype(int).T, 0, np.array(mask.shape[::-1])[:, None] - 1)
    outside = ~near[rows, columns]
    return points[outside], finder.descriptors[outside], scale
