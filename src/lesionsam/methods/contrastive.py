"""Contrastive and two-box adaptation: a student and its averaged teacher learn from two boxes per lesion, no masks.

The methods below follow the order of docs/method.md. Symbols: f, f_t, f_r features (B, C, H', W') of student, teacher
and pretrained encoder; z = proj(f); y student logits, m target in [0, 1] and w pixel weights on the low-resolution grid
(B, T, T).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from lesionsam.losses import (
    bce,
    binary_entropy,
    dice,
    drop_unused,
    hard_iou,
    info_nce,
    projection_loss,
    sample_pixels,
    soft_mask_loss,
    weighted_mean,
)
from lesionsam.methods.base import Method, Term
from lesionsam.methods.grid import box_cells, box_grid, known_masks, mean_over, to_grid
from lesionsam.methods.prompting import decode_mixture
from lesionsam.methods.targets import ellipse_logits, placebo_target, tightness_logits
from lesionsam.models.prefix import encode_batch, encode_frozen, encode_suffix, frozen_part, num_frozen_blocks
from lesionsam.models.projection import ProjectionHead
from lesionsam.models.sam import Sam, decode, encode, sam_of
from lesionsam.models.teacher import Teacher
from lesionsam.parallel.collectives import gather_chosen
from lesionsam.parallel.draws import Draws, generator_of, rand
from lesionsam.prompts import draw_prompts
from lesionsam.types import Batch, Prompts, to_device

LOWEST = -20.0  # logit of certain background
ENCODER_TERMS = ("contrast", "distil")  # terms of the features alone; every other term is one of the student's masks


@dataclass(frozen=True)
class ContrastiveOptions:
    """Settings of the method; section `method` of params.yaml documents each.

    Attributes:
        weights: name of a term -> its weight; 0 switches it off. In the published method contrast is alpha and distil
            is gamma; pseudo and projection are not part of it.
        offset, tightness: correction of the prior, already estimated, see `boxes.outline`.
    """

    weights: Mapping[str, float]
    temperature: float
    pos_samples: int
    neg_samples: int
    ema_decay: float
    teacher_share: float
    num_points: int
    teacher_prompt: str
    monitor_masks: bool
    gate_region: str
    entropy_thresh: float
    trust_empty: bool
    missed_core: str
    certain_background: bool
    in_batch: bool
    random_fallback: bool
    head_norm: str
    head_ema: bool
    target: str
    offset: float
    tightness: float
    softness: float
    teacher_weight: float
    ramp_steps: int
    placebo: str
    prompts: Mapping[str, float]
    prompts_per_image: int


class Student(nn.Module):
    """SAM and the projection head, which is all that may train, with the number of optimiser steps taken."""

    num_steps: torch.Tensor

    def __init__(self, sam: Sam, head: ProjectionHead) -> None:
        super().__init__()
        self.sam, self.head = sam, head
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))


class Contrastive(Method):
    """Adapt SAM with a contrastive term and two-box terms; see the module's docstring.

    Args:
        sam: student, its trained parameters selected. reference: frozen pretrained SAM, or None without distillation.
    """

    def __init__(self, sam: Sam, reference: Sam | None, options: ContrastiveOptions) -> None:
        self.options, self.sam, self.reference = options, sam, reference
        self.head: ProjectionHead = ProjectionHead(sam.embed_dim, options.head_norm)
        self.head.to(sam.pixel_mean.device)
        self.head.requires_grad_(options.weights["contrast"] > 0)
        self.student = Student(sam, self.head).to(sam.pixel_mean.device)
        self.model: nn.Module = self.student
        self.kept: nn.Module = self.student
        self.needs_teacher = options.target in ("teacher", "fused") or options.weights["contrast"] > 0
        self.teacher = Teacher(self.model, options.ema_decay) if self.needs_teacher else None
        self.frozen_blocks = num_frozen_blocks(sam)
        self.smallest_batch = 1 if options.placebo == "none" else 2  # a placebo uses another image's target

    # ---- one step ----------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch, generator: Draws) -> tuple[dict[str, Term], dict[str, torch.Tensor]]:
        """Return the terms whose weight is not 0, and the monitors.

        Monitors: `mask` (BCE + Dice against the true masks), `iou` (squared error of the predicted IoU), share of
        trusted images (all, and by size of the lesion), mean entropy of the targets in nats.
        """
        o, weights = self.options, self.options.weights
        f, f_t, f_r = self.encode(batch, asks_teacher=self.draws_teacher(generator))
        prompts = self.teacher_prompts(batch, generator)
        m, entropy, trusted = self.target(batch, f_t, prompts)
        w = to_grid(batch.valid, m.shape[-1])
        if any(weight > 0 for name, weight in weights.items() if name not in ENCODER_TERMS):
            y, predicted, rows = decode_mixture(
                self.sam, f, batch, o.prompts, repeats=o.prompts_per_image, num_points=o.num_points, generator=generator
            )
        else:  # published: the teacher's points on detached features, for the monitors only
            with torch.no_grad():
                low_res, iou = decode(self.sam, f.detach(), prompts)
            y, predicted, rows = low_res[:, 0], iou[:, 0], torch.arange(len(f), device=f.device)
        values: dict[str, Callable[[], torch.Tensor]] = {
            "contrast": lambda: self.contrast(batch, f, f_t, m, trusted, generator),
            "distil": lambda: self.distil(batch, f, f_r),
            "pseudo": lambda: mean_over(soft_mask_loss(y, m[rows], w[rows]), trusted[rows]),
            "projection": lambda: self.projection(y, batch, rows).mean(),
        }
        terms = {name: Term(values[name](), weight) for name, weight in weights.items() if weight > 0}
        return terms, self.monitors(batch, y, predicted, rows, m, entropy, trusted)

    @torch.no_grad()
    def counts(self, batch: Batch, generator: Draws) -> dict[str, torch.Tensor]:
        """Return how many images or cells each mean is over; untrusted images and missing masks are skipped."""
        asks_teacher, f_t = self.draws_teacher(generator), None
        if self.options.target in ("teacher", "fused"):
            f_t = self.encode_teacher(batch) if asks_teacher else encode_batch(self.sam, batch)
        m, _, trusted = self.target(batch, f_t, self.teacher_prompts(batch, generator))
        cells = self.sam.grid
        return {
            "mask": known_masks(batch, cells)[1].sum(),
            "contrast": (self.anchors(batch, m, cells).flatten(1).any(1) & trusted).sum(),
            "distil": to_grid(batch.valid, cells).sum(),
            "pseudo": trusted.sum(),  # every image has the same number of prompts
            **{f"trusted_{name}": chosen.sum() for name, chosen in by_size(m).items()},
        }

    def after_step(self, taken: bool | torch.Tensor = True) -> None:
        """Update the teacher, and the step count, which sets the teacher's share of a fused target."""
        self.student.num_steps += taken
        if self.teacher is not None:
            self.teacher.update(taken)

    # ---- parts of a step ---------------------------------------------------------------------------------------------

    def draws_teacher(self, generator: Draws) -> bool:
        """Draw whether the teacher encodes this batch: the first draw of a step, if there is one to be made."""
        share = self.options.teacher_share
        if self.teacher is None or share == 1:
            return self.teacher is not None
        return bool(torch.rand((), generator=generator_of(generator)) < share)

    def encode(
        self, batch: Batch, *, asks_teacher: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return f with gradient, f_t and f_r without; the frozen blocks run once for all three.

        Without `asks_teacher` f_t is f without its gradient, if there is a teacher.
        """
        split, reference = self.frozen_blocks, self.reference if self.options.weights["distil"] > 0 else None
        if split >= 0:
            tokens, f_r = frozen_part(self.sam, batch, split, reference)
            f = encode_suffix(self.sam, tokens, split)
            batch = replace(batch, prefix=tokens)
        else:
            images, f_r = self.sam.normalize(batch.images, batch.sizes), batch.reference
            f = encode(self.sam, images)
            if reference is not None and f_r is None:
                f_r, _ = encode_frozen(reference, images, num_frozen_blocks(reference))
        if self.teacher is not None and not asks_teacher:
            return f, f.detach(), f_r
        return f, self.encode_teacher(batch), f_r

    @torch.no_grad()
    def encode_teacher(self, batch: Batch) -> torch.Tensor | None:
        """Return f_t, or None if there is no teacher."""
        if self.teacher is None:
            return None
        teacher, split = sam_of(self.teacher.module), self.frozen_blocks
        if split < 0:
            return encode(teacher, teacher.normalize(batch.images, batch.sizes))
        tokens, _ = frozen_part(self.sam, batch, split, None)
        return encode_suffix(teacher, tokens, split)

    def teacher_prompts(self, batch: Batch, generator: Draws) -> Prompts:
        """Draw the teacher's prompts, in `losses` as in `counts` right after `draws_teacher`."""
        o = self.options
        return draw_prompts(
            o.teacher_prompt, batch.big_boxes, batch.small_boxes, num_points=o.num_points, generator=generator
        )

    @torch.no_grad()
    def target(
        self, batch: Batch, f_t: torch.Tensor | None, prompts: Prompts
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the pseudo masks and whether the gate trusts them.

        Returns:
            m (B, T, T) in [0, 1], mean entropy (B,) nats, trusted (B,) bool.
        """
        o = self.options
        side, grid = batch.images.shape[-1], 4 * self.sam.grid
        if o.target in ("prior", "fused"):
            if batch.prior is None:
                raise ValueError("the batch carries no box prior")
            prior = batch.prior + o.offset
            if o.tightness != 1:
                prior = prior + tightness_logits(batch.big_boxes, side, o.tightness)
            logits = o.softness * prior
        elif o.target == "ellipse":
            logits = o.softness * ellipse_logits(batch.big_boxes, side)
        if o.target in ("teacher", "fused"):
            if f_t is None or self.teacher is None:
                raise ValueError("this target needs the teacher's features")
            low_res, _ = decode(sam_of(self.teacher.module), f_t, prompts)
            teacher_logits = F.interpolate(low_res.float(), (side, side), mode="bilinear", align_corners=False)[:, 0]
            ramp = (self.student.num_steps / o.ramp_steps).clamp(max=1) if o.ramp_steps else 1.0
            share = o.teacher_weight * ramp
            logits = teacher_logits if o.target == "teacher" else (1 - share) * logits + share * teacher_logits
        in_big = box_grid(batch.big_boxes, side, side)
        if o.target != "teacher":
            logits = logits.masked_fill(~in_big, LOWEST)
        if o.placebo != "none":
            logits = placebo_target(logits, batch.big_boxes, warp=o.placebo == "warped")
        probability = torch.sigmoid(logits)
        region = batch.valid & in_big if o.gate_region == "big_box" else batch.valid
        entropy = weighted_mean(binary_entropy(logits), region.float())
        trusted = entropy <= o.entropy_thresh
        if not o.trust_empty:
            trusted = trusted & (probability > 0.5).flatten(1).any(1)
        return to_grid(probability, grid), entropy, trusted

    def contrast(
        self,
        batch: Batch,
        f: torch.Tensor,
        f_t: torch.Tensor | None,
        m: torch.Tensor,
        trusted: torch.Tensor,
        generator: Draws,
    ) -> torch.Tensor:
        """Return the InfoNCE of student pixels in the core against the teacher's at the same places.

        It is the mean over trusted images with at least one anchor.
        """
        o = self.options
        if f_t is None or self.teacher is None:
            raise ValueError("the contrastive term needs the teacher")
        cells, side = f.shape[-1], batch.images.shape[-1]
        z = self.head(self.sam.image_embedding(f)).flatten(2).transpose(1, 2)  # (B, N, 64)
        with torch.no_grad():
            teacher_head = self.teacher.module.get_submodule("head") if o.head_ema else self.head
            z_t = teacher_head(self.sam.image_embedding(f_t)).flatten(2).transpose(1, 2)
        pseudo = to_grid(m, cells) > 0.5
        core = box_grid(batch.small_boxes, cells, side)
        big = box_grid(batch.big_boxes, cells, side) | core  # the core of a tiny lesion may round to a cell outside
        valid = to_grid(batch.valid, cells) > 0.5
        anchors = self.anchors(batch, m, cells)
        missed = core & ~pseudo & valid if o.missed_core == "negative" else torch.zeros_like(core)
        outside = (~big if o.certain_background else pseudo & ~big) & valid
        uniforms = [to_device(rand(generator, len(f), cells * cells), f.device) for _ in range(4)]
        anchor_index, anchor_valid = sample_pixels(anchors.flatten(1), o.pos_samples, uniforms[0])
        half = o.neg_samples // 2 if o.missed_core == "negative" else o.neg_samples
        outside_index, outside_valid = sample_pixels(outside.flatten(1), half, uniforms[1])
        missed_index, missed_valid = sample_pixels(missed.flatten(1), o.neg_samples - half, uniforms[2])
        negative_index, negative_valid = (
            torch.cat([outside_index, missed_index], 1),
            torch.cat([outside_valid, missed_valid], 1),
        )
        if o.random_fallback:
            random_index, random_valid = sample_pixels(valid.flatten(1), negative_index.shape[1], uniforms[3])
            has_no_negative = ~negative_valid.any(1, keepdim=True)
            width = random_index.shape[1]
            negative_index[:, :width] = torch.where(has_no_negative, random_index, negative_index[:, :width])
            negative_valid[:, :width] = torch.where(has_no_negative, random_valid, negative_valid[:, :width])
        anchor_index, anchor_valid = drop_unused(anchor_index, anchor_valid & trusted[:, None])
        negative_index, negative_valid = drop_unused(negative_index, negative_valid & trusted[:, None])

        def pick(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))

        negatives = pick(z, negative_index)
        if o.in_batch:
            every, which = gather_chosen(negatives.flatten(0, 1), negative_valid.flatten())
            negatives, negative_valid = every[None], which[None]
        loss = info_nce(
            pick(z, anchor_index), pick(z_t, anchor_index), negatives, anchor_valid, negative_valid, o.temperature
        )
        return mean_over(loss, anchor_valid.any(1))

    def anchors(self, batch: Batch, m: torch.Tensor, cells: int) -> torch.Tensor:
        """Return the cells that may be anchors, (B, cells, cells) bool.

        They are the cells of the core that the pseudo mask marks as lesion; all of the core if `missed_core` is
        positive.
        """
        core = box_grid(batch.small_boxes, cells, batch.images.shape[-1]) & (to_grid(batch.valid, cells) > 0.5)
        return core if self.options.missed_core == "positive" else core & (to_grid(m, cells) > 0.5)

    def distil(self, batch: Batch, f: torch.Tensor, f_r: torch.Tensor | None) -> torch.Tensor:
        """Return the mean squared difference of the image embeddings in f and f_r over the valid cells."""
        if f_r is None:
            raise ValueError("distillation needs the pretrained SAM")
        ours, pretrained = self.sam.image_embedding(f).float(), self.sam.image_embedding(f_r).float()
        squared = (ours - pretrained).square().mean(1)  # (B, H', W')
        known = to_grid(batch.valid, f.shape[-1])  # padding and other lesions have no part
        return mean_over(squared, known)

    def projection(self, y: torch.Tensor, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        """Return the two-box tightness (R,) of the student's masks; padding and other lesions have no part."""
        side, cells = batch.images.shape[-1], y.shape[-1]
        y = y.masked_fill((to_grid(batch.valid, cells) == 0)[rows], LOWEST)
        big, core = box_cells(batch.big_boxes[rows], cells, side), box_cells(batch.small_boxes[rows], cells, side)
        sizes = batch.sizes[rows].float() * (cells / side)
        position = torch.arange(cells, device=y.device) + 0.5
        within = (position < sizes[:, 1:2], position < sizes[:, 0:1])
        return projection_loss(y, (~big[0] & within[0], ~big[1] & within[1]), core)

    @torch.no_grad()
    def monitors(
        self,
        batch: Batch,
        y: torch.Tensor,
        predicted: torch.Tensor,
        rows: torch.Tensor,
        m: torch.Tensor,
        entropy: torch.Tensor,
        trusted: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return the monitors of `losses`; y (R, T, T) and predicted (R,) answer the images `rows`."""
        found, w = {}, to_grid(batch.valid, y.shape[-1])[rows]
        if self.options.monitor_masks:
            truth, known = known_masks(batch, y.shape[-1])
            found["mask"] = mean_over(bce(y, truth[rows], w) + dice(y, truth[rows], w), known[rows])
        found["iou"] = F.mse_loss(predicted.float(), hard_iou(y, m[rows], w))
        found |= {"trusted": trusted.float().mean(), "entropy": entropy.mean()}
        return found | {f"trusted_{n}": mean_over(trusted.float(), chosen) for n, chosen in by_size(m).items()}


def by_size(m: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return which targets are small (up to 5 % of the frame), medium (up to 20 %) and large, (B,) bool each."""
    area = m.flatten(1).mean(1)
    return {"small": area <= 0.05, "medium": (area > 0.05) & (area <= 0.2), "large": area > 0.2}
