"""Read pixels and scale of DICOM files: dermoscopy, clinical photographs and other visible light images.

Only the attributes listed in `TAGS` are read. Names, dates and other data of the patient never leave the file, and no
message quotes a value of it. Needs pydicom (extra `dicom`), imported when a DICOM file is met.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lesionsam.errors import UserError

SUFFIXES = (".dcm", ".dicom")
PREAMBLE, MARK = 128, b"DICM"  # a file begins with 128 free bytes and this mark (DICOM PS3.10, 7.1)
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"  # SOP class
GREY = ("MONOCHROME1", "MONOCHROME2")
PALETTE = "PALETTE COLOR"
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
TAGS = (
    "SOPClassUID",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "BitsStored",
    "PixelRepresentation",
    "PixelSpacing",
    "SharedFunctionalGroupsSequence",
)
FAULTS = (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, IndexError, struct.error, RuntimeError)


def is_dicom(path: Path) -> bool:
    """Return whether a file has DICOM's mark; False for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(PREAMBLE + len(MARK))[PREAMBLE:] == MARK
    except OSError:
        return False


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) of a DICOM image, from its header alone.

    Raises:
        UserError: no image, or a header that cannot be read.
    """
    header = _read_header(path)
    return int(header.Columns), int(header.Rows)


def num_frames(path: Path) -> int:
    """Return the number of frames of a DICOM image; UserError as `image_size`."""
    return int(_read_header(path).get("NumberOfFrames") or 1)


def pixel_spacing(path: Path) -> float | None:
    """Return the scale of a DICOM image in mm per pixel; None where the file gives none, or is no DICOM file.

    The square root of row times column spacing, so that its square is the area of a pixel in mm2.

    Raises:
        UserError: as `image_size`.
    """
    path = Path(path)
    if not is_dicom(path):
        return None
    header = _read_header(path)
    spacing = header.get("PixelSpacing")
    for group in header.get("SharedFunctionalGroupsSequence") or ():
        for measures in group.get("PixelMeasuresSequence") or ():
            spacing = spacing or measures.get("PixelSpacing")
    try:
        row, column = map(float, spacing or ())
    except (TypeError, ValueError):
        return None
    return math.sqrt(row * column) if 0 < row < math.inf and 0 < column < math.inf else None


def read_frame(path: Path, index: int = 0) -> np.ndarray:
    """Decode a frame of a DICOM image.

    YBR, palettes and grey become RGB; more than 8 stored bits are scaled to 8, as of any other image here.

    Args:
        index: of the frame, from 0.
    Returns:
        (H, W, 3) uint8 RGB.
    Raises:
        UserError: no image, a frame that is not there, pixels of an unknown kind, compressed in a way that is not
            installed, or truncated.
    """
    path = Path(path)
    header = _read_header(path)
    if not 0 <= index < (count := int(header.get("NumberOfFrames") or 1)):
        raise UserError(f"{path}: frame {index}: expected 0 to {count - 1}")
    kind, bits = str(header.get("PhotometricInterpretation", "")), int(header.get("BitsStored") or 0)
    if kind not in (*GREY, PALETTE, *COLOURS) or header.get("PixelRepresentation") or not 1 <= bits <= 16:
        raise UserError(
            f"{path}: DICOM pixels of kind {kind or 'unknown'}, {bits} bits"
            f"{', signed' if header.get('PixelRepresentation') else ''}; expected {', '.join((*GREY, PALETTE))}, "
            "RGB or YBR of up to 16 bits without sign"
        )
    pixels = _decode(path, header, index)
    if kind in GREY:
        grey = _to_8_bits(pixels, bits)
        return np.repeat((255 - grey if kind == "MONOCHROME1" else grey)[:, :, None], 3, axis=2)
    return _to_8_bits(pixels, 8 * pixels.itemsize if kind == PALETTE else bits)


def _decode(path: Path, header: Any, index: int) -> np.ndarray:
    """Return the pixels of a frame in colours, or in grey as stored."""
    from pydicom import Dataset
    from pydicom.pixels import apply_color_lut, get_decoder, pixel_array
    from pydicom.uid import UID

    syntax = UID(header.file_meta.TransferSyntaxUID)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise UserError(
            f"{path}: DICOM transfer syntax {syntax.name} is not supported; convert it, for example with "
            "DCMTK's dcmdjpeg"
        ) from None
    if not decoder.is_available:
        raise UserError(
            f"{path}: compressed as {syntax.name}, which needs a decoder that is not installed; install "
            "pylibjpeg[all], or decompress the file (DCMTK's dcmdjpeg)"
        )
    whole = Dataset()
    with _one_line(path):
        pixels = pixel_array(path, ds_out=whole, index=index)
        if header.PhotometricInterpretation == PALETTE:
            pixels = apply_color_lut(pixels, whole)
    return pixels


def _to_8_bits(values: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return values.astype(np.uint8, copy=False)
    highest = 2**bits - 1
    scaled = np.minimum(values, highest).astype(np.uint32)
    return ((scaled * 255 + highest // 2) // highest).astype(np.uint8)


def _read_header(path: Path) -> Any:
    """Return the attributes of `TAGS` as a pydicom Dataset, with a size and a transfer syntax.

    Raises:
        UserError: pydicom is missing, the header is damaged, or the file holds no image.
    """
    try:
        from pydicom import dcmread
    except ModuleNotFoundError:
        raise UserError(f"{path}: is a DICOM file, and pydicom is not installed; install lesionsam[dicom]") from None
    with _one_line(path):
        header = dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
        kind, size = header.get("SOPClassUID"), [int(header.get(name) or 0) for name in ("Rows", "Columns")]
        syntax = header.file_meta.get("TransferSyntaxUID")
    if kind == SEGMENTATION:
        raise UserError(f"{path}: is a DICOM segmentation; expected the image that it belongs to")
    if min(size) < 1 or not syntax:
        raise UserError(f"{path}: DICOM file without an image (no pixel data); expected dermoscopy or a photograph")
    return header


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turn pydicom's errors into one line that quotes no value of the file, and silence its warnings, which may."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FAULTS as error:
        if "pixel data" in (text := str(error)).lower() and isinstance(error, AttributeError) and " no " in text:
            raise UserError(f"{path}: DICOM file without pixel data; expected dermoscopy or a photograph") from None
        raise UserError(
            f"{path}: DICOM file is truncated or damaged ({type(error).__name__}); copy or export it again"
        ) from None
