"""Inspect one image of a set as training will read it: image and masks are decoded to their ends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from lesionsam.data.check.duplicates import Fingerprint, fingerprint
from lesionsam.data.check.items import ERROR, WARNING, Issue, Item
from lesionsam.data.sources.folder import MASK_ENDING
from lesionsam.errors import UserError
from lesionsam.metrics import bounding_box
from lesionsam.utils.files import sha256_file
from lesionsam.utils.images import num_pages, read_image, size_mismatch

MIN_SIDE = 64  # pixels; a smaller picture has little to segment
MIN_PART = 16  # pixels of a piece that counts, boxes.min_area of the default
MOST, LEAST = 0.98, 0.0005  # shares of the image that a lesion seldom exceeds or falls below
MOST_INSIDE = 0.5  # share that a lesion which touches all four sides of the image seldom exceeds
MAX_ASPECT = 4.0
NO_PHOTOGRAPHS = ("_superpixels", MASK_ENDING)  # files that ISIC's archives hold beside or instead of the images


@dataclass(frozen=True)
class Inspection:
    """An item's image and masks as decoded, and what is wrong with them.

    Attributes:
        width, height: pixels, 0 where the image cannot be read. sha256: of the file.
        fingerprint: to compare pictures by.
        shares: part of the image that each lesion covers. pieces: of all lesions together, from `MIN_PART` pixels on.
        cut: a lesion touches the frame.
    """

    item: Item
    issues: tuple[Issue, ...] = ()
    width: int = 0
    height: int = 0
    sha256: str = ""
    fingerprint: Fingerprint | None = None
    shares: tuple[float, ...] = ()
    pieces: int = 0
    cut: bool = False

    @property
    def is_read(self) -> bool:
        """Return whether the image decodes."""
        return self.width > 0


def inspect(item: Item) -> Inspection:
    """Decode image and masks to their ends; whatever is wrong becomes an issue."""
    issues: list[Issue] = []

    def add(severity: str, kind: str, text: str) -> None:
        issues.append(Issue(severity, kind, text, item.image_id))

    try:
        image = read_image(item.path)
    except UserError as error:
        return Inspection(item, (Issue(ERROR, "image", str(error), item.image_id),))
    height, width = image.shape[:2]
    if (pages := num_pages(item.path)) > 1:
        add(WARNING, "image", f"{item.path}: {pages} pages, of which the first alone is read; save one image per file")
    if item.stated_size is not None and item.stated_size != (width, height):
        add(ERROR, "size", f"{item.path}: {size_mismatch(item.path, item.stated_size, item.place)}")
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        add(WARNING, "size", f"{item.path}: {width}x{height} px is very small or very thin; is it a lesion's picture?")
    if item.path.stem.lower().endswith(NO_PHOTOGRAPHS):
        add(
            WARNING,
            "name",
            f"{item.path}: by its name a mask or ISIC's superpixels, no photograph; take it out of the images",
        )
    print_ = fingerprint(image)
    if print_.detail is None:
        add(WARNING, "image", f"{item.path}: one colour all over; is it a lesion's picture?")
    return _with_masks(Inspection(item, (), width, height, sha256_file(item.path), print_), issues)


def _with_masks(seen: Inspection, issues: list[Issue]) -> Inspection:
    """Return an inspection with its issues and what its masks show."""
    item = seen.item
    whole = np.zeros((seen.height, seen.width), bool)
    shares = []
    for number in range(len(item.masks) + len(item.objects)):
        try:
            mask = item.lesion_mask(number, seen.width, seen.height)
        except UserError as error:
            issues.append(Issue(ERROR, "mask", str(error), item.image_id))
            continue
        name = (
            item.masks[number]
            if number < len(item.masks)
            else f"{item.place}: annotation {item.objects[number - len(item.masks)]['id']}"
        )
        num_lesion = int(np.count_nonzero(mask))
        share = num_lesion / mask.size
        if share == 0:
            issues.append(Issue(ERROR, "mask", f"{name}: mask is empty; draw it or delete it", item.image_id))
            continue
        sides = [bool(line.any()) for line in (mask[0], mask[-1], mask[:, 0], mask[:, -1])]
        fills = share > MOST_INSIDE and all(sides)
        if fills or share > MOST or share < LEAST:
            text = f"{name}: the lesion covers {share:.2%} of the image ({num_lesion} px)"
            text += " and touches all four sides; is the mask inverted?" if fills else "; is that right?"
            issues.append(Issue(WARNING, "mask", text, item.image_id))
        shares.append(share)
        whole |= mask
    seen, extent = replace(seen, issues=tuple(issues)), bounding_box(whole)
    if extent is None:
        return seen
    x0, y0, x1, y1 = extent.astype(int).tolist()
    cut = x0 == 0 or y0 == 0 or x1 == seen.width or y1 == seen.height
    return replace(seen, shares=tuple(shares), pieces=_num_pieces(whole[y0:y1, x0:x1]), cut=cut)


def _num_pieces(mask: np.ndarray) -> int:
    """Return the number of connected pieces of at least `MIN_PART` pixels in a mask, (H, W) bool."""
    labels, count = ndimage.label(mask)
    sizes = np.zeros(count + 1, np.int64)
    for row in labels:  # `bincount` casts to int64, eight bytes a pixel
        sizes += np.bincount(row, minlength=count + 1)
    return int((sizes[1:] >= MIN_PART).sum())
