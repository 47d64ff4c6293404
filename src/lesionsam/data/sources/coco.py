"""Index a user's COCO instances: a JSON and images per split, each object a lesion with its own mask and prompts.

FOLDER holds JSON files and images at the places that two patterns name, {split} standing for train, val and test. The
images stay where they are. Masks are written as PNG: ID.png for the objects of an image together, and ID.0.png,
ID.1.png, ... for each where there are several; lesions.csv says which is whose. Crowds (iscrowd) are left out, and so
are images without an object; both are counted.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lesionsam.data.index import LESION_COLUMNS, LESIONS, Row, check_rows, dev_ids
from lesionsam.data.sources.parallel import run_jobs
from lesionsam.errors import UserError
from lesionsam.formats.coco import Instances, load_instances
from lesionsam.formats.records import checked_name
from lesionsam.formats.rle import decode
from lesionsam.utils.files import atomic_write, sha256_file
from lesionsam.utils.images import check_image, size_mismatch
from lesionsam.utils.progress import say

SPLIT = "{split}"  # what the patterns replace


@dataclass(frozen=True)
class _Picture:
    """An image of a COCO file with its objects, in the order of their ids."""

    source: Instances
    key: int
    path: Path
    objects: tuple[dict[str, Any], ...]

    @property
    def place(self) -> str:
        return f"{self.source.path}: image {self.key} ({self.path.name!r})"


def index_coco(
    folder: Path,
    *,
    annotations: str,
    images: str,
    categories: Sequence[str],
    dev_fraction: float,
    test_split: str,
    raw: Path,
) -> list[Row]:
    """Return the rows of index.csv for COCO files; every image and object is decoded once, to find faults now.

    Args:
        folder: what the patterns are relative to; paths of images in the rows begin with it.
        annotations, images: patterns of the JSON file and of the images' folder. categories: names wanted; none: all.
        dev_fraction: share of the train images that becomes dev, by hash of the id; 0: val is dev.
        test_split: "val" or "test", the split that becomes test.
        raw: gets masks/SPLIT/ID.png and lesions.csv.
    Raises:
        UserError: the first faulty image or object, with file and annotation id, and how many more there are.
    """
    splits = {"train": "train", test_split: "test"} | ({"val": "dev"} if dev_fraction == 0 else {})
    found = {name: _pictures(folder, name, annotations, images, categories) for name in splits}
    chosen = dev_ids((picture.path.stem for picture in found["train"]), dev_fraction)
    jobs = []
    for name, pictures in found.items():
        for picture in pictures:
            split = "dev" if name == "train" and picture.path.stem in chosen else splits[name]
            jobs.append(partial(_row, picture, split, raw))
    done = run_jobs(jobs, title="reading objects", fault="faulty images or objects")
    rows = [row for row, _ in done]
    check_rows(rows, str(folder))
    _write_lesions(raw / LESIONS, [lesion for _, lesions in done for lesion in lesions])
    return rows


def _pictures(folder: Path, split: str, annotations: str, images: str, categories: Sequence[str]) -> list[_Picture]:
    source = load_instances(folder / annotations.replace(SPLIT, split), categories)
    place = folder / images.replace(SPLIT, split)
    objects, crowds = source.objects()
    pictures, stems = [], {}
    for key, image in source.images.items():
        path = place / checked_name(image.get("file_name"), f"{source.path}: image {key}")
        if path.stem in stems:
            raise UserError(
                f"{source.path}: images {stems[path.stem]} and {key} have the same id {path.stem!r} (file "
                "name without ending); rename one, as boxes are found by id"
            )
        stems[path.stem] = key
        if key in objects:
            pictures.append(_Picture(source, key, path, tuple(objects[key])))
    if crowds:
        say(f"note: {source.path}: {crowds} crowd annotations (iscrowd) are left out, as they are not one lesion each")
    if empty := len(source.images) - len(pictures):
        say(f"note: {source.path}: {empty} of {len(source.images)} images have no object and are left out")
    if not pictures:
        raise UserError(f"{source.path}: no image with an object in it; expected polygons or RLE of lesions")
    return pictures


def _row(picture: _Picture, split: str, raw: Path) -> tuple[Row, list[Row]]:
    """Write the masks of an image; return its row of the index and a row of lesions.csv for each object."""
    image = picture.source.images[picture.key]
    if not picture.path.is_file():
        raise UserError(f"{picture.place}: no such file: {picture.path}; add it or remove it from the JSON")
    width, height = check_image(picture.path)
    stated = image.get("width"), image.get("height")
    if stated != (width, height):
        raise UserError(f"{picture.place}: {size_mismatch(picture.path, stated, 'the JSON')}")
    image_id = picture.path.stem
    masks = [
        object_mask(entry, height, width, f"{picture.source.path}: annotation {entry['id']}")
        for entry in picture.objects
    ]
    whole = raw / "masks" / split / f"{image_id}.png"
    _write_mask(whole, np.logical_or.reduce(masks))
    lesions = []
    for number, (entry, mask) in enumerate(zip(picture.objects, masks, strict=True)):
        path = whole
        if len(masks) > 1:
            path = whole.with_name(f"{image_id}.{number}.png")
            _write_mask(path, mask)
        lesions.append(
            {
                "image_id": image_id,
                "lesion_id": str(number),
                "mask_path": path.as_posix(),
                "annotation_id": entry["id"],
                "category": picture.source.categories[entry["category_id"]],
                "area": int(mask.sum()),
                "mask_sha256": sha256_file(path),
            }
        )
    row = {
        "image_id": image_id,
        "split": split,
        "image_path": picture.path.as_posix(),
        "mask_path": whole.as_posix(),
        "width": width,
        "height": height,
        "sha256": sha256_file(picture.path),
    }
    return row, lesions


def object_mask(entry: dict[str, Any], height: int, width: int, place: str) -> np.ndarray:
    """Decode an annotation's object to (H, W) bool.

    Raises:
        UserError: begins with `place`: no segmentation, one that is faulty or leaves the image, or one without a pixel.
    """
    if not entry.get("segmentation"):
        raise UserError(
            f"{place}: no segmentation; data.source coco needs polygons or RLE (`lesionsam data convert` "
            "turns boxes alone into a two-box CSV)"
        )
    try:
        mask = decode(entry["segmentation"], height, width)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from None
    if not mask.any():
        raise UserError(f"{place}: its object has no area (0 pixels of {width}x{height}); remove it or draw it again")
    return mask


def _write_mask(path: Path, mask: np.ndarray) -> None:
    with atomic_write(path) as file:
        Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")


def _write_lesions(path: Path, lesions: Sequence[Row]) -> None:
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(LESION_COLUMNS)
        for lesion in sorted(lesions, key=lambda row: (row["image_id"], int(row["lesion_id"]))):
            writer.writerow([lesion[name] for name in LESION_COLUMNS])
