"""Masks without a prompt: segment_anything's automatic mask generation, run through this project's decoder.

A grid of point prompts with three candidates each. Candidates are dropped by predicted IoU, by stability (IoU of the
mask's logits cut a little above and a little below their threshold), at the edge of a crop that is not an edge of the
image, and as duplicates (non-maximum suppression of boxes). Kirillov et al. 2023, arXiv:2304.02643, appendix B.

The same settings as of SamAutomaticMaskGenerator give the same masks, by its own helpers. Two things differ: only masks
that pass the predicted IoU are upscaled, a few at a time, so that memory does not grow with the grid; and small regions
are cleaned with SciPy, as segment_anything's helper needs OpenCV.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from segment_anything.utils.amg import (
    MaskData,
    batched_mask_to_box,
    build_point_grid,
    calculate_stability_score,
    generate_crop_boxes,
    is_box_near_crop_edge,
    uncrop_boxes_xyxy,
    uncrop_points,
)
from torchvision.ops.boxes import batched_nms, box_area

from lesionsam.boxes.geometry import to_model_frame
from lesionsam.formats.rle import from_runs, runs_of
from lesionsam.inference.prediction import LesionPrompt, Prediction, review_reasons
from lesionsam.models.sam import Sam, decode, encode
from lesionsam.models.transforms import model_frames, upscale
from lesionsam.types import Prompts

NUM_UPSCALED = 16  # masks upscaled to the image's size at once, fewer for large images:
MAX_UPSCALED_PIXELS = 32_000_000  # their pixels, all together
EIGHT = np.ones((3, 3), int)  # neighbourhood of small regions: by sides and corners


@dataclass(frozen=True)
class AutoMaskOptions:
    """Settings of `automatic_masks`; names and meaning are those of SamAutomaticMaskGenerator.

    Attributes:
        points_per_side: of the grid. points_per_batch: prompts decoded at once.
        pred_iou_thresh: candidates at or below this predicted IoU are dropped; 0 keeps all.
        stability_score_thresh: candidates below this stability are dropped; 0 keeps all.
        stability_score_offset: by how much the threshold is moved for the stability, logits.
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


AUTO_DEFAULTS = AutoMaskOptions(  # as in the default params.yaml; a test compares
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
    """One mask found without a prompt; only the part in its bounding box is kept.

    Attributes:
        runs: (R,) int64 run lengths of the mask inside its box, see `formats.rle`: masks of a large image are many.
        box: (4,) int64 XYXY, half-open, original pixels.
        size: (H, W) of the image. predicted_iou: SAM's own estimate. stability: in [0, 1].
        point: (2,) float64 XY of the prompt, original pixels. crop_box: (4,) int64 XYXY, half-open.
    """

    runs: np.ndarray
    box: np.ndarray
    size: tuple[int, int]
    predicted_iou: float
    stability: float
    point: np.ndarray
    crop_box: np.ndarray

    @property
    def patch(self) -> np.ndarray:
        """Return the mask inside its box, (h, w) bool."""
        return from_runs(self.runs, int(self.box[3] - self.box[1]), int(self.box[2] - self.box[0]))

    @property
    def mask(self) -> np.ndarray:
        """Return the whole mask, (H, W) bool, original frame."""
        full = np.zeros(self.size, bool)
        x0, y0, x1, y1 = self.box
        full[y0:y1, x0:x1] = self.patch
        return full

    @property
    def area(self) -> int:
        """Return the number of pixels of the mask."""
        return int(self.runs[1::2].sum())


@torch.inference_mode()
def automatic_masks(
    sam: Sam, image: np.ndarray, options: AutoMaskOptions, *, device: torch.device | str = "cpu"
) -> list[AutoMask]:
    """Find every mask of an image, as SamAutomaticMaskGenerator.generate does and in its order.

    Empty masks are dropped whatever the thresholds.

    Args:
        sam: in eval mode, on `device`. image: (H, W, 3) uint8 RGB, original frame.
    """
    size = image.shape[0], image.shape[1]
    crops, layers = generate_crop_boxes(size, options.crop_n_layers, options.crop_overlap_ratio)
    found = MaskData()
    for crop, layer in zip(crops, layers, strict=True):
        found.cat(_masks_in_crop(sam, image, crop, layer, options, device))
    if not dict(found.items()):
        return []
    if len(crops) > 1:
        _suppress(found, 1 / box_area(found["crops"]), options.crop_nms_thresh)
    if options.min_mask_region_area:
        _clean_small_regions(found, size, options)
    half_open = torch.tensor([0, 0, 1, 1])
    return [
        AutoMask(runs, (box + half_open).numpy(), size, predicted, stability, point.numpy(), crop.numpy())
        for runs, box, predicted, stability, point, crop in zip(
            found["runs"],
            found["boxes"],
            found["predicted"].tolist(),
            found["stability"].tolist(),
            found["points"],
            found["crops"],
            strict=True,
        )
    ]


def predict_everything(
    sam: Sam, image: np.ndarray, options: AutoMaskOptions, image_id: str, *, device: torch.device | str = "cpu"
) -> Iterator[Prediction]:
    """Yield all automatic masks of an image as predictions, numbered from 0; see `automatic_masks`."""
    for number, found in enumerate(automatic_masks(sam, image, options, device=device)):
        prompt, mask = LesionPrompt(points=found.point[None], labels=np.ones(1, np.int64)), found.mask
        reasons = review_reasons(mask, prompt, found.predicted_iou, found.stability, math.nan)
        yield Prediction(
            image_id, str(number), mask, prompt, found.predicted_iou, math.nan, found.stability, math.nan, reasons
        )


def _masks_in_crop(
    sam: Sam, image: np.ndarray, crop: list[int], layer: int, options: AutoMaskOptions, device: torch.device | str
) -> MaskData:
    """Return the masks of one crop, without duplicates, in the frame of the whole image; see `_select` for the keys."""
    found = MaskData()
    per_side = int(options.points_per_side / options.crop_n_points_downscale_factor**layer)
    if per_side < 1:
        return found
    x0, y0, x1, y1 = crop
    part = image[y0:y1, x0:x1]
    height, width = part.shape[:2]
    frames, sizes = model_frames([part], sam.frame)
    features = encode(sam, sam.normalize(frames.to(device), sizes.to(device)))
    grid = build_point_grid(per_side) * (width, height)
    framed = torch.as_tensor(to_model_frame(grid, width, height, sam.frame), dtype=torch.float32, device=device)[
        :, None
    ]
    for low in range(0, len(grid), options.points_per_batch):
        points = framed[low : low + options.points_per_batch]
        prompts = Prompts(points, torch.ones(points.shape[:2], dtype=torch.int64, device=device))
        low_res, predicted = decode(sam, features, prompts, multimask=True, rows=[0] * len(points))
        good = torch.ones_like(predicted, dtype=torch.bool)
        if options.pred_iou_thresh > 0:
            good = predicted > options.pred_iou_thresh
        number, candidate = good.nonzero(as_tuple=True)  # number of the point, then of its candidate
        at_once = max(1, min(NUM_UPSCALED, MAX_UPSCALED_PIXELS // (height * width)))
        for begin in range(0, len(number), at_once):
            which = number[begin : begin + at_once], candidate[begin : begin + at_once]
            logits = upscale(low_res[which].float(), (int(sizes[0, 0]), int(sizes[0, 1])), (height, width), sam.frame)
            prompted = torch.from_numpy(grid[low:][which[0].cpu().numpy()])
            found.cat(
                _select(logits, predicted[which].float(), prompted, crop, image.shape[:2], options, sam.mask_threshold)
            )
    if dict(found.items()):
        _suppress(found, found["predicted"], options.box_nms_thresh)
    return found


def _select(
    logits: torch.Tensor,
    predicted: torch.Tensor,
    points: torch.Tensor,
    crop: list[int],
    size: tuple[int, ...],
    options: AutoMaskOptions,
    threshold: float,
) -> MaskData:
    """Keep those of N masks that are stable, not empty and not cut by the crop.

    Args:
        logits: (N, h, w) of the crop. predicted: (N,). points: (N, 2) XY in the crop. crop: XYXY, half-open.
        size: (H, W) of the image. threshold: of the logits.
    Returns:
        runs, a list of run lengths of the masks inside their boxes; boxes (K, 4) int64 XYXY, whose last row and column
        belong to them, as segment_anything's; predicted (K,), stability (K,), points (K, 2), crops (K, 4); all but the
        runs in the frame of the image, on the CPU.
    """
    stability = calculate_stability_score(logits, threshold, options.stability_score_offset).cpu()
    masks = logits > threshold
    boxes = batched_mask_to_box(masks).cpu()
    kept = masks.flatten(1).any(1).cpu() & ~is_box_near_crop_edge(boxes, crop, [0, 0, size[1], size[0]])
    if options.stability_score_thresh > 0:
        kept &= stability >= options.stability_score_thresh
    index = kept.nonzero()[:, 0]
    runs = [
        np.array(runs_of(masks[k, y0 : y1 + 1, x0 : x1 + 1].cpu().numpy()), np.int64)
        for k, (x0, y0, x1, y1) in zip(index.tolist(), boxes[index].tolist(), strict=True)
    ]
    return MaskData(
        runs=runs,
        boxes=uncrop_boxes_xyxy(boxes, crop)[index],
        predicted=predicted.cpu()[index],
        stability=stability[index],
        points=uncrop_points(points, crop)[index],
        crops=torch.tensor(crop).expand(len(index), -1),
    )


def _suppress(found: MaskData, scores: torch.Tensor, threshold: float) -> None:
    """Keep the masks whose boxes survive non-maximum suppression, best first."""
    found.filter(batched_nms(found["boxes"].float(), scores, torch.zeros(len(scores)), threshold))


def _clean_small_regions(found: MaskData, size: tuple[int, int], options: AutoMaskOptions) -> None:
    """Fill small holes, remove small islands, and drop the duplicates that this makes; unchanged masks are preferred.

    Done on the whole (H, W) mask: what is background inside its box may belong to the large background around it.
    """
    unchanged = []
    for k, (runs, (x0, y0, x1, y1)) in enumerate(zip(found["runs"], found["boxes"].tolist(), strict=True)):
        full = np.zeros(size, bool)
        full[y0 : y1 + 1, x0 : x1 + 1] = from_runs(runs, y1 + 1 - y0, x1 + 1 - x0)
        mask = without_small_regions(full, options.min_mask_region_area)
        found["boxes"][k] = batched_mask_to_box(torch.from_numpy(mask))
        x0, y0, x1, y1 = found["boxes"][k].tolist()
        found["runs"][k] = np.array(runs_of(mask[y0 : y1 + 1, x0 : x1 + 1]), np.int64)
        unchanged.append(float(np.array_equal(mask, full)))
    _suppress(found, torch.tensor(unchanged), max(options.box_nms_thresh, options.crop_nms_thresh))


def without_small_regions(mask: np.ndarray, min_area: int) -> np.ndarray:
    """Fill the holes, then remove the islands, of less than `min_area` pixels; the largest island always stays.

    Args:
        mask: (H, W) bool, not empty. Regions are connected by sides and corners. Background at the frame's rim counts
            as a hole too where it is that small, as in segment_anything.
    Returns:
        (H, W) bool.
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
    return filled & kept[islands]
