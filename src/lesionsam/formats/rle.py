"""Decode and encode masks as COCO holds them: polygons, run lengths as a list or as text. Wraps pycocotools.

Runs count background and lesion in turn, beginning with background, down each column from the left one on. As text
each run is written in 5 bits a character (from "0" on, bit 6 says that more follow), from the fourth run on as the
difference to the run two before (Lin et al. 2014, arXiv:1405.0312, and its tools). Files are decoded here rather than
by the tools' C code, which does not check that the runs fit the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lesionsam.metrics import bounding_box

POLYGON_TOLERANCE = 1.0  # pixels by which a polygon may leave the image; tools round differently


def decode(segmentation: object, height: int, width: int) -> np.ndarray:
    """Decode a COCO segmentation to (H, W) bool.

    Args:
        segmentation: a list of polygons [x0, y0, x1, y1, ...], or {"size": [height, width], "counts": list or text}.
    Raises:
        ValueError: says what was expected and what came.
    """
    if isinstance(segmentation, dict):
        return from_runs(_runs(segmentation, height, width), height, width)
    if isinstance(segmentation, list):
        return _from_polygons(segmentation, height, width)
    raise ValueError(f"segmentation: expected polygons or RLE, got {_kind(segmentation)}")


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Return (H, W) bool as run lengths in text form, as COCO's own results have them; ready for JSON."""
    from pycocotools import mask as coco

    height, width = mask.shape
    # `coco.encode` would allocate four bytes a pixel for the runs.
    runs: Any = {"size": [height, width], "counts": runs_of(mask)}
    encoded: Any = coco.frPyObjects(runs, height, width)
    return {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def runs_of(mask: np.ndarray) -> list[int]:
    """Return (H, W) bool as a list of run lengths."""
    flat = np.asarray(mask, bool).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *runs] if flat.size and flat[0] else runs


def _kind(value: object) -> str:
    return {type(None): "nothing", str: "text", int: "a number", float: "a number"}.get(type(value), "something else")


def _runs(rle: dict[str, Any], height: int, width: int) -> np.ndarray:
    if "counts" not in rle or "size" not in rle:
        raise ValueError(f"RLE: expected size and counts, got {', '.join(map(str, sorted(rle)[:6])) or 'neither'}")
    size, counts = rle["size"], rle["counts"]
    if size != [height, width]:
        raise ValueError(f"RLE: size (height, width) is {size}; expected {[height, width]} as its image")
    if isinstance(counts, str):
        runs = _from_text(counts)
    elif isinstance(counts, list):
        if any(isinstance(run, bool) or not isinstance(run, int) for run in counts):
            raise ValueError("RLE: expected whole numbers as counts")
        runs = counts
    else:
        raise ValueError(f"RLE: expected counts as a list or as text, got {_kind(counts)}")
    if any(run < 0 for run in runs):
        raise ValueError(f"RLE: a run of {min(runs)} pixels; expected none below 0")
    if sum(runs) != height * width:
        raise ValueError(f"RLE: the runs cover {sum(runs)} pixels; expected {height * width} = {width}x{height}")
    return np.array(runs, np.int64)


def _from_text(text: str) -> list[int]:
    runs: list[int] = []
    value, shift = 0, 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise ValueError(f"RLE: the character {character!r} is none of the compressed form")
        value |= (code & 31) << shift
        shift += 5
        if shift > 60:
            raise ValueError("RLE: a run too long for any image")
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    if shift:
        raise ValueError("RLE: the text ends in the middle of a run")
    return runs


def from_runs(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return (H, W) bool of an array of run lengths, see `runs_of`."""
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def _from_polygons(polygons: list, height: int, width: int) -> np.ndarray:
    from pycocotools import mask as coco

    if not polygons:
        raise ValueError("segmentation: empty; expected polygons or RLE")
    points = [_points(polygon) for polygon in polygons]
    low = min(float(part.min()) for part in points)
    right, bottom = (max(float(part[:, axis].max()) for part in points) for axis in (0, 1))
    excess = max(-low, right - width, bottom - height)
    if excess > POLYGON_TOLERANCE:
        raise ValueError(
            f"polygon: leaves the image of {width}x{height} px by {excess:.1f} px; cut it at the frame or "
            "correct the image's size"
        )
    limits = np.array([width, height], float)
    flat = [np.clip(part, 0, limits).ravel().tolist() for part in points]
    drawn: Any = coco.merge(coco.frPyObjects(flat, height, width))
    return from_runs(np.array(_from_text(drawn["counts"].decode("ascii")), np.int64), height, width)


def _points(polygon: Any) -> np.ndarray:
    if not isinstance(polygon, list) or any(isinstance(v, bool) or not isinstance(v, int | float) for v in polygon):
        raise ValueError("polygon: expected a list of numbers x0, y0, x1, y1, ...")
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError(f"polygon: {len(polygon)} numbers; expected x and y of at least 3 points")
    points = np.array(polygon, float).reshape(-1, 2)
    if not np.isfinite(points).all():
        raise ValueError("polygon: expected finite numbers")
    return points


def mask_box(mask: np.ndarray) -> np.ndarray:
    """Return the bounding box of an (H, W) bool mask, (4,) float64 XYXY, half-open; ValueError if it is empty."""
    box = bounding_box(mask)
    if box is None:
        raise ValueError("its mask is empty; remove it")
    return box


def polygon_box(polygons: Sequence[Any]) -> np.ndarray:
    """Return the bounding box of polygons [x0, y0, ...], (4,) float64 XYXY; ValueError if they are malformed."""
    points = np.concatenate([_points(polygon) for polygon in polygons])
    return np.concatenate([points.min(0), points.max(0)])
