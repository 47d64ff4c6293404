"""Collect the labelled shapes of a file while it is read, and join them to lesions of two boxes each.

Where a file names lesions or groups, these tie a core to its big one. Elsewhere a core belongs to the big one
that contains it: to the one written just before it if that does, else to the smallest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lesionsam.boxes.table import TOLERANCE, show_box
from lesionsam.errors import UserError, listed
from lesionsam.formats.records import Annotations, Labels, Lesion, Picture, Shape, checked, checked_name
from lesionsam.types import SPLITS
from lesionsam.utils.images import IMAGE_SUFFIXES, MAX_PIXELS, image_size, size_mismatch


@dataclass
class Gathered:
    """The pictures and shapes read so far from a file.

    Attributes:
        source: names the file in messages. known: images at hand by id, whose sizes and names hold; None: none given.
        left_out: places of shapes that are not read, by reason.
    """

    source: str
    pictures: dict[str, Picture] = field(default_factory=dict)
    shapes: dict[str, list[Shape]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    known: Mapping[str, Picture] | None = None

    def leave_out(self, reason: str, place: str) -> None:
        """Note a shape that is not read."""
        self.left_out.setdefault(reason, []).append(place)

    def add(self, file_name: str, width: object, height: object, split: str = "") -> str:
        """Add a picture and return its image_id.

        Raises:
            UserError: a size that is none, a name that leaves the folder, two pictures of the same id, one that is not
                among `known`, or has another size there.
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
        if self.known is not None:
            if path.stem not in self.known:
                raise UserError(
                    f"image {name!r}: no such image among the {len(self.known)} given; add it or remove its annotations"
                )
            held = self.known[path.stem]
            if (held.width, held.height) != sides and held.path is not None:
                raise UserError(f"image {held.file_name!r}: {size_mismatch(held.path, sides, self.source)}")
            name = held.file_name
        self.pictures[path.stem] = Picture(path.stem, name, *sides, split)
        self.shapes[path.stem] = []
        return path.stem

    def finish(self, labels: Labels) -> Annotations:
        """Pair the shapes to lesions and check every box.

        Raises:
            UserError: names file, picture and shape.
        """
        big, small = labels.big.lower(), labels.small.lower()
        two = any(shape.label.lower() in (big, small) for shapes in self.shapes.values() for shape in shapes)
        lesions = []
        for image_id, shapes in self.shapes.items():
            try:
                found = _pair(image_id, shapes, big, small) if two else _single(image_id, shapes)
            except ValueError as error:
                raise UserError(f"{self.source}: image {image_id!r}: {error}") from None
            lesions += found
            for shape in shapes if two else ():
                if shape.label.lower() not in (big, small):
                    self.leave_out(
                        f"shapes with other labels than {labels.big!r} and {labels.small!r}",
                        f"image {image_id!r} {shape.place}",
                    )
        notes = [
            *self.notes,
            *(f"{len(places)} {reason} were left out: {listed(places)}" for reason, places in self.left_out.items()),
        ]
        return checked(Annotations(tuple(self.pictures.values()), tuple(lesions), tuple(notes)), self.source)


def _side(value: object) -> int:
    """Return a whole number of pixels, also where a tool wrote it as 512.0; 0 for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_PIXELS else 0


def _single(image_id: str, shapes: Sequence[Shape]) -> list[Lesion]:
    names = _names([shape.lesion_id for shape in shapes])
    return [Lesion(image_id, name, shape.box) for name, shape in zip(names, shapes, strict=True)]


def _pair(image_id: str, shapes: Sequence[Shape], big: str, small: str) -> list[Lesion]:
    """Pair the boxes of one picture."""
    bigs = [k for k, shape in enumerate(shapes) if shape.label.lower() == big]
    smalls = [k for k, shape in enumerate(shapes) if shape.label.lower() == small]
    owner: dict[int, int] = {}  # big -> small
    loose = []
    for k in smalls:
        home = _home(shapes, k, bigs)
        if home is None:
            loose.append(k)
        elif home in owner:
            raise ValueError(f"{shapes[k].place}: a second core of the lesion of {shapes[home].place}; keep one")
        else:
            owner[home] = k
    fits = {
        k: [b for b in bigs if b not in owner and _excess(shapes[k].box, shapes[b].box) <= TOLERANCE] for k in loose
    }
    for k in sorted(loose, key=lambda k: len(fits[k])):
        free = [b for b in fits[k] if b not in owner]
        if not free:
            raise ValueError(
                f"{shapes[k].place}: the core {show_box(shapes[k].box)} lies inside no big box that has "
                "none yet; draw its big box or remove it"
            )
        before = [b for b in free if b == k - 1]
        owner[before[0] if before else min(free, key=lambda b: _area(shapes[b].box))] = k
    names = _names([shapes[b].lesion_id for b in bigs])
    return [
        Lesion(image_id, name, shapes[b].box, shapes[owner[b]].box if b in owner else None)
        for name, b in zip(names, bigs, strict=True)
    ]


def _home(shapes: Sequence[Shape], small: int, bigs: Sequence[int]) -> int | None:
    """Return the big box that has the lesion id, or else the group, of a core; None where there is not exactly one."""
    for key in ("lesion_id", "group"):
        tie = getattr(shapes[small], key)
        same = [b for b in bigs if getattr(shapes[b], key) == tie] if tie else []
        if len(same) == 1:
            return same[0]
    return None


def _names(wanted: Sequence[str]) -> list[str]:
    """Return lesion ids: those given, and numbers from 0 for the rest."""
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


def find_pictures(folder: Path) -> dict[str, Picture]:
    """Find every image in a folder and its subfolders, by image id; sizes are read from the headers.

    Raises:
        UserError: no folder, no images, or two images of the same id.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the images")
    found = Gathered(str(folder))
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file():
            image_id = found.add(path.relative_to(folder).as_posix(), *image_size(path))
            found.pictures[image_id] = replace(found.pictures[image_id], path=path)
    if not found.pictures:
        raise UserError(f"{folder}: no images in it; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return found.pictures
