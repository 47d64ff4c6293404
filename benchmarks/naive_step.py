"""The published step as it is commonly written, the yardstick of `benchmarks/step.py`. It is frozen: never made faster.

docs/method.md, section 6, with the settings of the preset `published`. Every pass of the encoder is
segment_anything's own and over all of its blocks: teacher, student, pretrained encoder, and the teacher once more for
every image in the contrast. Images are gone through one by one, entropies and masks are taken at full resolution, the
host waits for every decision, and the teacher's average runs over every parameter, one at a time.

Only what would make its numbers incomparable is handed in: the drawn points and the drawn pixel keys.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from torch import nn

from lesionsam.types import Batch

ALPHA, BETA, GAMMA, TEMPERATURE = 1.0, 0.5, 0.1, 0.1
NUM_POINTS, POS_SAMPLES, NEG_SAMPLES = 10, 256, 1024
EMA_DECAY, CLIP = 0.999, 1.0


@dataclass(frozen=True)
class Draws:
    """Random draws of a step: ring points (B, 10, 2), model frame; a key in [0, 1) per pixel (4, B, H' W')."""

    points: torch.Tensor
    keys: torch.Tensor


class NaiveStep:
    """The published step around whole copies of student, teacher and pretrained encoder.

    Args:
        student: what trains is selected. teacher, reference: Sams, copied whole. head: the projection head, which
            student and teacher share. entropy_thresh: nats; an image is trusted when its mean entropy is not above.
    """

    def __init__(
        self,
        student: Sam,
        teacher: Sam,
        reference: Sam,
        head: nn.Module,
        *,
        entropy_thresh: float,
        learning_rate: float,
    ) -> None:
        self.student, self.head, self.entropy_thresh = copy.deepcopy(student), copy.deepcopy(head), entropy_thresh
        self.teacher = copy.deepcopy(teacher).requires_grad_(False)
        self.reference = copy.deepcopy(reference.image_encoder).requires_grad_(False)
        self.trained = [p for p in [*self.student.parameters(), *self.head.parameters()] if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=learning_rate)
        self.trusted = 0

    def losses(self, batch: Batch, draws: Draws) -> dict[str, torch.Tensor]:
        """Return the weighted terms of a batch; `mask` and `iou` are monitors without gradient."""
        count, side = len(batch.ids), batch.images.shape[-1]
        images = torch.stack(
            [
                self.student.preprocess(batch.images[b, :, : int(batch.sizes[b, 0]), : int(batch.sizes[b, 1])])
                for b in range(count)
            ]
        )
        with torch.no_grad():
            f_t = self.teacher.image_encoder(images)
            pseudo, trusted = [], []
            for b in range(count):
                low_res, _ = decode_one(self.teacher, f_t[b : b + 1], draws.points[b : b + 1])
                logits = F.interpolate(low_res.float(), (side, side), mode="bilinear", align_corners=False)
                probability = torch.sigmoid(logits)[0, 0]
                entropy = binary_entropy(probability)[batch.valid[b]].mean().item()
                pseudo.append(probability)
                trusted.append(entropy <= self.entropy_thresh)
            self.trusted = sum(trusted)
        f = self.student.image_encoder(images)
        with torch.no_grad():
            f_r = self.reference(images)
        mask, iou = self.monitors(batch, f.detach(), pseudo, draws)
        contrast = self.contrast(batch, images, f, pseudo, trusted, draws)
        known = F.adaptive_avg_pool2d(batch.valid.float()[:, None], f.shape[-1])[:, 0]
        distil = ((f.float() - f_r.float()).square().mean(1) * known).sum() / known.sum()
        return {"mask": mask, "iou": BETA * iou, "contrast": ALPHA * contrast, "distil": GAMMA * distil}

    @torch.no_grad()
    def monitors(
        self, batch: Batch, f: torch.Tensor, pseudo: list[torch.Tensor], draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return BCE + Dice against the true masks, and the squared error of the predicted IoU, means over images."""
        masks, errors = [], []
        for b in range(len(pseudo)):
            low_res, predicted = decode_one(self.student, f[b : b + 1], draws.points[b : b + 1])
            y = low_res[0, 0].float()
            w = F.adaptive_avg_pool2d(batch.valid[b].float()[None, None], y.shape[-1])[0, 0]
            m = F.adaptive_avg_pool2d(pseudo[b][None, None], y.shape[-1])[0, 0] > 0.5
            y_hard, used = y > 0, w > 0
            union = ((y_hard | m) & used).sum()
            overlap = (y_hard & m & used).sum() / union if union.item() > 0 else y.new_ones(())
            errors.append((predicted[0, 0].float() - overlap) ** 2)
            if batch.masks is not None:
                truth = F.adaptive_avg_pool2d(batch.masks[b][None, None], y.shape[-1])[0, 0]
                p = torch.sigmoid(y)
                bce = (F.binary_cross_entropy_with_logits(y, truth, reduction="none") * w).sum() / w.sum()
                dice = 1 - (2 * (w * p * truth).sum() + 1) / ((w * p).sum() + (w * truth).sum() + 1)
                masks.append(bce + dice)
        return torch.stack(masks).mean() if masks else f.new_zeros(()), torch.stack(errors).mean()

    def contrast(
        self,
        batch: Batch,
        images: torch.Tensor,
        f: torch.Tensor,
        pseudo: list[torch.Tensor],
        trusted: list[bool],
        draws: Draws,
    ) -> torch.Tensor:
        """Return InfoNCE of student pixels in the core against the teacher's, teacher features recomputed."""
        cells, side = f.shape[-1], images.shape[-1]
        z = self.head(f)  # over the batch, as its normalisation wants
        with torch.no_grad():
            taught = self.head(torch.cat([self.teacher.image_encoder(images[b : b + 1]) for b in range(len(images))]))
        losses = []
        for b in range(len(images)):
            if not trusted[b]:
                continue
            student, teacher = z[b].flatten(1).t(), taught[b].flatten(1).t()  # (N, 64)
            mask = F.adaptive_avg_pool2d(pseudo[b][None, None], cells)[0, 0].flatten() > 0.5
            core = cells_in(batch.small_boxes[b], cells, side)
            big = cells_in(batch.big_boxes[b], cells, side) | core
            valid = F.adaptive_avg_pool2d(batch.valid[b].float()[None, None], cells)[0, 0].flatten() > 0.5
            anchors = drawn(mask & core & valid, POS_SAMPLES, draws.keys[0, b])
            overflow = drawn(mask & ~big & valid, NEG_SAMPLES // 2, draws.keys[1, b])
            missed = drawn(core & ~mask & valid, NEG_SAMPLES - NEG_SAMPLES // 2, draws.keys[2, b])
            away = torch.cat([overflow, missed])
            if len(away) == 0:
                away = drawn(valid, NEG_SAMPLES, draws.keys[3, b])
            if len(anchors) > 0:
                losses.append(image_info_nce(student[anchors], teacher[anchors], student[away]))
        return torch.stack(losses).mean() if losses else z.sum() * 0

    def backward(self, batch: Batch, draws: Draws) -> dict[str, torch.Tensor]:
        """Compute the gradients of a step; return its terms."""
        self.optimizer.zero_grad()
        terms = self.losses(batch, draws)
        torch.stack([term.float() for term in terms.values()]).sum().backward()
        return terms

    def update(self) -> None:
        """Clip, step, and update the teacher's average."""
        nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        average_each(self.teacher, self.student)

    def step(self, batch: Batch, draws: Draws) -> float:
        """Take one training step and return its loss."""
        loss = sum(term.item() for term in self.backward(batch, draws).values())
        self.update()
        return loss


# ---- its parts, in the published form --------------------------------------------------------------------------------


def decode_one(sam: Sam, features: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode one image's features (1, C, H', W') with foreground points (1, N, 2) to logits (1, 1, T, T) and IoU (1,
    1).
    """
    labels = torch.ones(points.shape[:2], dtype=torch.int64, device=points.device)
    sparse, dense = sam.prompt_encoder(points=(points, labels), boxes=None, masks=None)
    return sam.mask_decoder(
        image_embeddings=features,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )


def binary_entropy(p: torch.Tensor) -> torch.Tensor:
    """Return -p ln p - (1 - p) ln(1 - p), clamped away from ln 0."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def cells_in(box: torch.Tensor, cells: int, side: int) -> torch.Tensor:
    """Return (cells * cells,) bool: cells whose centre lies in a box, and the cell of the box's centre."""
    inside = torch.zeros(cells, cells, dtype=torch.bool, device=box.device)
    centres = (torch.arange(cells, device=box.device) + 0.5) * side / cells
    columns, rows = (centres >= box[0]) & (centres < box[2]), (centres >= box[1]) & (centres < box[3])
    inside[rows[:, None] & columns[None]] = True
    column, row = (int(v) for v in ((box[:2] + box[2:]) / 2 * cells / side))
    inside[min(max(row, 0), cells - 1), min(max(column, 0), cells - 1)] = True
    return inside.flatten()


def drawn(candidates: torch.Tensor, count: int, keys: torch.Tensor) -> torch.Tensor:
    """Return up to `count` of the candidates (N,), those with the greatest keys."""
    index = candidates.nonzero()[:, 0]
    return index[keys[index].argsort(descending=True)[:count]]


def image_info_nce(anchors: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """Return -log(e^(a.p/t) / (e^(a.p/t) + sum e^(a.n/t))), mean over anchors; (P, D), (P, D), (N, D)."""
    positive = torch.exp((anchors * positives).sum(1) / TEMPERATURE)
    negative = torch.exp(anchors @ negatives.t() / TEMPERATURE).sum(1)
    return -torch.log(positive / (positive + negative)).mean()


def info_nce_by_anchor(anchors: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """Compute the same one anchor at a time, as the formula reads. The step uses the faster one."""
    losses = []
    for anchor, positive in zip(anchors, positives, strict=True):
        near = torch.exp(torch.dot(anchor, positive) / TEMPERATURE)
        far = torch.exp(negatives @ anchor / TEMPERATURE).sum()
        losses.append(-torch.log(near / (near + far)))
    return torch.stack(losses).mean()


def ring_points_from_mask(big: torch.Tensor, small: torch.Tensor, side: int) -> torch.Tensor:
    """Draw (10, 2) XY ring points as published: list and shuffle the ring mask's pixels, take ten."""
    mask = torch.zeros(side, side, dtype=torch.bool, device=big.device)
    (x0, y0, x1, y1), (u0, v0, u1, v1) = (tuple(int(v) for v in box.round()) for box in (big, small))
    mask[y0:y1, x0:x1] = True
    mask[v0:v1, u0:u1] = False
    rows, columns = mask.nonzero(as_tuple=True)
    picked = torch.randperm(len(rows), device=big.device)[:NUM_POINTS]
    return torch.stack([columns[picked], rows[picked]], 1).float() + 0.5


@torch.no_grad()
def average_each(teacher: nn.Module, student: nn.Module) -> None:
    """Update t <- d t + (1 - d) s for every parameter, trained or not, one at a time."""
    for average, source in zip(teacher.parameters(), student.parameters(), strict=True):
        average.data = EMA_DECAY * average.data + (1 - EMA_DECAY) * source.data
