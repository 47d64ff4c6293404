"""The work of `lesionsam predict`: images decoded ahead, batches encoded once, every lesion's files and its row."""

from __future__ import annotations

import csv
import hashlib
import math
import sys
import time
from collections import deque
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
from lesionsam.inference_inputs import Job, Lesion, needs_small
from lesionsam.models.sam import Sam, decode, encode, model_frames, preprocess, upscale
from lesionsam.overlays import overlay
from lesionsam.progress import progress
from lesionsam.prompts import seeded_prompts

TABLE = "predictions.csv"
COLUMNS = ("image_id", "lesion_id", "width", "height", "mask", "area", "predicted_iou", "entropy", "key")
SEED, NUM_POINTS = 0, 10  # of drawn prompts; as in the evaluation's defaults
VERSION = 1  # of what a row's key stands for
SAVE_SECONDS = 5.0
READERS = 2  # threads that decode images while the model runs


@dataclass(frozen=True)
class Options:
    """What a call of `predict_files` asks for.

    Attributes:
        weights_sha256: of the weights file. boxes: the box CSV, for messages. prompt: of `prompts.KINDS`.
        threshold: probability above which a pixel is lesion. out: folder of the outputs. overlays: pictures too.
    """

    weights_sha256: str
    boxes: Path
    prompt: str
    threshold: float
    out: Path
    overlays: bool

    def key(self, image_sha256: str, lesion: Lesion) -> str:
        """Hash of everything that a lesion's row in the table depends on."""
        parts = (VERSION, SEED, NUM_POINTS, self.weights_sha256, self.prompt, self.threshold, image_sha256,
                 lesion.file_name, sorted(lesion.row.items()))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def files(self, lesion: Lesion) -> list[Path]:
        """Where its mask and, if wanted, its overlay go."""
        return [self.out / folder / lesion.file_name for folder in ("masks", "overlays")[: 1 + self.overlays]]


@dataclass(frozen=True)
class Target:
    """A lesion to segment.

    Attributes:
        key: see `Options.key`. big, small: (4,) XYXY, original pixels; small is the big box again where the prompt has
            no use for it.
    """

    lesion: Lesion
    key: str
    big: np.ndarray
    small: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """An image with those of its lesions that are to be segmented.

    Attributes:
        image: (H, W, 3) uint8 RGB. frame: (1, 3, S, S) uint8. size: (1, 2) height and width of its image part.
        faults: one line for each row that is wrong.
    """

    job: Job
    image: np.ndarray
    frame: torch.Tensor
    size: torch.Tensor
    targets: list[Target]
    faults: list[str]

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W), original pixels."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def input_size(self) -> tuple[int, int]:
        """(h, w) of the image part of the model frame."""
        return int(self.size[0, 0]), int(self.size[0, 1])


def complain(line: str) -> None:
    """Name a fault that does not end the run."""
    print(f"error: {line}", file=sys.stderr, flush=True)


class Run:
    """The state of one call of `predict_files`: the table, and what was counted."""

    def __init__(self, sam: Sam, options: Options, device: torch.device | str, batch_size: int) -> None:
        self.sam, self.options, self.device, self.batch_size = sam, options, device, batch_size
        self.side = int(sam.image_encoder.img_size)
        self.rows = read_table(options.out / TABLE)
        self.num_done = self.num_kept = self.num_empty = self.num_faults = 0
        self.saved = time.monotonic()

    def work(self, jobs: Sequence[Job]) -> None:
        """Segment every lesion of every job; faults are named and counted, and cost no other lesion its mask."""
        batch: list[Prepared] = []
        with ThreadPoolExecutor(READERS) as pool:
            for job, future in progress(self._ahead(jobs, pool), total=len(jobs), title="predicting"):
                try:
                    prepared = future.result()
                except (UserError, OSError) as error:
                    self._fault(str(error))
                    for lesion in job.lesions:
                        self._forget(job, lesion)
                    continue
                if prepared is None:
                    self.num_kept += len(job.lesions)
                    continue
                for line in prepared.faults:
                    self._fault(line)
                for lesion in job.lesions:
                    self._forget(job, lesion)
                if prepared.targets:
                    batch.append(prepared)
                if len(batch) == self.batch_size:
                    self._segment(batch)
                    batch = []
            if batch:
                self._segment(batch)

    def _ahead(self, jobs: Sequence[Job], pool: ThreadPoolExecutor) -> Iterator[tuple[Job, Future[Prepared | None]]]:
        """The jobs with their images, a few decoded ahead of the one that is asked for."""
        left = iter(jobs)
        waiting = deque((job, pool.submit(self._prepare, job)) for job in islice(left, READERS + 1))
        while waiting:
            yield waiting.popleft()
            waiting.extend((job, pool.submit(self._prepare, job)) for job in islice(left, 1))

    def _prepare(self, job: Job) -> Prepared | None:
        """Read an image and check its boxes; None where the outputs of all its lesions are there already."""
        digest = sha256_file(job.path)
        keys = [self.options.key(digest, lesion) for lesion in job.lesions]
        if all(self._is_finished(job, lesion, key) for lesion, key in zip(job.lesions, keys, strict=True)):
            return None
        image = read_image(job.path)
        try:
            frame, size = model_frames([image], self.side)
        except UserError as error:
            raise UserError(f"{job.path}: {error}") from None
        targets, faults = [], []
        for lesion, key in zip(job.lesions, keys, strict=True):
            try:
                boxes = lesion.boxes(image.shape[1], image.shape[0], with_small=needs_small(self.options.prompt))
                targets.append(Target(lesion, key, *boxes))
            except ValueError as error:
                faults.append(f"{self.options.boxes}: line {lesion.line}, {error}")
        return Prepared(job, image, frame, size, targets, faults)

    def _is_finished(self, job: Job, lesion: Lesion, key: str) -> bool:
        row = self.rows.get((job.image_id, lesion.lesion_id))
        return row is not None and row["key"] == key and all(path.is_file() for path in self.options.files(lesion))

    def _fault(self, line: str) -> None:
        complain(line)
        self.num_faults += 1

    def _forget(self, job: Job, lesion: Lesion) -> None:
        """Drop what an earlier call left of a lesion, so that nothing outdated stands beside this call's faults."""
        if self.rows.pop((job.image_id, lesion.lesion_id), None) is not None:
            for folder in ("masks", "overlays"):
                (self.options.out / folder / lesion.file_name).unlink(missing_ok=True)

    @torch.inference_mode()
    def _segment(self, batch: Sequence[Prepared]) -> None:
        """Encode a batch of images once, decode all their lesions, write each one's files."""
        frames = torch.cat([prepared.frame for prepared in batch]).to(self.device)
        sizes = torch.cat([prepared.size for prepared in batch]).to(self.device)
        features = encode(self.sam, preprocess(frames, sizes))
        asked = [(k, target) for k, prepared in enumerate(batch) for target in prepared.targets]
        for low in range(0, len(asked), self.batch_size):
            part = asked[low : low + self.batch_size]
            big, small = (self._framed([getattr(target, name) for _, target in part], [batch[k] for k, _ in part])
                          for name in ("big", "small"))
            ids = [f"{batch[k].job.image_id}/{target.lesion.lesion_id}" for k, target in part]
            prompts = seeded_prompts(self.options.prompt, big, small, ids, num_points=NUM_POINTS, seed=SEED)
            low_res, predicted = decode(self.sam, features[[k for k, _ in part]], prompts.to(self.device))
            for j, (k, target) in enumerate(part):
                points = None if prompts.points is None else prompts.points[j].numpy()
                self._write(batch[k], target, low_res[j, 0], float(predicted[j, 0]), points)
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def _framed(self, boxes: Sequence[np.ndarray], owners: Sequence[Prepared]) -> torch.Tensor:
        """(B, 4) float32 XYXY, model frame."""
        rows = [to_model_frame(box, owner.shape[1], owner.shape[0], self.side)
                for box, owner in zip(boxes, owners, strict=True)]
        return torch.tensor(np.stack(rows), dtype=torch.float32)

    def _write(self, prepared: Prepared, target: Target, low_res: torch.Tensor, predicted_iou: float,
               points: np.ndarray | None) -> None:
        """Mask, overlay, and then the row that says both are there.

        Args:
            low_res: (T, T) logits. points: (N, 2) XY of the prompt, model frame.
        """
        (height, width), (h, w), lesion = prepared.shape, prepared.input_size, target.lesion
        logits = upscale(low_res, (h, w), (height, width), self.side).cpu().numpy()
        mask = logits > math.log(self.options.threshold / (1 - self.options.threshold))
        area = int(np.count_nonzero(mask))
        mask_path, *overlay_path = self.options.files(lesion)
        _write_png(mask_path, mask.astype(np.uint8) * 255)
        for path in overlay_path:
            drawn = overlay(
                prepared.image, prediction=mask, big=target.big,
                small=target.small if needs_small(self.options.prompt) else None,
                points=None if points is None else points * (width / w, height / h),
                caption=f"{path.stem}: {100 * area / mask.size:.1f} % of the image, predicted IoU {predicted_iou:.2f}")
            _write_png(path, drawn)
        image_id = prepared.job.image_id
        values = (image_id, lesion.lesion_id, width, height, mask_path.relative_to(self.options.out).as_posix(), area,
                  f"{predicted_iou:.4f}", f"{metrics.mean_entropy(logits):.4f}", target.key)
        self.rows[(image_id, lesion.lesion_id)] = dict(zip(COLUMNS, map(str, values), strict=True))
        self.num_done += 1
        self.num_empty += area == 0

    def save(self) -> None:
        """Write the table, if there is anything in it or was before."""
        path = self.options.out / TABLE
        if self.rows or path.exists():
            with atomic_write(path, "w") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(COLUMNS)
                writer.writerows([row[name] for name in COLUMNS] for row in self.rows.values())
        self.saved = time.monotonic()


def read_table(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Rows of an earlier call's predictions.csv by (image_id, lesion_id); none where there is no such file."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path}: not a table of `lesionsam predict`, which has the columns {', '.join(COLUMNS)}; "
                            "move it away or choose another --out")
        return {(row["image_id"], row["lesion_id"]): dict(row) for row in reader}


def _write_png(path: Path, pixels: np.ndarray) -> None:
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format="PNG")
