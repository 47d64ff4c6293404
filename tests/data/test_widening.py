"""The widened frame: grids, boxes and validity move together, and only the real lesion is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.tiny import tiny_data
from lesionsam.boxes.geometry import pixels_inside
from lesionsam.boxes.prior import OUTSIDE
from lesionsam.data.augment import Augmentation, widen
from lesionsam.data.dataset import NUM_ORIENTATIONS, LesionDataset
from lesionsam.data.frames import PRIOR_SCALE, UNKNOWN

S = 96


def frame(size: tuple[int, int], big: tuple[int, int, int, int]) -> dict[str, np.ndarray]:
    """A padded frame whose big box is filled with lesion, and colours that tell rows and columns apart."""
    height, width = size
    image = np.zeros((S, S, 3), np.uint8)
    image[:height, :width, 0] = np.arange(height)[:, None]
    image[:height, :width, 1] = np.arange(width)[None]
    box = np.array(big, np.float32)
    lesion = pixels_inside(box, (S, S))
    prior = np.where(lesion, 36, int(OUTSIDE * PRIOR_SCALE)).astype(np.int8)
    valid = np.zeros((S, S), bool)
    valid[:height, :width] = True
    return {"image": image, "prior": prior, "mask": lesion.astype(np.uint8), "valid": valid, "box": box}


def widened(size: tuple[int, int], big: tuple[int, int, int, int], mask: np.ndarray | None = None):
    f = frame(size, big)
    core = f["box"] + np.array([4, 4, -4, -4], np.float32)
    return f, widen(
        f["image"],
        f["prior"],
        f["mask"] if mask is None else mask,
        f["valid"],
        size,
        (f["box"], core),
        prior_scale=PRIOR_SCALE,
        unknown=UNKNOWN,
    )


@pytest.mark.parametrize(
    ("size", "new", "axis"),
    [((96, 96), (64, 96), 0), ((64, 96), (96, 96), 1), ((96, 64), (96, 96), 0)],
    ids=["square becomes 3:2", "landscape becomes square", "portrait becomes square"],
)
def test_the_shorter_side_grows_by_half(size: tuple[int, int], new: tuple[int, int], axis: int) -> None:
    _, (grids, found, _) = widened(size, (30, 20, 50, 44))
    assert found == new
    assert grids[3][: new[0], : new[1]].any(axis=axis).all()
    assert not grids[3][new[0] :].any()
    assert not grids[3][:, new[1] :].any()
    assert all(grid.shape[:2] == (S, S) for grid in grids)


def test_boxes_move_with_the_pixels() -> None:
    # 96 x 96 grows to 144 x 96, 24 columns on either side, and is scaled by 96 / 144.
    _, (grids, _, (big, core)) = widened((96, 96), (30, 24, 60, 48))
    scale = 96 / 144
    assert np.allclose(big, np.array([54, 24, 84, 48]) * scale)
    assert np.allclose(core, np.array([58, 28, 80, 44]) * scale)
    assert big.dtype == core.dtype == np.float32
    _, prior, mask, _ = grids
    assert np.array_equal(mask.astype(bool), pixels_inside(big, (S, S)))
    certain = pixels_inside(big + np.array([2, 2, -2, -2]), (S, S))
    assert (prior[certain] == 36).all()
    assert (prior[~pixels_inside(big + np.array([-2, -2, 2, 2]), (S, S))] == int(OUTSIDE * PRIOR_SCALE)).all()


def test_the_surroundings_are_the_mirror_image() -> None:
    f, (grids, (height, width), _) = widened((96, 96), (40, 40, 56, 56))
    wanted = np.pad(f["image"], ((0, 0), (24, 24), (0, 0)), mode="reflect")
    wanted = np.asarray(Image.fromarray(wanted).resize((width, height), Image.Resampling.BILINEAR))
    assert np.array_equal(grids[0][:height, :width], wanted)
    assert not grids[0][height:].any()


def test_a_lesion_seen_again_in_the_mirror_is_not_judged() -> None:
    _, (grids, _, (big, _)) = widened((96, 96), (6, 30, 40, 60))  # mirrored about column 0: columns -40 to -6
    _, _, mask, valid = grids
    mirrored = np.array([24 - 40 + 2, 30 + 2, 24 - 6 - 2, 60 - 2], float) * 96 / 144
    assert not valid[pixels_inside(np.maximum(mirrored, 0), (S, S))].any()
    assert valid[pixels_inside(big, (S, S))].all()
    assert not mask[pixels_inside(np.maximum(mirrored, 0), (S, S))].any()


def test_what_was_invalid_stays_so() -> None:
    f = frame((96, 96), (40, 40, 56, 56))
    f["valid"][10:20, 30:60] = False
    grids, _, _ = widen(
        f["image"],
        f["prior"],
        f["mask"],
        f["valid"],
        (96, 96),
        (f["box"], f["box"]),
        prior_scale=PRIOR_SCALE,
        unknown=UNKNOWN,
    )
    gone = np.array([24 + 30 + 2, 10 + 2, 24 + 60 - 2, 20 - 2], float) * 96 / 144
    assert not grids[3][pixels_inside(gone, (S, S))].any()


def test_a_mask_that_nobody_drew_stays_unknown() -> None:
    _, (grids, _, _) = widened((96, 96), (40, 40, 56, 56), mask=np.full((S, S), UNKNOWN, np.uint8))
    assert (grids[2] == UNKNOWN).all()


# ---- in the data set -------------------------------------------------------------------------------------------------


def variants(data: LesionDataset, **options: Any) -> set[bytes]:
    return {
        batch.images.numpy().tobytes()
        for epoch in range(120)
        for batch in data.epoch(1, seed=0, epoch=epoch, augmentation=Augmentation(**options))
    }


def test_widened_frames_come_in_every_orientation_and_in_the_share_asked_for() -> None:
    data = tiny_data(1)
    plain, all_wide = variants(data, flips=True), variants(data, flips=True, widen=1.0)
    assert len(all_wide) == NUM_ORIENTATIONS
    assert not plain & all_wide
    assert variants(data, flips=True, widen=0.5) == plain | all_wide
    assert len(variants(data, flips=False, widen=1.0)) == 1
    many = tiny_data(10)

    def images(share: float) -> list[bytes]:
        epochs = [many.epoch(1, seed=0, epoch=e, augmentation=Augmentation(True, share)) for e in range(40)]
        return [batch.images.numpy().tobytes() for epoch in epochs for batch in epoch]

    changed = np.mean([one != other for one, other in zip(images(0.0), images(0.25), strict=True)])
    assert 0.15 < changed < 0.35  # 400 draws of .25: standard deviation .022


def test_order_and_orientation_do_not_depend_on_the_share() -> None:
    data = tiny_data(10)
    first = [b.index.tolist() for b in data.epoch(5, seed=3, epoch=1, augmentation=Augmentation(True))]
    second = [b.index.tolist() for b in data.epoch(5, seed=3, epoch=1, augmentation=Augmentation(True, 0.7))]
    assert first == second


@pytest.mark.parametrize(
    ("original", "axis"), [((40, 64), 1), ((64, 40), 0), ((64, 64), 0)], ids=["landscape", "portrait", "square"]
)
def test_a_squashed_frame_stays_full_and_the_originally_shorter_side_grows(
    original: tuple[int, int], axis: int
) -> None:
    """The lesion shrinks by a third along that axis (0 = x, 1 = y) and keeps its length along the other."""
    f = frame((S, S), (30, 20, 60, 50))
    core = f["box"] + np.array([4, 4, -4, -4], np.float32)
    grids, found, (big, _) = widen(
        f["image"],
        f["prior"],
        f["mask"],
        f["valid"],
        (S, S),
        (f["box"], core),
        prior_scale=PRIOR_SCALE,
        unknown=UNKNOWN,
        squashed_from=original,
    )
    assert found == (S, S)
    assert grids[3].any(axis=0).all()
    assert grids[3].any(axis=1).all()
    lengths = big[2:] - big[:2]
    assert lengths[axis] == pytest.approx(30 / 1.5)
    assert lengths[1 - axis] == pytest.approx(30)
    assert abs(float(grids[2].sum()) - lengths.prod()) < 0.15 * lengths.prod(), "the mask moves along"
