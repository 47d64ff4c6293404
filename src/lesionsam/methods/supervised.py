"""Supervised fine-tuning with true masks as the target.

Symbols: y logits (N, K, T, T) of N decoded prompts with K mask tokens each (token 0 is the single mask, 1 to 3 are
SAM's candidates for an ambiguous prompt); m true masks and w pixel weights on the low-resolution grid; rows (N,) the
image of each prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lesionsam.losses import MASK_LOSSES, MASK_TERMS, hard_iou
from lesionsam.methods.base import Method, Term
from lesionsam.methods.grid import known_masks, mean_over, to_grid
from lesionsam.methods.prompting import draw_groups
from lesionsam.models.prefix import encode_batch
from lesionsam.models.sam import Sam
from lesionsam.models.teacher import Teacher
from lesionsam.parallel.draws import Draws
from lesionsam.prompts import draw_prompts, prompts_from_masks, with_correction
from lesionsam.types import Batch, Prompts, to_device

LOG_WEIGHTS = "log_weights"  # name of the parameter that holds the logarithms of the learnt weights
IOU_LOSSES = {"mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


@dataclass(frozen=True)
class MaskDraws:
    """Settings of prompts drawn from masks; `prompts.prompts_from_masks` documents each."""

    box_jitter: float
    max_points: int
    point_jitter: float
    negative: float


@dataclass(frozen=True)
class SupervisedOptions:
    """Settings of the method; section `method` of params.yaml documents each.

    Attributes:
        iou_weight: weight of the IoU head's term, unless `iou_loss` is `monitor`.
        average: decay of the running average that is evaluated and kept; 0 = none.
        from_masks: settings of prompts drawn from the masks; None draws them from the two boxes.
    """

    loss: str
    candidates: str
    iou_loss: str
    iou_weight: float
    learned_weights: bool
    average: float
    num_points: int
    prompts_per_image: int
    corrections: int
    prompts: Mapping[str, float]
    from_masks: MaskDraws | None


class Learner(nn.Module):
    """SAM and the logarithms of the learnt weights of the loss terms, which is all that may train."""

    def __init__(self, sam: Sam, num_weights: int) -> None:
        super().__init__()
        self.sam = sam
        self.log_weights = nn.Parameter(torch.zeros(num_weights, device=sam.pixel_mean.device)) if num_weights else None


class Supervised(Method):
    """Fine-tune SAM on true masks; see the module's docstring.

    Args:
        sam: its trained parameters are selected already.
    """

    def __init__(self, sam: Sam, options: SupervisedOptions) -> None:
        self.sam, self.options = sam, options
        self.weights = dict(MASK_LOSSES[options.loss])
        if options.iou_loss != "monitor":
            self.weights["iou"] = options.iou_weight
        self.learner = Learner(sam, len(self.weights) if options.learned_weights else 0)
        self.model: nn.Module = self.learner
        self.teacher = Teacher(self.model, options.average) if options.average > 0 else None
        self.kept: nn.Module = self.teacher.module if self.teacher is not None else self.model

    def losses(self, batch: Batch, generator: Draws) -> tuple[dict[str, Term], dict[str, torch.Tensor]]:
        """Return the terms of the mask's loss and of the IoU head; the latter may be a monitor.

        A learnt weight is exp(s) times the term's own weight; the term `weighting` = -sum(s) keeps s from falling
        without end: at the optimum exp(s) is the reciprocal of the weighted term (after Kendall et al. 2018,
        arXiv:1705.07115, with s = -2 log sigma). The learnt weights are monitors.
        """
        o = self.options
        y, predicted, rows = self.decode(batch, generator)
        m, known = known_masks(batch, y.shape[-1])
        m, known, w = m[rows], known[rows], to_grid(batch.valid, y.shape[-1])[rows]
        tokens = range(y.shape[1])
        parts = {
            name: torch.stack([MASK_TERMS[name](y[:, k], m, w) for k in tokens], 1) for name in MASK_LOSSES[o.loss]
        }
        values = {name: mean_over(self.chosen(part, parts), known) for name, part in parts.items()}
        true_iou = torch.stack([hard_iou(y[:, k].detach(), m, w) for k in tokens], 1)
        monitors: dict[str, torch.Tensor] = {}
        if o.iou_loss == "monitor":
            monitors["iou"] = mean_over((predicted.detach().float() - true_iou).square().mean(1), known)
        else:
            error = IOU_LOSSES[o.iou_loss](predicted.float(), true_iou, reduction="none")
            values["iou"] = mean_over(error.mean(1), known)
        log_weights = self.learner.log_weights
        if log_weights is None:
            return {name: Term(value, self.weights[name]) for name, value in values.items()}, monitors
        learnt = dict(zip(values, log_weights.exp(), strict=True))
        terms = {name: Term(value, self.weights[name] * learnt[name]) for name, value in values.items()}
        terms["weighting"] = Term(-log_weights.sum(), 1.0)
        return terms, monitors | {f"weight_{name}": factor.detach() for name, factor in learnt.items()}

    def counts(self, batch: Batch, generator: Draws) -> dict[str, torch.Tensor]:
        """Return the number of images with a mask, which every mean over masks is over."""
        known = known_masks(batch, 1)[1].sum()  # every image has the same number of prompts
        return dict.fromkeys([*self.weights, "iou"], known)

    def chosen(self, part: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the single mask's value plus that of the candidate with the least total loss, (N, K) -> (N,)."""
        if part.shape[1] == 1:
            return part[:, 0]
        whole = torch.stack([MASK_LOSSES[self.options.loss][name] * value for name, value in parts.items()]).sum(0)
        best = whole[:, 1:].argmin(1, keepdim=True) + 1
        return part[:, 0] + part.gather(1, best)[:, 0]

    def decode(self, batch: Batch, generator: Draws) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode every image under prompts of drawn kinds, and again after each correction point.

        Returns:
            y (N, K, T, T), iou_predictions (N, K), rows (N,) int64; N = B * prompts_per_image * (1 + corrections).
        """
        o, features = self.options, encode_batch(self.sam, batch)
        tokens = slice(0, 1) if o.candidates == "one" else slice(None)
        shares, known = known_masks(batch, batch.images.shape[-1])
        masks, valid = shares > 0.5, batch.valid & known[:, None, None]
        drawn = draw_groups(o.prompts, len(batch.ids), o.prompts_per_image, generator)
        own = [draws for _, _, draws in drawn]
        groups = []
        for kind, group, draws in drawn:
            picked = to_device(group, features.device)
            groups.append((picked, self.prompt(kind, batch, picked, masks, draws)))
        rows = torch.cat([picked for picked, _ in groups])

        def decode() -> tuple[torch.Tensor, torch.Tensor]:
            return self.sam.decode_groups(features, [group for group in groups if len(group[0])], tokens)

        answers = [decode()]
        for _ in range(o.corrections):
            answered = answers[-1][0][:, 0].split([len(picked) for picked, _ in groups])
            groups = [
                (picked, with_correction(prompts, y, masks[picked], valid[picked], draws))
                for (picked, prompts), y, draws in zip(groups, answered, own, strict=True)
            ]
            answers.append(decode())
        logits, predictions = zip(*answers, strict=True)
        return torch.cat(logits), torch.cat(predictions), rows.repeat(len(answers))

    def prompt(self, kind: str, batch: Batch, picked: torch.Tensor, masks: torch.Tensor, generator: Draws) -> Prompts:
        """Draw one prompt of a kind for each picked image, from the two boxes or from the masks (B, S, S) bool."""
        o, big, small = self.options, batch.big_boxes[picked], batch.small_boxes[picked]
        if o.from_masks is None:
            return draw_prompts(kind, big, small, num_points=o.num_points, generator=generator)
        draws = o.from_masks
        return prompts_from_masks(
            kind,
            masks[picked],
            batch.valid[picked],
            batch.sizes[picked],
            big,
            box_jitter=draws.box_jitter,
            max_points=draws.max_points,
            point_jitter=draws.point_jitter,
            negative=draws.negative,
            generator=generator,
        )

    def after_step(self, taken: bool | torch.Tensor = True) -> None:
        """Update the running average, if there is one."""
        if self.teacher is not None:
            self.teacher.update(taken)
