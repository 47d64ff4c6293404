"""Lesions are followed without a memory: alignment, partly out of view, lost and found again, several at once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from helpers.clips import box_of
from lesionsam.data.sources.clips import GeneratedClip
from lesionsam.metrics import iou
from lesionsam.models.checkpoint import load_sam
from lesionsam.models.sam import Sam
from lesionsam.types import Frame
from lesionsam.video.boxes import LesionBoxes, with_core
from lesionsam.video.crops import CropMask, decode_crop
from lesionsam.video.motion import align, grey, take_patch
from lesionsam.video.propagation import Propagation

FOUNDATION = Path(__file__).resolve().parents[2] / "foundation" / "compact.safetensors"


@cache
def compact() -> Sam:
    return load_sam(None, FOUNDATION)


def homogeneous(matrix: np.ndarray) -> np.ndarray:
    return np.concatenate([matrix, [[0, 0, 1]]])


def test_generated_clips_depend_on_nothing_but_their_numbers_and_move_as_their_camera_says() -> None:
    clip = GeneratedClip(0, 4, num_frames=30, side=128)
    first, mask = clip.frame(0)
    again = GeneratedClip(0, 4, num_frames=30, side=128)
    later, moved = again.frame(20)
    assert (again.frame(0)[0] == first).all()
    assert first.shape == (96, 128, 3)
    assert not np.allclose(first.mean((0, 1)), later.mean((0, 1)), atol=0.5), "the light changes"
    # The mask of frame 20, brought to frame 0 by the two cameras, is that of frame 0.
    motion = np.linalg.inv(homogeneous(clip.camera(20))) @ homogeneous(clip.camera(0))
    swap = motion[[1, 0, 2]][:, [1, 0, 2]]
    places = swap[:2, :2] @ (np.mgrid[:96, :128].reshape(2, -1) + 0.5) + swap[:2, 2:] - 0.5
    back = ndimage.map_coordinates(moved.astype(float), places, order=1).reshape(96, 128) > 0.5
    assert iou(back, mask) > 0.97
    assert iou(moved, mask) < 0.95


@pytest.mark.parametrize(("shift", "turn", "scale"), [((9, -7), 0.0, 1.0), ((4, 3), 0.25, 1.15), ((-6, 2), -0.3, 0.85)])
def test_a_patch_is_found_where_it_was_moved_to_under_other_light(shift, turn: float, scale: float) -> None:
    """Oracle: the motion that was drawn."""
    picture = grey(GeneratedClip(0, 0).frame(0)[0])
    middle = np.array([picture.shape[1], picture.shape[0]]) / 2
    linear = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    motion = homogeneous(np.concatenate([linear, (middle + shift - linear @ middle)[:, None]], 1))
    inverse = np.linalg.inv(motion)[[1, 0, 2]][:, [1, 0, 2]]
    places = inverse[:2, :2] @ (np.mgrid[: picture.shape[0], : picture.shape[1]].reshape(2, -1) + 0.5) + inverse[:2, 2:]
    moved = ndimage.map_coordinates(picture, places - 0.5, order=1, mode="nearest").reshape(picture.shape)
    patch = take_patch(picture, np.array([60.0, 30, 190, 160]))
    found = align(patch, 0.7 * moved + 20, patch.matrix)
    assert found.correlation > 0.95
    corners = np.array([[-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]]).T
    assert np.abs((found.matrix - motion @ patch.matrix) @ corners).max() < 1.0  # pixel


def follow(clip: GeneratedClip, numbers: range) -> tuple[list[float], list[bool]]:
    tracker, ious, lost = Propagation(compact()), [], []
    for number in numbers:
        image, mask = clip.frame(number)
        found = tracker.step(image, {"0": with_core(box_of(mask))} if number == numbers[0] else {})["0"]
        ious.append(iou(found.mask, mask))
        lost.append(found.lost)
    return ious, lost


@pytest.mark.parametrize("leaves", [False, True])
def test_a_lesion_is_followed_about_as_well_as_with_its_box_in_every_frame(leaves: bool) -> None:
    clip, numbers = GeneratedClip(0, 7 if leaves else 2, leaves=leaves), range(0, 60, 3)
    ious, lost = follow(clip, numbers)
    given, copied = [], []
    first = box_of(clip.frame(0)[1])
    for number in numbers:
        image, mask = clip.frame(number)
        for boxes, scores in ((box_of(mask), given), (first, copied)):
            scores.append(iou(decode_crop(compact(), image, boxes).mask(mask.shape, compact().frame), mask))
    assert not any(lost)
    assert np.mean(ious) > np.mean(given) - 0.03
    assert np.mean(copied) < np.mean(given) - 0.1, "a clip in which following matters"


def test_a_lesion_that_is_covered_is_lost_and_found_again_elsewhere() -> None:
    clip = GeneratedClip(0, 4)
    image, mask = clip.frame(0)
    tracker = Propagation(compact())
    tracker.step(image, {"0": with_core(box_of(mask))})
    rng = np.random.default_rng(0)
    skin = np.median(image[~mask], axis=0)
    covered = np.clip(skin + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
    for _ in range(3):
        found = tracker.step(covered, {})["0"]
        assert found.lost
        assert not found.mask.any()
    shifted = np.roll(image, (0, 60), (0, 1))  # farther than the patch could follow
    found = tracker.step(shifted, {})["0"]
    assert not found.lost
    assert iou(found.mask, np.roll(mask, (0, 60), (0, 1))) > 0.6


def test_several_lesions_are_followed_each_from_its_own_frame_on_and_large_frames_keep_their_size() -> None:
    small, mask = GeneratedClip(0, 2).frame(0)
    image = small.repeat(6, 0).repeat(6, 1)  # longer than WORKING_SIDE
    tracker = Propagation(compact())
    boxes = with_core(6 * box_of(mask))
    assert set(tracker.step(image, {"a": boxes})) == {"a"}
    both = tracker.step(image, {"b": boxes})
    assert set(both) == {"a", "b"}
    wanted = decode_crop(compact(), small, box_of(mask)).mask(mask.shape, compact().frame)
    for found in both.values():
        assert found.mask.shape == (1152, 1536)
        assert iou(found.mask, wanted.repeat(6, 0).repeat(6, 1)) > 0.95
    assert iou(both["a"].mask, both["b"].mask) > 0.98, "the first was followed to where the second is drawn"


def test_a_state_goes_on_exactly_where_it_was_saved() -> None:
    clip = GeneratedClip(0, 7, leaves=True)
    one, other = Propagation(compact(), mask_prompt=True), Propagation(compact(), mask_prompt=True)
    boxes: dict[str, LesionBoxes] = {"0": with_core(box_of(clip.frame(0)[1]))}
    for number in range(0, 12, 3):
        one.step(clip.frame(number)[0], boxes if number == 0 else {})
    other.restore(one.state())
    for number in range(12, 21, 3):
        first, second = (tracker.step(clip.frame(number)[0], {})["0"] for tracker in (one, other))
        assert (first.mask == second.mask).all()
        assert first.score == second.score


@pytest.mark.parametrize("frame", [Frame(64), Frame(64, squash=True)])
def test_a_mask_prompt_is_the_last_mask_moved_with_the_lesion(frame: Frame) -> None:
    """Oracle: a mask moved by whole pixels."""
    logits = torch.full((16, 16), -8.0)
    logits[4:9, 5:11] = 6.0
    mask = CropMask(np.array([20, 10, 84, 74]), logits, (64, 64), 1.0)
    motion = np.array([[1, 0, 8.0], [0, 1, 4.0], [0, 0, 1]])
    same = mask.moved(np.array([28, 14, 92, 78]), motion, frame)  # the crop moved along
    assert torch.allclose(same[0], logits, atol=1e-5)
    stays = mask.moved(mask.window, motion, frame)  # 8 and 4 pixels are 2 cells and 1
    assert torch.allclose(stays[0, 1:, 2:], logits[:-1, :-2], atol=1e-5)
    assert (stays[0, 0] < -9).all()
