"""What a model proposes for an image that nobody has drawn on: a mask without a prompt, its two boxes, and a doubt.

Masks: a model that was adapted here is asked as `lesionsam predict --auto` asks it. Any other is asked at a grid of
points for three candidates each (as segment-anything's automatic masks, Kirillov et al. 2023, section 7), one more
comes from colour alone, and the one is taken that looks most like a lesion: on such models this was the better way, on
adapted ones the worse (docs/log.md). The mask gets two boxes, drawn as an annotator would draw them; model and box
prior answer them, and their mask gets boxes again. Doubt joins what the two say of the final boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.color import rgb2lab

from lesionsam.annotation.assist import agreement, on_grid, prior_logits
from lesionsam.annotation.model import Answer, Features, Model
from lesionsam.annotation.records import Box, rounded
from lesionsam.boxes.annotator import simulate_boxes
from lesionsam.inference.rank import colour_candidate
from lesionsam.metrics import iou

GRID = 5  # points a side
MARGIN = 0.1  # of the image's sides that the grid leaves out
LEAST_AREA, MOST_AREA = 0.004, 0.8  # share of the image that a lesion may take
STABLE = 1.0  # logits by which the threshold is moved for the stability score
KEPT = 4  # candidates whose colours are looked at
SAME = 0.8  # IoU above which two candidates are one
BAND = 0.08  # width of the surroundings, share of the image's longer side
LOOSENESS = 0.25  # by which the proposed big box is larger than the mask: a lesion that sticks out costs a correction
CORE = 0.5  # of the mask's extent that the proposed core takes, shrunk until it lies inside
COLOUR_BLUR = 1.5  # pixels of the small picture
CENTRAL = 0.25  # radius within which lesions lie, as a share of the sides
ROUNDS = 2  # of boxes and mask from each other


@dataclass(frozen=True)
class Proposed:
    """One proposed lesion.

    Attributes:
        big, small: boxes, pixels of the image. predicted_iou: the model's own of its mask.
        entropy: mean over the big box, nats. agreement: IoU of model and box prior. area: of the mask, share of the
        image. score: how the candidate that it began as stands out from its surroundings, 0 to 1.
    """

    big: Box
    small: Box
    predicted_iou: float
    entropy: float
    agreement: float
    area: float
    score: float


def propose(model: Model, features: Features, picture: np.ndarray, size: tuple[int, int], key: str) -> Proposed | None:
    """The most likely lesion of an image.

    Args:
        features: of the image. picture: (h, w, 3) uint8, the image small, for its colours.
        size: (width, height) of the image. key: its id, which draws the points in the core.
    Returns:
        None where nothing looks like a lesion.
    """
    found = best_candidate(model, features, picture)
    if found is None:
        return None
    mask, score = found
    answer, boxes, prior = None, None, None
    for _ in range(ROUNDS):
        boxes = boxes_of_mask(mask, size)
        if boxes is None:
            return None
        answer = model.answer(features, size, f"{key}/0", *boxes)
        prior = prior_logits(picture, size, *boxes)
        mask = fused(model, answer, prior)
    drawn = boxes_of_mask(mask, size)
    if answer is None or prior is None or drawn is None:
        return None
    return Proposed(
        *drawn,
        answer.predicted_iou,
        answer.entropy,
        agreement(answer.low_res, model.level, prior),
        float(mask.mean()),
        score,
    )


def fused(model: Model, answer: Answer, prior: np.ndarray) -> np.ndarray:
    """Mask where model and box prior together say lesion; (h, w) bool on the prior's grid."""
    return on_grid(answer.low_res, prior.shape) - model.level + prior > 0


def boxes_of_mask(mask: np.ndarray, size: tuple[int, int]) -> tuple[Box, Box] | None:
    """Two boxes as an annotator would draw them around and inside the largest part of a mask.

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


def best_candidate(model: Model, features: Features, picture: np.ndarray) -> tuple[np.ndarray, float] | None:
    """The candidate that looks most like one lesion on skin: (h, w) bool on the model's grid, and how it stands out."""
    lab = ndimage.gaussian_filter(rgb2lab(picture), (COLOUR_BLUR, COLOUR_BLUR, 0))
    best = model.lesion(features) > model.level if model.is_adapted else best_of_grid(model, features, picture, lab)
    if best is None or not best.any():
        return None
    contrast, _ = colour_contrast(lab, best)
    return best, contrast / (1 + contrast)


def best_of_grid(model: Model, features: Features, picture: np.ndarray, lab: np.ndarray) -> np.ndarray | None:
    """Of the masks of a grid of points and one by colour, on the model's grid, that of the best `lesion_score`.

    Args:
        lab: the picture in CIELAB, smoothed.
    """
    logits, predicted = model.candidates(features, grid_points())
    masks = logits > model.level
    stable = (logits > model.level + STABLE).sum((1, 2)) / np.maximum((logits > model.level - STABLE).sum((1, 2)), 1)
    quality = predicted.clip(0, 1) * stable * (1 - on_rim(masks))
    area = masks.mean((1, 2))
    quality[(area < LEAST_AREA) | (area > MOST_AREA)] = -1
    chosen = [masks[k] for k in distinct(masks, quality)]
    by_colour = colour_candidate(lab)
    if by_colour is not None and LEAST_AREA <= by_colour.mean() <= MOST_AREA:
        chosen.append(
            ndimage.zoom(by_colour.astype(np.float32), np.array(masks.shape[1:]) / by_colour.shape, order=1) > 0.5
        )
    scored = [(lesion_score(picture, lab, mask), k) for k, mask in enumerate(chosen) if mask.any()]
    if not scored or max(scored)[0] <= 0:
        return None
    return chosen[max(scored)[1]]


def grid_points() -> np.ndarray:
    """(GRID ** 2, 2) XY in shares of the image."""
    line = np.linspace(MARGIN, 1 - MARGIN, GRID)
    return np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)


def on_rim(masks: np.ndarray) -> np.ndarray:
    """(N, h, w) bool -> (N,), the share of the frame's outermost pixels that each takes."""
    return np.concatenate([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]], 1).mean(1)


def distinct(masks: np.ndarray, quality: np.ndarray) -> list[int]:
    """Indices of the best masks that differ from each other."""
    kept: list[int] = []
    for k in np.argsort(-quality):
        if quality[k] <= 0 or len(kept) == KEPT:
            break
        unions = [(masks[k] | masks[j]).sum() for j in kept]
        if all((masks[k] & masks[j]).sum() < SAME * union for j, union in zip(kept, unions, strict=True)):
            kept.append(int(k))
    return kept


def lesion_score(picture: np.ndarray, lab: np.ndarray, mask: np.ndarray) -> float:
    """How much a mask looks like the lesion of a dermoscopic picture; only the order of scores means something.

    Central, off the frame, of another colour than its surroundings, not tiny, and such that the box prior of its own
    boxes finds it again. The product was chosen on real training images (docs/log.md).
    """
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    distance = np.hypot((rows.mean() + 0.5) / height - 0.5, (columns.mean() + 0.5) / width - 0.5)
    boxes = boxes_of_mask(mask, (width, height))
    if boxes is None:
        return 0.0
    prior = prior_logits(picture, (width, height), *boxes) > 0
    there = ndimage.zoom(mask.astype(np.float32), np.array(prior.shape) / mask.shape, order=1) > 0.5
    again = iou(prior, there) if there.any() else 0.0
    _, length = colour_contrast(lab, mask)
    central, free = np.exp(-((distance / CENTRAL) ** 2)), 1 - on_rim(mask[None])[0]
    return float(central * free * again * length * mask.mean() ** 0.25)


def colour_contrast(lab: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Between a mask and the band around it: the difference of mean colours over the spread along it, and the
    difference itself, CIELAB units; zeros where there is no band."""
    inside = ndimage.zoom(mask.astype(np.float32), np.array(lab.shape[:2]) / mask.shape, order=1) > 0.5
    reach = max(3, round(BAND * max(lab.shape)))
    near = ndimage.binary_dilation(inside, iterations=2)
    band = ndimage.binary_dilation(near, iterations=reach - 2) & ~near
    if inside.sum() < 4 or band.sum() < 4:
        return 0.0, 0.0
    difference = lab[inside].mean(0) - lab[band].mean(0)
    length = float(np.linalg.norm(difference))
    along = difference / max(length, 1e-6)
    spread = np.sqrt((np.var(lab[inside] @ along) + np.var(lab[band] @ along)) / 2) + 1.0
    return float(length / spread), length


def doubt(found: Proposed, usual: Sequence[float]) -> tuple[float, list[str]]:
    """How much a proposal needs a look, 0 to 1, and why, in words.

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
    """0 for a lesion of a usual size, 1 for one far from all; sizes that nobody has seen yet are not odd."""
    if len(usual) < 10:
        return 0.0
    middle = float(np.median(usual))
    spread = max(0.3, 1.4826 * float(np.median(np.abs(np.array(usual) - middle))))
    return min(1.0, max(0.0, abs(np.log(max(area, 1e-6)) - middle) / spread - 1) / 2)
