"""The box prior: a lesion's logits from two boxes and the image's own colours, without a network.

The core (small box) is certainly lesion and the band around the big box certainly is not, so each image brings its own
colour model. With mu_1, mu_0 the mean CIELAB colours of core and band and S their pooled covariance, pixels are
projected on the Fisher direction S^-1 (mu_1 - mu_0) (Fisher 1936), scaled so that the two means lie at +1 and -1,
clipped, and a shape term 2 (1 - 1.07 r) is added, r the elliptical radius of the big box. One outline offset per data
set, found from the boxes alone, holds how generously its experts draw.

All functions work in the frame of the image they are given: boxes XYXY, half-open, pixels of that image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from skimage.color import rgb2lab

from lesionsam.boxes.geometry import largest_component_box, model_frame_size, pixels_inside
from lesionsam.types import Frame
from lesionsam.utils.images import resize

PRIOR_SIDE = 128  # longest side of the image that the prior reads its colours from, pixels
OUTSIDE = -3.0  # logit of what certainly is not lesion
CORE = 1.0  # least logit of what certainly is
COLOUR_CLIP = 1.5
SHAPE_WEIGHT = 2.0
SHAPE_TIGHTNESS = 1.07
RIDGE = 4.0  # CIELAB units squared, added to the pooled covariance
BAND_SHARE = 1 / 12  # width of the outside band over the frame's longer side
SMOOTHING_SHARE = 1 / 96  # standard deviation of the smoothing over the frame's longer side
MIN_BAND_PIXELS, MIN_CORE_PIXELS = 40, 4
ELLIPSE_SHRINK = 1.15  # the ellipse baseline is the one inscribed in the big box / 1.15, always 1.15
# Extent of the prior's smooth outline over that of a real, ragged lesion of the same area. Measured on generated
# lesions alone (docs/log.md), where it brings the offset found from the boxes to the best one.
EXTENT_SHARE = 0.972
OFFSETS = np.round(np.arange(-0.8, 1.01, 0.1), 2)


def elliptical_radius(box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the (H, W) radius in units of the ellipse inscribed in a (4,) XYXY box: 1 on it, 0 at its centre."""
    rows, columns = np.arange(shape[0]) + 0.5, np.arange(shape[1]) + 0.5
    v = (rows - (box[1] + box[3]) / 2) / max((box[3] - box[1]) / 2, 1e-6)
    u = (columns - (box[0] + box[2]) / 2) / max((box[2] - box[0]) / 2, 1e-6)
    return np.hypot(v[:, None], u[None])


def ellipse_prior(big_box: np.ndarray, shape: tuple[int, int], shrink: float = ELLIPSE_SHRINK) -> np.ndarray:
    """Return logits that are positive inside the big box's inscribed ellipse / `shrink`; the baseline without an image.

    Args:
        big_box: (4,) XYXY, pixels. shape: (H, W).
    Returns:
        (H, W) float32, zero on the outline, slope and outside value as the box prior's.
    """
    prior = SHAPE_WEIGHT * (1 - elliptical_radius(big_box, shape) * shrink)
    return np.where(pixels_inside(big_box, shape), prior, OUTSIDE).astype(np.float32)


def box_prior(
    image: np.ndarray, big_box: np.ndarray, small_box: np.ndarray, ignore: np.ndarray | None = None
) -> np.ndarray:
    """Return the logits of lesion from two boxes and the image's colours.

    Where the band or the core has too few pixels (a big box that fills the frame, a core below a pixel), only the shape
    term is returned.

    Args:
        image: (H, W, 3) uint8 RGB. big_box, small_box: (4,) XYXY, pixels of this image.
        ignore: (H, W) bool, pixels that take no part in the colour model (padding, other lesions' big boxes).
    Returns:
        (H, W) float32, positive = lesion; at least `CORE` in the small box, `OUTSIDE` outside the big box.
    """
    shape = image.shape[:2]
    side = max(shape)
    in_big, core = pixels_inside(big_box, shape), pixels_inside(small_box, shape)
    prior = SHAPE_WEIGHT * (1 - elliptical_radius(big_box, shape) * SHAPE_TIGHTNESS)
    usable = np.ones(shape, bool) if ignore is None else ~ignore
    reach = max(2.0, side * BAND_SHARE)
    band = pixels_inside(big_box + np.array([-reach, -reach, reach, reach]), shape) & ~in_big & usable
    if band.sum() < MIN_BAND_PIXELS:
        band = ~in_big & usable
    if band.sum() >= MIN_BAND_PIXELS // 4 and (core & usable).sum() >= MIN_CORE_PIXELS:
        lab = rgb2lab(image).astype(np.float32)
        lab = ndimage.gaussian_filter(
            lab, (side * SMOOTHING_SHARE, side * SMOOTHING_SHARE, 0), mode="nearest", truncate=3
        )
        prior += fisher_score(lab, core & usable, band)
    prior[core] = np.maximum(prior[core], CORE)
    prior[~in_big] = OUTSIDE
    return prior.astype(np.float32)


def prior_at(
    image: np.ndarray, big: np.ndarray, small: np.ndarray, others: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Compute the box prior on the image at `PRIOR_SIDE` and enlarge it.

    Args:
        image: (H, W, 3) uint8. big, small: (4,); others: (M, 4) XYXY, pixels of this image.
        shape: (height, width) wanted.
    Returns:
        (height, width) float32 logits.
    """
    side = min(PRIOR_SIDE, max(image.shape[:2]))
    height, width = (max(1, size) for size in model_frame_size(image.shape[1], image.shape[0], Frame(side)))
    scale = np.array([width / image.shape[1], height / image.shape[0]] * 2)
    ignore = np.zeros((height, width), bool)
    for other in others:
        ignore |= pixels_inside(other * scale, (height, width))
    prior = box_prior(
        resize(image, height, width), big * scale, small * scale, ignore & ~pixels_inside(big * scale, (height, width))
    )
    if prior.shape != shape:
        prior = resize(prior, *shape)
    final = np.array([shape[1] / image.shape[1], shape[0] / image.shape[0]] * 2)
    return np.where(pixels_inside(big * final, shape), prior, OUTSIDE).astype(np.float32)


def fisher_score(features: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Project pixels on the Fisher direction between two regions.

    Args:
        features: (H, W, D) float. positive, negative: (H, W) bool.
    Returns:
        (H, W) float64, +1 at the positive region's mean, -1 at the negative's, clipped at +-`COLOUR_CLIP`.
    """
    first, second = features[positive].astype(np.float64), features[negative].astype(np.float64)
    difference = first.mean(0) - second.mean(0)
    scatter = (np.cov(first.T) + np.cov(second.T)) / 2 + np.eye(features.shape[2]) * RIDGE
    direction = np.linalg.solve(scatter, difference)
    middle, half = (first.mean(0) + second.mean(0)) @ direction / 2, abs(difference @ direction) / 2 + 1e-6
    return np.clip((features @ direction - middle) / half, -COLOUR_CLIP, COLOUR_CLIP)


def is_cut(box: np.ndarray, size: tuple[int, int]) -> bool:
    """Return whether a (4,) XYXY box reaches the frame of an image of (height, width)."""
    return bool(box[0] <= 1 or box[1] <= 1 or box[2] >= size[1] - 1 or box[3] >= size[0] - 1)


def extent(mask: np.ndarray) -> np.ndarray:
    """Return (2,) float64 width and height of a mask's largest component, pixels; zeros for an empty mask."""
    box = largest_component_box(mask)
    return np.zeros(2) if box is None else box[2:] - box[:2]


def outline_offset(
    priors: Sequence[np.ndarray],
    big_boxes: Sequence[np.ndarray],
    looseness: float,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> float:
    """Estimate from the boxes alone how generously the annotators of a data set draw their outlines.

    Args:
        priors: logits of `box_prior`, (H, W) each. big_boxes: (4,) each, pixels of its prior.
        looseness: share by which annotators draw the big box too large, on average (0.15: 15 %).
        sizes: (height, width) of the part of each prior that is image; the whole prior if None.
    Returns:
        The offset, of `OFFSETS`, refined linearly between its neighbours, to add inside the big box, so that in the
        median over images whose big box is not cut by the frame the extent of (prior + offset > 0) is
        `EXTENT_SHARE` / (1 + looseness) of the big box's. 0.0 where every big box is cut.
    """
    wanted = EXTENT_SHARE / (1 + looseness)
    ratios = []
    for k, (prior, big) in enumerate(zip(priors, big_boxes, strict=True)):
        height, width = prior.shape if sizes is None else sizes[k]
        if is_cut(big, (height, width)):
            continue
        allowed = pixels_inside(big, prior.shape)
        ratios.append([(extent((prior + offset > 0) & allowed) / (big[2:] - big[:2])).mean() for offset in OFFSETS])
    if not ratios:
        return 0.0
    medians = np.maximum.accumulate(np.median(np.array(ratios), axis=0))  # grows with the offset
    return float(np.round(np.interp(wanted, medians + np.arange(len(OFFSETS)) * 1e-9, OFFSETS), 3))
