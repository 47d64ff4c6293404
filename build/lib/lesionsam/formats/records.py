"""What every format is read into and written from, how two boxes find each other, and what one box alone becomes.

A lesion has a big box and a small one. Tools that know one box per object hold them as two, labelled "big" and "small",
tied together by the lesion's id where the format has a place for it. Where it has none, a small box belongs to the big
one that contains it: to the one written just before it if that does, else to the smallest. A file without those two
labels holds one box per lesion: it is taken as the big one, and `with_small_boxes` makes the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lesionsam.boxes.table import BIG, SMALL, TOLERANCE, check_box, check_small
from lesionsam.errors import UserError
from lesionsam.types import SPLITS, Sample
from lesionsam.utils.images import IMAGE_SUFFIXES, MAX_PIXELS, image_size

BIG_LABEL, SMALL_LABEL, MASK_LABEL = "big", "small", "lesion"
CORE = 0.45  # boxes.core_low of the default: the least share that the simulated annotator draws


@dataclass(frozen=True)
class Picture:
    """An image that a file of annotations speaks of.

    Attributes:
        image_id: name without ending. file_name: path below the folder of the images, with "/"; "" where unknown.
        width, height: pixels, after EXIF transpose. split: train, dev, test or "" where unknown.
    """

    image_id: str
    file_name: str
    width: int
    height: int
    split: str = ""


@dataclass(frozen=True)
class Lesion:
    """A lesion of a picture.

    Attributes:
        lesion_id: unique within the picture.
        big_box, small_box: (4,) float64 XYXY, half-open, original pixels; small_box is None until one is made.
        segmentation: COCO's polygons or RLE of the lesion, or None.
    """

    image_id: str
    lesion_id: str
    big_box: np.ndarray
    small_box: np.ndarray | None = None
    segmentation: Any = None


@dataclass(frozen=True)
class Annotations:
    """Pictures, those without lesions included, their lesions, and what the reader left out or assumed, in words."""

    pictures: tuple[Picture, ...]
    lesions: tuple[Lesion, ...]
    notes: tuple[str, ...] = ()

    def by_picture(self) -> dict[str, list[Lesion]]:
        """image_id -> its lesions, in the order of the pictures."""
        found: dict[str, list[Lesion]] = {picture.image_id: [] for picture in self.pictures}
        for lesion in self.lesions:
            found[lesion.image_id].append(lesion)
        return found


@dataclass(frozen=True)
class Labels:
    """The words a file uses for the two boxes; upper and lower case do not matter."""

    big: str = BIG_LABEL
    small: str = SMALL_LABEL


@dataclass(frozen=True)
class Shape:
    """One labelled shape as it stands in a file.

    Attributes:
        box: (4,) float64 XYXY, original pixels; the bounding box of a polygon or mask.
        place: where it stands, for messages. lesion_id: as the file names it, or "".
        segmentation: COCO's, or None.
        group: what the file ties shapes together by where it names no lesion, or "".
    """

    label: str
    box: np.ndarray
    place: str
    lesion_id: str = ""
    segmentation: Any = None
    group: str = ""


@dataclass
class Gathered:
    """Pictures with their shapes while a file is being read."""

    source: str
    pictures: dict[str, Picture] = field(default_factory=dict)
    shapes: dict[str, list[Shape]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, file_name: str, width: object, height: object, split: str = "") -> str:
        """Take up a picture; its image_id.

        Raises:
            UserError: a size that is none, a name that leaves the folder, or two pictures of the same id.
        """
        path = checked_name(file_name, self.source)
        name = path.as_posix()
        sides = _side(width), _side(height)
        if not 0 < sides[0] * sides[1] <= MAX_PIXELS:
            raise UserError(
                f"{self.source}: image {name!r}: expected width and height in pixels, at most "
                f"{MAX_PIXELS / 1e6:.0f} megapixels, got {str(width)[:20]} and {str(height)[:20]}"
            )
        if path.stem in self.pictures:
            other = self.pictures[path.stem].file_name
            raise UserError(
                f"{self.source}: images {other!r} and {name!r} have the same id {path.stem!r}; rename one, "
                "as boxes are found by id"
            )
        split = split.lower() if split.lower() in SPLITS else ""
        self.pictures[path.stem] = Picture(path.stem, name, *sides, split)
        self.shapes[path.stem] = []
        return path.stem

    def finish(self, labels: Labels) -> Annotations:
        """Tie the shapes to lesions and check every box.

        Raises:
            UserError: names file, picture and shape.
        """
        big, small = labels.big.lower(), labels.small.lower()
        two = any(shape.label.lower() in (big, small) for shapes in self.shapes.values() for shape in shapes)
        lesions, others = [], 0
        for image_id, shapes in self.shapes.items():
            try:
                found = _pair(image_id, shapes, big, small) if two else _single(image_id, shapes)
            except ValueError as error:
                raise UserError(f"{self.source}: image {image_id!r}: {error}") from None
            used = sum((lesion.small_box is not None) + 1 + (lesion.segmentation is not None) for lesion in found)
            others += len(shapes) - used if two else 0
            lesions += found
        notes = list(self.notes)
        if others:
            notes.append(f"{others} shapes with other labels than {labels.big!r} and {labels.small!r} were left out")
        return checked(Annotations(tuple(self.pictures.values()), tuple(lesions), tuple(notes)), self.source)


def _side(value: object) -> int:
    """A whole number of pixels, also where a tool wrote it as 512.0; 0 for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_PIXELS else 0


def checked_name(file_name: object, place: str) -> PurePosixPath:
    """A file name out of annotations, below the folder of the images; `place` begins the UserError otherwise."""
    path = PurePosixPath(file_name.replace("\\", "/")) if isinstance(file_name, str) else PurePosixPath()
    unfit = path.is_absolute() or any(part == ".." or "\0" in part or len(part.encode()) > 255 for part in path.parts)
    if not path.stem or unfit:
        raise UserError(f"{place}: expected a file name below the folder of images, got {str(file_name)[:80]!r}")
    return path


def _single(image_id: str, shapes: Sequence[Shape]) -> list[Lesion]:
    names = _names([shape.lesion_id for shape in shapes])
    return [
        Lesion(image_id, name, shape.box, None, shape.segmentation) for name, shape in zip(names, shapes, strict=True)
    ]


def _pair(image_id: str, shapes: Sequence[Shape], big: str, small: str) -> list[Lesion]:
    """Lesions of one picture; other labels only count as the mask of a lesion whose id they carry."""
    bigs = [k for k, shape in enumerate(shapes) if shape.label.lower() == big]
    smalls = [k for k, shape in enumerate(shapes) if shape.label.lower() == small]
    owner: dict[int, int] = {}  # big -> small
    loose = []
    for k in smalls:
        home = _home(shapes, k, bigs)
        if home is None:
            loose.append(k)
        elif home in owner:
            raise ValueError(f"{shapes[k].place}: a second small box of the lesion of {shapes[home].place}; keep one")
        else:
            owner[home] = k
    fits = {
        k: [b for b in bigs if b not in owner and _excess(shapes[k].box, shapes[b].box) <= TOLERANCE] for k in loose
    }
    for k in sorted(loose, key=lambda k: len(fits[k])):
        free = [b for b in fits[k] if b not in owner]
        if not free:
            raise ValueError(
                f"{shapes[k].place}: the small box {show(shapes[k].box)} lies inside no big box that has "
                "none yet; draw its big box or remove it"
            )
        before = [b for b in free if b == k - 1]
        owner[before[0] if before else min(free, key=lambda b: _area(shapes[b].box))] = k
    masks = {
        shape.lesion_id: shape.segmentation
        for shape in shapes
        if shape.label.lower() not in (big, small) and shape.lesion_id and shape.segmentation is not None
    }
    names = _names([shapes[b].lesion_id for b in bigs])
    return [
        Lesion(
            image_id, name, shapes[b].box, shapes[owner[b]].box if b in owner else None, masks.get(shapes[b].lesion_id)
        )
        for name, b in zip(names, bigs, strict=True)
    ]


def _home(shapes: Sequence[Shape], small: int, bigs: Sequence[int]) -> int | None:
    """The one big box with the lesion id, or else the group, of a small one."""
    for key in ("lesion_id", "group"):
        tie = getattr(shapes[small], key)
        same = [b for b in bigs if getattr(shapes[b], key) == tie] if tie else []
        if len(same) == 1:
            return same[0]
    return None


def _names(wanted: Sequence[str]) -> list[str]:
    """Lesion ids: those given, and numbers from 0 for the rest."""
    taken = {name for name in wanted if name}
    if len(taken) < sum(bool(name) for name in wanted):
        twice = next(name for k, name in enumerate(wanted) if name and name in wanted[:k])
        raise ValueError(f"two lesions have the id {twice!r}; give each lesion of an image its own")
    names, number = [], 0
    for name in wanted:
        if not name:
            while str(number) in taken:
                number += 1
            name = str(number)
            taken.add(name)
        names.append(name)
    return names


def _excess(inner: np.ndarray, outer: np.ndarray) -> float:
    return float(np.maximum(outer[:2] - inner[:2], inner[2:] - outer[2:]).max())


def _area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def show(box: Iterable[float]) -> str:
    """A box in a message."""
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"


def checked(annotations: Annotations, source: str) -> Annotations:
    """The same with boxes cut at the frame and at each other, where they stick out by rounding alone.

    Raises:
        UserError: a box that is no box, or lies outside, or a small box outside its big one.
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
            raise UserError(f"{source}: lesion {lesion.lesion_id!r}, {error}") from None
        lesions.append(replace(lesion, big_box=big, small_box=small))
    return replace(annotations, lesions=tuple(lesions))


def with_small_boxes(annotations: Annotations, core: float = CORE) -> Annotations:
    """Every lesion with a small box: where none was drawn, `core` times the big one's sides about its centre.

    A centred box of share s lies inside an ellipse whose own bounding box was drawn x larger while s (1 + x) is below
    1 / sqrt(2): 0.45 allows a big box up to 57 % too large. A lesion of another form, or off the middle, may hold less:
    draw small boxes where the middle of the big one is not the lesion.
    """
    if not 0 < core < 1:
        raise UserError(f"share of the small box: expected a number between 0 and 1, got {core:g}")
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
        f"{made} of {len(lesions)} small boxes were made from the one box given: {core:g} of its sides, same "
        "centre; set method.target.looseness to how much the given boxes exceed the lesion (0: they are tight)"
    )
    return replace(annotations, lesions=tuple(lesions), notes=(*annotations.notes, note))


def from_samples(samples: Sequence[Sample], images: Path | None = None) -> Annotations:
    """Annotations of samples, in their order; file names are relative to `images`, or the bare names."""
    pictures: dict[str, Picture] = {}
    for s in samples:
        name = s.image_path.relative_to(images).as_posix() if images is not None else s.image_path.name
        pictures.setdefault(s.image_id, Picture(s.image_id, name, s.width, s.height, s.split))
    lesions = tuple(Lesion(s.image_id, s.lesion_id, s.big_box, s.small_box) for s in samples)
    return Annotations(tuple(pictures.values()), lesions)


def find_pictures(folder: Path) -> dict[str, Picture]:
    """image_id -> picture of every image in a folder and those within it, sizes read from the headers.

    Raises:
        UserError: no folder, no images, or two images of the same id.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the images")
    found = Gathered(str(folder))
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file():
            found.add(path.relative_to(folder).as_posix(), *image_size(path))
    if not found.pictures:
        raise UserError(f"{folder}: no images in it; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return found.pictures


def with_pictures(annotations: Annotations, known: Mapping[str, Picture]) -> Annotations:
    """The same with file names taken from the images at hand, which must have the sizes that the annotations say.

    Raises:
        UserError: an image that is not there, or has another size.
    """
    pictures = []
    for picture in annotations.pictures:
        if picture.image_id not in known:
            raise UserError(
                f"image {picture.file_name or picture.image_id!r}: no such image among the {len(known)} "
                "given; add it or remove its annotations"
            )
        held = known[picture.image_id]
        if (held.width, held.height) != (picture.width, picture.height):
            raise UserError(
                f"image {held.file_name!r}: the annotations say {picture.width}x{picture.height} px, the "
                f"file has {held.width}x{held.height} px; annotate the images as they are"
            )
        pictures.append(replace(picture, file_name=held.file_name))
    return replace(annotations, pictures=tuple(pictures))


def need_names(annotations: Annotations, form: str) -> None:
    """Refuse to write a format that names files while their endings are unknown."""
    nameless = next((picture for picture in annotations.pictures if not picture.file_name), None)
    if nameless is not None:
        raise UserError(
            f"{form} names image files with their endings, and that of {nameless.image_id!r} is unknown; "
            "give the folder of images (--images)"
        )
