"""Generated pairs of images and masks as the comparison reads them, and a short training's parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lesionsam.config.load import default_values, validate, with_values
from lesionsam.data.index import write_index
from lesionsam.data.sources.folder import index_folder
from lesionsam.data.sources.synthetic import generate

BASE = with_values(
    validate(default_values()),
    {"train.epochs": 1, "train.batch_size": 4, "train.widen": 0.0, "runtime.num_threads": 1, "tracking.enabled": False},
)


def write_pairs(folder: Path, *, train: int, test: int, dev_fraction: float) -> Path:
    """Write images/{train,val}, masks/{train,val} and their index.csv; return the index."""
    for k in range(train + test):
        split = "train" if k < train else "val"
        image, mask = generate(0, k, 96)
        for kind, pixels in (("images", image), ("masks", mask.astype(np.uint8) * 255)):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / split / f"lesion{k}.png")
    write_index(folder / "index.csv", index_folder(folder, dev_fraction=dev_fraction, test_split="val"))
    return folder / "index.csv"
