"""A set of lesions in the model frame and its batches; no state of its own: order and augmentation are functions of
(seed, epoch), so that a resumed run sees what an undisturbed one would have seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from lesionsam.boxes.geometry import pixels_inside
from lesionsam.data.augment import NO_AUGMENTATION, Augmentation, Distortion, distort, widen
from lesionsam.data.frames import PRIOR_SCALE, UNKNOWN, Frames, load_frames
from lesionsam.types import Batch, Frame, Sample

NUM_ORIENTATIONS = 8  # flips and quarter turns: the symmetries of the square


class Part(NamedTuple):
    """The samples of one batch, and the variant of each (None: all as they are): the arguments of `batch`."""

    index: np.ndarray
    variants: np.ndarray | None
    limits: Distortion | None = None
    seed: tuple[int, ...] = ()


class Batches(Protocol):
    """A source of batches: a `LesionDataset`, or a `loader.Loader` around one."""

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield batches of all samples in order, once, without augmentation."""
        ...

    def epoch(
        self, batch_size: int, *, seed: int, epoch: int, augmentation: Augmentation = NO_AUGMENTATION, start: int = 0
    ) -> Iterator[Batch]:
        """Yield the batches of one epoch from number `start` on, a function of (seed, epoch)."""
        ...

    def batches_per_epoch(self, batch_size: int) -> int:
        """Return the number of batches that cover the set once."""
        ...


class LesionDataset:
    """The samples of one split with their decoded frames.

    Args:
        samples: in a fixed order. frames: the same samples in the model frame.
        with_masks: whether batches carry true masks.
    """

    def __init__(self, samples: Sequence[Sample], frames: Frames, *, with_masks: bool) -> None:
        self.samples, self.frames, self.with_masks = tuple(samples), frames, with_masks
        self.ids = tuple(f"{s.image_id}/{s.lesion_id}" for s in samples)
        self.side = frames.images.shape[1]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def has_masks(self) -> bool:
        """Return whether every sample has a true mask."""
        return all(s.mask_path is not None for s in self.samples)

    def batch(
        self,
        index: Sequence[int] | np.ndarray,
        variants: Sequence[int] | np.ndarray | None = None,
        limits: Distortion | None = None,
        seed: Sequence[int] = (),
    ) -> Batch:
        """Collate samples, each in a variant: 0 (as it is) to 7 are the orientations of `orient`; 8 to 15 the same of
        the widened frame, see `augment.widen`.

        Args:
            limits: of distortions beside that, each a function of (seed, index of the sample); None or all 0: none.
        """
        return expanded(self.packed(index, variants, limits, seed))

    def packed(
        self,
        index: Sequence[int] | np.ndarray,
        variants: Sequence[int] | np.ndarray | None = None,
        limits: Distortion | None = None,
        seed: Sequence[int] = (),
    ) -> Batch:
        """Collate as `batch`, with prior (int8) and masks (uint8) as stored, a quarter of the bytes; see `expanded`."""
        variants = variants if variants is not None else [0] * len(index)
        parts = [
            self._one(int(k), int(v), limits, np.random.default_rng([*seed, int(k)]) if limits else None)
            for k, v in zip(index, variants, strict=True)
        ]
        images, priors, masks, valid, sizes, big, small = (
            torch.from_numpy(np.stack(p)) for p in zip(*parts, strict=True)
        )
        return Batch(
            ids=tuple(self.ids[int(k)] for k in index),
            index=torch.tensor([int(k) for k in index]),
            images=images.permute(0, 3, 1, 2),
            sizes=sizes,
            big_boxes=big,
            small_boxes=small,
            valid=valid,
            prior=priors,
            masks=masks if self.with_masks else None,
            orientations=None if limits else torch.tensor([int(v) for v in variants]),
        )

    def _one(
        self, k: int, variant: int, limits: Distortion | None = None, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, ...]:
        f = self.frames
        widened, orientation = divmod(variant, NUM_ORIENTATIONS)
        height, width = (int(n) for n in f.sizes[k])
        valid = np.zeros((self.side, self.side), bool)
        valid[:height, :width] = True
        for other in f.others[k]:
            valid &= ~(pixels_inside(other, valid.shape) & ~pixels_inside(f.small_boxes[k], valid.shape))
        grids = (f.images[k], f.priors[k], f.masks[k], valid)
        boxes = (f.big_boxes[k], f.small_boxes[k])
        if widened:
            s = self.samples[k]
            grids, (height, width), boxes = widen(
                *grids,
                (height, width),
                boxes,
                prior_scale=PRIOR_SCALE,
                unknown=UNKNOWN,
                squashed_from=(s.height, s.width) if f.squash else None,
            )
        if limits and rng is not None:
            grids, (height, width), boxes = distort(
                grids, (height, width), boxes, limits, rng, prior_scale=PRIOR_SCALE, unknown=UNKNOWN
            )
        if orientation == 0:
            return (*grids, np.array([height, width]), *boxes)
        return (
            *(orient(grid, (height, width), orientation) for grid in grids),
            oriented_size((height, width), orientation),
            *(orient_box(box, (height, width), orientation) for box in boxes),
        )

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield batches of all samples in order, once, without augmentation."""
        for part in self.plan_in_order(batch_size):
            yield self.batch(*part)

    def epoch(
        self, batch_size: int, *, seed: int, epoch: int, augmentation: Augmentation = NO_AUGMENTATION, start: int = 0
    ) -> Iterator[Batch]:
        """Yield the batches of one epoch from number `start` on; the last is filled from the epoch's beginning.

        The order is a permutation, the variants and distortions are draws, all functions of (seed, epoch) alone.
        """
        for part in self.plan(batch_size, seed=seed, epoch=epoch, augmentation=augmentation, start=start):
            yield self.batch(*part)

    def plan_in_order(self, batch_size: int) -> list[Part]:
        """Return the arguments of `batch` for `batches`."""
        starts = range(0, len(self), batch_size)
        return [Part(np.arange(k, min(k + batch_size, len(self))), None) for k in starts]

    def plan(
        self, batch_size: int, *, seed: int, epoch: int, augmentation: Augmentation = NO_AUGMENTATION, start: int = 0
    ) -> list[Part]:
        """Return the arguments of `batch` for `epoch`."""
        rng = np.random.default_rng([seed, epoch])
        order, variants = rng.permutation(len(self)), rng.integers(NUM_ORIENTATIONS, size=len(self))
        if not augmentation.flips:
            variants[:] = 0
        variants += NUM_ORIENTATIONS * (rng.random(len(self)) < augmentation.widen)
        parts = []
        for number in range(start, self.batches_per_epoch(batch_size)):
            index = order[np.arange(number * batch_size, (number + 1) * batch_size) % len(self)]
            parts.append(Part(index, variants[index], augmentation.distortion, (seed, epoch)))
        return parts

    def batches_per_epoch(self, batch_size: int) -> int:
        """Return the number of batches that cover the set once."""
        return -(-len(self) // batch_size)


def expanded(batch: Batch) -> Batch:
    """Convert a batch of `LesionDataset.packed` to the dtypes of `types.Batch`, on its device."""
    masks, prior = batch.masks, batch.prior
    if masks is not None:
        masks = masks.float().masked_fill_(masks == UNKNOWN, float("nan"))
    return replace(batch, masks=masks, prior=None if prior is None else prior.float() / PRIOR_SCALE)


def open_dataset(
    samples: Sequence[Sample],
    frame: Frame,
    cache: Path,
    *,
    with_masks: bool,
    threshold_masks: bool = False,
    num_workers: int = 0,
    title: str = "images",
) -> LesionDataset:
    """Decode (or reopen) the samples in a model frame and wrap them."""
    frames = load_frames(samples, frame, cache, threshold_masks=threshold_masks, num_workers=num_workers, title=title)
    return LesionDataset(samples, frames, with_masks=with_masks)


def oriented_size(size: tuple[int, int], orientation: int) -> np.ndarray:
    """Return the (2,) int64 height and width after `orient`."""
    return np.array(size if orientation < 4 else (size[1], size[0]), np.int64)


def orient(grid: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray:
    """Flip or turn the image part of a padded frame and pad it again.

    Args:
        grid: (S, S) or (S, S, 3); rows and columns beyond size = (height, width) are padding.
        orientation: bit 0 mirrors columns, bit 1 mirrors rows, bit 2 then exchanges rows and columns.
    Returns:
        An array of grid's shape; padding keeps the value it had in the grid's last row and column.
    """
    height, width = size
    if grid.ndim == 3:  # a pixel as one item: moved at once, in half the time
        pixels = np.ascontiguousarray(grid).view(np.dtype((np.void, grid.shape[2] * grid.itemsize)))[..., 0]
        return orient(pixels, size, orientation)[..., None].view(grid.dtype)
    part = grid[:height, :width]
    if orientation & 1:
        part = part[:, ::-1]
    if orientation & 2:
        part = part[::-1]
    if orientation & 4:
        part = part.swapaxes(0, 1)
    if part.shape[:2] == grid.shape[:2]:
        return np.ascontiguousarray(part)
    out = np.empty_like(grid)
    out[:] = grid[-1, -1]
    out[: part.shape[0], : part.shape[1]] = part
    return out


def orient_box(box: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray:
    """Apply `orient` to a box (4,) XYXY of a frame part of (height, width) pixels."""
    height, width = size
    x0, y0, x1, y1 = box
    if orientation & 1:
        x0, x1 = width - x1, width - x0
    if orientation & 2:
        y0, y1 = height - y1, height - y0
    if orientation & 4:
        x0, y0, x1, y1 = y0, x0, y1, x1
    return np.array([x0, y0, x1, y1], np.float32)
