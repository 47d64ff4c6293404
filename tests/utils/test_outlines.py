"""Outlines of masks: in pixels of the frame, closed, and the same however many strips a mask is traced in."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import grid_points_in_poly

from lesionsam.utils.outlines import outline_rings


def test_rings_are_in_the_pixel_frame() -> None:
    mask = np.zeros((20, 30), bool)
    mask[5:9, 10:16] = True
    (ring,) = outline_rings(mask)
    low, high = ring.min(0), ring.max(0)
    assert low == pytest.approx([10, 5], abs=0.51)
    assert high == pytest.approx([16, 9], abs=0.51)
    assert (ring[0] == ring[-1]).all()


def filled(rings: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Return the pixels whose centres lie inside an odd number of rings, (H, W) bool."""
    inside = np.zeros(shape, bool)
    for ring in rings:
        inside ^= grid_points_in_poly(shape, ring[:, ::-1] - 0.5)
    return inside


def blobs() -> np.ndarray:
    """Return (70, 90) bool with pieces, holes, pixels that touch at a corner, and parts that the frame cuts."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(70, 90)), 1.5)
    return noise > 0


@pytest.mark.parametrize("strip_pixels", [1, 500, 3000, 1 << 24])
@pytest.mark.parametrize("kind", ["blobs", "full", "empty"])
def test_the_rings_hold_the_mask_in_strips_of_any_size(strip_pixels: int, kind: str) -> None:
    """A pixel's centre is at least sqrt(2) / 4 = 0.354 pixels from the outline: more than the tolerance."""
    mask = {"blobs": blobs(), "full": np.ones((70, 90), bool), "empty": np.zeros((70, 90), bool)}[kind]
    rings = outline_rings(mask, strip_pixels=strip_pixels)
    assert len(rings) == len(outline_rings(mask))
    assert all(np.array_equal(ring[0], ring[-1]) for ring in rings)
    assert np.array_equal(filled(rings, mask.shape), mask)
