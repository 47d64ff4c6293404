"""Convert masks to polygons with holes and to GeoJSON features (RFC 7946), in pixels with y downwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from skimage.measure import points_in_poly

from lesionsam.utils.outlines import outline_rings

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
    traced = (ring for ring in outline_rings(mask) if len(ring) > 3)
    rings = sorted(traced, key=lambda ring: -abs(signed_area(ring)))
    outer = [ring for ring in rings if signed_area(ring) > 0]
    holes = [ring for ring in rings if signed_area(ring) < 0]
    polygons: list[Polygon] = [[ring] for ring in outer]
    for hole in holes:
        around = [k for k, ring in enumerate(outer) if points_in_poly(hole[:1], ring)[0]]
        if around:
            polygons[around[-1]].append(hole)  # the smallest of those that hold it
    return polygons


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
