"""Reading images and masks so that a bad file ends in one clear line.

They come back in the original frame: EXIF orientation applied, rows from the top, columns from the left.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lesionsam.errors import UserError
from lesionsam.utils import dicom
from lesionsam.utils.mask_levels import cut_colours, cut_levels

MAX_PIXELS = 200_000_000  # a decoded image of this size takes 600 MB
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")  # of Pillow
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I")
LOSSY = ("JPEG", "MPO")
STRIP_PIXELS = 1 << 22  # converted at once
FORMATS = ("JPEG", "PNG", "BMP", "TIFF")  # by Pillow; DICOM by `utils.dicom`
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", *dicom.SUFFIXES)  # in any case
SIDEWAYS = 5  # EXIF orientations from here on exchange width and height
# Pillow only warns at its own limit and decodes all the same; `_open` refuses by MAX_PIXELS before anything is decoded.
Image.MAX_IMAGE_PIXELS = None


def read_image(path: Path | str) -> np.ndarray:
    """Decode an image of any usual kind.

    Grey becomes three equal channels; palettes and CMYK are converted; 16 bits are scaled to 8 (not clipped), floats of
    0..1 likewise; alpha is composited over black, which is what surrounds a dermoscope's field anyway. The first frame
    of a file with several is read. What the file is called does not matter, what it holds does. DICOM needs the extra
    `dicom`.

    Returns:
        (H, W, 3) uint8 RGB, EXIF orientation applied.
    Raises:
        UserError: missing, empty, not an image, truncated, damaged, or more than `MAX_PIXELS`.
    """
    path = Path(path)
    with _open(path) as image:
        _load(image, path)
        _turn_upright(image)
        return _to_rgb(image, path)


def image_size(path: Path | str) -> tuple[int, int]:
    """Return (width, height) after EXIF transpose, from the file's header alone: a damaged body is not noticed."""
    path = Path(path)
    if dicom.is_dicom(path):
        return dicom.image_size(path)
    with _open(path) as image:
        width, height = image.size  # of a TIFF, Pillow gives the turned size before it has turned it
        return (height, width) if image.format != "TIFF" and _orientation(image) >= SIDEWAYS else (width, height)


def check_image(path: Path | str) -> tuple[int, int]:
    """Decode an image to its end and return its (width, height) after EXIF transpose.

    JPEGs are decoded at an eighth of their size, which reads every byte at a quarter of the time or less.
    """
    path = Path(path)
    with _open(path) as image:
        width, height = image.size
        image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
        _load(image, path)
        if image.format not in LOSSY:
            width, height = image.size  # Pillow turns a TIFF while loading it, and draft made a JPEG smaller
        return (height, width) if _orientation(image) >= SIDEWAYS else (width, height)


def size_mismatch(path: Path, stated: object, place: str) -> str:
    """Describe that annotations state another size than an image has, and what to do about it.

    Args:
        path: of the image, readable. stated: (width, height) as `place`, the annotations, gives them.
    """
    width, height = image_size(path)
    with _open(path) as image:
        is_turned = _orientation(image) >= SIDEWAYS
    stated_width, stated_height = tuple(stated) if isinstance(stated, tuple | list) else ("?", "?")
    text = f"{place} says {stated_width}x{stated_height} px, the file has {width}x{height} px"
    if (stated_width, stated_height) != (height, width):
        return f"{text}; annotate the images as they are"
    if is_turned:
        return (
            f"{text} as viewers show it: its EXIF orientation turns it. Boxes are pixels of the upright image: "
            f"exchange width and height in {place} if they were drawn on it, else draw them again"
        )
    return f"{text}: width and height are exchanged; correct them in {place}"


def read_reduced(path: Path | str, longest: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode a small copy of an image, for display and not for measuring.

    JPEGs are decoded at a half, a quarter or an eighth where that suffices.

    Args:
        longest: longer side of the copy, pixels; an image that is smaller keeps its size.
    Returns:
        (h, w, 3) uint8 RGB, EXIF orientation applied, and (width, height) of the whole image after EXIF transpose.
    Raises:
        UserError: as `read_image`.
    """
    path = Path(path)
    with _open(path) as image:
        whole = image.size
        image.draft("RGB", (longest, longest))
        _load(image, path)
        if image.format not in LOSSY:
            whole = image.size  # as in `check_image`
        whole = (whole[1], whole[0]) if _orientation(image) >= SIDEWAYS else whole
        _turn_upright(image)
        scale = min(1.0, longest / max(whole))
        size = max(1, round(whole[0] * scale)), max(1, round(whole[1] * scale))
        small = image
        if image.size != size:
            plain = image.mode in ("RGB", "L") and "transparency" not in image.info
            small = image if plain else Image.fromarray(_to_rgb(image, path))
            small = small.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        return _to_rgb(small, path), whole


def read_mask(path: Path | str, size: tuple[int, int] | None = None, *, threshold: bool = False) -> np.ndarray:
    """Decode a lesion mask.

    Accepted are two levels, 0 for background and 1, 255 or 65535 for lesion; two colours of which one is black; or two
    palette entries: black is background, else the palette's first entry.

    Args:
        size: (width, height) that the mask must have, or None.
        threshold: also accept soft edges; a pixel is lesion where its brightest channel exceeds half of the range.
    Returns:
        (H, W) bool, True on the lesion. It may be empty: the caller knows whether that is an error.
    Raises:
        UserError: not a readable image, another size, several pages, several labels, more than two levels without
            `threshold`, or a shape that only the transparency holds.
    """
    path = Path(path)
    with _open(path) as image:
        form = image.format
        if (pages := dicom.num_frames(path) if form is None else _num_pages(image)) > 1:
            raise UserError(f"{path}: mask has {pages} pages; expected one; join the lesions in one page of 0 and 255")
        _load(image, path)
        _turn_upright(image)
        width, height = image.size
        if size is not None and (width, height) != tuple(size):
            raise UserError(
                f"{path}: mask is {width}x{height} px; expected {size[0]}x{size[1]} as its "
                "image; export the mask at the image's own size"
            )
        has_alpha = image.mode in ALPHA_MODES or "transparency" in image.info
        if image.mode == "P" and not has_alpha and (mask := _two_entries(image)) is not None:
            return mask
        if image.mode in DEEP_MODES:
            return cut_levels(_deep_levels(image, path), path, threshold=threshold, lossy=False)
        if image.mode in ("L", "1") and not has_alpha:
            levels = np.asarray(image)
            return (
                levels if levels.dtype == bool else cut_levels(levels, path, threshold=threshold, lossy=form in LOSSY)
            )
        pixels = _to_rgb(image, path)
        if has_alpha and not pixels.any() and np.ptp(image.convert("RGBA").getchannel("A").getextrema()):
            raise UserError(
                f"{path}: mask is black wherever it is not transparent, so no lesion can be told from it; save it "
                "without transparency, lesion white on black"
            )
    if (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all():
        return cut_levels(pixels[..., 0], path, threshold=threshold, lossy=form in LOSSY)
    return cut_colours(pixels, path, threshold=threshold)


def _two_entries(image: Image.Image) -> np.ndarray | None:
    """Return the (H, W) bool mask of a palette image that uses two entries, None where that does not settle it."""
    used = np.flatnonzero(image.histogram()).tolist()  # Python integers: 3 * entry would overflow uint8
    palette = image.getpalette() or []
    black = [entry for entry in used if not any(palette[3 * entry : 3 * entry + 3])]
    if len(used) != 2 or (len(black) != 1 and used[0] != 0):
        return None
    return np.asarray(image) != (black[0] if len(black) == 1 else 0)


def _num_pages(image: Image.Image) -> int:
    """Return the number of pages of a TIFF, reduced copies of a page left out; 1 for any other file."""
    if image.format != "TIFF":
        return 1
    try:
        with _quiet():
            pages = 0
            for number in range(image.n_frames):  # type: ignore[attr-defined]
                image.seek(number)
                pages += not image.tag_v2.get(254, 0) & 1  # type: ignore[attr-defined]
            image.seek(0)
    except (OSError, ValueError, SyntaxError, struct.error, EOFError, TypeError, KeyError):
        return 1  # damaged: reading the first page says so
    return max(1, pages)


def num_pages(path: Path | str) -> int:
    """Return the number of pages of an image file, of which `read_image` reads the first.

    Raises:
        UserError: as `read_image`, from the header alone.
    """
    path = Path(path)
    if dicom.is_dicom(path):
        return dicom.num_frames(path)
    with _open(path) as image:
        return _num_pages(image)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings about damaged metadata, which name no file; faults that matter are raised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _open(path: Path) -> Image.Image:
    """Open an image without decoding it; of a DICOM file return the decoded first frame, without a format."""
    if dicom.is_dicom(path):
        _check_pixels(path, *dicom.image_size(path))
        return Image.fromarray(dicom.read_frame(path))
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: file is empty; expected an image ({', '.join(FORMATS)}, DICOM)")
        with _quiet():
            image = Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected an image") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; expected an image file") from None
    except UnidentifiedImageError:
        raise UserError(
            f"{path}: not an image; expected {', '.join(FORMATS)}, DICOM, got {_describe_content(path)}"
        ) from None
    except (OSError, ValueError, SyntaxError, struct.error, EOFError, OverflowError) as error:
        raise UserError(f"{path}: cannot be read as an image: {error}; copy or export it again") from None
    try:
        _check_pixels(path, *image.size)
    except UserError:
        image.close()
        raise
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        if max(tags.get(258, (1,))) > 8 and (tags.get(284, 1) == 2 or tags.get(262) == 0):
            image.close()
            raise UserError(
                f"{path}: TIFF of more than 8 bits in separate planes or with white as 0, which Pillow "
                "misreads; export it with interleaved channels and black as 0, or as PNG"
            )
    return image


def _check_pixels(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{path}: {width}x{height} = {width * height / 1e6:.0f} megapixels; expected at most "
            f"{MAX_PIXELS / 1e6:.0f}; scale the image down first"
        )


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


def _turn_upright(image: Image.Image) -> None:
    # With damaged EXIF it stays as it lies, as viewers show it.
    with suppress(OSError, ValueError, SyntaxError, struct.error, EOFError, TypeError), _quiet():
        ImageOps.exif_transpose(image, in_place=True)


def _to_rgb(image: Image.Image, path: Path) -> np.ndarray:
    """Return (H, W, 3) uint8 of a decoded image, converted strip by strip to save memory."""
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        pixels[top : top + rows] = _strip_to_rgb(image.crop((0, top, width, min(height, top + rows))), path)
    return pixels


def _strip_to_rgb(image: Image.Image, path: Path) -> np.ndarray:
    if image.mode in (*DEEP_MODES, "F"):
        return np.repeat(_deep_grey(image, path)[:, :, None], 3, axis=2)
    if image.mode in ALPHA_MODES or "transparency" in image.info:
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


def _deep_levels(image: Image.Image, path: Path) -> np.ndarray:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{path}: mask values of {values.min()}..{values.max()}; expected 0 and 255 (or 0 and 1)")
    return values.astype(np.uint16, copy=False)


def resize(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W) or (H, W, 3) to (height, width[, 3]), antialiased bilinear; integers are rounded."""
    if grid.dtype == np.uint8:
        return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR))
    large = Image.fromarray(grid.astype(np.float32))
    small = np.asarray(large.resize((width, height), Image.Resampling.BILINEAR))
    return np.round(small).astype(grid.dtype) if np.issubdtype(grid.dtype, np.integer) else small
