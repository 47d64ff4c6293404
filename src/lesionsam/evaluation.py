"""Model x samples x prompt sources -> one row per mask at the image's original size; the quick figure for selection.

Without masks the columns that need none remain: agreement between prompts, core coverage, leakage, entropy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from PIL import Image

from lesionsam import metrics
from lesionsam.boxes.geometry import model_frame_size
from lesionsam.boxes.prior import OUTSIDE, ellipse_prior, outline_offset
from lesionsam.data.dataset import Batches
from lesionsam.data.frames import PRIOR_SIDE, prior_at
from lesionsam.evaluation_cases import (
    LEAKING,
    NEARER,
    Case,
    FindLesions,
    LoadImage,
    LoadMask,
    LookAtBoxes,
    Request,
    build_cases,
    by_image,
    measure,
    predict_cases,
    upscaled,
)
from lesionsam.methods.grid import box_pixels
from lesionsam.models.prefix import encode_batch
from lesionsam.models.sam import Sam, decode
from lesionsam.prompts import NONE, seeded_prompts
from lesionsam.statistics import OBJECTIVE_PROMPTS
from lesionsam.types import Batch, Sample
from lesionsam.utils.progress import progress

JITTER_PROMPTS = ("box", "box+core")
ELLIPSE, PRIOR, PRIOR_OFFSET = "ellipse", "box prior", "box prior + offset"
ROW_COLUMNS = (
    "model",
    "run",
    "prompt",
    "image_id",
    "lesion_id",
    "width",
    "height",
    "lesion_share",
    "iou",
    "dice",
    "boundary_f1",
    "hd95",
    "thresholded_jaccard",
    "predicted_share",
    "predicted_iou",
    "entropy",
    "core_coverage",
    "leakage",
    "consistency",
)
JITTER_COLUMNS = ("model", "run", "prompt", "share", "image_id", "lesion_id", "iou")
CALIBRATION_COLUMNS = (
    "model",
    "run",
    "prompt",
    "region",
    "bin",
    "count",
    "probability_sum",
    "truth_sum",
    "squared_error",
)


@dataclass(frozen=True)
class Evaluation:
    """What was measured, in long format.

    Attributes:
        rows: `ROW_COLUMNS`; lesion_share to thresholded_jaccard are NaN without a mask, predicted_iou, entropy and
            consistency NaN for the baselines.
        calibration: `CALIBRATION_COLUMNS`; region is image or big_box.
        jitter: `JITTER_COLUMNS`.
    """

    rows: pd.DataFrame
    calibration: pd.DataFrame
    jitter: pd.DataFrame

    def labelled(self, model: str, run: str) -> Evaluation:
        """The same figures under a model's name and a run's (runs are seeds of one model)."""
        return Evaluation(*(frame.assign(model=model, run=run) for frame in (self.rows, self.calibration, self.jitter)))


def concat(parts: Sequence[Evaluation]) -> Evaluation:
    """Several models' figures in one."""
    frames = []
    for name in ("rows", "calibration", "jitter"):
        filled = [frame for part in parts if len(frame := getattr(part, name))]
        frames.append(pd.concat(filled, ignore_index=True) if filled else getattr(parts[0], name))
    return Evaluation(*frames)


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


def evaluate_baselines(
    samples: Sequence[Sample],
    load_image: LoadImage,
    load_mask: LoadMask | None = None,
    *,
    looseness: float,
    boundary_tolerance: float = metrics.BOUNDARY_TOLERANCE,
) -> tuple[Evaluation, float]:
    """What both boxes give without a network: the ellipse, the box prior, the box prior with its outline offset.

    The prior reads its colours at `frames.PRIOR_SIDE` and is enlarged. The offset is one number, found from the boxes
    and images of these samples alone. The ellipse needs the big box only, so it stands under `box` and `box+core`.

    Args:
        looseness: share by which annotators draw the big box too large, on average.
    Returns:
        (evaluation, offset).
    """
    priors, bigs = [], []
    images = by_image(samples)
    for lesions in progress(images, total=len(images), title="baselines: priors"):
        image = load_image(lesions[0])
        for sample in lesions:
            others = np.array([other.big_box for other in lesions if other is not sample], float).reshape(-1, 4)
            height, width = model_frame_size(sample.width, sample.height, min(PRIOR_SIDE, max(image.shape[:2])))
            priors.append(prior_at(image, sample.big_box, sample.small_box, others, (height, width)))
            bigs.append(sample.big_box * np.array([width / sample.width, height / sample.height] * 2))
    offset = outline_offset(priors, bigs, looseness)
    rows: list[dict[str, object]] = []
    numbered = iter(priors)
    for lesions in progress(images, total=len(images), title="baselines: masks"):
        for case in build_cases(lesions, load_mask):
            sample = case.sample
            large = Image.fromarray(next(numbered)).resize((sample.width, sample.height), Image.Resampling.BILINEAR)
            prior = np.full(case.shape, OUTSIDE, np.float32)
            prior[case.big] = np.asarray(large)[case.big]
            answers = {(ELLIPSE, "box"): ellipse_prior(sample.big_box, case.shape), (PRIOR, "box+core"): prior}
            shifted = prior.copy()
            shifted[case.big] += offset
            answers[PRIOR_OFFSET, "box+core"] = shifted
            for (model, prompt), logits in answers.items():
                row = (
                    _key(sample)
                    | {"model": model, "run": "0", "prompt": prompt, "width": sample.width, "height": sample.height}
                    | measure(logits, case, boundary_tolerance)
                )
                rows += [row, row | {"prompt": "box+core"}] if model == ELLIPSE else [row]
    none = _calibration_frame({})
    return Evaluation(_frame(rows, ROW_COLUMNS), none, _frame([], JITTER_COLUMNS)), offset


def quick_evaluate(
    sam: Sam,
    dataset: Batches,
    *,
    prompts: Sequence[str],
    seed: int,
    batch_size: int,
    device: torch.device | str,
    num_points: int = 10,
) -> dict[str, float]:
    """Figures for selection during training, on the model frame (not the reported ones, which are at original size).

    Args:
        dataset: the development split, decoded; masks are read from its batches where they carry any.
        prompts: prompt sources of `prompts.KINDS`; those of the objective among them make `objective`.
    Returns:
        prompt -> mean IoU, `objective` (mean over ring, centre and box), both only with masks; always `core_coverage`,
        `leakage`, `consistency` (means over lesions and prompts) and `label_free`, the mean of core coverage,
        consistency and 1 - leakage, in [0, 1].
    """
    was_training = sam.training
    sam.to(device).eval()
    scores: dict[str, list[np.ndarray]] = {}
    try:
        with torch.inference_mode():
            for batch in dataset.batches(batch_size):
                for name, values in _quick_batch(sam, batch.to(device), prompts, seed, num_points).items():
                    scores.setdefault(name, []).append(values.cpu().double().numpy())
    finally:
        sam.train(was_training)
    means = {
        name: float(np.nanmean(values))
        for name, parts in scores.items()
        if not np.isnan(values := np.concatenate(parts)).all()
    }
    if all(prompt in means for prompt in OBJECTIVE_PROMPTS):
        means["objective"] = float(np.mean([means[prompt] for prompt in OBJECTIVE_PROMPTS]))
    signals = [means["core_coverage"], 1 - means["leakage"], means.get("consistency", means["core_coverage"])]
    return means | {"label_free": float(np.mean(signals))}


def _quick_batch(sam: Sam, batch: Batch, prompts: Sequence[str], seed: int, num_points: int) -> dict[str, torch.Tensor]:
    side = batch.images.shape[-1]
    features = encode_batch(sam, batch)
    big, small = box_pixels(batch.big_boxes, side, side), box_pixels(batch.small_boxes, side, side)
    scores, masks = {}, []
    coverage, leakage = [], []
    for kind in prompts:
        drawn = seeded_prompts(kind, batch.big_boxes, batch.small_boxes, batch.ids, num_points=num_points, seed=seed)
        low_res, _ = decode(sam, features, drawn)
        full = torch.nn.functional.interpolate(low_res.float(), (side, side), mode="bilinear", align_corners=False)[
            :, 0
        ]
        mask = (full > 0) & batch.valid
        masks.append(mask & big)
        coverage.append((mask & small).sum((1, 2)) / small.sum((1, 2)).clamp(min=1))
        leakage.append((mask & ~big).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1))
        if batch.masks is not None:
            known = ~batch.masks.isnan().flatten(1).any(1)
            scores[kind] = torch.where(known, _mask_iou(mask, (batch.masks > 0.5) & batch.valid), torch.nan)
    scores |= {"core_coverage": torch.stack(coverage).mean(0), "leakage": torch.stack(leakage).mean(0)}
    if len(masks) > 1:
        scores["consistency"] = torch.stack([_mask_iou(a, b) for a, b in combinations(masks, 2)]).mean(0)
    return scores


def _mask_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    both, either = (first & second).sum((1, 2)), (first | second).sum((1, 2))
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both, dtype=torch.float32))
