"""Targets that need no network, and the placebo controls that every real target must beat."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lesionsam.boxes.prior import ELLIPSE_SHRINK, SHAPE_TIGHTNESS, SHAPE_WEIGHT
from lesionsam.methods.grid import box_pixels
from lesionsam.parallel.collectives import gather_rows, rank


def tightness_logits(big_boxes: torch.Tensor, side: int, tightness: float) -> torch.Tensor:
    """Return what `boxes.outline.Outline.tightness` adds to the prior, (B, 4) XYXY -> (B, side, side) logits."""
    return SHAPE_WEIGHT * SHAPE_TIGHTNESS * (1 - tightness) * elliptical_radii(big_boxes, side)


def ellipse_logits(big_boxes: torch.Tensor, side: int) -> torch.Tensor:
    """Return `boxes.prior.ellipse_prior` batched on the model frame, (B, 4) XYXY -> (B, side, side) logits."""
    return SHAPE_WEIGHT * (1 - elliptical_radii(big_boxes, side) * ELLIPSE_SHRINK)


def elliptical_radii(big_boxes: torch.Tensor, side: int) -> torch.Tensor:
    """Return `boxes.prior.elliptical_radius` batched on the model frame, (B, 4) XYXY -> (B, side, side)."""
    position = torch.arange(side, device=big_boxes.device) + 0.5
    centre, half = (
        (big_boxes[:, :2] + big_boxes[:, 2:]) / 2,
        ((big_boxes[:, 2:] - big_boxes[:, :2]) / 2).clamp(min=1e-6),
    )
    u = (position[None] - centre[:, 0:1]) / half[:, 0:1]
    v = (position[None] - centre[:, 1:2]) / half[:, 1:2]
    return torch.sqrt(u[:, None] ** 2 + v[:, :, None] ** 2)


def placebo_target(logits: torch.Tensor, big_boxes: torch.Tensor, *, warp: bool) -> torch.Tensor:
    """Replace each target by the next image's, so that only geometry can be learnt.

    Args:
        logits: (B, S, S). big_boxes: (B, 4) XYXY. The whole batch, over all processes, has at least 2 images.
        warp: move and scale the other image's target so that its big box falls on this image's.
    Returns:
        (B, S, S).
    Raises:
        ValueError: the batch has one image only.
    """
    count, first = len(logits), rank() * len(logits)
    whole = gather_rows(logits)
    if len(whole) < 2:
        raise ValueError("a placebo needs a batch of at least 2 images")
    other, theirs = (rows.roll(-1, 0)[first : first + count] for rows in (whole, gather_rows(big_boxes)))
    if not warp:
        return other
    side = logits.shape[-1]
    position = torch.arange(side, device=logits.device) + 0.5
    scale = (theirs[:, 2:] - theirs[:, :2]) / (big_boxes[:, 2:] - big_boxes[:, :2]).clamp(min=1e-6)  # (B, 2) x, y
    x = theirs[:, 0:1] + (position[None] - big_boxes[:, 0:1]) * scale[:, 0:1]
    y = theirs[:, 1:2] + (position[None] - big_boxes[:, 1:2]) * scale[:, 1:2]
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1) / side * 2 - 1
    warped = F.grid_sample(other[:, None], grid, mode="bilinear", padding_mode="border", align_corners=False)[:, 0]
    inside = box_pixels(big_boxes, side, side)
    return torch.where(inside, warped, logits.amin(dim=(1, 2), keepdim=True))
