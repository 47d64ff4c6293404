"""The lesion of an image without a prompt, in two ways, and all automatic masks as predictions.

By the decoder: a SAM trained with the prompt kind `none` answers no prompt at all with the lesion. By masks: of the
automatic masks of any SAM the one of the greatest score, predicted IoU x stability x plausibility, is the lesion. Which
way serves a file of weights, its metadata say. Either way a second look follows, prompted with a box about what the
first one found. See docs/decisions/0022-no-prompt-is-a-prompt.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from lesionsam.inference_answers import Asked, Prediction, reasons
from lesionsam.inference_auto import AutoOptions, automatic_masks, point_grid, stability_scores
from lesionsam.models.sam import Sam, decode
from lesionsam.prompts import NONE, TRAINED_WITH
from lesionsam.types import Prompts

DECODER, MASKS = "decoder", "masks"  # the two ways
CENTRE_SPREAD = 0.3  # of the plausibility: standard deviation of a lesion's middle about the image's, share of a side
LOOSENED = 0.15  # by how much longer than what was found the sides of the second look's box are
Found = tuple[torch.Tensor, float]  # low-resolution logits (T, T) float32 on the model's device, predicted IoU


def way(metadata: dict[str, str]) -> str:
    """Which way serves weights of this metadata: `DECODER` if they were trained without a prompt, else `MASKS`."""
    return DECODER if NONE in metadata.get(TRAINED_WITH, "").split() else MASKS


@torch.inference_mode()
def find_lesions(
    sam: Sam, features: torch.Tensor, sizes: Sequence[tuple[int, int]], *, by: str, options: AutoOptions
) -> list[Found]:
    """The one lesion of each image, no prompt given: `first_look`, then `look_again`.

    Args:
        features: (N, C, H', W'). sizes: N of (h, w), the image part of the model frame.
        by: `DECODER` or `MASKS`. options: of the automatic masks; crops, duplicates and regions do not matter to the
            best of them.
    """
    return look_again(sam, features, first_look(sam, features, sizes, by=by, options=options), sizes)


@torch.inference_mode()
def first_look(
    sam: Sam, features: torch.Tensor, sizes: Sequence[tuple[int, int]], *, by: str, options: AutoOptions
) -> list[Found]:
    """What the decoder says without a prompt, or the best automatic mask; arguments as of `find_lesions`."""
    if by == MASKS:
        return [_best_mask(sam, one[None], size, options) for one, size in zip(features, sizes, strict=True)]
    low_res, predicted = decode(sam, features, Prompts())
    return list(zip(low_res[:, 0].float(), predicted[:, 0].tolist(), strict=True))


@torch.inference_mode()
def look_again(
    sam: Sam, features: torch.Tensor, first: Sequence[Found], sizes: Sequence[tuple[int, int]]
) -> list[Found]:
    """Prompt with a box about what was found, as an annotator would draw it: the decoder knows boxes best.

    The box is that of the mask's largest piece, every side moved outwards by `LOOSENED` of the half side, cut at the
    image. An empty mask stays as it is.

    Args:
        features, sizes: as in `find_lesions`. first: what was found, of the same N images.
    """
    side = int(sam.image_encoder.img_size)
    boxes: dict[int, np.ndarray] = {}
    for k, ((logits, _), (height, width)) in enumerate(zip(first, sizes, strict=True)):
        scale = side / len(logits)
        shown = (logits > sam.mask_threshold)[: max(1, round(height / scale)), : max(1, round(width / scale))]
        if (box := largest_piece_box(shown.cpu().numpy())) is not None:
            boxes[k] = loosened(box * scale, LOOSENED, (height, width))
    if not boxes:
        return list(first)
    rows = list(boxes)
    framed = torch.tensor(np.stack(list(boxes.values())), dtype=torch.float32, device=features.device)
    low_res, predicted = decode(sam, features, Prompts(boxes=framed), rows=rows)
    again = dict(zip(rows, zip(low_res[:, 0].float(), predicted[:, 0].tolist(), strict=True), strict=True))
    return [again.get(k, answer) for k, answer in enumerate(first)]


def largest_piece_box(mask: np.ndarray) -> np.ndarray | None:
    """(4,) float64 XYXY, half-open, of a mask's largest piece (pixels that share a side); None of an empty mask.

    Args:
        mask: (h, w) bool.
    """
    pieces, count = ndimage.label(mask)
    if not count:
        return None
    largest = 1 + int(np.bincount(pieces.ravel())[1:].argmax())
    rows, columns = ndimage.find_objects(pieces)[largest - 1]
    return np.array([columns.start, rows.start, columns.stop, rows.stop], float)


def loosened(box: np.ndarray, share: float, size: tuple[int, int]) -> np.ndarray:
    """A (4,) XYXY box with sides 1 + `share` times as long about the same middle, cut at a frame of size (h, w)."""
    middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * (1 + share)
    limits = np.array(size[::-1], float)
    return np.concatenate([np.clip(middle - half, 0, limits), np.clip(middle + half, 0, limits)])


def _best_mask(sam: Sam, features: torch.Tensor, size: tuple[int, int], options: AutoOptions) -> Found:
    """The candidate of the greatest score among those that pass the thresholds; among all, where none does."""
    side = int(sam.image_encoder.img_size)
    grid = torch.as_tensor(point_grid(options.points_per_side) * size[::-1], dtype=torch.float32)[:, None]
    best: tuple[bool, float] | None = None
    answer = None
    for low in range(0, len(grid), options.points_per_batch):
        points = grid[low : low + options.points_per_batch].to(features.device)
        prompts = Prompts(points, torch.ones(points.shape[:2], dtype=torch.int64, device=points.device))
        low_res, predicted = decode(sam, features, prompts, multimask=True, rows=[0] * len(points))
        logits, quality = low_res.flatten(0, 1).float(), predicted.flatten().float().cpu()
        height, width = (max(1, round(length * logits.shape[-1] / side)) for length in size)
        logits_there = logits[:, :height, :width]
        stability = torch.nan_to_num(stability_scores(logits_there, sam.mask_threshold, options.stability_score_offset))
        score = quality * stability * plausibility(logits_there > sam.mask_threshold)
        passed = (quality > options.pred_iou_thresh) & (stability >= options.stability_score_thresh) & (score > 0)
        chosen = int(torch.where(passed, score + score.abs().max() + 1, score).argmax())
        rank = bool(passed[chosen]), float(score[chosen])
        if best is None or rank > best:
            best, answer = rank, (logits[chosen], float(quality[chosen]))
    if answer is None:
        raise ValueError("points_per_side: expected at least 1")
    return answer


def plausibility(masks: torch.Tensor) -> torch.Tensor:
    """How likely a mask of a dermoscopic image is its lesion, by where it lies: lesions are photographed in the middle.

    exp(-r^2 / (2 s^2)) (1 - e)^2, r the distance of the mask's centroid from the image's middle in shares of width and
    height, s = `CENTRE_SPREAD`; e the share of the image's rim that the mask covers, as stickers and shadows do.

    Args:
        masks: (N, h, w) bool.
    Returns:
        (N,) float32 in [0, 1] on the CPU; 0 for an empty mask.
    """
    heights, widths = masks.shape[1:]
    area = masks.flatten(1).sum(1).float()
    rows = masks.sum(2).float() @ torch.arange(heights, device=masks.device, dtype=torch.float32)
    columns = masks.sum(1).float() @ torch.arange(widths, device=masks.device, dtype=torch.float32)
    y, x = ((total / area.clamp(min=1) + 0.5) / length - 0.5 for total, length in ((rows, heights), (columns, widths)))
    rim = sum(line.sum(1).float() for line in (masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]))
    inside = 1 - rim / (2 * (heights + widths))
    return (torch.exp(-(x**2 + y**2) / (2 * CENTRE_SPREAD**2)) * inside**2 * (area > 0)).cpu()


def masks_of(
    sam: Sam, image: np.ndarray, options: AutoOptions, image_id: str, *, device: torch.device | str = "cpu"
) -> list[Prediction]:
    """All automatic masks of an image as predictions, numbered from 0; see `automatic_masks`."""
    found = []
    for number, each in enumerate(automatic_masks(sam, image, options, device=device)):
        asked, mask = Asked(points=each.point[None], labels=np.ones(1, np.int64)), each.mask
        found.append(Prediction(image_id, str(number), mask, asked, each.predicted_iou, math.nan, each.stability,
                                math.nan, reasons(mask, asked, each.predicted_iou, each.stability, math.nan)))
    return found
