"""Decoded images, box priors and masks in the model frame, made once and kept in a cache folder.

One folder per set of samples, keyed by everything its pixels depend on (contents of the files, boxes, side, code);
built beside its place and moved there when whole, so that a killed build leaves nothing that looks finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lesionsam.boxes.geometry import model_frame_size, pixels_inside, to_model_frame
from lesionsam.boxes.prior import OUTSIDE, prior_at
from lesionsam.data.contents import load_image, load_mask, samples_digest
from lesionsam.errors import UserError
from lesionsam.models.transforms import resize_to_frame
from lesionsam.types import Frame, Sample
from lesionsam.utils.code import NO_RESULT, code_digest
from lesionsam.utils.files import free_disk_bytes
from lesionsam.utils.images import resize
from lesionsam.utils.locks import file_lock
from lesionsam.utils.processes import exit_without
from lesionsam.utils.progress import progress, say

PRIOR_SCALE = 36.0  # int8 steps per logit; the prior lies in [-3.5, 3.5]
UNKNOWN = 255  # in masks: nobody drew one
INDEX_NAME = "frames.json"
BUILDING = "building-"  # begins the name of a folder that is not whole yet


@dataclass(frozen=True)
class Frames:
    """The N samples in the model frame of side S; images, priors and masks are memory-mapped from the cache.

    Attributes:
        images: (N, S, S, 3) uint8 RGB.
        priors: (N, S, S) int8, logits times `PRIOR_SCALE`.
        masks: (N, S, S) uint8, 1 lesion, 0 not, `UNKNOWN` everywhere where there is no mask.
        sizes: (N, 2) int64, height and width of the image part. big_boxes, small_boxes: (N, 4) float32 XYXY.
        others: for each sample, (M, 4) float32 big boxes of the image's other lesions.
        squash: whether the frames are squashed, see `types.Frame`.
    """

    images: np.ndarray
    priors: np.ndarray
    masks: np.ndarray
    sizes: np.ndarray
    big_boxes: np.ndarray
    small_boxes: np.ndarray
    others: tuple[np.ndarray, ...]
    squash: bool = False


def prepare(
    sample: Sample, others: np.ndarray, frame: Frame, threshold_masks: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return one sample in the model frame: image (S, S, 3) uint8, prior (S, S) int8, mask (S, S) uint8."""
    image = load_image(sample)
    if image.shape[:2] != (sample.height, sample.width):
        raise UserError(
            f"{sample.image_path}: {image.shape[1]}x{image.shape[0]} px, but the index says {sample.width}x"
            f"{sample.height}; the file has changed: run `dvc repro` from the download stage on"
        )
    try:
        small_image = resize_to_frame(image, frame)
    except UserError as error:
        raise UserError(f"{sample.image_path}: {error}") from None
    height, width = small_image.shape[:2]
    side = frame.side
    framed = np.zeros((side, side, 3), np.uint8)
    framed[:height, :width] = small_image
    scale = np.array([width / sample.width, height / sample.height] * 2)
    prior = np.full((side, side), np.int8(OUTSIDE * PRIOR_SCALE))
    logits = prior_at(small_image, sample.big_box * scale, sample.small_box * scale, others * scale, (height, width))
    prior[:height, :width] = np.round(logits * PRIOR_SCALE).astype(np.int8)
    mask = np.full((side, side), UNKNOWN, np.uint8)
    truth = load_mask(sample, threshold=threshold_masks)
    if truth is not None:
        if len(others) and not sample.own_mask:
            truth = truth & pixels_inside(sample.big_box, truth.shape)
        mask[:] = 0
        mask[:height, :width] = resize(truth.astype(np.uint8) * np.uint8(255), height, width) > 127
    return framed, prior, mask


def other_boxes(samples: Sequence[Sample]) -> list[np.ndarray]:
    """Return for each sample the (M, 4) big boxes of the other lesions of its image, original pixels."""
    by_image: dict[str, list[int]] = {}
    for k, sample in enumerate(samples):
        by_image.setdefault(sample.image_id, []).append(k)
    return [
        np.array([samples[j].big_box for j in by_image[s.image_id] if j != k], float).reshape(-1, 4)
        for k, s in enumerate(samples)
    ]


def _key(samples: Sequence[Sample], frame: Frame, threshold_masks: bool) -> str:
    code = code_digest("data.frames", without=NO_RESULT)
    text = f"{frame}|{threshold_masks}|{code}|{samples_digest(samples)}"
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def load_frames(
    samples: Sequence[Sample],
    frame: Frame,
    cache: Path,
    *,
    threshold_masks: bool = False,
    num_workers: int = 0,
    title: str = "images",
) -> Frames:
    """Decode, resize and compute the priors of all samples, or open what an earlier call kept.

    Args:
        samples: in the order wanted. cache: folder that holds one subfolder per key.
        num_workers: processes that decode; 0 decodes in this one.
    Raises:
        UserError: an image or mask that cannot be read, or too little disk.
    """
    folder = cache / _key(samples, frame, threshold_masks)
    others = other_boxes(samples)
    if not (folder / INDEX_NAME).exists():
        with file_lock(cache.with_name(f".{cache.name}-{folder.name}.lock"), f"decoding {title}", waiting=say):
            if not (folder / INDEX_NAME).exists():  # nobody made it meanwhile
                _build(samples, others, frame, folder, threshold_masks, num_workers, title)
    os.utime(folder)
    sizes = np.array([model_frame_size(s.width, s.height, frame) for s in samples], np.int64).reshape(-1, 2)

    def framed(box: np.ndarray, s: Sample) -> np.ndarray:
        return to_model_frame(box, s.width, s.height, frame).astype(np.float32)

    return Frames(
        *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "priors", "masks")),
        sizes=sizes,
        big_boxes=np.array([framed(s.big_box, s) for s in samples]).reshape(-1, 4),
        small_boxes=np.array([framed(s.small_box, s) for s in samples]).reshape(-1, 4),
        others=tuple(framed(boxes, s) for boxes, s in zip(others, samples, strict=True)),
        squash=frame.squash,
    )


def _build(
    samples: Sequence[Sample],
    others: Sequence[np.ndarray],
    frame: Frame,
    folder: Path,
    threshold_masks: bool,
    num_workers: int,
    title: str,
) -> None:
    side = frame.side
    temporary = folder.with_name(f"{BUILDING}{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by one that was killed: gigabytes, each time
    needed = len(samples) * side * side * 5
    if needed > free_disk_bytes(folder.parent):
        raise UserError(
            f"{folder.parent}: {needed / 1e9:.1f} GB needed for {len(samples)} decoded {title}, "
            f"{free_disk_bytes(folder.parent) / 1e9:.1f} GB free; free space or lower model.image_size"
        )
    count = len(samples)
    try:
        temporary.mkdir(parents=True)
        shapes = {
            "images": ((count, side, side, 3), np.uint8),
            "priors": ((count, side, side), np.int8),
            "masks": ((count, side, side), np.uint8),
        }
        arrays = [
            np.lib.format.open_memmap(temporary / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
            for name, (shape, dtype) in shapes.items()
        ]
        arguments = list(zip(samples, others, [frame] * count, [threshold_masks] * count, strict=True))
        decoded = _prepared(arguments, num_workers)
        for k, parts in enumerate(progress(decoded, total=count, title=f"decoding {title}")):
            for array, part in zip(arrays, parts, strict=True):
                array[k] = part
        for array in arrays:
            array.flush()
        (temporary / INDEX_NAME).write_text(json.dumps({"side": side, "count": count}))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _prepared(arguments: Sequence[tuple], num_workers: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the results of `prepare` in order, from worker processes; where one of them is killed, as the
    system does when memory runs out, the rest is decoded here."""
    done = 0
    if num_workers:
        try:
            with ProcessPoolExecutor(num_workers, initializer=exit_without, initargs=(os.getpid(),)) as pool:
                for parts in pool.map(prepare, *zip(*arguments, strict=True)):
                    yield parts
                    done += 1
                return
        except BrokenProcessPool:
            say(
                "a process that decodes images was killed (is the memory full?); going on without such processes; "
                "lower runtime.num_workers to start without them"
            )
    for each in arguments[done:]:
        yield prepare(*each)
