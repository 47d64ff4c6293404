"""Index a user's own images: FOLDER/images/{train,val,test}/* and, if any, FOLDER/masks/{train,val,test}/*.

Only an index is written; the files stay where they are. A mask belongs to the image of the same stem, or is called
STEM_segmentation; upper and lower case do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from lesionsam.data.index import Row, check_rows, dev_ids
from lesionsam.data.sources.parallel import run_jobs
from lesionsam.errors import UserError
from lesionsam.utils.files import atomic_write, sha256_file
from lesionsam.utils.images import IMAGE_SUFFIXES, check_image, read_mask
from lesionsam.utils.progress import say

MASK_ENDING = "_segmentation"


def index_folder(
    folder: Path, *, dev_fraction: float, test_split: str, threshold_masks: bool = False, masks_out: Path | None = None
) -> list[Row]:
    """Return the rows of index.csv for a folder; every image and mask is decoded once, to find faults now.

    Args:
        folder: holds images/ and perhaps masks/; paths in the rows begin with it as it is given.
        dev_fraction: share of images/train that becomes dev, by hash of the id; 0: images/val is dev.
        test_split: "val" or "test", the folder that becomes test.
        threshold_masks: grey masks are cut at half of their range, and two-level copies written to `masks_out`.
    Raises:
        UserError: the first faulty file, and how many more there are.
    """
    if dev_fraction == 0 and test_split == "val":
        raise UserError("data.dev_fraction: expected a number above 0 when data.test_split is val, got 0")
    folders = {"train": "train", test_split: "test"} | ({"val": "dev"} if dev_fraction == 0 else {})
    found = {name: _images(folder / "images" / name) for name in folders}
    for name in ("val", "test"):
        if name not in folders and (folder / "images" / name).is_dir():
            say(
                f"note: {folder / 'images' / name} is not used (data.test_split is {test_split}, data.dev_fraction "
                f"{dev_fraction:g})"
            )
    chosen = dev_ids((path.stem for path in found["train"].values()), dev_fraction)
    jobs: list[Callable[[], Row]] = []
    for name, images in found.items():
        masks = _masks(folder / "masks" / name, images)
        for stem, image_path in images.items():
            split = "dev" if name == "train" and image_path.stem in chosen else folders[name]
            copy = masks_out / split / f"{image_path.stem}.png" if threshold_masks and masks_out else None
            jobs.append(partial(_row, image_path, masks.get(stem), split, copy))
    rows = run_jobs(jobs)
    check_rows(rows, str(folder))
    return rows


def scan_images(folder: Path) -> tuple[dict[str, Path], list[str], int]:
    """List the images of a folder; hidden files and folders are left out.

    Returns:
        stem in lower case -> image file; a line of text for each stem that repeats; number of files of other kinds.
    """
    found: dict[str, Path] = {}
    twins, others = [], 0
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            others += 1
        elif (other := found.setdefault(path.stem.lower(), path)) is not path:
            twins.append(f"{path}: same name as {other.name}, apart from case or ending; rename one of them")
    return found, twins, others


def match_masks(images: Mapping[str, Path], masks: Mapping[str, Path]) -> tuple[dict[str, Path], list[Path], list[str]]:
    """Match masks with images, both by stem in lower case.

    Returns:
        stem of the image -> mask file; masks of no image; a line of text for each second mask of an image.
    """
    matched: dict[str, Path] = {}
    strays, twins = [], []
    for stem, path in masks.items():
        name = stem if stem in images else stem.removesuffix(MASK_ENDING)
        if name not in images:
            strays.append(path)
        elif (other := matched.setdefault(name, path)) is not path:
            twins.append(f"{path}: {other.name} is a mask of the same image; keep one of them")
    return matched, strays, twins


def _images(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected images ({', '.join(IMAGE_SUFFIXES)}) in it")
    found, twins, others = scan_images(folder)
    if twins:
        raise UserError(twins[0])
    if not found:
        raise UserError(f"{folder}: no images in it; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    if others:
        say(f"note: {others} files in {folder} are not images and were left out")
    return found


def _masks(folder: Path, images: Mapping[str, Path]) -> dict[str, Path]:
    """Return stem of the image in lower case -> mask file."""
    if not folder.is_dir():
        return {}
    masks, strays, twins = match_masks(images, _images(folder))
    if twins:
        raise UserError(twins[0])
    if not masks:
        raise UserError(
            f"{strays[0]}: no image of this name; expected masks called as their image, or with {MASK_ENDING} added"
        )
    if strays:
        say(f"note: {len(strays)} masks in {folder} belong to no image, the first is {strays[0].name}")
    if len(masks) < len(images):
        say(f"note: {len(images) - len(masks)} of {len(images)} images have no mask in {folder}")
    return masks


def _row(image_path: Path, mask_path: Path | None, split: str, copy: Path | None) -> Row:
    width, height = check_image(image_path)
    if mask_path is not None:
        mask = read_mask(mask_path, (width, height), threshold=copy is not None)
        if not mask.any():
            raise UserError(f"{mask_path}: mask is empty; expected at least one lesion pixel; draw it or delete it")
        if copy is not None:
            with atomic_write(copy) as file:
                Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")
            mask_path = copy
    return {
        "image_id": image_path.stem,
        "split": split,
        "image_path": image_path.as_posix(),
        "mask_path": mask_path.as_posix() if mask_path else "",
        "width": width,
        "height": height,
        "sha256": sha256_file(image_path),
    }
