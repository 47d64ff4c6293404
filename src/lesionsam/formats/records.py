"""Define the records that every format is read into and written from, check them, and add missing cores.

A lesion has a big box and a small one. Tools that know one box per object hold them as two, labelled "big" and "small";
`gather` says which belong together. A file without those two labels holds one box per lesion: it is taken as the big
one, and `with_small_boxes` makes the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np

from lesionsam.boxes.table import BIG, SMALL, TOLERANCE, check_box, check_small
from lesionsam.errors import UserError

BIG_LABEL, SMALL_LABEL = "big", "small"
CORE = 0.45  # boxes.core_low of the default: the least share that the simulated annotator draws


@dataclass(frozen=True)
class Picture:
    """An image that a file of annotations names.

    Attributes:
        image_id: name without ending. file_name: path below the folder of the images, with "/"; "" where unknown.
        width, height: pixels, after EXIF transpose. split: train, dev, test or "" where unknown.
        path: of the image file where it is at hand.
    """

    image_id: str
    file_name: str
    width: int
    height: int
    split: str = ""
    path: Path | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Lesion:
    """One lesion of a picture.

    Attributes:
        lesion_id: unique within the picture.
        big_box, small_box: (4,) float64 XYXY, half-open, original pixels; small_box is None until one is made.
    """

    image_id: str
    lesion_id: str
    big_box: np.ndarray
    small_box: np.ndarray | None = None


@dataclass(frozen=True)
class Annotations:
    """Pictures, those without lesions included, their lesions, and notes on what the reader left out or assumed."""

    pictures: tuple[Picture, ...]
    lesions: tuple[Lesion, ...]
    notes: tuple[str, ...] = ()

    def by_picture(self) -> dict[str, list[Lesion]]:
        """Return image_id -> its lesions, in the order of the pictures."""
        found: dict[str, list[Lesion]] = {picture.image_id: [] for picture in self.pictures}
        for lesion in self.lesions:
            found[lesion.image_id].append(lesion)
        return found


@dataclass(frozen=True)
class Labels:
    """The labels a file uses for the two boxes; case does not matter."""

    big: str = BIG_LABEL
    small: str = SMALL_LABEL


@dataclass(frozen=True)
class Shape:
    """One labelled shape as a file holds it.

    Attributes:
        box: (4,) float64 XYXY, original pixels; the bounding box of a polygon or mask.
        place: where it stands, for messages. lesion_id: as the file names it, or "".
        group: what the file ties shapes together by where it names no lesion, or "".
    """

    label: str
    box: np.ndarray
    place: str
    lesion_id: str = ""
    group: str = ""


def checked_name(file_name: object, place: str) -> PurePosixPath:
    """Check that a file name lies below the folder of images; `place` begins the UserError otherwise."""
    path = PurePosixPath(file_name.replace("\\", "/")) if isinstance(file_name, str) else PurePosixPath()
    unfit = path.is_absolute() or any(part == ".." or "\0" in part or len(part.encode()) > 255 for part in path.parts)
    if not path.stem or unfit:
        raise UserError(f"{place}: expected a file name below the folder of images, got {str(file_name)[:80]!r}")
    return path


def checked(annotations: Annotations, source: str) -> Annotations:
    """Clip boxes that exceed the frame, or a core its big box, by rounding alone.

    Raises:
        UserError: a box that is no box, or lies outside, or a core outside its big one.
    """
    pictures = {picture.image_id: picture for picture in annotations.pictures}
    lesions = []
    for lesion in annotations.lesions:
        picture = pictures[lesion.image_id]
        try:
            big = check_box(lesion.big_box, BIG, picture.width, picture.height, lesion.image_id)
            small = None
            if lesion.small_box is not None:
                small = check_box(lesion.small_box, SMALL, picture.width, picture.height, lesion.image_id)
                small = check_small(big, small, lesion.image_id)
        except ValueError as error:
            limits = np.array([picture.width, picture.height] * 2) + TOLERANCE
            is_exchanged = bool((lesion.big_box <= limits[[1, 0, 1, 0]]).all() and (lesion.big_box > limits).any())
            hint = "; are the image's width and height exchanged (an EXIF orientation)?" if is_exchanged else ""
            raise UserError(f"{source}: lesion {lesion.lesion_id!r}, {error}{hint}") from None
        lesions.append(replace(lesion, big_box=big, small_box=small))
    return replace(annotations, lesions=tuple(lesions))


def with_small_boxes(annotations: Annotations, core: float = CORE) -> Annotations:
    """Add missing cores: `core` times the big box's sides, about its centre.

    A centred box of share s lies inside an ellipse whose own bounding box was drawn x larger while s (1 + x) is below
    1 / sqrt(2): 0.45 allows a big box up to 57 % too large. A lesion of another form, or off the middle, may hold less:
    draw cores where the middle of the big one is not the lesion.
    """
    if not 0 < core < 1:
        raise UserError(f"share of the core: expected a number between 0 and 1, got {core:g}")
    made, lesions = 0, []
    for lesion in annotations.lesions:
        if lesion.small_box is None:
            made += 1
            centre, half = lesion.big_box.reshape(2, 2).mean(0), (lesion.big_box[2:] - lesion.big_box[:2]) * core / 2
            lesion = replace(lesion, small_box=np.concatenate([centre - half, centre + half]))
        lesions.append(lesion)
    if not made:
        return annotations
    note = (
        f"{made} of {len(lesions)} cores were made from the one box given: {core:g} of its sides, same "
        "centre; set method.target.looseness to how much the given boxes exceed the lesion (0: they are tight)"
    )
    return replace(annotations, lesions=tuple(lesions), notes=(*annotations.notes, note))


def need_names(annotations: Annotations, form: str) -> None:
    """Refuse to write a format that names files while their endings are unknown."""
    nameless = next((picture for picture in annotations.pictures if not picture.file_name), None)
    if nameless is not None:
        raise UserError(
            f"{form} names image files with their endings, and that of {nameless.image_id!r} is unknown; "
            "give the folder of images (--images)"
        )
