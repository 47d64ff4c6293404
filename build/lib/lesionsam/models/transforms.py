"""Images into SAM's frame, and masks back to the original size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from lesionsam.boxes.geometry import model_frame_size
from lesionsam.errors import UserError
from lesionsam.models.compact import PIXEL_MEAN, PIXEL_STD
from lesionsam.types import to_device


def preprocess(images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """SAM's normalisation and padding.

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
    """(H, W, 3) uint8 -> (h, w, 3) uint8, longest side `side`; equals ResizeLongestSide.apply_image.

    Raises:
        UserError: an image so long and thin that nothing of its shorter side would be left.
    """
    height, width = model_frame_size(image.shape[1], image.shape[0], side)
    if min(height, width) < 1:
        raise UserError(
            f"an image of {image.shape[1]}x{image.shape[0]} px is too thin for a model input of {side} px; "
            "crop it to the lesion's surroundings"
        )
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def model_frames(images: Sequence[np.ndarray], side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of any sizes in the model frame, one batch.

    Args:
        images: B of (H, W, 3) uint8 RGB, original frame. side: S.
    Returns:
        (B, 3, S, S) uint8, padded with 0 right and bottom, and (B, 2) int64 height and width of the image part: what
        `preprocess` takes.
    """
    frames = torch.zeros(len(images), 3, side, side, dtype=torch.uint8)
    sizes = torch.zeros(len(images), 2, dtype=torch.int64)
    for k, image in enumerate(images):
        small = resize_longest(image, side)
        height, width = small.shape[:2]
        frames[k, :, :height, :width] = torch.tensor(small).permute(2, 0, 1)
        sizes[k] = torch.tensor([height, width])
    return frames, sizes


def upscale(low_res: torch.Tensor, size: tuple[int, int], original: tuple[int, int], side: int) -> torch.Tensor:
    """([B, C,] T, T) logits -> ([B, C,] H, W) at the original size; equals Sam.postprocess_masks.

    Args:
        size: (h, w) of the image part of the model frame. original: (H, W). side: S.
    """
    masks = low_res.float()[(None,) * (4 - low_res.ndim)]
    masks = F.interpolate(masks, (side, side), mode="bilinear", align_corners=False)[..., : size[0], : size[1]]
    masks = F.interpolate(masks, original, mode="bilinear", align_corners=False)
    return masks.reshape(*low_res.shape[:-2], *original)
