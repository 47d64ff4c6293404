"""The work of `lesionsam predict`: images decoded ahead, batches encoded once, every lesion's files and its row."""

from __future__ import annotations

import hashlib
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from lesionsam.errors import UserError
from lesionsam.inference.auto import AUTO, AutoOptions
from lesionsam.inference.decode import NUM_POINTS, SEED, Answer, Asked, answers, prediction
from lesionsam.inference.inputs import Job, Lesion, Source, check_answering, file_stem, find_images, plan
from lesionsam.inference.lesion import find_lesions, from_nearer, masks_of, way
from lesionsam.inference.outputs import Folder, make_folder
from lesionsam.inference.predictor import SHOWN_IDS
from lesionsam.models.checkpoint import load_sam, weights_metadata
from lesionsam.models.sam import Sam, encode
from lesionsam.models.transforms import model_frames, preprocess
from lesionsam.utils.files import sha256_file
from lesionsam.utils.images import read_image
from lesionsam.utils.locks import folder_lock
from lesionsam.utils.progress import progress

VERSION = 6  # of what a row's key stands for
SAVE_SECONDS = 5.0
READERS = 2  # threads that decode images while the model runs


@dataclass(frozen=True)
class Options:
    """What a call of `predict_files` asks for.

    Attributes:
        weights_sha256: of the weights file. source: of the prompts. threshold: probability above which a pixel is
            lesion. num_members: decodings of each box, all but one jittered. auto: of the automatic masks.
        lesion_by: how the one lesion of an image is found, see `inference_lesion`. nearer: whether what lies around
            each box is enlarged.
    """

    weights_sha256: str
    source: Source
    threshold: float
    num_members: int
    auto: AutoOptions
    lesion_by: str
    nearer: bool = False

    def key(self, image_sha256: str, lesion: Lesion | None) -> str:
        """Hash of everything that a row in the table depends on; None stands for all masks of an image."""
        source = self.source
        parts: list[object] = [VERSION, self.weights_sha256, source.kind, self.threshold, image_sha256]
        if source.kind == "boxes":
            parts += [SEED, NUM_POINTS, source.prompt, self.num_members, self.nearer]
        elif source.kind == "auto":
            parts += [self.auto, self.lesion_by]
        elif source.kind == "everything":
            parts += [self.auto]
        if lesion is not None:
            parts += [lesion.file_name, [sorted(row.items()) for _, row in lesion.rows]]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Target:
    """A lesion to segment: its prompt, checked, and the key of its row, see `Options.key`."""

    lesion: Lesion
    key: str
    asked: Asked


@dataclass(frozen=True)
class Prepared:
    """An image with those of its lesions that are to be segmented.

    Attributes:
        job: the image, without the lesions whose masks are there already. targets: those of its lesions that can be
            segmented.
        image: (H, W, 3) uint8 RGB. frame: (1, 3, S, S) uint8. size: (1, 2) height and width of its image part.
        key: of all its masks, see `Options.key`. faults: one line for each row that is wrong.
    """

    job: Job
    image: np.ndarray
    frame: torch.Tensor
    size: torch.Tensor
    key: str
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
    """The state of one call of `predict_files`: the folder, and what was counted."""

    def __init__(self, sam: Sam, options: Options, folder: Folder, device: torch.device | str, batch_size: int) -> None:
        self.sam, self.options, self.folder, self.device = sam.to(device).eval(), options, folder, device
        self.batch_size, self.side = batch_size, int(sam.image_encoder.img_size)
        self.num_done = self.num_kept = self.num_look = self.num_faults = 0
        self.saved = time.monotonic()
        self._of_image: dict[str, list[tuple[str, str]]] = {}  # rows of earlier calls where lesions have no names
        if options.source.kind == "everything":
            for key in folder.rows:
                self._of_image.setdefault(key[0], []).append(key)

    def work(self, jobs: Sequence[Job]) -> None:
        """Segment every lesion of every job; faults are named and counted, and cost no other lesion its mask."""
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
        """Read an image and check the prompts of what is missing; None where nothing is."""
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
            frame, size = model_frames([image], self.side)
        except UserError as error:
            raise UserError(f"{job.path}: {error}") from None
        targets, faults = [], []
        for lesion, own in missing:
            try:
                targets.append(Target(lesion, own, lesion.asked(image.shape[1], image.shape[0], source)))
            except ValueError as error:
                faults.append(f"{source.path}: {error}")
        return Prepared(
            replace(job, lesions=tuple(lesion for lesion, _ in missing)), image, frame, size, key, targets, faults
        )

    def _rows_of(self, job: Job) -> list[tuple[str, str]]:
        if job.lesions:
            return [(job.image_id, lesion.lesion_id) for lesion in job.lesions]
        return self._of_image.get(job.image_id, [])

    def _is_there(self, place: tuple[str, str], key: str) -> bool:
        """Whether the table has this key at (image_id, lesion_id), and the folder all the files of that row."""
        row = self.folder.rows.get(place)
        return row is not None and row["key"] == key and self.folder.is_there(row)

    def _fault(self, line: str) -> None:
        complain(line)
        self.num_faults += 1

    def _forget(self, job: Job) -> None:
        for key in self._rows_of(job):
            self.folder.forget(key)

    @torch.inference_mode()
    def _segment(self, batch: Sequence[Prepared]) -> None:
        """Encode a batch of images once, decode all their lesions, write each one's files."""
        if not self.folder.is_saved:  # else, after a kill, the table would take the files to come for outdated ones
            self.save()
        if self.options.source.kind == "everything":
            for prepared in batch:
                self._write_all(prepared)
        else:
            frames = torch.cat([prepared.frame for prepared in batch]).to(self.device)
            sizes = torch.cat([prepared.size for prepared in batch]).to(self.device)
            features = None if self.options.nearer else encode(self.sam, preprocess(frames, sizes))
            asked = [(k, target) for k, prepared in enumerate(batch) for target in prepared.targets]
            for low in range(0, len(asked), self.batch_size):
                self._segment_lesions(batch, asked[low : low + self.batch_size], features, frames)
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    def _segment_lesions(
        self,
        batch: Sequence[Prepared],
        part: Sequence[tuple[int, Target]],
        features: torch.Tensor | None,
        frames: torch.Tensor,
    ) -> None:
        """Decode some lesions of a batch at once and write each one's files; no features: each is encoded itself."""
        source, rows = self.options.source, [k for k, _ in part]
        owners = [batch[k] for k in rows]
        sizes, shapes = [owner.input_size for owner in owners], [owner.shape for owner in owners]
        if features is None:
            found = from_nearer(self.sam, frames[rows], sizes, shapes, [target.asked for _, target in part])
        elif source.kind == "auto":
            found = [
                Answer(*one)
                for one in find_lesions(
                    self.sam, features[rows], frames[rows], sizes, by=self.options.lesion_by, options=self.options.auto
                )
            ]
        else:
            found = answers(
                self.sam,
                features,
                shapes,
                [target.asked for _, target in part],
                [f"{batch[k].job.image_id}/{target.lesion.lesion_id}" for k, target in part],
                prompt=source.prompt,
                num_members=self.options.num_members,
                owners=rows,
            )
        for owner, (_, target), answer in zip(owners, part, found, strict=True):
            one = prediction(
                answer,
                target.asked,
                image_id=owner.job.image_id,
                lesion_id=target.lesion.lesion_id,
                shape=owner.shape,
                input_size=owner.input_size,
                side=self.side,
                threshold=self.options.threshold,
            )
            name = target.lesion.file_name
            self.folder.record(
                [
                    self.folder.write(
                        one, owner.image, name, key=target.key, prompt=source.prompt, image_name=owner.job.path.name
                    )
                ]
            )
            self.num_done += 1
            self.num_look += bool(one.look)

    def _write_all(self, prepared: Prepared) -> None:
        """All masks of an image; a row without a mask where there is none, so that it counts as done."""
        height, width = prepared.shape
        found = masks_of(self.sam, prepared.image, self.options.auto, prepared.job.image_id, device=self.device)
        stem, key = file_stem(prepared.job.image_id), prepared.key
        rows = [
            self.folder.write(
                one, prepared.image, f"{stem}/{one.lesion_id}", key=key, image_name=prepared.job.path.name
            )
            for one in found
        ]
        if not found:
            nothing = "no mask passes the thresholds"
            rows = [(prepared.job.image_id, "", width, height, "", 0, "", "", "", nothing, key)]
        self.folder.record(rows)  # all at once: an image with some of its masks does not count as done
        self.num_done += len(found)
        self.num_look += sum(bool(one.look) for one in found) or not found

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
    options: AutoOptions = AUTO,
    nearer: bool = False,
) -> int:
    """Segment the lesions of image files, given boxes, points or nothing.

    Writes, each file whole or not at all: masks/<image_id>.png (<image_id>_<lesion_id>.png where an image has several
    rows, <image_id>/<number>.png for `everything`) of 0 and 255 at the image's original size, overlays/ and polygons/
    (GeoJSON) of the same names, predictions.csv, and coco.json and coco_polygons.json of all that is in the table. What
    an earlier call with the same model, prompts, threshold and image has done is kept; what else it has of these images
    goes, what it has of others stays in the table.

    Args:
        images: files, folders, patterns. model: SAM's weights or this project's; the file says which model it holds.
        boxes: CSV with image_id, [lesion_id], big_x0 to big_y1 and, where the prompt needs the core, small_x0 to
            small_y1; points: CSV with image_id, [lesion_id], x, y, [label]; original pixels. auto: the one lesion of
            each image. everything: all automatic masks. Exactly one of these four.
        prompt: made from the boxes, of `prompts.KINDS`. ensemble: decodings of each box, all but one jittered.
        batch_size: images per encoder pass and lesions per decoder pass. overlays: pictures. shapes: polygons and COCO.
        threshold: probability above which a pixel is lesion. options: of the automatic masks. nearer: enlarge what lies
            around each box; prompt `box` alone.
    Returns:
        exit code: 0, or 1 if an image or a row that was asked for gave no mask; each is named on stderr.
    Raises:
        UserError: nothing can be predicted at all.
    """
    source = Source.of(boxes=boxes, points=points, auto=auto, everything=everything, prompt=prompt)
    check_answering(source, threshold=threshold, ensemble=ensemble, nearer=nearer)
    if batch_size < 1:
        raise UserError(f"--batch-size: expected at least 1 image, got {batch_size}")
    paths, problems = find_images(images)
    if not paths:
        raise UserError(problems[0] if problems else "no images given; name files, folders or patterns")
    jobs, unmatched, unused = plan(paths, source)
    problems += unmatched
    for line in problems:
        complain(line)
    if unused:
        shown = ", ".join(unused[:SHOWN_IDS]) + (", ..." if len(unused) > SHOWN_IDS else "")
        print(f"note: {source.path} has rows of {len(unused)} images that were not given: {shown}", file=sys.stderr)
    sam = load_sam(None, model)
    how = Options(sha256_file(model), source, threshold, ensemble, options, way(weights_metadata(model)), nearer)
    make_folder(out)
    with folder_lock(out, "wait for it, or choose another --out"):  # the last to end would drop the other's rows
        folder = Folder(out, overlays=overlays, shapes=shapes)
        run = Run(sam, how, folder, device, batch_size)
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
    print(
        f"{run.num_done} masks written to {out / 'masks'}"
        + (f", {run.num_kept} kept from before" if run.num_kept else "")
        + (f", {run.num_look} of them worth a look (column `look`)" if run.num_look else "")
        + (f"; {faults} faults, named above" if faults else "")
    )
    return 1 if faults else 0
