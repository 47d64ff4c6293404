"""Read pixels and scale of DICOM files: dermoscopy, clinical photographs and other visible light images.

Only the attributes listed in `TAGS` are read. Names, dates and other data of the patient never leave the file, and no
message quotes a value of it. Needs pydicom (extra `dicom`), imported when a DICOM file is met.
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lesionsam.errors import UserError

SUFFIXES = (".dcm", ".dicom")
PREAMBLE, MARK = 128, b"DICM"  # a file begins with 128 free bytes and this mark (DICOM PS3.10, 7.1)
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"  # SOP class
GREY = ("MONOCHROME1", "MONOCHROME2")
PALETTE = "PALETTE COLOR"
OTHERS = ("HSV", "ARGB", "CMYK", "YBR_PARTIAL_420", "YBR_PARTIAL_422", "XYB")  # not read
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
FAULTS = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError),
    *(struct.error, zlib.error),
)


def is_dicom(path: Path) -> bool:
    """Return whether a file has DICOM's mark; False for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(PREAMBLE + len(MARK))[PREAMBLE:] == MARK
    except OSError:
        return False


@dataclass(frozen=True)
class Header:
    """What a DICOM file says about its image.

    Attributes:
        kind: photometric interpretation, empty where it is none of the standard's. bits: stored for each value.
        spacing: of rows and columns, mm. syntax: UID of the transfer syntax.
    """

    width: int
    height: int
    num_frames: int
    kind: str
    bits: int
    is_signed: bool
    spacing: tuple[float, float] | None
    syntax: str


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) of a DICOM image, from its header alone.

    Raises:
        UserError: no image, or a header that cannot be read.
    """
    header = read_header(path)
    return header.width, header.height


def num_frames(path: Path) -> int:
    """Return the number of frames of a DICOM image; UserError as `image_size`."""
    return read_header(path).num_frames


def pixel_spacing(path: Path | str) -> float | None:
    """Return the scale of a DICOM image in mm per pixel; None where the file gives none, or is no DICOM file.

    The square root of row times column spacing, so that its square is the area of a pixel in mm2.

    Raises:
        UserError: as `image_size`.
    """
    path = Path(path)
    spacing = read_header(path).spacing if is_dicom(path) else None
    return None if spacing is None else math.sqrt(spacing[0] * spacing[1])


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
    header = read_header(path)
    if not 0 <= index < header.num_frames:
        raise UserError(f"{path}: frame {index}: expected 0 to {header.num_frames - 1}")
    kind, bits = header.kind, header.bits
    if kind not in (*GREY, PALETTE, *COLOURS) or header.is_signed or not 1 <= bits <= 16:
        raise UserError(
            f"{path}: DICOM pixels of kind {kind or 'unknown'}, {bits} bits{', signed' if header.is_signed else ''}; "
            f"expected {', '.join((*GREY, PALETTE))}, RGB or YBR of up to 16 bits without sign"
        )
    pixels = _decode(path, header, index)
    if pixels.shape != (header.height, header.width) + (() if kind in GREY else (3,)):
        raise UserError(f"{path}: DICOM pixels of another size than its header says; copy or export it again")
    if kind in GREY:
        grey = _to_8_bits(pixels, bits)
        return np.repeat((255 - grey if kind == "MONOCHROME1" else grey)[:, :, None], 3, axis=2)
    return _to_8_bits(pixels, 8 * pixels.itemsize if kind == PALETTE else bits)


def _decode(path: Path, header: Header, index: int) -> np.ndarray:
    """Return the pixels of a frame in colours, or in grey as stored."""
    from pydicom import Dataset, dcmread
    from pydicom.pixels import apply_color_lut, get_decoder, pixel_array
    from pydicom.uid import UID, UID_dictionary

    is_known = header.syntax in UID_dictionary
    syntax = UID(header.syntax if is_known else "1.2")  # pydicom warns of another with its value
    name = syntax.name if is_known else "unknown to DICOM"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise UserError(
            f"{path}: DICOM transfer syntax {name} is not supported; convert it, for example with DCMTK's dcmdjpeg"
        ) from None
    if not decoder.is_available:
        raise UserError(
            f"{path}: compressed as {name}, which needs a decoder that is not installed; install pylibjpeg[all], or "
            "decompress the file (DCMTK's dcmdjpeg)"
        )
    whole = Dataset()
    with clear_errors(path):
        if syntax.is_deflated:  # which pydicom does not read frame by frame
            whole = dcmread(path)
            pixels = pixel_array(whole, index=index)
        else:
            pixels = pixel_array(path, ds_out=whole, index=index)
        if header.kind == PALETTE:
            pixels = apply_color_lut(pixels, whole)
    return pixels


def _to_8_bits(values: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return values.astype(np.uint8, copy=False)
    highest = 2**bits - 1
    scaled = np.minimum(values, highest).astype(np.uint32)
    return ((scaled * 255 + highest // 2) // highest).astype(np.uint8)


def read_header(path: Path) -> Header:
    """Return what a DICOM file says about its image, without reading pixels.

    Raises:
        UserError: pydicom is missing, the header is damaged, or the file holds no image.
    """
    try:
        from pydicom import dcmread
    except ModuleNotFoundError:
        raise UserError(f"{path}: is a DICOM file, and pydicom is not installed; install lesionsam[dicom]") from None
    with clear_errors(path):  # pydicom parses a value when it is asked for
        read = dcmread(path, stop_before_pixels=True, specific_tags=list(TAGS))
        kind = str(read.get("PhotometricInterpretation", ""))
        header = Header(
            int(read.get("Columns") or 0),
            int(read.get("Rows") or 0),
            int(read.get("NumberOfFrames") or 1),
            kind if kind in (*GREY, PALETTE, *COLOURS, *OTHERS) else "",
            int(read.get("BitsStored") or 0),
            bool(read.get("PixelRepresentation")),
            _spacing(read),
            str(read.file_meta.get("TransferSyntaxUID", "")),
        )
        sop_class = read.get("SOPClassUID")
    if sop_class == SEGMENTATION:
        raise UserError(f"{path}: is a DICOM segmentation; expected the image that it belongs to")
    if min(header.width, header.height, header.num_frames) < 1 or not header.syntax:
        raise UserError(f"{path}: DICOM file without an image (no pixel data); expected dermoscopy or a photograph")
    return header


def _spacing(read: Any) -> tuple[float, float] | None:
    """Return row and column spacing of a Dataset, mm; None without any, or with one that is not above 0."""
    spacing = read.get("PixelSpacing")
    for group in read.get("SharedFunctionalGroupsSequence") or ():
        for measures in group.get("PixelMeasuresSequence") or ():
            spacing = spacing or measures.get("PixelSpacing")
    if spacing is None or len(spacing) != 2:
        return None
    row, column = map(float, spacing)
    return (row, column) if 0 < row < math.inf and 0 < column < math.inf else None


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turn pydicom's errors into one line that quotes no value of the file, and silence its warnings, which may."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (*FAULTS, BytesLengthException, InvalidDicomError) as error:
        if "pixel data" in (text := str(error)).lower() and isinstance(error, AttributeError) and " no " in text:
            raise UserError(f"{path}: DICOM file without pixel data; expected dermoscopy or a photograph") from None
        raise UserError(
            f"{path}: DICOM file is truncated or damaged ({type(error).__name__}); copy or export it again"
        ) from None
