"""From a decoded mask to a prediction: the mask at the image's own size, its scores, and reasons to review it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from lesionsam.boxes.geometry import box_slices
from lesionsam.inference.parts import num_parts
from lesionsam.metrics import mean_entropy
from lesionsam.models.transforms import upscale
from lesionsam.types import Frame

# When a mask deserves a review. What these thresholds find: docs/log.md, "Predict and export on real images".
LOW_IOU = 0.6  # predicted IoU
LOW_STABILITY = 0.75  # IoU of the masks cut a logit above and a logit below the threshold
LOW_AGREEMENT = 0.8  # of an ensemble's members with their mean; of the candidates where there is no prompt
HIGH_LEAKAGE = 0.15  # share of the mask outside the big box
LOW_COVERAGE = 0.75  # share of the small box, or of the points of label 1, that the mask covers
STABILITY_OFFSET = 1.0  # logits


@dataclass(frozen=True)
class LesionPrompt:
    """The prompt of one lesion, original pixels; without any value it is no prompt.

    Attributes:
        big_box, small_box: (4,) float64 XYXY; small_box is big_box itself where the prompt does not use it.
        points: (N, 2) float64 XY. labels: (N,) int64, 1 lesion, 0 background.
        others: (M, 4) big boxes of the image's other lesions, whose colours the box prior leaves out.
    """

    big_box: np.ndarray | None = None
    small_box: np.ndarray | None = None
    points: np.ndarray | None = None
    labels: np.ndarray | None = None
    others: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))


NO_PROMPT = LesionPrompt()


def with_others(prompts: Sequence[LesionPrompt]) -> list[LesionPrompt]:
    """Tell each prompt of one image the other lesions' big boxes."""
    boxes = [prompt.big_box for prompt in prompts]
    return [
        replace(
            prompt,
            others=np.array([box for n, box in enumerate(boxes) if n != k and box is not None], float).reshape(-1, 4),
        )
        for k, prompt in enumerate(prompts)
    ]


@dataclass(frozen=True)
class DecodedMask:
    """The decoder's output for one lesion.

    Attributes:
        low_res: (T, T) float32 logits, model frame, on the model's device; the members' mean of an ensemble.
        predicted_iou: SAM's own estimate. agreement: mean IoU of an ensemble's members with their mean; without a
            prompt `rank.agreement`; else NaN.
        points, labels: those prompted with, drawn ones included: (N, 2) XY original pixels and (N,), or None.
    """

    low_res: torch.Tensor
    predicted_iou: float
    agreement: float = math.nan
    points: np.ndarray | None = None
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Prediction:
    """One mask with its scores, original frame.

    Attributes:
        image_id, lesion_id: key of the lesion. mask: (H, W) bool. prompt: with the points that were drawn for it.
        predicted_iou: SAM's own estimate. entropy: mean over all pixels, nats, at most 0.693; NaN for automatic masks.
        stability: IoU of the masks cut a logit above and below the threshold. agreement: as of `DecodedMask`.
        review_reasons: why a person should check the mask; empty if there is no reason.
    """

    image_id: str
    lesion_id: str
    mask: np.ndarray
    prompt: LesionPrompt
    predicted_iou: float
    entropy: float
    stability: float
    agreement: float
    review_reasons: tuple[str, ...]

    @property
    def area(self) -> int:
        """Return the number of pixels of the mask."""
        return int(np.count_nonzero(self.mask))


@torch.inference_mode()
def to_prediction(
    decoded: DecodedMask,
    prompt: LesionPrompt,
    *,
    image_id: str,
    lesion_id: str,
    shape: tuple[int, int],
    input_size: tuple[int, int],
    frame: Frame,
    threshold: float = 0.5,
) -> Prediction:
    """Upscale a decoded mask to the image's own size and compute its scores.

    Args:
        shape: (H, W), original pixels. input_size: (h, w) of the image part of the model frame.
        threshold: probability above which a pixel is lesion.
    """
    logits = upscale(decoded.low_res, input_size, shape, frame).cpu().numpy()
    cut = math.log(threshold / (1 - threshold))
    mask = logits > cut
    outer = np.count_nonzero(logits > cut - STABILITY_OFFSET)
    stability = float(np.count_nonzero(logits > cut + STABILITY_OFFSET) / outer) if outer else math.nan
    prompt = replace(prompt, points=decoded.points, labels=decoded.labels)
    return Prediction(
        image_id,
        lesion_id,
        mask,
        prompt,
        decoded.predicted_iou,
        mean_entropy(logits),
        stability,
        decoded.agreement,
        review_reasons(mask, prompt, decoded.predicted_iou, stability, decoded.agreement),
    )


def review_reasons(
    mask: np.ndarray, prompt: LesionPrompt, predicted_iou: float, stability: float, agreement: float
) -> tuple[str, ...]:
    """Return why a person should check a mask, by the thresholds at the top of this module.

    Leakage and coverage count the pixels whose centres lie in a box, as the evaluation does.

    Args:
        mask: (H, W) bool. stability, agreement: NaN if unknown.
    """
    if not mask.any():
        return ("empty",)
    reasons = []
    if predicted_iou < LOW_IOU:
        reasons.append(f"predicted IoU {predicted_iou:.2f} below {LOW_IOU:g}")
    if stability < LOW_STABILITY:
        reasons.append(f"outline uncertain: stability {stability:.2f} below {LOW_STABILITY:g}")
    if agreement < LOW_AGREEMENT:
        which = "candidates for the lesion disagree" if prompt.big_box is None else "jittered boxes disagree"
        reasons.append(f"{which}: {agreement:.2f} below {LOW_AGREEMENT:g}")
    if prompt.big_box is not None:
        inside = mask[box_slices(prompt.big_box, (mask.shape[0], mask.shape[1]))]
        leakage = 1 - np.count_nonzero(inside) / np.count_nonzero(mask)
        if leakage > HIGH_LEAKAGE:
            reasons.append(f"{leakage:.0%} of the mask outside its box")
    elif prompt.points is None and (count := num_parts(mask)) > 1:
        reasons.append(f"{count} separate parts, perhaps as many lesions; give each its box")
    coverage = _coverage(mask, prompt)
    if coverage < LOW_COVERAGE:
        reasons.append(f"only {coverage:.0%} of what must be lesion is in the mask")
    return tuple(reasons)


def _coverage(mask: np.ndarray, prompt: LesionPrompt) -> float:
    """Return the share of the small box, or of the points of label 1, inside the mask; NaN without either."""
    if prompt.small_box is not None and prompt.small_box is not prompt.big_box:
        return float(mask[box_slices(prompt.small_box, (mask.shape[0], mask.shape[1]))].mean())
    if prompt.big_box is None and prompt.points is not None and prompt.labels is not None:
        limits = np.array(mask.shape[::-1]) - 1  # a point may lie on the image's far edge, beyond the last pixel
        columns, rows = np.minimum(prompt.points[prompt.labels == 1].astype(int), limits).T
        return float(mask[rows, columns].mean())
    return math.nan
