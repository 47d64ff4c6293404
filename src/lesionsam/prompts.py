"""SAM prompts from two boxes or from masks, for a batch of images, in the model frame.

Kinds: `ring` (points uniform over big box minus small box, all labelled foreground: the published prompt), `centre`
(the small box's centre), `core` (5 points uniform in the small box), `box` (the big box), `box+core` (in training the
big box and 3 core points as ONE prompt; in predictions the big box's mask fused with the box prior, see
`inference.fusion`). `none` is no prompt at all: a decoder that was trained so finds the lesion by itself.
`zoom` is the big box on an enlarged crop, see `inference.zoom`. `tight`, the box of a true mask, is for evaluation
alone: it leaks the label.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from lesionsam.parallel.collectives import rank_any
from lesionsam.parallel.draws import Draws, rand
from lesionsam.types import KINDS as KINDS  # defined there, so that options are checked without torch
from lesionsam.types import NONE, Prompts, to_device
from lesionsam.types import POINTS as POINTS
from lesionsam.utils.random import keyed_rng

BOTH = "box+core"  # both boxes
ZOOM = "zoom"  # the big box, its surroundings enlarged to the whole model frame; evaluation and prediction
TRAINED_WITH = "prompts"  # metadata of a weights file: the kinds it was trained with, parted by blanks
NUM_CORE_POINTS = 5  # of the kind `core`
NUM_JOINT_POINTS = 3  # of the kind `box+core`


def uniforms_needed(kind: str, num_points: int) -> int:
    """Return how many uniform numbers per image a kind of prompt consumes."""
    return {
        "ring": 3 * num_points,
        NONE: 0,
        "centre": 0,
        "box": 0,
        "tight": 0,
        "core": 2 * NUM_CORE_POINTS,
        "box+core": 2 * NUM_JOINT_POINTS,
    }[kind]


def prompts_from_uniforms(kind: str, big: torch.Tensor, small: torch.Tensor, uniforms: torch.Tensor) -> Prompts:
    """Turn uniform numbers into one prompt per image.

    Args:
        kind: one of `KINDS`, `none`, or `tight`, which reads `big` as the tight box.
        big, small: (B, 4) float32 XYXY, model frame.
        uniforms: (B, uniforms_needed(kind, num_points)) float32 in [0, 1).
    Returns:
        Prompts of B images, all labels 1.
    """
    if kind == NONE:
        return Prompts()
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
    """Place points uniformly over big box minus small box, in closed form: no rejection, no mask.

    The ring is cut into four rectangles (left and right of the small box over the full height, above and below it over
    its width); one uniform number picks a rectangle by area, two place the point.

    Args:
        big, small: (B, 4) XYXY, small inside big. uniforms: (B, N, 3) in [0, 1).
    Returns:
        (B, N, 2) XY. Where the ring has no area the points are uniform in the big box.
    """
    x0, y0, x1, y1 = big.unbind(1)
    inner = torch.clamp(small.unflatten(1, (2, 2)), big[:, None, :2], big[:, None, 2:])  # (B, 2, 2), the two corners
    (u0, v0), (u1, v1) = (corner.unbind(1) for corner in inner.unbind(1))
    edges = (x0, y0, u0, y1, u1, y0, x1, y1, u0, y0, u1, v0, u0, v1, u1, y1)  # left, right, above, below
    rectangles = torch.stack(edges, 1).unflatten(1, (4, 4))  # (B, 4, 4) XYXY
    cumulative = (rectangles[..., 2:] - rectangles[..., :2]).prod(-1).cumsum(1)  # areas
    total = cumulative[:, 3:]
    which = torch.searchsorted(cumulative, uniforms[..., 0] * total, right=True).clamp(max=3)  # (B, N)
    picked = rectangles.gather(1, which[..., None].expand(-1, -1, 4))
    picked = torch.where(total[..., None] > 0, picked, big[:, None])
    return picked[..., :2] + uniforms[..., 1:] * (picked[..., 2:] - picked[..., :2])


def draw_prompts(kind: str, big: torch.Tensor, small: torch.Tensor, *, num_points: int, generator: Draws) -> Prompts:
    """Draw one prompt per image; the generator is on the CPU, so that every device draws the same."""
    uniforms = rand(generator, len(big), uniforms_needed(kind, num_points))
    return prompts_from_uniforms(kind, big, small, to_device(uniforms, big.device))


def seeded_prompts(
    kind: str, big: torch.Tensor, small: torch.Tensor, ids: Sequence[str], *, num_points: int, seed: int
) -> Prompts:
    """Draw prompts that depend on (seed, id, kind) alone, not on the order or size of the batch; for evaluation.

    Args:
        ids: B keys "image_id/lesion_id".
    """
    count = uniforms_needed(kind, num_points)
    rows = [keyed_rng(f"{seed}|{kind}|{key}").random(count, dtype=np.float32) for key in ids]
    uniforms = torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, count)
    return prompts_from_uniforms(kind, big, small, to_device(uniforms, big.device))


# ---- from masks ------------------------------------------------------------------------------------------------------

PADDING = -1  # label of a padding point, as in segment_anything: every image of a batch keeps its own number of points


def tight_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Return bounding boxes, (B, S, S) bool -> (B, 4) float32 XYXY, half-open; the whole frame for an empty mask."""
    side = masks.shape[-1]
    axis = torch.arange(side, device=masks.device)
    edges = []
    for occupied in (masks.any(1), masks.any(2)):  # columns, rows
        low = torch.where(occupied, axis, side).amin(1)
        high = torch.where(occupied, axis + 1, 0).amax(1)
        empty = high == 0
        edges.append((torch.where(empty, 0, low), torch.where(empty, side, high)))
    (x0, x1), (y0, y1) = edges
    return torch.stack([x0, y0, x1, y1], 1).float()


def points_in(regions: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw pixels uniformly over a region, without rejection.

    Args:
        regions: (B, S, S) bool. uniforms: (B, N) in [0, 1).
    Returns:
        (B, N, 2) float32 XY of pixels, whole numbers; (0, 0) where a region is empty.
    """
    side = regions.shape[-1]
    before = regions.flatten(1).cumsum(1)  # number of the region's pixels up to and with this one
    wanted = (uniforms * before[:, -1:]).long() + 1
    index = torch.searchsorted(before, wanted.minimum(before[:, -1:])).clamp(max=side * side - 1)
    return torch.stack([index % side, index // side], -1).float()


def prompts_from_masks(
    kind: str,
    masks: torch.Tensor,
    valid: torch.Tensor,
    sizes: torch.Tensor,
    fallback: torch.Tensor,
    *,
    box_jitter: float,
    max_points: int,
    point_jitter: float,
    negative: float,
    generator: Draws,
) -> Prompts:
    """Draw one prompt per image from its true mask, as a person who sees the lesion might give it.

    Args:
        kind: `box` (the mask's bounding box, each side moved), `points` (1 to `max_points` in the mask, each moved, and
            beside them, with probability `negative`, one outside), or `box+points` (both as ONE prompt).
        masks: (B, S, S) bool, model frame. valid: (B, S, S) bool, where a point outside may lie.
        sizes: (B, 2) int64, height and width of the image part.
        fallback: (B, 4) XYXY: the box, and its centre the one point, of an image whose mask is empty.
        box_jitter: each side moves by up to this share of its extent, below 0.5. point_jitter: pixels, along x and y.
        generator: on the CPU, so that every device draws the same.
    Returns:
        Prompts of B images; those with fewer points than others are filled up with points of label -1.
    """

    def drawn(*shape: int) -> torch.Tensor:
        return to_device(rand(generator, len(masks), *shape), masks.device)

    empty, frame = ~masks.flatten(1).any(1, keepdim=True), sizes.flip(1).float()
    tight = torch.where(empty, fallback, tight_boxes(masks))
    boxes = None
    if kind != "points":
        extent = (tight[:, 2:] - tight[:, :2]).repeat(1, 2)
        boxes = torch.minimum((tight + extent * box_jitter * (2 * drawn(4) - 1)).clamp(min=0), frame.repeat(1, 2))
    if kind == "box":
        return Prompts(boxes=boxes)
    points = points_in(masks, drawn(max_points)) + point_jitter * (2 * drawn(max_points, 2) - 1)
    points = torch.where(empty[..., None], ((tight[:, :2] + tight[:, 2:]) / 2)[:, None], points)
    number = torch.where(empty, 1, (drawn(1) * max_points).long() + 1)
    labels = torch.where(torch.arange(max_points, device=masks.device) < number, 1, PADDING)
    background = valid & ~masks
    has_negative = (drawn(1) < negative) & background.flatten(1).any(1, keepdim=True) & ~empty
    points = torch.cat([points, points_in(background, drawn(1))], 1)
    labels = torch.cat([labels, torch.where(has_negative, 0, PADDING)], 1)
    used = rank_any((labels != PADDING).any(0))  # waits for a GPU; but padding points would take part in the attention
    points = torch.minimum(points.clamp(min=0), frame[:, None] - 1)
    return Prompts(points[:, used], labels[:, used], boxes)


def with_correction(
    prompts: Prompts, logits: torch.Tensor, masks: torch.Tensor, valid: torch.Tensor, generator: Draws
) -> Prompts:
    """Add one click where the predicted mask is wrong, and its logits as mask prompt.

    SAM's interactive training (Kirillov et al. 2023, arXiv:2304.02643, appendix A): the click is uniform over the error
    region, foreground where the lesion was missed, background where it was left.

    Args:
        logits: (B, T, T) of the mask so far. masks, valid: (B, S, S) bool, model frame; nothing outside `valid` counts
            as wrong.
    Returns:
        Prompts of B images; an image without an error gets a point of label -1.
    """
    side = masks.shape[-1]
    mask = F.interpolate(logits[:, None].float(), (side, side), mode="bilinear", align_corners=False)[:, 0] > 0
    wrong = (mask != masks) & valid
    uniforms = to_device(rand(generator, len(masks), 1), masks.device)
    click = points_in(wrong, uniforms)
    column, row = click[:, 0].long().unbind(1)
    truth = masks[torch.arange(len(masks), device=masks.device), row, column].long()
    label = torch.where(wrong.flatten(1).any(1), truth, PADDING)[:, None]
    points = click if prompts.points is None else torch.cat([prompts.points, click], 1)
    labels = label if prompts.labels is None else torch.cat([prompts.labels, label], 1)
    return Prompts(points, labels, prompts.boxes, logits[:, None].detach().float())
