"""Masks without a prompt: segment_anything's automatic mask generation, run through this project's decoder.

A grid of point prompts with three candidates each; candidates are dropped by predicted IoU, by stability (IoU of the
mask's logits cut a little above and a little below their threshold), where they touch the edge of a crop that is not an
edge of the image, and as duplicates (non-maximum suppression of boxes). Kirillov et al. 2023, arXiv:2304.02643,
appendix B. The same settings as SamAutomaticMaskGenerator give the same masks; only what survives the predicted IoU is
ever enlarged, and a few at a time, so that memory does not grow with the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product

import numpy as np
import torch
from scipy import ndimage
from torchvision.ops.boxes import batched_nms, box_area

from lesionsam.boxes.geometry import to_model_frame
from lesionsam.models.sam import Sam, decode, encode
from lesionsam.models.transforms import model_frames, preprocess, upscale
from lesionsam.types import Prompts

EDGE_PIXELS = 20  # a mask's box this near to a crop's edge counts as cut by it; segment_anything's own number
NUM_ENLARGED = 16  # masks enlarged to the image's size at once
EIGHT = np.ones((3, 3), int)  # neighbourhood of the regions that are too small


@dataclass(frozen=True)
class AutoOptions:
    """Settings of `automatic_masks`; names and meaning are those of SamAutomaticMaskGenerator.

    Attributes:
        points_per_side: of the grid. points_per_batch: prompts decoded at once.
        pred_iou_thresh: candidates at or below this predicted IoU are dropped; 0 keeps all.
        stability_score_thresh: candidates below this stability are dropped; 0 keeps all.
        stability_score_offset: by how much the threshold is moved to find the stability, logits.
        box_nms_thresh: of two masks of one crop whose boxes' IoU exceeds this, the better stays.
        crop_n_layers: layers of crops; layer i has 4^i crops, layer 0 is the image.
        crop_nms_thresh: the same as box_nms_thresh between crops; the mask of the smaller crop stays.
        crop_overlap_ratio: of the crops of layer 1, share of the image's shorter side.
        crop_n_points_downscale_factor: the grid of layer i has points_per_side / factor^i points a side.
        min_mask_region_area: holes and islands smaller than this are filled and removed, original pixels; 0 = none.
    """

    points_per_side: int
    points_per_batch: int
    pred_iou_thresh: float
    stability_score_thresh: float
    stability_score_offset: float
    box_nms_thresh: float
    crop_n_layers: int
    crop_nms_thresh: float
    crop_overlap_ratio: float
    crop_n_points_downscale_factor: int
    min_mask_region_area: int


AUTO = AutoOptions(  # as in the default params.yaml; a test compares
    points_per_side=8,
    points_per_batch=64,
    pred_iou_thresh=0.7,
    stability_score_thresh=0.7,
    stability_score_offset=1.0,
    box_nms_thresh=0.7,
    crop_n_layers=0,
    crop_nms_thresh=0.7,
    crop_overlap_ratio=0.3413,
    crop_n_points_downscale_factor=1,
    min_mask_region_area=0,
)


@dataclass(frozen=True)
class AutoMask:
    """One mask found without a prompt; only its bounding box's part is kept.

    Attributes:
        patch: (h, w) bool, the mask inside its box. box: (4,) int64 XYXY, half-open, original pixels.
        size: (H, W) of the image. predicted_iou: SAM's own estimate. stability: in [0, 1].
        point: (2,) float64 XY of the prompt, original pixels. crop_box: (4,) int64 XYXY, half-open.
    """

    patch: np.ndarray
    box: np.ndarray
    size: tuple[int, int]
    predicted_iou: float
    stability: float
    point: np.ndarray
    crop_box: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool, original frame."""
        full = np.zeros(self.size, bool)
        x0, y0, x1, y1 = self.box
        full[y0:y1, x0:x1] = self.patch
        return full

    @property
    def area(self) -> int:
        """Pixels of the mask."""
        return int(np.count_nonzero(self.patch))


@dataclass(frozen=True)
class _Found:
    """N candidates of one image. Boxes are XYXY whose last row and column belong to them, as segment_anything's."""

    patches: list[np.ndarray]
    boxes: torch.Tensor  # (N, 4) int64
    predicted: torch.Tensor  # (N,)
    stability: torch.Tensor  # (N,)
    points: torch.Tensor  # (N, 2) float64
    crops: torch.Tensor  # (N, 4) int64

    def __getitem__(self, index: torch.Tensor) -> _Found:
        chosen = index.tolist()
        rest = [getattr(self, field.name)[index] for field in fields(self)[1:]]
        return _Found([self.patches[k] for k in chosen], *rest)


def _cat(parts: Sequence[_Found]) -> _Found:
    rest = [torch.cat([getattr(part, field.name) for part in parts]) for field in fields(_Found)[1:]]
    return _Found([patch for part in parts for patch in part.patches], *rest)


@torch.inference_mode()
def automatic_masks(
    sam: Sam, image: np.ndarray, options: AutoOptions, *, device: torch.device | str = "cpu"
) -> list[AutoMask]:
    """Every mask of an image, as SamAutomaticMaskGenerator.generate finds them and in its order.

    An empty mask is no mask: it is dropped whatever the thresholds.

    Args:
        sam: in eval mode, on `device`. image: (H, W, 3) uint8 RGB, original frame.
    """
    size = image.shape[0], image.shape[1]
    crops = crop_boxes(size, options.crop_n_layers, options.crop_overlap_ratio)
    found = _cat([_in_crop(sam, image, crop, layer, options, device) for crop, layer in crops])
    if len(crops) > 1:
        found = found[_suppress(found.boxes, 1 / box_area(found.crops), options.crop_nms_thresh)]
    if options.min_mask_region_area:
        found = _without_small_regions(found, size, options)
    half_open = torch.tensor([0, 0, 1, 1])
    return [
        AutoMask(patch, (box + half_open).numpy(), size, predicted, stability, point.numpy(), crop.numpy())
        for patch, box, predicted, stability, point, crop in zip(
            found.patches,
            found.boxes,
            found.predicted.tolist(),
            found.stability.tolist(),
            found.points,
            found.crops,
            strict=True,
        )
    ]


def point_grid(points_per_side: int) -> np.ndarray:
    """(n^2, 2) float64 XY in (0, 1): the middles of n x n equal cells, row by row."""
    steps = (np.arange(points_per_side) + 0.5) / points_per_side
    return np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)


def crop_boxes(size: tuple[int, int], num_layers: int, overlap_ratio: float) -> list[tuple[np.ndarray, int]]:
    """The image and its crops, 4^i of them in layer i, as segment_anything cuts them.

    Args:
        size: (H, W). overlap_ratio: of layer 1, share of the shorter side; halved from layer to layer.
    Returns:
        ((4,) int64 XYXY half-open, layer) of each.
    """
    height, width = size
    boxes = [(np.array([0, 0, width, height]), 0)]
    for layer in range(1, num_layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / count))
        w, h = (math.ceil((overlap * (count - 1) + length) / count) for length in (width, height))
        for column, row in product(range(count), repeat=2):
            x0, y0 = (w - overlap) * column, (h - overlap) * row
            boxes.append((np.array([x0, y0, min(x0 + w, width), min(y0 + h, height)]), layer))
    return boxes


def _in_crop(
    sam: Sam, image: np.ndarray, crop: np.ndarray, layer: int, options: AutoOptions, device: torch.device | str
) -> _Found:
    """Candidates of one crop, without duplicates, in the frame of the whole image."""
    x0, y0, x1, y1 = crop.tolist()
    part = image[y0:y1, x0:x1]
    height, width = part.shape[:2]
    side = int(sam.image_encoder.img_size)
    frames, sizes = model_frames([part], side)
    features = encode(sam, preprocess(frames.to(device), sizes.to(device)))
    per_side = int(options.points_per_side / options.crop_n_points_downscale_factor**layer)
    grid = point_grid(per_side) * (width, height)
    framed = torch.as_tensor(to_model_frame(grid, width, height, side), dtype=torch.float32, device=device)[:, None]
    parts = [_nothing()]
    for low in range(0, len(grid), options.points_per_batch):
        points = framed[low : low + options.points_per_batch]
        prompts = Prompts(points, torch.ones(points.shape[:2], dtype=torch.int64, device=device))
        low_res, predicted = decode(sam, features, prompts, multimask=True, rows=[0] * len(points))
        good = torch.ones_like(predicted, dtype=torch.bool)
        if options.pred_iou_thresh > 0:
            good = predicted > options.pred_iou_thresh
        number, candidate = good.nonzero(as_tuple=True)  # number of the point, then of its candidate
        for begin in range(0, len(number), NUM_ENLARGED):
            which = number[begin : begin + NUM_ENLARGED], candidate[begin : begin + NUM_ENLARGED]
            logits = upscale(low_res[which].float(), (int(sizes[0, 0]), int(sizes[0, 1])), (height, width), side)
            parts.append(
                _sound(
                    logits,
                    predicted[which].float(),
                    torch.from_numpy(grid[low:][which[0].cpu().numpy()]),
                    crop,
                    (image.shape[0], image.shape[1]),
                    options,
                    threshold=sam.mask_threshold,
                )
            )
    found = _cat(parts)
    return found[_suppress(found.boxes, found.predicted, options.box_nms_thresh)]


def _nothing() -> _Found:
    none = torch.zeros(0)
    return _Found(
        [],
        torch.zeros(0, 4, dtype=torch.int64),
        none,
        none,
        torch.zeros(0, 2, dtype=torch.float64),
        torch.zeros(0, 4, dtype=torch.int64),
    )


def _sound(
    logits: torch.Tensor,
    predicted: torch.Tensor,
    points: torch.Tensor,
    crop: np.ndarray,
    size: tuple[int, int],
    options: AutoOptions,
    *,
    threshold: float,
) -> _Found:
    """Those of N masks that are stable, not empty and not cut by the crop.

    Args:
        logits: (N, h, w) of the crop. predicted: (N,). points: (N, 2) XY in the crop. size: (H, W) of the image.
        threshold: of the logits.
    """
    stability = stability_scores(logits, threshold, options.stability_score_offset)
    masks = logits > threshold
    boxes = mask_boxes(masks)
    shift = torch.tensor([*crop[:2], *crop[:2]])
    whole = boxes + shift
    kept = masks.flatten(1).any(1).cpu() & ~near_crop_edge(whole, torch.from_numpy(crop), size)
    if options.stability_score_thresh > 0:
        kept &= stability >= options.stability_score_thresh
    index = kept.nonzero()[:, 0]
    patches = [
        masks[k, y0 : y1 + 1, x0 : x1 + 1].cpu().numpy()
        for k, (x0, y0, x1, y1) in zip(index.tolist(), boxes[index].tolist(), strict=True)
    ]
    return _Found(
        patches,
        whole[index],
        predicted.cpu()[index],
        stability[index],
        (points + shift[:2])[index],
        torch.from_numpy(crop).expand(len(index), -1),
    )


def stability_scores(logits: torch.Tensor, threshold: float, offset: float) -> torch.Tensor:
    """(N, h, w) logits -> (N,) float32 on the CPU: IoU of the masks cut at threshold + offset and threshold - offset;
    NaN where both are empty."""
    inner, outer = ((logits > threshold + sign * offset).flatten(1).sum(1) for sign in (1, -1))
    return (inner / outer).float().cpu()


def mask_boxes(masks: torch.Tensor) -> torch.Tensor:
    """(N, h, w) bool -> (N, 4) int64 XYXY on the CPU: first and last column and row of each; zeros where empty."""
    columns, rows = masks.any(1).cpu().numpy(), masks.any(2).cpu().numpy()
    ends = [(line.argmax(1), line.shape[1] - 1 - line[:, ::-1].argmax(1)) for line in (columns, rows)]
    (x0, x1), (y0, y1) = ends
    boxes = np.where(rows.any(1, keepdims=True), np.stack([x0, y0, x1, y1], 1), 0)
    return torch.from_numpy(boxes.astype(np.int64).reshape(-1, 4))


def near_crop_edge(boxes: torch.Tensor, crop: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(N,) bool: boxes (N, 4) with a side within `EDGE_PIXELS` of the crop's that is not as near to the image's."""
    frame = torch.tensor([0, 0, size[1], size[0]])
    return (((boxes - crop).abs() <= EDGE_PIXELS) & ((boxes - frame).abs() > EDGE_PIXELS)).any(1)


def _suppress(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Indices of the boxes that stay, best first."""
    return batched_nms(boxes.float(), scores, torch.zeros(len(boxes)), threshold)


def _without_small_regions(found: _Found, size: tuple[int, int], options: AutoOptions) -> _Found:
    """Small holes filled, small islands removed, and duplicates that this makes; unchanged masks are preferred.

    Done on the whole (H, W) mask: what is background inside its box may belong to the large background around it.
    """
    patches, boxes, scores = [], found.boxes.clone(), []
    for k, (patch, (x0, y0, x1, y1)) in enumerate(zip(found.patches, found.boxes.tolist(), strict=True)):
        full = np.zeros(size, bool)
        full[y0 : y1 + 1, x0 : x1 + 1] = patch
        mask, changed = without_small_regions(full, options.min_mask_region_area)
        boxes[k] = mask_boxes(torch.from_numpy(mask[None]))[0]
        x0, y0, x1, y1 = boxes[k].tolist()
        patches.append(mask[y0 : y1 + 1, x0 : x1 + 1].copy())
        scores.append(float(not changed))
    cleaned = _Found(patches, boxes, found.predicted, found.stability, found.points, found.crops)
    threshold = max(options.box_nms_thresh, options.crop_nms_thresh)
    return cleaned[_suppress(boxes, torch.tensor(scores), threshold)]


def without_small_regions(mask: np.ndarray, min_area: int) -> tuple[np.ndarray, bool]:
    """Fill the holes, then remove the islands, of less than `min_area` pixels; the largest island always stays.

    Args:
        mask: (H, W) bool, not empty; regions hang together by sides and corners. Background at the frame's rim counts
            as a hole too where it is that small, as segment_anything has it.
    Returns:
        (the mask, whether anything changed).
    """
    holes, _ = ndimage.label(~mask, EIGHT)
    small = np.bincount(holes.ravel()) < min_area
    small[0] = False
    filled = mask | small[holes]
    islands, _ = ndimage.label(filled, EIGHT)
    sizes = np.bincount(islands.ravel())
    kept = sizes >= min_area
    kept[0] = False
    if not kept.any():
        kept[1 + int(sizes[1:].argmax())] = True
    result = filled & kept[islands]
    return result, bool((result != mask).any())
