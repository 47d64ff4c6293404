"""Propose a lesion for an image without boxes: a mask from no prompt, its two boxes, and a doubt from 0 to 1.

The model is asked as `lesionsam predict --auto` asks it. The mask gets two boxes, drawn as an annotator would draw
them; model and box prior together answer them, and their mask gets boxes again. Doubt joins what the two say of the
final boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.color import rgb2lab

from lesionsam.annotation.assist import agreement, on_grid, prior_logits
from lesionsam.annotation.model import Features, Model
from lesionsam.annotation.records import Box, rounded
from lesionsam.boxes.annotator import simulate_boxes

BAND = 0.08  # width of the surroundings, share of the image's longer side
LOOSENESS = 0.25  # by which the proposed big box is larger than the mask: a lesion that sticks out costs a correction
CORE = 0.5  # of the mask's extent that the proposed core takes, shrunk until it lies inside
COLOUR_BLUR = 1.5  # pixels of the small picture
ROUNDS = 2  # of boxes and mask from each other


@dataclass(frozen=True)
class Proposed:
    """One proposed lesion.

    Attributes:
        big, small: boxes, pixels of the image. predicted_iou: the model's own of its mask.
        entropy: mean over the big box, nats. agreement: IoU of model and box prior. area: of the mask, share of the
        image. score: how the mask that it began as stands out from its surroundings, 0 to 1.
    """

    big: Box
    small: Box
    predicted_iou: float
    entropy: float
    agreement: float
    area: float
    score: float


def propose(model: Model, features: Features, picture: np.ndarray, size: tuple[int, int]) -> Proposed | None:
    """Return the most likely lesion of an image.

    Args:
        features: of the image. picture: (h, w, 3) uint8, the image small, for its colours.
        size: (width, height) of the image.
    Returns:
        None where nothing looks like a lesion.
    """
    found = found_lesion(model, features, picture)
    if found is None:
        return None
    mask, score = found
    answer, boxes, prior = None, None, None
    for _ in range(ROUNDS):
        boxes = boxes_of_mask(mask, size)
        if boxes is None:
            return None
        answer = model.answer(features, size, *boxes)
        prior = prior_logits(picture, size, *boxes)
        mask = on_grid(answer.low_res, prior.shape) > model.level
    drawn = boxes_of_mask(mask, size)
    if answer is None or prior is None or drawn is None:
        return None
    return Proposed(
        *drawn,
        answer.predicted_iou,
        answer.entropy,
        agreement(answer.alone, model.level, prior),
        float(mask.mean()),
        score,
    )


def boxes_of_mask(mask: np.ndarray, size: tuple[int, int]) -> tuple[Box, Box] | None:
    """Return two boxes as an annotator would draw them around and inside the largest part of a mask.

    Args:
        mask: (h, w) bool, the whole image. size: (width, height) of the image.
    """
    labels, count = ndimage.label(ndimage.binary_fill_holes(mask))
    if not count:
        return None
    largest = labels == 1 + int(np.bincount(labels.ravel())[1:].argmax())
    found = simulate_boxes(
        largest, np.random.default_rng(0), margin=(LOOSENESS, LOOSENESS), core=(CORE, CORE), jitter=0.0, min_area=4
    )
    if found is None:
        return None
    scale = np.array([size[0] / mask.shape[1], size[1] / mask.shape[0]] * 2)
    big, small = (rounded((box * scale).tolist()) for box in found)
    return big, small


def found_lesion(model: Model, features: Features, picture: np.ndarray) -> tuple[np.ndarray, float] | None:
    """Return the lesion that the model finds, (h, w) bool on its grid, and its colour contrast, 0 to 1."""
    mask = model.lesion(features) > model.level
    if not mask.any():
        return None
    contrast = colour_contrast(ndimage.gaussian_filter(rgb2lab(picture), (COLOUR_BLUR, COLOUR_BLUR, 0)), mask)
    return mask, contrast / (1 + contrast)


def colour_contrast(lab: np.ndarray, mask: np.ndarray) -> float:
    """Return the difference of the mean colours of a mask and the band around it, over their spread; 0 without a band.

    Args:
        lab: (H, W, 3) CIELAB. mask: (h, w) bool, the same picture.
    """
    inside = ndimage.zoom(mask.astype(np.float32), np.array(lab.shape[:2]) / mask.shape, order=1) > 0.5
    reach = max(3, round(BAND * max(lab.shape)))
    near = ndimage.binary_dilation(inside, iterations=2)
    band = ndimage.binary_dilation(near, iterations=reach - 2) & ~near
    if inside.sum() < 4 or band.sum() < 4:
        return 0.0
    difference = lab[inside].mean(0) - lab[band].mean(0)
    length = float(np.linalg.norm(difference))
    along = difference / max(length, 1e-6)
    spread = np.sqrt((np.var(lab[inside] @ along) + np.var(lab[band] @ along)) / 2) + 1.0
    return float(length / spread)


def doubt(found: Proposed, usual: Sequence[float]) -> tuple[float, list[str]]:
    """Return how doubtful a proposal is, 0 to 1, and up to two reasons as text.

    Args:
        usual: log of the areas (share of the image) of lesions that people have confirmed.
    """
    parts = {
        "the mask is uncertain": min(1.0, found.entropy / 0.35),
        "model and colours disagree": 1 - found.agreement,
        "the model expects a poor mask": min(1.0, max(0.0, 1 - found.predicted_iou)),
        "an unusual size": oddness(found.area, usual),
        "little stands out from the skin": 1 - found.score,
    }
    weights = (0.2, 0.35, 0.2, 0.1, 0.15)
    total = sum(weight * value for weight, value in zip(weights, parts.values(), strict=True))
    reasons = [text for text, value in sorted(parts.items(), key=lambda part: -part[1]) if value > 0.4][:2]
    return round(float(total), 4), reasons


def oddness(area: float, usual: Sequence[float]) -> float:
    """Return how unusual an area is, 0 to 1; 0 while fewer than ten areas are confirmed."""
    if len(usual) < 10:
        return 0.0
    middle = float(np.median(usual))
    spread = max(0.3, 1.4826 * float(np.median(np.abs(np.array(usual) - middle))))
    return min(1.0, max(0.0, abs(np.log(max(area, 1e-6)) - middle) / spread - 1) / 2)
