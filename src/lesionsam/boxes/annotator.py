"""Simulated annotator: two boxes per lesion drawn from its mask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from lesionsam.boxes.table import sample_of
from lesionsam.errors import UserError
from lesionsam.types import Sample
from lesionsam.utils.images import read_mask
from lesionsam.utils.progress import progress
from lesionsam.utils.random import keyed_rng

# As in presets/demo.yaml: of boxes simulated outside a run's parameters.
SIMULATED: dict[str, Any] = {"margin": (0.10, 0.20), "core": (0.45, 0.55), "jitter": 0.03, "min_area": 16}


def simulate_boxes(
    mask: np.ndarray,
    rng: np.random.Generator,
    *,
    margin: tuple[float, float],
    core: tuple[float, float],
    jitter: float,
    min_area: int,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Draw an annotator's two boxes from a mask.

    Big box: the bounding box of every component of at least `min_area` pixels, width and height times
    1 + U(margin) about a centre moved by up to `jitter` of the side; it always holds the whole lesion and is cut at the
    frame. Small box: U(core) times the extent of the largest component, centred near its deepest point (the pixel
    farthest from background and frame), shrunk until it lies wholly on that component, so that a lesion in fragments
    has its core in the largest one and a lesion cut by the frame keeps its core off the edge.

    Args:
        mask: (H, W) bool. rng: source of every draw.
    Returns:
        (big_box, small_box), each (4,) float64 XYXY pixels, or None where no component reaches `min_area`.
    """
    labels, count = ndimage.label(mask)
    sizes = np.bincount(labels.ravel(), minlength=1)
    kept = np.flatnonzero(sizes[1:] >= min_area) + 1
    if count == 0 or len(kept) == 0:
        return None
    objects = ndimage.find_objects(labels)
    low = np.array([min(objects[k - 1][1].start for k in kept), min(objects[k - 1][0].start for k in kept)], float)
    high = np.array([max(objects[k - 1][1].stop for k in kept), max(objects[k - 1][0].stop for k in kept)], float)
    side = high - low
    centre = (low + high) / 2 + side * rng.uniform(-jitter, jitter, 2)
    half = side * (1 + rng.uniform(*margin)) / 2
    frame = np.array([mask.shape[1], mask.shape[0]], float)
    big = np.concatenate(
        [np.clip(np.minimum(centre - half, low), 0, frame), np.clip(np.maximum(centre + half, high), 0, frame)]
    )
    largest = int(sizes[1:].argmax()) + 1
    small = _core_inside(labels == largest, objects[largest - 1], rng, core, jitter)
    return big, small


def _core_inside(
    component: np.ndarray,
    where: tuple[slice, slice],
    rng: np.random.Generator,
    core: tuple[float, float],
    jitter: float,
) -> np.ndarray:
    """Return a small box, (4,) XYXY, that lies on the component whose bounding box is `where` (rows, columns)."""
    rows, columns = where
    lesion = np.pad(component[where], 1)  # beyond the frame counts as background
    depth = ndimage.distance_transform_edt(lesion)
    row, column = np.unravel_index(int(np.argmax(depth)), depth.shape)
    extent = np.array([columns.stop - columns.start, rows.stop - rows.start], float)
    total = np.pad(lesion.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # integral image
    deepest = np.array([column + 0.5, row + 0.5])
    offset, half = extent * rng.uniform(-jitter, jitter, 2), extent * rng.uniform(*core) / 2
    shift = np.array([columns.start - 1, rows.start - 1], float)
    while (half > 0.5).all():
        low, high = deepest + offset - half, deepest + offset + half
        x0, y0 = np.floor(low).astype(int)
        x1, y1 = np.ceil(high).astype(int)
        if x0 >= 0 and y0 >= 0 and x1 <= lesion.shape[1] and y1 <= lesion.shape[0]:
            covered = total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]
            if covered == (x1 - x0) * (y1 - y0):
                return np.concatenate([low + shift, high + shift])
        offset, half = offset * 0.93, half * 0.93
    return np.concatenate([deepest - 0.5 + shift, deepest + 0.5 + shift])


def annotator_rng(seed: int, image_id: str, lesion_id: str = "0") -> np.random.Generator:
    """Return the generator of the simulated annotator's draws for one lesion."""
    return keyed_rng(f"{seed}|{image_id}" + (f"|{lesion_id}" if lesion_id != "0" else ""))


def annotate(
    index: Mapping[str, Mapping[str, object]],
    *,
    root: Path,
    seed: int,
    margin: tuple[float, float],
    core: tuple[float, float],
    jitter: float,
    min_area: int,
) -> list[Sample]:
    """Simulate the annotator over a whole index: one lesion per mask.

    Draws depend on (seed, image_id, lesion_id) alone, so that a lesion keeps its boxes whatever else the set holds.
    Where lesions have masks of their own, those below `min_area` pixels are skipped.

    Raises:
        UserError: an image without a mask, or an image's one mask without a lesion of `min_area` pixels.
    """
    samples = []
    for image_id, entry in progress(index.items(), total=len(index), title="annotating"):
        own = entry.get("lesions")
        masks = dict(own) if isinstance(own, Mapping) else {"0": str(entry.get("mask_path") or "")}
        for lesion_id, mask_path in masks.items():
            if not mask_path:
                raise UserError(
                    f"{entry['image_path']}: has no mask to simulate an annotator from; add masks for every image, or "
                    "give your own boxes (boxes.source: csv)"
                )
            width, height = int(str(entry["width"])), int(str(entry["height"]))
            mask = read_mask(root / mask_path, (width, height))
            rng = annotator_rng(seed, image_id, lesion_id)
            boxes = simulate_boxes(mask, rng, margin=margin, core=core, jitter=jitter, min_area=min_area)
            if boxes is None and own is not None:
                continue
            if boxes is None:
                raise UserError(
                    f"{mask_path}: no lesion of at least {min_area} pixels (boxes.min_area); the mask has "
                    f"{int(mask.sum())} foreground pixels: remove image and mask, or correct the mask"
                )
            samples.append(sample_of(image_id, lesion_id, entry, root, *boxes))
    return samples
