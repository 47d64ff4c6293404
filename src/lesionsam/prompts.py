"""SAM prompts from two boxes, for a batch of images, in the model frame.

Kinds: `ring` (points uniform over big box minus small box, all labelled foreground: the published prompt), `centre`
(the small box's centre), `core` (5 points uniform in the small box), `box` (the big box), `box+core` (the big box and
3 core points as ONE prompt). `tight`, the box of a true mask, is for evaluation alone: it leaks the label.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from lesionsam.types import Prompts

KINDS = ("ring", "centre", "box", "core", "box+core")
NUM_CORE_POINTS = 5  # of the kind `core`
NUM_JOINT_POINTS = 3  # of the kind `box+core`


def uniforms_needed(kind: str, num_points: int) -> int:
    """How many uniform numbers per image a kind of prompt consumes."""
    return {
        "ring": 3 * num_points,
        "centre": 0,
        "box": 0,
        "tight": 0,
        "core": 2 * NUM_CORE_POINTS,
        "box+core": 2 * NUM_JOINT_POINTS,
    }[kind]


def prompts_from_uniforms(kind: str, big: torch.Tensor, small: torch.Tensor, uniforms: torch.Tensor) -> Prompts:
    """Turn uniform numbers into one prompt per image.

    Args:
        kind: one of `KINDS`, or `tight`, which reads `big` as the tight box.
        big, small: (B, 4) float32 XYXY, model frame.
        uniforms: (B, uniforms_needed(kind, num_points)) float32 in [0, 1).
    Returns:
        Prompts of B images, all labels 1.
    """
    boxes = big if kind in ("box", "box+core", "tight") else None
    if kind in ("box", "tight"):
        return Prompts(boxes=boxes)
    if kind == "centre":
        points = ((small[:, :2] + small[:, 2:]) / 2)[:, None]
    elif kind == "ring":
        points = ring_points(big, small, uniforms.unflatten(1, (-1, 3)))
    else:
        pairs = uniforms.unflatten(1, (-1, 2))
        points = small[:, None, :2] + pairs * (small[:, None, 2:] - small[:, None, :2])
    return Prompts(
        points=points, labels=torch.ones(points.shape[:2], dtype=torch.int64, device=points.device), boxes=boxes
    )


def ring_points(big: torch.Tensor, small: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Points uniform over the area of big box minus small box, in closed form: no rejection, no mask.

    The ring is cut into four rectangles (left and right of the small box over the full height, above and below it over
    its width); one uniform number picks a rectangle by area, two place the point.

    Args:
        big, small: (B, 4) XYXY, small inside big. uniforms: (B, N, 3) in [0, 1).
    Returns:
        (B, N, 2) XY. Where the ring has no area the points are uniform in the big box.
    """
    x0, y0, x1, y1 = big.unbind(1)
    u0, v0, u1, v1 = torch.maximum(small, big[:, [0, 1, 0, 1]]).minimum(big[:, [2, 3, 2, 3]]).unbind(1)
    rectangles = torch.stack(
        [torch.stack(r, 1) for r in ((x0, y0, u0, y1), (u1, y0, x1, y1), (u0, y0, u1, v0), (u0, v1, u1, y1))], 1
    )  # (B, 4, 4) XYXY
    areas = (rectangles[..., 2] - rectangles[..., 0]) * (rectangles[..., 3] - rectangles[..., 1])
    empty = areas.sum(1) <= 0
    rectangles = torch.where(empty[:, None, None], big[:, None].expand(-1, 4, -1), rectangles)
    areas = torch.where(empty[:, None], torch.ones_like(areas), areas)
    cumulative = areas.cumsum(1) / areas.sum(1, keepdim=True)
    which = torch.searchsorted(cumulative, uniforms[..., 0].contiguous(), right=True).clamp(max=3)  # (B, N)
    picked = rectangles.gather(1, which[..., None].expand(-1, -1, 4))
    return picked[..., :2] + uniforms[..., 1:] * (picked[..., 2:] - picked[..., :2])


def draw_prompts(
    kind: str, big: torch.Tensor, small: torch.Tensor, *, num_points: int, generator: torch.Generator
) -> Prompts:
    """One drawn prompt per image; the generator lives on the CPU so that every device draws the same."""
    uniforms = torch.rand(len(big), uniforms_needed(kind, num_points), generator=generator)
    return prompts_from_uniforms(kind, big, small, uniforms.to(big.device))


def seeded_prompts(
    kind: str, big: torch.Tensor, small: torch.Tensor, ids: Sequence[str], *, num_points: int, seed: int
) -> Prompts:
    """Prompts that depend on (seed, id, kind) alone, never on the order or size of the batch; for evaluation.

    Args:
        ids: B keys "image_id/lesion_id".
    """
    count = uniforms_needed(kind, num_points)
    rows = []
    for key in ids:
        digest = hashlib.sha256(f"{seed}|{kind}|{key}".encode()).digest()
        rows.append(np.random.default_rng(np.frombuffer(digest, np.uint64)).random(count, dtype=np.float32))
    uniforms = torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, count)
    return prompts_from_uniforms(kind, big, small, uniforms.to(big.device))
