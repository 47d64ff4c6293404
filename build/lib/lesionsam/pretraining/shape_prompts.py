"""What the compact SAM is asked about generated shapes: targets with boxes and priors, and prompts drawn from them.

Boxes are XYXY, points XY, both float32 in pixels of the S x S image; mask prompts are logits on the 4H' x 4W' grid.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from lesionsam.boxes.prior import box_prior
from lesionsam.pretraining.shapes import generate_shapes
from lesionsam.prompts import tight_boxes
from lesionsam.types import Prompts

CHUNK = 48  # images generated at once
CORE_SCALES = torch.linspace(0.55, 0.05, 11)  # tried from the largest until the core lies inside the object
OUTSIDE_LOGIT = -3.0  # the box prior's value where it is certain of background


@dataclass(frozen=True)
class Targets:
    """B objects to be asked for, one image each.

    Attributes:
        images: (B, 3, S, S) uint8 RGB. sizes: (B, 2) int64, height and width of the part that is image.
        masks: (B, S, S) bool. big, small: (B, 4) a loose box and one inside the object.
        priors: (B, T, T) float32, box-prior logits of big and small.
    """

    images: Tensor
    sizes: Tensor
    masks: Tensor
    big: Tensor
    small: Tensor
    priors: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Targets:
        return Targets(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @staticmethod
    def join(parts: list[Targets]) -> Targets:
        """All objects of all parts, in order."""
        return Targets(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Targets)})


def make_targets(side: int, grid: int, generator: torch.Generator, num_images: int = CHUNK) -> Targets:
    """Generate images and list their usable objects with boxes and box priors; grid is T."""
    shapes = generate_shapes(num_images, side, generator)
    image_index, object_index = shapes.usable.nonzero(as_tuple=True)
    images, masks = shapes.images[image_index], shapes.masks[image_index, object_index]
    big = loosen(tight_boxes(masks), side, generator)
    small = core_boxes(masks, generator)
    keep = (small[:, 2] > small[:, 0]).nonzero()[:, 0]
    images, masks, big, small = images[keep], masks[keep], big[keep], small[keep]
    priors = np.stack(
        [
            box_prior(image, one_big, one_small)
            for image, one_big, one_small in zip(
                images.permute(0, 2, 3, 1).numpy(), big.numpy(), small.numpy(), strict=True
            )
        ]
    )
    return Targets(
        images,
        torch.full((len(images), 2), side),
        masks,
        big,
        small,
        F.adaptive_avg_pool2d(torch.from_numpy(priors).float(), grid),
    )


def loosen(boxes: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Boxes as people draw them: half of them 5-25 % too large, half anything from tight to 50 %; cut at the frame."""
    num = len(boxes)
    usual = torch.rand(num, 1, generator=generator) < 0.5
    draw = torch.rand(num, 2, generator=generator)
    grown = 1 + torch.where(usual, 0.05 + 0.2 * draw, -0.03 + 0.53 * draw)
    extent = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + extent * 0.06 * (torch.rand(num, 2, generator=generator) - 0.5)
    return torch.cat([centre - extent * grown / 2, centre + extent * grown / 2], 1).clamp(0, side)


def core_boxes(masks: Tensor, generator: torch.Generator) -> Tensor:
    """(B, S, S) bool -> (B, 4): around each deepest point, the largest of some boxes that lies wholly inside.

    An object too thin for the smallest gets a box without area.
    """
    num, side, _ = masks.shape
    depth = np.stack([ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] for mask in masks.numpy()])
    deepest = torch.from_numpy(depth.reshape(num, -1).argmax(1))
    centre = torch.stack([deepest % side, deepest // side], 1) + 0.5
    tight = tight_boxes(masks)
    extent = (tight[:, 2:] - tight[:, :2]) * (0.85 + 0.3 * torch.rand(num, 2, generator=generator))
    integral = F.pad(masks.double().cumsum(1).cumsum(2), (1, 0, 1, 0))
    rows = torch.arange(num)
    result = torch.cat([centre, centre], 1)
    found = torch.zeros(num, dtype=torch.bool)
    for scale in CORE_SCALES:
        low = (centre - extent * scale / 2).floor().long().clamp(0, side)
        high = (centre + extent * scale / 2).ceil().long().clamp(0, side)
        covered = (
            integral[rows, high[:, 1], high[:, 0]]
            - integral[rows, low[:, 1], high[:, 0]]
            - integral[rows, high[:, 1], low[:, 0]]
            + integral[rows, low[:, 1], low[:, 0]]
        )
        fits = (covered == (high - low).prod(1)) & ~found
        result[fits] = torch.cat([low, high], 1)[fits].float()
        found |= fits
    return result


def augment(batch: Targets, generator: torch.Generator) -> Targets:
    """One flip or quarter turn and one order of the colour channels for the batch; some images padded as SAM pads."""
    side = batch.images.shape[-1]
    flip_x, flip_y, swap = torch.rand(3, generator=generator) < 0.5
    images, masks, priors = batch.images, batch.masks, batch.priors
    big, small = batch.big.clone(), batch.small.clone()
    for wanted, axis, low, high in ((flip_x, -1, 0, 2), (flip_y, -2, 1, 3)):
        if wanted:
            images, masks, priors = images.flip(axis), masks.flip(axis), priors.flip(axis)
            for boxes in (big, small):
                boxes[:, [low, high]] = side - boxes[:, [high, low]]
    if swap:
        images, masks, priors = images.transpose(-1, -2), masks.transpose(-1, -2), priors.transpose(-1, -2)
        big, small = big[:, [1, 0, 3, 2]], small[:, [1, 0, 3, 2]]
    images = images[:, torch.randperm(3, generator=generator)]
    return pad(Targets(images, batch.sizes, masks, big, small, priors), generator)


def pad(batch: Targets, generator: torch.Generator) -> Targets:
    """Cut two thirds of the images to a landscape or portrait part, keeping most of the object; the rest is padding."""
    num, side = len(batch), batch.images.shape[-1]
    tight = tight_boxes(batch.masks)
    least = torch.maximum(tight[:, 2:] - 0.25 * (tight[:, 2:] - tight[:, :2]), batch.small[:, 2:]).ceil()
    share = 0.6 + 0.4 * torch.rand(num, generator=generator)
    which = torch.randint(0, 3, (num,), generator=generator)  # 0 none, 1 width, 2 height
    cut = torch.stack([which == 1, which == 2], 1)
    limit = torch.where(cut, torch.maximum((share * side)[:, None], least), side).round().clamp(max=side)  # (B, 2) x, y
    axis = torch.arange(side)
    valid = (axis < limit[:, :1])[:, None, :] & (axis < limit[:, 1:])[:, :, None]
    coarse = F.adaptive_avg_pool2d(valid.float(), batch.priors.shape[-1]) > 0.5
    corner = limit.repeat(1, 2)
    return replace(
        batch,
        images=batch.images * valid[:, None],
        sizes=limit.flip(1).long(),
        masks=batch.masks & valid,
        big=torch.minimum(batch.big, corner),
        small=torch.minimum(batch.small, corner),
        priors=torch.where(coarse, batch.priors, OUTSIDE_LOGIT),
    )


def points_in(regions: Tensor, num_points: int, generator: torch.Generator) -> Tensor:
    """(B, S, S) bool -> (B, N, 2) float32 XY, uniform over each region; over the frame where it is empty."""
    side = regions.shape[-1]
    index = torch.multinomial(regions.flatten(1).float() + 1e-9, num_points, replacement=True, generator=generator)
    return torch.stack([index % side, index // side], -1).float()


def points_in_boxes(boxes: Tensor, num_points: int, generator: torch.Generator) -> Tensor:
    """(B, 4) -> (B, N, 2) float32 XY, uniform over each box."""
    share = torch.rand(len(boxes), num_points, 2, generator=generator)
    return boxes[:, None, :2] + share * (boxes[:, None, 2:] - boxes[:, None, :2])


def box_prompts(batch: Targets, generator: torch.Generator) -> Prompts:
    """A loose box, in a third of the calls with 1 to 5 points in the core."""
    boxes = torch.minimum(
        loosen(tight_boxes(batch.masks), batch.masks.shape[-1], generator), batch.sizes.flip(1).repeat(1, 2)
    )
    if torch.rand((), generator=generator) < 0.35:
        points = points_in_boxes(batch.small, int(torch.randint(1, 6, (), generator=generator)), generator)
        return Prompts(points, torch.ones(points.shape[:2], dtype=torch.long), boxes)
    return Prompts(boxes=boxes)


def point_prompts(batch: Targets, generator: torch.Generator) -> Prompts:
    """Points alone: one in the core (40 %), one anywhere on the object, several, or several with background."""
    kind = torch.rand((), generator=generator)
    if kind < 0.4:
        points = points_in_boxes(batch.small, 1, generator)
    elif kind < 0.55:
        points = points_in(batch.masks, 1, generator)
    else:
        points = points_in(batch.masks, int(torch.randint(2, 11, (), generator=generator)), generator)
    labels = torch.ones(points.shape[:2], dtype=torch.long)
    if kind >= 0.8:
        outside = points_in(~batch.masks, int(torch.randint(1, 6, (), generator=generator)), generator)
        points = torch.cat([points, outside], 1)
        labels = torch.cat([labels, torch.zeros(outside.shape[:2], dtype=torch.long)], 1)
    return Prompts(points, labels)


def prior_prompts(batch: Targets, generator: torch.Generator) -> Prompts:
    """The box prior as mask prompt, its slope varied, with its big box, core points or both."""
    num = len(batch)
    slope = torch.exp(torch.rand(num, 1, 1, 1, generator=generator) * 1.5 - 0.4)  # 0.67 to 3
    masks = batch.priors[:, None] * slope
    kind = torch.rand((), generator=generator)
    if kind < 0.6:
        return Prompts(boxes=batch.big, masks=masks)
    points = points_in_boxes(batch.small, int(torch.randint(1, 6, (), generator=generator)), generator)
    labels = torch.ones(points.shape[:2], dtype=torch.long)
    return Prompts(points, labels, batch.big if kind < 0.85 else None, masks)


def correction_prompts(batch: Targets, earlier: Tensor, boxes: Tensor | None, generator: torch.Generator) -> Prompts:
    """SAM's second round: the earlier logits (B, 1, T, T) as mask prompt and one point where they are wrong.

    An image without an error gets a point in its core.
    """
    side = batch.masks.shape[-1]
    guess = F.interpolate(earlier, size=(side, side), mode="bilinear", align_corners=False)[:, 0] > 0
    wrong = guess != batch.masks
    points = torch.where(
        wrong.flatten(1).any(1)[:, None, None],
        points_in(wrong, 1, generator),
        points_in_boxes(batch.small, 1, generator),
    )
    column, row = points[:, 0].long().clamp(0, side - 1).unbind(1)
    labels = batch.masks[torch.arange(len(batch)), row, column].long()[:, None]
    return Prompts(points, labels, boxes, earlier)
