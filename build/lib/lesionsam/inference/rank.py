"""Which of several masks of a dermoscopic picture is its lesion, no prompt given.

What counts, of each mask: that other candidates agree with it, that the model is sure of it, that it lies in the middle
and off the rim, that its colour differs from what surrounds it and from skin, and that the box prior finds it again
from its own boxes. The score is linear in these signs. Its weights were fitted on real training images, half of them
seen from farther away, to the IoU with what two boxes say of the lesion, no mask seen: `benchmarks/auto_rank.py`,
docs/log.md. Only the order of scores within a picture means anything.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab
from skimage.filters import threshold_otsu

from lesionsam.boxes.annotator import simulate_boxes
from lesionsam.boxes.prior import box_prior

GRID = 64  # longer side of the grid that masks and colours are compared on, cells
BLUR = 0.75  # of the colours, standard deviation in cells
NEAR, REACH = 1, 5  # the surroundings of a mask: from so many to so many cells away from it
SKIN = (0.4, 0.55)  # between these radii, in shares of the sides, the border of a picture shows skin
LIGHTER = 0.4  # what is lighter than skin stands out by so much of its distance
CENTRAL = 0.3  # radius within which lesions lie, as a share of the sides
LOOSENESS, CORE = 0.15, 0.5  # of the boxes drawn about a mask for the box prior
DOUBT = 0.1  # scores that differ by so much make one mask e times as likely as the other
LEAST_CELLS = 4  # of a mask or its surroundings, for boxes and colours
SIGNS = {  # name -> weight
    "predicted IoU, log": 0.4722,
    "stability, log": 0.1969,
    "squared distance from the middle": -3.403,
    "off the rim, log": 0.6422,
    "area, log": -0.05291,
    "contrast, log": 0.1309,
    "separation": 0.05637,
    "found again": 0.4203,
    "distance from skin": -0.007617,
    "votes": 0.5667,
}


def lesion_scores(signs: np.ndarray) -> np.ndarray:
    """(M, D) of `lesion_signs` -> (M,) float64, the greater the likelier the lesion."""
    return signs @ np.array(list(SIGNS.values()))


def agreement(masks: np.ndarray, scores: np.ndarray) -> float:
    """How far the candidates agree with the best one: the IoU expected of it, each of them being the lesion with a
    probability in proportion to exp(score / `DOUBT`).

    Args:
        masks: (M, h, w) bool. scores: (M,).
    """
    likely = np.exp((scores - scores.max()) / DOUBT)
    best = masks[int(scores.argmax())]
    return float(overlaps(best[None], masks)[0] @ likely / likely.sum())


def lesion_signs(
    masks: np.ndarray,
    predicted: np.ndarray,
    stability: np.ndarray,
    crowd: np.ndarray,
    weights: np.ndarray,
    picture: np.ndarray,
    lab: np.ndarray,
) -> np.ndarray:
    """What speaks for each of M masks.

    Args:
        masks: (M, h, w) bool, none empty. predicted, stability: (M,) the model's own of them. crowd, weights:
            (K, h, w) bool and (K,), what votes, and how much each vote counts. picture: (h, w, 3) uint8.
        lab: its `smoothed_lab`.
    Returns:
        (M, D) float64, one column for each of `SIGNS`.
    """
    skin = skin_of(lab)
    votes = overlaps(masks, crowd) @ weights / max(float(weights.sum()), 1e-9)
    return np.column_stack(
        [
            np.log(np.maximum(predicted, 0.01)),
            np.log(np.maximum(stability, 0.01)),
            [_seen(mask, lab, skin, picture) for mask in masks],
            votes,
        ]
    )


def _seen(mask: np.ndarray, lab: np.ndarray, skin: np.ndarray, picture: np.ndarray) -> tuple[float, ...]:
    """The signs from place and colours, in the order of `SIGNS`."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    distance = ((columns.mean() + 0.5) / width - 0.5) ** 2 + ((rows.mean() + 0.5) / height - 0.5) ** 2
    rim = sum(int(line.sum()) for line in (mask[0], mask[-1], mask[:, 0], mask[:, -1])) / (2 * (height + width))
    near = ndimage.binary_dilation(mask, iterations=NEAR)
    around = ndimage.binary_dilation(near, iterations=REACH - NEAR) & ~near
    length = separation = 0.0
    if len(rows) >= LEAST_CELLS and around.sum() >= LEAST_CELLS:
        inner, outer = lab[mask], lab[around]
        difference = inner.mean(0) - outer.mean(0)
        length = float(np.linalg.norm(difference))
        along = difference / max(length, 1e-6)
        separation = length / (float(np.sqrt((np.var(inner @ along) + np.var(outer @ along)) / 2)) + 1)
    return (
        float(distance),
        float(np.log(1.0001 - rim)),
        float(np.log(mask.mean())),
        float(np.log(length + 1)),
        separation,
        _found_again(mask, picture),
        float(np.linalg.norm(lab[mask].mean(0) - skin)),
    )


def _found_again(mask: np.ndarray, picture: np.ndarray) -> float:
    """IoU of a mask with what the box prior makes of its boxes; 0 where it is too small for boxes."""
    pieces, _ = ndimage.label(ndimage.binary_fill_holes(mask))
    largest = pieces == 1 + int(np.bincount(pieces.ravel())[1:].argmax())
    boxes = simulate_boxes(
        largest,
        np.random.default_rng(0),
        margin=(LOOSENESS, LOOSENESS),
        core=(CORE, CORE),
        jitter=0.0,
        min_area=LEAST_CELLS,
    )
    return float(overlaps((box_prior(picture, *boxes) > 0)[None], mask[None])[0, 0]) if boxes is not None else 0.0


def overlaps(masks: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(M, h, w) and (K, h, w) bool -> (M, K) float32 IoU; 0 where both are empty."""
    a, b = (each.reshape(len(each), -1).astype(np.float32) for each in (masks, others))
    both = a @ b.T
    return both / np.maximum(a.sum(1)[:, None] + b.sum(1) - both, 1)


def smoothed_lab(picture: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 -> (h, w, 3) float64 CIELAB, without hairs and grain."""
    return ndimage.gaussian_filter(rgb2lab(picture), (BLUR, BLUR, 0))


def skin_of(lab: np.ndarray) -> np.ndarray:
    """(3,) the usual colour of a picture's border, which shows skin."""
    radius = _radius(lab.shape[:2])
    return np.median(lab[(radius > SKIN[0]) & (radius < SKIN[1])], 0)


def colour_candidate(lab: np.ndarray) -> np.ndarray | None:
    """The most central region whose colour is far from skin, by Otsu's threshold; None where there is no such region.

    Args:
        lab: (h, w, 3) CIELAB. What is darker than skin counts in full, what is lighter at `LIGHTER`.
    Returns:
        (h, w) bool.
    """
    radius, skin = _radius(lab.shape[:2]), skin_of(lab)
    distance = np.linalg.norm(lab - skin, axis=-1) * np.where(lab[..., 0] < skin[0], 1.0, LIGHTER)
    seen = distance[radius < 0.5]
    if np.ptp(seen) < 1e-6:
        return None
    labels, count = ndimage.label(ndimage.binary_opening(distance > threshold_otsu(seen)))
    if not count:
        return None
    central = ndimage.sum_labels(np.exp(-((radius / CENTRAL) ** 2)), labels, range(1, count + 1))
    return ndimage.binary_fill_holes(labels == 1 + int(np.argmax(central)))


def _radius(shape: tuple[int, ...]) -> np.ndarray:
    """(h, w) distance of each cell from the middle, in shares of the sides."""
    height, width = shape
    return np.hypot(((np.arange(height) + 0.5) / height - 0.5)[:, None], (np.arange(width) + 0.5) / width - 0.5)


def on_grid(size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the comparing grid of a picture of size (height, width)."""
    longer = max(size)
    return max(1, round(size[0] * GRID / longer)), max(1, round(size[1] * GRID / longer))


def small_picture(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The image part of a model frame on the comparing grid.

    Args:
        frame: (3, S, S) uint8. size: (h, w) of its image part.
    Returns:
        (h', w', 3) uint8, see `on_grid`.
    """
    part = np.ascontiguousarray(frame[:, : size[0], : size[1]].transpose(1, 2, 0))
    height, width = on_grid(size)
    return np.asarray(Image.fromarray(part).resize((width, height), Image.Resampling.BOX))
