"""Boxes by text for `lesionsam predict --text`: a two-box CSV that prediction then reads like any other."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from lesionsam.boxes.geometry import centre_core, loosen
from lesionsam.boxes.table import header, row_of
from lesionsam.detection.detectors import THRESHOLD, open_detector, split_texts
from lesionsam.errors import UserError
from lesionsam.inference.arguments import find_images
from lesionsam.inference.outputs import make_folder
from lesionsam.utils.files import atomic_write
from lesionsam.utils.images import read_image
from lesionsam.utils.progress import progress

TABLE = "text_boxes.csv"
LOOSENESS = 0.1  # by which a prompted box is larger than what was found
BATCH_SIZE = 4


def write_text_boxes(
    images: Sequence[str],
    *,
    text: str,
    detector: str,
    out: Path,
    threshold: float = THRESHOLD,
    device: torch.device | str = "cpu",
) -> Path:
    """Find what a text names and write its boxes to OUT/text_boxes.csv; images in which nothing is found have no row.

    Args:
        images: files, folders and patterns; those that cannot be read are left to the prediction to name.
        text: synonyms parted by commas. detector: folder or OWNER/NAME.
    Raises:
        UserError: no images, no text, a detector that cannot be used, nothing found in any image.
    """
    texts = split_texts(text)
    paths, problems = find_images(images)
    if not paths:
        raise UserError(problems[0] if problems else "no images given; name files, folders or patterns")
    model = open_detector(detector, device, key="--detector")
    rows = []
    for start in progress(range(0, len(paths), BATCH_SIZE), total=-(-len(paths) // BATCH_SIZE), title="finding boxes"):
        names, decoded = [], []
        for path in paths[start : start + BATCH_SIZE]:
            try:
                decoded.append(read_image(path))
                names.append(path.stem)
            except UserError:
                continue
        found = model.detect(decoded, texts, threshold=threshold) if decoded else []
        for name, image, lesions in zip(names, decoded, found, strict=True):
            height, width = image.shape[:2]
            for number, one in enumerate(lesions):
                big = loosen(one.box, LOOSENESS, (height, width))
                rows.append(row_of(name, str(number), None, (width, height), big, centre_core(big)))
    if not rows:
        raise UserError(
            f'--text "{text}": {detector} found nothing in {len(paths)} images at a score of {threshold:g} or more; '
            "try other words, or draw boxes"
        )
    make_folder(out)
    with atomic_write(out / TABLE, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header(with_split=False))
        writer.writerows(rows)
    return out / TABLE
