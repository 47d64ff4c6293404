"""Masks for images: the interactive `Predictor`, and `predict_files`, which segments files given their boxes."""

from __future__ import annotations

import csv
import hashlib
import math
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lesionsam import metrics
from lesionsam.boxes import to_model_frame
from lesionsam.errors import UserError
from lesionsam.files import atomic_write, read_image, sha256_file
from lesionsam.inference_inputs import Job, Lesion, find_images, plan
from lesionsam.models.sam import Sam, decode, encode, load_sam, model_frames, preprocess, upscale
from lesionsam.overlays import overlay
from lesionsam.progress import progress
from lesionsam.prompts import KINDS, seeded_prompts
from lesionsam.types import Prompts

TABLE = "predictions.csv"
COLUMNS = ("image_id", "lesion_id", "width", "height", "mask", "area", "predicted_iou", "entropy", "key")
SEED, NUM_POINTS = 0, 10  # of drawn prompts; as in the evaluation's defaults
VERSION = 1  # of what a row's key stands for
SAVE_SECONDS = 5.0
READERS = 2  # threads that decode images while the model runs
SHOWN_IDS = 3


class Predictor:
    """SAM on one image at a time with any number of prompts, with the verbs of segment_anything's SamPredictor.

    Coordinates are pixels of the original image. Features of the last few images are kept, so that coming back to one
    costs no second encoder pass: the weights must not change while a Predictor lives.

    Args:
        sam: moved to the device and set to eval mode. num_cached: images whose features are kept.
    """

    def __init__(self, sam: Sam, device: torch.device | str = "cpu", *, num_cached: int = 8) -> None:
        self.sam, self.device, self.num_cached = sam.to(device).eval(), torch.device(device), num_cached
        self._cache: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self.reset_image()

    @property
    def side(self) -> int:
        """S, side of the model's input, pixels."""
        return int(self.sam.image_encoder.img_size)

    def reset_image(self) -> None:
        """Forget the image and every kept feature."""
        self._cache.clear()
        self._features: torch.Tensor | None = None
        self.original_size, self.input_size = (0, 0), (0, 0)

    @torch.inference_mode()
    def set_image(self, image: np.ndarray) -> None:
        """Encode an image.

        Args:
            image: (H, W, 3) uint8 RGB, original frame.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"image: expected (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}")
        key = hashlib.blake2b(np.ascontiguousarray(image).data, person=b"%dx%d" % image.shape[:2]).digest()
        frames, sizes = model_frames([image], self.side)
        if key not in self._cache:
            frames, sizes_there = frames.to(self.device), sizes.to(self.device)
            self._cache[key] = encode(self.sam, preprocess(frames, sizes_there))
            while len(self._cache) > self.num_cached:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        self._features = self._cache[key]
        self.original_size, self.input_size = (image.shape[0], image.shape[1]), (int(sizes[0, 0]), int(sizes[0, 1]))

    def get_image_embedding(self) -> torch.Tensor:
        """(1, C, H', W') features of the image that is set."""
        if self._features is None:
            raise RuntimeError("no image is set; call set_image first")
        return self._features

    @torch.inference_mode()
    def predict(self, point_coords: np.ndarray | None = None, point_labels: np.ndarray | None = None,
                box: np.ndarray | None = None, mask_input: np.ndarray | None = None, multimask_output: bool = True,
                return_logits: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks of one prompt: everything given is one joint prompt.

        Args:
            point_coords: (N, 2) XY. point_labels: (N,), 1 foreground, 0 background. box: (4,) XYXY.
            mask_input: (1, T, T) logits of an earlier call. multimask_output: three candidates instead of one mask.
            return_logits: masks as logits.
        Returns:
            masks (K, H, W) bool (or float32 logits), original frame; iou_predictions (K,) float32; low_res_masks
            (K, T, T) float32 logits, model frame, T = 4 H'.
        """
        features = self.get_image_embedding()
        if (point_coords is None) != (point_labels is None):
            raise ValueError("point_coords and point_labels: expected both or neither")
        points = labels = boxes = masks = None
        if point_coords is not None and point_labels is not None:
            points, labels = self._framed(point_coords), torch.as_tensor(point_labels, dtype=torch.int64)[None]
            if points.shape[1:] != (labels.shape[1], 2):
                raise ValueError(f"point_coords: expected ({labels.shape[1]}, 2) for as many labels, got "
                                 f"{np.shape(point_coords)}")
        if box is not None:
            boxes = self._framed(box)
            if boxes.shape != (1, 4):
                raise ValueError(f"box: expected (4,) XYXY, got {np.shape(box)}")
        if mask_input is not None:
            masks = torch.as_tensor(mask_input, dtype=torch.float32)[None]
        prompts = Prompts(points, labels, boxes, masks).to(self.device)
        low_res, predicted = decode(self.sam, features, prompts, multimask_output)
        low_res = low_res[0].float()
        logits = upscale(low_res, self.input_size, self.original_size, self.side)
        full = logits if return_logits else logits > self.sam.mask_threshold
        return full.cpu().numpy(), predicted[0].float().cpu().numpy(), low_res.cpu().numpy()

    def _framed(self, coordinates: np.ndarray) -> torch.Tensor:
        height, width = self.original_size
        return torch.as_tensor(to_model_frame(np.asarray(coordinates, float), width, height, self.side),
                               dtype=torch.float32)[None]


@dataclass(frozen=True)
class Options:
    """What a run of `predict_files` was asked for.

    Attributes:
        weights_sha256: of the weights file. prompt: of `prompts.KINDS`. threshold: probability above which a pixel is
            lesion. out: folder of the outputs. overlays: pictures too.
    """

    weights_sha256: str
    prompt: str
    threshold: float
    out: Path
    overlays: bool

    @property
    def needs_small(self) -> bool:
        """Whether the prompt reads the small box."""
        return self.prompt not in ("box", "tight")

    def key(self, image_sha256: str, lesion: Lesion) -> str:
        """Hash of everything that a lesion's row in the table depends on."""
        parts = (VERSION, SEED, NUM_POINTS, self.weights_sha256, self.prompt, self.threshold, image_sha256,
                 lesion.file_name, sorted(lesion.row.items()))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Prepared:
    """An image with the lesions that are still to do.

    Attributes:
        image: (H, W, 3) uint8 RGB. frame: (1, 3, S, S) uint8. size: (1, 2) height and width of its image part.
        todo: (lesion, its key, big box, small box), boxes (4,) XYXY in original pixels.
        finished: lesion ids whose rows and files are there. faults: one line for each row that is wrong.
    """

    image: np.ndarray
    frame: torch.Tensor
    size: torch.Tensor
    todo: list[tuple[Lesion, str, np.ndarray, np.ndarray]]
    finished: list[str]
    faults: list[str]


def predict_files(images: Sequence[str | Path], boxes: Path, *, weights: Path, out: Path, prompt: str = "box",
                  device: torch.device | str = "cpu", batch_size: int = 8, overlays: bool = True,
                  threshold: float = 0.5) -> int:
    """Segment the lesions of image files, given their boxes.

    Writes, each file whole or not at all: masks/<image_id>.png (<image_id>_<lesion_id>.png where an image has several
    rows) of 0 and 255 at the image's original size, overlays/ of the same names, and predictions.csv. What an earlier
    call with the same weights, prompt, threshold, boxes and image has done is kept.

    Args:
        images: files, folders, patterns. boxes: CSV with image_id, [lesion_id], big_x0, big_y0, big_x1, big_y1 and, where
            the prompt needs the core, small_x0 to small_y1; original pixels. prompt: of `prompts.KINDS`.
        weights: SAM's or this project's; the file says which model it holds. batch_size: images per encoder pass and
            lesions per decoder pass. threshold: probability above which a pixel is lesion.
    Returns:
        exit code: 0, or 1 if an image or a row that was asked for gave no mask; each is named on stderr.
    Raises:
        UserError: nothing can be predicted at all.
    """
    if prompt not in KINDS:
        raise UserError(f"--prompt: expected one of {', '.join(KINDS)}, got {prompt!r}")
    if not 0 < threshold < 1:
        raise UserError(f"--threshold: expected a probability between 0 and 1, got {threshold:g}")
    if batch_size < 1:
        raise UserError(f"--batch-size: expected at least 1 image, got {batch_size}")
    paths, problems = find_images(images)
    if not paths:
        raise UserError(problems[0] if problems else "no images given; name files, folders or patterns")
    needs_small = Options("", prompt, threshold, out, overlays).needs_small
    jobs, unmatched, unused = plan(paths, boxes, with_small=needs_small)
    problems += unmatched
    for line in problems:
        _complain(line)
    if unused:
        shown = ", ".join(unused[:SHOWN_IDS]) + (", ..." if len(unused) > SHOWN_IDS else "")
        print(f"note: {boxes} has rows of {len(unused)} images that were not given: {shown}", file=sys.stderr)
    sam = load_sam(None, weights).to(device)
    run = _Run(sam, Options(sha256_file(weights), prompt, threshold, out, overlays), device, batch_size)
    try:
        run.work(jobs)
    except torch.OutOfMemoryError:
        raise UserError(f"the GPU's memory does not suffice for {batch_size} images at once; lower --batch-size or use "
                        "--device cpu") from None
    finally:
        run.save()
    faults = len(problems) + run.num_faults
    print(f"{run.num_done} masks written to {out / 'masks'}"
          + (f", {run.num_kept} kept from before" if run.num_kept else "")
          + (f", {run.num_empty} of them empty" if run.num_empty else "")
          + (f"; {faults} faults, named above" if faults else ""))
    return 1 if faults else 0


def _complain(line: str) -> None:
    print(f"error: {line}", file=sys.stderr, flush=True)


class _Run:
    """The state of one call of `predict_files`: the table, and what was counted."""

    def __init__(self, sam: Sam, options: Options, device: torch.device | str, batch_size: int) -> None:
        self.sam, self.options, self.device, self.batch_size = sam, options, device, batch_size
        self.side = int(sam.image_encoder.img_size)
        self.rows = read_table(options.out / TABLE)
        self.num_done = self.num_kept = self.num_empty = self.num_faults = 0
        self.saved = time.monotonic()

    def work(self, jobs: Sequence[Job]) -> None:
        """Predict every job; faults are named and counted."""
        chunk: list[tuple[Job, Prepared]] = []
        with ThreadPoolExecutor(READERS) as pool:
            for job, future in progress(self._ahead(jobs, pool), total=len(jobs), title="predicting"):
                try:
                    prepared = future.result()
                except (UserError, OSError) as error:
                    self._fault(job, str(error), {lesion.lesion_id for lesion in job.lesions})
                    continue
                for line in prepared.faults:
                    self._fault(job, line, set())
                self.num_kept += len(prepared.finished)
                for lesion in job.lesions:
                    if lesion.lesion_id not in prepared.finished:
                        self.rows.pop((job.image_id, lesion.lesion_id), None)
                if prepared.todo:
                    chunk.append((job, prepared))
                if len(chunk) == self.batch_size:
                    self._predict(chunk)
                    chunk = []
            if chunk:
                self._predict(chunk)

    def _fault(self, job: Job, line: str, lost: set[str]) -> None:
        _complain(line)
        self.num_faults += 1
        for lesion_id in lost:
            self.rows.pop((job.image_id, lesion_id), None)

    def _ahead(self, jobs: Sequence[Job], pool: ThreadPoolExecutor) -> Iterator[tuple[Job, Future[Prepared]]]:
        """The jobs with their images, decoded a few ahead of the one that is asked for."""
        left = iter(jobs)
        waiting = deque((job, pool.submit(self._prepare, job)) for job in islice(left, READERS + 1))
        while waiting:
            yield waiting.popleft()
            waiting.extend((job, pool.submit(self._prepare, job)) for job in islice(left, 1))

    def _prepare(self, job: Job) -> Prepared:
        """Read an image, unless all that it is asked for is there."""
        digest = sha256_file(job.path)
        keys = [self.options.key(digest, lesion) for lesion in job.lesions]
        finished = [lesion.lesion_id for lesion, key in zip(job.lesions, keys, strict=True)
                    if self._is_finished(job, lesion, key)]
        if len(finished) == len(job.lesions):
            return Prepared(np.zeros((0, 0, 3), np.uint8), torch.zeros(0), torch.zeros(0), [], finished, [])
        image = read_image(job.path)
        height, width = image.shape[:2]
        todo, faults = [], []
        for lesion, key in zip(job.lesions, keys, strict=True):
            if lesion.lesion_id not in finished:
                try:
                    big, small = lesion.boxes(width, height, with_small=self.options.needs_small)
                    todo.append((lesion, key, big, small))
                except ValueError as error:
                    faults.append(f"boxes, line {lesion.line}, {error}")
        try:
            frame, size = model_frames([image], self.side)
        except UserError as error:
            raise UserError(f"{job.path}: {error}") from None
        return Prepared(image, frame, size, todo, finished, faults)

    def _is_finished(self, job: Job, lesion: Lesion, key: str) -> bool:
        row = self.rows.get((job.image_id, lesion.lesion_id))
        folders = ("masks", "overlays") if self.options.overlays else ("masks",)
        return (row is not None and row["key"] == key
                and all((self.options.out / folder / lesion.file_name).is_file() for folder in folders))

    @torch.inference_mode()
    def _predict(self, chunk: Sequence[tuple[Job, Prepared]]) -> None:
        """Encode a batch of images once and decode all their lesions."""
        frames = torch.cat([prepared.frame for _, prepared in chunk]).to(self.device)
        sizes = torch.cat([prepared.size for _, prepared in chunk])
        features = encode(self.sam, preprocess(frames, sizes.to(self.device)))
        asked = [(k, *entry) for k, (_, prepared) in enumerate(chunk) for entry in prepared.todo]
        for low in range(0, len(asked), self.batch_size):
            part = asked[low : low + self.batch_size]
            owner = [k for k, *_ in part]
            shapes = [chunk[k][1].image.shape for k in owner]
            big, small = (
                torch.tensor(np.stack([to_model_frame(entry[which], w, h, self.side)
                                       for entry, (h, w, _) in zip(part, shapes, strict=True)]), dtype=torch.float32)
                for which in (3, 4)
            )
            ids = [f"{chunk[k][0].image_id}/{lesion.lesion_id}" for k, lesion, *_ in part]
            prompts = seeded_prompts(self.options.prompt, big, small, ids, num_points=NUM_POINTS, seed=SEED)
            low_res, predicted = decode(self.sam, features[owner], prompts.to(self.device))
            for j, (k, lesion, key, big_box, small_box) in enumerate(part):
                job, prepared = chunk[k]
                size = (int(sizes[k, 0]), int(sizes[k, 1]))
                logits = upscale(low_res[j, 0], size, (shapes[j][0], shapes[j][1]), self.side).cpu().numpy()
                points = None
                if prompts.points is not None:
                    points = prompts.points[j].numpy() * (shapes[j][1] / size[1], shapes[j][0] / size[0])
                core = small_box if self.options.needs_small else None
                self._write(job, prepared, lesion, key, logits, float(predicted[j, 0]), big_box, core, points)
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def _write(self, job: Job, prepared: Prepared, lesion: Lesion, key: str, logits: np.ndarray, predicted_iou: float,
               big: np.ndarray, small: np.ndarray | None, points: np.ndarray | None) -> None:
        """Mask, overlay, and then the row that says both are there."""
        options = self.options
        mask = logits > math.log(options.threshold / (1 - options.threshold))
        area = int(np.count_nonzero(mask))
        _write_png(options.out / "masks" / lesion.file_name, mask.astype(np.uint8) * 255)
        if options.overlays:
            caption = f"{Path(lesion.file_name).stem}: {100 * area / mask.size:.1f} % of the image, predicted IoU {predicted_iou:.2f}"
            _write_png(options.out / "overlays" / lesion.file_name,
                       overlay(prepared.image, prediction=mask, big=big, small=small, points=points, caption=caption))
        values = (job.image_id, lesion.lesion_id, mask.shape[1], mask.shape[0], f"masks/{lesion.file_name}", area,
                  f"{predicted_iou:.4f}", f"{metrics.mean_entropy(logits):.4f}", key)
        self.rows[(job.image_id, lesion.lesion_id)] = dict(zip(COLUMNS, map(str, values), strict=True))
        self.num_done += 1
        self.num_empty += area == 0

    def save(self) -> None:
        """Write the table."""
        if not self.rows and not (self.options.out / TABLE).exists():
            return
        with atomic_write(self.options.out / TABLE, "w") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows.values())
        self.saved = time.monotonic()


def read_table(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Rows of an earlier call's predictions.csv by (image_id, lesion_id); none where there is no such file."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path}: is not a table of `lesionsam predict` (expected the columns {', '.join(COLUMNS)}); "
                            "move it away or choose another --out")
        return {(row["image_id"], row["lesion_id"]): row for row in reader}


def _write_png(path: Path, pixels: np.ndarray) -> None:
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")
