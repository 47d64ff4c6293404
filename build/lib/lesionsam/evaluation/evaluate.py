"""Model x samples x prompt sources -> one row per mask at the image's original size; the quick figure for selection.

Without masks the columns that need none remain: agreement between prompts, core coverage, leakage, entropy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import torch

from lesionsam import metrics
from lesionsam.evaluation.cases import (
    Case,
    FindLesions,
    LoadImage,
    LoadMask,
    LookAtBoxes,
    Request,
    measure,
    predict_cases,
    upscaled,
)
from lesionsam.evaluation.columns import CALIBRATION_COLUMNS, JITTER_COLUMNS, LEAKING, NEARER, ROW_COLUMNS, Evaluation
from lesionsam.models.sam import Sam
from lesionsam.prompts import NONE
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
    find: FindLesions | None = None,
    look: LookAtBoxes | None = None,
    model: str = "model",
    run: str = "0",
) -> Evaluation:
    """All figures of one model.

    Args:
        load_image: sample -> (H, W, 3) uint8 RGB. load_mask: sample -> (H, W) bool or None; None where no mask exists.
        prompts: prompt sources, each a row per lesion. seed: of drawn prompts and jitter; draws depend on seed, lesion
            and prompt alone, so that every model answers the same prompts.
        boundary_tolerance: of boundary F1, share of the diagonal. jitter: shares of the jitter curve (needs masks).
        find: answers the prompt source `none`, see `inference_lesion.find_lesions`. look: answers `nearer`, see
            `inference_lesion.look_at_boxes`.
    """
    wanted = [(prompt, 0.0) for prompt in prompts]
    jittered = (
        [(prompt, float(share)) for share in jitter for prompt in JITTER_PROMPTS] if load_mask is not None else []
    )
    requests: list[Request] = list(dict.fromkeys(wanted + jittered))
    side = int(sam.image_encoder.img_size)
    rows: list[dict[str, object]] = []
    curve: list[dict[str, object]] = []
    sums: dict[tuple[str, str], metrics.Calibration] = {}
    for case, answers in predict_cases(
        sam,
        samples,
        load_image,
        load_mask,
        requests=requests,
        seed=seed,
        batch_size=batch_size,
        num_points=num_points,
        device=device,
        find=find,
        look=look,
        title=f"evaluating {model}",
    ):
        own: list[dict[str, object]] = []
        in_box: list[np.ndarray] = []
        for request, (low_res, predicted_iou) in answers.items():
            logits = upscaled(low_res, case, side)
            if request in wanted:
                row = _row(logits, case, request[0], predicted_iou, boundary_tolerance, sums)
                own.append(row)
                if request[0] not in (LEAKING, NEARER, NONE):  # their agreement is that of what an annotator gives
                    in_box.append(logits[case.big] > 0)
            if request in jittered and case.truth is not None:
                curve.append(_key(case.sample) | {"prompt": request[0], "share": request[1], "iou": _iou(logits, case)})
        agreement = consistency(in_box)
        rows += [row | {"consistency": agreement} for row in own]
    return Evaluation(_frame(rows, ROW_COLUMNS), _calibration_frame(sums), _frame(curve, JITTER_COLUMNS)).labelled(
        model, run
    )


def _key(sample: Sample) -> dict[str, object]:
    return {"image_id": sample.image_id, "lesion_id": sample.lesion_id}


def _row(
    logits: np.ndarray,
    case: Case,
    prompt: str,
    predicted_iou: float,
    tolerance: float,
    sums: dict[tuple[str, str], metrics.Calibration],
) -> dict[str, object]:
    probabilities, entropy = metrics.probabilities_and_entropy(logits)
    everywhere = slice(None) if case.valid is None else case.valid
    if case.truth is not None:
        for region, where in (("image", everywhere), ("big_box", case.big)):
            new = metrics.Calibration.of(probabilities[where], case.truth[where])
            known = sums.get((prompt, region))
            sums[(prompt, region)] = new if known is None else known + new
    return (
        _key(case.sample)
        | {"prompt": prompt, "width": case.sample.width, "height": case.sample.height}
        | measure(logits, case, tolerance)
        | {"predicted_iou": predicted_iou, "entropy": float(entropy[everywhere].mean())}
    )


def _iou(logits: np.ndarray, case: Case) -> float:
    prediction = logits > 0
    return metrics.iou(prediction if case.valid is None else prediction & case.valid, np.asarray(case.truth))


def consistency(predictions: Sequence[np.ndarray]) -> float:
    """Mean pairwise IoU of (h, w) bool masks of one lesion from several prompts; NaN for fewer than two."""
    pairs = [metrics.iou(a, b) for a, b in combinations(predictions, 2)]
    return float(np.mean(pairs)) if pairs else float("nan")


def _frame(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(columns))


def _calibration_frame(sums: Mapping[tuple[str, str], metrics.Calibration]) -> pd.DataFrame:
    rows = []
    for (prompt, region), c in sums.items():
        for k in range(len(c.counts)):  # the squared error is one number: it stands in the first bin's row
            rows.append(
                {
                    "prompt": prompt,
                    "region": region,
                    "bin": k,
                    "count": c.counts[k],
                    "probability_sum": c.probability_sums[k],
                    "truth_sum": c.truth_sums[k],
                    "squared_error": c.squared_error if k == 0 else 0.0,
                }
            )
    return _frame(rows, CALIBRATION_COLUMNS)
