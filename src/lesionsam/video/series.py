"""`lesionsam series`: one lesion in pictures months apart: registration, and change of area with an interval.

The interval says how much the result depends on how the boxes were drawn, and on nothing else. It is no diagnosis.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from skimage.transform import warp

from lesionsam.boxes.geometry import jitter_box
from lesionsam.errors import UserError
from lesionsam.inference.arguments import Source, find_images
from lesionsam.inference.jobs import plan
from lesionsam.inference.outputs import make_folder
from lesionsam.models.checkpoint import load_sam
from lesionsam.models.sam import Sam
from lesionsam.overlays import overlay, write_png
from lesionsam.utils.files import atomic_write
from lesionsam.utils.images import read_image
from lesionsam.utils.random import keyed_rng
from lesionsam.utils.weights import find_weights
from lesionsam.video.crops import decode_crop
from lesionsam.video.registration import Registration, register

JITTER = 0.1  # share of its side by which a box's sides and centre change
NUM_JITTERED = 20  # decodings of each picture beside the given box's
LEVEL = 0.95  # of the interval
TABLE = "series.csv"
COLUMNS = (
    "image_id",
    "area",
    "change",
    "change_low",
    "change_high",
    "registered",
    "angle",
    "shift_x",
    "shift_y",
    "scale",
    "residual",
    "matches",
)


@dataclass(frozen=True)
class Measured:
    """A lesion in one picture: its mask, (H, W) bool, and its areas with jittered boxes, pixels."""

    mask: np.ndarray
    areas: np.ndarray


@dataclass(frozen=True)
class Change:
    """The area of a later picture over that of the earlier one, minus 1, with the limits of its interval."""

    value: float
    low: float
    high: float


def measure(sam: Sam, image: np.ndarray, box: np.ndarray, key: str) -> Measured:
    """Decode a box and `NUM_JITTERED` boxes near it.

    Args:
        image: (H, W, 3) uint8 RGB. box: (4,) XYXY. key: draws the jitter.
    """
    shape = (image.shape[0], image.shape[1])
    limits = np.array([0, 0, shape[1], shape[0]], float)
    draws = keyed_rng(f"series|{key}").uniform(-JITTER, JITTER, (NUM_JITTERED, 4))
    boxes = [box, *(jitter_box(box, draw, limits) for draw in draws)]
    masks = [decode_crop(sam, image, each).mask(shape, sam.frame) for each in boxes]
    return Measured(masks[0], np.array([np.count_nonzero(mask) for mask in masks], float))


def area_change(first: Measured, later: Measured, scale: float = 1.0) -> Change:
    """Return the change of area; NaN where a mask is empty.

    The limits are quantiles of the ratio over all pairs of jittered boxes of the two pictures.

    Args:
        scale: pixels of the first picture per pixel of the later one.
    """
    if not first.areas.all() or not later.areas.all():
        return Change(math.nan, math.nan, math.nan)
    ratios = scale**2 * later.areas[None] / first.areas[:, None]
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = float(ratios[0, 0])
    return Change(value - 1, min(float(low), value) - 1, max(float(high), value) - 1)


def compare_series(
    images: Sequence[str | Path],
    *,
    boxes: Path,
    model: Path,
    out: Path,
    any_scale: bool = False,
    device: torch.device | str = "cpu",
) -> int:
    """Compare pictures of one lesion, each later one with the first.

    Writes series.csv and, for each later picture, its registered overlay.

    Args:
        images: files in the order of time, at least two. boxes: two-box CSV with one row for each, by image_id.
        model: weights of any SAM. any_scale: the magnification may differ; areas are brought to the first picture's.
    Returns:
        exit code: 0, or 1 if a picture could not be registered.
    Raises:
        UserError: fewer than two pictures, one without a box or with several, weights that cannot be used.
    """
    paths, problems = find_images(images)
    jobs, unmatched, _ = plan(paths, Source("boxes", boxes))
    if problems or unmatched:
        raise UserError((problems + unmatched)[0])
    if len(jobs) < 2:
        raise UserError(f"expected at least two pictures of the lesion, in the order of time, got {len(jobs)}")
    several = [job.image_id for job in jobs if len(job.lesions) != 1]
    if several:
        raise UserError(f"{boxes}: {several[0]} has several rows; a series is of one lesion, give one row a picture")
    sam = load_sam(None, find_weights(model)).to(device).eval()
    make_folder(out)
    first_image, first = np.zeros((0, 0, 3), np.uint8), Measured(np.zeros((0, 0), bool), np.zeros(0))
    rows, num_failed = [], 0
    for number, job in enumerate(jobs):
        image = read_image(job.path)
        try:
            prompt = job.lesions[0].prompt(image.shape[1], image.shape[0], Source("boxes", boxes))
        except ValueError as error:
            raise UserError(f"{boxes}: {error}") from None
        measured = measure(sam, image, np.asarray(prompt.big_box), job.image_id)
        if number == 0:
            first_image, first = image, measured
            rows.append(_row(job.image_id, measured, Change(0.0, 0.0, 0.0), None))
            continue
        found = register(first_image, image, (first.mask, measured.mask), any_scale=any_scale)
        if found is None:
            num_failed += 1
            print(
                f"error: {job.path}: too few places of its skin are found in {jobs[0].path.name}; its area is compared "
                "as if the magnification were the same",
                file=sys.stderr,
            )
        else:
            picture = registered_overlay(first_image, first.mask, image, measured.mask, found)
            write_png(out / f"{job.image_id}.png", picture)
        change = area_change(first, measured, 1.0 if found is None else found.scale)
        rows.append(_row(job.image_id, measured, change, found))
        print(
            f"{job.image_id}: area {change.value:+.1%} since {jobs[0].image_id} ({change.low:+.1%} to "
            f"{change.high:+.1%} with boxes moved by up to {JITTER:.0%})"
        )
    with atomic_write(out / TABLE, "w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {out / TABLE}. A change of area is no diagnosis: light, pressure and the boxes change it too.")
    return 1 if num_failed else 0


def registered_overlay(
    earlier: np.ndarray, earlier_mask: np.ndarray, later: np.ndarray, later_mask: np.ndarray, found: Registration
) -> np.ndarray:
    """Draw both outlines on the earlier picture and on the later one brought to it, side by side."""
    inverse, shape = np.linalg.inv(found.matrix), earlier.shape[:2]
    centred = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # pixels' centres, from and to their corners
    inverse = np.linalg.inv(centred) @ inverse @ centred
    moved = (warp(later / 255.0, inverse, output_shape=shape) * 255 + 0.5).astype(np.uint8)
    mask = warp(later_mask.astype(float), inverse, output_shape=shape) > 0.5
    pictures = [
        overlay(image, truth=earlier_mask, prediction=mask, caption=caption)
        for image, caption in ((earlier, "earlier"), (moved, "later, registered; blue: earlier, yellow: later"))
    ]
    height = min(picture.shape[0] for picture in pictures)
    return np.concatenate([picture[:height] for picture in pictures], 1)


def _row(image_id: str, measured: Measured, change: Change, found: Registration | None) -> dict[str, object]:
    area = int(measured.areas[0])
    values: list[object] = [image_id, area, *(f"{each:.4f}" for each in (change.value, change.low, change.high))]
    if found is None:
        values += [0, *[""] * 6]
    else:
        numbers = (found.angle, found.matrix[0, 2], found.matrix[1, 2], found.scale, found.residual)
        values += [1, *(f"{each:.3f}" for each in numbers), found.num_matches]
    return dict(zip(COLUMNS, values, strict=True))
