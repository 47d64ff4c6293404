"""Reading images and masks so that a bad file ends in one clear line.

They come back in the original frame: EXIF orientation applied, rows from the top, columns from the left.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from lesionsam.errors import UserError

MAX_PIXELS = 200_000_000  # a decoded image of this size takes 600 MB
TURNS = {  # EXIF orientation -> what shows the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FORMATS = ("JPEG", "PNG", "BMP", "TIFF")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")  # in any case
# Pillow only warns at its own limit and decodes all the same; `_open` refuses by MAX_PIXELS before anything is decoded.
Image.MAX_IMAGE_PIXELS = None


def read_image(path: Path | str, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image of any usual kind.

    Grey becomes three equal channels; palettes and CMYK are converted; 16 bits are scaled to 8 (not clipped), floats of
    0..1 likewise; alpha is composited over black, which is what surrounds a dermoscope's field anyway. The first frame
    of a file with several is read. What the file is called does not matter, what it holds does.

    Returns:
        (H, W, 3) uint8 RGB, EXIF orientation applied.
    Raises:
        UserError: missing, empty, not an image, truncated, damaged, or more than `max_pixels`.
    """
    path = Path(path)
    with _open(path, max_pixels) as image:
        _load(image, path)
        return np.ascontiguousarray(_to_rgb(image, path))


def image_size(path: Path | str, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) after EXIF transpose, from the file's header alone: a damaged body is not noticed."""
    path = Path(path)
    with _open(path, max_pixels) as image:
        width, height = image.size  # of a TIFF, Pillow gives the turned size before it has turned it
        return (height, width) if image.format != "TIFF" and _orientation(image) >= 5 else (width, height)


def check_image(path: Path | str, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) after EXIF transpose of an image that decodes to its end.

    JPEGs are decoded at an eighth of their size, which reads every byte at a quarter of the time or less.
    """
    path = Path(path)
    with _open(path, max_pixels) as image:
        width, height = image.size
        image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
        _load(image, path)
        if image.format not in ("JPEG", "MPO"):
            width, height = image.size  # Pillow turns a TIFF while loading it, and draft made a JPEG smaller
        return (height, width) if _orientation(image) >= 5 else (width, height)


def read_reduced(path: Path | str, longest: int, *, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, tuple[int, int]]:
    """A picture to look at, not to measure on: JPEGs are decoded at a half, a quarter or an eighth where that suffices.

    Args:
        longest: longer side of the picture, pixels; never more than its own.
    Returns:
        (h, w, 3) uint8 RGB, EXIF orientation applied, and (width, height) of the whole image after EXIF transpose.
    Raises:
        UserError: as `read_image`.
    """
    path = Path(path)
    with _open(path, max_pixels) as image:
        width, height = image.size
        image.draft("RGB", (longest, longest))
        _load(image, path)
        if image.format not in ("JPEG", "MPO"):
            width, height = image.size  # as in `check_image`
        if _orientation(image) >= 5:
            width, height = height, width
        pixels = _to_rgb(image, path)
    scale = min(1.0, longest / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if pixels.shape[:2] != (size[1], size[0]):
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))
    return np.ascontiguousarray(pixels), (width, height)


def read_mask(
    path: Path | str, size: tuple[int, int] | None = None, *, threshold: bool = False, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode a lesion mask.

    Accepted are two levels, 0 for background and 1, 255 or 65535 for lesion; two colours of which one is black; or two
    entries of a palette: black is background, else the palette's first.

    Args:
        size: (width, height) that the mask must have, or None.
        threshold: also accept other grey levels and colours; lesion is what exceeds half of the range in brightness.
    Returns:
        (H, W) bool, True on the lesion. It may be empty: the caller knows whether that is an error.
    Raises:
        UserError: not a readable image, another size, or more than two levels without `threshold`.
    """
    path = Path(path)
    with _open(path, max_pixels) as image:
        _load(image, path)
        levels = np.asarray(_upright(image)) if image.mode in ("L", "1") else _mask_levels(image, path, threshold)
        form = image.format
    if size is not None and levels.shape != (size[1], size[0]):
        raise UserError(
            f"{path}: mask is {levels.shape[1]}x{levels.shape[0]} px; expected {size[0]}x{size[1]} as its "
            "image; export the mask at the image's own size"
        )
    if levels.dtype == bool:
        return levels
    counts = np.bincount(levels.ravel(), minlength=256)
    found = np.flatnonzero(counts)
    full = 255 if len(counts) <= 256 else 65535
    lesion = found[found > 0]
    if len(lesion) == 0 or (len(lesion) == 1 and lesion[0] in (1, 255, 65535)):
        return levels > 0
    if threshold:
        return levels > full // 2
    why = ", as JPEG changes them" if form in ("JPEG", "MPO") else ""
    raise UserError(
        f"{path}: mask has {len(found)} grey levels ({_listed(found)}){why}; expected 0 and 255 (or 0 and "
        "1); save it as PNG with two levels, or set data.threshold_masks to true with data.source folder"
    )


def _listed(values: Iterable[object], most: int = 8) -> str:
    texts = [str(value) for value in values]
    return ", ".join(texts[:most]) + (", ..." if len(texts) > most else "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings about damaged metadata: they name no file, and what matters is raised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _open(path: Path, max_pixels: int) -> Image.Image:
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: file is empty; expected an image ({', '.join(FORMATS)})")
        with _quiet():
            image = Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected an image") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; expected an image file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image; expected {', '.join(FORMATS)}, got {_describe_content(path)}") from None
    except (OSError, ValueError, SyntaxError, struct.error, EOFError, OverflowError) as error:
        raise UserError(f"{path}: cannot be read as an image: {error}; copy or export it again") from None
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise UserError(
            f"{path}: {width}x{height} = {width * height / 1e6:.0f} megapixels; expected at most "
            f"{max_pixels / 1e6:.0f}; scale the image down first"
        )
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        if max(tags.get(258, (1,))) > 8 and (tags.get(284, 1) == 2 or tags.get(262) == 0):
            image.close()
            raise UserError(
                f"{path}: TIFF of more than 8 bits in separate planes or with white as 0, which Pillow "
                "misreads; export it with interleaved channels and black as 0, or as PNG"
            )
    return image


def _describe_content(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(512)
    if head.lstrip()[:1] == b"<":
        return "an HTML or XML page (did a download return an error page?)"
    if head[:4] == b"PK\x03\x04":
        return "a zip archive"
    if head[:4] == b"%PDF":
        return "a PDF"
    return f"a file that begins with {head[:8].hex(' ')}"


def _load(image: Image.Image, path: Path) -> None:
    try:
        with _quiet():
            image.load()
    except (OSError, ValueError, SyntaxError, struct.error, EOFError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{path}: image is truncated or damaged: {error}; copy or export it again") from None


def _orientation(image: Image.Image) -> int:
    try:
        with _quiet():
            value = image.getexif().get(0x0112, 1)
    except (OSError, ValueError, SyntaxError, struct.error, EOFError, TypeError):
        return 1  # damaged EXIF: show the image as it lies, as viewers do
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(image: Image.Image) -> Image.Image:
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, path: Path) -> np.ndarray:
    image = _upright(image)
    if image.mode in ("I;16", "I;16L", "I;16B", "I", "F"):
        return np.repeat(_deep_grey(image, path)[:, :, None], 3, axis=2)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        black = Image.new("RGBA", layered.size, (0, 0, 0, 255))
        return np.asarray(Image.alpha_composite(black, layered).convert("RGB"))
    if image.mode in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"):
        return np.asarray(image.convert("RGB"))
    raise UserError(f"{path}: pixels of kind {image.mode} are not supported; expected grey, RGB, RGBA, palette or CMYK")


def _deep_grey(image: Image.Image, path: Path) -> np.ndarray:
    values = np.asarray(image)
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise UserError(f"{path}: floating-point pixels outside 0..1; expected values of 0..1, or 8 or 16 bit")
        return (values * 255 + 0.5).astype(np.uint8)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{path}: 32-bit pixels of {values.min()}..{values.max()}; expected at most 16 bits (0..65535)")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 / 257 = 255


def _mask_levels(image: Image.Image, path: Path, threshold: bool) -> np.ndarray:
    image = _upright(image)
    if image.mode in ("I;16", "I;16L", "I;16B", "I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{path}: mask values of {values.min()}..{values.max()}; expected 0 and 255 (or 0 and 1)")
        return values.astype(np.uint16)
    if image.mode == "P" and "transparency" not in image.info:
        entries = np.asarray(image)
        used = np.unique(entries)
        black = [entry for entry in used if not any(image.getpalette()[3 * entry : 3 * entry + 3])]  # type: ignore[index]
        if len(used) == 2 and (len(black) == 1 or used[0] == 0):
            return entries != (black[0] if len(black) == 1 else 0)
    colours = _to_rgb(image, path)
    packed = (colours.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)).ravel()
    if (colours[..., 0] == colours[..., 1]).all() and (colours[..., 0] == colours[..., 2]).all():
        return colours[..., 0]
    found = np.unique(packed)
    if len(found) <= 2 and found[0] == 0:
        return packed.reshape(colours.shape[:2]) > 0
    if threshold:
        return np.asarray(Image.fromarray(colours).convert("L"))
    names = _listed(f"#{value:06x}" for value in found)
    raise UserError(
        f"{path}: mask has {len(found)} colours ({names}); expected black and one other, or grey 0 and "
        "255; save it as PNG with two levels, or set data.threshold_masks to true with data.source folder"
    )
