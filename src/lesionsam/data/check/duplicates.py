"""Find images that show the same picture: by bytes, by decoded pixels, and by appearance.

What they show: a perceptual hash of 64 bits, each saying whether a low frequency of the picture (DCT of 32 x 32 grey
pixels) is above their median (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions"), names
candidates; the correlation of what is left of 64 x 64 grey pixels without their coarse shading confirms them. That step
is needed: dermoscopic images are a dark spot on skin, and different lesions often have nearly the same hash. Flips and
quarter turns are seen through, a picture cropped by more than a few per cent is not.

Measured on 1042 real images without duplicates, in all 8 orientations: no two within 10 bits correlate above 0.78. Of
105 of them every copy as JPEG of quality 40, at half size, at 128 x 96, turned, mirrored, 20 % brighter, with 20 % less
contrast or 30 % less colour was found (at most 6 bits, at least 0.91); of those cropped by 2 % 97, by 5 % 33.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter

MAX_DISTANCE = 10  # bits of 64
MIN_CORRELATION = 0.85
HASH_SIDE, DETAIL_SIDE, SHADING = 32, 64, 4.0  # pixels; the last is the standard deviation of the blur taken away
MIN_CONTRAST = 1.0  # standard deviation of grey below which an image shows nothing to compare
BLOCK = 256  # images compared with all others at once


@dataclass(frozen=True)
class Fingerprint:
    """The features by which an image is compared.

    Attributes:
        pixels: SHA-256 of the size and the decoded RGB pixels. frequencies: (8, 8) float32, of the DCT.
        detail: (64, 64) float16 of unit length, or None where the image is as good as flat.
    """

    pixels: str
    frequencies: np.ndarray
    detail: np.ndarray | None


def fingerprint(image: np.ndarray) -> Fingerprint:
    """Compute the fingerprint of an image (H, W, 3) uint8 RGB."""
    digest = hashlib.sha256(f"{image.shape}".encode())
    digest.update(np.ascontiguousarray(image).data)
    grey = Image.fromarray(image).convert("L")
    small = _shrunk(grey, HASH_SIDE)
    frequencies = dctn(small, norm="ortho")[:8, :8].astype(np.float32)
    detail = None
    if small.std() >= MIN_CONTRAST:
        fine = _shrunk(grey, DETAIL_SIDE)
        fine = fine - gaussian_filter(fine, SHADING)
        fine -= fine.mean()
        length = float(np.linalg.norm(fine))
        detail = (fine / length).astype(np.float16) if length > 0 else None
    return Fingerprint(digest.hexdigest(), frequencies, detail)


def _shrunk(grey: Image.Image, side: int) -> np.ndarray:
    """Resize to (side, side) float32; a large picture is first reduced by whole factors, for speed."""
    return np.asarray(grey.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=3.0), np.float32)


def hashes(frequencies: np.ndarray, orientation: int = 0) -> np.ndarray:
    """Return (N,) uint64 perceptual hashes of (N, 8, 8) frequencies in an orientation as `dataset.orient` counts them.

    A flip changes the sign of the odd frequencies along its axis, exchanging rows and columns transposes them, so that
    turned images need no decoding.
    """
    signs = np.where(np.arange(8) % 2, -1.0, 1.0)
    turned = frequencies * (signs if orientation & 1 else 1) * (signs[:, None] if orientation & 2 else 1)
    if orientation & 4:
        turned = turned.transpose(0, 2, 1)
    flat = turned.reshape(len(turned), 64)
    bits = flat > np.median(flat[:, 1:], axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def oriented(detail: np.ndarray, orientation: int) -> np.ndarray:
    """Orient (..., S, S): bit 0 mirrors columns, bit 1 rows, bit 2 then exchanges rows and columns."""
    if orientation & 1:
        detail = detail[..., :, ::-1]
    if orientation & 2:
        detail = detail[..., ::-1, :]
    return detail.swapaxes(-1, -2) if orientation & 4 else detail


def near_pairs(
    prints: Sequence[Fingerprint], *, min_correlation: float = MIN_CORRELATION
) -> dict[tuple[int, int], float]:
    """Find every pair of images that show the same, up to a flip or a quarter turn; those of equal pixels included.

    All pairs are compared, 8 times: at 10,000 images about 400 million Hamming distances.

    Returns:
        (first, second) position -> correlation in the pair's best orientation, sorted.
    """
    usable = [k for k, each in enumerate(prints) if each.detail is not None]
    if len(usable) < 2:
        return {}
    frequencies = np.stack([prints[k].frequencies for k in usable])
    details = [detail.astype(np.float32) for each in prints if (detail := each.detail) is not None]
    plain = hashes(frequencies)
    best: dict[tuple[int, int], float] = {}
    for orientation in range(8):
        turned = hashes(frequencies, orientation)
        for start in range(0, len(usable), BLOCK):
            distances = np.bitwise_count(turned[start : start + BLOCK, None] ^ plain[None, start:])
            for row, column in np.argwhere(distances <= MAX_DISTANCE):
                i, j = start + int(row), start + int(column)
                if i < j:
                    correlation = float(np.vdot(oriented(details[i], orientation), details[j]))
                    if correlation >= min_correlation:
                        key = usable[i], usable[j]
                        best[key] = max(correlation, best.get(key, correlation))
    return dict(sorted(best.items()))
