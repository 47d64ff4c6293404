"""Compute what helps while drawing, without a network: outlines of the box prior's mask and a suggested core."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from skimage.measure import approximate_polygon, find_contours

from lesionsam.annotation.records import Box
from lesionsam.boxes.annotator import simulate_boxes
from lesionsam.boxes.geometry import pixels_inside
from lesionsam.boxes.prior import prior_at
from lesionsam.metrics import iou

CORE_SHARE = 0.5  # of the lesion's extent that a suggested core takes, shrunk until it lies on the lesion
FIRST_CORE = 0.3  # of the big box, about its middle: where the colours are read from before there is a core
ROUNDS = 2  # of core and colours from each other
TOLERANCE = 0.15  # by which an outline is simplified, pixels of the grid it is read from


def rings(
    logits: np.ndarray, step: tuple[float, float], size: tuple[int, int], level: float = 0.0
) -> list[list[float]]:
    """Return the outlines of logits above a level.

    Args:
        logits: (h, w), the whole image from its upper left corner. step: pixels of the image per column and per row.
        size: (width, height) of the image.
    Returns:
        closed rings as x0, y0, x1, y1, ... in pixels of the image, to a tenth.
    """
    padded = np.pad(np.clip(logits, level - 8, level + 8), 1, constant_values=level - 8)
    found = []
    for ring in find_contours(padded, level):
        if len(ring) > 3:
            points = (approximate_polygon(ring, TOLERANCE)[:, ::-1] - 0.5) * step
            found.append(np.clip(points, 0, size).round(1).ravel().tolist())
    return found


def prior_logits(
    image: np.ndarray,
    size: tuple[int, int],
    big: Sequence[float] | np.ndarray,
    small: Sequence[float] | np.ndarray,
    others: Sequence[Box] = (),
) -> np.ndarray:
    """Compute the box prior on a small copy of an image.

    Args:
        image: (h, w, 3) uint8, longer side at most `PRIOR_SIDE`. size: (width, height) of the image itself.
        big, small: XYXY in its pixels; others: big boxes of its other lesions.
    Returns:
        (h, w) float32 logits.
    """
    height, width = image.shape[:2]
    scale = np.array([width / size[0], height / size[1]] * 2)
    boxes = np.array(others, float).reshape(-1, 4) * scale
    return prior_at(image, np.array(big) * scale, np.array(small) * scale, boxes, (height, width))


def on_grid(logits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Resample (t, u) logits to (h, w), bilinear between pixel centres."""
    rows = (np.arange(shape[0]) + 0.5) * logits.shape[0] / shape[0] - 0.5
    columns = (np.arange(shape[1]) + 0.5) * logits.shape[1] / shape[1] - 0.5
    return ndimage.map_coordinates(logits, np.meshgrid(rows, columns, indexing="ij"), order=1, mode="nearest")


def agreement(logits: np.ndarray, level: float, prior: np.ndarray) -> float:
    """Return the IoU of the model's mask (logits above `level`) and the box prior's, on the prior's grid.

    Args:
        logits: (t, u), the whole image. prior: (h, w) logits of the same image.
    """
    return iou(on_grid(logits, prior.shape) > level, prior > 0)


def suggest_core(image: np.ndarray, size: tuple[int, int], big: Sequence[float], others: Sequence[Box] = ()) -> Box:
    """Suggest a core for a big one: around the deepest point of the box prior's mask, starting from the middle.

    Args:
        as `prior_logits`.
    Returns:
        XYXY in pixels of the image, inside the big box.
    """
    outer = np.array(big, float)
    centre, half = (outer[:2] + outer[2:]) / 2, (outer[2:] - outer[:2]) / 2
    core = np.concatenate([centre - half * FIRST_CORE, centre + half * FIRST_CORE])
    scale = np.array([image.shape[1] / size[0], image.shape[0] / size[1]] * 2)
    for _ in range(ROUNDS):
        mask = prior_logits(image, size, outer, core, others) > 0
        mask = ndimage.binary_fill_holes(mask) & pixels_inside(outer * scale, mask.shape)
        share = (CORE_SHARE, CORE_SHARE)
        found = simulate_boxes(mask, np.random.default_rng(0), margin=(0, 0), core=share, jitter=0.0, min_area=4)
        if found is None:
            break
        core = np.concatenate(
            [np.maximum(found[1][:2] / scale[:2], outer[:2]), np.minimum(found[1][2:] / scale[2:], outer[2:])]
        )
    least = np.minimum(2.0, outer[2:] - outer[:2])
    centre = np.clip((core[:2] + core[2:]) / 2, outer[:2] + least / 2, outer[2:] - least / 2)
    half = np.maximum(core[2:] - core[:2], least) / 2
    core = np.concatenate([np.maximum(centre - half, outer[:2]), np.minimum(centre + half, outer[2:])])
    x0, y0, x1, y1 = (round(float(value), 2) for value in core)
    return x0, y0, x1, y1
