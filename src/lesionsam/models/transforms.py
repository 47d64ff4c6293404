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
from lesionsam.types import Frame

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def resize_to_frame(image: np.ndarray, frame: Frame) -> np.ndarray:
    """Resize an image to the image part of the model frame; equals ResizeLongestSide.apply_image where that is padded.

    Args:
        image: (H, W, 3) uint8 RGB.
    Returns:
        (h, w, 3) uint8 RGB, antialiased bilinear.
    Raises:
        UserError: an image so thin that its shorter side would round to 0 pixels.
    """
    height, width = model_frame_size(image.shape[1], image.shape[0], frame)
    if min(height, width) < 1:
        raise UserError(
            f"an image of {image.shape[1]}x{image.shape[0]} px is too thin for a model input of {frame.side} px; "
            "crop it to the lesion's surroundings"
        )
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def model_frames(images: Sequence[np.ndarray], frame: Frame) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize (and pad) images of any sizes into one batch of the model frame.

    Args:
        images: B of (H, W, 3) uint8 RGB, original frame.
    Returns:
        (B, 3, S, S) uint8, zeros on the padding, and (B, 2) int64 height and width of the image part.
    Raises:
        UserError: as of `resize_to_frame`.
    """
    frames = torch.zeros(len(images), 3, frame.side, frame.side, dtype=torch.uint8)
    sizes = torch.zeros(len(images), 2, dtype=torch.int64)
    for k, image in enumerate(images):
        small = resize_to_frame(image, frame)
        height, width = small.shape[:2]
        frames[k, :, :height, :width] = torch.tensor(small).permute(2, 0, 1)
        sizes[k] = torch.tensor([height, width])
    return frames, sizes


def image_region(sizes: torch.Tensor, side: int) -> torch.Tensor:
    """Return (B, S, S) bool, False on the padding of frames whose image parts have (B, 2) heights and widths."""
    position = torch.arange(side, device=sizes.device)
    return (position < sizes[:, 0:1])[:, :, None] & (position < sizes[:, 1:2])[:, None]


def image_part(low_res: Array, size: tuple[int, int], side: int) -> Array:
    """Return the image part of (..., T, T) masks of the model frame of side S, whose image part has size (h, w)."""
    height, width = (max(1, round(length * low_res.shape[-1] / side)) for length in size)
    return low_res[..., :height, :width]


def upscale(low_res: torch.Tensor, size: tuple[int, int], original: tuple[int, int], frame: Frame) -> torch.Tensor:
    """Upscale ([B, C,] T, T) logits to ([B, C,] H, W) at the original size.

    Equals Sam.postprocess_masks where the frame is padded, Sam2Processor.post_process_masks where it is squashed.

    Args:
        size: (h, w) of the image part of the model frame. original: (H, W).
    """
    masks, side = low_res.float()[(None,) * (4 - low_res.ndim)], frame.side
    if not frame.squash:
        masks = F.interpolate(masks, (side, side), mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
    masks = F.interpolate(masks, original, mode="bilinear", align_corners=False)
    return masks.reshape(*low_res.shape[:-2], *original)
