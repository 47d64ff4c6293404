"""The lesion of an image without a prompt: many masks, a second look at each, the one that looks most like a lesion.

Candidates are the automatic masks of a grid of points that differ from each other, a region by colour alone, and, of a
SAM trained with the prompt kind `none`, the decoder's own answer to no prompt at all. Each is looked at again, prompted
with a box about it, as the decoder knows boxes best; `inference_rank` says which of these answers is the lesion. That
one is looked at a last time from nearer: its surroundings alone fill the model's frame. See
docs/decisions/0022-no-prompt-is-a-prompt.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lesionsam.boxes.geometry import largest_piece_box, loosened, to_model_frame
from lesionsam.inference.auto import AutoOptions, automatic_masks, point_grid, stability_scores
from lesionsam.inference.decode import Answer, Asked, Prediction, reasons
from lesionsam.inference.rank import (
    agreement,
    colour_candidate,
    lesion_scores,
    lesion_signs,
    on_grid,
    overlaps,
    small_picture,
    smoothed_lab,
)
from lesionsam.models.sam import Sam, decode, encode
from lesionsam.models.transforms import model_frames, preprocess
from lesionsam.prompts import NONE, TRAINED_WITH
from lesionsam.types import Prompts

DECODER, MASKS = "decoder", "masks"  # whether the decoder is asked without a prompt too, or the automatic masks alone
CENTRE_SPREAD = 0.3  # of the plausibility: standard deviation of a lesion's middle about the image's, share of a side
LOOSENED = 0.15  # by how much longer than what was found the sides of the second look's box are
# Of the look from nearer, chosen on development images (benchmarks/auto_rank.py, docs/log.md): by how much longer than
# what was found the box's sides are, and how many times its longer side what is shown around it is wide and high.
NEARER_LOOSENED, SURROUNDINGS = 0.2, 1.75
BOX_SURROUNDINGS = 1.35  # the same around a box that was given; chosen on the same images
NUM_LOOKED_AT = 16  # automatic masks that get a second look
SAME = 0.8  # IoU from which two candidates are one
LEAST_AREA, MOST_AREA = 0.003, 0.85  # share of the image that a candidate takes
NOTHING = -10.0  # logit of an image in which no mask was found
# Low-resolution logits (T, T) float32 on the model's device, predicted IoU, agreement of the candidates (NaN: none).
Found = tuple[torch.Tensor, float, float]


def way(metadata: dict[str, str]) -> str:
    """Which way serves weights of this metadata: `DECODER` if they were trained without a prompt, else `MASKS`."""
    return DECODER if NONE in metadata.get(TRAINED_WITH, "").split() else MASKS


@dataclass(frozen=True)
class Candidates:
    """What may be the lesion of one image, M answers of the second look; none of them empty.

    Attributes:
        logits: (M, T, T) float32, on the model's device. predicted: (M,) float32. signs: (M, D), see `lesion_signs`.
        masks: (M, h, w) bool on the comparing grid, see `inference_rank.on_grid`.
    """

    logits: torch.Tensor
    predicted: np.ndarray
    signs: np.ndarray
    masks: np.ndarray


@torch.inference_mode()
def find_lesions(
    sam: Sam,
    features: torch.Tensor,
    frames: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    by: str,
    options: AutoOptions,
) -> list[Found]:
    """The one lesion of each image, no prompt given: the best of its `candidates`, looked at from nearer; an empty mask
    where there is none.

    Args:
        features: (N, C, H', W'). frames: (N, 3, S, S) uint8, the images. sizes: N of (h, w), the image part of the
            model frame. by: `DECODER` or `MASKS`. options: of the automatic masks; their thresholds, crops, duplicates
            and regions do not matter here.
    """
    found: list[Found] = []
    chosen: dict[int, np.ndarray] = {}  # image -> box about its lesion
    for k, size in enumerate(sizes):
        seen = candidates(sam, features[k : k + 1], frames[k].cpu().numpy(), size, by=by, options=options)
        if seen is None:
            found.append(
                (
                    torch.full([4 * length for length in features.shape[-2:]], NOTHING, device=features.device),
                    0.0,
                    math.nan,
                )
            )
        else:
            scores = lesion_scores(seen.signs)
            best = int(scores.argmax())
            found.append((seen.logits[best], float(seen.predicted[best]), agreement(seen.masks, scores)))
            if (box := _box_about(seen.masks[best], size)) is not None:
                chosen[k] = box
    if chosen:
        nearer, quality = look_from_nearer(
            sam, frames[list(chosen)], [sizes[k] for k in chosen], np.stack(list(chosen.values()))
        )
        for k, logits, predicted in zip(chosen, nearer, quality.tolist(), strict=True):
            if bool((logits > sam.mask_threshold).any()):
                found[k] = (logits, predicted, found[k][2])
    return found


@torch.inference_mode()
def look_from_nearer(
    sam: Sam,
    frames: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    boxes: np.ndarray,
    *,
    looseness: float = NEARER_LOOSENED,
    surroundings: float = SURROUNDINGS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What lies in a box of each image: the box's surroundings, cut out and enlarged, are encoded and prompted with it.

    Lesions that are small in the frame are shown as large as the model knows them, and what else the picture holds is
    out of sight.

    Args:
        frames: (N, 3, S, S) uint8. sizes: N of (h, w), the image parts. boxes: (N, 4) XYXY, model frame. looseness:
            by how much longer than these the sides of the prompts are. surroundings: what is shown is so many times as
            wide and high as the box's longer side, as far as the image goes.
    Returns:
        (N, T, T) float32 logits in the whole model frame, `NOTHING` where nothing was shown; (N,) predicted IoU.
    """
    side = int(sam.image_encoder.img_size)
    cut, windows, around = [], [], []
    for frame, size, box in zip(frames, sizes, boxes, strict=True):
        middle, reach = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]).max() * surroundings / 2
        limits = np.array(size[::-1])  # rounded: a box at the image's end may lie beyond them
        low = np.clip(np.floor(middle - reach), 0, limits - 1)
        window = np.concatenate([low, np.clip(np.ceil(middle + reach), low + 1, limits)]).astype(int)
        x0, y0, x1, y1 = window.tolist()
        cut.append(np.ascontiguousarray(frame[:, y0:y1, x0:x1].permute(1, 2, 0).cpu().numpy()))
        windows.append(window)
        around.append((loosened(box, looseness, size) - [x0, y0, x0, y0]) * side / max(x1 - x0, y1 - y0))
    nearer, parts = model_frames(cut, side)
    features = encode(sam, preprocess(nearer.to(frames.device), parts.to(frames.device)))
    prompts = Prompts(boxes=torch.tensor(np.stack(around), dtype=torch.float32, device=frames.device))
    logits, quality = decode(sam, features, prompts)
    placed = [
        _put_back(one[0], window, size, side) for one, window, size in zip(logits.float(), windows, sizes, strict=True)
    ]
    return torch.stack(placed), quality[:, 0].float()


def look_at_boxes(
    sam: Sam, frames: torch.Tensor, sizes: Sequence[tuple[int, int]], boxes: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """`look_from_nearer` at big boxes that were given: prompted with them as they are."""
    return look_from_nearer(sam, frames, sizes, boxes, looseness=0.0, surroundings=BOX_SURROUNDINGS)


def from_nearer(
    sam: Sam,
    frames: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    shapes: Sequence[tuple[int, int]],
    asked: Sequence[Asked],
) -> list[Answer]:
    """Answers to N big boxes, each looked at from nearer.

    Args:
        frames: (N, 3, S, S) uint8. sizes: N of (h, w), the image parts. shapes: N of (H, W), original pixels.
        asked: N with boxes.
    """
    if not asked:
        return []
    side = int(sam.image_encoder.img_size)
    boxes = [
        to_model_frame(one.big, width, height, side)
        for one, (height, width) in zip(asked, shapes, strict=True)
        if one.big is not None
    ]
    logits, predicted = look_at_boxes(sam, frames, sizes, np.stack(boxes))
    return [Answer(one, quality) for one, quality in zip(logits, predicted.tolist(), strict=True)]


def _put_back(logits: torch.Tensor, window: np.ndarray, size: tuple[int, int], side: int) -> torch.Tensor:
    """(T, T) logits of an enlarged window of the model frame -> (T, T) of the whole frame, `NOTHING` beside the window.

    Args:
        window: (4,) XYXY pixels of the frame. size: (h, w), its image part; where the window ends with it, what is
            beyond is as at its end. side: S.
    """
    low, high = window[:2], window[2:]
    shown = side / (high - low).max()  # pixels of the enlarged frame a pixel of the whole one
    centres = (torch.arange(logits.shape[-1], device=logits.device) + 0.5) * side / logits.shape[-1]
    places, inside = [], []
    for axis in (0, 1):
        inner = centres.clamp(float(low[axis]), float(high[axis]))
        places.append((inner - float(low[axis])) * shown * 2 / side - 1)
        before, after = int(low[axis]) > 0, int(high[axis]) < size[1 - axis]
        inside.append(((centres >= low[axis]) | (not before)) & ((centres < high[axis]) | (not after)))
    grid = torch.stack(torch.meshgrid(places[0], places[1], indexing="xy"), -1)
    whole = F.grid_sample(logits[None, None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)
    return torch.where(inside[1][:, None] & inside[0], whole[0, 0], NOTHING)


@torch.inference_mode()
def candidates(
    sam: Sam, features: torch.Tensor, frame: np.ndarray, size: tuple[int, int], *, by: str, options: AutoOptions
) -> Candidates | None:
    """What may be the lesion of one image; None where every mask is empty.

    Args:
        features: (1, C, H', W'). frame: (3, S, S) uint8. size: (h, w) of its image part. by, options: as of
            `find_lesions`.
    """
    picture = small_picture(frame, size)
    shown, small, predicted, stability = _of_grid(sam, features, size, options)
    weights = np.where(small.any((1, 2)), predicted.clip(0, 1) * stability, 0)
    first = [shown[k] for k in _distinct(small, weights * plausibility(torch.from_numpy(small)).numpy())]
    lab = smoothed_lab(picture)
    colour = colour_candidate(lab)
    if colour is not None and LEAST_AREA <= colour.mean() <= MOST_AREA:
        first.append(colour)
    if by == DECODER:
        own = _part(decode(sam, features, Prompts())[0][:, 0], size, sam)[0] > sam.mask_threshold
        first.append(own.cpu().numpy())
    around = []
    for mask in first:
        if (box := _box_about(mask, size)) is not None:
            around.append(loosened(box, LOOSENED, size))
    if not around:
        return None
    prompts = Prompts(boxes=torch.tensor(np.stack(around), dtype=torch.float32, device=features.device))
    low_res, quality = decode(sam, features, prompts, rows=[0] * len(around))
    logits = low_res[:, 0].float()
    masks = _gridded(logits, size, sam)
    kept = masks.flatten(1).any(1).nonzero()[:, 0]
    if not len(kept):
        return None
    logits, masks = logits[kept.to(logits.device)], masks[kept].numpy()
    steady = np.nan_to_num(
        stability_scores(_part(logits, size, sam), sam.mask_threshold, options.stability_score_offset).numpy()
    )
    quality = quality[:, 0].float().cpu().numpy()[kept.numpy()]
    return Candidates(logits, quality, lesion_signs(masks, quality, steady, small, weights, picture, lab), masks)


def _of_grid(
    sam: Sam, features: torch.Tensor, size: tuple[int, int], options: AutoOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All masks of a grid of points, three of each.

    Returns:
        (K, t, u) bool, the image part of the low-resolution masks; (K, h, w) bool, the same on the comparing grid;
        (K,) predicted IoU; (K,) stability.
    """
    grid = torch.as_tensor(point_grid(options.points_per_side) * size[::-1], dtype=torch.float32)[:, None]
    if not len(grid):
        raise ValueError("points_per_side: expected at least 1")
    shown, small, predicted, stability = [], [], [], []
    for points in grid.to(features.device).split(options.points_per_batch):
        prompts = Prompts(points, torch.ones(points.shape[:2], dtype=torch.int64, device=points.device))
        low_res, quality = decode(sam, features, prompts, multimask=True, rows=[0] * len(points))
        logits = low_res.flatten(0, 1).float()
        part = _part(logits, size, sam)
        stability.append(stability_scores(part, sam.mask_threshold, options.stability_score_offset))
        predicted.append(quality.flatten().float().cpu())
        shown.append((part > sam.mask_threshold).cpu())
        small.append(_gridded(logits, size, sam))
    return (
        torch.cat(shown).numpy(),
        torch.cat(small).numpy(),
        torch.cat(predicted).numpy(),
        np.nan_to_num(torch.cat(stability).numpy()),
    )


def _distinct(masks: np.ndarray, scores: np.ndarray) -> list[int]:
    """Indices of at most `NUM_LOOKED_AT` of (K, h, w) bool masks, those of the greatest scores that differ from each
    other and are neither tiny nor everything."""
    areas = masks.mean((1, 2))
    scores = np.where((areas >= LEAST_AREA) & (areas <= MOST_AREA), scores, 0)
    kept: list[int] = []
    for k in np.argsort(-scores, kind="stable"):
        if scores[k] <= 0 or len(kept) == NUM_LOOKED_AT:
            break
        if not kept or overlaps(masks[k : k + 1], masks[kept]).max() < SAME:
            kept.append(int(k))
    return kept


def _part(logits: torch.Tensor, size: tuple[int, int], sam: Sam) -> torch.Tensor:
    """Of (K, T, T) logits those of the image part, a frame of size (h, w)."""
    side = int(sam.image_encoder.img_size)
    height, width = (max(1, round(length * logits.shape[-1] / side)) for length in size)
    return logits[:, :height, :width]


def _gridded(logits: torch.Tensor, size: tuple[int, int], sam: Sam) -> torch.Tensor:
    """(K, T, T) logits to masks on the comparing grid, (K, h, w) bool on the CPU."""
    part = _part(logits, size, sam)[:, None]
    return (F.interpolate(part, on_grid(size), mode="area")[:, 0] > sam.mask_threshold).cpu()


def _box_about(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray | None:
    """The same in the model frame, of a mask of its image part, which has size (h, w)."""
    box = largest_piece_box(mask)
    return None if box is None else box * np.array([size[1] / mask.shape[1], size[0] / mask.shape[0]] * 2)


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
        found.append(
            Prediction(
                image_id,
                str(number),
                mask,
                asked,
                each.predicted_iou,
                math.nan,
                each.stability,
                math.nan,
                reasons(mask, asked, each.predicted_iou, each.stability, math.nan),
            )
        )
    return found
