"""The zoom: what lies around a box, cut out of the model frame and enlarged to fill it, is encoded and decoded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from lesionsam.boxes.geometry import loosen
from lesionsam.models.sam import Sam, decode, encode
from lesionsam.models.transforms import model_frames
from lesionsam.types import Frame, Prompts

BOX_SURROUNDINGS = 1.35  # side of the crop around a given box, in its longer sides; chosen on development images
BACKGROUND_LOGIT = -10.0  # of what the crop does not show, and of an image in which no mask is found


@torch.inference_mode()
def decode_zoomed(
    sam: Sam,
    frames: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    boxes: np.ndarray,
    *,
    looseness: float = 0.0,
    surroundings: float = BOX_SURROUNDINGS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode one box per image on an enlarged crop of its surroundings.

    Lesions that are small in the frame are shown as large as the model knows them, and the rest of the picture is out
    of sight.

    Args:
        frames: (N, 3, S, S) uint8, on any device. sizes: N of (h, w), the image parts.
        boxes: (N, 4) XYXY, model frame.
        looseness: share by which the sides of the prompted boxes are longer than these.
        surroundings: side of the square crop, in multiples of the box's longer side; it ends where the image does.
    Returns:
        (N, T, T) float32 logits of the whole model frame, `BACKGROUND_LOGIT` beside the crop; (N,) predicted IoU.
    """
    device = next(sam.parameters()).device
    crops, windows, prompted = [], [], []
    for frame, size, box in zip(frames, sizes, boxes, strict=True):
        window = crop_window(box, size, surroundings)
        x0, y0, x1, y1 = window.tolist()
        crops.append(np.ascontiguousarray(frame[:, y0:y1, x0:x1].permute(1, 2, 0).cpu().numpy()))
        windows.append(window)
        prompted.append((loosen(box, looseness, size) - [x0, y0, x0, y0]) * np.tile(_zoom(window, sam.frame), 2))
    enlarged, parts = model_frames(crops, sam.frame)
    features = encode(sam, sam.normalize(enlarged.to(device), parts.to(device)))
    prompts = Prompts(boxes=torch.tensor(np.stack(prompted), dtype=torch.float32, device=device))
    logits, predicted = decode(sam, features, prompts)
    whole = [
        _uncrop(one[0], window, size, sam.frame)
        for one, window, size in zip(logits.float(), windows, sizes, strict=True)
    ]
    return torch.stack(whole), predicted[:, 0].float()


def crop_window(box: np.ndarray, size: tuple[int, int], surroundings: float = BOX_SURROUNDINGS) -> np.ndarray:
    """Return the square crop around a (4,) XYXY box, cut at a frame of size (h, w): (4,) int64 XYXY."""
    centre, reach = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]).max() * surroundings / 2
    limits = np.array(size[::-1])  # rounded: a box at the image's edge may lie beyond them
    low = np.clip(np.floor(centre - reach), 0, limits - 1)
    return np.concatenate([low, np.clip(np.ceil(centre + reach), low + 1, limits)]).astype(int)


def _zoom(window: np.ndarray, frame: Frame) -> np.ndarray:
    """Return (2,) pixels of the enlarged frame per pixel of the whole one, along x and y."""
    lengths = window[2:] - window[:2]
    return frame.side / (lengths if frame.squash else np.repeat(lengths.max(), 2))


def _uncrop(logits: torch.Tensor, window: np.ndarray, size: tuple[int, int], frame: Frame) -> torch.Tensor:
    """Resample (T, T) logits of an enlarged crop to the whole model frame, `BACKGROUND_LOGIT` beside the crop.

    Args:
        window: (4,) XYXY of the crop, pixels of the frame. size: (h, w) of the frame's image part; where the window
            ends with it, the padding beyond gets the values at its edge.
    """
    low, high, zoom, side = window[:2], window[2:], _zoom(window, frame), frame.side
    centres = (torch.arange(logits.shape[-1], device=logits.device) + 0.5) * side / logits.shape[-1]
    places, inside = [], []
    for axis in (0, 1):  # x, y
        clamped = centres.clamp(float(low[axis]), float(high[axis]))
        places.append((clamped - float(low[axis])) * float(zoom[axis]) * 2 / side - 1)  # grid_sample's -1 to 1
        before, after = int(low[axis]) > 0, int(high[axis]) < size[1 - axis]  # is there image beyond the crop?
        inside.append(((centres >= low[axis]) | (not before)) & ((centres < high[axis]) | (not after)))
    grid = torch.stack(torch.meshgrid(places[0], places[1], indexing="xy"), -1)
    whole = F.grid_sample(logits[None, None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where(inside[1][:, None] & inside[0], whole[0, 0], BACKGROUND_LOGIT)
