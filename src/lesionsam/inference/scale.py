"""Find how large a pixel of an image is, to give areas in mm2."""

from __future__ import annotations

from pathlib import Path

from lesionsam.utils.dicom import pixel_spacing


def pixel_size_mm(path: Path, mm_per_pixel: float | None) -> tuple[float, float] | None:
    """Return the height and width of a pixel of an image file [mm]; None if they are unknown.

    Args:
        mm_per_pixel: given for all images; None: as a DICOM file states it.
    Raises:
        UserError: a DICOM file that cannot be read.
    """
    size = pixel_spacing(path) if mm_per_pixel is None else mm_per_pixel
    return None if size is None else (size, size)
