"""List the images for `data check` and `data show`: of a folder, of COCO files, or of params.yaml.

Unlike the sources that training reads from, nothing here stops at the first fault: each becomes an `Issue`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lesionsam.config.load import load_config
from lesionsam.config.schema import CocoData, Config, CsvBoxes, FolderData
from lesionsam.data.index import dev_ids, read_index
from lesionsam.data.sources.coco import SPLIT, object_mask
from lesionsam.data.sources.folder import match_masks, scan_images
from lesionsam.errors import UserError
from lesionsam.formats.coco import load_instances
from lesionsam.formats.records import checked_name
from lesionsam.utils.images import IMAGE_SUFFIXES, read_mask

ERROR, WARNING, NOTE = "error", "warning", "note"
ORDER = ("train", "val", "dev", "test")  # of splits; any other folder comes after them
INDEX, BOXES = Path("data/raw/index.csv"), Path("data/boxes.csv")


@dataclass(frozen=True)
class Issue:
    """A problem, of severity error, warning or note; `kind` groups similar ones."""

    severity: str
    kind: str
    text: str
    image_id: str = ""


@dataclass(frozen=True)
class Item:
    """An image of the set with its masks or annotations.

    Attributes:
        masks: files that each show a lesion, or one that shows all. threshold: whether grey ones are cut.
        objects: annotations of a COCO file, named in `place`, in place of mask files.
        stated_size: (width, height) that annotations give, or None.
    """

    image_id: str
    split: str
    path: Path
    masks: tuple[Path, ...] = ()
    threshold: bool = False
    objects: tuple[dict[str, Any], ...] = ()
    place: str = ""
    stated_size: tuple[Any, Any] | None = None

    @property
    def has_truth(self) -> bool:
        """Return whether the image has a mask or an annotation."""
        return bool(self.masks or self.objects)

    def lesion_masks(self, width: int, height: int) -> list[np.ndarray]:
        """Return (H, W) bool of each mask file or object; UserError at the first that is faulty."""
        return [self.lesion_mask(k, width, height) for k in range(len(self.masks) + len(self.objects))]

    def lesion_mask(self, number: int, width: int, height: int) -> np.ndarray:
        """Return (H, W) bool of one mask file or object."""
        if number < len(self.masks):
            return read_mask(self.masks[number], (width, height), threshold=self.threshold)
        entry = self.objects[number - len(self.masks)]
        return object_mask(entry, height, width, f"{self.place}: annotation {entry['id']}")


@dataclass
class ImageSet:
    """The images of a set, the issues met while listing them, and its two-box CSV, if any."""

    name: str
    items: list[Item] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)
    boxes: Path | None = None

    def note(self, severity: str, kind: str, text: str) -> None:
        """Add an issue."""
        self.issues.append(Issue(severity, kind, text))


def find_items(
    target: Path, *, images: Path | None = None, categories: Sequence[str] = (), threshold: bool = False
) -> ImageSet:
    """List the images of a folder, of a COCO file, or of a parameter file.

    Args:
        target: a folder with images/ and perhaps masks/, each with a folder per split, or without such folders; a
            folder of images; a COCO JSON; or params.yaml, whose data.source is followed.
        images: folder of a COCO file's images; None: the folder it lies in. categories: of it, those wanted; none: all.
        threshold: grey masks are cut.
    Raises:
        UserError: nothing to look at.
    """
    if target.is_dir():
        found = _folder(target, threshold)
    elif target.suffix.lower() == ".json":
        found = ImageSet(str(target))
        _coco(found, target, images or target.parent, "", categories)
    elif target.is_file():
        found = _parameters(target)
    else:
        raise UserError(f"{target}: no such file or folder; expected a folder of images, a COCO JSON or params.yaml")
    if not found.items and not found.issues:
        raise UserError(f"{target}: no images in it; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return found


def _folder(folder: Path, threshold: bool) -> ImageSet:
    found = ImageSet(str(folder))
    base = folder / "images" if (folder / "images").is_dir() else folder
    masks = folder / "masks"
    places = [path for path in base.iterdir() if path.is_dir() and path.name != "masks" and path.name[0] != "."]
    places.sort(key=lambda path: (ORDER.index(path.name) if path.name in ORDER else len(ORDER), path.name))
    for place in [base, *places]:
        split = place.name if place != base else ""
        found.items += _split(found, place, masks / split, split, threshold)
    return found


def _split(found: ImageSet, place: Path, masks: Path, split: str, threshold: bool) -> list[Item]:
    images = _images(found, place)
    drawn: dict[str, Path] = {}
    if images and masks.is_dir():
        drawn, strays, twins = match_masks(images, _images(found, masks))
        for line in twins:
            found.note(ERROR, "name", line)
        for path in strays:
            found.note(WARNING, "mask", f"{path}: no image of this name in {place}; it would not be read")
        if 0 < len(drawn) < len(images):
            found.note(WARNING, "mask", f"{masks}: {len(images) - len(drawn)} of {len(images)} images have no mask")
    return [
        Item(path.stem, split, path, (drawn[stem],) if stem in drawn else (), threshold)
        for stem, path in images.items()
    ]


def _images(found: ImageSet, folder: Path) -> dict[str, Path]:
    """Return stem in lower case -> image file."""
    stems, twins, others = scan_images(folder) if folder.is_dir() else ({}, [], 0)
    for line in twins:
        found.note(ERROR, "name", line)
    if others and stems:
        found.note(NOTE, "name", f"{folder}: {others} files are not images and are left out")
    return stems


def _coco(found: ImageSet, file: Path, images: Path, split: str, categories: Sequence[str]) -> None:
    try:
        source = load_instances(file, categories)
    except UserError as error:
        found.note(ERROR, "annotations", str(error))
        return
    objects, crowds = source.objects()
    for key, image in source.images.items():
        try:
            path = images / checked_name(image.get("file_name"), f"{file}: image {key}")
        except UserError as error:
            found.note(ERROR, "annotations", str(error))
            continue
        found.items.append(
            Item(
                path.stem,
                split,
                path,
                objects=tuple(objects.get(key, ())),
                place=str(file),
                stated_size=(image.get("width"), image.get("height")),
            )
        )
    if crowds:
        found.note(NOTE, "annotations", f"{file}: {crowds} crowd annotations (iscrowd) are left out")
    if empty := len(source.images) - len(objects):
        found.note(NOTE, "annotations", f"{file}: {empty} of {len(source.images)} images have no object")


def _parameters(path: Path) -> ImageSet:
    config = load_config(path, check_files=False)
    root, data = path.parent, config.data
    if isinstance(data, FolderData | CocoData):
        folder = root / config.inputs.folder
        found = ImageSet(f"{config.inputs.folder} ({data.source}, {path.name})")
        splits = {"train": "train", data.test_split: "test"} | ({} if data.dev_fraction else {"val": "dev"})
        for name, split in splits.items():
            if isinstance(data, CocoData):
                file, images = (folder / pattern.replace(SPLIT, name) for pattern in (data.annotations, data.images))
                _coco(found, file, images, split, data.categories)
            elif (place := folder / "images" / name).is_dir():
                found.items += _split(found, place, folder / "masks" / name, split, data.threshold_masks)
            else:
                found.note(ERROR, "name", f"{place}: no such folder; expected images in it")
        chosen = dev_ids((item.image_id for item in found.items if item.split == "train"), data.dev_fraction)
        found.items = [
            replace(item, split="dev") if item.split == "train" and item.image_id in chosen else item
            for item in found.items
        ]
    else:
        found = _index(root, config)
    if isinstance(config.boxes, CsvBoxes):
        found.boxes = root / config.inputs.boxes
    return found


def _index(root: Path, config: Config) -> ImageSet:
    """List a generated or downloaded set from its index, with its boxes, if any."""
    found = ImageSet(f"{config.data.source} ({INDEX})", boxes=root / BOXES if (root / BOXES).is_file() else None)
    for image_id, row in read_index(root / INDEX).items():
        own = row.get("lesions") or ({"0": row["mask_path"]} if row["mask_path"] else {})
        found.items.append(
            Item(image_id, row["split"], root / row["image_path"], tuple(root / name for name in own.values()))
        )
    if config.data.source.startswith("isic"):
        found.note(
            NOTE,
            "id",
            f"{config.data.source}: the editions share images (824 of the 900 training images of "
            "2016 come again in later ones); train and report on this one alone, or compare with --against",
        )
    return found
