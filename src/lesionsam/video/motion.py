"""Follow a patch of a picture: shift, turn and scale between frames, by inverse compositional alignment.

Baker and Matthews 2004, "Lucas-Kanade 20 years on", with a similarity as warp. Patches are compared after taking out
their mean and spread, so that brightness and contrast may change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

LEVELS = (16, 48)  # samples along a side of the patch, coarse to fine
STEPS = 20  # of a level at most
DONE = 1e-3  # step, in half sides of the patch, below which a level is done
MIN_VISIBLE = 0.1  # share of the patch inside the frame that an alignment needs
MIN_CONTRAST = 0.3  # least spread of what a patch is found in, in its own
MAX_SCALE = 1.6  # largest change of size in one alignment
FLAT = 1.0  # least spread that a patch is taken to have: grey levels of 255
GREY = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Patch:
    """A square patch of a frame, sampled at each of `LEVELS`, mean 0 and spread 1 over `seen`.

    Attributes:
        matrix: (3, 3), patch coordinates in [-1, 1] -> pixels of the frame that it was taken from.
        spread: standard deviation of the finest level, grey levels.
        values: per level (P, P) float32. seen: per level (P, P) bool, inside that frame.
    """

    matrix: np.ndarray
    spread: float
    values: tuple[np.ndarray, ...]
    seen: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Alignment:
    """Where a patch lies in another frame.

    Attributes:
        matrix: (3, 3), patch coordinates -> pixels of that frame. correlation: with the patch, -1 to 1; -1 where too
            little is visible, or too little contrast, or the size is another.
        visible: share of the patch inside the frame.
    """

    matrix: np.ndarray
    correlation: float
    visible: float


def grey(image: np.ndarray) -> np.ndarray:
    """Return the luminance of (H, W, 3) uint8 RGB as (H, W) float32."""
    return image.astype(np.float32) @ GREY


def take_patch(picture: np.ndarray, box: np.ndarray) -> Patch:
    """Take the square patch around a (4,) XYXY box from a (H, W) grey picture; its side is the box's longer one."""
    half = max(box[2:] - box[:2]) / 2
    matrix = np.array([[half, 0, (box[0] + box[2]) / 2], [0, half, (box[1] + box[3]) / 2], [0, 0, 1.0]])
    sampled = [_sample(picture, matrix, count) for count in LEVELS]
    values = tuple(_standardised(values, seen) for values, seen in sampled)
    spread = float(sampled[-1][0][sampled[-1][1]].std()) if sampled[-1][1].any() else 0.0
    return Patch(matrix, spread, values, tuple(seen for _, seen in sampled))


def align(patch: Patch, picture: np.ndarray, start: np.ndarray) -> Alignment:
    """Find a patch in a (H, W) grey picture, beginning at the (3, 3) matrix `start`."""
    matrix = start
    correlation, visible, spread = -1.0, 0.0, 0.0
    for count, values, known in zip(LEVELS, patch.values, patch.seen, strict=True):
        jacobian = _jacobian(values)
        blurred, origin = _blurred(picture, matrix, count)
        for step in range(STEPS + 1):
            current, inside = _sample_blurred(blurred, origin, matrix, count)
            seen = inside & known
            visible = float(inside.mean())
            if seen.mean() < MIN_VISIBLE:
                return Alignment(matrix, -1.0, visible)
            spread = float(current[seen].std())
            target, current = _standardised(values, seen), _standardised(current, seen)
            correlation = float((target * current)[seen].mean())
            if step == STEPS:
                break
            columns = jacobian[seen]
            normal = columns.T @ columns + 1e-3 * len(columns) * np.eye(4)
            a, b, x, y = np.clip(np.linalg.solve(normal, columns.T @ (current - target)[seen]), -0.3, 0.3)
            matrix = matrix @ np.linalg.inv(np.array([[1 + a, -b, x], [b, 1 + a, y], [0, 0, 1]]))
            if max(abs(a), abs(b), abs(x), abs(y)) < DONE:
                break
    if spread < MIN_CONTRAST * patch.spread or abs(np.log(_half_side(matrix) / _half_side(start))) > np.log(MAX_SCALE):
        correlation = -1.0  # a patch of noise can be found in any flat area
    return Alignment(matrix, correlation, visible)


def _half_side(matrix: np.ndarray) -> float:
    """Return half the side of a patch, pixels."""
    return float(np.hypot(*matrix[:2, 0]))


def _grid(count: int) -> np.ndarray:
    """Return (3, P * P) homogeneous patch coordinates of the samples' centres."""
    places = (np.arange(count) + 0.5) / count * 2 - 1
    x, y = np.meshgrid(places, places)
    return np.stack([x.ravel(), y.ravel(), np.ones(count * count)])


def _sample(picture: np.ndarray, matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (P, P) values of a picture, smoothed to the samples' spacing, and which of them lie inside it."""
    return _sample_blurred(*_blurred(picture, matrix, count), matrix, count)


def _blurred(picture: np.ndarray, matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth the surroundings of a patch; return them with (2,) XY of their first pixel and the picture's limits."""
    half = _half_side(matrix)
    reach = 2.5 * half
    height, width = picture.shape
    x0, y0 = (int(np.clip(matrix[axis, 2] - reach, 0, length - 1)) for axis, length in ((0, width), (1, height)))
    x1, y1 = (int(np.clip(matrix[axis, 2] + reach + 1, 1, length)) for axis, length in ((0, width), (1, height)))
    part = picture[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
    return ndimage.gaussian_filter(part, 0.6 * 2 * half / count, truncate=2.5), np.array([x0, y0, width, height])


def _sample_blurred(
    blurred: np.ndarray, origin: np.ndarray, matrix: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    x, y, _ = matrix @ _grid(count)
    values = ndimage.map_coordinates(blurred, [y - 0.5 - origin[1], x - 0.5 - origin[0]], order=1, mode="nearest")
    inside = (x >= 0) & (y >= 0) & (x < origin[2]) & (y < origin[3])
    return values.reshape(count, count), inside.reshape(count, count)


def _standardised(values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    known = values[seen] if seen.any() else values
    return (values - known.mean()) / max(float(known.std()), FLAT)


def _jacobian(values: np.ndarray) -> np.ndarray:
    """Return (P, P, 4), the derivatives of a patch by the warp's scale, turn and shift, in patch coordinates."""
    count = len(values)
    down, right = (gradient * count / 2 for gradient in np.gradient(values))
    x, y, _ = _grid(count).reshape(3, count, count)
    return np.stack([right * x + down * y, down * x - right * y, right, down], -1)
