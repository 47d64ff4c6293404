"""Read and write COCO instances JSON: images, categories, and an annotation per object with box, polygons or RLE.

Two boxes are two annotations of the categories "big" and "small"; attributes.lesion_id, which CVAT too reads and
writes, ties them together. COCO's boxes are x, y, width, height.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lesionsam.errors import UserError
from lesionsam.formats.gather import Gathered
from lesionsam.formats.records import BIG_LABEL, SMALL_LABEL, Annotations, Labels, Picture, Shape
from lesionsam.formats.rle import decode, mask_box, polygon_box
from lesionsam.formats.safe import number, read_json
from lesionsam.utils.files import write_text_atomic

EXPECTED = "COCO instances JSON"


@dataclass(frozen=True)
class Instances:
    """A COCO file whose structure has been checked, but not its boxes and segmentations.

    Attributes:
        images: id -> entry with file_name, width, height. categories: id -> name.
        annotations: in the order of the file, with id, image_id and category_id that are there.
    """

    path: Path
    images: dict[int, dict[str, Any]]
    categories: dict[int, str]
    annotations: tuple[dict[str, Any], ...]

    def objects(self) -> tuple[dict[int, list[dict[str, Any]]], int]:
        """Return image id -> its annotations sorted by id, crowds (iscrowd) left out, and the number of crowds."""
        found: dict[int, list[dict[str, Any]]] = {}
        wanted = [entry for entry in self.annotations if not entry.get("iscrowd")]
        for entry in sorted(wanted, key=lambda entry: entry["id"]):
            found.setdefault(entry["image_id"], []).append(entry)
        return found, len(self.annotations) - len(wanted)


def load_instances(path: Path, categories: Sequence[str] = ()) -> Instances:
    """Read a COCO file.

    Args:
        categories: names of those wanted; none: all.
    Raises:
        UserError: not such a file, ids that stand twice or for nothing, a category that is not there.
    """
    found = read_json(path, EXPECTED)
    if not isinstance(found, dict) or not all(isinstance(found.get(k), list) for k in ("images", "annotations")):
        raise UserError(f"{path}: expected {EXPECTED} with the lists images, annotations and categories")
    images = _by_id(found["images"], path, "image")
    names = {
        key: str(entry.get("name", "")) for key, entry in _by_id(found.get("categories", []), path, "category").items()
    }
    if missing := [name for name in categories if name not in names.values()]:
        raise UserError(f"{path}: no category {missing[0]!r}; it has {', '.join(names.values()) or 'none'}")
    annotations = _by_id(found["annotations"], path, "annotation")
    for key, entry in annotations.items():
        if not _stands_for(entry.get("image_id"), images):
            raise UserError(f"{path}: annotation {key}: image_id {entry.get('image_id')!r} stands for no image")
        if not _stands_for(entry.get("category_id"), names):
            raise UserError(
                f"{path}: annotation {key}: category_id {entry.get('category_id')!r} stands for no category"
                f"; it has {', '.join(f'{k} ({v})' for k, v in names.items()) or 'none'}"
            )
    wanted = [each for each in annotations.values() if not categories or names[each["category_id"]] in categories]
    return Instances(path, images, names, tuple(wanted))


def _stands_for(key: object, known: Mapping[int, object]) -> bool:
    return isinstance(key, int) and not isinstance(key, bool) and key in known


def _by_id(entries: object, path: Path, kind: str) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a list of {kind} objects, got {str(entries)[:60]}")
    for place, entry in enumerate(entries, 1):
        key = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or isinstance(key, bool) or not isinstance(key, int):
            raise UserError(
                f"{path}: {kind} number {place}: expected an object with a whole number as id, got "
                f"{str(entry if key is None else key)[:60]}"
            )
        if key in found:
            raise UserError(f"{path}: {kind} {key}: this id stands twice; give each {kind} its own")
        found[key] = entry
    return found


def read_coco(
    path: Path,
    labels: Labels | None = None,
    categories: Sequence[str] = (),
    pictures: Mapping[str, Picture] | None = None,
) -> Annotations:
    """Read the boxes of a COCO file; where an annotation has none, those around its polygons or mask.

    Crowds are left out, and said.

    Args:
        pictures: the images at hand, whose sizes are compared.
    Raises:
        UserError: names file and annotation.
    """
    instances = load_instances(path, categories)
    gathered = Gathered(str(path), known=pictures)
    ids = {
        key: gathered.add(
            image.get("file_name", ""), image.get("width"), image.get("height"), str(image.get("split", ""))
        )
        for key, image in instances.images.items()
    }
    for entry in instances.annotations:
        place = f"annotation {entry['id']}"
        if entry.get("iscrowd"):
            gathered.leave_out("crowd annotations (iscrowd)", place)
            continue
        image = instances.images[entry["image_id"]]
        attributes = entry.get("attributes")
        attributes = attributes if isinstance(attributes, dict) else {}
        if not entry.get("segmentation") and (turn := attributes.get("rotation")):
            raise UserError(f"{path}: {place}: a box turned by {str(turn)[:20]} degrees; expected an upright box")
        box = shape_box(entry, image["height"], image["width"], f"{path}: {place}")
        gathered.shapes[ids[entry["image_id"]]].append(
            Shape(instances.categories[entry["category_id"]], box, place, str(attributes.get("lesion_id", "")))
        )
    return gathered.finish(labels or Labels())


def shape_box(entry: dict[str, Any], height: int, width: int, place: str) -> np.ndarray:
    """Return the box of an annotation, (4,) XYXY: its bbox, or the bounding box of its segmentation."""
    box, segmentation = entry.get("bbox"), entry.get("segmentation")
    if isinstance(box, list) and len(box) == 4:
        x, y, w, h = (number(value, f"{place}, bbox") for value in box)
        if w <= 0 or h <= 0:
            raise UserError(f"{place}: bbox has no area ({w:g} x {h:g} px); expected [x, y, width, height]")
        return np.array([x, y, x + w, y + h])
    if box is not None or not segmentation:
        raise UserError(f"{place}: expected bbox as [x, y, width, height] or a segmentation, got {str(box)[:60]}")
    try:
        if isinstance(segmentation, list):
            return polygon_box(segmentation)
        return mask_box(decode(segmentation, height, width))
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None


def write_coco(path: Path, annotations: Annotations) -> None:
    """Write a COCO file: "big" and "small" as categories 1 and 2."""
    images, entries, numbers = [], [], {}
    for number_, picture in enumerate(annotations.pictures, 1):
        numbers[picture.image_id] = number_
        images.append(
            {"id": number_, "file_name": picture.file_name, "width": picture.width, "height": picture.height}
            | ({"split": picture.split} if picture.split else {})
        )
    for lesion in annotations.lesions:
        for category, box in ((1, lesion.big_box), (2, lesion.small_box)):
            if box is not None:
                x0, y0, x1, y1 = (float(value) for value in box)
                entry = {
                    "id": len(entries) + 1,
                    "image_id": numbers[lesion.image_id],
                    "category_id": category,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "segmentation": [],
                    "attributes": {"lesion_id": lesion.lesion_id},
                }
                entries.append(entry)
    document = {
        "info": {"description": "two boxes per lesion; attributes.lesion_id ties them together"},
        "licenses": [],
        "images": images,
        "annotations": entries,
        "categories": [
            {"id": k, "name": name, "supercategory": "lesion"} for k, name in enumerate((BIG_LABEL, SMALL_LABEL), 1)
        ],
    }
    write_text_atomic(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
