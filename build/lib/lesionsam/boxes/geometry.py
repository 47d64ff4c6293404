"""Boxes as numbers: into the model's frame, onto pixels, jittered, loosened, of a mask's largest piece."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def model_frame_size(width: int, height: int, side: int) -> tuple[int, int]:
    """(height, width) that SAM's resize gives an image: longest side to `side`, rounded half up."""
    scale = side / max(width, height)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def to_model_frame(coordinates: np.ndarray, width: int, height: int, side: int) -> np.ndarray:
    """Original pixels to model frame: (..., 2k) XYXY... or XY coordinates scaled as SAM's ResizeLongestSide does."""
    new_height, new_width = model_frame_size(width, height, side)
    factors = np.resize(np.array([new_width / width, new_height / height]), coordinates.shape[-1])
    return coordinates * factors


def inside(box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centre lies in a box: box (4,) XYXY, shape (H, W) -> (H, W) bool."""
    rows, columns = np.arange(shape[0]) + 0.5, np.arange(shape[1]) + 0.5
    return ((rows >= box[1]) & (rows < box[3]))[:, None] & ((columns >= box[0]) & (columns < box[2]))[None]


def box_slices(box: np.ndarray, shape: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the pixels whose centres lie in a (4,) XYXY box; at least one pixel of the (H, W) frame."""
    out = []
    for low, high, length in ((box[1], box[3], shape[0]), (box[0], box[2], shape[1])):
        start = int(np.clip(np.ceil(low - 0.5), 0, length - 1))
        out.append(slice(start, int(np.clip(np.ceil(high - 0.5), start + 1, length))))
    return out[0], out[1]


def _moved(box: np.ndarray, draw: np.ndarray, limits: np.ndarray) -> np.ndarray:
    side = box[2:] - box[:2]
    centre = np.clip((box[:2] + box[2:]) / 2 + side * draw[:2], limits[:2] + 0.5, limits[2:] - 0.5)
    half = np.maximum(side * (1 + draw[2:]) / 2, 0.5)
    return np.concatenate([np.maximum(centre - half, limits[:2]), np.minimum(centre + half, limits[2:])])


def largest_piece_box(mask: np.ndarray) -> np.ndarray | None:
    """(4,) float64 XYXY, half-open, of a mask's largest piece (pixels that share a side); None of an empty mask.

    Args:
        mask: (h, w) bool.
    """
    pieces, count = ndimage.label(mask)
    if not count:
        return None
    largest = 1 + int(np.bincount(pieces.ravel())[1:].argmax())
    rows, columns = ndimage.find_objects(pieces)[largest - 1]
    return np.array([columns.start, rows.start, columns.stop, rows.stop], float)


def loosened(box: np.ndarray, share: float, size: tuple[int, int]) -> np.ndarray:
    """A (4,) XYXY box with sides 1 + `share` times as long about the same middle, cut at a frame of size (h, w)."""
    middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * (1 + share)
    limits = np.array(size[::-1], float)
    return np.concatenate([np.clip(middle - half, 0, limits), np.clip(middle + half, 0, limits)])
