"""Evaluate a model: one row per lesion and prompt source, measured at the image's original size.

Without true masks the columns that need none remain: agreement between prompts, core coverage, leakage, entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch

from lesionsam import metrics
from lesionsam.evaluation.cases import Case, LoadImage, LoadMask, Request, measure, predict_cases, upscaled
from lesionsam.evaluation.columns import JITTER_COLUMNS, LEAKING, ROW_COLUMNS, Evaluation, calibration_frame, long_frame
from lesionsam.inference.decode import DecodeOptions
from lesionsam.models.sam import Sam
from lesionsam.prompts import NONE, ZOOM
from lesionsam.types import Sample

JITTER_PROMPTS = ("box", "box+core")


def evaluate_model(
    sam: Sam,
    samples: Sequence[Sample],
    load_image: LoadImage,
    load_mask: LoadMask | None = None,
    *,
    prompts: Sequence[str],
    seed: int,
    batch_size: int,
    num_points: int,
    device: torch.device | str = "cpu",
    boundary_tolerance: float = metrics.BOUNDARY_TOLERANCE,
    jitter: Sequence[float] = (),
    decoding: DecodeOptions | None = None,
    model: str = "model",
    run: str = "0",
) -> Evaluation:
    """Evaluate one model.

    Args:
        load_image: sample -> (H, W, 3) uint8 RGB. load_mask: sample -> (H, W) bool or None; None where no mask exists.
        prompts: prompt sources, each a row per lesion. seed: of drawn prompts and jitter; draws depend on seed, lesion
            and prompt alone, so that every model gets the same prompts.
        boundary_tolerance: of boundary F1, share of the diagonal. jitter: shares of the jitter curve (needs masks).
        decoding: what the weights say of their use, see `DecodeOptions.of_metadata`. model, run: names in the tables.
    """
    wanted = [(prompt, 0.0) for prompt in prompts]
    jittered = (
        [(prompt, float(share)) for share in jitter for prompt in JITTER_PROMPTS] if load_mask is not None else []
    )
    requests: list[Request] = list(dict.fromkeys(wanted + jittered))
    rows: list[dict[str, object]] = []
    curve: list[dict[str, object]] = []
    sums: dict[tuple[str, str], metrics.Calibration] = {}
    for case, masks in predict_cases(
        sam,
        samples,
        load_image,
        load_mask,
        requests=requests,
        seed=seed,
        batch_size=batch_size,
        num_points=num_points,
        device=device,
        decoding=decoding,
        title=f"evaluating {model}",
    ):
        own: list[dict[str, object]] = []
        in_box: list[np.ndarray] = []
        for request, mask in masks.items():
            logits = upscaled(mask.low_res, case, sam.frame)
            if request in wanted:
                row = _row(logits, case, request[0], mask.predicted_iou, boundary_tolerance, sums)
                own.append(row)
                if request[0] not in (LEAKING, ZOOM, NONE):  # agreement is between prompts that an annotator gives
                    in_box.append(logits[case.big] > 0)
            if request in jittered and case.truth is not None:
                curve.append(
                    lesion_key(case.sample) | {"prompt": request[0], "share": request[1], "iou": _iou(logits, case)}
                )
        agreement = consistency(in_box)
        rows += [row | {"consistency": agreement} for row in own]
    evaluation = Evaluation(long_frame(rows, ROW_COLUMNS), calibration_frame(sums), long_frame(curve, JITTER_COLUMNS))
    return evaluation.labelled(model, run)


def lesion_key(sample: Sample) -> dict[str, object]:
    """Return the columns that name a lesion."""
    return {"image_id": sample.image_id, "lesion_id": sample.lesion_id}


def _row(
    logits: np.ndarray,
    case: Case,
    prompt: str,
    predicted_iou: float,
    tolerance: float,
    sums: dict[tuple[str, str], metrics.Calibration],
) -> dict[str, object]:
    """Return the row of one mask, and add its calibration to `sums`."""
    probabilities, entropy = metrics.probabilities_and_entropy(logits)
    everywhere = slice(None) if case.valid is None else case.valid
    if case.truth is not None:
        for region, where in (("image", everywhere), ("big_box", case.big)):
            new = metrics.Calibration.of(probabilities[where], case.truth[where])
            known = sums.get((prompt, region))
            sums[(prompt, region)] = new if known is None else known + new
    return (
        lesion_key(case.sample)
        | {"prompt": prompt, "width": case.sample.width, "height": case.sample.height}
        | measure(logits, case, tolerance)
        | {"predicted_iou": predicted_iou, "entropy": float(entropy[everywhere].mean())}
    )


def _iou(logits: np.ndarray, case: Case) -> float:
    prediction = logits > 0
    return metrics.iou(prediction if case.valid is None else prediction & case.valid, np.asarray(case.truth))


def consistency(predictions: Sequence[np.ndarray]) -> float:
    """Return the mean pairwise IoU of (h, w) bool masks of one lesion from several prompts; NaN for fewer than two."""
    pairs = [metrics.iou(a, b) for a, b in combinations(predictions, 2)]
    return float(np.mean(pairs)) if pairs else float("nan")
