"""Provide a data set's images and masks (section `data`) for pretraining a compact SAM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lesionsam.boxes.table import read_boxes
from lesionsam.config.load import Config
from lesionsam.config.schema import FolderData
from lesionsam.data.dataset import NUM_ORIENTATIONS, LesionDataset, open_dataset
from lesionsam.data.index import read_index
from lesionsam.errors import UserError
from lesionsam.methods.grid import to_grid
from lesionsam.pretraining.shape_prompts import Targets
from lesionsam.types import Frame

INDEX, BOXES, CACHE = Path("data/raw/index.csv"), Path("data/boxes.csv"), Path(".cache/frames")
NUM_MEASURED = 100  # development images that progress is measured on, at most


class DataPool:
    """Draw training targets of a data set, each in a random orientation; every other one is widened.

    Args:
        data: samples with masks. grid: side T of the low-resolution grid, cells.
    """

    chunks = 0  # nothing is generated

    def __init__(self, data: LesionDataset, grid: int) -> None:
        self.data, self.grid = data, grid

    def refresh(self) -> None:
        """Do nothing: the images are fixed."""

    def draw(self, num: int, generator: torch.Generator) -> Targets:
        """Draw `num` targets with replacement."""
        index = torch.randint(len(self.data), (num,), generator=generator).numpy()
        variants = torch.randint(2 * NUM_ORIENTATIONS, (num,), generator=generator).numpy()
        return targets_of(self.data, index, self.grid, variants)


def targets_of(data: LesionDataset, index: np.ndarray, grid: int, variants: np.ndarray | None = None) -> Targets:
    """Return samples of a data set as targets; `variants` as in `LesionDataset.batch`."""
    batch = data.batch(index, variants)
    if batch.masks is None or batch.prior is None:
        raise ValueError("targets need masks and priors")
    return Targets(
        images=batch.images,
        sizes=batch.sizes,
        masks=batch.masks > 0.5,
        big=batch.big_boxes,
        small=batch.small_boxes,
        priors=to_grid(batch.prior, grid),
    )


def open_pool(config: Config, side: int, grid: int, root: Path) -> tuple[DataPool, Targets]:
    """Open the training images as a pool, and some development images to measure on.

    Args:
        side: S. grid: T. root: folder in which the stages download and boxes have run.
    Raises:
        UserError: they have not, or a split has no image with a mask.
    """
    if not (root / BOXES).exists() or not (root / INDEX).exists():
        raise UserError(f"foundation.images: data needs {BOXES} and {INDEX}, found them not; run `dvc repro boxes`")
    samples = read_boxes(root / BOXES, read_index(root / INDEX), root=root)
    threshold = isinstance(config.data, FolderData) and config.data.threshold_masks
    sets = []
    for split in ("train", "dev"):
        chosen = [s for s in samples if s.split == split and s.mask_path is not None]
        if not chosen:
            raise UserError(
                f"foundation.images: data needs images with masks, and split {split} of {BOXES} has none; "
                "use shapes, or a data set with masks"
            )
        sets.append(
            open_dataset(
                chosen,
                Frame(side),
                root / CACHE,
                with_masks=True,
                threshold_masks=threshold,
                num_workers=config.runtime.num_workers,
                title=f"{split} images",
            )
        )
    train, dev = sets
    measured = np.unique(np.linspace(0, len(dev) - 1, min(len(dev), NUM_MEASURED)).round().astype(int))
    return DataPool(train, grid), targets_of(dev, measured, grid)
