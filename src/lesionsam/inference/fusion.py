"""Both boxes together: the model's mask of the enlarged big box, fused with the box prior.

The model knows lesions, the prior knows this image's colours and what the small box says. With z the model's logits and
s the prior's, corrected by the outline, the fused logits are z + w m s, m the mean of |z| inside the big box, so that
one weight serves models whose logits differ in scale. It was chosen on development images, where every weight from
1/6 to 1 gains (docs/log.md).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from lesionsam.boxes.geometry import pixels_inside
from lesionsam.boxes.outline import Outline
from lesionsam.boxes.prior import OUTSIDE
from lesionsam.data.frames import prior_at

FUSION_WEIGHT = 1 / 3


def fuse(
    logits: torch.Tensor,
    frame: torch.Tensor,
    size: tuple[int, int],
    big_box: np.ndarray,
    small_box: np.ndarray,
    others: np.ndarray,
    outline: Outline,
) -> torch.Tensor:
    """Fuse a model's mask with the box prior.

    Args:
        logits: (T, T) float32, model frame. frame: (3, S, S) uint8, the image. size: (h, w) of its image part.
        big_box, small_box: (4,) XYXY; others: (M, 4), big boxes of the image's other lesions; model frame.
        outline: correction of the prior.
    Returns:
        (T, T) float32 logits.
    """
    height, width = size
    side, length = frame.shape[-1], logits.shape[-1]
    image = frame[:, :height, :width].permute(1, 2, 0).cpu().numpy()
    prior = outline.shift(prior_at(image, big_box, small_box, others, size), big_box)
    framed = torch.full((1, 1, side, side), OUTSIDE)
    framed[0, 0, :height, :width] = torch.from_numpy(prior)
    prior_logits = F.interpolate(framed, (length, length), mode="area")[0, 0].to(logits.device)
    inside = torch.from_numpy(pixels_inside(big_box * length / side, (length, length))).to(logits.device)
    scale = logits[inside].abs().mean() if bool(inside.any()) else logits.new_ones(())
    return logits + FUSION_WEIGHT * scale * prior_logits
