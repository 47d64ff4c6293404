"""Decide which grey levels or colours of a decoded mask are lesion, or say why that cannot be decided."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from lesionsam.errors import UserError

BLOCK_PIXELS = 1 << 22  # counted at once
MAX_LABELS = 32  # distinct levels or colours above which a mask is not taken for one of labels
FEW_LEVELS = 8  # up to which a level close to black or white is a label too, and no trace of compression
FLAT = 5  # pixels; a level that fills a square of this side is a label, not an edge
ONE_LABEL = "expected one lesion on a black background; save the labels that are lesion as 255 and everything else as 0"
TWO_LEVELS = (
    "save it as PNG with two levels, or, where only its edges are soft, set data.threshold_masks to true with "
    "data.source folder"
)


def cut_levels(levels: np.ndarray, path: Path, *, threshold: bool, lossy: bool) -> np.ndarray:
    """Return the mask that grey levels show.

    Args:
        levels: (H, W) uint8 or uint16. path: of the file, for messages.
        threshold: accept soft edges, cut at half of the range. lossy: whether the file's compression changes levels.
    Returns:
        (H, W) bool.
    Raises:
        UserError: several labels, no level beyond half of the range or none below, or more than two levels without
            `threshold`.
    """
    counts = np.zeros(256 if levels.dtype == np.uint8 else 65536, np.int64)
    for block in _blocks(levels):  # `bincount` casts to int64: eight bytes a pixel
        counts += np.bincount(block.ravel(), minlength=len(counts))
    found = np.flatnonzero(counts)
    full = len(counts) - 1
    lesion = found[found > 0]
    if len(lesion) == 0 or (len(lesion) == 1 and lesion[0] in (1, 255, 65535)):
        return levels > 0
    what = f"{path}: mask has {len(found)} grey levels ({_listed(found)})"
    if len(found) > 2 and _has_labels(levels, found, full, lossy=lossy):
        raise UserError(f"{what}: several labels; {ONE_LABEL}")
    if not found[0] <= full // 2 < found[-1]:
        raise UserError(f"{what}, all on one side of {full // 2}; {ONE_LABEL}")
    if threshold:
        return levels > full // 2
    why = ", as JPEG changes them" if lossy else ""
    raise UserError(f"{what}{why}; expected 0 and 255 (or 0 and 1); {TWO_LEVELS}")


def _has_labels(levels: np.ndarray, found: np.ndarray, full: int, *, lossy: bool) -> bool:
    """Return whether levels between the darkest and the brightest cover areas, as labels do, and not edges alone.

    Args:
        found: the distinct levels, ascending; more than two.
    """
    if len(found) > MAX_LABELS:
        return False
    if found[-1] < full * 7 // 8:
        return True  # an edge between background and lesion would end near `full`
    low, high = int(found[0]), int(found[-1])
    if lossy or len(found) > FEW_LEVELS:
        low, high = max(low, full // 8), min(high, full * 7 // 8)
    return _covers_area(np.where((levels > low) & (levels < high), levels, low), ignore=low)


def cut_colours(pixels: np.ndarray, path: Path, *, threshold: bool) -> np.ndarray:
    """Return the mask that colours show: black and one other, or, with `threshold`, one colour with soft edges.

    Args:
        pixels: (H, W, 3) uint8. path: of the file, for messages.
        threshold: a pixel is lesion where its brightest channel exceeds half of the range.
    Returns:
        (H, W) bool.
    Raises:
        UserError: several labels, a background that is not black, no pixel beyond half of the range, or soft edges
            without `threshold`.
    """
    brightest = pixels.max(2)
    listed = Image.fromarray(pixels).getcolors(MAX_LABELS)
    if listed is None:
        colours, count = _hex(pixels[0, :64]), f"more than {MAX_LABELS}"
        names = ", ".join([*colours[:8], "..."])
    else:
        colours = _hex(colour for _, colour in listed if isinstance(colour, tuple))
        if len(colours) == 2 and colours[0] == "#000000":
            return brightest > 0
        count, names = str(len(colours)), _listed(colours)
    what = f"{path}: mask has {count} colours ({names})"
    if listed is not None:
        bright = [colour for _, colour in listed if max(colour) > 255 // 8]  # type: ignore[arg-type]
        if sum(_covers_area((pixels == colour).all(2), ignore=False) for colour in bright) > 1:
            raise UserError(f"{what}: several labels, or a background that is not black; {ONE_LABEL}")
    if not brightest.min() <= 127 < brightest.max():
        raise UserError(f"{what}, all on one side of 127; {ONE_LABEL}")
    if threshold:
        return brightest > 127
    raise UserError(f"{what}; expected black and one other, or grey 0 and 255; {TWO_LEVELS}")


def _hex(colours: Iterable[Iterable[int]]) -> list[str]:
    return sorted({"#" + "".join(f"{int(value):02x}" for value in colour) for colour in colours})


def _covers_area(values: np.ndarray, *, ignore: int | bool) -> bool:
    """Return whether any value other than `ignore` fills a square of `FLAT` pixels; values: (H, W)."""
    corner = values[: len(values) - FLAT + 1, : values.shape[1] - FLAT + 1]
    if not corner.size:
        return False
    is_flat = corner != ignore
    for row in range(FLAT):
        for column in range(FLAT):
            is_flat &= values[row : row + corner.shape[0], column : column + corner.shape[1]] == corner
    return bool(is_flat.any())


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows of an array in blocks of about `BLOCK_PIXELS` pixels; views."""
    rows = max(1, BLOCK_PIXELS // max(1, values.shape[1]))
    for top in range(0, len(values), rows):
        yield values[top : top + rows]


def _listed(values: Iterable[object]) -> str:
    texts = [str(value) for value in values]
    return ", ".join(texts[:8]) + (", ..." if len(texts) > 8 else "")
