"""Boxes as numbers: one rounding to pixels, one jitter."""

from __future__ import annotations

import numpy as np
import torch

from lesionsam.boxes.geometry import box_slices, jitter_box, jitter_boxes, pixels_inside
from lesionsam.methods.grid import box_pixels

SHAPE = (9, 9)


def random_boxes(count: int) -> np.ndarray:
    """(count, 4) XYXY, some smaller than a pixel, some beyond the frame, some on pixel edges and centres."""
    rng = np.random.default_rng(0)
    low = rng.uniform(-2, 9, (count, 2))
    boxes = np.concatenate([low, low + rng.choice([0.1, 1.0, 4.0], (count, 1)) * rng.uniform(0.2, 1, (count, 2))], 1)
    boxes[::3] = np.round(boxes[::3] * 2) / 2
    return boxes


def test_slices_mask_and_batch_round_a_box_alike() -> None:
    """`box_slices`, `pixels_inside` and the batched `methods.grid.box_pixels`; only the first is never empty."""
    boxes = random_boxes(300)
    batched = box_pixels(torch.from_numpy(boxes), SHAPE[0], SHAPE[0]).numpy()
    empty = 0
    for box, expected in zip(boxes, batched, strict=True):
        inside, sliced = pixels_inside(box, SHAPE), np.zeros(SHAPE, bool)
        sliced[box_slices(box, SHAPE)] = True
        assert np.array_equal(inside, expected), box
        if inside.any():
            assert np.array_equal(sliced, inside), box
        else:
            empty += 1
            assert sliced.any(), box
    assert 10 < empty < 290


def test_a_jittered_box_keeps_a_pixel_even_at_the_rim_of_its_limits() -> None:
    """Without the clamps of `jitter_box` a centre moved onto the rim would leave half a box, and a narrow one less."""
    limits = np.array([0.0, 0, 20, 10])
    box = np.array([16.0, 4, 20, 5])
    moved = jitter_box(box, np.array([1.0, 0, -0.9, -0.9]), limits)
    assert moved.tolist() == [19.0, 4.0, 20.0, 5.0]
    for key in range(50):
        big, small = jitter_boxes(box, np.array([18.0, 4.2, 18.4, 4.6]), (10, 20), share=0.9, key=str(key))
        for inner, outer in ((big, limits), (small, big)):
            assert (inner[2:] - inner[:2] >= 1 - 1e-9).all()
            assert (inner[:2] >= outer[:2]).all()
            assert (inner[2:] <= outer[2:]).all()


def test_jitter_depends_on_the_key_alone_and_grows_with_the_share() -> None:
    box = np.array([40.0, 40, 60, 70])
    first, again, other = (jitter_boxes(box, box, (100, 100), share=0.2, key=key)[0] for key in ("a", "a", "b"))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    half = jitter_boxes(box, box, (100, 100), share=0.1, key="a")[0]
    np.testing.assert_allclose(half - box, (first - box) / 2)
