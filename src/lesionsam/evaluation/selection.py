"""Score a model on the development split, to select an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, zip_longest

import numpy as np
import torch

from lesionsam.data.dataset import Batches
from lesionsam.evaluation.statistics import OBJECTIVE_PROMPTS
from lesionsam.methods.grid import box_pixels
from lesionsam.metrics import batch_iou
from lesionsam.models.prefix import encode_batch
from lesionsam.models.sam import Sam, decode
from lesionsam.parallel.collectives import gather_objects
from lesionsam.prompts import seeded_prompts
from lesionsam.types import Batch


def quick_evaluate(
    sam: Sam,
    dataset: Batches,
    *,
    prompts: Sequence[str],
    seed: int,
    batch_size: int,
    device: torch.device | str,
    num_points: int = 10,
) -> dict[str, float]:
    """Score a model for selection during training, in the model frame; reported results are at original size.

    Args:
        dataset: the development split, decoded; masks are read from its batches where they carry any.
        prompts: prompt sources of `prompts.KINDS`; those of the objective among them make `objective`.
    Returns:
        prompt -> mean IoU, `objective` (mean over ring, centre and box), both only with masks; always `core_coverage`,
        `leakage`, `consistency` (means over lesions and prompts) and `label_free`, the mean of core coverage,
        consistency and 1 - leakage, in [0, 1].
    """
    was_training = sam.training
    sam.to(device).eval()
    found: list[dict[str, np.ndarray]] = []  # of each batch
    try:
        with torch.inference_mode():
            for batch in dataset.batches(batch_size):
                scored = _quick_batch(sam, batch.to(device), prompts, seed, num_points)
                found.append({name: values.cpu().double().numpy() for name, values in scored.items()})
    finally:
        sam.train(was_training)
    ranks = gather_objects(found)  # the processes took turns with the batches
    batches = [scored for turn in zip_longest(*ranks) for scored in turn if scored is not None]
    means = {
        name: float(np.nanmean(values))
        for name in batches[0]
        if not np.isnan(values := np.concatenate([scored[name] for scored in batches])).all()
    }
    if all(prompt in means for prompt in OBJECTIVE_PROMPTS):
        means["objective"] = float(np.mean([means[prompt] for prompt in OBJECTIVE_PROMPTS]))
    signals = [means["core_coverage"], 1 - means["leakage"], means.get("consistency", means["core_coverage"])]
    return means | {"label_free": float(np.mean(signals))}


def _quick_batch(sam: Sam, batch: Batch, prompts: Sequence[str], seed: int, num_points: int) -> dict[str, torch.Tensor]:
    """Return (B,) scores of a batch by name; NaN where a true mask is unknown."""
    side = batch.images.shape[-1]
    features = encode_batch(sam, batch)
    big, small = box_pixels(batch.big_boxes, side, side), box_pixels(batch.small_boxes, side, side)
    scores, masks = {}, []
    coverage, leakage = [], []
    for kind in prompts:
        drawn = seeded_prompts(kind, batch.big_boxes, batch.small_boxes, batch.ids, num_points=num_points, seed=seed)
        low_res, _ = decode(sam, features, drawn)
        full = torch.nn.functional.interpolate(low_res.float(), (side, side), mode="bilinear", align_corners=False)[
            :, 0
        ]
        mask = (full > 0) & batch.valid
        masks.append(mask & big)
        coverage.append((mask & small).sum((1, 2)) / small.sum((1, 2)).clamp(min=1))
        leakage.append((mask & ~big).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1))
        if batch.masks is not None:
            known = ~batch.masks.isnan().flatten(1).any(1)
            scores[kind] = torch.where(known, batch_iou(mask, (batch.masks > 0.5) & batch.valid), torch.nan)
    scores |= {"core_coverage": torch.stack(coverage).mean(0), "leakage": torch.stack(leakage).mean(0)}
    if len(masks) > 1:
        scores["consistency"] = torch.stack([batch_iou(a, b) for a, b in combinations(masks, 2)]).mean(0)
    return scores
