"""Count the separate parts of a mask, to find two lesions that were segmented as one."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

MAX_SIDE = 128  # of the mask that is looked at, pixels
MIN_PART = 0.15  # of the largest part's area; smaller ones are specks
NECK = 0.45  # parts are separate if what joins them is narrower than this share of the thickest part


def num_parts(mask: np.ndarray) -> int:
    """Return in how many large parts a mask falls once necks are cut.

    The mask is eroded by `NECK` of its greatest distance to the background, which leaves the cores of its parts.

    Args:
        mask: (H, W) bool.
    """
    step = max(1, -(-max(mask.shape) // MAX_SIDE))
    small = np.pad(mask[::step, ::step], 1)  # beyond the image there is no lesion
    depth = ndimage.distance_transform_edt(small)
    return max(_large(small, small), _large(depth > NECK * depth.max(), small)) if small.any() else 0


def _large(cores: np.ndarray, mask: np.ndarray) -> int:
    """Return how many components of the cores stand for a large share of the mask, each pixel going to the nearest."""
    labels, count = ndimage.label(cores, np.ones((3, 3)))
    if count < 2:
        return count
    _, nearest = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    areas = np.bincount(labels[tuple(nearest)][mask], minlength=count + 1)[1:]
    return int((areas >= MIN_PART * areas.max()).sum())
