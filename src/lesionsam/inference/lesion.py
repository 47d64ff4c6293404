"""The lesion of an image without a prompt: candidates, each decoded again with a box, the likeliest of them, zoomed.

Candidates are the distinct automatic masks of a grid of points, a region by colour alone, and, for a SAM trained with
the prompt kind `none`, the decoder's own mask without a prompt. Each gets a second decoding with the box around it, as
the decoder knows boxes best, and `inference.rank` chooses among the results. The chosen one is decoded a last time,
zoomed. See docs/decisions/0022-no-prompt-is-a-prompt.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.utils.amg import build_point_grid, calculate_stability_score

from lesionsam.boxes.geometry import largest_component_box, loosen
from lesionsam.inference.auto import AUTO_DEFAULTS, AutoMaskOptions
from lesionsam.inference.prediction import DecodedMask
from lesionsam.inference.rank import (
    agreement,
    colour_candidate,
    lesion_scores,
    lesion_signs,
    on_grid,
    small_picture,
    smoothed_lab,
)
from lesionsam.inference.zoom import BACKGROUND_LOGIT, decode_zoomed
from lesionsam.metrics import iou_matrix
from lesionsam.models.sam import Sam, decode
from lesionsam.models.transforms import image_part
from lesionsam.prompts import NONE, TRAINED_WITH
from lesionsam.types import Prompts

CENTRE_SPREAD = 0.3  # of the plausibility: standard deviation of a lesion's centre about the image's, share of a side
LOOSENESS = 0.15  # share by which the box of the second decoding is longer than the candidate
# Of the zoom, chosen on development images (benchmarks/auto_rank.py, docs/log.md): looseness of its box, and the side
# of the crop in multiples of the chosen mask's longer side.
ZOOM_LOOSENESS, ZOOM_SURROUNDINGS = 0.2, 1.75
MAX_CANDIDATES = 16  # automatic masks that get a second decoding
SAME_IOU = 0.8  # IoU from which two candidates count as one
MIN_AREA, MAX_AREA = 0.003, 0.85  # share of the image that a candidate covers


@dataclass(frozen=True)
class LesionSearch:
    """How the lesion of an image is found without a prompt.

    Attributes:
        decode_without_prompt: whether the decoder's own mask without a prompt is one more candidate.
        auto: of the automatic masks; its thresholds, crops, suppression and regions do not matter here.
    """

    decode_without_prompt: bool = False
    auto: AutoMaskOptions = AUTO_DEFAULTS


def trained_without_prompt(metadata: dict[str, str]) -> bool:
    """Return whether the metadata of a weights file say that it was trained with the prompt kind `none`."""
    return NONE in metadata.get(TRAINED_WITH, "").split()


@dataclass(frozen=True)
class Candidates:
    """M candidates for the lesion of one image after their second decoding; none of them is empty.

    Attributes:
        logits: (M, T, T) float32, on the model's device. predicted_ious: (M,) float32.
        signs: (M, D), see `lesion_signs`. masks: (M, h, w) bool on the comparison grid, see `rank.on_grid`.
    """

    logits: torch.Tensor
    predicted_ious: np.ndarray
    signs: np.ndarray
    masks: np.ndarray


@torch.inference_mode()
def find_lesions(
    sam: Sam, features: torch.Tensor, frames: torch.Tensor, sizes: Sequence[tuple[int, int]], *, search: LesionSearch
) -> list[DecodedMask]:
    """Find the one lesion of each image without a prompt: the likeliest of its `candidates`, zoomed.

    Args:
        features: (N, C, H', W'). frames: (N, 3, S, S) uint8, the images. sizes: N of (h, w), their image parts.
    Returns:
        N masks, with the agreement of the candidates; an empty one where there is no candidate.
    """
    found: list[DecodedMask] = []
    boxes: dict[int, np.ndarray] = {}  # image -> box around its lesion
    for k, size in enumerate(sizes):
        seen = candidates(sam, features[k : k + 1], frames[k].cpu().numpy(), size, search=search)
        if seen is None:
            shape = [4 * length for length in features.shape[-2:]]
            found.append(DecodedMask(torch.full(shape, BACKGROUND_LOGIT, device=features.device), 0.0))
            continue
        scores = lesion_scores(seen.signs)
        best = int(scores.argmax())
        found.append(DecodedMask(seen.logits[best], float(seen.predicted_ious[best]), agreement(seen.masks, scores)))
        if (box := _framed_box(seen.masks[best], size)) is not None:
            boxes[k] = box
    if boxes:
        zoomed, predicted = decode_zoomed(
            sam,
            frames[list(boxes)],
            [sizes[k] for k in boxes],
            np.stack(list(boxes.values())),
            looseness=ZOOM_LOOSENESS,
            surroundings=ZOOM_SURROUNDINGS,
        )
        for k, logits, predicted_iou in zip(boxes, zoomed, predicted.tolist(), strict=True):
            if bool((logits > sam.mask_threshold).any()):
                found[k] = DecodedMask(logits, predicted_iou, found[k].agreement)
    return found


@torch.inference_mode()
def candidates(
    sam: Sam, features: torch.Tensor, frame: np.ndarray, size: tuple[int, int], *, search: LesionSearch
) -> Candidates | None:
    """Collect the candidates for the lesion of one image; None if every mask is empty.

    Args:
        features: (1, C, H', W'). frame: (3, S, S) uint8. size: (h, w) of its image part.
    """
    picture, side = small_picture(frame, size), sam.side
    shown, small, predicted, stability = _grid_masks(sam, features, size, search.auto)
    weights = np.where(small.any((1, 2)), predicted.clip(0, 1) * stability, 0)
    first = [shown[k] for k in _distinct(small, weights * plausibility(torch.from_numpy(small)).numpy())]
    lab = smoothed_lab(picture)
    colour = colour_candidate(lab)
    if colour is not None and MIN_AREA <= colour.mean() <= MAX_AREA:
        first.append(colour)
    if search.decode_without_prompt:
        own = image_part(decode(sam, features, Prompts())[0][0, 0], size, side) > sam.mask_threshold
        first.append(own.cpu().numpy())
    boxes = [loosen(box, LOOSENESS, size) for mask in first if (box := _framed_box(mask, size)) is not None]
    if not boxes:
        return None
    prompts = Prompts(boxes=torch.tensor(np.stack(boxes), dtype=torch.float32, device=features.device))
    low_res, second = decode(sam, features, prompts, rows=[0] * len(boxes))
    logits = low_res[:, 0].float()
    masks = _on_comparison_grid(logits, size, sam)
    kept = masks.flatten(1).any(1).nonzero()[:, 0]
    if not len(kept):
        return None
    logits, masks = logits[kept.to(logits.device)], masks[kept].numpy()
    steady = np.nan_to_num(_stability(image_part(logits, size, side), sam, search.auto).numpy())
    predicted = second[:, 0].float().cpu().numpy()[kept.numpy()]
    return Candidates(logits, predicted, lesion_signs(masks, predicted, steady, small, weights, picture, lab), masks)


def _grid_masks(
    sam: Sam, features: torch.Tensor, size: tuple[int, int], options: AutoMaskOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Decode a grid of points, three masks each.

    Returns:
        (K, t, u) bool, the image part of the low-resolution masks; (K, h, w) bool, the same on the comparison grid;
        (K,) predicted IoU; (K,) stability.
    """
    if options.points_per_side < 1:
        raise ValueError(f"points_per_side: expected at least 1, got {options.points_per_side}")
    grid = torch.as_tensor(build_point_grid(options.points_per_side) * size[::-1], dtype=torch.float32)[:, None]
    side = sam.side
    shown, small, predicted, stability = [], [], [], []
    for points in grid.to(features.device).split(options.points_per_batch):
        prompts = Prompts(points, torch.ones(points.shape[:2], dtype=torch.int64, device=points.device))
        low_res, ious = decode(sam, features, prompts, multimask=True, rows=[0] * len(points))
        logits = low_res.flatten(0, 1).float()
        part = image_part(logits, size, side)
        stability.append(_stability(part, sam, options))
        predicted.append(ious.flatten().float().cpu())
        shown.append((part > sam.mask_threshold).cpu())
        small.append(_on_comparison_grid(logits, size, sam))
    return (
        torch.cat(shown).numpy(),
        torch.cat(small).numpy(),
        torch.cat(predicted).numpy(),
        np.nan_to_num(torch.cat(stability).numpy()),
    )


def _stability(logits: torch.Tensor, sam: Sam, options: AutoMaskOptions) -> torch.Tensor:
    """Return SAM's stability score of (K, h, w) logits, (K,) float32 on the CPU; NaN where both masks are empty."""
    return calculate_stability_score(logits, sam.mask_threshold, options.stability_score_offset).cpu()


def _distinct(masks: np.ndarray, scores: np.ndarray) -> list[int]:
    """Return indices of at most `MAX_CANDIDATES` of (K, h, w) bool masks, by score, that differ from each other and are
    neither tiny nor nearly the whole image."""
    areas = masks.mean((1, 2))
    scores = np.where((areas >= MIN_AREA) & (areas <= MAX_AREA), scores, 0)
    kept: list[int] = []
    for k in np.argsort(-scores, kind="stable"):
        if scores[k] <= 0 or len(kept) == MAX_CANDIDATES:
            break
        if not kept or iou_matrix(masks[k : k + 1], masks[kept]).max() < SAME_IOU:
            kept.append(int(k))
    return kept


def _on_comparison_grid(logits: torch.Tensor, size: tuple[int, int], sam: Sam) -> torch.Tensor:
    """Average (K, T, T) logits onto the comparison grid and threshold them: (K, h, w) bool on the CPU."""
    part = image_part(logits, size, sam.side)[:, None]
    return (F.interpolate(part, on_grid(size), mode="area")[:, 0] > sam.mask_threshold).cpu()


def _framed_box(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray | None:
    """Return `largest_component_box` in the model frame, for an (h', w') mask of its image part of size (h, w)."""
    box = largest_component_box(mask)
    return None if box is None else box * np.array([size[1] / mask.shape[1], size[0] / mask.shape[0]] * 2)


def plausibility(masks: torch.Tensor) -> torch.Tensor:
    """Return how likely masks of a dermoscopic image are its lesion by their place: lesions are photographed centred.

    exp(-r^2 / (2 s^2)) (1 - e)^2, r the distance of the mask's centroid from the image's centre in shares of width and
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
