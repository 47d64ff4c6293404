"""A lesion's files: read, and identified by their contents rather than by path, size or time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lesionsam.errors import UserError
from lesionsam.types import Sample
from lesionsam.utils.files import sha256_file
from lesionsam.utils.images import read_image, read_mask

NUM_THREADS = 4  # that hash files


def load_image(sample: Sample) -> np.ndarray:
    """Return the image, (H, W, 3) uint8 RGB in the original frame.

    Raises:
        UserError: it cannot be read, or it is not the image that the index lists.
    """
    image = read_image(sample.image_path)
    _check_unchanged(sample.image_path, sample.image_sha256)
    return image


def load_mask(sample: Sample, *, threshold: bool = False) -> np.ndarray | None:
    """Return the mask, (H, W) bool in the original frame, or None where there is none.

    Args:
        threshold: see `read_mask`.
    Raises:
        UserError: it cannot be read, or it is not the mask that the index lists.
    """
    if sample.mask_path is None:
        return None
    mask = read_mask(sample.mask_path, (sample.width, sample.height), threshold=threshold)
    _check_unchanged(sample.mask_path, sample.mask_sha256)
    return mask


def image_sha256(sample: Sample) -> str:
    """Return the SHA-256 of the image file: as the index states it, else of the file as it is."""
    return sample.image_sha256 or _hashed(sample, sample.image_path)


def mask_sha256(sample: Sample) -> str:
    """Return the SHA-256 of the mask file, likewise; empty where there is none."""
    return sample.mask_sha256 or (_hashed(sample, sample.mask_path) if sample.mask_path is not None else "")


def boxes_text(sample: Sample) -> str:
    """Return key, size and boxes of a lesion as text."""
    return (
        f"{sample.image_id}|{sample.lesion_id}|{sample.width}x{sample.height}"
        f"|{sample.big_box.tolist()}|{sample.small_box.tolist()}|{sample.own_mask}"
    )


def samples_digest(samples: Sequence[Sample], *parts: Callable[[Sample], str]) -> str:
    """Return the SHA-256, 64 hex digits, of one or several `parts` of the samples, in their order.

    Args:
        parts: of `boxes_text`, `image_sha256`, `mask_sha256`; none: all three.
    """

    def text(sample: Sample) -> str:
        return "|".join(part(sample) for part in parts or (boxes_text, image_sha256, mask_sha256))

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return hashlib.sha256("\n".join(pool.map(text, samples)).encode()).hexdigest()


def _hashed(sample: Sample, path: Path) -> str:
    try:
        return sha256_file(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file, named by the index for image {sample.image_id!r}; "
            "restore it or run `dvc repro` from the download stage on"
        ) from None


def _check_unchanged(path: Path, expected: str) -> None:
    if expected and sha256_file(path) != expected:
        raise UserError(
            f"{path}: not the file that data/raw/index.csv lists; it has changed: run `dvc repro` from the download "
            "stage on"
        )
