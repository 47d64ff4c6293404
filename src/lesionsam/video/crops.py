"""Decode a box on an enlarged crop of a frame, and bring masks from one crop to another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lesionsam.boxes.geometry import to_model_frame
from lesionsam.inference.image import EncodedImages
from lesionsam.inference.zoom import BACKGROUND_LOGIT, crop_window
from lesionsam.models.sam import Sam, decode
from lesionsam.models.transforms import upscale
from lesionsam.types import Frame, Prompts


@dataclass(frozen=True)
class CropMask:
    """A mask decoded on a crop of a frame.

    Attributes:
        window: (4,) int64 XYXY of the crop, pixels of the frame. logits: (T, T) float32, model frame, on the CPU.
        input_size: (h, w) of the image part of the model frame. predicted_iou: the model's own.
    """

    window: np.ndarray
    logits: torch.Tensor
    input_size: tuple[int, int]
    predicted_iou: float

    @property
    def size(self) -> tuple[int, int]:
        """Return (height, width) of the crop, pixels of the frame."""
        x0, y0, x1, y1 = self.window.tolist()
        return y1 - y0, x1 - x0

    def mask(self, shape: tuple[int, int], frame: Frame, stretch: float = 1.0) -> np.ndarray:
        """Return the mask of the whole frame, (H, W) bool.

        Args:
            shape: (H, W). stretch: its pixels per pixel of the frame that the crop was taken from.
        """
        whole = np.zeros(shape, bool)
        limits = np.array([shape[1], shape[0]] * 2)
        x0, y0, x1, y1 = np.clip(np.rint(self.window * stretch), 0, limits).astype(int).tolist()
        if x1 > x0 and y1 > y0:
            whole[y0:y1, x0:x1] = upscale(self.logits, self.input_size, (y1 - y0, x1 - x0), frame).numpy() > 0
        return whole

    def moved(self, window: np.ndarray, motion: np.ndarray, frame: Frame) -> torch.Tensor:
        """Return these logits in the crop of another frame, (1, T, T): a mask prompt.

        Args:
            window: of that crop. motion: (3, 3), pixels of this mask's frame -> pixels of that frame.
        """
        side, count = frame.side, self.logits.shape[-1]
        centres = (torch.arange(count, dtype=torch.float64) + 0.5) * side / count
        x, y = torch.meshgrid(centres, centres, indexing="xy")
        there = np.stack([x.numpy().ravel(), y.numpy().ravel(), np.ones(count * count)])
        own = _to_model(self.window, frame) @ np.linalg.inv(motion) @ np.linalg.inv(_to_model(window, frame)) @ there
        grid = torch.from_numpy(own[:2].T.reshape(1, count, count, 2) * 2 / side - 1).float()
        shifted = self.logits[None, None] - BACKGROUND_LOGIT  # so that zeros beyond the crop are background
        return F.grid_sample(shifted, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0] + (
            BACKGROUND_LOGIT
        )


def _to_model(window: np.ndarray, frame: Frame) -> np.ndarray:
    """Return (3, 3), pixels of the frame -> pixels of the model frame that shows the crop."""
    width, height = (window[2:] - window[:2]).tolist()
    x, y = to_model_frame(np.ones(2), width, height, frame)
    return np.array([[x, 0, -x * window[0]], [0, y, -y * window[1]], [0, 0, 1.0]])


@torch.inference_mode()
def decode_crop(
    sam: Sam, image: np.ndarray, box: np.ndarray, previous: tuple[CropMask, np.ndarray] | None = None
) -> CropMask:
    """Decode a box on the crop around it.

    Args:
        image: (H, W, 3) uint8 RGB. box: (4,) XYXY. previous: the mask of another frame, given as mask prompt, and the
            (3, 3) motion from that frame to this one.
    """
    device = next(sam.parameters()).device
    window = crop_window(box, (image.shape[0], image.shape[1]))
    x0, y0, x1, y1 = window.tolist()
    images = EncodedImages.of([np.ascontiguousarray(image[y0:y1, x0:x1])], sam.frame).encoded(sam)
    framed = to_model_frame(box - [x0, y0, x0, y0], x1 - x0, y1 - y0, sam.frame)
    masks = None if previous is None else previous[0].moved(window, previous[1], sam.frame)[None]
    prompts = Prompts(boxes=torch.tensor(framed[None], dtype=torch.float32), masks=masks).to(device)
    logits, predicted = decode(sam, images.known_features, prompts)
    return CropMask(window, logits[0, 0].float().cpu(), images.input_sizes[0], float(predicted[0, 0]))
