"""Convert masks to polygons with holes and to GeoJSON features (RFC 7946), in pixels with y downwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from skimage.measure import approximate_polygon, find_contours, points_in_poly

TOLERANCE = 0.35  # pixels by which a simplified outline may leave the traced one

Ring = np.ndarray  # (N, 2) float64 XY, closed: the last point is the first
Polygon = list[Ring]  # the outer ring, then its holes


def polygons_of(mask: np.ndarray) -> list[Polygon]:
    """Return the polygons of a mask, the largest first; they follow the frame where it cuts the mask.

    The outline runs midway between pixels of the mask and others, so that a lone pixel is a small diamond.

    Args:
        mask: (H, W) bool.
    Returns:
        rings in pixels, half-open frame: outer rings run clockwise as seen on the screen, holes the other way.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if rows.size == 0:
        return []
    shift = np.array([columns[0], rows[0]], float)
    crop = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32), 1)
    traced = [approximate_polygon(ring, TOLERANCE)[:, ::-1] for ring in find_contours(crop, 0.5)]
    rings = sorted((ring for ring in traced if len(ring) > 3), key=lambda ring: -abs(signed_area(ring)))
    # skimage traces with the higher values on one side: round the mask one way, round a hole the other.
    outer = [ring for ring in rings if signed_area(ring) > 0]
    holes = [ring for ring in rings if signed_area(ring) < 0]
    polygons: list[Polygon] = [[ring] for ring in outer]
    for hole in holes:
        around = [k for k, ring in enumerate(outer) if points_in_poly(hole[:1], ring)[0]]
        if around:
            polygons[around[-1]].append(hole)  # the smallest of those that hold it
    limits = np.array([mask.shape[1], mask.shape[0]], float)

    return [[np.clip(ring - 0.5 + shift, 0, limits) for ring in polygon] for polygon in polygons]


def signed_area(ring: Ring) -> float:
    """Return the area of a closed ring, pixels squared; positive if it runs clockwise with y pointing down."""
    x, y = ring[:, 0], ring[:, 1]
    return float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]) / 2)


def feature(mask: np.ndarray, properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mask as a GeoJSON feature: a MultiPolygon, to a tenth of a pixel."""
    coordinates = [[np.round(ring, 1).tolist() for ring in polygon] for polygon in polygons_of(mask)]
    return {
        "type": "Feature",
        "properties": dict(properties),
        "geometry": {"type": "MultiPolygon", "coordinates": coordinates},
    }
