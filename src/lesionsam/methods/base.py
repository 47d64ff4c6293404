"""What the ways of training share: weighted terms, drawn prompts of mixed kinds, and the low-resolution grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lesionsam.models.decoder import decode_groups
from lesionsam.models.sam import Sam
from lesionsam.models.teacher import Teacher
from lesionsam.prompts import draw_prompts
from lesionsam.types import Batch, sent


class Term(NamedTuple):
    """One term of the loss: its plain value (scalar tensor) and its weight in the total, which may be learnt too.

    A monitor counts in the printed total only: it has no gradient and is not missed where it should have one.
    """

    value: torch.Tensor
    weight: float | torch.Tensor
    monitor: bool = False


class Method(Protocol):
    """What differs between ways of training, and nothing else. A way inherits what it has no use for.

    Attributes:
        model: everything that trains. Its submodule `sam` is the segmenter.
        kept: the module that is evaluated and saved, `model` or its running average; parameters of the same names.
        teacher: the running average of `model`. reference: the foundation, frozen. head: the projection head.
        smallest_batch: images that it needs together.
    """

    model: nn.Module
    kept: nn.Module
    teacher: Teacher | None = None
    reference: Sam | None = None
    head: nn.Module | None = None
    smallest_batch: int = 1

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Term]:
        """Terms of one batch; those without gradient are monitors. The total is the sum of weight times value."""
        ...

    def after_step(self) -> None:
        """Whatever follows an optimiser step, such as the teacher's average."""
        ...

    def monitors(self) -> dict[str, torch.Tensor]:
        """Scalars of the last batch that are logged but no part of the loss."""
        ...

    def head_spread(self) -> dict[str, float] | None:
        """Spread of the last batch's projected pixels (see `models.projection.spread`), where there is a head."""
        return None


def to_grid(values: torch.Tensor, side: int) -> torch.Tensor:
    """(B, S, S) -> (B, side, side) by area average; side divides S."""
    return F.avg_pool2d(values[:, None].float(), values.shape[-1] // side)[:, 0]


def box_cells(boxes: torch.Tensor, cells: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which columns and rows of a grid have their centre in a box.

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
    """(B, cells, cells) bool: cells whose centre lies in the box; see `box_cells`."""
    columns, rows = box_cells(boxes, cells, side)
    return rows[:, :, None] & columns[:, None]


def box_grid(boxes: torch.Tensor, cells: int, side: int) -> torch.Tensor:
    """(B, cells, cells) bool: cells whose centre lies in the box; at least the one that holds the box's centre."""
    inside = box_pixels(boxes, cells, side)
    middle = ((boxes[:, :2] + boxes[:, 2:]) / 2 * (cells / side)).long().clamp(0, cells - 1)
    inside[torch.arange(len(boxes), device=boxes.device), middle[:, 1], middle[:, 0]] = True
    return inside


def draw_kinds(shares: Mapping[str, float], count: int, generator: torch.Generator) -> list[str]:
    """`count` kinds of prompt in the proportions of `shares`, stratified (a draw per 1/count) and shuffled."""
    names = [name for name, share in shares.items() if share > 0]
    cumulative = np.cumsum([shares[name] for name in names])
    positions = (np.arange(count) + torch.rand(1, generator=generator).item()) / count
    drawn = np.searchsorted(cumulative / cumulative[-1], positions, side="right").clip(max=len(names) - 1)
    return [names[drawn[k]] for k in torch.randperm(count, generator=generator).tolist()]


def draw_groups(
    shares: Mapping[str, float], count: int, repeats: int, generator: torch.Generator
) -> list[tuple[str, torch.Tensor]]:
    """Kinds of prompt for `repeats` prompts of each of `count` images: (kind, (G,) int64 images), a group per kind."""
    rows = torch.arange(count * repeats) % count
    kinds = draw_kinds(shares, len(rows), generator)
    return [(kind, rows[[k for k, drawn in enumerate(kinds) if drawn == kind]]) for kind in sorted(set(kinds))]


def decode_mixture(
    sam: Sam,
    features: torch.Tensor,
    batch: Batch,
    shares: Mapping[str, float],
    *,
    repeats: int,
    num_points: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decode every image of a batch under `repeats` prompts of drawn kinds, all in one pass.

    Args:
        features: (B, C, H', W'). shares: kind of prompt -> share.
    Returns:
        low_res_masks (R, T, T) logits, iou_predictions (R,), rows (R,) int64 into the batch, R = B * repeats.
    """
    groups = []
    for kind, group in draw_groups(shares, len(batch.ids), repeats, generator):
        picked = sent(group, features.device)
        big, small = batch.big_boxes[picked], batch.small_boxes[picked]
        groups.append((picked, draw_prompts(kind, big, small, num_points=num_points, generator=generator)))
    low_res, iou = decode_groups(sam, features, groups, slice(0, 1))
    return low_res[:, 0], iou[:, 0], torch.cat([picked for picked, _ in groups])


def known_masks(batch: Batch, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """True masks on the grid: (B, side, side) share of lesion (0 where unknown) and (B,) bool, whether known."""
    if batch.masks is None:
        device = batch.images.device
        return (
            torch.zeros(len(batch.ids), side, side, device=device),
            torch.zeros(len(batch.ids), dtype=torch.bool, device=device),
        )
    known = ~batch.masks[:, 0, 0].isnan()
    return to_grid(torch.nan_to_num(batch.masks), side), known


def mean_over(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Mean of (B,) values over the chosen ones (bool or weights); 0 where there are none."""
    weights = chosen.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)
