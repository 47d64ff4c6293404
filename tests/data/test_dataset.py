"""Decoded frames, their cache, orientations and the order of batches."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.package_copy import package_copy, recoded, reworded
from helpers.tiny import SIDE, draw_lesion, iou, is_inside, tiny_data
from lesionsam.boxes.geometry import model_frame_size, pixels_inside
from lesionsam.boxes.prior import OUTSIDE
from lesionsam.data import frames as frames_module
from lesionsam.data.augment import Augmentation
from lesionsam.data.contents import image_sha256, mask_sha256
from lesionsam.data.dataset import NUM_ORIENTATIONS, LesionDataset, open_dataset, orient, orient_box, oriented_size
from lesionsam.data.frames import PRIOR_SCALE, UNKNOWN, load_frames, other_boxes
from lesionsam.errors import UserError
from lesionsam.types import Batch, Frame, Sample
from lesionsam.utils import code
from lesionsam.utils.code import PACKAGE, module_files

FLIPS = Augmentation(flips=True)

WIDE, TALL, SQUARE = (48, 64), (64, 40), (50, 50)


def write_samples(folder: Path, shapes: Sequence[tuple[int, int]] = (WIDE, TALL, SQUARE, WIDE)) -> list[Sample]:
    """One drawn lesion per shape (height, width), as files."""
    rng, samples = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for k, (height, width) in enumerate(shapes):
        lesion = draw_lesion(rng, height, width)
        Image.fromarray(lesion.image).save(folder / f"image{k}.png")
        Image.fromarray(lesion.mask.astype(np.uint8) * 255).save(folder / f"mask{k}.png")
        samples.append(
            Sample(
                f"image{k}",
                "0",
                "train",
                folder / f"image{k}.png",
                folder / f"mask{k}.png",
                width,
                height,
                lesion.big,
                lesion.small,
            )
        )
    return samples


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.ids == other.ids
    for name, value in tensors(one).items():
        assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(tensors(other)[name])), name


# ---- orientation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(NUM_ORIENTATIONS))
@pytest.mark.parametrize("size", [(SIDE, SIDE), (24, SIDE), (SIDE, 20)])
def test_a_box_drawn_into_a_grid_moves_with_it(size: tuple[int, int], orientation: int) -> None:
    box = np.array([3.0, 5.0, 14.0, 21.0], np.float32)
    grid = pixels_inside(box, (SIDE, SIDE)).astype(np.uint8)
    moved = orient(grid, size, orientation)
    turned = orient_box(box, size, orientation)
    assert np.array_equal(moved, pixels_inside(turned, (SIDE, SIDE)))
    height, width = oriented_size(size, orientation)
    assert turned[2] <= width
    assert turned[3] <= height
    assert (height, width) == (size if orientation < 4 else size[::-1])


def test_the_eight_orientations_are_all_different_and_pad_with_what_was_there() -> None:
    grid = np.full((SIDE, SIDE), 9, np.uint8)
    grid[:24] = np.random.default_rng(0).integers(0, 5, (24, SIDE))
    results = [orient(grid, (24, SIDE), k) for k in range(NUM_ORIENTATIONS)]
    assert len({r.tobytes() for r in results}) == NUM_ORIENTATIONS
    for k, result in enumerate(results):
        assert (result[24:] == 9).all() if k < 4 else (result[:, 24:] == 9).all()
        assert sorted(result.ravel()) == sorted(grid.ravel())
    assert np.array_equal(results[0], grid)


@pytest.mark.parametrize("orientation", range(NUM_ORIENTATIONS))
def test_image_prior_mask_boxes_and_padding_move_together(orientation: int) -> None:
    data = tiny_data(3, with_others=True)
    plain, batch = data.batch(range(3)), data.batch(range(3), [orientation] * 3)
    assert batch.masks is not None
    assert batch.prior is not None
    assert plain.masks is not None
    for k in range(3):
        height, width = batch.sizes[k].tolist()
        mask = batch.masks[k].numpy() > 0.5
        small, big = batch.small_boxes[k].numpy(), batch.big_boxes[k].numpy()
        assert is_inside(small, mask)
        assert not mask[~pixels_inside(big, mask.shape)].any()
        assert mask.sum() == plain.masks[k].sum()
        red = batch.images[k, 0].numpy().astype(float)
        image_part = np.zeros_like(mask)
        image_part[:height, :width] = True
        assert red[mask].mean() < 150 < red[image_part & ~mask].mean(), "the lesion is dark in the image"
        assert (batch.images[k].numpy()[:, ~image_part] == 0).all()
        assert iou(batch.prior[k].numpy() > 0, mask) > 0.75
        assert (batch.prior[k].numpy()[~pixels_inside(big, mask.shape)] == OUTSIDE).all()
        corner = pixels_inside(
            orient_box(np.array([0, 0, 6, 5]), tuple(plain.sizes[k].tolist()), orientation), mask.shape
        )
        assert np.array_equal(batch.valid[k].numpy(), image_part & ~corner)


def test_an_image_without_a_mask_is_nan_whatever_its_orientation() -> None:
    data = tiny_data(3)
    masks = data.frames.masks.copy()
    masks[1] = UNKNOWN
    data = LesionDataset(data.samples, replace(data.frames, masks=masks), with_masks=True)
    for orientation in range(NUM_ORIENTATIONS):
        found = data.batch(range(3), [orientation] * 3).masks
        assert found is not None
        assert bool(found[1].isnan().all())
        assert not bool(found[[0, 2]].isnan().any())
    assert LesionDataset(data.samples, data.frames, with_masks=False).batch([0]).masks is None


def test_the_small_box_stays_valid_within_another_lesions_big_box() -> None:
    data = tiny_data(1)
    small = data.frames.small_boxes[0]
    data = LesionDataset(
        data.samples, replace(data.frames, others=(np.array([[0, 0, SIDE, SIDE]], np.float32),)), with_masks=True
    )
    assert np.array_equal(data.batch([0]).valid[0].numpy(), pixels_inside(small, (SIDE, SIDE)))


# ---- order -----------------------------------------------------------------------------------------------------------


def test_an_epochs_order_is_a_function_of_seed_and_epoch() -> None:
    data = tiny_data(10)

    def order(seed: int, epoch: int) -> list[int]:
        return [k for b in data.epoch(5, seed=seed, epoch=epoch, augmentation=FLIPS) for k in b.index.tolist()]

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 0)) == list(range(10))
    assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(3)}) == 6


def test_a_batch_says_who_it_holds_and_the_last_is_filled_from_the_beginning() -> None:
    data = tiny_data(10)
    batches = list(data.epoch(4, seed=0, epoch=0))
    assert data.batches_per_epoch(4) == len(batches) == 3
    assert batches[2].index[2:].tolist() == batches[0].index[:2].tolist()
    for batch in batches:
        assert batch.ids == tuple(f"image{k}/0" for k in batch.index.tolist())
        assert_equal(batch, data.batch(batch.index.tolist()))
    small = list(tiny_data(3).epoch(8, seed=0, epoch=0))
    assert len(small) == 1
    assert len(small[0].ids) == 8


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_starting_later_gives_the_same_batches(start: int) -> None:
    data = tiny_data(10)
    whole = list(data.epoch(4, seed=3, epoch=2, augmentation=FLIPS))
    rest = list(data.epoch(4, seed=3, epoch=2, augmentation=FLIPS, start=start))
    assert len(rest) == 3 - start
    for one, other in zip(whole[start:], rest, strict=True):
        assert_equal(one, other)


def test_augmentation_shows_every_orientation_and_can_be_switched_off() -> None:
    data = tiny_data(1)
    seen = {
        b.images.numpy().tobytes()
        for epoch in range(60)
        for b in data.epoch(1, seed=0, epoch=epoch, augmentation=FLIPS)
    }
    assert len(seen) == NUM_ORIENTATIONS
    plain = {b.images.numpy().tobytes() for epoch in range(9) for b in data.epoch(1, seed=0, epoch=epoch)}
    assert plain == {data.batch([0]).images.numpy().tobytes()}


def test_batches_in_order_cover_the_set_once() -> None:
    data = tiny_data(7)
    assert [k for batch in data.batches(3) for k in batch.index.tolist()] == list(range(7))
    assert [len(batch.ids) for batch in data.batches(3)] == [3, 3, 1]


# ---- decoding --------------------------------------------------------------------------------------------------------


def test_frames_hold_what_the_files_hold(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "files")
    found = load_frames(samples, Frame(SIDE), tmp_path / "cache")
    for k, sample in enumerate(samples):
        height, width = model_frame_size(sample.width, sample.height, Frame(SIDE))
        assert found.sizes[k].tolist() == [height, width]
        assert max(height, width) == SIDE
        with Image.open(sample.image_path) as image:
            wanted = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        assert np.array_equal(found.images[k, :height, :width], wanted)
        assert (found.images[k, height:] == 0).all()
        assert (found.images[k, :, width:] == 0).all()
        mask, prior = found.masks[k] == 1, found.priors[k] / PRIOR_SCALE
        assert set(np.unique(found.masks[k])) == {0, 1}
        assert is_inside(found.small_boxes[k], mask)
        rows, columns = np.nonzero(mask)
        assert found.big_boxes[k][0] <= columns.min() + 0.5
        assert found.big_boxes[k][3] >= rows.max() + 0.5
        assert iou(prior > 0, mask) > 0.7
        assert (prior[~pixels_inside(found.big_boxes[k], mask.shape)] == OUTSIDE).all()
        assert sample.width / width * found.big_boxes[k][2] == pytest.approx(sample.big_box[2], abs=1e-3)


def test_workers_change_nothing(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "files")
    none, two = (load_frames(samples, Frame(SIDE), tmp_path / f"cache{n}", num_workers=n) for n in (0, 2))
    for name in ("images", "priors", "masks", "sizes", "big_boxes", "small_boxes"):
        assert np.array_equal(getattr(none, name), getattr(two, name)), name


def test_a_killed_worker_is_announced_and_the_rest_decoded_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the system kills the greediest process when memory runs out."""
    samples = write_samples(tmp_path)
    whole = load_frames(samples, Frame(SIDE), tmp_path / "whole")
    real, here = frames_module.prepare, os.getpid()

    def dying(sample: Sample, *arguments: Any) -> Any:
        if os.getpid() != here and sample.image_path == samples[2].image_path:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(sample, *arguments)

    monkeypatch.setattr(dying, "__qualname__", "prepare")  # a worker finds it under this name
    monkeypatch.setattr(dying, "__module__", frames_module.__name__)
    monkeypatch.setattr(frames_module, "prepare", dying)
    again = load_frames(samples, Frame(SIDE), tmp_path / "again", num_workers=2)
    for name in ("images", "priors", "masks"):
        assert np.array_equal(getattr(again, name), getattr(whole, name))
    assert capsys.readouterr().err.count("a process that decodes images was killed") == 1
    assert not list((tmp_path / "again").glob("building-*"))


def test_several_lesions_of_an_image_know_each_other(tmp_path: Path) -> None:
    (sample,) = write_samples(tmp_path / "files", [WIDE])
    mask = np.zeros(WIDE, bool)
    mask[10:30, 5:20], mask[12:40, 40:60] = True, True
    assert sample.mask_path is not None
    Image.fromarray(mask.astype(np.uint8) * 255).save(sample.mask_path)
    left = replace(sample, big_box=np.array([3.0, 8, 24, 34]), small_box=np.array([8.0, 14, 16, 26]))
    right = replace(sample, lesion_id="1", big_box=np.array([36.0, 10, 64, 44]), small_box=np.array([45.0, 20, 55, 30]))
    assert [boxes.tolist() for boxes in other_boxes([left, right])] == [[[36, 10, 64, 44]], [[3, 8, 24, 34]]]
    data = open_dataset([left, right], Frame(64), tmp_path / "cache", with_masks=True)
    batch = data.batch([0, 1])
    assert batch.masks is not None
    assert batch.ids == ("image0/0", "image0/1")
    assert np.array_equal(batch.masks[0].numpy()[:48] > 0, mask & (np.arange(64) < 24))
    assert np.array_equal(batch.masks[1].numpy()[:48] > 0, mask & (np.arange(64) >= 36))
    assert not batch.valid[0, 10:44, 36:64].any()
    assert bool(batch.valid[0, 8:34, 3:24].all())
    assert not batch.valid[1, 8:34, 3:24].any()


# ---- the cache -------------------------------------------------------------------------------------------------------


def counting(monkeypatch: pytest.MonkeyPatch, fail_at: int = -1) -> list[str]:
    """Names of the images decoded from now on; `prepare` fails at the given one."""
    seen: list[str] = []
    prepare = frames_module.prepare

    def spy(sample: Sample, *rest: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if len(seen) == fail_at:
            raise KeyboardInterrupt
        seen.append(sample.image_id)
        return prepare(sample, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(frames_module, "prepare", spy)
    return seen


def test_frames_are_made_once_and_made_anew_when_anything_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, cache = write_samples(tmp_path / "files"), tmp_path / "cache"
    seen = counting(monkeypatch)
    first = load_frames(samples, Frame(SIDE), cache)
    assert len(seen) == 4
    again = load_frames(samples, Frame(SIDE), cache)
    assert len(seen) == 4
    assert np.array_equal(first.priors, again.priors)

    def decodes(changed: list[Sample], side: int = SIDE, threshold: bool = False) -> bool:
        before = len(seen)
        load_frames(changed, Frame(side), cache, threshold_masks=threshold)
        return len(seen) > before

    assert decodes(samples, side=64)
    assert decodes(samples, threshold=True)
    assert decodes(samples[:3])
    assert decodes([replace(samples[0], big_box=samples[0].big_box + 0.5), *samples[1:]])
    assert decodes([replace(samples[0], small_box=samples[0].small_box + 0.5), *samples[1:]])
    assert not decodes(samples)
    os.utime(samples[0].image_path, ns=(1, 1))
    assert not decodes(samples), "another date, the same contents"
    with Image.open(samples[1].image_path) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(samples[1].image_path)
    assert decodes(samples)


@pytest.mark.parametrize("kind", ["image_path", "mask_path"])
def test_a_file_replaced_with_its_size_and_date_kept_is_decoded_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As `cp -p` leaves it, in a format without compression."""
    samples, cache = write_samples(tmp_path / "files"), tmp_path / "cache"
    samples = [replace(sample, **{kind: bitmap(getattr(sample, kind))}) for sample in samples]
    path: Path = getattr(samples[0], kind)
    load_frames(samples, Frame(SIDE), cache)
    seen, before = counting(monkeypatch), path.stat()
    with Image.open(path) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    load_frames(samples, Frame(SIDE), cache)
    assert len(seen) == 4


def test_frames_are_made_anew_for_other_code_and_not_for_other_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, cache = write_samples(tmp_path / "files", [WIDE]), tmp_path / "cache"
    load_frames(samples, Frame(SIDE), cache)
    seen = counting(monkeypatch)
    worded = package_copy(tmp_path / "worded", dict.fromkeys(module_files(PACKAGE), reworded))
    monkeypatch.setattr(code, "PACKAGE", worded)
    load_frames(samples, Frame(SIDE), cache)
    assert seen == []
    for name in ("boxes.prior", "utils.images"):
        monkeypatch.setattr(code, "PACKAGE", package_copy(tmp_path / name, {name: recoded}))
        load_frames(samples, Frame(SIDE), cache)
    assert len(seen) == 2


def bitmap(path: Path) -> Path:
    """Write the picture again as BMP, and return where."""
    with Image.open(path) as image:
        image.save(path.with_suffix(".bmp"))
    return path.with_suffix(".bmp")


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_file_that_is_not_the_one_of_the_index_is_refused(tmp_path: Path, kind: str) -> None:
    """Its frames would be kept under the name of the other file's contents."""
    (sample,) = write_samples(tmp_path / "files", [WIDE])
    listed = replace(sample, image_sha256=image_sha256(sample), mask_sha256=mask_sha256(sample))
    path: Path = getattr(sample, f"{kind}_path")
    with Image.open(path) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    with pytest.raises(UserError, match=rf"{path.name}: not the file that data/raw/index.csv lists"):
        load_frames([listed], Frame(SIDE), tmp_path / "cache")


def test_an_interrupted_build_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, cache = write_samples(tmp_path / "files"), tmp_path / "cache"
    with monkeypatch.context() as patch:
        counting(patch, fail_at=2)
        with pytest.raises(KeyboardInterrupt):
            load_frames(samples, Frame(SIDE), cache)
    assert list(cache.iterdir()) == []
    with monkeypatch.context() as patch:
        counting(patch, fail_at=2)
        patch.setattr(frames_module.shutil, "rmtree", lambda *arguments, **options: None)  # as after a kill
        with pytest.raises(KeyboardInterrupt):
            load_frames(samples, Frame(SIDE), cache)
    assert len(list(cache.glob("building-*"))) == 1
    assert load_frames(samples, Frame(SIDE), cache).images.shape == (4, SIDE, SIDE, 3)
    assert not list(cache.glob("building-*")), "gigabytes, each time"


def test_two_that_want_the_same_images_decode_them_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins while the first decodes, and waits."""
    samples, cache = write_samples(tmp_path / "files"), tmp_path / "cache"
    real, waits, found, seen = frames_module.prepare, threading.Event(), [], []
    monkeypatch.setattr(frames_module, "say", lambda line: waits.set())
    second = threading.Thread(target=lambda: found.append(load_frames(samples, Frame(SIDE), cache)), daemon=True)

    def prepare(*arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == 1:
            second.start()
            assert waits.wait(60), "two would write at once"
        return real(*arguments)

    monkeypatch.setattr(frames_module, "prepare", prepare)
    first = load_frames(samples, Frame(SIDE), cache)
    second.join(60)
    assert np.array_equal(first.images, found[0].images)
    assert len(seen) == len(samples)


def test_a_folder_without_its_index_is_not_taken_for_finished(tmp_path: Path) -> None:
    samples, cache = write_samples(tmp_path / "files"), tmp_path / "cache"
    wanted = np.array(load_frames(samples, Frame(SIDE), cache).images)
    (folder,) = cache.iterdir()
    assert json.loads((folder / "frames.json").read_text())["count"] == 4
    for path in folder.iterdir():
        path.unlink()  # an empty folder is what a crash between two of the system's writes may leave
    assert np.array_equal(load_frames(samples, Frame(SIDE), cache).images, wanted)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    samples, cache = write_samples(tmp_path / "files"), tmp_path / "cache"
    with pytest.raises(UserError, match=r"image0\.png: 64x48 px, but the index says 60x48"):
        load_frames([replace(samples[0], width=60)], Frame(SIDE), cache)
    assert samples[1].mask_path is not None
    Image.new("L", (10, 10)).save(samples[1].mask_path)
    with pytest.raises(UserError, match=r"mask1\.png: mask is 10x10 px; expected 40x64"):
        load_frames(samples, Frame(SIDE), cache)
    samples[2].image_path.write_bytes(samples[2].image_path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"image2\.png"):
        load_frames(samples[2:], Frame(SIDE), cache)
    samples[3].image_path.unlink()
    with pytest.raises(UserError, match=r"image3\.png: no such file, named by the index for image 'image3'"):
        load_frames(samples[3:], Frame(SIDE), cache)
    assert list(cache.iterdir()) == []


def test_an_image_too_thin_for_the_model_is_named(tmp_path: Path) -> None:
    (sample,) = write_samples(tmp_path / "files", [WIDE])
    Image.new("RGB", (400, 2)).save(sample.image_path)
    thin = replace(
        sample,
        width=400,
        height=2,
        mask_path=None,
        big_box=np.array([10.0, 0, 60, 2]),
        small_box=np.array([20.0, 0.5, 40, 1.5]),
    )
    with pytest.raises(UserError, match=r"image0\.png: an image of 400x2 px is too thin"):
        load_frames([thin], Frame(SIDE), tmp_path / "cache")


def test_too_little_disk_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = write_samples(tmp_path / "files")
    seen = counting(monkeypatch)
    monkeypatch.setattr(frames_module, "free_disk_bytes", lambda path: 1000)
    with pytest.raises(UserError, match=r"GB needed for 4 decoded images.*free space or lower model\.image_size"):
        load_frames(samples, Frame(SIDE), tmp_path / "cache")
    assert seen == []
