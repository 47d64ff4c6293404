"""Read images ahead, encode them in batches, write the files and the row of every lesion."""

from __future__ import annotations

import hashlib
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from lesionsam.boxes.marks import WITHOUT_BOXES
from lesionsam.errors import UserError
from lesionsam.formats.dicom_seg import read_references
from lesionsam.inference.arguments import Source
from lesionsam.inference.auto import predict_everything
from lesionsam.inference.decode import SELF_ENCODED, DecodeOptions, decode_lesions
from lesionsam.inference.image import EncodedImages
from lesionsam.inference.inputs import Lesion
from lesionsam.inference.jobs import Job, file_stem
from lesionsam.inference.outputs import PredictionFolder
from lesionsam.inference.prediction import LesionPrompt, to_prediction, with_others
from lesionsam.inference.scale import pixel_size_mm
from lesionsam.models.sam import Sam
from lesionsam.prompts import BOTH
from lesionsam.utils.files import sha256_file
from lesionsam.utils.images import image_size, num_pages, read_image
from lesionsam.utils.progress import progress

VERSION = 8  # of the values that a row's key covers
SAVE_SECONDS = 5.0  # between two writes of the table
SHOWN_IDS = 3  # names that a note lists
READERS = 2  # threads that decode images while the model runs
HELD_PIXELS = 64_000_000  # of decoded images, 3 bytes each, from which on no further image is decoded beside them


@dataclass(frozen=True)
class PredictOptions:
    """Hold the settings of a call of `predict_files`.

    Attributes:
        weights_sha256: of the weights file. source: of the prompts. threshold: probability above which a pixel is
            lesion. decoding: how prompts become masks. batch_size: images per encoder pass and lesions per decoder
            pass. device: that torch runs on. overlays, shapes: whether pictures, and polygons and COCO are written.
        dicom_seg: whether DICOM segmentations are. mm_per_pixel: of all images, see `scale.pixel_size_mm`.
    """

    weights_sha256: str
    source: Source
    threshold: float
    decoding: DecodeOptions
    batch_size: int
    device: torch.device | str
    overlays: bool
    shapes: bool
    dicom_seg: bool = False
    mm_per_pixel: float | None = None

    def named(self) -> dict[str, object]:
        """Return by name whatever changes the files of a prediction, for comparison; the prompts' file apart."""
        decoding = self.decoding
        return {
            "format": VERSION,
            "weights": self.weights_sha256,
            "source": self.source.kind,
            "prompt": self.source.prompt,
            "threshold": self.threshold,
            "decoding": repr([decoding.kind, decoding.seed, decoding.num_points, decoding.num_members]),
            "search": repr(decoding.search) if self.source.kind in ("auto", "everything") else "",
            "batch size": self.batch_size,
            "overlays": self.overlays,
            "shapes": self.shapes,
            "DICOM segmentations": self.dicom_seg,
            "mm per pixel": self.mm_per_pixel,
        }

    def key(
        self,
        image_sha256: str,
        lesion: Lesion | None,
        siblings: Sequence[Lesion] = (),
        pixel_size: tuple[float, float] | None = None,
    ) -> str:
        """Return a hash of everything that a row of the table depends on.

        Args:
            lesion: of the row; None stands for all masks of an image. siblings: all lesions of the image, with it.
            pixel_size: height and width [mm], if known.
        """
        source, decoding = self.source, self.decoding
        parts: list[object] = [VERSION, self.weights_sha256, source.kind, self.threshold, image_sha256]
        if source.kind == "boxes":
            parts += [decoding.kind, decoding.seed, decoding.num_points, decoding.num_members]
            if decoding.kind == BOTH:
                parts += [decoding.outline, [sorted(row.items()) for one in siblings for _, row in one.rows]]
        elif source.kind == "auto":
            parts += [decoding.search]
        elif source.kind == "everything":
            parts += [decoding.search.auto]
        if pixel_size is not None:
            parts += [pixel_size]
        if lesion is not None:
            parts += [lesion.file_name, [sorted(row.items()) for _, row in lesion.rows]]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Target:
    """A lesion of a batch.

    Attributes:
        key: of its row, see `PredictOptions.key`. prompt: checked. is_kept: its mask is there already; it is decoded
            to keep the batch as it was, as another batch may change the last bits of the others' logits.
    """

    lesion: Lesion
    key: str
    prompt: LesionPrompt
    is_kept: bool


@dataclass(frozen=True)
class Prepared:
    """An image that was read, with the lesions to segment in it.

    Attributes:
        job: the image, without the lesions whose masks are there already. targets: all its lesions with valid prompts.
        image: (H, W, 3) uint8 RGB. framed: the same in the model frame, a batch of one, not encoded.
        key: of all its masks, see `PredictOptions.key`. faults: one line for each faulty row.
        pixel_size: height and width of a pixel [mm], if known.
    """

    job: Job
    image: np.ndarray
    framed: EncodedImages
    key: str
    targets: list[Target]
    faults: list[str]
    pixel_size: tuple[float, float] | None


@dataclass
class Counts:
    """What a call has done.

    Attributes:
        done: masks written. kept: masks of earlier calls that are kept. review: of those written, with reasons to
            review. faults: images and rows without a mask, each named on stderr.
    """

    done: int = 0
    kept: int = 0
    review: int = 0
    faults: int = 0

    def add(self, other: Counts) -> None:
        """Add the counts of another part."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def summary(self, out: Path) -> str:
        """Return the call's last line."""
        kept = f", {self.kept} kept from before" if self.kept else ""
        review = f", {self.review} of them to review (column `review_reasons`)" if self.review else ""
        named = f"; {self.faults} faults, named above" if self.faults else ""
        return f"{self.done} masks written to {out / 'masks'}{kept}{review}{named}"


def print_fault(line: str) -> None:
    """Print a fault that does not end the run."""
    print(f"error: {line}", file=sys.stderr, flush=True)


def num_pixels(path: Path) -> int:
    """Return the number of pixels of an image by its header; 0 where it cannot be read, which decoding it reports."""
    try:
        width, height = image_size(path)
    except (UserError, OSError):
        return 0
    return width * height


def print_marked(paths: Iterable[Path], source: Source) -> None:
    """Print which of the images get no mask, as their annotator gave them none."""
    marks = Counter(WITHOUT_BOXES[source.marked[path.stem]] for path in paths if path.stem in source.marked)
    for words, count in marks.items():
        print(f"note: {count} images are annotated `{words}`: no mask of them", file=sys.stderr)


def print_problems(problems: Sequence[str], unused: Sequence[str], source: Source) -> None:
    """Print the faults of the arguments; unused: image ids of the CSV that were not given."""
    for line in problems:
        print_fault(line)
    if unused:
        shown = ", ".join(unused[:SHOWN_IDS]) + (", ..." if len(unused) > SHOWN_IDS else "")
        print(f"note: {source.path} has rows of {len(unused)} images that were not given: {shown}", file=sys.stderr)


class PredictRun:
    """The state of one call of `predict_files`, or of a block of a shard: the folder and the counters."""

    def __init__(self, sam: Sam, options: PredictOptions, folder: PredictionFolder) -> None:
        self.sam, self.options, self.folder = sam.to(options.device).eval(), options, folder
        self.frame = sam.frame
        self.counts = Counts()
        self.saved = time.monotonic()
        self._of_image: dict[str, list[tuple[str, str]]] = {}  # image_id -> row keys of earlier calls with `everything`
        if options.source.kind == "everything":
            for key in folder.rows:
                self._of_image.setdefault(key[0], []).append(key)

    def work(self, jobs: Sequence[Job]) -> None:
        """Segment every lesion of every job; faults are printed and counted, and the other lesions still get masks.

        A batch is a fixed part of the jobs, whichever of them have masks already, so that a call that was cut short
        leaves the same bytes as a whole one. Large images cut it into several.
        """
        self.folder.make_room(jobs)
        part: list[tuple[Job, Future[Prepared | None]]] = []
        held = 0
        with ThreadPoolExecutor(READERS) as pool:
            read = progress(self._ahead(jobs, pool), total=len(jobs), title="predicting")
            for number, (job, future, pixels) in enumerate(read, 1):
                part.append((job, future))
                held += pixels
                if number % self.options.batch_size == 0 or held > HELD_PIXELS or number == len(jobs):
                    self._work_part(part)
                    part, held = [], 0

    def _work_part(self, part: Sequence[tuple[Job, Future[Prepared | None]]]) -> None:
        """Segment the jobs of a batch; without any mask to make, only count those that are kept."""
        batch: list[Prepared | Job] = []
        for job, future in part:
            try:
                prepared = future.result()
            except (UserError, OSError) as error:
                self._fault(str(error))
                self._forget(job)
                continue
            if prepared is None:
                self.counts.kept += len(self._rows_of(job))
                batch.append(job)
                continue
            self.counts.kept += len(job.lesions) - len(prepared.job.lesions)
            for line in prepared.faults:
                self._fault(line)
            self._forget(prepared.job)
            if prepared.targets or not job.lesions:
                batch.append(prepared)
        if any(
            isinstance(one, Prepared) and (not one.targets or not all(target.is_kept for target in one.targets))
            for one in batch
        ):
            try:
                self._segment([one for one in map(self._read_again, batch) if one is not None])
            except torch.OutOfMemoryError:
                raise UserError(
                    f"the GPU's memory does not suffice for {self.options.batch_size} images at once; lower "
                    "--batch-size or use --device cpu"
                ) from None

    def _read_again(self, one: Prepared | Job) -> Prepared | None:
        """Return an image of a batch, read if its masks are kept; None where it need not be in the batch."""
        if isinstance(one, Prepared):
            return one
        if not one.lesions:  # all masks: each image by itself
            return None
        with suppress(UserError, OSError):  # removed a moment ago; its masks stay
            return self._prepare(one, is_kept=True)

    def _ahead(
        self, jobs: Sequence[Job], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[Job, Future[Prepared | None], int]]:
        """Yield the jobs with their images and numbers of pixels.

        A few images are read ahead, large ones only when the one before is done.
        """
        left, waiting, held = deque(jobs), deque[tuple[Job, Future[Prepared | None], int]](), 0
        while left or waiting:
            while left and len(waiting) <= READERS:
                pixels = num_pixels(left[0].path)
                if waiting and held + pixels > HELD_PIXELS:
                    break
                held += pixels
                waiting.append((left[0], pool.submit(self._prepare, left.popleft()), pixels))
            job, future, pixels = waiting.popleft()
            yield job, future, pixels
            held -= pixels

    def _prepare(self, job: Job, *, is_kept: bool = False) -> Prepared | None:
        """Read an image and check the prompts of its lesions; None if all have a mask, unless the image `is_kept`."""
        if not job.path.is_file():
            raise UserError(
                f"{job.path}: no such file; expected an image"
                + (", and the link leads nowhere" if job.path.is_symlink() else "")
            )
        if self.options.dicom_seg:
            read_references(job.path)
        digest, source = sha256_file(job.path), self.options.source
        size = pixel_size_mm(job.path, self.options.mm_per_pixel)
        key = self.options.key(digest, None, pixel_size=size)
        keys = [(lesion, self.options.key(digest, lesion, job.lesions, size)) for lesion in job.lesions]
        missing = [(lesion, own) for lesion, own in keys if not self._is_there((job.image_id, lesion.lesion_id), own)]
        rows = self._rows_of(job)
        if not is_kept and (not missing if job.lesions else rows and all(self._is_there(row, key) for row in rows)):
            return None
        image = read_image(job.path)
        if (pages := num_pages(job.path)) > 1:
            print(f"note: {job.path}: {pages} frames, of which the first is segmented", file=sys.stderr, flush=True)
        try:
            framed = EncodedImages.of([image], self.frame)
        except UserError as error:
            raise UserError(f"{job.path}: {error}") from None
        checked, faults, to_make = [], [], {lesion.lesion_id for lesion, _ in missing}
        for lesion, own in keys:
            try:
                checked.append((lesion, own, lesion.prompt(image.shape[1], image.shape[0], source)))
            except ValueError as error:
                faults.append(f"{source.path}: {error}")
        prompts = with_others([prompt for _, _, prompt in checked])
        targets = [
            Target(lesion, own, prompt, lesion.lesion_id not in to_make)
            for (lesion, own, _), prompt in zip(checked, prompts, strict=True)
        ]
        job = replace(job, lesions=tuple(lesion for lesion, _ in missing))
        return Prepared(job, image, framed, key, targets, faults, size)

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
        self.counts.faults += 1

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
            if self.options.decoding.kind not in SELF_ENCODED:
                images = images.encoded(self.sam)
            targets = [(k, target) for k, prepared in enumerate(batch) for target in prepared.targets]
            for low in range(0, len(targets), self.options.batch_size):
                self._segment_lesions(batch, images, targets[low : low + self.options.batch_size])
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def _segment_lesions(
        self, batch: Sequence[Prepared], images: EncodedImages, part: Sequence[tuple[int, Target]]
    ) -> None:
        """Decode some lesions of a batch at once and write the files of each that has none; part: (position in the
        batch, target)."""
        if all(target.is_kept for _, target in part):
            return
        rows, prompts = [k for k, _ in part], [target.prompt for _, target in part]
        keys = [f"{batch[k].job.image_id}/{target.lesion.lesion_id}" for k, target in part]
        decoded = decode_lesions(self.sam, images, prompts, rows, keys, self.options.decoding)
        for (k, target), one in zip(part, decoded, strict=True):
            if target.is_kept:
                continue
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
                image_path=owner.job.path,
                pixel_size=owner.pixel_size,
            )
            self.folder.record([row])
            self.counts.done += 1
            self.counts.review += bool(prediction.review_reasons)

    def _write_all(self, prepared: Prepared) -> None:
        """Write all masks of an image; without any mask a row that says so, so that the image counts as done."""
        height, width = prepared.image.shape[:2]
        options, image_id = self.options.decoding.search.auto, prepared.job.image_id
        stem, key = file_stem(image_id), prepared.key
        rows: list[tuple[object, ...]] = []
        for one in predict_everything(self.sam, prepared.image, options, image_id, device=self.options.device):
            file_name = f"{stem}/{one.lesion_id}"
            place = {"image_path": prepared.job.path, "pixel_size": prepared.pixel_size}
            rows.append(self.folder.write(one, prepared.image, file_name, key=key, **place))
            self.counts.review += bool(one.review_reasons)
        self.counts.done += len(rows)
        if not rows:
            nothing = "no mask passes the thresholds"
            rows = [(image_id, "", width, height, "", 0, "", "", "", "", nothing, key)]
            self.counts.review += 1
        self.folder.record(rows)  # all at once: an image with some of its masks does not count as done

    def save(self) -> None:
        """Write the table."""
        self.folder.save_table()
        self.saved = time.monotonic()
