"""`lesionsam predict`: read images ahead, encode them in batches, write the files and the row of every lesion."""

from __future__ import annotations

import hashlib
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from lesionsam.errors import UserError
from lesionsam.inference.auto import AUTO_DEFAULTS, AutoMaskOptions, predict_everything
from lesionsam.inference.decode import DecodeOptions, decode_lesions
from lesionsam.inference.image import EncodedImages
from lesionsam.inference.inputs import Job, Lesion, Source, check_options, file_stem, find_images, plan
from lesionsam.inference.lesion import LesionSearch, trained_without_prompt
from lesionsam.inference.outputs import PredictionFolder, make_folder
from lesionsam.inference.prediction import LesionPrompt, to_prediction
from lesionsam.inference.predictor import SHOWN_IDS
from lesionsam.models.checkpoint import load_sam, weights_metadata
from lesionsam.models.sam import Sam
from lesionsam.prompts import ZOOM
from lesionsam.utils.files import sha256_file
from lesionsam.utils.images import image_size, read_image
from lesionsam.utils.locks import folder_lock
from lesionsam.utils.progress import progress
from lesionsam.utils.weights import weights_sha256

VERSION = 7  # of the values that a row's key covers
SAVE_SECONDS = 5.0  # between two writes of the table
READERS = 2  # threads that decode images while the model runs
HELD_PIXELS = 64_000_000  # of decoded images, 3 bytes each, from which on no further image is decoded beside them


@dataclass(frozen=True)
class PredictOptions:
    """The settings of a call of `predict_files`.

    Attributes:
        weights_sha256: of the weights file. source: of the prompts. threshold: probability above which a pixel is
            lesion. decoding: how prompts become masks.
    """

    weights_sha256: str
    source: Source
    threshold: float
    decoding: DecodeOptions

    def key(self, image_sha256: str, lesion: Lesion | None) -> str:
        """Return a hash of everything that a row of the table depends on; None stands for all masks of an image."""
        source, decoding = self.source, self.decoding
        parts: list[object] = [VERSION, self.weights_sha256, source.kind, self.threshold, image_sha256]
        if source.kind == "boxes":
            parts += [decoding.kind, decoding.seed, decoding.num_points, decoding.num_members]
        elif source.kind == "auto":
            parts += [decoding.search]
        elif source.kind == "everything":
            parts += [decoding.search.auto]
        if lesion is not None:
            parts += [lesion.file_name, [sorted(row.items()) for _, row in lesion.rows]]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Target:
    """A lesion to segment: its checked prompt, and the key of its row, see `PredictOptions.key`."""

    lesion: Lesion
    key: str
    prompt: LesionPrompt


@dataclass(frozen=True)
class Prepared:
    """An image that was read, with the lesions to segment in it.

    Attributes:
        job: the image, without the lesions whose masks are there already. targets: its lesions with valid prompts.
        image: (H, W, 3) uint8 RGB. framed: the same in the model frame, a batch of one, not encoded.
        key: of all its masks, see `PredictOptions.key`. faults: one line for each faulty row.
    """

    job: Job
    image: np.ndarray
    framed: EncodedImages
    key: str
    targets: list[Target]
    faults: list[str]


def print_fault(line: str) -> None:
    """Print a fault that does not end the run."""
    print(f"error: {line}", file=sys.stderr, flush=True)


def _num_pixels(path: Path) -> int:
    """Return the number of pixels of an image by its header; 0 where it cannot be read, which decoding it reports."""
    try:
        width, height = image_size(path)
    except (UserError, OSError):
        return 0
    return width * height


class PredictRun:
    """The state of one call of `predict_files`: the folder and the counters."""

    def __init__(
        self, sam: Sam, options: PredictOptions, folder: PredictionFolder, device: torch.device | str, batch_size: int
    ) -> None:
        self.sam, self.options, self.folder, self.device = sam.to(device).eval(), options, folder, device
        self.batch_size, self.frame = batch_size, sam.frame
        self.num_done = self.num_kept = self.num_review = self.num_faults = 0
        self.saved = time.monotonic()
        self._of_image: dict[str, list[tuple[str, str]]] = {}  # image_id -> row keys of earlier calls with `everything`
        if options.source.kind == "everything":
            for key in folder.rows:
                self._of_image.setdefault(key[0], []).append(key)

    def work(self, jobs: Sequence[Job]) -> None:
        """Segment every lesion of every job; faults are printed and counted, and the other lesions still get masks."""
        self.folder.make_room(jobs)
        batch: list[Prepared] = []
        with ThreadPoolExecutor(READERS) as pool:
            for job, future in progress(self._ahead(jobs, pool), total=len(jobs), title="predicting"):
                try:
                    prepared = future.result()
                except (UserError, OSError) as error:
                    self._fault(str(error))
                    self._forget(job)
                    continue
                if prepared is None:
                    self.num_kept += len(self._rows_of(job))
                    continue
                self.num_kept += len(job.lesions) - len(prepared.job.lesions)
                for line in prepared.faults:
                    self._fault(line)
                self._forget(prepared.job)
                if prepared.targets or not job.lesions:
                    batch.append(prepared)
                held = sum(one.image.shape[0] * one.image.shape[1] for one in batch)
                if len(batch) == self.batch_size or held > HELD_PIXELS:
                    self._segment(batch)
                    batch = []
            if batch:
                self._segment(batch)

    def _ahead(self, jobs: Sequence[Job], pool: ThreadPoolExecutor) -> Iterator[tuple[Job, Future[Prepared | None]]]:
        """Yield the jobs with their images; a few are read ahead, large ones only when the one before is done."""
        left, waiting, held = deque(jobs), deque[tuple[Job, Future[Prepared | None], int]](), 0
        while left or waiting:
            while left and len(waiting) <= READERS:
                pixels = _num_pixels(left[0].path)
                if waiting and held + pixels > HELD_PIXELS:
                    break
                held += pixels
                waiting.append((left[0], pool.submit(self._prepare, left.popleft()), pixels))
            job, future, pixels = waiting.popleft()
            yield job, future
            held -= pixels

    def _prepare(self, job: Job) -> Prepared | None:
        """Read an image and check the prompts of lesions without a mask; None if all have one."""
        if not job.path.is_file():
            raise UserError(
                f"{job.path}: no such file; expected an image"
                + (", and the link leads nowhere" if job.path.is_symlink() else "")
            )
        digest, source = sha256_file(job.path), self.options.source
        key = self.options.key(digest, None)
        keys = [(lesion, self.options.key(digest, lesion)) for lesion in job.lesions]
        missing = [(lesion, own) for lesion, own in keys if not self._is_there((job.image_id, lesion.lesion_id), own)]
        rows = self._rows_of(job)
        if not missing if job.lesions else rows and all(self._is_there(row, key) for row in rows):
            return None
        image = read_image(job.path)
        try:
            framed = EncodedImages.of([image], self.frame)
        except UserError as error:
            raise UserError(f"{job.path}: {error}") from None
        targets, faults = [], []
        for lesion, own in missing:
            try:
                targets.append(Target(lesion, own, lesion.prompt(image.shape[1], image.shape[0], source)))
            except ValueError as error:
                faults.append(f"{source.path}: {error}")
        job = replace(job, lesions=tuple(lesion for lesion, _ in missing))
        return Prepared(job, image, framed, key, targets, faults)

    def _rows_of(self, job: Job) -> list[tuple[str, str]]:
        """Return the (image_id, lesion_id) that a job has, or had in an earlier call."""
        if job.lesions:
            return [(job.image_id, lesion.lesion_id) for lesion in job.lesions]
        return self._of_image.get(job.image_id, [])

    def _is_there(self, place: tuple[str, str], key: str) -> bool:
        """Return whether the table has this key at (image_id, lesion_id) and the folder all files of that row."""
        row = self.folder.rows.get(place)
        return row is not None and row["key"] == key and self.folder.is_there(row)

    def _fault(self, line: str) -> None:
        print_fault(line)
        self.num_faults += 1

    def _forget(self, job: Job) -> None:
        for key in self._rows_of(job):
            self.folder.forget(key)

    @torch.inference_mode()
    def _segment(self, batch: Sequence[Prepared]) -> None:
        """Encode a batch of images once, decode all their lesions, write each one's files."""
        if not self.folder.is_saved:  # or a call after a kill would take the coming files for those of dropped rows
            self.save()
        if self.options.source.kind == "everything":
            for prepared in batch:
                self._write_all(prepared)
        else:
            images = EncodedImages.cat([prepared.framed for prepared in batch])
            if self.options.decoding.kind != ZOOM:  # which encodes each lesion itself
                images = images.encoded(self.sam)
            targets = [(k, target) for k, prepared in enumerate(batch) for target in prepared.targets]
            for low in range(0, len(targets), self.batch_size):
                self._segment_lesions(batch, images, targets[low : low + self.batch_size])
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def _segment_lesions(
        self, batch: Sequence[Prepared], images: EncodedImages, part: Sequence[tuple[int, Target]]
    ) -> None:
        """Decode some lesions of a batch at once and write the files of each; part: (position in the batch, target)."""
        rows, prompts = [k for k, _ in part], [target.prompt for _, target in part]
        keys = [f"{batch[k].job.image_id}/{target.lesion.lesion_id}" for k, target in part]
        decoded = decode_lesions(self.sam, images, prompts, rows, keys, self.options.decoding)
        for (k, target), one in zip(part, decoded, strict=True):
            owner = batch[k]
            prediction = to_prediction(
                one,
                target.prompt,
                image_id=owner.job.image_id,
                lesion_id=target.lesion.lesion_id,
                shape=images.shapes[k],
                input_size=images.input_sizes[k],
                frame=self.frame,
                threshold=self.options.threshold,
            )
            row = self.folder.write(
                prediction,
                owner.image,
                target.lesion.file_name,
                key=target.key,
                prompt=self.options.source.prompt,
                image_name=owner.job.path.name,
            )
            self.folder.record([row])
            self.num_done += 1
            self.num_review += bool(prediction.review_reasons)

    def _write_all(self, prepared: Prepared) -> None:
        """Write all masks of an image; without any mask a row that says so, so that the image counts as done."""
        height, width = prepared.image.shape[:2]
        options, image_id = self.options.decoding.search.auto, prepared.job.image_id
        stem, key = file_stem(image_id), prepared.key
        rows: list[tuple[object, ...]] = []
        for one in predict_everything(self.sam, prepared.image, options, image_id, device=self.device):
            file_name = f"{stem}/{one.lesion_id}"
            rows.append(self.folder.write(one, prepared.image, file_name, key=key, image_name=prepared.job.path.name))
            self.num_review += bool(one.review_reasons)
        self.num_done += len(rows)
        if not rows:
            nothing = "no mask passes the thresholds"
            rows = [(image_id, "", width, height, "", 0, "", "", "", nothing, key)]
            self.num_review += 1
        self.folder.record(rows)  # all at once: an image with some of its masks does not count as done

    def save(self) -> None:
        """Write the table."""
        self.folder.save_table()
        self.saved = time.monotonic()


def predict_files(
    images: Sequence[str | Path],
    *,
    model: Path,
    out: Path,
    boxes: Path | None = None,
    points: Path | None = None,
    auto: bool = False,
    everything: bool = False,
    prompt: str = "box",
    ensemble: int = 1,
    device: torch.device | str = "cpu",
    batch_size: int = 8,
    overlays: bool = True,
    shapes: bool = True,
    threshold: float = 0.5,
    options: AutoMaskOptions = AUTO_DEFAULTS,
    zoom: bool = False,
) -> int:
    """Segment the lesions of image files from boxes, points or without a prompt.

    Writes, each file completely or not at all: masks/<image_id>.png (<image_id>_<lesion_id>.png if an image has several
    rows, <image_id>/<number>.png for `everything`) of 0 and 255 at the image's original size, overlays/ and polygons/
    (GeoJSON) of the same names, predictions.csv, and coco.json of all rows of that table. Masks
    of an earlier call with the same model, prompts, threshold and image are kept; its other masks of these images are
    removed, those of other images stay in the table.

    Args:
        images: files, folders, patterns. model: SAM's weights or this project's; the file says which model it holds.
        boxes: CSV with image_id, [lesion_id], big_x0 to big_y1 and, where the prompt needs the core, small_x0 to
            small_y1; points: CSV with image_id, [lesion_id], x, y, [label]; original pixels. auto: the one lesion of
            each image. everything: all automatic masks. Exactly one of these four.
        prompt: made from the boxes, of `prompts.KINDS`. ensemble: decodings of each box, all but one jittered.
        batch_size: images per encoder pass and lesions per decoder pass. overlays: pictures. shapes: polygons and COCO.
        threshold: probability above which a pixel is lesion. options: of the automatic masks. zoom: enlarge the
            surroundings of each box to the model's whole input; prompt `box` only.
    Returns:
        exit code: 0, or 1 if an image or a row gave no mask; each is named on stderr.
    Raises:
        UserError: nothing can be predicted at all.
    """
    source = Source.of(boxes=boxes, points=points, auto=auto, everything=everything, prompt=prompt)
    check_options(source, threshold=threshold, ensemble=ensemble, zoom=zoom)
    if batch_size < 1:
        raise UserError(f"--batch-size: expected at least 1 image, got {batch_size}")
    paths, problems = find_images(images)
    if not paths:
        raise UserError(problems[0] if problems else "no images given; name files, folders or patterns")
    jobs, unmatched, unused = plan(paths, source)
    problems += unmatched
    for line in problems:
        print_fault(line)
    if unused:
        shown = ", ".join(unused[:SHOWN_IDS]) + (", ..." if len(unused) > SHOWN_IDS else "")
        print(f"note: {source.path} has rows of {len(unused)} images that were not given: {shown}", file=sys.stderr)
    sam = load_sam(None, model)
    search = LesionSearch(trained_without_prompt(weights_metadata(model)), options)
    decoding = DecodeOptions(ZOOM if zoom else source.decoded_as, num_members=ensemble, search=search)
    how = PredictOptions(weights_sha256(model), source, threshold, decoding)
    make_folder(out)
    with folder_lock(out, "wait for it, or choose another --out"):  # the last to end would drop the other's rows
        folder = PredictionFolder(out, overlays=overlays, shapes=shapes)
        run = PredictRun(sam, how, folder, device, batch_size)
        try:
            run.work(jobs)
        except torch.OutOfMemoryError:
            raise UserError(
                f"the GPU's memory does not suffice for {batch_size} images at once; lower --batch-size or "
                "use --device cpu"
            ) from None
        finally:
            run.save()
        folder.save_coco({job.image_id: job.path.name for job in jobs})
    faults = len(problems) + run.num_faults
    kept = f", {run.num_kept} kept from before" if run.num_kept else ""
    review = f", {run.num_review} of them to review (column `review_reasons`)" if run.num_review else ""
    named = f"; {faults} faults, named above" if faults else ""
    print(f"{run.num_done} masks written to {out / 'masks'}{kept}{review}{named}")
    return 1 if faults else 0
