"""Read and write the two-box CSV on its own, without an index, for conversion."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from lesionsam.boxes.table import BIG, REQUIRED, SMALL, header, read_rows, row_of
from lesionsam.errors import UserError
from lesionsam.formats.gather import Gathered
from lesionsam.formats.records import Annotations, Lesion, Picture, checked
from lesionsam.formats.safe import number
from lesionsam.utils.files import atomic_write, whole_number


def read_table(path: Path, pictures: Mapping[str, Picture] | None = None) -> Annotations:
    """Read a two-box CSV; the columns of the core may be missing, or empty in a row.

    Args:
        pictures: the images at hand; without them the columns width and height are needed, and file names unknown.
    Raises:
        UserError: names file, line and column.
    """
    gathered, lesions = Gathered(str(path)), []
    seen: dict[tuple[str, str], int] = {}
    counts: dict[str, int] = {}
    for line, row in read_rows(path, ("image_id", *BIG)):
        place, image_id = f"{path}: line {line}", row["image_id"]
        if image_id not in gathered.pictures:
            _add(gathered, row, place, pictures)
        lesion_id = row.get("lesion_id") or str(counts.get(image_id, 0))
        counts[image_id] = counts.get(image_id, 0) + 1
        if (image_id, lesion_id) in seen:
            raise UserError(
                f"{place}: lesion {lesion_id!r} of image {image_id!r} stands already in line "
                f"{seen[image_id, lesion_id]}; give each lesion of an image its own lesion_id"
            )
        seen[image_id, lesion_id] = line
        big = np.array([number(row[name], f"{place}, {name}") for name in BIG])
        given = [name for name in SMALL if row.get(name)]
        if given and len(given) < len(SMALL):
            missing = next(name for name in SMALL if name not in given)
            raise UserError(f"{place}, {missing}: expected all four numbers of the core, or none")
        small = np.array([number(row[name], f"{place}, {name}") for name in SMALL]) if given else None
        lesions.append(Lesion(image_id, lesion_id, big, small))
    return checked(Annotations(tuple(gathered.pictures.values()), tuple(lesions)), str(path))


def _add(gathered: Gathered, row: Mapping[str, str], place: str, pictures: Mapping[str, Picture] | None) -> None:
    image_id = row["image_id"]
    if pictures is not None:
        if image_id not in pictures:
            raise UserError(f"{place}, image_id: {image_id!r} is not among the {len(pictures)} images given")
        gathered.pictures[image_id] = replace(pictures[image_id], split=row.get("split", ""))
        return
    width, height = (whole_number(row.get(name, "")) for name in ("width", "height"))
    if not width or not height:
        raise UserError(
            f"{place}: the size of image {image_id!r} is unknown; give the folder of images (--images), or "
            "the columns width and height in pixels"
        )
    gathered.pictures[image_id] = Picture(image_id, "", width, height, row.get("split", ""))


def write_table(path: Path, annotations: Annotations) -> None:
    """Write the two-box CSV, coordinates to a hundredth of a pixel; the column split only where all splits are known.

    Raises:
        UserError: a lesion without a core.
    """
    pictures = {picture.image_id: picture for picture in annotations.pictures}
    with_split = all(pictures[lesion.image_id].split for lesion in annotations.lesions)
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header(with_split))
        for lesion in annotations.lesions:
            if lesion.small_box is None:
                raise UserError(
                    f"lesion {lesion.lesion_id!r} of image {lesion.image_id!r} has no core; the CSV "
                    f"needs {', '.join(REQUIRED)}"
                )
            picture = pictures[lesion.image_id]
            size, split = (picture.width, picture.height), picture.split if with_split else None
            writer.writerow(row_of(lesion.image_id, lesion.lesion_id, split, size, lesion.big_box, lesion.small_box))
