"""Supervised fine-tuning: true masks as the target of the same prompts, in the same loop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lesionsam.losses import hard_iou, soft_mask_loss
from lesionsam.methods.base import Term, decode_mixture, known_masks, mean_over, to_grid
from lesionsam.models.sam import Sam
from lesionsam.models.trainable import encode_batch
from lesionsam.types import Batch


class Supervised:
    """2 BCE + Dice against the true mask, under prompts drawn from the two boxes.

    Args:
        sam: the model; what trains is already selected.
        prompts: kind -> share. prompts_per_image: decoder passes per image and step.
        beta: weight of the IoU monitor in the printed total; no gradient.
    """

    def __init__(
        self, sam: Sam, *, prompts: Mapping[str, float], prompts_per_image: int, num_points: int, beta: float
    ) -> None:
        self.model: nn.Module = sam
        self.sam, self.prompts, self.beta = sam, dict(prompts), beta
        self.prompts_per_image, self.num_points = prompts_per_image, num_points

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Term]:
        """mask (2 BCE + Dice) and the IoU monitor."""
        features = encode_batch(self.sam, batch)
        y, predicted, rows = decode_mixture(
            self.sam,
            features,
            batch,
            self.prompts,
            repeats=self.prompts_per_image,
            num_points=self.num_points,
            generator=generator,
        )
        m, known = known_masks(batch, y.shape[-1])
        w = to_grid(batch.valid, y.shape[-1])[rows]
        loss = mean_over(soft_mask_loss(y, m[rows], w), known[rows])
        with torch.no_grad():
            iou_error = mean_over((predicted.float() - hard_iou(y, m[rows], w)) ** 2, known[rows])
        return {"mask": Term(loss, 1.0), "iou": Term(iou_error, self.beta)}

    def after_step(self) -> None:
        """Nothing follows a supervised step."""

    def monitors(self) -> dict[str, torch.Tensor]:
        """None."""
        return {}
