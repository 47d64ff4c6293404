"""Contrastive and two-box adaptation: a student, its averaged teacher, two boxes per lesion, no masks.

One step, in the order of docs/method.md. Symbols: f, f_t, f_r student, teacher and pretrained features
(B, C, H', W'); z = proj(f); y student logits, m target in [0, 1] and w weights on the low-resolution grid (B, T, T);
h mean binary entropy of the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
from lesionsam.methods.targets import ellipse_logits, placebo_target
from lesionsam.models.prefix import encode_frozen, encode_suffix, frozen_part, num_frozen_blocks
from lesionsam.models.projection import ProjectionHead, spread
from lesionsam.models.sam import Sam, decode, encode
from lesionsam.models.teacher import Teacher
from lesionsam.models.transforms import preprocess
from lesionsam.prompts import draw_prompts
from lesionsam.types import Batch, Prompts, to_device

LOWEST = -20.0  # logit of what is ruled out


@dataclass(frozen=True)
class Options:
    """The settings of section `method` in params.yaml, which documents each; the offset already found."""

    alpha: float
    beta: float
    gamma: float
    delta: float
    epsilon: float
    temperature: float
    pos_samples: int
    neg_samples: int
    ema_decay: float
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
    softness: float
    teacher_weight: float
    ramp_steps: int
    placebo: str
    prompts: Mapping[str, float]
    prompts_per_image: int


class Student(nn.Module):
    """SAM and the projection head: everything that may train; and the number of steps taken."""

    num_steps: torch.Tensor

    def __init__(self, sam: Sam, head: ProjectionHead) -> None:
        super().__init__()
        self.sam, self.head = sam, head
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))


class Contrastive(Method):
    """The method; see the module's docstring.

    Args:
        sam: student; what trains is already selected. reference: the pretrained SAM, frozen; None if gamma is 0.
        options: see `Options`.
    """

    def __init__(self, sam: Sam, reference: Sam | None, options: Options) -> None:
        self.options, self.sam, self.reference = options, sam, reference
        self.head: ProjectionHead = ProjectionHead(sam.prompt_encoder.embed_dim, options.head_norm)
        self.head.to(sam.pixel_mean.device)
        self.head.requires_grad_(options.alpha > 0)
        self.student = Student(sam, self.head).to(sam.pixel_mean.device)
        self.model: nn.Module = self.student
        self.kept: nn.Module = self.student
        self.needs_teacher = options.target in ("teacher", "fused") or options.alpha > 0
        self.teacher = Teacher(self.model, options.ema_decay) if self.needs_teacher else None
        self.frozen_blocks = num_frozen_blocks(sam)
        self.smallest_batch = 1 if options.placebo == "none" else 2  # a placebo's target is another image's
        self._monitors: dict[str, torch.Tensor] = {}

    # ---- one step ----------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, Term]:
        """The terms of one batch: mask and iou (monitors), contrast, distil, pseudo, projection (where switched on)."""
        o = self.options
        f, f_t, f_r = self.encode(batch)
        prompts = draw_prompts(
            o.teacher_prompt, batch.big_boxes, batch.small_boxes, num_points=o.num_points, generator=generator
        )
        m, entropy, trusted = self.target(batch, f_t, prompts)
        w = to_grid(batch.valid, m.shape[-1])
        terms: dict[str, Term] = {}
        if o.delta > 0 or o.epsilon > 0:
            y, predicted, rows = decode_mixture(
                self.sam, f, batch, o.prompts, repeats=o.prompts_per_image, num_points=o.num_points, generator=generator
            )
        else:  # published: the same points, on detached features, for the monitors alone
            with torch.no_grad():
                low_res, iou = decode(self.sam, f.detach(), prompts)
            y, predicted, rows = low_res[:, 0], iou[:, 0], torch.arange(len(f), device=f.device)
        with torch.no_grad():
            if o.monitor_masks:
                truth, known = known_masks(batch, y.shape[-1])
                terms["mask"] = Term(
                    mean_over(bce(y, truth[rows], w[rows]) + dice(y, truth[rows], w[rows]), known[rows]),
                    1.0,
                    monitor=True,
                )
            terms["iou"] = Term(F.mse_loss(predicted.float(), hard_iou(y, m[rows], w[rows])), o.beta, monitor=True)
        if o.alpha > 0:
            terms["contrast"] = Term(self.contrast(batch, f, f_t, m, trusted, generator), o.alpha)
        if o.gamma > 0 and f_r is not None:
            squared = (f.float() - f_r.float()).square().mean(1)  # (B, H', W')
            known = to_grid(batch.valid, f.shape[-1])  # padding and other lesions take no part
            terms["distil"] = Term((squared * known).sum() / known.sum().clamp(min=1), o.gamma)
        if o.delta > 0:
            terms["pseudo"] = Term(mean_over(soft_mask_loss(y, m[rows], w[rows]), trusted[rows]), o.delta)
        if o.epsilon > 0:
            terms["projection"] = Term(self.projection(y, batch, rows).mean(), o.epsilon)
        area = m.flatten(1).mean(1)
        self._monitors = {
            "trusted": trusted.float().mean(),
            "entropy": entropy.mean(),
            **{
                f"trusted_{name}": mean_over(trusted.float(), chosen)
                for name, chosen in (
                    ("small", area <= 0.05),
                    ("medium", (area > 0.05) & (area <= 0.2)),
                    ("large", area > 0.2),
                )
            },
        }
        return terms

    def after_step(self) -> None:
        """EMA update of the teacher, whose weight in a fused target rises with the number of steps."""
        self.student.num_steps += 1
        if self.teacher is not None:
            self.teacher.update()

    def monitors(self) -> dict[str, torch.Tensor]:
        """Share of trusted images (all, small, medium, large lesions) and mean entropy of the last batch."""
        return self._monitors

    # ---- its parts ---------------------------------------------------------------------------------------------------

    def encode(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """f with gradient, f_t and f_r without; the frozen prefix runs once for all three."""
        split, reference = self.frozen_blocks, self.reference if self.options.gamma > 0 else None
        if split >= 0:
            tokens, f_r = frozen_part(self.sam, batch, split, reference)
            f = encode_suffix(self.sam, tokens, split)
        else:
            images, f_r = preprocess(batch.images, batch.sizes), batch.reference
            f = encode(self.sam, images)
            if reference is not None and f_r is None:
                f_r, _ = encode_frozen(reference, images, num_frozen_blocks(reference))
        f_t = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher.module.sam
                f_t = encode_suffix(teacher, tokens, split) if split >= 0 else encode(teacher, images)
        return f, f_t, f_r

    @torch.no_grad()
    def target(
        self, batch: Batch, f_t: torch.Tensor | None, prompts: Prompts
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The pseudo mask and its gate.

        Returns:
            m (B, T, T) in [0, 1], mean entropy (B,) nats, trusted (B,) bool.
        """
        o = self.options
        side, grid = batch.images.shape[-1], 4 * self.sam.prompt_encoder.image_embedding_size[0]
        if o.target in ("prior", "fused"):
            if batch.prior is None:
                raise ValueError("the batch carries no box prior")
            logits = o.softness * (batch.prior + o.offset)
        elif o.target == "ellipse":
            logits = o.softness * ellipse_logits(batch.big_boxes, side)
        if o.target in ("teacher", "fused"):
            if f_t is None or self.teacher is None:
                raise ValueError("a teacher's target needs the teacher")
            low_res, _ = decode(self.teacher.module.sam, f_t, prompts)
            taught = F.interpolate(low_res.float(), (side, side), mode="bilinear", align_corners=False)[:, 0]
            risen = (self.student.num_steps / o.ramp_steps).clamp(max=1) if o.ramp_steps else 1.0
            v = o.teacher_weight * risen
            logits = taught if o.target == "teacher" else (1 - v) * logits + v * taught
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
        generator: torch.Generator,
    ) -> torch.Tensor:
        """InfoNCE of student pixels in the core against the teacher's at the same places."""
        o = self.options
        if f_t is None or self.teacher is None:
            raise ValueError("the contrastive term needs the teacher")
        cells, side = f.shape[-1], batch.images.shape[-1]
        z = self.head(f).flatten(2).transpose(1, 2)  # (B, N, 64)
        with torch.no_grad():
            teacher_head = self.teacher.module.get_submodule("head") if o.head_ema else self.head
            z_t = teacher_head(f_t).flatten(2).transpose(1, 2)
            self.last_projection = z.detach().transpose(1, 2)[..., None]
        pseudo = to_grid(m, cells) > 0.5
        core = box_grid(batch.small_boxes, cells, side)
        big = box_grid(batch.big_boxes, cells, side) | core  # of a lesion below a cell the core's cell may lie beyond
        valid = to_grid(batch.valid, cells) > 0.5
        anchors = (core if o.missed_core == "positive" else pseudo & core) & valid
        missed = core & ~pseudo & valid if o.missed_core == "negative" else torch.zeros_like(core)
        beyond = (~big if o.certain_background else pseudo & ~big) & valid
        uniforms = to_device(torch.rand(4, len(f), cells * cells, generator=generator), f.device)
        at, anchor_valid = sample_pixels(anchors.flatten(1), o.pos_samples, uniforms[0])
        half = o.neg_samples // 2 if o.missed_core == "negative" else o.neg_samples
        beyond_at, beyond_valid = sample_pixels(beyond.flatten(1), half, uniforms[1])
        missed_at, missed_valid = sample_pixels(missed.flatten(1), o.neg_samples - half, uniforms[2])
        away, away_valid = torch.cat([beyond_at, missed_at], 1), torch.cat([beyond_valid, missed_valid], 1)
        if o.random_fallback:
            random_at, random_valid = sample_pixels(valid.flatten(1), away.shape[1], uniforms[3])
            none = ~away_valid.any(1, keepdim=True)
            width = random_at.shape[1]
            away[:, :width] = torch.where(none, random_at, away[:, :width])
            away_valid[:, :width] = torch.where(none, random_valid, away_valid[:, :width])
        at, anchor_valid = drop_unused(at, anchor_valid & trusted[:, None])
        away, away_valid = drop_unused(away, away_valid & trusted[:, None])

        def pick(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))

        negatives = pick(z, away)
        if o.in_batch:
            negatives, away_valid = negatives.flatten(0, 1)[None], away_valid.flatten()[None]
        loss = info_nce(pick(z, at), pick(z_t, at), negatives, anchor_valid, away_valid, o.temperature)
        return mean_over(loss, anchor_valid.any(1))

    def head_spread(self) -> dict[str, float]:
        """Spread of the last batch's projected pixels."""
        return spread(self.last_projection)

    def projection(self, y: torch.Tensor, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        """(R,): two-box tightness of the student's masks; padding and other lesions take no part."""
        side, cells = batch.images.shape[-1], y.shape[-1]
        y = y.masked_fill((to_grid(batch.valid, cells) == 0)[rows], LOWEST)
        big, core = box_cells(batch.big_boxes[rows], cells, side), box_cells(batch.small_boxes[rows], cells, side)
        sizes = batch.sizes[rows].float() * (cells / side)
        position = torch.arange(cells, device=y.device) + 0.5
        within = (position < sizes[:, 1:2], position < sizes[:, 0:1])
        return projection_loss(y, (~big[0] & within[0], ~big[1] & within[1]), core)
