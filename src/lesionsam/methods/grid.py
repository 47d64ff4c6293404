"""Masks and boxes on the low-resolution grid, and means over a batch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from lesionsam.parallel.collectives import rank_mean
from lesionsam.types import Batch


def to_grid(values: torch.Tensor, side: int) -> torch.Tensor:
    """Average by area, (B, S, S) -> (B, side, side); cells of SAM 3 are 3.5 pixels wide."""
    whole = values.shape[-1]
    repeats = side // math.gcd(whole, side)  # pixels are repeated until cells are whole numbers of them
    if repeats > 1:
        values = values.repeat_interleave(repeats, 1).repeat_interleave(repeats, 2)
    return F.avg_pool2d(values[:, None].float(), repeats * whole // side)[:, 0]


def box_cells(boxes: torch.Tensor, cells: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which columns and rows of a grid have their centre in a box.

    Args:
        boxes: (B, 4) XYXY, model frame of `side`. cells: columns and rows of the grid.
    Returns:
        columns (B, cells) bool, rows (B, cells) bool.
    """
    centres = (torch.arange(cells, device=boxes.device) + 0.5) * (side / cells)
    return (
        (centres >= boxes[:, 0:1]) & (centres < boxes[:, 2:3]),
        (centres >= boxes[:, 1:2]) & (centres < boxes[:, 3:4]),
    )


def box_pixels(boxes: torch.Tensor, cells: int, side: int) -> torch.Tensor:
    """Return the cells whose centre lies in the box, (B, cells, cells) bool; see `box_cells`."""
    columns, rows = box_cells(boxes, cells, side)
    return rows[:, :, None] & columns[:, None]


def box_grid(boxes: torch.Tensor, cells: int, side: int) -> torch.Tensor:
    """Return the cells whose centre lies in the box, at least that of the box's own centre, (B, cells, cells) bool."""
    inside = box_pixels(boxes, cells, side)
    middle = ((boxes[:, :2] + boxes[:, 2:]) / 2 * (cells / side)).long().clamp(0, cells - 1)
    inside[torch.arange(len(boxes), device=boxes.device), middle[:, 1], middle[:, 0]] = True
    return inside


def known_masks(batch: Batch, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the true masks on the grid, (B, side, side) share of lesion or 0, and which are known, (B,) bool."""
    if batch.masks is None:
        device = batch.images.device
        return (
            torch.zeros(len(batch.ids), side, side, device=device),
            torch.zeros(len(batch.ids), dtype=torch.bool, device=device),
        )
    known = ~batch.masks[:, 0, 0].isnan()
    return to_grid(torch.nan_to_num(batch.masks), side), known


def mean_over(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the mean of values over the chosen ones (bool or weights of the same shape); 0 if there are none.

    Where processes share a batch, the mean of what they return is that over the whole batch.
    """
    weights = chosen.to(values.dtype)
    return (values * weights).sum() / rank_mean(weights.sum()).clamp(min=1e-6)
