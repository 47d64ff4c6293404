"""Small archives that have the real names, folders and extras of the ISIC challenges."""

from __future__ import annotations

import io
import zipfile

import numpy as np
from PIL import Image

from lesionsam.data.sources.isic import EDITIONS

FIRST = {"train": 0, "dev": 5_000_000, "test": 9_000_000}  # of the image numbers of each split


def picture(number: int, kind: str) -> bytes:
    """An image with a colour of its own, or the mask of a square, as file bytes; sizes vary with the number."""
    width, height = 40 + number % 5, 30 + number % 3
    if kind == "mask":
        pixels = np.zeros((height, width), np.uint8)
        pixels[8:20, 10:25] = 255
    else:
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG" if kind == "image" else "PNG")
    return file.getvalue()


def archive(folder: str, members: dict[str, bytes], extras: dict[str, bytes] | None = None) -> bytes:
    """A zip as the challenge packs it: everything below one folder, with a folder entry."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(f"{folder}/", b"")
        for name, data in {**members, **(extras or {})}.items():
            packed.writestr(f"{folder}/{name}", data)
        packed.writestr(f"__MACOSX/{folder}/._ISIC_0000000.jpg", b"resource fork")
        packed.writestr(f"__MACOSX/{folder}/ISIC_0000000.jpg", b"resource fork")
    return file.getvalue()


def challenge(source: str, counts: dict[str, int]) -> dict[str, bytes]:
    """Path on the server -> archive, for an edition of a few images."""
    edition, files = EDITIONS[source], {}
    for name, split in edition.splits.items():
        numbers = range(FIRST[name], FIRST[name] + counts[name])
        ending = "_Segmentation.png" if edition.year == 2016 else "_segmentation.png"
        extras = {f"ISIC_{n:07d}_superpixels.png": picture(n, "mask") for n in numbers} if edition.year == 2017 else {}
        extras |= {
            f"{split.images.name.removesuffix('.zip')}_metadata.csv": b"image_id,age\n",
            "LICENSE.txt": b"CC-0",
            "ATTRIBUTION.txt": b"ISIC",
        }
        for part, members in (
            (split.images, {f"ISIC_{n:07d}.jpg": picture(n, "image") for n in numbers} | extras),
            (split.masks, {f"ISIC_{n:07d}{ending}": picture(n, "mask") for n in numbers}),
        ):
            files[f"/{edition.year}/{part.name}"] = archive(part.name.removesuffix(".zip"), members)
    return files
