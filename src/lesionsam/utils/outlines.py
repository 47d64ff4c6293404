"""Trace the outlines of masks, large ones strip by strip to save memory."""

from __future__ import annotations

import numpy as np
from skimage.measure import approximate_polygon, find_contours

from lesionsam.metrics import bounding_box

TOLERANCE = 0.35  # pixels by which a simplified outline may leave the traced one
STRIP_PIXELS = 1 << 24  # traced at once: skimage takes eight bytes for each


def outline_rings(mask: np.ndarray, *, strip_pixels: int = STRIP_PIXELS) -> list[np.ndarray]:
    """Return the outlines of an (H, W) bool mask, midway between its pixels and others and along the frame.

    Returns:
        closed rings, (N, 2) float64 XY in pixels, half-open frame, simplified to `TOLERANCE`; around the mask clockwise
        as seen on the screen, around holes the other way.
    """
    box = bounding_box(mask)
    if box is None:
        return []
    x0, y0, x1, y1 = box.astype(int)
    padded = np.pad(mask[y0:y1, x0:x1], 1)
    rows = max(1, strip_pixels // padded.shape[1])
    rings: list[np.ndarray] = []
    open_from: dict[tuple[float, float], np.ndarray] = {}  # first point -> path that a strip's border cuts
    for top in range(0, len(padded) - 1, rows):
        for path in find_contours(padded[top : top + rows + 1].astype(float), 0.5):
            path[:, 0] += top
            if np.array_equal(path[0], path[-1]):
                rings.append(path)
            else:
                open_from[tuple(path[0])] = path
    rings += _joined(open_from)
    limits = np.array(mask.shape[::-1], float)
    simple = (approximate_polygon(ring, TOLERANCE)[:, ::-1] for ring in rings)
    return [np.clip(ring - 0.5 + [x0, y0], 0, limits) for ring in simple]


def _joined(open_from: dict[tuple[float, float], np.ndarray]) -> list[np.ndarray]:
    """Join paths, each of which ends where another or itself begins, to closed rings; empties the mapping."""
    rings = []
    while open_from:
        start, path = open_from.popitem()
        parts = [path]
        while tuple(parts[-1][-1]) != start:
            parts.append(open_from.pop(tuple(parts[-1][-1])))
        rings.append(np.concatenate([path, *(part[1:] for part in parts[1:])]))
    return rings
