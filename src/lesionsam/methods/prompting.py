"""Draw prompts of mixed kinds and decode them together."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from lesionsam.models.sam import Sam
from lesionsam.parallel.draws import Draws, generator_of, own_part, whole_batch
from lesionsam.prompts import draw_prompts
from lesionsam.types import Batch, to_device


def draw_kinds(shares: Mapping[str, float], count: int, generator: torch.Generator) -> list[str]:
    """Draw `count` kinds of prompt in the proportions of `shares`, stratified (one per 1/count) and shuffled."""
    names = [name for name, share in shares.items() if share > 0]
    cumulative = np.cumsum([shares[name] for name in names])
    positions = (np.arange(count) + torch.rand(1, generator=generator).item()) / count
    drawn = np.searchsorted(cumulative / cumulative[-1], positions, side="right").clip(max=len(names) - 1)
    return [names[drawn[k]] for k in torch.randperm(count, generator=generator).tolist()]


def draw_groups(
    shares: Mapping[str, float], count: int, repeats: int, generator: Draws
) -> list[tuple[str, torch.Tensor, Draws]]:
    """Draw the kinds of `repeats` prompts for each of `count` images.

    Returns:
        A group (kind, (G,) int64 images, draws of the group) per kind; where processes share a batch, groups may be
        empty, but their draws must be made.
    """
    total = whole_batch(generator, count)
    rows = torch.arange(total * repeats) % total
    kinds = draw_kinds(shares, len(rows), generator_of(generator))
    groups = {kind: rows[[k for k, drawn in enumerate(kinds) if drawn == kind]] for kind in sorted(set(kinds))}
    return [(kind, *own_part(group, generator)) for kind, group in groups.items()]


def decode_mixture(
    sam: Sam,
    features: torch.Tensor,
    batch: Batch,
    shares: Mapping[str, float],
    *,
    repeats: int,
    num_points: int,
    generator: Draws,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decode every image of a batch under `repeats` prompts of drawn kinds, all in one pass.

    Args:
        features: (B, C, H', W'). shares: kind of prompt -> share.
    Returns:
        low_res_masks (R, T, T) logits, iou_predictions (R,), rows (R,) int64 into the batch, R = B * repeats.
    """
    groups = []
    for kind, group, own in draw_groups(shares, len(batch.ids), repeats, generator):
        picked = to_device(group, features.device)
        big, small = batch.big_boxes[picked], batch.small_boxes[picked]
        prompts = draw_prompts(kind, big, small, num_points=num_points, generator=own)
        if len(group):
            groups.append((picked, prompts))
    low_res, iou = sam.decode_groups(features, groups, slice(0, 1))
    return low_res[:, 0], iou[:, 0], torch.cat([picked for picked, _ in groups])
