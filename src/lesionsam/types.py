"""Frozen values that pass between packages, with their shapes and coordinate frames.

Frames. *Original*: pixels of the image after EXIF transpose. *Model*: SAM's square input of side S, see `Frame`. Boxes
are XYXY, half-open, floats. Points are XY. Arrays are row, column.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # stages that only read tables and pictures need not wait for it
    import torch

SPLITS = ("train", "dev", "test")
KINDS = ("ring", "centre", "box", "core", "box+core")  # prompts that an annotator's boxes give
NONE = "none"  # no prompt
POINTS = "points"  # points of the user's own


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy CPU values to a device without blocking: a GPU is not synchronised, as `values.to(device)` does."""
    held = values.pin_memory() if device.type == "cuda" else values  # page-locked; torch keeps it until it is copied
    return held.to(device, non_blocking=True)


@dataclass(frozen=True)
class Frame:
    """The model frame: the square of pixels that a SAM takes images in.

    Attributes:
        side: S, pixels.
        squash: the image is stretched to S x S, as SAM 2 and SAM 3 do. Otherwise its longest side becomes S and the
            rest is padded right and bottom, as SAM does.
    """

    side: int
    squash: bool = False


@dataclass(frozen=True)
class Sample:
    """One lesion of one image, in the original frame.

    Attributes:
        image_id, lesion_id: key of the lesion; lesion ids count from 0 within an image unless the user names them.
        split: train, dev or test.
        image_path: image file. mask_path: its mask file, or None without one.
        width, height: size of the image after EXIF transpose, pixels.
        big_box, small_box: (4,) float64 XYXY, original pixels.
        own_mask: whether the mask shows this lesion alone. Where it does not, and the image has several lesions, the
            truth of each is the mask inside its big box.
        image_sha256, mask_sha256: of the files' contents, as the index states them; empty where unknown.
    """

    image_id: str
    lesion_id: str
    split: str
    image_path: Path
    mask_path: Path | None
    width: int
    height: int
    big_box: np.ndarray
    small_box: np.ndarray
    own_mask: bool = False
    image_sha256: str = ""
    mask_sha256: str = ""


@dataclass(frozen=True)
class Prompts:
    """SAM prompts of B images, one prompt set each, in the model frame (pixels of the S x S input).

    Attributes:
        points: (B, N, 2) float32 XY, or None. labels: (B, N) int64, 1 foreground, 0 background, or None.
        boxes: (B, 4) float32 XYXY, or None.
        masks: (B, 1, 4H', 4W') float32 logits, SAM's low-resolution mask prompt, or None.
    """

    points: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    masks: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Prompts:
        """Return the prompts on another device."""
        moved = {f.name: value.to(device) for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(self, **moved)

    def __getitem__(self, index: slice | torch.Tensor) -> Prompts:
        """Return the prompts of some of the images."""
        picked = {f.name: value[index] for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(self, **picked)


@dataclass(frozen=True)
class Batch:
    """B lesions in the model frame, as the loop and the methods see them.

    Attributes:
        ids: B keys "image_id/lesion_id", for messages.
        index: (B,) int64, position of each sample in its data set.
        images: (B, 3, S, S) uint8 RGB, padded with 0.
        sizes: (B, 2) int64, height and width of the part that is image, model-frame pixels.
        big_boxes, small_boxes: (B, 4) float32 XYXY, model frame.
        valid: (B, S, S) bool, False on padding and inside other lesions' big boxes, True in the own small box.
        prior: (B, S, S) float32 logits of the box prior (without offset); None in batches put together by hand.
        masks: (B, S, S) float32, 1 lesion, 0 not, NaN everywhere for an image without a mask; None if no
            masks were loaded.
        orientations: (B,) int64 from 0 (as it is) to 7, see `data.dataset.orient`, 8 to 15 the same of the widened
            frame; None if unknown, or if the images are distorted as well.
        prefix: output of the encoder's frozen leading part (`models.prefix.encode_frozen`): tokens
            (B, H', W', width), or features (B, C, H', W') where nothing of the encoder trains; None if not yet made.
        reference: (B, C, H', W') features of the pretrained encoder, None if not yet made.
    """

    ids: tuple[str, ...]
    index: torch.Tensor
    images: torch.Tensor
    sizes: torch.Tensor
    big_boxes: torch.Tensor
    small_boxes: torch.Tensor
    valid: torch.Tensor
    prior: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    orientations: torch.Tensor | None = None
    prefix: torch.Tensor | None = None
    reference: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        import torch

        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)

    def __getitem__(self, rows: slice) -> Batch:
        """Return some of the lesions."""
        import torch

        picked = {
            f.name: value[rows]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor | tuple)
        }
        return replace(self, **picked)
