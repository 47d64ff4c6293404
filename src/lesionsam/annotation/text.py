"""`lesionsam propose`: write what a text names into the annotation page's review queue."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from lesionsam.annotation.assist import suggest_core
from lesionsam.annotation.catalogue import Catalogue, Entry
from lesionsam.annotation.pictures import Pictures
from lesionsam.annotation.proposals import Proposed, boxes_of_mask
from lesionsam.annotation.records import AUTOMATIC, OPEN, Lesion, rounded
from lesionsam.annotation.review import TEXT, ImageProposal, Proposals, proposals_path
from lesionsam.annotation.serve import default_table
from lesionsam.annotation.store import Change, Store
from lesionsam.boxes.geometry import loosen
from lesionsam.boxes.prior import PRIOR_SIDE
from lesionsam.detection.detectors import THRESHOLD, Detection, Detector, open_detector, split_texts
from lesionsam.errors import UserError
from lesionsam.formats.rle import encode
from lesionsam.inference.outputs import make_folder
from lesionsam.utils.images import read_image
from lesionsam.utils.locks import file_lock
from lesionsam.utils.progress import progress

LOOSENESS = 0.15  # by which a proposed big box is larger than what was found
MAX_PROPOSED = 20  # lesions of one image


def propose_by_text(
    images: Sequence[str | Path],
    *,
    text: str,
    model: str,
    boxes: Path | None = None,
    threshold: float = THRESHOLD,
    accept: float | None = None,
    batch_size: int = 4,
    device: torch.device | str = "cpu",
) -> int:
    """Find what a text names in the images without boxes, and leave it beside the table for the page to review.

    Args:
        images: folders, files, patterns. text: synonyms parted by commas. model: folder or OWNER/NAME of a detector.
        boxes: the two-box CSV; boxes.csv beside the first folder if None. threshold: score below which nothing is kept.
        accept: score from which lesions enter the table unseen, marked as such; None: none does.
        batch_size: images at once.
    Returns:
        exit code: 0, or 1 if an image could not be read, each named on stderr.
    Raises:
        UserError: no images, no text, a score out of range, a detector that cannot be used, nothing found at all.
    """
    texts = split_texts(text)
    for name, value in (("--threshold", threshold), ("--accept", accept)):
        if value is not None and not 0 < value < 1:
            raise UserError(f"{name}: expected a score between 0 and 1, got {value:g}")
    if batch_size < 1:
        raise UserError(f"--batch-size: expected at least 1 image, got {batch_size}")
    catalogue, table = Catalogue(images), boxes or default_table(Path(images[0]))
    detector = open_detector(model, device)
    make_folder(table.parent)
    with file_lock(table.parent / f".{table.name}.lock", f"annotation of {table}"):
        store, pictures = Store(table, catalogue), Pictures()
        waiting = [entry for entry in catalogue.by_id.values() if store.state(entry.image_id).status == OPEN]
        proposals = Proposals(proposals_path(table), TEXT)
        num_found = num_accepted = num_faults = 0
        for batch in _batches(progress(waiting, total=len(waiting), title="looking for lesions"), batch_size):
            readable, decoded = [], []
            for entry in batch:
                try:
                    decoded.append(read_image(entry.path))
                    readable.append(entry)
                except UserError as error:
                    print(f"error: {error}", file=sys.stderr)
                    num_faults += 1
            detected = detector.detect(decoded, texts, threshold=threshold) if decoded else []
            for entry, image, found in zip(readable, decoded, detected, strict=True):
                lesions = [_proposed(one, image, pictures.small(entry, PRIOR_SIDE)) for one in found[:MAX_PROPOSED]]
                first, more = (lesions[0], tuple(lesions[1:])) if lesions else (None, ())
                size = (image.shape[1], image.shape[0])
                proposals.add(ImageProposal(entry.image_id, pictures.stamp(entry), size, first, more))
                num_found += bool(lesions)
                sure = [one for one in lesions if accept is not None and one.score >= accept]
                num_accepted += _accept(store, entry, sure, detector, size, threshold)
    if waiting and not num_found and not num_faults:
        raise UserError(
            f'--text "{text}": found nothing in {len(waiting)} images at a score of {threshold:g} or more; lower '
            "--threshold, or try other words"
        )
    print(
        f"{num_found} of {len(waiting)} images without boxes have proposals ({proposals.path}); {num_accepted} lesions "
        f"entered {table}, marked as accepted unseen. Review them: lesionsam annotate {images[0]}"
    )
    return 1 if num_faults else 0


def _proposed(found: Detection, image: np.ndarray, small: np.ndarray) -> Proposed:
    """Return a detection with two boxes as an annotator would draw them."""
    size = (image.shape[1], image.shape[0])
    drawn = None if found.mask is None else boxes_of_mask(found.mask, size)
    if drawn is None:
        big = rounded(loosen(found.box, LOOSENESS, (size[1], size[0])).tolist())
        drawn = big, suggest_core(small, size, big)
    has_mask = found.mask is not None and bool(found.mask.any())
    area = float(found.mask.mean()) if found.mask is not None and has_mask else _share(found.box, size)
    mask = encode(found.mask) if found.mask is not None and has_mask else None
    score = round(found.score, 4)
    return Proposed(*drawn, score, 0.0, score, area, score, f"found by text: {found.text}", mask)


def _share(box: np.ndarray, size: tuple[int, int]) -> float:
    """Return the share of an image of (width, height) that the ellipse in a box covers."""
    return float(np.pi / 4 * (box[2:] - box[:2]).prod() / (size[0] * size[1]))


def _accept(
    store: Store, entry: Entry, lesions: Sequence[Proposed], detector: Detector, size: tuple[int, int], threshold: float
) -> int:
    """Put lesions into the table as accepted unseen; return their number."""
    if lesions:
        taken = tuple(
            Lesion(
                str(k), one.big, one.small, AUTOMATIC, proposed=(one.big, one.small), model=TEXT, threshold=threshold
            )
            for k, one in enumerate(lesions)
        )
        base = store.state(entry.image_id).revision
        change = Change(base, TEXT, f"{TEXT}-{detector.digest}", lesions=taken, automatic=True)
        store.save(entry.image_id, change, size)
    return len(lesions)


def _batches(entries: Iterator[Entry], count: int) -> Iterator[list[Entry]]:
    while batch := list(islice(entries, count)):
        yield batch
