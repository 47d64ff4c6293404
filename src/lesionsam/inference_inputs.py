"""What `lesionsam predict` is given: images as files, folders or patterns, and the boxes of their lesions."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lesionsam.boxes import BIG, SMALL, parse_box, parse_boxes, read_rows
from lesionsam.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")  # of the files that a folder stands for


def needs_small(prompt: str) -> bool:
    """Whether a prompt of this kind reads the small box."""
    return prompt != "box"


@dataclass(frozen=True)
class Lesion:
    """One row of the box CSV, its boxes still text: their check needs the image's size.

    Attributes:
        lesion_id: as written, or counted from 0 within the image where the file has no such column.
        line: of the CSV. row: column -> text. file_name: of the mask and of the overlay.
    """

    lesion_id: str
    line: int
    row: dict[str, str]
    file_name: str

    def boxes(self, width: int, height: int, *, with_small: bool) -> tuple[np.ndarray, np.ndarray]:
        """Big and small box, each (4,) XYXY in original pixels; the big one twice without `with_small`.

        Raises:
            ValueError: names the column, what was expected and what came.
        """
        for name, known in (("width", width), ("height", height)):
            if self.row.get(name, str(known)) not in ("", str(known)):
                raise ValueError(f"{name}: got {self.row[name]}, but image {self.row['image_id']!r} is "
                                 f"{width}x{height} px after EXIF transpose")
        if with_small:
            return parse_boxes(self.row, width, height)
        big = parse_box(self.row, BIG, width, height)
        return big, big


@dataclass(frozen=True)
class Job:
    """One image and its lesions, in the order of the CSV."""

    image_id: str
    path: Path
    lesions: tuple[Lesion, ...]


def find_images(arguments: Iterable[str | Path]) -> tuple[list[Path], list[str]]:
    """Image files named by files, folders (their own images, sorted, not those of folders within) and patterns.

    Returns:
        the files, each once, in order; one line for each argument that gives none.
    """
    found: dict[Path, None] = {}
    problems = []
    for argument in map(str, arguments):
        path = Path(argument)
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = [each for each in sorted(path.iterdir()) if _is_image(each)]
            if not matches:
                problems.append(f"{path}: folder without images; expected files ending in {', '.join(SUFFIXES)}")
        else:
            matches = [each for each in map(Path, sorted(glob.glob(argument, recursive=True))) if _is_image(each)]
            if not matches:
                problems.append(f"{argument}: no such image file or folder, and a pattern that matches none")
        found |= dict.fromkeys(matches)
    return list(found), problems


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def read_lesions(path: Path, *, with_small: bool) -> tuple[dict[str, list[tuple[str, int, dict[str, str]]]], list[str]]:
    """Rows of a box CSV by image: image_id and the four columns of the big box are needed, lesion_id may lack.

    Args:
        with_small: the four columns of the small box are needed too.
    Returns:
        image_id -> (lesion_id, line, row); one line for each row that stands twice.
    """
    lesions: dict[str, list[tuple[str, int, dict[str, str]]]] = {}
    problems = []
    for line, row in read_rows(path, ("image_id", *BIG, *(SMALL if with_small else ()))):
        rows = lesions.setdefault(row["image_id"], [])
        lesion_id = row.get("lesion_id") or str(len(rows))
        if any(lesion_id == other for other, _, _ in rows):
            problems.append(f"{path}: line {line}, lesion_id: {row['image_id']!r} has a lesion {lesion_id!r} already; "
                            "the first is taken")
            continue
        rows.append((lesion_id, line, row))
    return lesions, problems


def plan(paths: Sequence[Path], boxes: Path, *, with_small: bool) -> tuple[list[Job], list[str], list[str]]:
    """Match images with rows: image_id is the file's name, with or without its ending.

    Returns:
        the jobs; one line for each image without a row and for each row that stands twice; ids without an image.
    Raises:
        UserError: two images of one name, or lesions whose files would have the same name.
    """
    lesions, problems = read_lesions(boxes, with_small=with_small)
    jobs: dict[str, Job] = {}
    writers: dict[str, str] = {}
    for path in paths:
        image_id = path.stem if path.stem in lesions else path.name
        if image_id not in lesions:
            problems.append(f"{path}: no row of {boxes} has the image_id {path.stem!r}; add its boxes")
            continue
        if image_id in jobs:
            raise UserError(f"{path}: the image_id {image_id!r} stands for {jobs[image_id].path} too; predict them in "
                            "two calls, with an --out of their own")
        rows = lesions[image_id]
        named = []
        for lesion_id, line, row in rows:
            label = image_id if len(rows) == 1 else f"{image_id}_{lesion_id}"
            file_name = re.sub(r"[^\w.-]+", "_", label) + ".png"
            if (other := writers.setdefault(file_name, f"{image_id}/{lesion_id}")) != f"{image_id}/{lesion_id}":
                raise UserError(f"{boxes}: line {line}: the mask of {image_id}/{lesion_id} would be {file_name}, "
                                f"as that of {other}; rename one of them")
            named.append(Lesion(lesion_id, line, row, file_name))
        jobs[image_id] = Job(image_id, path, tuple(named))
    return list(jobs.values()), problems, [image_id for image_id in lesions if image_id not in jobs]
