"""Boxes as numbers: into the model frame, onto pixels, jittered, loosened, around a mask.

A box is (4,) XYXY and half-open. A pixel belongs to a box if its centre lies in it; this is the one rounding of boxes
to pixels. `methods.grid.box_pixels` is the same rule for a batch of tensors.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from lesionsam.types import Frame
from lesionsam.utils.random import keyed_rng

CENTRE_CORE = 0.4


def model_frame_size(width: int, height: int, frame: Frame) -> tuple[int, int]:
    """Return (height, width) of the image part of the model frame.

    Padded: the longest side becomes S, both are rounded half up, as by SAM's ResizeLongestSide. Squashed: (S, S).
    """
    if frame.squash:
        return frame.side, frame.side
    scale = frame.side / max(width, height)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def to_model_frame(coordinates: np.ndarray, width: int, height: int, frame: Frame) -> np.ndarray:
    """Scale original pixels to the model frame.

    Args:
        coordinates: (..., 2k) XYXY... or XY. width, height: of the image, pixels.
    Returns:
        (..., 2k) float64, model frame.
    """
    new_height, new_width = model_frame_size(width, height, frame)
    factors = np.resize(np.array([new_width / width, new_height / height]), coordinates.shape[-1])
    return coordinates * factors


def pixels_inside(box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the pixels of a frame whose centres lie in a box: box (4,) XYXY, shape (H, W) -> (H, W) bool."""
    mask = np.zeros(shape, bool)
    (y0, y1), (x0, x1) = _centres_between(box[1], box[3], shape[0]), _centres_between(box[0], box[2], shape[1])
    mask[y0:y1, x0:x1] = True
    return mask


def box_slices(box: np.ndarray, shape: tuple[int, int]) -> tuple[slice, slice]:
    """Return (rows, columns) of the pixels of `pixels_inside`, but at least one row and column of the frame.

    Args:
        box: (4,) XYXY. shape: (H, W) of the frame.
    """
    slices = []
    for low, high, length in ((box[1], box[3], shape[0]), (box[0], box[2], shape[1])):
        start, stop = _centres_between(low, high, length)
        start = min(start, length - 1)
        slices.append(slice(start, max(stop, start + 1)))
    return slices[0], slices[1]


def _centres_between(low: float, high: float, length: int) -> tuple[int, int]:
    """Return (start, stop) of the pixels k of an axis with low <= k + 0.5 < high; stop <= start where there is none."""
    stop = min(math.ceil(float(high) - 0.5), length)
    return max(math.ceil(float(low) - 0.5), 0), max(stop, 0)  # a negative stop would count from the far side


def jitter_box(box: np.ndarray, draws: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Move and scale a box inside limits; the result is at least a pixel wide and high.

    The centre stays half a pixel inside the limits and no side shrinks below a pixel. The evaluation always did this.
    Predictions of an ensemble lacked the two clamps and could get boxes without area at the rim of an image.

    Args:
        box: (4,) XYXY. draws: (4,), shift of the centre along x and y and change of width and height, in shares of the
            side. limits: (4,) XYXY, at least a pixel wide and high.
    Returns:
        (4,) float64 XYXY.
    """
    side = box[2:] - box[:2]
    centre = np.clip((box[:2] + box[2:]) / 2 + side * draws[:2], limits[:2] + 0.5, limits[2:] - 0.5)
    half = np.maximum(side * (1 + draws[2:]) / 2, 0.5)
    return np.concatenate([np.maximum(centre - half, limits[:2]), np.minimum(centre + half, limits[2:])])


def jitter_boxes(
    big_box: np.ndarray, small_box: np.ndarray, size: tuple[int, int], *, share: float, key: str
) -> tuple[np.ndarray, np.ndarray]:
    """Imitate a less careful annotator: sides times 1 + U(-share, share), centres moved by up to `share` of the side.

    The draws depend on the key alone, so that a curve over shares compares like with like.

    Args:
        big_box, small_box: (4,) XYXY, original pixels. size: (H, W) of the image. key: of the lesion and the purpose.
    Returns:
        (big_box, small_box), (4,) float64 XYXY; the big box is cut at the frame, the small box at the big box.
    """
    draws = keyed_rng(key).uniform(-1, 1, (2, 4)) * share
    big = jitter_box(big_box, draws[0], np.array([0, 0, size[1], size[0]], float))
    return big, jitter_box(small_box, draws[1], big)


def loosen(box: np.ndarray, share: float, size: tuple[int, int]) -> np.ndarray:
    """Lengthen the sides of a (4,) XYXY box by `share` about its centre and cut it at a frame of size (h, w)."""
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * (1 + share)
    limits = np.array(size[::-1], float)
    return np.concatenate([np.clip(centre - half, 0, limits), np.clip(centre + half, 0, limits)])


def centre_core(big: np.ndarray) -> np.ndarray:
    """Return a small box at the centre of a (4,) XYXY big box, `CENTRE_CORE` of its sides: where none is drawn."""
    centre, half = (big[:2] + big[2:]) / 2, (big[2:] - big[:2]) / 2 * CENTRE_CORE
    return np.concatenate([centre - half, centre + half])


def largest_component_box(mask: np.ndarray) -> np.ndarray | None:
    """Return the bounding box of a mask's largest component, (4,) float64 XYXY, half-open; None for an empty mask.

    Args:
        mask: (h, w) bool. Pixels of a component are connected by their sides.
    """
    labels, count = ndimage.label(mask)
    if not count:
        return None
    largest = 1 + int(np.bincount(labels.ravel())[1:].argmax())
    rows, columns = ndimage.find_objects(labels)[largest - 1]
    return np.array([columns.start, rows.start, columns.stop, rows.stop], float)
