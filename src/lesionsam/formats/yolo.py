"""Read and write YOLO's text files: one per image, a line per object with class, centre and size in shares.

A folder holds the files at the places of the images (images/train/a.jpg, labels/train/a.txt), and the names of the
classes in classes.txt, obj.names or data.yaml. The format knows neither sizes of images nor lesion ids: sizes come from
the images, and the lesions of an image are numbered as they stand. Lines of a segmentation (class and points) count
with the box around them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lesionsam.errors import UserError
from lesionsam.formats.gather import Gathered
from lesionsam.formats.records import BIG_LABEL, SMALL_LABEL, Annotations, Labels, Picture, Shape
from lesionsam.formats.safe import number, read_bytes
from lesionsam.utils.files import whole_number, write_text_atomic

CLASSES = ("classes.txt", "obj.names", "data.yaml", "dataset.yaml")
NO_LABELS = {*CLASSES, "train.txt", "val.txt", "valid.txt", "test.txt", "notes.txt"}
MAX_CLASSES = 10_000
EXPECTED = "YOLO label text"


def read_yolo(
    folder: Path, pictures: Mapping[str, Picture], labels: Labels | None = None, classes: Sequence[str] | None = None
) -> Annotations:
    """Read the boxes of a folder of YOLO files.

    Args:
        folder: searched with the folders in it. pictures: the images, by id.
        classes: names by class number; None: as classes.txt, obj.names or data.yaml in the folder says, or in the one
            that it lies in; without any, "big" and "small".
    Raises:
        UserError: names file and line.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected {EXPECTED} files, one per image")
    names = list(classes) if classes is not None else _class_names(folder)
    gathered = Gathered(str(folder), dict(pictures), {image_id: [] for image_id in pictures})
    files = [path for path in sorted(folder.rglob("*.txt")) if path.name not in NO_LABELS]
    if not files:
        raise UserError(f"{folder}: no {EXPECTED} files in it; expected IMAGE.txt for each image")
    for path in files:
        picture = pictures.get(path.stem)
        if picture is None:
            raise UserError(f"{path}: no image of the name {path.stem!r} among the {len(pictures)} given")
        if path.stat().st_size == 0:
            continue  # an image without objects
        try:
            text = read_bytes(path, EXPECTED).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text; expected {EXPECTED}") from None
        for line, row in enumerate(text.splitlines(), 1):
            if row.strip():
                gathered.shapes[path.stem].append(_shape(row.split(), names, picture, path, line))
    return gathered.finish(labels or Labels())


def _shape(values: list[str], names: Sequence[str], picture: Picture, path: Path, line: int) -> Shape:
    place = f"{path}: line {line}"
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        raise UserError(
            f"{place}: {len(values)} fields; expected class, x, y, width, height (or class and the points of a polygon)"
        )
    label = whole_number(values[0])
    if label is None or label >= len(names):
        raise UserError(f"{place}: class {values[0][:20]!r}; expected 0 to {len(names) - 1} ({', '.join(names)})")
    numbers = np.array([number(value, place) for value in values[1:]])
    if len(values) == 5:
        centre, half = numbers[:2], numbers[2:] / 2
        shares = np.concatenate([centre - half, centre + half])
    else:
        points = numbers.reshape(-1, 2)
        shares = np.concatenate([points.min(0), points.max(0)])
    if shares.min() < -1 or shares.max() > 2:
        raise UserError(
            f"{place}: expected shares of 0 to 1 of the image's sides, got {' '.join(values[1:5])}; are these pixels?"
        )
    box = shares * np.array([picture.width, picture.height] * 2)
    return Shape(names[label], box, f"{path.name} line {line}")


def _class_names(folder: Path) -> list[str]:
    for name in CLASSES:
        for path in (folder / name, folder.parent / name):
            if path.is_file():
                return _from_yaml(path) if path.suffix == ".yaml" else _from_lines(path)
    return [BIG_LABEL, SMALL_LABEL]


def _from_lines(path: Path) -> list[str]:
    names = [line.strip() for line in read_bytes(path, "names of classes").decode("utf-8-sig", "replace").splitlines()]
    return [name for name in names if name]


def _from_yaml(path: Path) -> list[str]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        held: Any = YAML(typ="safe", pure=True).load(read_bytes(path, "names of classes").decode("utf-8-sig"))
    except (YAMLError, ValueError) as error:
        raise UserError(f"{path}: not YAML ({str(error).splitlines()[0]}); expected names of classes") from None
    names = held.get("names") if isinstance(held, dict) else None
    if isinstance(names, dict):
        known = [key for key in names if isinstance(key, int) and 0 <= key < MAX_CLASSES]
        names = [names.get(key, f"class {key}") for key in range(max(known, default=-1) + 1)]
    if not isinstance(names, list) or not names:
        raise UserError(f"{path}: expected `names` with the names of the classes")
    return [str(name) for name in names]


def write_yolo(folder: Path, annotations: Annotations) -> None:
    """Write one file per image, big box then core of each lesion, and classes.txt with "big" and "small".

    Raises:
        UserError: the folder already holds files.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; choose a new folder for the label files")
    for picture, lesions in zip(annotations.pictures, annotations.by_picture().values(), strict=True):
        rows = []
        sides = np.array([picture.width, picture.height] * 2)
        for lesion in lesions:
            for label, box in ((0, lesion.big_box), (1, lesion.small_box)):
                if box is not None:
                    x0, y0, x1, y1 = (float(value) for value in box / sides)
                    rows.append(f"{label} {(x0 + x1) / 2:.9f} {(y0 + y1) / 2:.9f} {x1 - x0:.9f} {y1 - y0:.9f}\n")
        write_text_atomic(folder / PurePosixPath(picture.file_name).with_suffix(".txt"), "".join(rows))
    write_text_atomic(folder / CLASSES[0], f"{BIG_LABEL}\n{SMALL_LABEL}\n")
