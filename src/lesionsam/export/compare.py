"""Compare a reloaded model with ours: the same images and prompts, differences of logits, masks and predicted IoUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lesionsam.data.sources.synthetic import generate
from lesionsam.errors import UserError
from lesionsam.metrics import iou
from lesionsam.utils.images import IMAGE_SUFFIXES, check_image, read_image
from lesionsam.utils.progress import progress

GENERATED = 4  # pictures of the check without --images
GENERATED_SIDE = 320
# Of the largest logit: float32 sums in another order differ by 1e-6 of it, a wrong weight by 1e-1.
TOLERANCE = 1e-3
# Of masks made entirely by the foreign library; pixels with a logit near 0 may fall to either side.
LOWEST_IOU = 0.98


@dataclass(frozen=True)
class Prompt:
    """One prompt in original pixels.

    Attributes:
        box: (4,) XYXY, or None. points: (N, 2) XY, or None. labels: (N,), 1 foreground, 0 background; as many.
    """

    box: np.ndarray | None = None
    points: np.ndarray | None = None
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class PromptOutput:
    """A model's output for one prompt.

    Attributes:
        low_res: (T, T) float32 logits of the single mask, model frame. mask: (H, W) bool, original frame.
        predicted_iou: of that mask.
    """

    low_res: np.ndarray
    mask: np.ndarray
    predicted_iou: float


Picture = Callable[[], np.ndarray]  # loads (H, W, 3) uint8 RGB
Segment = Callable[[np.ndarray, Sequence[Prompt]], list[PromptOutput]]  # (H, W, 3) uint8 RGB and its prompts


@dataclass
class Check:
    """Differences between a reloaded model and ours.

    Attributes:
        num_images, num_prompts: how many. largest_difference: of logits, in the low-resolution frame.
        largest_logit: absolute, of ours. lowest_iou: of masks at the original size; two empty masks agree.
        iou_difference: largest, of predicted IoUs.
    """

    num_images: int = 0
    num_prompts: int = 0
    largest_difference: float = 0.0
    largest_logit: float = 0.0
    lowest_iou: float = 1.0
    iou_difference: float = 0.0

    def add(self, ours: PromptOutput, theirs: PromptOutput) -> None:
        """Add the outputs for one more prompt."""
        if ours.low_res.shape != theirs.low_res.shape or ours.mask.shape != theirs.mask.shape:
            raise UserError(
                f"outputs of shapes {theirs.low_res.shape} and {theirs.mask.shape}, not "
                f"{ours.low_res.shape} and {ours.mask.shape}"
            )
        self.num_prompts += 1
        self.largest_difference = max(self.largest_difference, max_difference(ours.low_res, theirs.low_res))
        self.largest_logit = max(self.largest_logit, float(np.abs(ours.low_res).max()))
        self.lowest_iou = min(self.lowest_iou, float(iou(ours.mask, theirs.mask)))
        self.iou_difference = max(self.iou_difference, max_difference(ours.predicted_iou, theirs.predicted_iou))

    @property
    def faults(self) -> list[str]:
        """Return why this is not the same model; empty if it is."""
        allowed = TOLERANCE * max(1.0, self.largest_logit)
        out = []
        if self.largest_difference > allowed:
            out.append(f"logits differ by {self.largest_difference:.2g}, allowed are {allowed:.2g}")
        if self.iou_difference > TOLERANCE:
            out.append(f"predicted IoUs differ by {self.iou_difference:.2g}, allowed are {TOLERANCE:.2g}")
        if self.lowest_iou < LOWEST_IOU:
            out.append(f"masks agree to an IoU of {self.lowest_iou:.4f}, expected are {LOWEST_IOU}")
        return out


def max_difference(ours: np.ndarray | float, theirs: np.ndarray | float) -> float:
    """Return the largest absolute difference; infinite if it is NaN."""
    difference = float(np.abs(np.subtract(ours, theirs)).max())
    return np.inf if np.isnan(difference) else difference


def check_pictures(folder: Path | None, num_images: int) -> list[Picture]:
    """Return loaders of the images to compare on: of a folder (evenly picked), or generated ones.

    Raises:
        UserError: a folder without images, one of the picked that cannot be read, fewer than one wanted.
    """
    if num_images < 1:
        raise UserError(f"--num-images: expected at least 1, got {num_images}")
    if folder is None:
        return [lambda k=k: generate(0, k, GENERATED_SIDE)[0] for k in range(min(GENERATED, num_images))]
    every = folder.rglob("*") if folder.is_dir() else ()
    found = sorted(path for path in every if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise UserError(f"--images {folder}: expected a folder with images ({', '.join(IMAGE_SUFFIXES)}), found none")
    picked = np.unique(np.linspace(0, len(found) - 1, min(num_images, len(found))).round().astype(int))
    for k in picked:  # now, not once a format is written
        check_image(found[k])
    return [lambda path=found[k]: read_image(path) for k in picked]


def check_prompts(height: int, width: int) -> list[Prompt]:
    """Return a box, a point, a box with a foreground and a background point, and two points; original pixels."""
    frame = np.array([width, height], float)
    box = np.concatenate([0.2 * frame, 0.8 * frame])
    both, labels = np.stack([0.45 * frame, 0.12 * frame]), np.array([1, 0])
    return [
        Prompt(box=box),
        Prompt(points=0.5 * frame[None], labels=np.array([1])),
        Prompt(box=box, points=both, labels=labels),
        Prompt(points=both, labels=labels),
    ]


def with_predictor(predictor: Any) -> Segment:
    """Return a segmenter that uses anything with the methods of segment_anything's SamPredictor."""

    def segment(image: np.ndarray, prompts: Sequence[Prompt]) -> list[PromptOutput]:
        predictor.set_image(image)
        outputs = []
        for prompt in prompts:
            masks, predicted, low_res = predictor.predict(
                point_coords=prompt.points, point_labels=prompt.labels, box=prompt.box, multimask_output=False
            )
            outputs.append(PromptOutput(low_res[0], masks[0], float(predicted[0])))
        return outputs

    return segment


def compare(ours: Segment, theirs: Segment, pictures: Sequence[Picture], title: str) -> Check:
    """Give both segmenters the same prompts and collect their differences."""
    check = Check()
    for read in progress(pictures, total=len(pictures), title=title):
        image = read()
        prompts = check_prompts(*image.shape[:2])
        for mine, yours in zip(ours(image, prompts), theirs(image, prompts), strict=True):
            check.add(mine, yours)
        check.num_images += 1
    return check
