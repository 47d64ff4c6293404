"""One image of a set looked at as closely as training will: it is decoded to its end, and so is its mask."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from lesionsam.data.check.duplicates import Fingerprint, fingerprint
from lesionsam.data.check.items import ERROR, WARNING, Issue, Item
from lesionsam.data.sources.folder import MASK_ENDING
from lesionsam.errors import UserError
from lesionsam.utils.files import sha256_file
from lesionsam.utils.images import read_image

MIN_SIDE = 64  # pixels; a smaller picture has little to segment
MIN_PART = 16  # pixels of a piece that counts, boxes.min_area of the default
MOST, LEAST = 0.98, 0.0005  # shares of the image that a lesion seldom exceeds or falls below
MAX_ASPECT = 4.0
NO_PHOTOGRAPHS = ("_superpixels", MASK_ENDING)  # files that ISIC's archives hold beside or instead of the images


@dataclass(frozen=True)
class Look:
    """What was seen of an item.

    Attributes:
        width, height: pixels, 0 where the image cannot be read. sha256: of the file. mark: to compare pictures by.
        shares: part of the image that each lesion covers. pieces: of all lesions together, from `MIN_PART` pixels on.
        cut: a lesion touches the frame. extent: (4,) XYXY around all lesions, or None.
    """

    item: Item
    issues: tuple[Issue, ...] = ()
    width: int = 0
    height: int = 0
    sha256: str = ""
    mark: Fingerprint | None = None
    shares: tuple[float, ...] = ()
    pieces: int = 0
    cut: bool = False
    extent: np.ndarray | None = None

    @property
    def is_read(self) -> bool:
        """Whether the image decodes."""
        return self.width > 0


def inspect(item: Item) -> Look:
    """Decode image and masks; whatever is wrong becomes an issue."""
    issues: list[Issue] = []

    def tell(severity: str, kind: str, text: str) -> None:
        issues.append(Issue(severity, kind, text, item.image_id))

    try:
        image = read_image(item.path)
    except UserError as error:
        return Look(item, (Issue(ERROR, "image", str(error), item.image_id),))
    height, width = image.shape[:2]
    if item.said is not None and item.said != (width, height):
        turned = "; its EXIF turns it: annotate images as a viewer shows them" if item.said == (height, width) else ""
        tell(
            ERROR,
            "size",
            f"{item.path}: {item.place} says {item.said[0]}x{item.said[1]} px, the file has "
            f"{width}x{height} px{turned}",
        )
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        tell(WARNING, "size", f"{item.path}: {width}x{height} px is very small or very thin; is it a lesion's picture?")
    if item.path.stem.lower().endswith(NO_PHOTOGRAPHS):
        tell(
            WARNING,
            "name",
            f"{item.path}: by its name a mask or ISIC's superpixels, no photograph; take it out of the images",
        )
    mark = fingerprint(image)
    if mark.detail is None:
        tell(WARNING, "image", f"{item.path}: one colour all over; is it a lesion's picture?")
    seen = Look(item, (), width, height, sha256_file(item.path), mark)
    return _with_masks(seen, issues)


def _with_masks(seen: Look, issues: list[Issue]) -> Look:
    item, pixels = seen.item, seen.width * seen.height
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
            else (f"{item.place}: annotation {item.objects[number - len(item.masks)]['id']}")
        )
        share = float(np.count_nonzero(mask)) / pixels
        if share == 0:
            issues.append(Issue(ERROR, "mask", f"{name}: mask is empty; draw it or delete it", item.image_id))
            continue
        if share > MOST or share < LEAST:
            issues.append(
                Issue(
                    WARNING,
                    "mask",
                    f"{name}: the lesion covers {share:.2%} of the image ({np.count_nonzero(mask)} px); is that right?",
                    item.image_id,
                )
            )
        shares.append(share)
        whole |= mask
    if not shares:
        return replace(seen, issues=tuple(issues))
    rows, columns = np.flatnonzero(whole.any(1)), np.flatnonzero(whole.any(0))
    extent = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], float)
    labels, _ = ndimage.label(whole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    pieces = int((np.bincount(labels.ravel())[1:] >= MIN_PART).sum())
    cut = bool(extent[0] == 0 or extent[1] == 0 or extent[2] == seen.width or extent[3] == seen.height)
    return replace(seen, issues=tuple(issues), shares=tuple(shares), pieces=pieces, cut=cut, extent=extent)
