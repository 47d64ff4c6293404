"""Evaluate the baselines that need no network: the ellipse and the box prior."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from lesionsam import metrics
from lesionsam.boxes.geometry import model_frame_size
from lesionsam.boxes.outline import Outline, find_outline
from lesionsam.boxes.prior import OUTSIDE, PRIOR_SIDE, ellipse_prior, prior_at
from lesionsam.evaluation.cases import LoadImage, LoadMask, build_cases, by_image, measure
from lesionsam.evaluation.columns import (
    ELLIPSE,
    JITTER_COLUMNS,
    PRIOR,
    PRIOR_OFFSET,
    ROW_COLUMNS,
    Evaluation,
    calibration_frame,
    long_frame,
)
from lesionsam.evaluation.evaluate import lesion_key
from lesionsam.types import Frame, Sample
from lesionsam.utils.progress import progress


def evaluate_baselines(
    samples: Sequence[Sample],
    load_image: LoadImage,
    load_mask: LoadMask | None = None,
    *,
    looseness: float | None,
    boundary_tolerance: float = metrics.BOUNDARY_TOLERANCE,
) -> tuple[Evaluation, Outline]:
    """Evaluate what both boxes give without a network: the ellipse, the box prior, the prior corrected.

    The prior reads its colours at `prior.PRIOR_SIDE` and is enlarged. The correction is found from the
    boxes and images of these samples alone. The ellipse needs the big box only, so it stands under `box` and
    `box+core`.

    Args:
        looseness: share by which annotators draw the big box too large, on average; None: found by colour.
    Returns:
        (evaluation, correction of the prior).
    """
    priors, bigs, smalls = [], [], []
    images = by_image(samples)
    for lesions in progress(images, total=len(images), title="baselines: priors"):
        image = load_image(lesions[0])
        for sample in lesions:
            others = np.array([other.big_box for other in lesions if other is not sample], float).reshape(-1, 4)
            height, width = model_frame_size(sample.width, sample.height, Frame(min(PRIOR_SIDE, max(image.shape[:2]))))
            priors.append(prior_at(image, sample.big_box, sample.small_box, others, (height, width)))
            scale = np.array([width / sample.width, height / sample.height] * 2)
            bigs.append(sample.big_box * scale)
            smalls.append(sample.small_box * scale)
    outline = find_outline(priors, bigs, smalls, looseness)
    rows: list[dict[str, object]] = []
    numbered = iter(priors)
    for lesions in progress(images, total=len(images), title="baselines: masks"):
        for case in build_cases(lesions, load_mask):
            sample = case.sample
            large = Image.fromarray(next(numbered)).resize((sample.width, sample.height), Image.Resampling.BILINEAR)
            prior = np.full(case.shape, OUTSIDE, np.float32)
            prior[case.big] = np.asarray(large)[case.big]
            masks = {(ELLIPSE, "box"): ellipse_prior(sample.big_box, case.shape), (PRIOR, "box+core"): prior}
            shifted = prior.copy()
            shifted[case.big] = outline.shift(prior, sample.big_box)[case.big]
            masks[PRIOR_OFFSET, "box+core"] = shifted
            for (model, prompt), logits in masks.items():
                row = (
                    lesion_key(sample)
                    | {"model": model, "run": "0", "prompt": prompt, "width": sample.width, "height": sample.height}
                    | measure(logits, case, boundary_tolerance)
                )
                rows += [row, row | {"prompt": "box+core"}] if model == ELLIPSE else [row]
    return Evaluation(long_frame(rows, ROW_COLUMNS), calibration_frame({}), long_frame([], JITTER_COLUMNS)), outline
