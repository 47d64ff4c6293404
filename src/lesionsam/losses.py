"""Loss terms, batched over images and computed in fp32 under any autocast; each returns one value per image.

Shapes: y, logits (B, T, T) on SAM's low-resolution grid; m, soft targets (B, T, T) in [0, 1]; w, weights (B, T, T)
>= 0, zero where a pixel does not count (padding, other lesions).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

EPSILON = 1e-6
RULED_OUT = -1e30  # logit of what does not count; finite, so that a row of nothing else has gradient 0 and not NaN
FOCAL_GAMMA, FOCAL_ALPHA = 2.0, 0.25  # Lin et al. 2017, arXiv:1708.02002, table 1b; SAM's too
# Name in params.yaml -> its terms and their weights. focal_dice: 20 to 1, as SAM was trained (arXiv:2304.02643, A).
MASK_LOSSES: Mapping[str, Mapping[str, float]] = {
    "dice_bce": {"bce": 2.0, "dice": 1.0},
    "dice": {"dice": 1.0},
    "bce": {"bce": 1.0},
    "focal": {"focal": 1.0},
    "focal_dice": {"focal": 20.0, "dice": 1.0},
}


def binary_entropy(logits: torch.Tensor) -> torch.Tensor:
    """Return H(sigmoid(y)) = softplus(y) - y sigmoid(y), nats, elementwise; exact where p log p would be 0 * inf."""
    y = logits.float()
    return F.softplus(y) - y * torch.sigmoid(y)


def weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean over all but the first axis, (B, ...) -> (B,); 0 if all weights of an image are 0."""
    total = weights.flatten(1).sum(1)
    return (values * weights).flatten(1).sum(1) / total.clamp(min=EPSILON)


def bce(y: torch.Tensor, m: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return the binary cross entropy with soft targets (B,), a weighted mean over pixels."""
    return weighted_mean(F.binary_cross_entropy_with_logits(y.float(), m.float(), reduction="none"), w)


def dice(y: torch.Tensor, m: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return 1 - (2 sum(w p m) + 1) / (sum(w p) + sum(w m) + 1), (B,), p = sigmoid(y) (Milletari et al. 2016)."""
    p = torch.sigmoid(y.float())
    intersection = (w * p * m).flatten(1).sum(1)
    return 1 - (2 * intersection + 1) / ((w * p).flatten(1).sum(1) + (w * m).flatten(1).sum(1) + 1)


def focal(y: torch.Tensor, m: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return the focal loss (B,), the weighted mean of a_t (1 - p_t)^2 CE (Lin et al. 2017, arXiv:1708.02002, eq. 5).

    With m in [0, 1] both classes count by their share: a m (1 - p)^2 (-log p) + (1 - a) (1 - m) p^2
    (-log(1 - p)), a = 0.25 the lesion's; for m of 0 and 1 it is the paper's formula.
    """
    y, m = y.float(), m.float()
    p = torch.sigmoid(y)
    lesion = FOCAL_ALPHA * m * (1 - p) ** FOCAL_GAMMA * F.softplus(-y)
    background = (1 - FOCAL_ALPHA) * (1 - m) * p**FOCAL_GAMMA * F.softplus(y)
    return weighted_mean(lesion + background, w)


MASK_TERMS = {"bce": bce, "dice": dice, "focal": focal}


def soft_mask_loss(y: torch.Tensor, m: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return 2 BCE + Dice (B,), the loss of the pseudo-mask term and the default of the supervised method."""
    weights = MASK_LOSSES["dice_bce"]
    return weights["bce"] * bce(y, m, w) + weights["dice"] * dice(y, m, w)


def hard_iou(y: torch.Tensor, m: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return the IoU (B,) of (y > 0) and (m > 0.5) on pixels with w > 0; 1 if both are empty. No gradient."""
    use = w > 0
    prediction, truth = (y > 0) & use, (m > 0.5) & use
    union = (prediction | truth).flatten(1).sum(1)
    return torch.where(
        union > 0,
        (prediction & truth).flatten(1).sum(1) / union.clamp(min=1),
        torch.ones_like(union, dtype=torch.float32),
    )


def projection_loss(
    y: torch.Tensor, misses_big: tuple[torch.Tensor, torch.Tensor], crosses_core: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Return the two-box tightness (after BoxInst, arXiv:2012.02310, with two boxes instead of one).

    With p = sigmoid(y), the maximum of p over a column or row that misses the big box must be 0, over one that crosses
    the core must be 1; those between are free.

    Args:
        y: (B, T, T) logits.
        misses_big, crosses_core: each (columns (B, T), rows (B, T)) bool.
    Returns:
        (B,): mean binary cross entropy over the constrained columns and rows.
    """
    total, count = 0.0, 0.0
    for axis, miss, cross in ((1, misses_big[0], crosses_core[0]), (2, misses_big[1], crosses_core[1])):
        maximum = y.float().amax(axis)  # sigmoid is monotone: the maximum of p is the sigmoid of the maximum of y
        value = F.softplus(maximum) * miss + F.softplus(-maximum) * cross
        total, count = total + value.sum(1), count + (miss | cross).sum(1)
    return total / torch.as_tensor(count).clamp(min=1)


def info_nce(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    anchor_valid: torch.Tensor,
    negative_valid: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Return InfoNCE (arXiv:1807.03748): -log(e^(a.p/t) / (e^(a.p/t) + sum_n e^(a.n/t))), one logsumexp in fp32.

    Args:
        anchors, positives: (B, P, D) unit vectors; the i-th positive belongs to the i-th anchor.
        negatives: (B, N, D) unit vectors, or (1, N, D) shared by all images.
        anchor_valid: (B, P) bool. negative_valid: (B, N) bool; an image without a valid negative contributes 0.
        temperature: t > 0.
    Returns:
        (B,): mean over the image's valid anchors; 0 where there are none.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        a, p, n = anchors.float() / temperature, positives.float(), negatives.float()
        ruled_out = torch.where(negative_valid, 0.0, RULED_OUT)[..., None]
        # (B, P): ln sum_n e^(a.n/t); without any negatives it stays in the graph, with gradient 0
        far: Any = LogSumExp.apply(a, n, ruled_out) if n.shape[1] else 0 * a.sum(-1) + RULED_OUT
        loss = F.softplus(far - (a * p).sum(-1))
    return weighted_mean(loss, anchor_valid.float())


class LogSumExp(torch.autograd.Function):
    """Compute ln sum_n e^(a.n + r_n), (B, P, D), (B or 1, N, D) and (B or 1, N, 1) -> (B, P).

    Same as torch's, but faster: the scores of all pairs are written once and turned into weights in place, and the
    backward pass consists of two matrix products.
    """

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, n: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        """Return the logarithm of the sum; r, which has no gradient, is one more channel of the product."""
        weights = torch.cat([a, torch.ones_like(a[..., :1])], -1) @ torch.cat([n, r.expand(*n.shape[:2], 1)], -1).mT
        greatest = weights.amax(-1, keepdim=True)
        weights.sub_(greatest).exp_()
        total = weights.sum(-1, keepdim=True)
        ctx.save_for_backward(weights, total, a, n)
        return (total.log() + greatest)[..., 0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Return the gradients of a and n."""
        weights, total, a, n = ctx.saved_tensors
        scaled = grad[..., None] / total
        d_a = (weights @ n) * scaled if ctx.needs_input_grad[0] else None
        d_n = (weights.mT @ (a * scaled)).sum_to_size(n.shape) if ctx.needs_input_grad[1] else None
        return d_a, d_n, None


def sample_pixels(candidates: torch.Tensor, count: int, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample up to `count` distinct pixels per image, uniformly among the candidates.

    Args:
        candidates: (B, N) bool. uniforms: (B, N) in [0, 1), one key per pixel.
    Returns:
        index (B, K) int64 and valid (B, K) bool with K = min(count, N).
    """
    keys = torch.where(candidates, uniforms + 1, torch.zeros_like(uniforms))
    chosen = keys.topk(min(count, candidates.shape[1]), dim=1)
    return chosen.indices, chosen.values > 0.5


def drop_unused(index: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop the columns that are valid for no image; on the CPU only.

    On a GPU the host would have to wait for the number of columns, which costs more than computing the rest.

    Args:
        index: (B, K) int64. valid: (B, K) bool.
    """
    if valid.device.type != "cpu":
        return index, valid
    used = valid.any(0)
    return index[:, used], valid[:, used]
