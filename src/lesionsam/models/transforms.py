"""Images into the model frame, and masks back to their original size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from lesionsam.boxes.geometry import model_frame_size
from lesionsam.errors import UserError
from lesionsam.models.compact import PIXEL_MEAN, PIXEL_STD
from lesionsam.types import to_device

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def preprocess(images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Normalise images and zero their padding, as SAM does.

    Args:
        images: (B, 3, S, S) uint8 RGB. sizes: (B, 2) height and width of the image part.
    Returns:
        (B, 3, S, S) float32: (x - mean) / std inside the image part, 0 on the padding.
    """
    mean, std = (to_device(torch.tensor(v), images.device).view(1, 3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    position = torch.arange(images.shape[-1], device=images.device)
    inside = (position < sizes[:, 0:1])[:, :, None] & (position < sizes[:, 1:2])[:, None]
    return (images.float() - mean) / std * inside[:, None]


def resize_longest(image: np.ndarray, side: int) -> np.ndarray:
    """Resize an image so that its longest side is `side` pixels; equals ResizeLongestSide.apply_image.

    Args:
        image: (H, W, 3) uint8 RGB.
    Returns:
        (h, w, 3) uint8 RGB, antialiased bilinear.
    Raises:
        UserError: an image so thin that its shorter side would round to 0 pixels.
    """
    height, width = model_frame_size(image.shape[1], image.shape[0], side)
    if min(height, width) < 1:
        raise UserError(
            f"an image of {image.shape[1]}x{image.shape[0]} px is too thin for a model input of {side} px; "
            "crop it to the lesion's surroundings"
        )
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def model_frames(images: Sequence[np.ndarray], side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize and pad images of any sizes into one batch of the model frame.

    Args:
        images: B of (H, W, 3) uint8 RGB, original frame. side: S.
    Returns:
        (B, 3, S, S) uint8, padded with 0 right and bottom, and (B, 2) int64 height and width of the image part, as
        `preprocess` takes them.
    Raises:
        UserError: as of `resize_longest`.
    """
    frames = torch.zeros(len(images), 3, side, side, dtype=torch.uint8)
    sizes = torch.zeros(len(images), 2, dtype=torch.int64)
    for k, image in enumerate(images):
        small = resize_longest(image, side)
        height, width = small.shape[:2]
        frames[k, :, :height, :width] = torch.tensor(small).permute(2, 0, 1)
        sizes[k] = torch.tensor([height, width])
    return frames, sizes


def image_part(low_res: Array, size: tuple[int, int], side: int) -> Array:
    """Return the image part of (..., T, T) masks of the model frame of side S, whose image part has size (h, w)."""
    height, width = (max(1, round(length * low_res.shape[-1] / side)) for length in size)
    return low_res[..., :height, :width]


def upscale(low_res: torch.Tensor, size: tuple[int, int], original: tuple[int, int], side: int) -> torch.Tensor:
    """Upscale ([B, C,] T, T) logits to ([B, C,] H, W) at the original size; equals Sam.postprocess_masks.

    Args:
        size: (h, w) of the image part of the model frame. original: (H, W). side: S.
    """
    masks = low_res.float()[(None,) * (4 - low_res.ndim)]
    masks = F.interpolate(masks, (side, side), mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
    masks = F.interpolate(masks, original, mode="bilinear", align_corners=False)
    return masks.reshape(*low_res.shape[:-2], *original)
