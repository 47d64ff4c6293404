"""The same lesion seen from farther away: the frame's shorter side extended by its own mirror image, then resized.

Training images are often cropped about the lesion, while a camera's whole frame, of another aspect ratio, holds the
same lesion smaller. Nothing of the surroundings is known, so they are mirrored; where the mirror shows the lesion or
another one again, nothing is asked of the model.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from lesionsam.boxes.geometry import inside
from lesionsam.boxes.prior import OUTSIDE

EXTENSION = 0.5  # share by which the shorter side grows: a square becomes the 3:2 of most cameras


def resize(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) or (H, W, 3) -> (height, width[, 3]), antialiased bilinear, in grid's dtype (integers are rounded)."""
    if grid.dtype == np.uint8:
        return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR))
    large = Image.fromarray(grid.astype(np.float32))
    small = np.asarray(large.resize((width, height), Image.Resampling.BILINEAR))
    return np.round(small).astype(grid.dtype) if np.issubdtype(grid.dtype, np.integer) else small


def widen(
    image: np.ndarray,
    prior: np.ndarray,
    mask: np.ndarray,
    valid: np.ndarray,
    size: tuple[int, int],
    boxes: tuple[np.ndarray, np.ndarray],
    *,
    prior_scale: float,
    unknown: int,
) -> tuple[tuple[np.ndarray, ...], tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Extend the image part of a padded frame by mirroring and fit it into the frame again.

    Args:
        image: (S, S, 3) uint8. prior: (S, S) int8, logits times `prior_scale`. mask: (S, S) uint8, 1 lesion, 0 not,
            `unknown` everywhere where there is none. valid: (S, S) bool.
        size: height and width of the image part. boxes: big and small, (4,) XYXY each.
    Returns:
        The four grids, the new (height, width) of the image part, and the two boxes, float32.
    """
    height, width = size
    side = image.shape[0]
    pad = round(min(height, width) * EXTENSION / 2)
    rows, columns = (pad, 0) if height < width else (0, pad)
    around = ((rows, rows), (columns, columns))
    scale = side / (max(height + 2 * rows, width + 2 * columns))
    new = (max(1, round((height + 2 * rows) * scale)), max(1, round((width + 2 * columns) * scale)))
    shown = np.pad(inside(boxes[0], (height, width)), around, mode="reflect")
    shown[rows : rows + height, columns : columns + width] = False  # only the lesion's mirror image
    known = np.pad(valid[:height, :width], around, mode="reflect") & ~shown
    lowest = np.int8(OUTSIDE * prior_scale)
    parts = (
        np.pad(image[:height, :width], (*around, (0, 0)), mode="reflect"),
        np.pad(prior[:height, :width], around, constant_values=lowest),
        np.pad(mask[:height, :width], around) * np.uint8(255),
        known.astype(np.uint8) * np.uint8(255),
    )
    small = [resize(part, *new) for part in parts]
    small[2], small[3] = (small[2] > 127).astype(np.uint8), small[3] > 127
    grids = []
    for part, fill in zip(small, (0, lowest, 0, False), strict=True):
        frame = np.full((side, side, *part.shape[2:]), fill, part.dtype)
        frame[: new[0], : new[1]] = part
        grids.append(frame)
    if mask[0, 0] == unknown:
        grids[2][:] = unknown
    shift = np.array([columns, rows, columns, rows], np.float32)
    ratio = np.array([new[1] / (width + 2 * columns), new[0] / (height + 2 * rows)] * 2, np.float32)
    return tuple(grids), new, ((boxes[0] + shift) * ratio, (boxes[1] + shift) * ratio)
