"""Find where a data set's outlines lie between core and big box: told how loose the boxes are, or by colour.

The box prior's shape term assumes big boxes 15 % too large. `find_outline` corrects this for a whole data set. With a
looseness told, one offset does: see `prior.outline_offset`. With none, the radius at which colour changes says how
large the lesions are inside their boxes. It is the elliptical radius that splits an image's colour scores best
(Otsu 1979, doi:10.1109/TSMC.1979.4310076), in the median over the data set; experts draw somewhat outside it. Both
constants below were chosen on development images and generated ones at four loosenesses (docs/log.md, 2026-11-30).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lesionsam.boxes.geometry import pixels_inside
from lesionsam.boxes.prior import (
    CORE,
    OFFSETS,
    SHAPE_TIGHTNESS,
    SHAPE_WEIGHT,
    elliptical_radius,
    is_cut,
    outline_offset,
)

OUTLINE = "outline"  # metadata of a weights file: offset and tightness, parted by a blank
EDGE_SHARE = 0.739  # tightness times radius of the colour edge
FOUND_OFFSET = 0.15  # logits; outlines drawn as generously as those of the development images want .2, exact ones .1
RADII = np.linspace(0.15, 1.15, 41)
LIKELY_TIGHTNESS = (0.85, 1.8)  # of boxes that are 0 to 100 % too large; at 80 % 1.5
FEW_BOXES = 20
LEAST_COLOUR = 0.2  # greatest colour score of an image below which it is taken for one without colours


@dataclass(frozen=True)
class Outline:
    """Correction of the box prior for a data set.

    Attributes:
        offset: logits added inside the big box.
        tightness: factor of the radius in the shape term; 1 for big boxes that are 15 % too large, more for looser.
        num_boxes: that it was found from; 0 for one that was not.
    """

    offset: float = 0.0
    tightness: float = 1.0
    num_boxes: int = field(default=0, compare=False)

    def shift(self, prior: np.ndarray, big_box: np.ndarray) -> np.ndarray:
        """Return a prior (H, W), logits, corrected inside its big box (4,) XYXY."""
        inside = pixels_inside(big_box, prior.shape)
        shift = self.offset + SHAPE_WEIGHT * SHAPE_TIGHTNESS * (1 - self.tightness) * elliptical_radius(
            big_box, prior.shape
        )
        return np.where(inside, prior + shift, prior).astype(np.float32)

    def doubts(self) -> list[str]:
        """Return what makes a correction that was found unlikely, one line each."""
        lines = []
        if not OFFSETS[0] < self.offset < OFFSETS[-1]:
            lines.append(
                f"outline offset {self.offset:+.2f} is at the end of its range; is method.target.looseness right? "
                "auto finds it by colour"
            )
        if not LIKELY_TIGHTNESS[0] < self.tightness < LIKELY_TIGHTNESS[1]:
            size = "smaller than the lesions" if self.tightness < 1 else "more than twice as long as the lesions"
            lines.append(f"by their colours the big boxes are {size}; look at them: lesionsam data check")
        if 0 < self.num_boxes < FEW_BOXES:
            lines.append(f"outline found from {self.num_boxes} boxes only; from {FEW_BOXES} on it is dependable")
        return lines

    def to_text(self) -> str:
        """Return offset and tightness for the metadata of a weights file."""
        return f"{self.offset:g} {self.tightness:g}"

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str]) -> Outline:
        """Return the outline that a weights file was trained with, or the one for boxes 15 % too large."""
        try:
            offset, tightness = map(float, metadata[OUTLINE].split())
        except (KeyError, ValueError):  # pretrained weights, or none of this project's
            return cls(FOUND_OFFSET)
        return cls(offset, tightness)

    def __str__(self) -> str:
        """Return what a person reads of it."""
        return f"outline offset {self.offset:+.2f}" + (
            "" if self.tightness == 1 else f", tightness {self.tightness:.2f}"
        )


def find_outline(
    priors: Sequence[np.ndarray],
    big_boxes: Sequence[np.ndarray],
    small_boxes: Sequence[np.ndarray],
    looseness: float | None,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Outline:
    """Find the correction for a data set from its boxes and images, without masks.

    Args:
        priors: logits of `prior.box_prior`, (H, W) each. big_boxes, small_boxes: (4,) each, pixels of its prior.
        looseness: share by which annotators draw the big box too large, on average; None: found by colour.
        sizes: (height, width) of the part of each prior that is image; the whole prior if None.
    """
    if looseness is not None:
        return Outline(outline_offset(priors, big_boxes, looseness, sizes), num_boxes=len(big_boxes))
    edges = []
    for k, (prior, big, small) in enumerate(zip(priors, big_boxes, small_boxes, strict=True)):
        if not is_cut(big, prior.shape if sizes is None else sizes[k]):
            edges.append(colour_edge(prior, big, small))
    found = [edge for edge in edges if not np.isnan(edge)]
    if not found:
        return Outline(FOUND_OFFSET)
    return Outline(FOUND_OFFSET, float(np.round(EDGE_SHARE / np.median(found), 3)), num_boxes=len(found))


def colour_edge(prior: np.ndarray, big_box: np.ndarray, small_box: np.ndarray) -> float:
    """Return the elliptical radius of the big box at which an image's colour changes most.

    Args:
        prior: (H, W) logits of `prior.box_prior`, whose shape term is taken off again. The core's mean colour score is
            1 and that of the band outside the big box -1, by the prior's definition.
    Returns:
        Of `RADII`; NaN for a prior without colours.
    """
    radius, inside = elliptical_radius(big_box, prior.shape), pixels_inside(big_box, prior.shape)
    colour = np.where(inside, prior - SHAPE_WEIGHT * (1 - radius * SHAPE_TIGHTNESS), -1.0)
    if np.abs(colour[inside]).max(initial=0) < LEAST_COLOUR:
        return float("nan")
    colour[pixels_inside(small_box, prior.shape) & (prior <= CORE)] = 1.0  # lifted to the core's least logit
    ring = np.rint((radius - RADII[0]) / (RADII[1] - RADII[0])).astype(int)
    within = (ring >= 0) & (ring < len(RADII))
    counts = np.bincount(ring[within], minlength=len(RADII)).cumsum()
    sums = np.bincount(ring[within], colour[within], len(RADII)).cumsum()
    inner, outer = counts[:-1], counts[-1] - counts[:-1]
    difference = sums[:-1] / np.maximum(inner, 1) - (sums[-1] - sums[:-1]) / np.maximum(outer, 1)
    return float(RADII[np.argmax(inner * outer * np.maximum(difference, 0) ** 2)])
