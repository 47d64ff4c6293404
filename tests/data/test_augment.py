"""Distortions of training images: scale moves image, labels and boxes together; colours change the image alone."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from helpers.tiny import SIDE, tiny_data
from lesionsam.data.augment import Augmentation, Distortion, recoloured
from lesionsam.data.frames import UNKNOWN
from lesionsam.prompts import tight_boxes
from lesionsam.types import Batch

OFF = Distortion(scale=0.0, brightness=0.0, contrast=0.0, hue=0.0, blur=0.0)
ALL = Distortion(scale=0.3, brightness=0.2, contrast=0.2, hue=0.05, blur=1.0)
IMAGE = np.random.default_rng(0).integers(40, 200, (9, 7, 3), dtype=np.uint8)
PLAIN = {"brightness": 1.0, "contrast": 1.0, "hue": 0.0, "blur": 0.0}


def same(a: Batch, b: Batch) -> bool:
    names = ("images", "sizes", "big_boxes", "small_boxes", "valid", "prior", "masks")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_off_is_off() -> None:
    data = tiny_data(5)
    assert not OFF
    assert same(data.batch(range(5)), data.batch(range(5), None, OFF, (0, 0)))
    first = next(data.epoch(5, seed=0, epoch=0, augmentation=Augmentation(True, distortion=OFF)))
    assert same(first, next(data.epoch(5, seed=0, epoch=0, augmentation=Augmentation(True))))
    assert first.orientations is not None


def test_the_draw_depends_on_seed_epoch_and_image_alone() -> None:
    data = tiny_data(6)
    alone = data.batch([3], None, ALL, (0, 2))
    assert torch.equal(data.batch([5, 3], None, ALL, (0, 2)).images[1], alone.images[0])
    for other in ((1, 2), (0, 3)):
        assert not torch.equal(data.batch([3], None, ALL, other).images, alone.images)
    assert alone.orientations is None, "such a batch is no variant that features could be kept of"


@pytest.mark.parametrize("seed", range(12))
def test_scale_moves_image_labels_and_boxes_together(seed: int) -> None:
    data = tiny_data(6)
    before = data.batch(range(6))
    after = data.batch(range(6), None, replace(OFF, scale=0.4), (seed,))
    assert before.masks is not None
    assert after.masks is not None
    assert after.prior is not None
    for k in range(6):
        height, width = after.sizes[k].tolist()
        assert bool(after.valid[k, :height, :width].all())
        assert not bool(after.valid[k, height:].any())
        assert not bool(after.valid[k, :, width:].any())
        assert not bool(after.images[k, :, height:].any())
        assert not bool(after.images[k, :, :, width:].any())
        big, small = after.big_boxes[k], after.small_boxes[k]
        limit = torch.tensor([width, height]).repeat(2)
        assert bool((big >= -1e-3).all())
        assert bool((big <= limit + 1e-3).all()), "the big box stays in the image"
        # Where the boxes went, the lesion went: the mask's own box scales and moves as they do.
        ratio = (big[2:] - big[:2]) / (before.big_boxes[k, 2:] - before.big_boxes[k, :2])
        shift = big[:2] - before.big_boxes[k, :2] * ratio
        wanted = tight_boxes(before.masks[k : k + 1] > 0.5)[0] * ratio.repeat(2) + shift.repeat(2)
        assert torch.allclose(tight_boxes(after.masks[k : k + 1] > 0.5)[0], wanted, atol=1.5)
        assert torch.allclose(small, before.small_boxes[k] * ratio.repeat(2) + shift.repeat(2), atol=1e-3)
        inside = after.masks[k] > 0.5
        assert after.prior[k][inside].mean() > 0 > after.prior[k][~inside].mean()
        darker = after.images[k].float().mean(0)
        assert darker[inside].mean() < darker[after.valid[k] & ~inside].mean() - 40


def test_an_image_without_a_mask_stays_without() -> None:
    data = tiny_data(3)
    data.frames = replace(data.frames, masks=np.full_like(data.frames.masks, UNKNOWN))
    batch = data.batch(range(3), None, ALL, (0,))
    assert batch.masks is not None
    assert bool(batch.masks.isnan().all())


def test_factors_fill_the_range_and_large_lesions_limit_the_enlargement() -> None:
    data = tiny_data(1)
    before = data.batch([0])
    sizes = [data.batch([0], None, replace(OFF, scale=0.4), (seed,)) for seed in range(80)]
    ratios = [
        float((b.big_boxes[0, 2] - b.big_boxes[0, 0]) / (before.big_boxes[0, 2] - before.big_boxes[0, 0]))
        for b in sizes
    ]
    width = float(before.big_boxes[0, 2] - before.big_boxes[0, 0])
    assert min(ratios) < 0.68
    assert 1.2 < max(ratios) <= min(1.4, SIDE / width) + 0.05


def test_with_all_switched_on_every_orientation_still_works() -> None:
    data = tiny_data(8)
    batch = next(data.epoch(8, seed=0, epoch=0, augmentation=Augmentation(True, 0.5, ALL)))
    assert batch.images.shape == (8, 3, SIDE, SIDE)
    assert bool((batch.big_boxes[:, 2:] > batch.big_boxes[:, :2]).all())
    assert batch.masks is not None
    centre = (batch.small_boxes[:, :2] + batch.small_boxes[:, 2:]) / 2
    rows = torch.arange(8)
    assert bool((batch.masks[rows, centre[:, 1].long(), centre[:, 0].long()] > 0.5).all())


def test_colours_by_hand() -> None:
    assert recoloured(IMAGE, **PLAIN) is IMAGE
    bright = recoloured(IMAGE, **(PLAIN | {"brightness": 1.2}))
    assert np.array_equal(bright, np.clip(np.round(IMAGE.astype(np.float32) * np.float32(1.2)), 0, 255))
    grey = (IMAGE.reshape(-1, 3).mean(0) * [0.299, 0.587, 0.114]).sum()
    contrast = recoloured(IMAGE, **(PLAIN | {"contrast": 0.5}))
    assert np.abs(contrast - ((IMAGE - grey) * 0.5 + grey)).max() <= 0.51


def test_a_hue_turns_as_colorsys_turns_it() -> None:
    turned = recoloured(IMAGE, **(PLAIN | {"hue": 0.25}))
    for old, new in zip(IMAGE.reshape(-1, 3) / 255, turned.reshape(-1, 3) / 255, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*old)
        wanted = colorsys.hsv_to_rgb((hue + 0.25) % 1, saturation, value)
        assert np.abs(new - wanted).max() < 0.04  # Pillow keeps hue and saturation in 8 bits
    assert np.abs(recoloured(IMAGE, **(PLAIN | {"hue": -0.25})) - turned.astype(float)).max() > 10


def test_a_blur_is_near_a_gaussian() -> None:
    smooth = ndimage.gaussian_filter(np.random.default_rng(1).normal(120, 60, (40, 40, 3)), (1.5, 1.5, 0))
    image = np.clip(smooth * 4 - 360, 0, 255).astype(np.uint8)
    blurred = recoloured(image, **(PLAIN | {"blur": 2.0})).astype(float)
    wanted = ndimage.gaussian_filter(image.astype(float), (2, 2, 0), mode="nearest")
    assert np.abs(blurred - wanted)[6:-6, 6:-6].mean() < 1.5
    assert np.abs(image - wanted)[6:-6, 6:-6].mean() > 3
