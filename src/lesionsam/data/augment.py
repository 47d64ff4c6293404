"""Distortions of training images: scale, which moves image, labels and boxes together, then brightness, contrast, hue
and blur, which change the image alone. The box prior is not computed anew: it is what the undistorted colours said."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
from PIL import Image, ImageFilter

from lesionsam.boxes.geometry import pixels_inside
from lesionsam.boxes.prior import OUTSIDE
from lesionsam.utils.images import resize

GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's mode L


@dataclass(frozen=True)
class Distortion:
    """Upper limits of the distortions; section `train.distort` of params.yaml documents each."""

    scale: float
    brightness: float
    contrast: float
    hue: float
    blur: float

    def __bool__(self) -> bool:
        return any(astuple(self))


@dataclass(frozen=True)
class Augmentation:
    """How training images are augmented.

    Attributes:
        flips: draw one of the 8 flips and quarter turns for each image.
        widen: share of the images that are widened, see `widen`.
        distortion: greatest scale and colour changes; None = none.
    """

    flips: bool = False
    widen: float = 0.0
    distortion: Distortion | None = None


NO_AUGMENTATION = Augmentation()


def distort(
    grids: tuple[np.ndarray, ...],
    size: tuple[int, int],
    boxes: tuple[np.ndarray, np.ndarray],
    limits: Distortion,
    rng: np.random.Generator,
    *,
    prior_scale: float,
    unknown: int,
) -> tuple[tuple[np.ndarray, ...], tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Draw one distortion of a padded frame. Seven numbers are drawn, whatever is switched on.

    Args:
        grids: image (S, S, 3) uint8; prior (S, S) int8, logits times `prior_scale`; mask (S, S) uint8, 1 lesion, 0
            not, `unknown` everywhere where there is none; valid (S, S) bool.
        size: height and width of the image part. boxes: big and small, (4,) XYXY each.
        squashed_from: (H, W) of the original where the frame is squashed; then the result fills the frame too.
    Returns:
        The four grids, the new (height, width) of the image part, and the two boxes, float32.
    """
    scale, x, y, brightness, contrast, hue, blur = rng.random(7).tolist()
    height, width = size
    if limits.scale:
        fills = (0, np.int8(OUTSIDE * prior_scale), unknown if grids[2][0, 0] == unknown else 0, False)
        factor = 1 + limits.scale * (2 * scale - 1)
        grids, (height, width), boxes = _scaled(grids, size, boxes, factor, (x, y), fills)
    part = recoloured(
        grids[0][:height, :width],
        brightness=1 + limits.brightness * (2 * brightness - 1),
        contrast=1 + limits.contrast * (2 * contrast - 1),
        hue=limits.hue * (2 * hue - 1),
        blur=limits.blur * blur,
    )
    frame = np.zeros_like(grids[0])
    frame[:height, :width] = part
    return (frame, *grids[1:]), (height, width), boxes


def recoloured(image: np.ndarray, *, brightness: float, contrast: float, hue: float, blur: float) -> np.ndarray:
    """Change the colours of an image, (H, W, 3) uint8.

    Colours are multiplied by `brightness`, their distance from the mean grey by `contrast`, hues turned by `hue` of the
    circle, then blurred by a Gaussian of standard deviation `blur` pixels. The values 1, 1, 0 and 0 change nothing.
    """
    if brightness != 1 or contrast != 1:
        bright = image.astype(np.float32) * brightness
        grey = float((bright.mean((0, 1)) * GREY).sum())
        image = np.clip(np.round((bright - grey) * contrast + grey), 0, 255).astype(np.uint8)
    if turn := round(hue * 256):
        hsv = np.array(Image.fromarray(image).convert("HSV"))
        hsv[..., 0] += np.uint8(turn % 256)  # wraps around, as hues do
        image = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    if blur > 0:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(blur)))
    return image


def _scaled(
    grids: tuple[np.ndarray, ...],
    size: tuple[int, int],
    boxes: tuple[np.ndarray, np.ndarray],
    factor: float,
    place: tuple[float, float],
    fills: tuple[int | np.int8, ...],
) -> tuple[tuple[np.ndarray, ...], tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Shrink the image part, or enlarge a window of it that holds the big box, to at most its own size."""
    height, width = size
    x0, y0, x1, y1 = (float(v) for v in boxes[0])
    factor = min(factor, max(1.0, min(width / max(x1 - x0, 1.0), height / max(y1 - y0, 1.0))))
    new = (height, width) if factor >= 1 else (max(1, round(height * factor)), max(1, round(width * factor)))
    across, down = min(width, width / factor), min(height, height / factor)  # the window's extent
    left = _between(max(0.0, x1 - across), min(x0, width - across), place[0])
    top = _between(max(0.0, y1 - down), min(y0, height - down), place[1])
    window = (left, top, left + across, top + down)
    found = []
    for grid, fill in zip(grids, fills, strict=True):
        frame = np.full_like(grid, fill)
        frame[: new[0], : new[1]] = _resampled(grid, window, new)
        found.append(frame)
    ratio = np.array([new[1] / across, new[0] / down] * 2, np.float32)
    shift = np.array([left, top] * 2, np.float32)
    return tuple(found), new, ((boxes[0] - shift) * ratio, (boxes[1] - shift) * ratio)


def _between(low: float, high: float, share: float) -> float:
    """Interpolate between two numbers; return the lower one where rounding makes them cross."""
    return low + max(0.0, high - low) * share


def _resampled(grid: np.ndarray, window: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """Resample a window (XYXY, pixels) of a grid, antialiased bilinear; two-valued grids stay two-valued."""
    box, shape = window, (size[1], size[0])
    if grid.dtype == np.uint8 and grid.ndim == 3:
        return np.asarray(Image.fromarray(grid).resize(shape, Image.Resampling.BILINEAR, box))
    values = np.asarray(Image.fromarray(grid.astype(np.float32)).resize(shape, Image.Resampling.BILINEAR, box))
    if grid.dtype == np.int8:
        return np.round(values).astype(np.int8)
    low, high = grid.min(), grid.max()
    return np.where(values > (float(low) + float(high)) / 2, high, low)


EXTENSION = 0.5  # share by which the shorter side grows: a square becomes the 3:2 of most cameras


def widen(
    image: np.ndarray,
    prior: np.ndarray,
    mask: np.ndarray,
    valid: np.ndarray,
    size: tuple[int, int],
    boxes: tuple[np.ndarray, np.ndarray],
    *,
    prior_scale: float,
    unknown: int,
    squashed_from: tuple[int, int] | None = None,
) -> tuple[tuple[np.ndarray, ...], tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Extend the shorter side of the image by mirroring and fit it into the frame again.

    Args:
        image: (S, S, 3) uint8. prior: (S, S) int8, logits times `prior_scale`. mask: (S, S) uint8, 1 lesion, 0 not,
            `unknown` everywhere where there is none. valid: (S, S) bool.
        size: height and width of the image part. boxes: big and small, (4,) XYXY each.
        squashed_from: (H, W) of the original where the frame is squashed; then the result fills the frame too.
    Returns:
        The four grids, the new (height, width) of the image part, and the two boxes, float32.
    """
    height, width = size
    side = image.shape[0]
    pad = round(min(height, width) * EXTENSION / 2)
    original = squashed_from or size
    rows, columns = (pad, 0) if original[0] < original[1] else (0, pad)
    around = ((rows, rows), (columns, columns))
    scale = side / (max(height + 2 * rows, width + 2 * columns))
    new = (max(1, round((height + 2 * rows) * scale)), max(1, round((width + 2 * columns) * scale)))
    if squashed_from is not None:
        new = (side, side)
    shown = np.pad(pixels_inside(boxes[0], (height, width)), around, mode="reflect")
    shown[rows : rows + height, columns : columns + width] = False  # only the lesion's mirror image
    known = np.pad(valid[:height, :width], around, mode="reflect") & ~shown
    lowest = np.int8(OUTSIDE * prior_scale)
    parts = (
        np.pad(image[:height, :width], (*around, (0, 0)), mode="reflect"),
        np.pad(prior[:height, :width], around, constant_values=lowest),
        np.pad(mask[:height, :width], around) * np.uint8(255),
        known.astype(np.uint8) * np.uint8(255),
    )
    small = [resize(part, *new) for part in parts]
    small[2], small[3] = (small[2] > 127).astype(np.uint8), small[3] > 127
    grids = []
    for part, fill in zip(small, (0, lowest, 0, False), strict=True):
        frame = np.full((side, side, *part.shape[2:]), fill, part.dtype)
        frame[: new[0], : new[1]] = part
        grids.append(frame)
    if mask[0, 0] == unknown:
        grids[2][:] = unknown
    shift = np.array([columns, rows, columns, rows], np.float32)
    ratio = np.array([new[1] / (width + 2 * columns), new[0] / (height + 2 * rows)] * 2, np.float32)
    return tuple(grids), new, ((boxes[0] + shift) * ratio, (boxes[1] + shift) * ratio)
